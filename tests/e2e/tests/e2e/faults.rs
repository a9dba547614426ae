//! Six hosts in three regions, and what clients of all edges see of faults: no failed request, and no answer of a release
//! that is over.

use crate::control_lost::pids;
use crate::deploys::{config, image};
use crate::fleet::app;
use crate::liar::{Liar, Lie, TAKEN_MB};
use crate::poison;
use dunlin_e2e::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::{Duration, Instant};

const ALL: [&str; 6] = ["w1", "w2", "w3", "w4", "w5", "w6"];
/// An edge that hears of a release hears of it in this time.
const SETTLED: Duration = Duration::from_secs(2);
/// However loaded the computer: whoever asks for what cannot be reached hears so.
const ANSWERED_WITHIN: Duration = Duration::from_secs(20);
/// What the platform promises of machines of a lost host.
const REPLACED_WITHIN: Duration = Duration::from_secs(30);
/// Of each edge, so that two cores serve all.
const PER_SECOND: u32 = 4;

/// Clients of these edges, all of which have had an answer.
fn pulses<'a>(fleet: &Fleet, edges: impl IntoIterator<Item = &'a str>) -> Vec<(&'a str, Pulse)> {
    let all: Vec<_> = edges.into_iter().map(|id| (id, fleet.pulse(id, "web", PER_SECOND))).collect();
    assert!(until(|| all.iter().all(|(_, pulse)| pulse.heard().iter().any(Heard::is_good))), "not every edge serves");
    all
}

/// Until each client has asked so often since.
fn until_asked(all: &[(&str, Pulse)], since: Instant, times: usize) {
    let asked = |pulse: &Pulse| pulse.heard().iter().filter(|heard| heard.at > since).count();
    assert!(until(|| all.iter().all(|(_, pulse)| asked(pulse) >= times)));
}

/// Nobody was refused; what was asked for after `at` has this answer and no other.
fn nobody_failed(all: Vec<(&str, Pulse)>, at: Instant, answer: &str) {
    for (edge, pulse) in all {
        let heard = pulse.stop();
        assert!(Heard::failed(&heard).is_empty(), "at {edge}: {:?}", Heard::failed(&heard));
        assert_eq!(Heard::bodies_after(&heard, at), [answer], "at {edge}");
    }
}

/// T1: nothing that is said reaches one edge while there is a release. It asks machines' hosts, who send its requests on.
#[test]
fn an_edge_without_gossip_answers_from_no_old_release() {
    let fleet = Fleet::of_three_regions();
    let dir = app(&fleet, 3); // one in each region
    let deaf = *without_machines(&fleet).last().expect("three hosts have none");
    fleet.control().expect_log("the host is dead");
    fleet.host(deaf).expect_log("sendmsg error"); // the kernel tells it that its packets are dropped
    let all = pulses(&fleet, ALL);

    fleet.cut_gossip_only(deaf);
    let image = image(fleet.control());
    config(&dir, "2", "");
    fleet.control().ok_in(&dir, &["deploy", "--image", &image]);
    let deployed = Instant::now();
    until_asked(&all, deployed + SETTLED, 20);
    let stale = |id: &str| fleet.head(id, "web", "accept: */*").contains("dunlin-stale: ");
    fleet.host(deaf).until("the edge says that it is stale", || stale(deaf));
    assert!(deployed.elapsed() < Duration::from_secs(30), "it took {:?}", deployed.elapsed());
    assert_eq!(fleet.host(deaf).json(&["cluster", "status"])["cluster"]["cut_off"], true);
    assert!(ALL.iter().all(|id| *id == deaf || !stale(id)), "nobody else is");

    fleet.heal(deaf);
    fleet.host(deaf).until("it hears again", || !stale(deaf));
    fleet.until_up(&ALL);
    nobody_failed(all, deployed + SETTLED, "release 2");
}

/// Hosts that have no machine of the app: their edges send every request elsewhere.
fn without_machines(fleet: &Fleet) -> Vec<&'static str> {
    let machines = fleet.machines("web");
    ALL.into_iter().filter(|id| machines.values().all(|host| host != id)).collect()
}

/// T10: of some pairs of hosts one hears the other, and is not heard by it.
#[test]
fn links_that_drop_one_way_are_gone_around() {
    let fleet = Fleet::of_three_regions();
    app(&fleet, 3);
    let machines = fleet.machines("web");
    let edges = without_machines(&fleet);
    let (far, host) = machines.iter().find(|(_, host)| *host != "w1").expect("control's host has one at most");
    let (far, host) = (far.as_str(), host.as_str());
    let all = pulses(&fleet, ALL);

    let broken = Instant::now();
    fleet.one_way("w1", host);
    fleet.one_way(edges[0], host);
    fleet.one_way(host, edges[1]);
    // What is left of the paths of one edge is one region's.
    let other = machines.values().find(|other| *other != host).expect("one in each region");
    fleet.one_way(other, edges[1]);
    until_asked(&all, broken, 60);
    // Control cannot reach that host. Nobody waits long to hear so.
    let control = fleet.control();
    for ask in [&["machine", "status", far][..], &["machine", "exec", far, "--", "true"], &["logs", "--app", "web"], &["host", "status", host]] {
        let asked = Instant::now();
        let answer = control.dunlin(ask);
        assert!(asked.elapsed() < ANSWERED_WITHIN, "{ask:?} took {:?}: {}", asked.elapsed(), text(&answer));
    }
    assert_eq!(fleet.machines("web"), machines, "the host lives, as others hear of it");

    ALL.iter().for_each(|id| fleet.heal(id));
    let reached = |edge: &str| fleet.head(edge, "web", &format!("fly-force-instance-id: {far}")).starts_with("http/1.1 200");
    for edge in ALL {
        fleet.host(edge).until(&format!("{edge} reaches {host} again"), || reached(edge));
    }
    control.until("control reaches it again", || control.dunlin(&["machine", "exec", far, "--", "true"]).status.success());
    fleet.until_up(&ALL);
    nobody_failed(all, broken, "release 1");
}

/// T9 and the part of T8 that needs no control: a host is lost, then the region where control is, and all of it comes back.
#[test]
fn a_lost_host_and_a_lost_region_fail_nobody_elsewhere() {
    let mut fleet = Fleet::of_three_regions();
    app(&fleet, 3);
    let lost = fleet.machines("web").into_values().find(|host| !matches!(&**host, "w1" | "w2")).expect("one in each region");
    let all = pulses(&fleet, ALL.into_iter().filter(|id| *id != lost));
    fleet.control().expect_log("the host is dead");
    let killed = Instant::now();
    fleet.kill(&lost);
    let is_unreachable = || fleet.control().machine_list("web").iter().any(|machine| machine["host_status"] == "unreachable");
    fleet.control().until("the list says so", is_unreachable);
    fleet.control().until("it is replaced", || fleet.machines("web").values().all(|host| *host != lost));
    fleet.until_whole("web", 3);
    assert!(killed.elapsed() < REPLACED_WITHIN, "{:?}", killed.elapsed());
    until_asked(&all, killed, 40);
    fleet.power_on(&lost);
    fleet.until_up(&ALL);
    fleet.until_whole("web", 3);
    nobody_failed(all, killed, "release 1");

    // Of what is left one machine crashes, and comes back without anybody's word.
    let rest = ["w3", "w4", "w5", "w6"];
    let machines = fleet.machines("web");
    let (crashes, on) = machines.iter().find(|(_, host)| rest.contains(&host.as_str())).expect("one in each region");
    let all = pulses(&fleet, rest);
    let cut = Instant::now();
    fleet.kill("w1");
    fleet.kill("w2");
    until_asked(&all, cut, 20);
    nobody_failed(all, cut, "release 1");
    let server = fleet.host(on);
    server.expect_log("its supervisor was killed");
    let before = server.supervisor_pid(crashes).unwrap();
    kill(before, "KILL");
    server.until("it runs again", || server.supervisor_pid(crashes).is_some_and(|pid| pid != before));
    for id in ["w1", "w2"] {
        fleet.power_on(id);
    }
    fleet.control().wait_ready();
    fleet.until_up(&ALL);
    fleet.until_whole("web", 3);
}

/// T35: a failure brings a group together on one host. That is said, and when there is room elsewhere the machines move apart.
#[test]
fn machines_that_a_failure_brought_together_move_apart() {
    let mut fleet = Fleet::of_control("w1");
    let control = fleet.host_mut("w1");
    control.flags.extend(["--rebalance-after".into(), "5".into()]);
    control.stop();
    control.boot();
    fleet.join("w2");
    app(&fleet, 2);
    const CROWDED: &str = "all machines of the group are on one host";
    ["the host is dead", CROWDED].iter().for_each(|text| fleet.control().expect_log(text));
    let hosts = |fleet: &Fleet| fleet.machines("web").into_values().collect::<BTreeSet<String>>();
    assert_eq!(hosts(&fleet).len(), 2);
    let all = pulses(&fleet, ["w1"]);
    let began = Instant::now();
    fleet.control().ok(&["host", "cordon", "w2"]);
    fleet.kill("w2");
    fleet.control().until("it is replaced", || !hosts(&fleet).contains("w2"));
    fleet.until_whole("web", 2);
    fleet.power_on("w2");
    fleet.control().until("it is said", || fleet.control().log().contains(CROWDED));
    fleet.control().ok(&["host", "uncordon", "w2"]);
    fleet.control().until("they move apart", || hosts(&fleet).len() == 2);
    fleet.until_whole("web", 2);
    nobody_failed(all, began, "release 1");
}

/// T2: a member's own word, signed, in which nothing makes sense but what it says of itself.
#[test]
fn what_no_reader_understands_harms_nobody() {
    const RESERVED_MB: u64 = 77;
    let mut fleet = Fleet::of_three_regions();
    app(&fleet, 3);
    let others = without_machines(&fleet);
    let [.., carrier, victim] = others[..] else { panic!("three hosts have no machine: {others:?}") };
    let all = pulses(&fleet, ALL.into_iter().filter(|id| *id != carrier && *id != victim));
    fleet.control().expect_log("the host is dead");

    let began = Instant::now();
    fleet.host_mut(victim).stop();
    fleet.host_mut(carrier).stop();
    let bad = poison::spread_from(&fleet.host(victim).data(), &fleet.host(carrier).data(), RESERVED_MB);
    fleet.start_again(carrier);
    for id in ALL.into_iter().filter(|id| *id != victim) {
        let counted = || fleet.host(id).json(&["cluster", "status"])["cluster"]["gossip"]["unreadable_facts"].as_u64();
        fleet.host(id).until(&format!("{id} has counted what it cannot read"), || counted() >= Some(bad));
        assert_eq!(fleet.host(id).json(&["cluster", "verify"])["unsound"], serde_json::json!([]), "it is signed as it should be");
    }
    let metrics = Api::of(&fleet.control().data()).once("GET", "/metrics", &[], "").unwrap().1;
    let counted = metrics.lines().find_map(|line| line.strip_prefix("dunlin_cluster_refused_total{why=\"unreadable_fact\"} "));
    assert!(counted.and_then(|count| count.parse().ok()) >= Some(bad), "{counted:?}");
    assert_eq!(fleet.ask(&format!("/v1/hosts/{victim}"))["host"]["memory_reserved_mb"], RESERVED_MB, "what can be read of it counts");
    until_asked(&all, Instant::now(), 10);

    fleet.start_again(victim);
    fleet.until_up(&ALL);
    let itself = || fleet.ask(&format!("/v1/hosts/{victim}"))["host"]["memory_reserved_mb"] == 0;
    fleet.control().until("the host speaks for itself again", itself);
    fleet.until_whole("web", 3);
    nobody_failed(all, began, "release 1");
}

/// T14: what a host says of its room is wrong, first the one way, then the other. It is asked before it is believed, and
/// somebody is told.
#[test]
fn a_host_whose_word_of_its_room_is_wrong_is_asked_and_told_of() {
    const BOASTS: &str = "the host says that it has room, and refuses when it is asked";
    const MOANS: &str = "the host says that it is full, and has room when it is asked";
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    fleet.control().ok(&["host", "cordon", "w3"]);
    let dir = app(&fleet, 2);
    fleet.control().ok(&["host", "uncordon", "w3"]);
    ["the host is dead", BOASTS, MOANS].iter().for_each(|text| fleet.control().expect_log(text));
    let memory_mb = fleet.ask("/v1/hosts/w3")["host"]["memory_mb"].as_u64().unwrap() as u32;
    let hears = |fleet: &Fleet, taken_mb: u32| {
        fleet.control().until("control hears the lie", || says_taken(fleet) == Some(u64::from(taken_mb)));
    };
    let image = image(fleet.control());
    let all = pulses(&fleet, ["w1", "w2"]);

    fleet.host_mut("w3").stop();
    let liar = Liar::start(&fleet, "w3", memory_mb, Lie::Room);
    hears(&fleet, TAKEN_MB);
    fleet.until_up(&["w3"]);
    // None of the app's machines is there, so it is the best place. Once may mean that another was faster; then it is said.
    for count in [3_usize, 4] {
        fleet.control().ok(&["scale", "count", &count.to_string(), "--app", "web"]);
        fleet.until_whole("web", count);
    }
    assert!(fleet.machines("web").values().all(|host| host != "w3"), "it has refused them");
    assert!(fleet.control().log().contains(BOASTS), "{}", fleet.control().log());

    // Nobody else takes machines, and control asks before it says that nobody does.
    for id in ["w1", "w2"] {
        fleet.control().ok(&["host", "cordon", id]);
    }
    liar.says(Lie::Full);
    hears(&fleet, memory_mb);
    let mut scale = fleet.control().cli(&dir, &["scale", "count", "5", "--app", "web"]);
    let scale = scale.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    fleet.control().until("somebody is told", || fleet.control().log().contains(MOANS));
    fleet.control().until("it has the machine", || fleet.machines("web").values().any(|host| host == "w3"));
    for id in ["w1", "w2"] {
        fleet.control().ok(&["host", "uncordon", id]);
    }
    // The host itself makes what was placed there; it is not away for long enough to be dead, and if it were, others take machines.
    drop(liar);
    fleet.start_again("w3");
    let ended = scale.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}\n--- log of control\n{}", text(&ended), fleet.control().log());
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 5);
    let itself = || says_taken(&fleet).is_some_and(|taken_mb| taken_mb < u64::from(memory_mb));
    fleet.control().until("the host speaks for itself again", itself);

    config(&dir, "2", "");
    fleet.control().ok_in(&dir, &["deploy", "--image", &image]);
    let deployed = Instant::now();
    until_asked(&all, deployed + SETTLED, 20);
    nobody_failed(all, deployed + SETTLED, "release 2");
}

/// How much of the memory of w3 is taken, as control has heard.
fn says_taken(fleet: &Fleet) -> Option<u64> {
    fleet.ask("/v1/hosts/w3")["host"]["memory_reserved_mb"].as_u64()
}

/// T2 for desired state: what a control of a later version has said of it, and then that control is gone.
#[test]
fn desired_state_that_no_reader_understands_harms_nobody() {
    const HOSTS: [&str; 4] = ["w1", "w2", "w3", "w4"];
    const UNREADABLE: &str = "some of desired state cannot be read by this version";
    let mut fleet = Fleet::start(&HOSTS);
    // The machines are elsewhere than control and the one that is to hear the word first.
    for id in ["w1", "w4"] {
        fleet.control().ok(&["host", "cordon", id]);
    }
    let dir = app(&fleet, 2);
    for id in ["w1", "w4"] {
        fleet.control().ok(&["host", "uncordon", id]);
    }
    HOSTS.iter().for_each(|id| fleet.host(id).expect_log(UNREADABLE));
    fleet.control().expect_log("the host is dead");
    fleet.host("w4").expect_log("control was not told of this host"); // it starts while there is none
    let (image, machines, before) = (image(fleet.control()), fleet.machines("web"), pids(&fleet, &["w2", "w3"]));
    assert_eq!(before.len(), 2, "{machines:?}");
    let all = pulses(&fleet, ["w2", "w3"]);

    fleet.host_mut("w4").stop();
    fleet.host_mut("w1").stop();
    let bad = poison::spread_desired_of(&fleet.control().data(), &fleet.host("w4").data(), "web");
    fleet.start_again("w4");
    for id in &HOSTS[1..] {
        let server = fleet.host(id);
        let counted = || cluster_status(&fleet, id)["gossip"]["unreadable_facts"].as_u64();
        server.until(&format!("{id} has counted what it cannot read"), || counted() >= Some(bad));
        assert!(server.log().contains(UNREADABLE), "{}", server.log());
        // What can be read beside it counts: the app has another name.
        server.until(&format!("{id} reads the rest"), || server.get(poison::OTHER_NAME, "/") == (200, "release 1".into()));
        assert_eq!(server.get("web", "/"), (200, "release 1".into()), "at {id}");
        assert_eq!(server.json(&["cluster", "verify"])["unsound"], serde_json::json!([]), "it is signed as it should be");
        let status = cluster_status(&fleet, id);
        let log = status["logs"].as_array().into_iter().flatten().find(|log| log["name"] == "config/0");
        assert_eq!(log.map(|log| &log["quarantined"]), Some(&Value::Bool(false)), "{status}");
    }
    until_asked(&all, Instant::now(), 10);
    assert_eq!(pids(&fleet, &["w2", "w3"]), before, "nothing was started again");

    // Control of this version is back: its word is the whole again.
    fleet.start_again("w1");
    fleet.control().wait_ready();
    fleet.until_up(&HOSTS);
    assert_eq!((fleet.machines("web"), pids(&fleet, &["w2", "w3"])), (machines, before));
    config(&dir, "2", "");
    fleet.control().ok_in(&dir, &["deploy", "--image", &image]);
    let deployed = Instant::now();
    for id in HOSTS {
        fleet.host(id).until(&format!("{id} serves it"), || fleet.host(id).get("web", "/") == (200, "release 2".into()));
        // What stood beside the rows was of control's last generation, so it is control's next one that ends it.
        fleet.host(id).until(&format!("{id} has heard control"), || fleet.host(id).get(poison::OTHER_NAME, "/").0 != 200);
    }
    fleet.until_whole("web", 2);
    until_asked(&all, deployed + SETTLED, 20);
    nobody_failed(all, deployed + SETTLED, "release 2");
}

/// What a host says of its cluster; null where it does not answer.
fn cluster_status(fleet: &Fleet, id: &str) -> Value {
    let said = fleet.host(id).dunlin(&["cluster", "status", "--json"]);
    serde_json::from_slice::<Value>(&said.stdout).unwrap_or_default()["cluster"].take()
}
