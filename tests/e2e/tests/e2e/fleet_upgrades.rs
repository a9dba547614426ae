//! A new binary for all hosts by one command: a good one reaches all of them under load, a bad one stops at the canary (T13).

use crate::deploys::config;
use dunlin_e2e::*;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const IDS: [&str; 3] = ["w1", "w2", "w3"];
/// The least that is taken.
const BAKE: &str = "12s";

/// Three hosts, and an app with a machine on each.
fn fleet() -> Fleet {
    let fleet = Fleet::with_own_binaries(&IDS);
    let control = fleet.control();
    let dir = control.source("web", PYTHON);
    config(&dir, "1", "");
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&dir, &["deploy"]);
    control.ok(&["scale", "count", "3", "--app", "web"]);
    fleet.until_whole("web", 3);
    let served = |id: &&str| fleet.host(id).get("web", "/") == (200, "release 1".into());
    fleet.control().until("every edge serves", || IDS.iter().all(&served));
    fleet
}

/// Does the same as what cargo built, and is another file.
fn newer(fleet: &Fleet) -> PathBuf {
    let path = fleet.control().dir().join("dunlin-next");
    fs::copy(binary(), &path).unwrap();
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"newer").unwrap();
    path
}

/// A build that fails in some way: what it does instead of being a server.
fn broken(fleet: &Fleet, name: &str, serves: &str) -> PathBuf {
    let path = fleet.control().dir().join(name);
    fs::write(&path, format!("#!/bin/sh\n[ \"$1\" = __serve ] || exec {0} \"$@\"\n{serves}\nexec {0} \"$@\"\n", binary().display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn own_binary(fleet: &Fleet, id: &str) -> PathBuf {
    fleet.host(id).dir().join("dunlin")
}

fn same(one: &Path, other: &Path) -> bool {
    fs::read(one).unwrap() == fs::read(other).unwrap()
}

fn phases(shown: &Value) -> Vec<(&str, &str)> {
    let turns = shown["hosts"].as_array().unwrap().iter();
    turns.map(|turn| (turn["host"].as_str().unwrap(), turn["phase"].as_str().unwrap())).collect()
}

fn upgrade<'a>(binary: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["cluster", "upgrade", "--bake", BAKE, "--binary", binary.to_str().unwrap()], more].concat()
}

fn all_good(pulses: Vec<Pulse>) {
    for pulse in pulses {
        let heard = pulse.stop();
        assert!(heard.len() > 20 && Heard::failed(&heard).is_empty(), "{:?} of {}", Heard::failed(&heard), heard.len());
    }
}

#[test]
fn a_good_binary_reaches_all_hosts_under_load() {
    let fleet = fleet();
    let supervised = fleet.supervised();
    let newer = newer(&fleet);
    let pulses = ["w1", "w2"].map(|id| fleet.pulse(id, "web", 5)).into();
    let said = fleet.control().ok(&upgrade(&newer, &["--canary", "w2"]));
    let order: Vec<_> = ["w2 is the canary", "w2: keeps", "w3: takes the binary", "w3: keeps", "w1: takes the binary", "w1: keeps", "done: 3 of 3 hosts"].into();
    let places: Vec<_> = order.iter().map(|text| said.find(text).unwrap_or_else(|| panic!("no {text:?} in {said}"))).collect();
    assert!(places.is_sorted(), "{said}");
    all_good(pulses);
    assert_eq!(fleet.supervised(), supervised, "machines live on");
    for id in IDS {
        assert!(same(&own_binary(&fleet, id), &newer) && same(&fleet.host(id).dir().join("dunlin.previous"), &binary()), "{id}");
    }
    let status = fleet.control().json(&["cluster", "upgrade", "status"]);
    assert_eq!((status["state"].as_str(), phases(&status)), (Some("done"), vec![("w2", "kept"), ("w3", "kept"), ("w1", "kept")]));
    // All have it, and nobody is touched again.
    let before = IDS.map(|id| fleet.host(id).server_pid());
    assert!(fleet.control().ok(&upgrade(&newer, &[])).contains("has this binary already"));
    assert_eq!(IDS.map(|id| fleet.host(id).server_pid()), before);
}

#[test]
fn a_bad_binary_stops_at_its_canary_by_itself() {
    let fleet = fleet();
    let supervised = fleet.supervised();
    let pids = || ["w1", "w3"].map(|id| fleet.host(id).server_pid());
    let before = pids();
    for said in ["the upgrade failed; going back", "the binary that failed was moved"] {
        fleet.host("w2").expect_log(said);
    }
    fleet.control().expect_log("the upgrade of the fleet has stopped");
    let pulses = vec![fleet.pulse("w1", "web", 5)];
    let canary = ["--canary", "w2"];
    let untouched = |story: &str| {
        assert_eq!(pids(), before, "{story}");
        assert!(IDS.iter().all(|id| same(&own_binary(&fleet, id), &binary())), "{story}");
        let status = fleet.control().json(&["cluster", "upgrade", "status"]);
        assert_eq!(phases(&status), [("w2", "failed"), ("w3", "waiting"), ("w1", "waiting")], "{status}");
        assert_eq!(status["hosts"][0]["is_back"], true, "{status}");
    };

    // It does not start at all.
    let dead = broken(&fleet, "dunlin-dead", "exit 3");
    let said = fleet.control().fails(&upgrade(&dead, &canary), 1, &["w2: its server ended: exit status: 3", "dunlin host debug w2"]);
    untouched(&said);

    // It starts and gets ready, but requests do not come through its edge.
    let rule = "nft 'add table inet e2e_faults; add chain inet e2e_faults o { type filter hook output priority 0; }; \
                add rule inet e2e_faults o oif lo tcp dport 80 reject'";
    let deaf = broken(&fleet, "dunlin-deaf", rule);
    let said = fleet.control().fails(&upgrade(&deaf, &canary), 1, &["w2: a request through its own edge fails", "resume"]);
    untouched(&said);
    fleet.heal("w2");

    // What is no program for these hosts is not even begun with.
    let none = fleet.control().dir().join("dunlin-none");
    fs::write(&none, "no program").unwrap();
    fleet.control().fails(&upgrade(&none, &canary), 1, &["control's host does not take the binary"]);
    all_good(pulses);
    assert_eq!(fleet.supervised(), supervised, "machines live on");
}

/// Control is killed in the middle of it, and ends it all the same; only root there may begin one.
#[test]
fn an_upgrade_outlives_control_and_is_roots() {
    let fleet = Fleet::with_own_binaries(&["w1", "w2"]);
    let newer = newer(&fleet);
    fleet.host("w2").fails(&upgrade(&newer, &[]), 1, &["the request has no token"]);
    fleet.control().ok(&upgrade(&newer, &["--detach"]));
    fleet.control().fails(&upgrade(&newer, &[]), 1, &["is under way"]);
    let status = || fleet.control().dunlin(&["cluster", "upgrade", "status", "--json"]);
    let shown = || serde_json::from_slice::<Value>(&status().stdout).unwrap_or_default();
    let phase = |n: usize| shown()["hosts"][n]["phase"].as_str().unwrap_or_default().to_owned();
    fleet.control().until("the canary is watched", || phase(0) == "baking");
    fleet.control().kill_server();
    fleet.control().until("it is through", || shown()["state"] == "done");
    assert!(["w1", "w2"].iter().all(|id| same(&own_binary(&fleet, id), &newer)));
    // Both say what they run.
    assert!(fleet.list().iter().all(|host| host["version"].is_string()), "{:?}", fleet.list());
}
