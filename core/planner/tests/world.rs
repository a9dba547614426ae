//! Plans against a small simulated world (`sim`): one host that prepares, starts, stops and destroys machines
//! step by step, and an executor that may be killed at every boundary between a durable write and an act.

mod asleep;
mod sim;

use dunlin_model::config::{PrimaryRegion, Strategy as DeployStrategy};
use dunlin_model::desired::HostRow;
use dunlin_model::volume::VolumeRow;
use dunlin_model::{Guest, MachineId, MachineState, VolumeId};
use dunlin_planner::{
    Ask, Capacity, Demand, Desired, Ended, For, MAX_EXITS_BEFORE_HEALTHY, MountTarget, Next, Observed, Plan, Problem, Purpose,
    STEADY_MS, Step, StepKind, advance, check, plan,
};
use proptest::prelude::*;
use sim::{Image, WAIT_TIMEOUT_MS, World, host, spec};
use std::collections::BTreeSet;

fn step_names(plan: &Plan) -> Vec<&'static str> {
    plan.steps.iter().map(|step| step.kind.name()).collect()
}

#[test]
fn a_first_release_reserves_assigns_starts_and_waits() {
    let mut world = World::new();
    assert_eq!(world.deploy(1, &spec(Image::Good, 1, true), 2), Ended::Done);
    let (plan, _) = world.plan.clone().unwrap();
    let expected = ["reserve", "assign", "reserve", "assign", "start", "start", "gate", "gate"];
    assert_eq!(step_names(&plan), expected);
    assert_eq!(world.healthy(), 2);
}

#[test]
fn a_settled_app_plans_nothing() {
    let mut world = World::new();
    let good = spec(Image::Good, 1, true);
    world.deploy(1, &good, 3);
    let desired = world.desired(2, &good, 3, Purpose::Deploy);
    world.save(&desired).unwrap();
    assert_eq!(world.plan.as_ref().unwrap().0.steps, []);
}

#[test]
fn machines_that_do_not_change_are_left_alone_however_they_do() {
    let mut world = World::new();
    let good = spec(Image::Good, 1, true);
    world.deploy(1, &good, 2);
    let ids: Vec<_> = world.rows.keys().cloned().collect();
    world.sicken(&ids[0]);
    let fact = world.machines.get_mut(&ids[1]).unwrap();
    (fact.state, fact.problem) = (MachineState::Failed, Some("the restart policy gave up".into()));
    let (starts, began_ms) = (world.starts, world.now_ms);
    assert_eq!(world.deploy(2, &good, 3), Ended::Done);
    assert!(world.plan.as_ref().unwrap().0.steps.iter().all(|step| !ids.contains(&step.machine)));
    assert!(world.starts == starts + 1 && world.now_ms - began_ms < WAIT_TIMEOUT_MS);
}

#[test]
fn what_a_superseded_plan_changed_has_to_become_healthy_under_the_next_too() {
    for (image, boundaries) in [(Image::Sick, 2), (Image::Crashes, 2), (Image::Good, 3), (Image::Good, 4), (Image::Good, 5)] {
        let mut world = World::new();
        world.deploy(1, &spec(Image::Good, 1, true), 2);
        let new = spec(image, 2, true);
        for (release, boundaries) in [(2, boundaries), (3, 0)] {
            let desired = world.desired(release, &new, 2, Purpose::Deploy);
            world.save(&desired).unwrap();
            world.run_until(boundaries); // the second one is given up before it began
        }
        let ended = world.deploy(4, &new, 2);
        if image == Image::Good {
            assert_eq!((ended, world.healthy()), (Ended::Done, 2), "{boundaries}");
        } else {
            assert!(matches!(ended, Ended::Failed { .. }), "{image:?}: {ended:?}");
        }
    }
}

#[test]
fn a_rolling_update_keeps_all_but_one_serving() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 3);
    let ids: Vec<_> = world.rows.keys().cloned().collect();
    world.lowest_healthy = usize::MAX;
    assert_eq!(world.deploy(2, &spec(Image::Good, 2, true), 3), Ended::Done);
    assert_eq!(world.lowest_healthy, 2);
    assert_eq!(world.rows.keys().cloned().collect::<Vec<_>>(), ids, "updates keep the machines");
    assert!(world.rows.values().all(|row| row.spec.release == 2));
}

/// Deploys `bad` over a good release, returns, and shows what the failure said.
fn failing_deploy(bad: Image, checked: bool) -> String {
    let mut world = World::new();
    let good = spec(Image::Good, 1, checked);
    world.deploy(1, &good, 2);
    world.lowest_healthy = usize::MAX;
    let Ended::Failed { reason, machine, .. } = world.deploy(2, &spec(bad, 2, checked), 2) else {
        panic!("a {bad:?} release must fail");
    };
    assert!(machine.is_some());
    let purpose = Purpose::Return { failed_release: 2 };
    let desired = world.desired(1, &good, 2, purpose);
    world.save(&desired).unwrap();
    assert_eq!(world.run(&mut || false), Some(Ended::Done));
    assert!(world.rows.values().all(|row| row.spec.image == good.image));
    assert_eq!(world.healthy(), 2);
    assert!(world.lowest_healthy >= 1, "one machine always served");
    reason
}

#[test]
fn a_sick_release_returns_and_says_what_the_check_said() {
    let reason = failing_deploy(Image::Sick, true);
    assert!(reason.contains("did not become healthy in time: check tcp-8080 says: connection refused"), "{reason}");
}

#[test]
fn a_crashing_release_fails_before_its_deadline() {
    for checked in [true, false] {
        let reason = failing_deploy(Image::Crashes, checked);
        assert!(reason.contains("exited with code 1"), "{reason}");
        assert!(reason.contains(&MAX_EXITS_BEFORE_HEALTHY.to_string()), "{reason}");
    }
}

#[test]
fn a_release_that_comes_up_and_does_not_stay_touches_one_machine_only() {
    for checked in [true, false] {
        let reason = failing_deploy(Image::Fades, checked);
        assert!(reason.contains("exited with code 1, 3 times before it was healthy"), "{reason}");
    }
}

#[test]
fn a_release_that_ends_after_its_gate_stops_at_the_next_machine() {
    for checked in [true, false] {
        let mut world = World::new();
        let good = spec(Image::Good, 1, checked);
        world.deploy(1, &good, 3);
        let ended = world.deploy(2, &spec(Image::Withers, 2, checked), 3);
        let Ended::Failed { reason, machine: Some(machine), .. } = ended else { panic!("{ended:?}") };
        assert!(reason.contains("exited with code 1 after it had been healthy"), "{reason}");
        let of_new = world.rows.values().filter(|row| row.spec.release == 2).count();
        assert!(of_new < 3 && world.rows[&machine].spec.release == 2, "the last machine is left alone");
    }
}

#[test]
fn a_release_that_ends_after_its_last_gate_has_not_succeeded() {
    let mut world = World::new();
    let withers = spec(Image::Withers, 1, true);
    let desired = world.desired(1, &withers, 2, Purpose::Deploy);
    world.save(&desired).unwrap();
    let mut boundaries = 0;
    let count = &mut || {
        boundaries += 1;
        false
    };
    assert_eq!(world.clone().run(count), Some(Ended::Done));
    world.run_until(boundaries - 1);
    let (plan, progress) = world.plan.clone().unwrap();
    let Next::Mark(last) = advance(&plan, &progress, &world.observed(), world.now_ms) else { panic!("{progress:?}") };
    world.mark(&last);
    // Both have passed their gates; the server was away while they ended.
    for _ in 0..20 {
        world.host_turn();
    }
    let ended = world.run(&mut || false);
    assert!(matches!(ended, Some(Ended::Failed { .. })), "{ended:?}");
}

#[test]
fn a_machine_that_the_platform_ended_is_waited_for() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 3);
    let desired = world.desired(2, &spec(Image::Good, 2, true), 3, Purpose::Deploy);
    world.save(&desired).unwrap();
    let mut world = world.run_until_it(|world| world.plan.as_ref().is_some_and(|(_, progress)| !progress.proven.is_empty()));
    let proven = world.plan.as_ref().unwrap().1.proven.keys().next().unwrap().clone();
    world.lose_supervisor(&proven);
    assert_eq!(world.run(&mut || false), Some(Ended::Done));
    assert_eq!(world.healthy(), 3);
}

#[test]
fn new_machines_have_to_stay_healthy_side_by_side() {
    let mut world = World::new();
    let began_ms = world.now_ms;
    assert_eq!(world.deploy(1, &spec(Image::Good, 1, true), 8), Ended::Done);
    assert!(world.now_ms - began_ms < 8 * STEADY_MS, "{} ms", world.now_ms - began_ms);
}

#[test]
fn what_a_person_does_to_a_healthy_machine_is_no_failure() {
    for stop in [true, false] {
        let mut world = World::new();
        world.deploy(1, &spec(Image::Good, 1, true), 2);
        let desired = world.desired(2, &spec(Image::Good, 2, true), 2, Purpose::Deploy);
        world.save(&desired).unwrap();
        let proven = |world: &World| world.plan.as_ref().unwrap().1.proven.keys().next().cloned();
        let mut world = world.run_until_it(|world| proven(world).is_some());
        let id = proven(&world).unwrap();
        if stop { world.stop_by_hand(&id) } else { world.destroy(&id) }
        assert_eq!(world.run(&mut || false), Some(Ended::Done), "stop: {stop}");
    }
}

#[test]
fn a_release_whose_image_is_missing_touches_one_machine_only() {
    let reason = failing_deploy(Image::Missing, true);
    assert!(reason.contains("image not found"), "{reason}");
}

#[test]
fn scaling_down_removes_those_that_do_not_serve_first() {
    let mut world = World::new();
    let good = spec(Image::Good, 1, true);
    world.deploy(1, &good, 3);
    let first = world.rows.keys().next().unwrap().clone();
    world.sicken(&first);
    assert_eq!(world.deploy(2, &good, 2), Ended::Done);
    assert!(!world.rows.contains_key(&first) && world.tombstones.contains(&first));
    assert_eq!(world.healthy(), 2);
}

#[test]
fn those_that_do_not_serve_are_updated_first() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 2);
    let last = world.rows.keys().next_back().unwrap().clone();
    world.sicken(&last);
    world.lowest_healthy = usize::MAX;
    let desired = world.desired(2, &spec(Image::Good, 2, true), 2, Purpose::Deploy);
    world.save(&desired).unwrap();
    let mut turned = world.plan.clone().unwrap().0;
    assert_eq!(turned.steps[0].machine, last);
    turned.steps.rotate_left(3); // the one that serves first
    let found = check(&turned, &desired, &world.observed()).unwrap_err();
    assert!(matches!(&found[..], [Problem::ServingFirst(_, other)] if *other == last), "{found:?}");
    assert_eq!(world.run(&mut || false), Some(Ended::Done));
    assert_eq!((world.lowest_healthy, world.healthy()), (1, 2));
}

#[test]
fn a_machine_that_a_person_stops_at_its_gate_passes_it() {
    for (stop, passes) in [
        (World::stop_by_hand as fn(&mut World, &MachineId), true),
        (World::stop_after_a_crash, true),
        (World::ends_well, false),
    ] {
        let mut world = World::new();
        let desired = world.desired(1, &spec(Image::Good, 1, true), 1, Purpose::Deploy);
        world.save(&desired).unwrap();
        let mut world = world.run_until_it(|world| {
            let (plan, progress) = world.plan.as_ref().unwrap();
            plan.steps[progress.next].kind.name() == "gate"
        });
        let id = world.rows.keys().next().unwrap().clone();
        stop(&mut world, &id);
        let ended = world.run(&mut || false).unwrap();
        assert_eq!(ended == Ended::Done, passes, "{ended:?}");
        // And the next plan of the same does not wake it.
        if passes {
            assert_eq!(world.deploy(2, &spec(Image::Good, 1, true), 1), Ended::Done);
            assert_eq!(world.machines[&id].state, MachineState::Stopped);
        }
    }
}

#[test]
fn a_machine_that_a_superseded_plan_made_is_started_by_the_next() {
    let mut world = World::new();
    let desired = world.desired(1, &spec(Image::Good, 1, true), 1, Purpose::Deploy);
    world.save(&desired).unwrap();
    world.run_until(4); // reserved, assigned, and ended before the start
    for _ in 0..5 {
        world.host_turn();
    }
    assert!(world.machines.values().all(|fact| fact.state == MachineState::Created));
    assert_eq!(world.starts, 0);
    assert_eq!(world.deploy(2, &spec(Image::Good, 2, true), 1), Ended::Done);
    assert_eq!((world.rows.len(), world.healthy()), (1, 1));
}

#[test]
fn a_machine_destroyed_under_a_plan_calls_for_another_plan() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 2);
    let new = spec(Image::Good, 2, true);
    for (boundaries, step) in [(0, "update"), (2, "start"), (3, "gate")] {
        let mut world = world.clone();
        let desired = world.desired(2, &new, 2, Purpose::Deploy);
        world.save(&desired).unwrap();
        world.run_until(boundaries);
        let (plan, progress) = world.plan.clone().unwrap();
        assert_eq!(plan.steps[progress.next].kind.name(), step);
        world.destroy(&plan.steps[progress.next].machine);
        assert_eq!(world.run(&mut || false), Some(Ended::Superseded), "{step}");
        assert_eq!(world.deploy(2, &new, 2), Ended::Done, "{step}");
        assert_eq!((world.rows.len(), world.healthy()), (2, 2), "{step}");
    }
}

#[test]
fn an_immediate_release_waits_for_nobodys_health() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 2);
    let mut desired = world.desired(2, &spec(Image::Sick, 2, true), 3, Purpose::Deploy);
    desired.strategy = DeployStrategy::Immediate;
    world.save(&desired).unwrap();
    assert_eq!(world.run(&mut || false), Some(Ended::Done));
    assert!(world.rows.values().all(|row| row.spec.release == 2));
}

#[test]
fn no_room_says_what_each_host_has() {
    let mut world = World::new();
    world.memory_mb = 300;
    let desired = world.desired(1, &spec(Image::Good, 1, true), 2, Purpose::Deploy);
    let refused = world.save(&desired).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no host has room for a machine with 256 MB: host h1 has 44 MB free"
    );
}

#[test]
fn an_update_that_grows_is_admitted_too() {
    let sized = |nth: u32, memory_mb: u32| {
        let mut spec = spec(Image::Good, nth, true);
        spec.guest.memory_mb = memory_mb;
        spec
    };
    let mut world = World::new();
    world.memory_mb = 1000;
    world.deploy(1, &sized(1, 400), 2);
    let desired = world.desired(2, &sized(2, 512), 2, Purpose::Deploy);
    let refused = world.save(&desired).unwrap_err();
    let why = "no host has room for a machine with 512 MB: host h1 has 88 MB free";
    assert_eq!(refused.to_string(), why, "the first one took 112 of 200");
    // What sleeps holds nothing and takes nothing.
    let id = world.rows.keys().next().unwrap().clone();
    world.stop_by_hand(&id);
    assert_eq!(world.deploy(2, &sized(2, 512), 2), Ended::Done);
    assert_eq!(world.deploy(3, &sized(3, 128), 2), Ended::Done, "to shrink needs no room");
}

#[test]
fn new_machines_go_to_the_primary_region_if_it_has_room() {
    let world = World::new();
    let mut desired = world.desired(1, &spec(Image::Good, 1, true), 1, Purpose::Deploy);
    let far = HostRow { id: "a-far".parse().unwrap(), region: "ams".parse().unwrap(), ..desired.hosts[0].clone() };
    desired.hosts.push(far);
    let place = |desired: &Desired, observed: &Observed| {
        let mut capacity = Capacity::new(&desired.hosts, observed);
        let mut spread = capacity.spread([]);
        let ask = Ask { demand: Demand::of_guest(&Guest::default()), regions: &desired.regions, only: None, purpose: For::New };
        capacity.place(&ask, &mut spread).map(|host| host.id.to_string())
    };
    for (region, memory_mb, expected) in
        [(None, 4096, "a-far"), (Some("local"), 4096, "h1"), (Some("local"), 64, "a-far"), (Some("fra"), 4096, "a-far")]
    {
        desired.regions = PrimaryRegion::places(region.map(|region| region.parse().unwrap()).as_ref());
        desired.hosts[0].memory_mb = memory_mb;
        desired.hosts[1].memory_mb = 4096;
        assert_eq!(place(&desired, &world.observed()).unwrap(), expected, "{region:?} {memory_mb}");
    }
    let mut observed = world.observed();
    observed.refused.insert("a-far".parse().unwrap(), "its disk is full".into());
    assert_eq!(place(&desired, &observed).unwrap(), "h1");
    observed.refused.insert(host(), "256 MiB are wanted, 3 are free".into());
    let none = place(&desired, &observed).unwrap_err().to_string();
    assert!(none.ends_with("host a-far: its disk is full; host h1: 256 MiB are wanted, 3 are free"), "{none}");
}

#[test]
fn the_check_finds_what_a_plan_must_not_do() {
    let mut world = World::new();
    world.deploy(1, &spec(Image::Good, 1, true), 2);
    let desired = world.desired(2, &spec(Image::Good, 2, true), 3, Purpose::Deploy);
    let pool = world.pool(&desired);
    let good = plan(&desired, &world.observed(), pool).unwrap();
    let problems = |change: &dyn Fn(&mut Plan)| {
        let mut changed = good.clone();
        change(&mut changed);
        check(&changed, &desired, &world.observed()).unwrap_err()
    };
    let used = world.rows.values().next().unwrap().address;
    let found = problems(&|plan| {
        for step in &mut plan.steps {
            if let StepKind::Assign { address, .. } = &mut step.kind {
                *address = used;
            }
        }
    });
    assert_eq!(found, [Problem::SharedAddress(used)]);
    let found = problems(&|plan| plan.steps.retain(|step| !matches!(step.kind, StepKind::Gate { .. })));
    assert!(found.iter().any(|problem| matches!(problem, Problem::TwoDown(_))), "{found:?}");
    assert!(found.iter().any(|problem| matches!(problem, Problem::NoGate(_))), "{found:?}");
    let found = problems(&|plan| plan.steps.retain(|step| !matches!(step.kind, StepKind::Reserve { .. })));
    assert!(matches!(found[..], [Problem::NotReserved(_)]), "{found:?}");
    let found = problems(&|plan| plan.wait_timeout_ms = 0);
    assert_eq!(found, [Problem::NoDeadline]);
    let victim = world.rows.keys().next().unwrap().clone();
    let found = problems(&|plan| {
        let kind = StepKind::Destroy { host: host(), address: used };
        plan.steps.insert(0, Step { machine: victim.clone(), why: String::new(), kind });
    });
    assert!(found.contains(&Problem::DestroyedRunning(victim.clone())), "{found:?}");
}

fn image() -> impl Strategy<Value = Image> {
    prop_oneof![
        3 => Just(Image::Good),
        1 => Just(Image::Sick),
        1 => Just(Image::Crashes),
        1 => Just(Image::Missing),
        1 => Just(Image::Fades),
    ]
}

#[test]
fn a_removal_that_is_taken_back_leaves_nothing_cordoned_or_stopped() {
    let good = spec(Image::Good, 1, true);
    let mut settled = World::new();
    settled.deploy(1, &good, 2);
    for boundaries in 0..7 {
        for interrupted in [false, true] {
            let mut world = settled.clone();
            let desired = world.desired(2, &good, 1, Purpose::Deploy);
            world.save(&desired).unwrap();
            world.run_until(boundaries);
            if interrupted {
                // Removed once more, and superseded before anything of that plan began.
                let desired = world.desired(3, &good, 1, Purpose::Deploy);
                world.save(&desired).unwrap();
                world.run(&mut || true);
            }
            assert_eq!(world.deploy(4, &good, 2), Ended::Done, "{boundaries}");
            assert!(world.machines.values().all(|fact| !fact.cordoned), "{boundaries} {interrupted}");
            assert_eq!((world.rows.len(), world.healthy()), (2, 2), "{boundaries} {interrupted}");
        }
    }
}

#[test]
fn a_persons_cordon_stays() {
    let good = spec(Image::Good, 1, true);
    let mut world = World::new();
    world.deploy(1, &good, 2);
    let cordoned = world.rows.keys().next().unwrap().clone();
    world.machines.get_mut(&cordoned).unwrap().cordoned = true;
    let desired = world.desired(2, &good, 1, Purpose::Deploy);
    world.save(&desired).unwrap();
    world.run_until(1); // it is the one to be removed, as it does not serve
    assert_eq!(world.machines[&cordoned].state, MachineState::Stopping);
    assert_eq!(world.deploy(3, &good, 2), Ended::Done);
    assert!(world.machines[&cordoned].cordoned);
    assert_eq!(world.healthy(), 2, "it runs again, out of service as before");
}

#[test]
fn time_in_which_nobody_looks_does_not_count() {
    let mut settled = World::new();
    settled.deploy(1, &spec(Image::Good, 1, true), 2);
    let desired = settled.desired(2, &spec(Image::Good, 2, true), 1, Purpose::Deploy);
    settled.save(&desired).unwrap();
    let mut boundaries = 0;
    let count = &mut || {
        boundaries += 1;
        false
    };
    assert_eq!(settled.clone().run(count), Some(Ended::Done));
    for boundary in 0..boundaries {
        let mut world = settled.clone();
        world.run_until(boundary);
        world.away(10 * WAIT_TIMEOUT_MS);
        assert_eq!(world.run(&mut || false), Some(Ended::Done), "{boundary}");
    }
    // The same at a gate whose machine is not healthy yet.
    let mut world = settled.run_until_it(|world| {
        let (plan, progress) = world.plan.as_ref().unwrap();
        plan.steps[progress.next].kind.name() == "gate"
    });
    let (plan, progress) = world.plan.clone().unwrap();
    let machine = &plan.steps[progress.next].machine;
    world.sicken(machine);
    world.away(10 * WAIT_TIMEOUT_MS);
    let next = advance(&plan, &progress.resumed(world.started_ms), &world.observed(), world.now_ms);
    assert!(matches!(next, Next::Wait { .. }), "{next:?}");
    world.machines.get_mut(machine).unwrap().checks.clear();
    assert_eq!(world.run(&mut || false), Some(Ended::Done));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// However many plans are given up at whatever place: the one that comes to its end has all machines serve.
    #[test]
    fn the_last_of_many_plans_leaves_nothing_behind(
        plans in proptest::collection::vec((1u32..4, 1u32..5, 0usize..24), 1..6),
        last in (1u32..4, 1u32..5),
    ) {
        let mut world = World::new();
        for (nth, count, boundaries) in plans {
            let release = world.plan.as_ref().map_or(1, |(plan, _)| plan.release + 1);
            let desired = world.desired(release, &spec(Image::Good, nth, true), count, Purpose::Deploy);
            world.save(&desired).unwrap();
            let mut passed = 0;
            world.run(&mut || {
                passed += 1;
                passed > boundaries
            });
        }
        let new = spec(Image::Good, last.0, true);
        prop_assert_eq!(world.deploy(99, &new, last.1), Ended::Done);
        world.host_turn();
        prop_assert_eq!((world.rows.len(), world.healthy()), (last.1 as usize, last.1 as usize));
        prop_assert!(world.machines.values().all(|fact| !fact.cordoned));
        prop_assert!(world.rows.values().all(|row| row.spec.image == new.image));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whichever of the machines do not serve, an update of all never lets more than one that serves be missed.
    #[test]
    fn an_update_never_costs_more_than_one_that_serves(count in 1u32..5, sick in proptest::collection::btree_set(0usize..5, 0..5)) {
        let mut world = World::new();
        world.deploy(1, &spec(Image::Good, 1, true), count);
        let ids: Vec<_> = world.rows.keys().cloned().collect();
        for id in sick.iter().filter_map(|nth| ids.get(*nth)) {
            world.sicken(id);
        }
        let before = world.healthy();
        world.lowest_healthy = usize::MAX;
        prop_assert_eq!(world.deploy(2, &spec(Image::Good, 2, true), count), Ended::Done);
        let all_served = before == ids.len();
        prop_assert!(world.lowest_healthy + usize::from(all_served) >= before, "{} of {before}", world.lowest_healthy);
        prop_assert_eq!(world.healthy(), ids.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is deployed over whatever, with a crash at every boundary in turn: after the replay the
    /// app is wholly in the new or wholly in the old release, and never did more than one machine less serve.
    #[test]
    fn every_crash_ends_in_one_release(
        before in 1u32..4,
        after in 1u32..4,
        bad in image(),
        checked in any::<bool>(),
    ) {
        let mut start = World::new();
        let old = spec(Image::Good, 1, checked);
        prop_assert_eq!(start.deploy(1, &old, before), Ended::Done);
        let new = spec(bad, 2, checked);
        let desired = start.desired(2, &new, after, Purpose::Deploy);
        start.lowest_healthy = usize::MAX;
        start.save(&desired).unwrap();
        for crash_at in 0.. {
            let mut world = start.clone();
            let mut boundary = 0;
            let mut crashed = false;
            let mut crash = || {
                let hit = boundary == crash_at && !crashed;
                boundary += 1;
                crashed |= hit;
                hit
            };
            let mut ended = None;
            while ended.is_none() {
                ended = world.run(&mut crash);
            }
            if matches!(ended, Some(Ended::Failed { .. })) {
                prop_assert_ne!(bad, Image::Good);
                let desired = world.desired(1, &old, before, Purpose::Return { failed_release: 2 });
                world.save(&desired).unwrap();
                ended = None;
                while ended.is_none() {
                    ended = world.run(&mut crash);
                }
                prop_assert_eq!(ended, Some(Ended::Done), "the old release works");
                prop_assert!(world.rows.values().all(|row| row.spec.image == old.image));
                prop_assert_eq!(world.rows.len(), before as usize);
            } else {
                prop_assert!(world.rows.values().all(|row| row.spec.image == new.image));
                prop_assert_eq!(world.rows.len(), after as usize);
            }
            world.host_turn();
            prop_assert_eq!(world.healthy(), world.rows.len());
            prop_assert!(world.lowest_healthy + 1 >= (before.min(after)) as usize);
            let addresses: BTreeSet<_> = world.rows.values().map(|row| row.address).collect();
            prop_assert_eq!(addresses.len(), world.rows.len());
            if !crashed {
                break; // every boundary was visited
            }
        }
    }
}

/// A volume is in one machine, stays with it over releases, and goes to the machine that takes its place.
#[test]
fn machines_keep_their_volumes_and_new_ones_take_free_ones() {
    let target = |name: &str, path: &str| {
        Some(MountTarget { name: name.into(), path: path.into(), size_gb: 1, snapshot_retention: 5, auto_backup: true, encrypted: None, extend: None })
    };
    let mut world = World::new();
    let plan_of = |world: &mut World, release, image, count, mount: Option<MountTarget>, free: &[VolumeId]| {
        let mut desired = world.desired(release, &spec(image, release, true), count, Purpose::Deploy);
        desired.groups.get_mut("app").unwrap().mount = mount;
        desired.free_volumes = free.iter().map(|id| volume_row(id.clone())).collect();
        let mut pool = world.pool(&desired);
        pool.volumes = (0..count as u8).map(|n| VolumeId::from_random([n, release as u8, 0, 0, 0, 0, 0, 0])).collect();
        let made = plan(&desired, &world.observed(), pool).unwrap();
        assert_eq!(check(&made, &desired, &world.observed()), Ok(()));
        made
    };
    let mounts = |world: &World| -> Vec<_> { world.rows.values().flat_map(|row| row.spec.mounts.clone()).collect() };
    let run = |world: &mut World, made: &Plan| {
        for step in &made.steps {
            if matches!(step.kind, StepKind::Reserve { .. } | StepKind::Assign { .. } | StepKind::Update { .. } | StepKind::Destroy { .. }) {
                world.act(made, step).unwrap();
            }
        }
    };
    let kept = VolumeId::from_random([9; 8]);
    let made = plan_of(&mut world, 1, Image::Good, 2, target("data", "/data"), std::slice::from_ref(&kept));
    run(&mut world, &made);
    let had = mounts(&world);
    assert!(had.len() == 2 && had.iter().any(|mount| mount.volume == kept) && had[0].volume != had[1].volume, "{had:?}");

    // Another release: in place, which is one after the other on the same host, with the same volume at another path.
    let made = plan_of(&mut world, 2, Image::Good, 2, target("data", "/srv"), &[]);
    assert!(made.steps.iter().all(|step| !matches!(step.kind, StepKind::Assign { .. })), "{:?}", step_names(&made));
    run(&mut world, &made);
    let now = mounts(&world);
    assert!(now.iter().zip(&had).all(|(now, had)| now.volume == had.volume && now.path == "/srv"), "{now:?}");

    // Another volume: a machine cannot change it, so another takes its place first.
    let made = plan_of(&mut world, 3, Image::Good, 2, target("other", "/srv"), &[]);
    run(&mut world, &made);
    assert!(mounts(&world).iter().all(|mount| mount.name == "other"));
    assert_eq!(world.rows.len(), 2);

    let made = plan_of(&mut world, 4, Image::Good, 2, None, &[]);
    run(&mut world, &made);
    assert_eq!((mounts(&world), world.rows.len()), (vec![], 2), "without one in the release they have none");
}

/// Files are where they are: a machine that would not find them is not made.
#[test]
fn a_machine_goes_to_the_host_of_its_volume_or_nowhere() {
    let mut world = World::new();
    let mut desired = world.desired(1, &spec(Image::Good, 1, true), 1, Purpose::Deploy);
    let mount = MountTarget { name: "data".into(), path: "/data".into(), size_gb: 1, snapshot_retention: 5, auto_backup: true, encrypted: None, extend: None };
    desired.groups.get_mut("app").unwrap().mount = Some(mount);
    let elsewhere = VolumeRow { host: "h9".parse().unwrap(), ..volume_row(VolumeId::from_random([1; 8])) };
    desired.free_volumes = vec![elsewhere];
    let pool = world.pool(&desired);
    assert!(matches!(plan(&desired, &world.observed(), pool), Err(dunlin_planner::PlanError::NoCapacity(_))));
}

fn volume_row(id: VolumeId) -> VolumeRow {
    VolumeRow {
        id,
        name: "data".into(),
        org: "personal".parse().unwrap(),
        app: sim::app(),
        host: host(),
        region: "local".parse().unwrap(),
        size_gb: 1,
        created_at_ms: 0,
        snapshot_retention: 5,
        auto_backup: true,
        encrypted: false,
        source: None,
    }
}
