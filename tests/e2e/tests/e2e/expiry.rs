//! What ends on a date: hosts' certificates, the edge's, and tokens, by clocks that are set.

use crate::control_lost::pids;
use crate::fleet::app;
use dunlin_e2e::*;
use std::process::Command;

/// Of the two years of a host's certificate some 30 days are left then.
const ALMOST_TWO_YEARS: u32 = 700;

fn days_left(fleet: &Fleet, host: &str) -> u64 {
    fleet.host(host).json(&["cluster", "status"])["cluster"]["certificate_days_left"].as_u64().expect("so many days")
}

/// When what its edge shows ends, as text.
fn edge_shows(fleet: &Fleet, host: &str) -> Option<String> {
    let at = fleet.edge(host).ip();
    let mut curl = Command::new("ip");
    curl.args(["netns", "exec", fleet.internet(), "curl", "-sk", "--max-time", "10", "-o", "/dev/null", "-w", "%{certs}"]);
    let said = text(&curl.args(["--resolve", &format!("web.localhost:443:{at}"), "https://web.localhost/"]).output().unwrap());
    said.lines().find_map(|line| line.strip_prefix("Expire date:")).map(|date| date.trim().to_owned())
}

#[test]
fn certificates_that_end_are_told_and_renewed_while_apps_go_on() {
    let mut fleet = Fleet::with_a_clock(&["w1", "w2", "w3"]);
    app(&fleet, 3);
    for id in ["w1", "w2", "w3"] {
        assert!(days_left(&fleet, id) > ALMOST_TWO_YEARS.into(), "{id}");
        fleet.host(id).expect_log("this host's certificate was not renewed for long and ends soon");
        fleet.host(id).expect_log("control was not told of this host");
    }
    let token = fleet.control().json(&["tokens", "create", "--verb", "read"])["token"].as_str().unwrap().to_owned();
    let ask = |fleet: &Fleet| {
        let server = fleet.host("w2");
        text(&server.cli(server.dir(), &["apps", "list"]).env("DUNLIN_TOKEN", &token).output().unwrap())
    };
    assert!(ask(&fleet).contains("web"), "{}", ask(&fleet));

    // Control is away for almost two years.
    fleet.kill("w1");
    let others = ["w2", "w3"];
    for id in others {
        fleet.host(id).until("its edge serves without w1", || (0..10).all(|_| fleet.host(id).get("web", "/").0 == 200));
    }
    let pulses: Vec<Pulse> = others.iter().map(|id| fleet.pulse(id, "web", 10)).collect();
    let before = pids(&fleet, &others);
    let shown = others.map(|id| edge_shows(&fleet, id).expect("it shows a certificate"));
    fleet.set_clocks(ALMOST_TWO_YEARS);
    for id in others {
        let server = fleet.host(id);
        server.until("its certificate is about to end", || days_left(&fleet, id) < 60);
        server.until("that is an alarm", || server.log().contains("this host's certificate was not renewed for long and ends soon"));
        server.until("its edge serves", || server.get("web", "/").0 == 200);
    }

    // It comes back: everything is renewed in the processes that run.
    fleet.power_on("w1");
    fleet.control().wait_ready();
    for id in ["w1", "w2", "w3"] {
        let server = fleet.host(id);
        server.until("its certificate is new", || days_left(&fleet, id) > ALMOST_TWO_YEARS.into());
    }
    for (id, shown) in others.iter().zip(shown) {
        fleet.host(id).until("the edge shows a new one", || edge_shows(&fleet, id).is_some_and(|now| now != shown));
    }
    fleet.until_up(&["w1", "w2", "w3"]);
    fleet.until_whole("web", 3);
    for pulse in pulses {
        let heard = pulse.stop();
        assert!(Heard::failed(&heard).is_empty(), "{:?}", Heard::failed(&heard));
    }
    assert_eq!(pids(&fleet, &others), before, "no machine was started anew");
    assert!(ask(&fleet).contains("expired"), "{}", ask(&fleet));
}
