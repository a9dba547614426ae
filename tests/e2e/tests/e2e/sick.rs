//! Hosts that are neither well nor gone: a server that hangs while its kernel still takes connections, and a line that
//! loses a third of what it carries.

use crate::deploys::config;
use crate::fleet::app;
use dunlin_e2e::*;
use std::thread;
use std::time::Duration;

/// More than an edge needs to hear of it, less than it takes to call a host dead.
const HICCUP: Duration = Duration::from_secs(7);

#[test]
fn a_server_that_hangs_and_a_line_that_loses_packets_fail_nobody() {
    let fleet = Fleet::start(&["w1", "w2", "w3"]);
    let dir = app(&fleet, 3);
    fleet.control().expect_log("the host is dead");

    let pulse = fleet.pulse("w1", "web", 10);
    fleet.freeze("w3");
    let replaced = || fleet.machines("web").values().all(|host| host != "w3");
    assert!(until(replaced), "{:?}\n{}", fleet.machines("web"), fleet.control().log());
    fleet.thaw("w3");
    fleet.until_up(&["w3"]);
    fleet.until_whole("web", 3);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "w3 hung: {:?}", Heard::failed(&heard));

    // Control hangs: nobody is asked for anything that the others do not know.
    let pulse = fleet.pulse("w2", "web", 10);
    fleet.freeze("w1");
    thread::sleep(HICCUP);
    fleet.thaw("w1");
    fleet.until_up(&["w1", "w2", "w3"]);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "control hung: {:?}", Heard::failed(&heard));

    // Some packets are lost in each direction, under a deploy.
    let pulse = fleet.pulse("w1", "web", 10);
    fleet.lose("w3", 30);
    config(&dir, "2", "");
    fleet.control().ok_in(&dir, &["deploy"]);
    fleet.heal("w3");
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 3);
    let heard = pulse.stop();
    assert!(Heard::failed(&heard).is_empty(), "packets were lost: {:?}", Heard::failed(&heard));
}
