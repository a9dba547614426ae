//! What starts by itself after a boot of the host, and what waits.

use crate::setup::World;
use dunlin_api::CommandKind;
use dunlin_machine::UNCONFIRMED;
use dunlin_model::{Generation, MachineId, MachineState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

pub fn an_exclusive_machine_waits_until_its_placement_is_confirmed() {
    let mut world = World::new();
    let exclusive = world.started(1, "while :; do sleep 1; done", |_| {});
    let replaceable = world.started(2, "while :; do sleep 1; done", |spec| spec["services"] = json!([{"internal_port": 80}]));
    let moved = world.started(3, "while :; do sleep 1; done", |_| {});
    let unknown = world.started(4, "while :; do sleep 1; done", |_| {});
    let all = [&exclusive, &replaceable, &moved, &unknown];

    boot(&mut world, &all);
    assert_eq!(world.wait_for(&replaceable, MachineState::Started).attempt, 2);
    for id in [&exclusive, &moved, &unknown] {
        assert_eq!(world.wait_for(id, MachineState::Restarting).problem.as_deref(), Some(UNCONFIRMED));
    }
    // Another start of the agent is no word of anybody's.
    world.stop_host();
    world.start_host();
    assert_eq!(world.wait_for(&exclusive, MachineState::Restarting).attempt, 1);
    assert_eq!(world.wait_for(&replaceable, MachineState::Started).attempt, 2, "what lives goes on");

    // What is known of elsewhere or of nowhere is not started, and not destroyed.
    let assignment = world.config.machines.get_mut(&moved).unwrap();
    assignment.host = "h2".parse().unwrap();
    assignment.placement = Generation { revision: 1_000, ..assignment.placement };
    world.config.machines.remove(&unknown);
    world.publish();
    world.view.confirm_config(world.config.generation);
    assert_eq!(world.wait_for(&exclusive, MachineState::Started).problem, None);
    for id in [&moved, &unknown] {
        let fact = world.fact(id).unwrap();
        assert_eq!((fact.state, fact.attempt), (MachineState::Restarting, 1));
    }
    // A person may know better.
    world.command(&unknown, CommandKind::Start).unwrap();
    assert_eq!(world.wait_for(&unknown, MachineState::Started).attempt, 2);
}

/// The computer is switched off and on; the view begins with what the disk has.
fn boot(world: &mut World, machines: &[&MachineId]) {
    world.stop_host();
    for id in machines {
        let supervisor = dunlin_runtime::lock_holder(&world.machine_dir(id)).unwrap().expect("it lives");
        kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    }
    dunlin_host::clean_up(world.dir.path(), &world.instance(), world.prefix()).unwrap();
    note_other_boot(&world.dir.path().join("host/journal"));
    world.view = dunlin_cluster::View::memory();
    world.publish();
    world.start_host();
}

/// The journal was last written in another boot than this one.
fn note_other_boot(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let entry = json!({"boot": {"boot_id": "another"}}).to_string();
    let mut end = 0;
    while let Some(length) = bytes.get(end..end + 4).map(|length| u32::from_le_bytes(length.try_into().unwrap()) as usize).filter(|length| *length > 0) {
        end += 8 + length;
    }
    bytes.truncate(end);
    bytes.extend((entry.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(entry.as_bytes()).to_le_bytes());
    bytes.extend(entry.as_bytes());
    std::fs::write(path, bytes).unwrap();
}
