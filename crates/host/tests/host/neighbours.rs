//! Several servers on one computer.

use crate::setup::World;
use dunlin_host::{HostConfig, StartError};
use dunlin_model::{MachineId, MachineState};

pub fn a_prefix_that_another_server_uses_is_refused() {
    let mut first = World::new();
    first.started(1, "sleep 1000", |_| {});
    let second = World::without_host();
    let same = HostConfig { machine_prefix: first.prefix(), ..second.host_config() };
    let refused = second.try_host(same).map(drop);
    let Err(error @ StartError::PrefixTaken { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains(&first.address(1).to_string()), "{error}");
    second.block_on(second.try_host(second.host_config()).unwrap().shutdown());
    // A restart of the first finds its own.
    first.stop_host();
    first.start_host();
}

pub fn a_machine_whose_id_looks_like_a_builders_lives_on() {
    let mut world = World::new();
    let id = world.assign_as(MachineId::from_random([0xb0, 0, 0, 0, 0, 0, 1]), 1, "sleep 1000", |_| {});
    world.wait_for(&id, MachineState::Created);
    world.command(&id, dunlin_api::CommandKind::Start).unwrap();
    let before = world.wait_for(&id, MachineState::Started);
    world.stop_host();
    world.start_host();
    let after = world.until("recovered", || world.fact(&id).filter(|fact| fact.sequence > before.sequence));
    assert_eq!((after.state, after.attempt), (MachineState::Started, before.attempt));
    assert!(dunlin_runtime::Client::connect(&world.machine_dir(&id)).is_ok());
}
