//! Control is gone: what its members do for people by themselves, what they refuse, and how control begins anew elsewhere.

use crate::deploys::{config, image};
use crate::fleet::app;
use dunlin_e2e::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// Eight who ask for what cannot be had are told, all one after the other, on a computer that is busy otherwise.
const TOLD_WITHIN: Duration = Duration::from_secs(60);

/// The CLI at a member, by a token.
fn by(fleet: &Fleet, host: &str, token: &str, args: &[&str]) -> Output {
    let server = fleet.host(host);
    server.cli(server.dir(), args).env("DUNLIN_TOKEN", token).output().unwrap()
}

fn ok(fleet: &Fleet, host: &str, token: &str, args: &[&str]) -> String {
    let output = by(fleet, host, token, args);
    assert!(output.status.success(), "{args:?} at {host}: {}\n--- its log\n{}", text(&output), fleet.host(host).log());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn refused(output: &Output, says: &[&str]) {
    assert!(!output.status.success(), "{}", text(output));
    for said in says {
        assert!(text(output).contains(said), "no {said:?} in {}", text(output));
    }
}

fn token(fleet: &Fleet, args: &[&str]) -> (String, String) {
    let made = fleet.control().json(&[&["tokens", "create"][..], args].concat());
    (made["id"].as_str().unwrap().to_owned(), made["token"].as_str().unwrap().to_owned())
}

fn state(fleet: &Fleet, host: &str, token: &str, machine: &str) -> Value {
    serde_json::from_str::<Value>(&ok(fleet, host, token, &["machine", "status", machine, "--app", "web", "--json"])).unwrap()["state"].take()
}

#[test]
fn members_command_machines_by_token_while_control_is_gone() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    let machine_on = |host: &str| fleet.machines("web").into_iter().find(|(_, on)| on == host).expect("it has one").0;
    let (here, there) = (machine_on("w2"), machine_on("w3"));
    let (_, all) = token(&fleet, &["--verb", "read,deploy,exec"]);
    let (_, reads) = token(&fleet, &["--verb", "read"]);
    let (_, foreign) = token(&fleet, &["--verb", "read,deploy,exec", "--app", "other"]);
    let (revoked_id, revoked) = token(&fleet, &["--verb", "read,deploy,exec"]);
    fleet.control().ok(&["tokens", "revoke", &revoked_id]);
    // It is heard at the members before control is gone.
    fleet.host("w2").until("w2 has heard of it", || text(&by(&fleet, "w2", &revoked, &["apps", "list"])).contains("revoked"));
    fleet.kill("w1");

    // Asked at w2: for its own machine, and for one of w3, which checks the right itself.
    let list: Vec<Value> = serde_json::from_str(&ok(&fleet, "w2", &all, &["machine", "list", "--app", "web", "--json"])).unwrap();
    assert_eq!(list.len(), 3, "{list:?}");
    for machine in [&here, &there] {
        let said = ok(&fleet, "w2", &all, &["machine", "exec", machine, "--app", "web", "--", "printenv", "DUNLIN_MACHINE_ID"]);
        assert_eq!(said.trim(), machine);
        ok(&fleet, "w2", &all, &["machine", "stop", machine, "--app", "web"]);
        assert_eq!(state(&fleet, "w2", &all, machine), "stopped");
        ok(&fleet, "w2", &all, &["machine", "start", machine, "--app", "web"]);
        assert_eq!(state(&fleet, "w2", &all, machine), "started");
        ok(&fleet, "w2", &all, &["machine", "restart", machine, "--app", "web"]);
        let logs = || ok(&fleet, "w2", &all, &["logs", "-n", "1000", "--app", "web", "--machine", machine]);
        // Of two starts at least: the one in the middle may have been ended before it said anything.
        fleet.host("w2").until("its logs are read", || logs().matches("listens on").count() >= 2);
    }
    assert!(ok(&fleet, "w2", &all, &["logs", "--app", "web"]).contains("lines of its machines are missing here"), "w1 is gone, and that is said");
    // Without a machine's own app it is looked for.
    ok(&fleet, "w3", &all, &["machine", "stop", &there]);
    ok(&fleet, "w3", &all, &["machine", "start", &there]);

    // What a token does not allow, no member does, nor does the host that is asked by another.
    for machine in [&here, &there] {
        refused(&by(&fleet, "w2", &reads, &["machine", "stop", machine, "--app", "web"]), &["does not allow deploy"]);
        refused(&by(&fleet, "w2", &foreign, &["machine", "stop", machine, "--app", "web"]), &["does not allow"]);
        refused(&by(&fleet, "w2", &revoked, &["machine", "stop", machine, "--app", "web"]), &["was revoked"]);
        refused(&by(&fleet, "w2", "dunlin_v1.e30.AAAA", &["machine", "stop", machine, "--app", "web"]), &["token"]);
    }
    // Root there commands what runs there, and nothing else, without a token.
    fleet.host("w2").ok(&["machine", "stop", &here, "--app", "web"]);
    fleet.host("w2").ok(&["machine", "start", &here, "--app", "web"]);
    fleet.host("w2").fails(&["machine", "stop", &there, "--app", "web"], 1, &["its own machines alone"]);
    assert_eq!(state(&fleet, "w3", &all, &there), "started");

    // What control alone can do says why, at once and as JSON, too.
    let asked = Instant::now();
    for args in [&["scale", "count", "5", "--app", "web"][..], &["secrets", "set", "A=b", "--app", "web"], &["apps", "create", "more"], &["host", "list"]] {
        let output = by(&fleet, "w2", &all, args);
        refused(&output, &["control", "w1", "cannot be asked from here", "hint:"]);
        let json: Value = serde_json::from_slice(&by(&fleet, "w2", &all, &[args, &["--json"]].concat()).stderr).unwrap_or_default();
        assert!(json.to_string().contains("cannot be asked from here"), "{json}");
    }
    assert!(asked.elapsed() < TOLD_WITHIN, "{:?}", asked.elapsed());

    fleet.power_on("w1");
    fleet.control().wait_ready();
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 3);
    // And control is asked again.
    fleet.host("w2").until("w2 asks control", || by(&fleet, "w2", &reads, &["host", "list"]).status.success());
}

/// What runs there, by the process of its supervisor: none of these is to end.
pub fn pids(fleet: &Fleet, hosts: &[&str]) -> BTreeMap<String, Option<u32>> {
    let here = fleet.supervised().into_iter().filter(|(_, host)| hosts.contains(&host.as_str()));
    here.map(|(machine, host)| (machine.clone(), fleet.host(&host).supervisor_pid(&machine))).collect()
}

fn releases(fleet: &Fleet) -> Vec<u64> {
    fleet.control().machine_list("web").iter().map(|machine| machine["release"].as_u64().unwrap()).collect()
}

fn release(fleet: &Fleet, dir: &Path, number: u32, image: &str) {
    config(dir, &number.to_string(), "");
    fleet.control().ok_in(dir, &["deploy", "--image", image]);
    fleet.until_whole("web", 3);
}

#[test]
fn control_goes_on_from_a_backup_on_another_host_and_the_old_one_stays_off() {
    let mut fleet = Fleet::start(&["w1", "w2", "w3"]);
    let dir = app(&fleet, 3);
    let (_, all) = token(&fleet, &["--verb", "read,deploy,exec"]);
    let kept = tempfile::tempdir().unwrap();
    let (file, key) = (kept.path().join("dunlin.backup"), kept.path().join("backup.key"));
    let (file, key) = (file.to_str().unwrap(), key.to_str().unwrap());
    fleet.control().ok(&["control", "backup", file, "--key", key]);
    fleet.control().fails(&["control", "restore", file, "--key", key], 1, &["runs"]);
    // Two releases that no backup has.
    let image = image(fleet.control());
    release(&fleet, &dir, 2, &image);
    release(&fleet, &dir, 3, &image);
    let machines = fleet.machines("web");
    let lost = releases(&fleet).remove(0);

    fleet.host("w2").expect_log("the host is dead");
    fleet.kill("w1");
    let elsewhere = |fleet: &Fleet| fleet.host("w3").get("web", "/") == (200, "release 3".into());
    assert!(until(|| (0..10).all(|_| elsewhere(&fleet))), "{}", fleet.host("w3").log());
    let pulse = fleet.pulse("w3", "web", 10);
    let before = pids(&fleet, &["w2", "w3"]);
    assert_eq!(before.len(), 2, "{before:?}");
    fleet.host_mut("w2").stop();
    let wrong = kept.path().join("wrong.key");
    std::fs::write(&wrong, [7; 32]).unwrap();
    std::fs::set_permissions(&wrong, std::fs::Permissions::from_mode(0o600)).unwrap();
    refused(&fleet.host("w2").dunlin(&["control", "restore", file, "--key", wrong.to_str().unwrap()]), &["does not open with this key file"]);
    fleet.host("w2").ok(&["control", "restore", file, "--key", key]);
    fleet.control_is("w2");
    fleet.start_again("w2");
    fleet.control().wait_ready();

    // What was made since is known, nothing was destroyed, and nothing was started again.
    assert_eq!(fleet.machines("web"), machines);
    assert!(releases(&fleet).iter().all(|number| *number == lost), "{:?}", releases(&fleet));
    assert_eq!(pids(&fleet, &["w2", "w3"]), before);
    fleet.until_up(&["w2", "w3"]);
    // Members follow by themselves: w3 relays to the new one.
    fleet.host("w3").until("w3 asks the new control", || by(&fleet, "w3", &all, &["host", "list"]).status.success());
    assert_eq!(pids(&fleet, &["w2", "w3"]), before);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "{:?}", Heard::failed(&heard));
    assert_eq!(Heard::bodies_after(&heard, Instant::now() - Duration::from_secs(600)), ["release 3"]);

    // A deploy works again, above all numbers that there were, also of the image that only hosts have.
    config(&dir, "4", "");
    fleet.control().ok_in(&dir, &["deploy", "--image", &image]);
    assert!(releases(&fleet).iter().all(|number| *number == lost + 1), "{:?}", releases(&fleet));
    fleet.host("w3").until("w3 serves it", || fleet.host("w3").get("web", "/") == (200, "release 4".into()));

    // The old one returns, finds that it is control no more, and does nothing to what runs.
    let before = pids(&fleet, &["w2", "w3"]);
    fleet.host("w1").expect_log("control was restored on another host");
    fleet.power_on("w1");
    fleet.host("w1").until("the old control stays off", || fleet.host("w1").log().contains("control was restored on another host"));
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 3);
    assert!(before.iter().all(|(machine, pid)| pids(&fleet, &["w2", "w3"]).get(machine) == Some(pid)), "{before:?}");
    let asked = |fleet: &Fleet| by(fleet, "w1", &all, &["machine", "list", "--app", "web", "--json"]);
    fleet.host("w1").until("w1 asks the new control", || asked(&fleet).status.success());
    release_everywhere(&fleet, &dir, &image);
    // Nothing of the old control is needed for that.
    let before = pids(&fleet, &["w1", "w2", "w3"]);
    fleet.host_mut("w1").stop();
    std::fs::remove_dir_all(fleet.host("w1").data().join("control")).unwrap();
    fleet.start_again("w1");
    fleet.host("w1").until("w1 asks the new control", || asked(&fleet).status.success());
    fleet.until_up(&["w1", "w2", "w3"]);
    assert_eq!(pids(&fleet, &["w1", "w2", "w3"]), before);
}

/// Also on the host that had control before.
fn release_everywhere(fleet: &Fleet, dir: &Path, image: &str) {
    config(dir, "5", "");
    fleet.control().ok_in(dir, &["deploy", "--image", image]);
    for id in ["w1", "w2", "w3"] {
        fleet.host(id).until(&format!("{id} serves it"), || fleet.host(id).get("web", "/") == (200, "release 5".into()));
    }
}
