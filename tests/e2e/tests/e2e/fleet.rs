//! Hosts of one cluster, each in a network namespace of its own, and what becomes of apps when hosts and lines fail.

use crate::deploys::config;
use dunlin_e2e::*;

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
