//! An app that runs in one region, asked for in all: what edges know of it, and when.

use crate::deploys::config;
use dunlin_e2e::*;
use serde_json::Value;

const HOSTS: [&str; 3] = ["w1", "w2", "w3"];

/// (name, scope, rows, bytes) of all logs that the host holds.
fn logs(fleet: &Fleet, host: &str) -> Vec<(String, String, u64, u64)> {
    let status = fleet.host(host).json(&["cluster", "status"]);
    let text = |log: &Value, name: &str| log[name].as_str().unwrap().to_owned();
    let log = |log: &Value| (text(log, "name"), text(log, "scope"), log["rows"].as_u64().unwrap(), log["bytes"].as_u64().unwrap());
    status["cluster"]["logs"].as_array().unwrap().iter().map(log).collect()
}

/// Why the host holds the log of another's machines, if it does.
fn scope(fleet: &Fleet, host: &str, of: &str) -> Option<String> {
    let name = format!("machines/{of}");
    logs(fleet, host).into_iter().find(|(log, ..)| *log == name).map(|(_, scope, ..)| scope)
}

fn print_held(fleet: &Fleet, when: &str) {
    for host in HOSTS {
        for scope in ["global", "region", "subscribed"] {
            let held: Vec<_> = logs(fleet, host).into_iter().filter(|(_, of, ..)| of == scope).collect();
            let (rows, bytes) = held.iter().fold((0, 0), |(rows, bytes), log| (rows + log.2, bytes + log.3));
            println!("{when}: {host} holds {} {scope} logs with {rows} rows, {bytes} bytes", held.len());
        }
    }
}

#[test]
fn an_app_falls_back_along_its_order_of_regions_and_no_further() {
    // w1 in ams, w2 in fra, w3 in iad.
    let fleet = Fleet::start(&HOSTS);
    let control = fleet.control();
    let dir = control.source("web", PYTHON);
    let write = |release: &str, regions: &str| {
        config(&dir, release, "");
        let text = std::fs::read_to_string(dir.join("dunlin.toml")).unwrap();
        std::fs::write(dir.join("dunlin.toml"), format!("primary_region = \"{regions}\"\n{text}")).unwrap();
    };
    write("1", "fra,,ams");
    control.fails_in(&dir, &["deploy"], 2, &["dunlin.toml:1:18: primary_region: \"fra,,ams\" has a comma with no region", "for example fra or fra,ams,eu"]);
    write("1", "fra,ams");
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&dir, &["deploy"]);
    control.ok(&["host", "cordon", "w2"]);
    control.ok(&["scale", "count", "2", "--app", "web"]);
    fleet.until_whole("web", 2);
    let both = fleet.machines("web");
    let hosts = both.values().map(String::as_str).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(hosts, ["w1", "w2"].into());
    for id in both.keys() {
        assert_eq!(control.ok(&["machine", "exec", id, "--", "printenv", "PRIMARY_REGION"]).trim(), "fra");
    }
    control.ok(&["host", "uncordon", "w2"]);
    write("2", "fra,ams");
    control.ok_in(&dir, &["deploy"]);
    assert_eq!(fleet.machines("web"), both, "what fell back stays");

    ["w1", "w2"].iter().for_each(|host| drop(control.ok(&["host", "cordon", host])));
    control.expect_log("plan failed");
    let says = [
        "no host in fra,ams has room for a machine with", "host w1 (ams) is cordoned", "host w2 (fra) is cordoned",
        "the nearest region with room is iad, 6549 km from fra", "primary_region = \"fra,ams,iad\"",
    ];
    control.fails(&["scale", "count", "3", "--app", "web"], 3, &says);
    assert_eq!(fleet.machines("web"), both);
}

#[test]
fn an_edge_elsewhere_knows_the_sum_until_it_is_asked() {
    let fleet = Fleet::start(&HOSTS);
    let control = fleet.control();
    let dir = control.source("web", PYTHON);
    config(&dir, "1", "");
    // Only the region of w2 has any.
    let text = std::fs::read_to_string(dir.join("dunlin.toml")).unwrap();
    std::fs::write(dir.join("dunlin.toml"), text.replacen("app = \"web\"\n", "app = \"web\"\nprimary_region = \"fra\"\n", 1)).unwrap();
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&dir, &["deploy"]);
    fleet.until_whole("web", 1);
    let (machine, host) = fleet.machines("web").pop_first().unwrap();
    assert_eq!(host, "w2");
    // Everybody knows of w2 and that its region has one that is ready; control, which plans over all, knows more.
    control.until("control sees w2's machines", || scope(&fleet, "w1", "w2").as_deref() == Some("subscribed"));
    assert_eq!(scope(&fleet, "w2", "w2").as_deref(), Some("region"));
    let rows = |host: &str| logs(&fleet, host).into_iter().find(|log| log.0 == "host/w2").map_or(0, |log| log.2);
    fleet.host("w3").until("w3 has w2's word and the sum of its region", || rows("w3") >= 2);
    assert_eq!(scope(&fleet, "w3", "w2"), None, "nobody asked there");
    print_held(&fleet, "before");

    // The very first request is served.
    assert_eq!(fleet.host("w3").get("web", "/"), (200, "release 1".into()));
    fleet.host("w3").until("w3 says what it holds", || scope(&fleet, "w3", "w2").as_deref() == Some("subscribed"));
    print_held(&fleet, "after");

    // What becomes of it is known at once: it is put to sleep under requests there, and none of them fails.
    let pulse = fleet.pulse("w3", "web", 10);
    assert!(until(|| pulse.heard().len() > 10));
    control.ok(&["machine", "stop", &machine]);
    assert!(until(|| pulse.heard().len() > 40));
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "it is woken from there: {:?}", Heard::failed(&heard));

    // An edge that knows nothing of it wakes it as well: w3 has been started anew.
    let mut fleet = fleet;
    fleet.host_mut("w3").stop();
    fleet.control().ok(&["machine", "stop", &machine]);
    let stopped = || fleet.control().machine_list("web").iter().all(|machine| machine["state"] == "stopped");
    fleet.control().until("it sleeps", stopped);
    fleet.start_again("w3");
    fleet.host("w3").until("it knows the app", || fleet.host("w3").get("web", "/") == (200, "release 1".into()));
    assert_eq!(fleet.control().machine_list("web")[0]["state"], "started");
    assert_eq!(fleet.control().json(&["cluster", "verify"])["unsound"], serde_json::json!([]));
}
