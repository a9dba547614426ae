//! Suspended machines: asleep in memory, and what wakes or ends them.

use crate::setup::World;
use dunlin_api::{AdmitRefusal, AdmitRequest, CommandKind, HostApi, LastHop, Refusal, WaitFor};
use dunlin_model::{EventKind, MachineId, MachineState};
use dunlin_runtime::SupervisorSpec;
use dunlin_runtime::cgroup::Cgroups;
use serde_json::{Value, json};
use std::time::Duration;

/// Prints a number every now and then.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done";

fn is_frozen(world: &World, id: &MachineId) -> bool {
    let cgroups = Cgroups::detect(&world.instance()).unwrap();
    cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).unwrap().is_frozen().unwrap()
}

fn suspended(world: &mut World, n: u8, change: impl FnOnce(&mut Value)) -> MachineId {
    let id = world.started(n, COUNTS, change);
    world.until("it counts", || (!world.printed(&id).is_empty()).then_some(()));
    world.command(&id, CommandKind::Suspend).unwrap();
    world.wait_for(&id, MachineState::Suspended);
    assert!(is_frozen(world, &id));
    id
}

/// It goes on where it stood: one attempt, every number once.
fn goes_on(world: &World, id: &MachineId) {
    let seen = world.printed(id).len();
    world.until("it counts on", || (world.printed(id).len() > seen).then_some(()));
    let numbers: Vec<u64> = world.printed(id).iter().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.iter().zip(1..).all(|(number, n)| *number == n), "{numbers:?}");
    assert_eq!(world.fact(id).unwrap().attempt, 1);
    assert!(!is_frozen(world, id));
}

pub fn it_stands_still_and_goes_on_where_it_was() {
    let mut world = World::new();
    let id = suspended(&mut world, 1, |_| {});
    let stood = world.printed(&id).len();
    std::thread::sleep(Duration::from_millis(200)); // what it must not use
    assert_eq!(world.printed(&id).len(), stood);
    let signal = world.command(&id, CommandKind::Signal { signal: "SIGHUP".into() });
    assert!(matches!(signal, Err(Refusal::IllegalMove { .. })), "{signal:?}");
    world.command(&id, CommandKind::Start).unwrap();
    world.wait_for(&id, MachineState::Started);
    goes_on(&world, &id);
    let events = world.block_on(world.host().events(&id)).unwrap();
    let kinds: Vec<EventKind> = events.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::Resume, EventKind::Suspend, EventKind::Start, EventKind::Launch]);
}

pub fn it_sleeps_through_a_restart_of_the_agent() {
    let mut world = World::new();
    let id = suspended(&mut world, 1, |spec| spec["services"] = json!([{"internal_port": 80}]));
    world.stop_host();
    world.start_host();
    world.until("adopted", || world.block_on(world.host().machine(&id)).ok());
    assert_eq!(world.fact(&id).unwrap().state, MachineState::Suspended);
    assert!(is_frozen(&world, &id));
    // A freeze and a thaw that an agent did not come to are made good by the next.
    let cgroups = Cgroups::detect(&world.instance()).unwrap();
    let cgroup = cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).unwrap();
    world.stop_host();
    cgroup.thaw().unwrap();
    world.start_host();
    world.until("frozen again", || is_frozen(&world, &id).then_some(()));
    world.wait_for(&id, MachineState::Suspended);
    world.block_on(world.host().wake(&id, u64::MAX)).unwrap();
    goes_on(&world, &id);
    world.stop_host();
    cgroup.freeze(Duration::from_secs(10)).unwrap();
    world.start_host();
    world.until("thawed again", || (!is_frozen(&world, &id)).then_some(()));
    goes_on(&world, &id);
    let kinds: Vec<EventKind> = world.block_on(world.host().events(&id)).unwrap().iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::Resume, EventKind::Suspend, EventKind::Start, EventKind::Launch], "once, in the journal too");
}

pub fn a_stop_and_a_new_version_end_it_and_it_stays_asleep() {
    let mut world = World::new();
    let id = suspended(&mut world, 1, |_| {});
    world.command(&id, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
    let fact = world.wait_for(&id, MachineState::Stopped);
    assert!(fact.exit.unwrap().requested_stop);
    let other = suspended(&mut world, 2, |_| {});
    let before = world.fact(&other).unwrap().version;
    world.assign_as(other.clone(), 2, "sleep 1000", |_| {});
    let fact = world.wait_for(&other, MachineState::Stopped);
    assert_ne!(fact.version, before);
    let third = suspended(&mut world, 3, |_| {});
    world.destroy(&third);
    world.until("gone", || world.fact(&third).is_none().then_some(()));
}

pub fn only_the_holder_of_a_lease_moves_its_machine() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |spec| spec["services"] = json!([{"internal_port": 80}]));
    let lease = |ttl_ms| CommandKind::Lease { ttl_ms, owner: "ann".into(), description: "an upgrade".into() };
    assert!(matches!(world.command(&id, lease(0)), Err(Refusal::Invalid(_))));
    let held = world.command(&id, lease(60_000)).unwrap().lease.unwrap();
    assert_eq!(world.block_on(world.host().lease(&id)).unwrap(), Some(held.clone()));
    world.stop_host();
    world.start_host();
    world.until("adopted", || world.block_on(world.host().machine(&id)).ok());
    for kind in [CommandKind::Stop { signal: None, timeout_ms: None }, lease(1000), CommandKind::Release, CommandKind::Suspend] {
        let refused = world.command(&id, kind);
        assert!(matches!(&refused, Err(Refusal::Leased { owner, .. }) if owner == "ann"), "{refused:?}");
    }
    let with = |kind| {
        let command = dunlin_api::Command { nonce: Some(held.nonce.clone()), ..world.order(&id, kind) };
        world.block_on(world.host().command(command))
    };
    let longer = with(lease(120_000)).unwrap().lease.unwrap();
    assert_eq!(longer.nonce, held.nonce);
    assert!(longer.expires_at_ms > held.expires_at_ms);
    with(CommandKind::Suspend).unwrap();
    world.wait_for(&id, MachineState::Suspended);
    assert!(world.block_on(world.host().wake(&id, u64::MAX)).is_err(), "a request moved a leased machine");
    assert_eq!(world.fact(&id).unwrap().state, MachineState::Suspended);
    with(CommandKind::Release).unwrap();
    assert_eq!(with(CommandKind::Start), Err(Refusal::NotLeased { machine: id.clone() }));
    world.block_on(world.host().wake(&id, u64::MAX)).unwrap();
    // It ends by itself.
    world.command(&id, lease(1)).unwrap();
    world.until("its time is over", || world.command(&id, CommandKind::Cordon).ok());
}

fn service(group: &str, service: Value) -> impl FnOnce(&mut Value) {
    let group = group.to_owned();
    move |spec| {
        spec["services"] = json!([service]);
        spec["process_group"] = json!(group);
        spec["release"] = json!(1);
    }
}

pub fn an_idle_machine_is_put_to_sleep_and_one_with_a_request_is_not() {
    let mut world = World::new();
    let asked = world.started(1, "sleep 1000", service("a", json!({"internal_port": 80, "autostop": true})));
    let fact = world.fact(&asked).unwrap();
    let request =
        AdmitRequest { machine: asked.clone(), version: fact.version, placement: fact.placement, internal_port: 80 };
    let admission = world.host().admit(&request).unwrap();
    let idle = world.started(2, "sleep 1000", service("b", json!({"internal_port": 80, "autostop": "suspend"})));
    let never = world.started(3, "sleep 1000", service("c", json!({"internal_port": 80, "autostop": "off"})));
    let least = json!({"internal_port": 80, "autostop": "stop", "min_machines_running": 1});
    let stays = world.started(4, "sleep 1000", service("d", least.clone()));
    let too_many = world.started(5, "sleep 1000", service("d", least));
    world.wait_for(&idle, MachineState::Suspended);
    world.wait_for(&too_many, MachineState::Stopped);
    assert_eq!(world.fact(&asked).unwrap().state, MachineState::Started, "it has a request");
    drop(admission);
    world.wait_for(&asked, MachineState::Stopped);
    for id in [&never, &stays] {
        assert_eq!(world.fact(id).unwrap().state, MachineState::Started);
    }
    world.block_on(world.host().wake(&idle, u64::MAX)).unwrap();
    let events = world.block_on(world.host().events(&idle)).unwrap();
    let causes: Vec<_> = events.iter().take(2).map(|event| (event.kind, event.source)).collect();
    assert_eq!(causes, [(EventKind::Resume, dunlin_api::Source::Proxy), (EventKind::Suspend, dunlin_api::Source::Host)]);
}

pub fn a_start_that_lacks_memory_ends_the_longest_sleeper() {
    let mut world = World::new();
    let large = |mb: u32| move |spec: &mut Value| spec["guest"]["memory_mb"] = json!(mb);
    let first = suspended(&mut world, 1, large(400));
    let second = suspended(&mut world, 2, large(400));
    let third = world.created(3, "sleep 1000", large(500));
    world.command(&third, CommandKind::Start).unwrap();
    world.wait_for(&third, MachineState::Started);
    assert_eq!(world.fact(&first).unwrap().state, MachineState::Stopped);
    assert_eq!(world.fact(&second).unwrap().state, MachineState::Suspended);
    // With all of them it would not be enough.
    let fourth = world.created(4, "sleep 1000", large(600));
    let refused = world.command(&fourth, CommandKind::Start);
    assert!(matches!(refused, Err(Refusal::InsufficientCapacity { .. })), "{refused:?}");
    assert_eq!(world.fact(&second).unwrap().state, MachineState::Suspended);
}

pub fn requests_wake_no_more_than_the_configuration_says() {
    let mut world = World::new();
    let one = json!({"internal_port": 80, "max_machines_running": 1});
    let first = world.started(1, "sleep 1000", service("a", one.clone()));
    let second = world.created(2, "sleep 1000", service("a", one));
    let refused = world.block_on(world.host().wake(&second, u64::MAX));
    assert!(matches!(&refused, Err(AdmitRefusal::InsufficientCapacity(why)) if why.contains("max_machines_running")), "{refused:?}");
    world.command(&first, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
    world.wait_for(&first, MachineState::Stopped);
    world.block_on(world.host().wake(&second, u64::MAX)).unwrap();
    world.command(&first, CommandKind::Start).unwrap(); // a person may
    world.wait_for(&first, MachineState::Started);
}

pub fn a_wait_says_when_it_is_in_vain() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let old = world.fact(&id).unwrap().version;
    let wait = |world: &World, states: &[MachineState], version| {
        let wait = WaitFor { states: states.to_vec(), version, after_event: None, timeout_ms: 50 };
        world.block_on(world.host().wait(&id, wait))
    };
    let late = wait(&world, &[MachineState::Stopped], Some(old.clone()));
    assert_eq!(late, Err(Refusal::WaitTimeout { state: MachineState::Started }));
    assert!(wait(&world, &[MachineState::Stopped, MachineState::Started], None).is_ok());
    world.assign_as(id.clone(), 1, "sleep 1000", |_| {});
    world.until("it is in the new version", || world.fact(&id).filter(|fact| fact.version != old && fact.state == MachineState::Started));
    let wait = WaitFor { states: vec![MachineState::Stopped], version: Some(old), after_event: None, timeout_ms: 60_000 };
    let vain = world.block_on(world.host().wait(&id, wait));
    assert_eq!(vain, Err(Refusal::WaitHopeless { state: MachineState::Started }));
}

pub fn a_wait_begins_after_an_event() {
    let mut world = World::new();
    let id = world.started(1, "sleep 1000", |_| {});
    let newest = |world: &World| world.block_on(world.host().events(&id)).unwrap()[0].id;
    let wait = |world: &World, after_event, timeout_ms| {
        let wait = WaitFor { states: vec![MachineState::Started], version: None, after_event, timeout_ms };
        world.block_on(world.host().wait(&id, wait)).map(|fact| fact.attempt)
    };
    let seen = newest(&world);
    assert_eq!(wait(&world, None, 50), Ok(1));
    assert_eq!(wait(&world, Some(seen - 1), 50), Ok(1));
    // It is started, but nothing has happened since.
    assert_eq!(wait(&world, Some(seen), 50), Err(Refusal::WaitTimeout { state: MachineState::Started }));
    world.command(&id, CommandKind::Restart { signal: None, timeout_ms: None }).unwrap();
    assert_eq!(wait(&world, Some(seen), 60_000), Ok(2), "the start after the event, not the one before");
}
