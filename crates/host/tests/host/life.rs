//! Starting, telling, ending and removing machines.

use crate::setup::World;
use dunlin_api::CommandKind;
use dunlin_model::MachineState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// Longer than the agent's patience with a supervisor.
const STALLED: Duration = Duration::from_secs(12);

pub fn a_signal_that_is_not_delivered_ends_nothing() {
    let mut world = World::new();
    let id = world.started(1, "trap 'echo told' HUP; echo up; while :; do sleep 0.1; done", |_| {});
    world.until("it traps", || world.printed(&id).contains(&"up".to_owned()).then_some(()));
    let supervisor = dunlin_runtime::lock_holder(&world.machine_dir(&id)).unwrap().expect("it lives");
    kill(Pid::from_raw(supervisor), Signal::SIGSTOP).unwrap();
    world.command(&id, CommandKind::Signal { signal: "SIGHUP".into() }).unwrap();
    let stalled = Instant::now();
    world.until("the agent gave up", || (stalled.elapsed() > STALLED).then_some(()));
    kill(Pid::from_raw(supervisor), Signal::SIGCONT).unwrap();
    world.until("told late", || world.printed(&id).contains(&"told".to_owned()).then_some(()));
    let fact = world.fact(&id).unwrap();
    assert_eq!((fact.state, fact.attempt), (MachineState::Started, 1));
}

pub fn a_machine_of_a_thousand_nested_directories_is_destroyed() {
    let mut world = World::new();
    let script = "i=0; while [ $i -lt 1500 ]; do busybox mkdir d; cd d; i=$((i+1)); done; echo made; sleep 1000";
    let id = world.started(1, script, |_| {});
    world.until("made", || world.printed(&id).contains(&"made".to_owned()).then_some(()));
    world.destroy(&id);
    world.until("gone", || world.fact(&id).is_none().then_some(()));
    assert!(!world.machine_dir(&id).exists());
}

pub fn a_server_that_opens_secrets_leaves_no_core_file() {
    let _world = World::new();
    assert_eq!(nix::sys::prctl::get_dumpable(), Ok(false));
}
