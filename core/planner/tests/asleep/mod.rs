//! Releases of apps whose machines sleep.

use crate::sim::{Image, World, spec};
use crate::step_names;
use dunlin_model::{AutoStop, MachineState};
use dunlin_planner::{Ended, Tested};

#[test]
fn a_sleeping_machine_is_updated_and_stays_asleep() {
    for stop in [World::stop_by_hand, World::stop_after_a_crash, World::ends_well] {
        let mut world = World::new();
        world.deploy(1, &spec(Image::Good, 1, true), 1);
        let id = world.rows.keys().next().unwrap().clone();
        stop(&mut world, &id);
        let starts = world.starts;
        assert_eq!(world.deploy(2, &spec(Image::Good, 2, true), 1), Ended::Done);
        world.host_turn();
        assert_eq!(world.machines[&id].state, MachineState::Stopped);
        assert_eq!(world.starts, starts);
        assert_eq!(world.rows[&id].spec.release, 2);
    }
}

/// Machines of a good release that all sleep, and that requests may wake, and what becomes of the next release.
fn deploy_to_sleepers(image: Image, count: u32, memory_mb: u32) -> (World, Ended, u64) {
    let sleepy = |image, nth| {
        let mut spec = spec(image, nth, true);
        spec.services[0].autostop = AutoStop::Stop;
        spec
    };
    let mut world = World::new();
    world.deploy(1, &sleepy(Image::Good, 1), count);
    for id in world.rows.keys().cloned().collect::<Vec<_>>() {
        world.stop_by_hand(&id);
    }
    world.memory_mb = memory_mb;
    let starts = world.starts;
    let ended = world.deploy(2, &sleepy(image, 2), count);
    let starts = world.starts - starts;
    (world, ended, starts)
}

#[test]
fn where_all_sleep_one_is_woken_to_test_the_release() {
    let (world, ended, starts) = deploy_to_sleepers(Image::Good, 3, 64 * 1024);
    assert_eq!((ended, starts, world.healthy()), (Ended::Done, 1, 1));
    let (plan, _) = world.plan.as_ref().unwrap();
    assert_eq!(plan.tests(), Tested::Healthy);
    assert_eq!(step_names(plan), ["update", "start", "gate", "update", "update"], "nothing changes before it is healthy");
    assert!(world.rows.values().all(|row| row.spec.release == 2));
    let (world, ended, _) = deploy_to_sleepers(Image::Crashes, 3, 64 * 1024);
    assert!(matches!(&ended, Ended::Failed { reason, .. } if reason.contains("exited with code")), "{ended:?}");
    assert_eq!(world.rows.values().filter(|row| row.spec.release == 2).count(), 1);
    // Where no host has room for it, that is no reason not to deploy; but nothing is known of the release.
    let (world, ended, starts) = deploy_to_sleepers(Image::Crashes, 1, 300);
    assert_eq!((ended, starts), (Ended::Done, 0));
    assert_eq!(world.plan.as_ref().unwrap().0.tests(), Tested::Unseen);
}
