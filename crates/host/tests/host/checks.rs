//! What checks make known, and what stays on the host.

use crate::setup::World;
use dunlin_api::HostApi;
use dunlin_view::CheckState;
use serde_json::json;
use std::time::{Duration, Instant};

/// A server that answers 500 with another text each time.
const SICK: &str = "while :; do n=$((n+1)); printf 'HTTP/1.0 500 x\\r\\n\\r\\nsecret of try %s' $n | nc -l -p 8080 >/dev/null; done";

pub fn what_an_app_answers_stays_on_its_host() {
    let mut world = World::new();
    let id = world.started(1, SICK, |spec| {
        spec["checks"] = json!([{
            "name": "http", "port": 8080, "type": "http", "method": "GET", "path": "/", "interval_ms": 100,
            "timeout_ms": 1000, "grace_period_ms": 0, "gates_routing": true
        }]);
    });
    let fact = world.until("answered", || world.fact(&id).filter(|fact| fact.checks[0].output.contains("500")));
    assert_eq!(fact.checks[0].status, CheckState::Critical);
    let answer = |name: &str| world.block_on(world.host().check_answer(&id, name));
    let first = world.until("kept", || answer("http").ok().filter(|answer| !answer.is_empty()));
    assert!(first.starts_with("secret of try "), "{first}");
    world.until("the newest is kept", || answer("http").ok().filter(|answer| *answer != first && !answer.is_empty()));
    assert!(answer("other").is_err());
    // Ten answers a second, another number of bytes now and then: no more than a fact a second.
    let (from, began) = (world.fact(&id).unwrap().sequence, Instant::now());
    world.until("some time", || {
        let text = format!("{:?}", world.fact(&id).unwrap());
        assert!(!text.contains("secret"), "{text}");
        (began.elapsed() > Duration::from_secs(3)).then_some(())
    });
    let facts = world.fact(&id).unwrap().sequence - from;
    assert!(facts <= 4, "{facts} facts in 3 s");
}
