//! Values that the tests begin with.
#![allow(dead_code)] // each test binary uses a part

use dunlin_machine::{Order, Verb};
use dunlin_model::{ExitInfo, MachineVersion, Source};
use dunlin_view::MachineAssignment;
use serde_json::json;

pub fn version(n: u8) -> MachineVersion {
    MachineVersion::new(u64::from(n), [n; 10])
}

/// Version `n` of the one machine of these tests.
pub fn assignment(n: u8, restart: &str, max_retries: u32) -> MachineAssignment {
    serde_json::from_value(json!({
        "id": "0a000000000000", "name": "x", "host": "h1", "region": "local", "address": "10.0.0.1",
        "placement": {"incarnation": 1, "revision": 1}, "created_at_ms": 0,
        "spec": {
            "version": version(n), "org": "personal", "app": "web", "process_group": "app", "release": n,
            "image": {"repository": "web", "digest": "sha256:00"},
            "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256},
            "restart": {"policy": restart, "max_retries": max_retries}
        }
    }))
    .unwrap()
}

/// The same, and requests may wake it.
pub fn waking(n: u8) -> MachineAssignment {
    let mut assignment = assignment(n, "no", 0);
    assignment.spec.services = serde_json::from_value(json!([{"internal_port": 80}])).unwrap();
    assignment
}

/// The same with this much memory.
pub fn sized(n: u8, restart: &str, memory_mb: u32) -> MachineAssignment {
    let mut assignment = assignment(n, restart, 0);
    assignment.spec.guest.memory_mb = memory_mb;
    assignment
}

pub fn order(id: u64, verb: Verb) -> Order {
    Order {
        id: format!("c{id}").parse().unwrap(),
        deadline_ms: u64::MAX,
        generation: None,
        plan: None,
        expected_version: None,
        nonce: None,
        source: Source::User,
        request_id: None,
        verb,
        room: Ok(()),
    }
}

pub fn exit(attempt: u64, code: i32, at_ms: u64) -> ExitInfo {
    ExitInfo {
        attempt,
        exit_code: Some(code),
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms,
        error: None,
    }
}
