//! What a host promises and lets in. Its hosts have 1024 MiB and two cores.

use crate::setup::World;
use dunlin_api::{CommandKind, HostApi, Refusal, Reserve};
use dunlin_model::{CpuKind, Guest, MachineId, MachineState};
use serde_json::json;

fn reserve(world: &World, n: u8, memory_mb: u32, cpus: u32) -> Result<(), Refusal> {
    let guest = Guest { cpu_kind: CpuKind::Performance, cpus, memory_mb };
    let reserve = Reserve { machine: MachineId::from_random([n; 7]), guest, ttl_ms: 3_600_000 };
    world.block_on(world.host().reserve(reserve))
}

fn sized(memory_mb: u32) -> impl FnOnce(&mut serde_json::Value) {
    move |spec| spec["guest"] = json!({"cpu_kind": "performance", "cpus": 1, "memory_mb": memory_mb})
}

pub fn a_promise_holds_until_the_start() {
    let mut world = World::new();
    reserve(&world, 1, 600, 1).unwrap();
    let refused = reserve(&world, 2, 600, 1);
    assert!(matches!(refused, Err(Refusal::InsufficientCapacity { .. })), "{refused:?}");
    // Nor is it forgotten with its agent, nor when the machine is made and does not run yet.
    world.stop_host();
    world.start_host();
    assert!(reserve(&world, 2, 600, 1).is_err());
    let id = world.created(1, "sleep 1000", sized(600));
    assert!(reserve(&world, 2, 600, 1).is_err());
    reserve(&world, 3, 100, 1).unwrap();
    let refused = reserve(&world, 4, 100, 1).unwrap_err().to_string();
    assert!(refused.contains("0 of 2"), "cores are promised too: {refused}");
    world.command(&id, CommandKind::Start).unwrap();
    world.wait_for(&id, MachineState::Started);
    assert!(reserve(&world, 2, 600, 0).is_err());
    reserve(&world, 2, 300, 0).unwrap();
}

pub fn an_update_that_does_not_fit_is_refused() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", sized(100));
    world.started(2, "sleep 1000", sized(800));
    world.assign(1, "sleep 1000", sized(300));
    let fact = world.until("refused", || world.fact(&id).filter(|fact| fact.problem.is_some()));
    assert!(fact.problem.as_ref().unwrap().contains("300 MiB are wanted, 224 of 1024 MiB are free"), "{fact:?}");
    assert_eq!((fact.state, fact.attempt), (MachineState::Started, 1));
    world.assign(1, "sleep 1000", sized(224));
    world.until("updated", || world.fact(&id).filter(|fact| fact.attempt == 2 && fact.state == MachineState::Started));
    assert!(reserve(&world, 3, 1, 0).is_err());
}
