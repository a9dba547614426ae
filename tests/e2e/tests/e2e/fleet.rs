//! Hosts of one cluster, each in a network namespace of its own, and what becomes of apps when hosts and lines fail.

use crate::deploys::config;
use dunlin_e2e::*;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// An edge that is not control's hears of a release a moment later.
const SETTLED: Duration = Duration::from_secs(2);
/// What a person takes for a hiccup.
const SHORT: Duration = Duration::from_secs(5);
/// What the platform promises of machines of a lost host.
const REPLACED_WITHIN: Duration = Duration::from_secs(30);

/// A dial of some seconds, and what comes before it on a slow computer.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

/// The host is a computer of its own: it serves others, and a line that is cut, or power that is, takes all of it.
#[test]
fn a_host_in_a_namespace_serves_and_fails_as_a_whole() {
    let mut fleet = Fleet::of_control("w1");
    let server = fleet.control();
    let dir = server.source("web", PYTHON);
    config(&dir, "1", "");
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&dir, &["deploy"]);
    assert_eq!((server.get("web", "/"), server.get_tls("web", "/").0), ((200, "release 1".into()), 200));
    let machine = server.machines("web").remove(0);

    let pulse = fleet.pulse("w1", "web", 20);
    assert!(until(|| pulse.heard().iter().filter(|heard| heard.is_good()).count() > 20));
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "{heard:?}");

    fleet.cut("w1");
    let pulse = fleet.pulse("w1", "web", 5);
    assert!(until(|| pulse.heard().iter().any(|heard| !heard.is_good())));
    fleet.heal("w1");
    assert!(until(|| pulse.heard().iter().any(Heard::is_good)));
    drop(pulse);

    fleet.host_mut("w1").expect_log("its supervisor was killed");
    fleet.kill("w1");
    assert_eq!(fleet.control().supervisor_pid(&machine), None);
    assert!(leftovers(&fleet.control().data()).iter().all(|left| left.starts_with("/") || left.starts_with("loop")), "nothing runs");
    fleet.power_on("w1");
    fleet.control().wait_ready();
    fleet.control().until("it serves again", || fleet.control().get("web", "/") == (200, "release 1".into()));
    assert_eq!(fleet.control().machines("web"), [machine]);
}

/// The usual app, in so many machines on hosts that the planner chooses.
pub fn app(fleet: &Fleet, count: usize) -> PathBuf {
    let control = fleet.control();
    let dir = control.source("web", PYTHON);
    config(&dir, "1", "");
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&dir, &["deploy"]);
    control.ok(&["scale", "count", &count.to_string(), "--app", "web"]);
    fleet.until_whole("web", count);
    dir
}

/// Every edge answers, whichever host has the machines.
fn every_edge_serves(fleet: &Fleet, ids: &[&str]) {
    for id in ids {
        let server = fleet.host(id);
        server.until(&format!("the edge of {id} serves"), || server.get("web", "/") == (200, "release 1".into()));
    }
}

fn hosts_of(fleet: &Fleet) -> Vec<String> {
    let mut hosts: Vec<String> = fleet.machines("web").into_values().collect();
    hosts.sort();
    hosts
}

#[test]
fn three_hosts_are_one_platform() {
    let fleet = Fleet::start(&["w1", "w2", "w3"]);
    let dir = app(&fleet, 1);
    // One machine: two of three edges forward to another host.
    every_edge_serves(&fleet, &["w1", "w2", "w3"]);
    fleet.control().ok(&["scale", "count", "3", "--app", "web"]);
    fleet.until_whole("web", 3);
    assert_eq!(hosts_of(&fleet), ["w1", "w2", "w3"], "each has one");
    every_edge_serves(&fleet, &["w1", "w2", "w3"]);

    let control = fleet.control();
    for (machine, host) in fleet.machines("web") {
        let logs = || control.ok(&["logs", "--app", "web", "--machine", &machine]);
        control.until(&format!("logs from {host}"), || logs().contains("listens on"));
        let said = control.ok(&["machine", "exec", &machine, "--", "printenv", "DUNLIN_MACHINE_ID"]);
        assert_eq!(said.trim(), machine, "a command on {host}");
    }

    // A release under requests at each edge: none fails, and none is answered by the old one afterwards.
    let pulses: Vec<Pulse> = ["w1", "w2", "w3"].iter().map(|id| fleet.pulse(id, "web", 10)).collect();
    config(&dir, "2", "");
    control.ok_in(&dir, &["deploy"]);
    let deployed = Instant::now();
    assert!(until(|| pulses.iter().all(|pulse| pulse.heard().iter().filter(|heard| heard.at > deployed + SETTLED).count() > 10)));
    for pulse in pulses {
        let heard = pulse.stop();
        assert!(Heard::failed(&heard).is_empty(), "{:?}", Heard::failed(&heard));
        assert_eq!(Heard::bodies_after(&heard, deployed + SETTLED), ["release 2"]);
    }
}

/// It asks w2, and w1, where control runs, finds out whether it is reached.
#[test]
fn a_host_behind_a_firewall_is_not_let_in() {
    let mut fleet = Fleet::start(&["w1", "w2"]);
    fleet.newcomer("w3");
    let token = fleet.control().ok(&["host", "token"]);
    let token = token.trim();
    fleet.control().expect_log("a host was refused");
    for (closed, open) in [("udp", "tcp"), ("tcp", "udp")] {
        fleet.close_port("w3", closed);
        let began = Instant::now();
        let refused = fleet.try_join("w3", "w2", token);
        let said = text(&refused);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(began.elapsed() < REFUSED_WITHIN, "{:?}", began.elapsed());
        let over = format!("host w3 is not reached at 10.77.0.3:7373 over {} (no answer within 4 s)", closed.to_uppercase());
        for part in [&over, "host w1, where control runs, tried it from 10.77.0.1", &format!("let 7373/{closed} in"), "--advertise", "token is as good"] {
            assert!(said.contains(part), "no {part}: {said}");
        }
        assert!(!said.contains(&format!("over {}", open.to_uppercase())), "{said}");
        assert_eq!(fleet.state_of("w3"), None, "control has written nothing");
        fleet.heal("w3");
    }
    let joined = fleet.try_join("w3", "w2", token);
    assert!(joined.status.success(), "{}\n{}", text(&joined), fleet.control().log());
    let said: serde_json::Value = serde_json::from_slice(&joined.stdout).unwrap();
    assert_eq!((&said["reached_by"], &said["advertise"]), (&"w1".into(), &"10.77.0.3:7373".into()));
    let checks: Vec<&str> = said["checks"].as_array().unwrap().iter().filter_map(|check| check["name"].as_str()).collect();
    assert_eq!(checks, ["disk", "cluster port", "reached over UDP", "reached over TCP"]);
    fleet.start_again("w3");
    fleet.until_up(&["w1", "w2", "w3"]);
}

#[test]
fn a_host_that_is_lost_is_replaced_and_comes_back_to_nothing() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    assert_eq!(hosts_of(&fleet), ["w1", "w2", "w3"]);
    let pulse = fleet.pulse("w1", "web", 10);
    assert!(until(|| pulse.heard().len() > 10));
    let killed = Instant::now();
    fleet.control().expect_log("the host is dead");
    fleet.kill("w3");
    let elsewhere = || hosts_of(&fleet).iter().all(|host| host != "w3") && hosts_of(&fleet).len() == 3;
    assert!(until(elsewhere), "{:?}\n{}", fleet.machines("web"), fleet.control().log());
    fleet.until_whole("web", 3);
    assert!(killed.elapsed() < REPLACED_WITHIN, "{:?}", killed.elapsed());
    let heard = pulse.stop();
    assert!(Heard::longest_gap(&heard) < SHORT, "{:?} without an answer; {:?}", Heard::longest_gap(&heard), Heard::failed(&heard));

    fleet.power_on("w3");
    fleet.until_up(&["w3"]);
    fleet.until_whole("web", 3);
    let web: Vec<String> = fleet.machines("web").into_keys().collect();
    fleet.host("w3").until("what was replaced does not run there", || fleet.supervised().iter().all(|(id, _)| web.contains(id)));
    every_edge_serves(&fleet, &["w1", "w2", "w3"]);
}

#[test]
fn without_control_hosts_serve_wake_and_restart() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    let machine_on = |host: &str| fleet.machines("web").into_iter().find(|(_, on)| on == host).expect("it has one").0;
    let (crashes, sleeps) = (machine_on("w2"), machine_on("w3"));
    fleet.control().ok(&["machine", "stop", &sleeps]);
    fleet.host_mut("w1").stop();
    fleet.host("w2").expect_log("its supervisor was killed");

    let pulse = fleet.pulse("w2", "web", 10);
    let before = fleet.host("w2").supervisor_pid(&crashes).unwrap();
    kill(before, "KILL");
    fleet.host("w2").until("it runs again", || fleet.host("w2").supervisor_pid(&crashes).is_some_and(|pid| pid != before));
    assert!(until(|| pulse.heard().len() > 50));
    let heard = pulse.stop();
    assert!(Heard::longest_gap(&heard) < SHORT, "{:?}", Heard::failed(&heard));

    // With all others gone, a request to one edge wakes the machine of another host.
    fleet.kill("w1");
    kill(fleet.host("w2").supervisor_pid(&crashes).unwrap(), "STOP");
    every_edge_serves(&fleet, &["w2", "w3"]);
    kill(fleet.host("w2").supervisor_pid(&crashes).unwrap(), "CONT");
    fleet.power_on("w1");
    fleet.control().wait_ready();
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 3);
}

/// Names are compared whole: nothing of w10 goes with w1.
#[test]
fn w1_leaves_and_w10_stays() {
    let mut fleet = Fleet::start(&["w0", "w1", "w10"]);
    app(&fleet, 3);
    let stays = |fleet: &Fleet| -> Vec<String> { fleet.machines("web").into_iter().filter(|(_, host)| host == "w10").map(|(id, _)| id).collect() };
    let before = stays(&fleet);
    assert_eq!(before.len(), 1);
    let pulse = fleet.pulse("w10", "web", 10);
    fleet.control().ok(&["host", "drain", "w1"]);
    assert!(until(|| !hosts_of(&fleet).contains(&"w1".to_owned())), "{:?}", fleet.machines("web"));
    fleet.until_whole("web", 3);
    fleet.control().ok(&["host", "remove", "w1", "--yes"]);
    fleet.host_mut("w1").stop();
    fleet.host("w1").ok(&["host", "leave", "--yes"]);
    let known: Vec<_> = fleet.list().iter().map(|host| host["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(known, ["w0", "w10"]);
    fleet.until_up(&["w0", "w10"]);
    assert!(before.iter().all(|id| stays(&fleet).contains(id)), "{before:?} and {:?}", fleet.machines("web"));
    every_edge_serves(&fleet, &["w0", "w10"]);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "{:?}", Heard::failed(&heard));
}

/// Two computers that say they are the same host: the copy is told, and the other goes on.
#[test]
fn a_copy_of_a_hosts_disk_is_told_that_it_is_one() {
    let mut fleet = Fleet::start(&["w1", "w2"]);
    app(&fleet, 2);
    let pulse = fleet.pulse("w1", "web", 10);
    fleet.clone_of("w2", "copy");
    const TOLD: &str = "another running process has this host's identity";
    fleet.host("copy").expect_log(TOLD);
    fleet.host("copy").until("it is told", || fleet.host("copy").log().contains(TOLD));
    fleet.host("copy").until("it runs nothing", || fleet.supervised().iter().all(|(_, host)| host != "copy"));
    assert_ne!(fleet.host("copy").get("web", "/").0, 200, "it serves nobody");
    fleet.until_up(&["w1", "w2"]);
    fleet.until_whole("web", 2);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "{:?}", Heard::failed(&heard));
}

#[test]
fn all_hosts_lose_power_and_come_back_in_any_order() {
    let mut fleet = Fleet::of_three_regions();
    app(&fleet, 3);
    let before = fleet.machines("web");
    for id in ["w1", "w2", "w3", "w4", "w5", "w6"] {
        fleet.host(id).expect_log("its supervisor was killed");
    }
    ["most hosts do not answer", "the host is dead"].iter().for_each(|text| fleet.control().expect_log(text));
    // Control is the last once, and the first once.
    for order in [["w6", "w2", "w4", "w3", "w5", "w1"], ["w1", "w3", "w5", "w4", "w6", "w2"]] {
        for id in order {
            fleet.kill(id);
        }
        for id in order {
            fleet.power_on(id);
        }
        fleet.control().wait_ready();
        fleet.until_up(&order);
        fleet.until_whole("web", 3);
        assert_eq!(fleet.machines("web"), before, "in the order {order:?}");
        every_edge_serves(&fleet, &order);
    }
}
