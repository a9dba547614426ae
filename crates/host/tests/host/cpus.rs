//! Performance cpus are a machine's own. The hosts have two cores; a computer with one has none to show.

use crate::setup::World;
use dunlin_api::CommandKind;
use dunlin_model::{MachineId, MachineState};
use dunlin_runtime::SupervisorSpec;
use dunlin_runtime::cgroup::{Cgroups, CpuSet};
use serde_json::{Value, json};

pub fn performance(spec: &mut Value) {
    spec["guest"] = json!({"cpu_kind": "performance", "cpus": 1, "memory_mb": 64});
}

pub fn cpus(cgroups: &Cgroups, id: &MachineId) -> CpuSet {
    let cgroup = cgroups.open(&SupervisorSpec::machine_cgroup(id.as_str())).unwrap();
    cgroup.cpus().unwrap().expect("a set")
}

pub fn performance_machines_have_their_own_and_others_the_rest() {
    let mut world = World::new();
    let cgroups = Cgroups::detect(&world.instance()).unwrap();
    let Some(all) = cgroups.cpus().unwrap().filter(|all| all.0.len() >= 2) else { return };
    let shared = world.started(1, "sleep 1000", |_| {});
    assert_eq!(cpus(&cgroups, &shared), all);
    let own = world.started(2, "sleep 1000", performance);
    let its = cpus(&cgroups, &own);
    let rest = CpuSet(all.0.difference(&its.0).copied().collect());
    assert_eq!(its.0.len(), 1);
    assert_eq!(cpus(&cgroups, &shared), rest, "who runs is moved");
    // The next agent asks the kernel.
    world.stop_host();
    world.start_host();
    let second = world.started(3, "sleep 1000", performance);
    assert!(cpus(&cgroups, &second).0.is_disjoint(&its.0));
    assert_eq!(cpus(&cgroups, &own), its);
    let late = world.started(4, "sleep 1000", |_| {});
    assert!(cpus(&cgroups, &late).0.is_disjoint(&its.0));
    for id in [&own, &second] {
        world.command(id, CommandKind::Stop { signal: None, timeout_ms: None }).unwrap();
        world.wait_for(id, MachineState::Stopped);
    }
    world.until("all is shared again", || (cpus(&cgroups, &shared) == all && cpus(&cgroups, &late) == all).then_some(()));
}
