//! Many tombstones at once.

use crate::setup::World;
use dunlin_model::MachineId;

pub fn many_that_nobody_asked_for_wait_for_an_operator() {
    let mut world = World::new();
    let ids: Vec<MachineId> = (1..=13).map(|n| world.assign(n, "sleep 1000", |_| {})).collect();
    world.until("all are made", || ids.iter().all(|id| world.fact(id).is_some()).then_some(()));
    for id in &ids[..12] {
        world.config.machines.remove(id);
        world.config.tombstones.insert(id.clone(), "h1".parse().unwrap());
    }
    world.config.asked_for.insert(ids[0].clone());
    world.publish();
    let gone = |world: &World, id: &MachineId| world.fact(id).is_none().then_some(());
    world.until("the one that a person asked for goes", || gone(&world, &ids[0]));
    let mut metrics = String::new();
    world.host().render_metrics(&mut metrics);
    assert!(metrics.contains("dunlin_host_tombstones_waiting{host=\"h1\"} 11"), "{metrics}");
    assert!(ids[1..].iter().all(|id| world.fact(id).is_some()));
    let approval = world.dir.path().join("host/destroy-approved");
    std::fs::write(&approval, "").unwrap();
    world.until("the rest goes", || ids[1..12].iter().all(|id| gone(&world, id).is_some()).then_some(()));
    assert!(world.fact(&ids[12]).is_some());
    assert!(!approval.exists(), "it holds for once");
}
