//! What checks make known, and what stays on the host.

use crate::setup::World;
use dunlin_api::{ExecRequest, HostApi};
use dunlin_view::CheckState;
use serde_json::{Value, json};
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

pub fn a_command_in_the_machine_is_a_check() {
    let mut world = World::new();
    let check = |name: &str, command: Value| {
        json!({
            "name": name, "port": 0, "type": "script", "command": command, "interval_ms": 200, "timeout_ms": 5000,
            "grace_period_ms": 0, "gates_routing": false
        })
    };
    let id = world.started(1, "sleep 1000", |spec| {
        let mut slow = check("slow", json!(["sleep", "123"]));
        slow["timeout_ms"] = json!(300);
        let mut young = check("young", json!(["false"]));
        young["grace_period_ms"] = json!(3_600_000);
        spec["env"] = json!({ "WHERE": "/tmp/ready" });
        spec["checks"] = json!([
            check("passes", json!(["true"])),
            check("fails", json!(["sh", "-c", "echo the disk is broken >&2; exit 3"])),
            check("flips", json!(["sh", "-c", "test -f $WHERE"])),
            check("loud", json!(["dd", "if=/dev/zero", "bs=1024", "count=4096"])),
            check("absent", json!(["no-such-program"])),
            slow,
            young,
        ]);
    });
    let status = |name: &str| {
        let checks = world.fact(&id).unwrap().checks;
        checks.into_iter().find(|check| check.name == name).map(|check| (check.status, check.output)).unwrap()
    };
    let until = |name: &str, expected: CheckState, says: &str| {
        world.until(&format!("{name} is {expected:?}"), || {
            let (state, output) = status(name);
            (state == expected && output.contains(says)).then_some(())
        });
    };
    until("passes", CheckState::Passing, "exit code 0");
    until("fails", CheckState::Critical, "exit code 3");
    until("flips", CheckState::Critical, "exit code 1");
    until("loud", CheckState::Passing, "exit code 0");
    until("absent", CheckState::Critical, "");
    until("slow", CheckState::Critical, "no answer within 300 ms");
    until("young", CheckState::Warning, "exit code 1");
    let answer = world.until("kept", || world.block_on(world.host().check_answer(&id, "fails")).ok().filter(|text| !text.is_empty()));
    assert_eq!(answer, "the disk is broken");
    assert!(!format!("{:?}", world.fact(&id).unwrap()).contains("broken"), "it stays on its host");
    // What it was waited for too long is ended: one at a time is there.
    world.until("some were ended", || {
        let sleeps = world.block_on(world.host().processes(&id)).unwrap();
        let sleeps = sleeps.iter().filter(|process| process.command.contains("123")).count();
        assert!(sleeps <= 2, "{sleeps} of them");
        (sleeps == 0).then_some(())
    });
    let touch = vec!["sh".to_owned(), "-c".into(), "echo > /tmp/ready".into()];
    let mut session = world.block_on(world.host().exec(ExecRequest::new(id.clone(), touch, 5_000))).unwrap();
    world.block_on(async { while session.output.recv().await.is_some() {} });
    until("flips", CheckState::Passing, "exit code 0");
}
