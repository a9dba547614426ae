//! Hosts that come back with what was issued for them long ago.

use crate::fleet::app;
use dunlin_cluster::{Authority, Member};
use dunlin_e2e::*;
use std::time::{Duration, SystemTime};

const THREE_YEARS: Duration = Duration::from_secs(3 * 365 * 24 * 3600);

fn now_ms() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

fn member(fleet: &Fleet, id: &str) -> Member {
    Member::load(&fleet.host(id).data().join("cluster")).unwrap().expect("it has joined")
}

/// The host's certificate is one that control gave to it so long ago.
fn age(fleet: &Fleet, id: &str, by: Duration) {
    let authority = Authority::load_or_create(&fleet.control().data().join("control/cluster"), now_ms()).unwrap();
    let mut member = member(fleet, id);
    let then_ms = now_ms() - by.as_millis() as u64;
    member.issued = authority.issue(&member.host, &member.region, member.epoch, &member.keys.public().unwrap(), then_ms).unwrap();
    member.save(&fleet.host(id).data().join("cluster")).unwrap();
}

#[test]
fn a_host_that_was_off_for_longer_than_its_certificate_lives_is_certified_anew() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    fleet.host_mut("w2").stop();
    age(&fleet, "w2", THREE_YEARS);
    fleet.host_mut("w1").stop();
    // Nobody certifies while control is away, and that is said.
    const ENDED: &str = "this host's certificate has ended";
    for text in [ENDED, "control was not told of this host"] {
        fleet.host("w2").expect_log(text);
    }
    // It is away for longer than one that restarts.
    for text in ["most hosts do not answer", "the host is dead"] {
        fleet.host("w1").expect_log(text);
    }
    fleet.start_again("w2");
    fleet.host("w2").until("it says what is wrong", || fleet.host("w2").log().contains(ENDED));
    assert!(member(&fleet, "w2").issued.not_after_ms < now_ms());
    fleet.start_again("w1");
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.host("w2").until("it is certified", || member(&fleet, "w2").issued.not_after_ms > now_ms());
    assert!(fleet.host("w2").log().contains("this host has a certificate again"));
    assert!(fleet.control().log().contains("has proved its key and is certified anew"));
    fleet.until_whole("web", 3);
    for id in ["w1", "w2", "w3"] {
        let server = fleet.host(id);
        server.until(&format!("the edge of {id} serves"), || server.get("web", "/") == (200, "release 1".into()));
    }
}

#[test]
fn a_host_that_joined_before_there_were_logs_of_machines_gets_the_right_to_its_own() {
    let mut fleet = Fleet::start(&["w1", "w2"]);
    app(&fleet, 2);
    fleet.host_mut("w2").stop();
    let mut old = member(&fleet, "w2");
    old.issued.machines_log_certificate.clear();
    old.save(&fleet.host("w2").data().join("cluster")).unwrap();
    fleet.start_again("w2");
    fleet.until_up(&["w1", "w2"]);
    assert!(!member(&fleet, "w2").lacks_logs());
    fleet.until_whole("web", 2);
}

fn runs_on(fleet: &Fleet, id: &str) -> usize {
    fleet.supervised().iter().filter(|(_, host)| host == id).count()
}

const REMOVED: &str = "this host was removed from its cluster, as control has signed";

/// It answers, so that it hears of its tombstones before nobody speaks to it any more, and of its removal after that.
#[test]
fn a_host_that_is_removed_by_force_and_lives_ends_what_it_ran() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    assert_eq!(runs_on(&fleet, "w3"), 1);
    for text in [REMOVED, "control was not told of this host"] {
        fleet.host("w3").expect_log(text);
    }
    let removed: serde_json::Value = serde_json::from_str(&fleet.control().ok(&["--json", "host", "remove", "w3", "--force", "--yes"])).unwrap();
    assert_eq!((&removed["machines"], &removed["not_heard_of"]), (&1.into(), &serde_json::Value::Null), "{removed}");
    assert_eq!(runs_on(&fleet, "w3"), 0);
    fleet.host("w3").until("it knows", || fleet.host("w3").log().contains(REMOVED));
    fleet.until_whole("web", 3);
    fleet.host_mut("w3").stop();
    fleet.host("w3").ok(&["host", "leave", "--yes"]);
}

/// It was not there when it was removed, and is refused by all when it is again.
#[test]
fn a_host_that_was_removed_while_it_was_cut_off_is_told_and_ends_what_it_runs() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    for text in [REMOVED, "control was not told of this host"] {
        fleet.host("w3").expect_log(text);
    }
    fleet.control().expect_log("the host is dead");
    fleet.cut("w3");
    let removed: serde_json::Value = serde_json::from_str(&fleet.control().ok(&["--json", "host", "remove", "w3", "--force", "--yes"])).unwrap();
    assert_eq!((&removed["machines"], &removed["not_heard_of"]), (&1.into(), &1.into()), "{removed}");
    fleet.until_whole("web", 3);
    assert_eq!(runs_on(&fleet, "w3"), 1, "nothing is ended because nobody is heard");
    fleet.heal("w3");
    fleet.host("w3").until("it has ended what it ran", || runs_on(&fleet, "w3") == 0);
    assert!(fleet.host("w3").log().contains(REMOVED));
    // It stays so, whatever its disk remembers of desired state.
    fleet.host_mut("w3").stop();
    let starts = fleet.host("w3").log().matches(REMOVED).count();
    fleet.start_again("w3");
    fleet.host("w3").until("it says so again", || fleet.host("w3").log().matches(REMOVED).count() > starts);
    assert_eq!(runs_on(&fleet, "w3"), 0);
    fleet.until_up(&["w1", "w2"]);
}
