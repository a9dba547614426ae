//! How long what a machine writes to its root file system is there.

use crate::setup::World;
use dunlin_api::CommandKind;
use dunlin_model::{MachineId, MachineState};
use serde_json::{Value, json};

/// Prints how often it was started by what it finds.
const COUNT: &str = "echo x >> /tmp/starts; echo $(cat /tmp/starts) from $FLY_MACHINE_VERSION; exec sleep 1000";

fn persist(mode: &'static str) -> impl FnOnce(&mut Value) {
    move |spec| {
        spec["rootfs"] = json!({ "persist": mode });
        spec["stop"] = json!({ "signal": "SIGKILL", "timeout_ms": 1000 });
    }
}

fn counts(world: &World, id: &MachineId, starts: usize) -> Vec<String> {
    let lines = world.until("printed", || Some(world.printed(id)).filter(|lines| lines.len() == starts));
    lines.iter().map(|line| line.split(" from ").next().unwrap().to_owned()).collect()
}

/// Started, restarted, stopped and started, by another agent too, then in a new version.
fn history(world: &mut World, n: u8, mode: &'static str) -> Vec<String> {
    let id = world.started(n, COUNT, persist(mode));
    counts(world, &id, 1);
    world.command(&id, CommandKind::Restart { signal: None, timeout_ms: None }).unwrap();
    counts(world, &id, 2);
    world.command(&id, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
    world.wait_for(&id, MachineState::Stopped);
    world.stop_host();
    world.start_host();
    world.command(&id, CommandKind::Start).unwrap();
    counts(world, &id, 3);
    world.assign(n, COUNT, persist(mode));
    let all = counts(world, &id, 4);
    world.destroy(&id);
    world.until("destroyed", || world.fact(&id).is_none().then_some(()));
    world.until("its files are gone", || (!world.machine_dir(&id).exists()).then_some(()));
    all
}

pub fn it_lasts_as_the_configuration_says() {
    let mut world = World::new();
    assert_eq!(history(&mut world, 1, "never"), ["x", "x", "x", "x"]);
    assert_eq!(history(&mut world, 2, "restart"), ["x", "x x", "x x x", "x"]);
    assert_eq!(history(&mut world, 3, "always"), ["x", "x x", "x x x", "x x x x"]);
}

pub fn a_machine_has_the_size_and_the_directories_that_it_asks_for() {
    let mut world = World::new();
    let id = world.started(1, "busybox df -k / /cache /work | busybox awk 'NR>1 {print $2}'; exec sleep 1000", |spec| {
        spec["rootfs"] = json!({ "size_gb": 2 });
        spec["temp_dirs"] = json!([
            { "name": "cache", "path": "/cache", "storage": "memory", "size_mb": 32 },
            { "name": "work", "path": "/work", "storage": "disk", "size_mb": 100 },
        ]);
    });
    let lines = world.until("printed", || Some(world.printed(&id)).filter(|lines| lines.len() == 3));
    let sizes: Vec<u64> = lines.iter().map(|line| line.parse::<u64>().unwrap() >> 10).collect();
    assert!((1900..=2048).contains(&sizes[0]) && sizes[1] == 32 && (100..=128).contains(&sizes[2]), "{sizes:?}");
}
