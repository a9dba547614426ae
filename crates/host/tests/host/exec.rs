//! Commands beside a machine's program.

use crate::setup::World;
use dunlin_api::{ExecOutput, ExecRequest, ExecSession, HostApi, Refusal};
use dunlin_model::MachineId;
use std::time::{Duration, Instant};

fn exec(world: &World, id: &MachineId, script: &str, timeout_ms: u64) -> Result<ExecSession, Refusal> {
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecRequest { machine: id.clone(), command, env: vec![], stdin: bytes::Bytes::new(), timeout_ms };
    world.block_on(world.host().exec(request))
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

pub fn a_reader_that_stalls_keeps_no_thread() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let mut session = exec(&world, &id, "echo out; echo err >&2; exit 3", 10_000).unwrap();
    let mut all = Vec::new();
    while let Some(output) = world.block_on(session.output.recv()) {
        all.push(output);
    }
    assert_eq!(all.last(), Some(&ExecOutput::Exited(3)));
    assert_eq!(all.len(), 3);
    let before = threads();
    let stalled: Vec<ExecSession> = (0..8).map(|_| exec(&world, &id, "busybox yes", 500).unwrap()).collect();
    assert!(threads() >= before + 16);
    let began = Instant::now();
    world.until("their threads have ended", || (threads() < before + 8).then_some(()));
    assert!(began.elapsed() < Duration::from_secs(40));
    drop(stalled);
    let refused = exec(&world, &id, "true", 500).map(drop);
    assert_eq!(refused, Ok(()), "the machine is not full of commands");
}

pub fn a_refusal_says_why() {
    let mut world = World::new();
    let id = world.created(1, "sleep 1000", |_| {});
    let refused = exec(&world, &id, "true", 500).map(drop).unwrap_err().to_string();
    assert!(refused.contains("is not running"), "{refused}");
    let id = world.started(2, "sleep 1000", |_| {});
    let request = ExecRequest {
        machine: id.clone(),
        command: vec!["no-such-program".into()],
        env: vec![],
        stdin: bytes::Bytes::new(),
        timeout_ms: 500,
    };
    let refused = world.block_on(world.host().exec(request)).map(drop).unwrap_err().to_string();
    assert!(refused.contains("not found in $PATH"), "{refused}");
}
