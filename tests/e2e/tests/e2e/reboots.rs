//! A host is booted and cannot know whether what its disk says was to run runs elsewhere by now.

use dunlin_e2e::*;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// Longer than a host takes to start what it starts by itself.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A worker without a service, on w2.
fn worker() -> (Fleet, String) {
    let fleet = Fleet::start(&["w1", "w2"]);
    let control = fleet.control();
    control.ok(&["host", "cordon", "w1"]);
    let dir = control.source("web", &[("Dockerfile", "FROM debian:12-slim\nCMD [\"sh\", \"-c\", \"while :; do sleep 1; done\"]\n"), ("dunlin.toml", "app = \"web\"\n")]);
    control.ok(&["apps", "create", "web"]);
    control.ok_in(&dir, &["deploy"]);
    control.ok(&["scale", "count", "1", "--app", "web"]);
    fleet.until_whole("web", 1);
    let machines = fleet.machines("web");
    let (id, host) = machines.iter().next().unwrap();
    assert_eq!(host, "w2");
    for text in ["most hosts do not answer", "the host is dead", "stays on its dead host", "could not be replaced", "sendmsg error"] {
        fleet.control().expect_log(text);
    }
    (fleet, id.clone())
}

fn runs_on(fleet: &Fleet, host: &str) -> bool {
    fleet.supervised().iter().any(|(_, on)| on == host)
}

fn waits(fleet: &Fleet) {
    fleet.host("w2").until("it waits", || fleet.host("w2").log().contains("restarting"));
    sleep(AT_ONCE);
    assert!(!runs_on(fleet, "w2"), "{}", fleet.host("w2").log());
}

#[test]
fn a_booted_host_starts_an_exclusive_machine_once_it_hears_from_control() {
    let (mut fleet, id) = worker();
    fleet.kill("w2");
    note_other_boot(&fleet.host("w2").data());
    fleet.one_way_from("w1", "w2");
    fleet.power_on("w2");
    waits(&fleet);
    fleet.heal("w1");
    fleet.until_whole("web", 1);
    assert!(fleet.supervised().contains(&(id, "w2".into())));
}

#[test]
fn an_old_disk_does_not_run_what_was_fenced_meanwhile() {
    let (mut fleet, id) = worker();
    let data = fleet.host("w2").data();
    fleet.kill("w2");
    fleet.control().until("it is known", || fleet.control().machine_list("web").iter().all(|machine| machine["host_status"] == "unreachable"));
    fleet.control().ok(&["machine", "destroy", &id, "--force", "--app", "web"]);
    // Its disk knows nothing of that.
    note_other_boot(&data);
    fleet.one_way_from("w1", "w2");
    fleet.power_on("w2");
    waits(&fleet);
    fleet.heal("w1");
    fleet.until_up(&["w2"]);
    sleep(AT_ONCE);
    assert!(fleet.supervised().iter().all(|(machine, _)| *machine != id));
}

/// Namespaces share the kernel's boot id: the host's journal is told of another one.
fn note_other_boot(data: &Path) {
    let path = data.join("host/journal");
    let mut bytes = fs::read(&path).unwrap();
    let mut end = 0;
    while let Some(length) = bytes.get(end..end + 4).map(|length| u32::from_le_bytes(length.try_into().unwrap()) as usize).filter(|length| *length > 0) {
        end += 8 + length;
    }
    bytes.truncate(end);
    let entry = b"{\"boot\":{\"boot_id\":\"another\"}}";
    bytes.extend((entry.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(entry).to_le_bytes());
    bytes.extend(entry);
    fs::write(&path, bytes).unwrap();
}
