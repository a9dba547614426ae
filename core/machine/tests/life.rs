//! Straight stories of one machine.

mod common;

use common::{assignment, exit, order, sized, version, waking};
use dunlin_machine::{Alive, Deny, Effect, Event, Machine, Order, UNCONFIRMED, Verb, backoff_ms};
use dunlin_model::{EventKind as E, Generation, MachineState as S};

const STOP: Verb = Verb::Stop { signal: None, timeout_ms: None };
const GONE: Alive = Alive { attempt: None, stopping: false, frozen: false, exit: None, rebooted: false };
const RESTART: Verb = Verb::Restart { signal: None, timeout_ms: None };

fn prepared(n: u8) -> Event {
    Event::Prepared { version: version(n), result: Ok(()), room: Ok(()) }
}

fn created(restart: &str, max_retries: u32) -> Machine {
    let (mut machine, _) = Machine::assigned(assignment(1, restart, max_retries), 1_000_000, 0);
    machine.handle(prepared(1), 0);
    assert_eq!(machine.record().state, S::Created);
    machine
}

fn started(restart: &str, max_retries: u32) -> Machine {
    let mut machine = created(restart, max_retries);
    machine.handle(Event::Ordered(order(1, Verb::Start)), 0);
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, 0);
    assert_eq!(machine.record().state, S::Started);
    machine
}

fn answer(effects: &[Effect]) -> Result<S, Deny> {
    let answer = effects.iter().find_map(|effect| match effect {
        Effect::Answer { answer, .. } => Some(answer.clone()),
        _ => None,
    });
    answer.expect("an answer").map(|asked| asked.previous_state)
}

fn denied(machine: &mut Machine, order: Order, now_ms: u64) -> Deny {
    let effects = machine.handle(Event::Ordered(order), now_ms);
    assert!(!effects.contains(&Effect::Journal), "a refusal changes nothing");
    answer(&effects).unwrap_err()
}

#[test]
fn a_new_machine_is_prepared_and_waits_for_its_start() {
    let (mut machine, effects) = Machine::assigned(assignment(1, "no", 0), 1_000_000, 0);
    assert!(matches!(&effects[..], [Effect::Journal, Effect::Prepare(_), Effect::Publish]));
    assert_eq!(machine.handle(prepared(1), 1), [Effect::Journal, Effect::Publish]);
    let effects = machine.handle(Event::Ordered(order(1, Verb::Start)), 2);
    assert!(matches!(
        &effects[..],
        [Effect::Journal, Effect::Answer { .. }, Effect::Spawn { attempt: 1 }, Effect::Publish]
    ));
}

#[test]
fn an_image_that_cannot_be_prepared_fails_the_machine() {
    let (mut machine, _) = Machine::assigned(assignment(1, "no", 0), 1_000_000, 0);
    machine.handle(Event::Prepared { version: version(1), result: Err("not found".into()), room: Ok(()) }, 0);
    assert_eq!(machine.record().state, S::Failed);
    assert_eq!(machine.record().problem.as_deref(), Some("not found"));
    machine.handle(Event::Assigned(Box::new(assignment(2, "no", 0))), 0);
    machine.handle(prepared(2), 0);
    assert_eq!(machine.record().state, S::Created);
}

#[test]
fn commands_are_checked_in_order() {
    let mut machine = started("no", 0);
    let held = machine.record().assignment.placement;
    let old = Generation { incarnation: 0, revision: 9 };
    let wrong = Order {
        deadline_ms: 5,
        generation: Some(old),
        expected_version: Some(version(9)),
        room: Err("full".into()),
        ..order(7, Verb::Start)
    };
    assert_eq!(denied(&mut machine, wrong.clone(), 6), Deny::TooLate);
    assert_eq!(denied(&mut machine, wrong.clone(), 5), Deny::OldGeneration { offered: old, held });
    let wrong = Order { generation: Some(held), ..wrong };
    let mismatch = Deny::VersionMismatch { expected: version(9), found: version(1) };
    assert_eq!(denied(&mut machine, wrong.clone(), 5), mismatch);
    let wrong = Order { expected_version: None, ..wrong };
    assert_eq!(answer(&machine.handle(Event::Ordered(wrong.clone()), 5)), Ok(S::Started), "nothing to do needs no room");
    let mut asleep = created("no", 0);
    let full = Err(Deny::NoRoom { why: "full".into() });
    assert_eq!(answer(&asleep.handle(Event::Ordered(wrong.clone()), 5)), full);
    let later = Order { room: Ok(()), ..wrong };
    assert_eq!(answer(&asleep.handle(Event::Ordered(later), 6)), full, "the first answer, though there is room now");
    assert_eq!(denied(&mut asleep, order(8, Verb::Signal { signal: 1 }), 5), Deny::IllegalMove { state: S::Created });
}

#[test]
fn a_plan_that_is_late_is_not_obeyed() {
    let plan = |incarnation, revision| Some(Generation { incarnation, revision });
    let mut machine = started("no", 0);
    let mut id = 100;
    let mut give = |machine: &mut Machine, plan, verb| {
        id += 1;
        answer(&machine.handle(Event::Ordered(Order { plan, ..order(id, verb) }), 1))
    };
    assert!(give(&mut machine, plan(1, 7), Verb::Start).is_ok(), "nothing to do counts as obeyed");
    let late = Deny::OldPlan { offered: plan(1, 6).unwrap(), held: plan(1, 7).unwrap() };
    assert_eq!(give(&mut machine, plan(1, 6), Verb::Cordon), Err(late.clone()));
    assert!(give(&mut machine, None, Verb::Cordon).is_ok(), "a person is no plan");
    assert!(give(&mut machine, plan(1, 7), Verb::Uncordon).is_ok());
    // It is journalled, and a restored store begins a new count.
    let mut machine = Machine::from_record(machine.record().clone());
    assert_eq!(give(&mut machine, plan(1, 6), Verb::Cordon), Err(late));
    assert!(give(&mut machine, plan(2, 1), Verb::Cordon).is_ok());
}

#[test]
fn a_request_wakes_only_what_sleeps_uncordoned_and_may_be_woken() {
    let wake = || order(7, Verb::Wake);
    let mut machine = created("no", 0);
    assert_eq!(denied(&mut machine, wake(), 1), Deny::IllegalMove { state: S::Created }, "no autostart");
    let (mut machine, _) = Machine::assigned(waking(1), 1_000_000, 0);
    assert_eq!(denied(&mut machine, wake(), 1), Deny::IllegalMove { state: S::Creating });
    machine.handle(prepared(1), 1);
    machine.handle(Event::Ordered(order(1, Verb::Cordon)), 2);
    assert_eq!(denied(&mut machine, wake(), 3), Deny::Cordoned);
    machine.handle(Event::Ordered(order(2, Verb::Uncordon)), 4);
    let full = Order { room: Err("full".into()), ..wake() };
    assert_eq!(denied(&mut machine, full, 5), Deny::NoRoom { why: "full".into() });
    assert!(machine.handle(Event::Ordered(wake()), 6).contains(&Effect::Spawn { attempt: 1 }));
    assert_eq!(answer(&machine.handle(Event::Ordered(order(8, Verb::Wake)), 7)), Ok(S::Starting));
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, 8);
    machine.handle(Event::Exited(exit(1, 1, 9)), 9);
    assert_eq!(denied(&mut machine, order(9, Verb::Wake), 9), Deny::IllegalMove { state: S::Failed });
}

#[test]
fn a_repeat_gets_the_first_answer_and_does_nothing() {
    let mut machine = started("no", 0);
    machine.handle(Event::Ordered(order(2, STOP)), 1);
    machine.handle(Event::Exited(exit(1, 0, 2)), 2);
    assert_eq!(machine.record().state, S::Stopped);
    let effects = machine.handle(Event::Ordered(order(1, Verb::Start)), 3);
    assert_eq!(answer(&effects), Ok(S::Created));
    assert_eq!(effects.len(), 1, "{effects:?}");
    assert_eq!(machine.record().state, S::Stopped);
}

#[test]
fn a_start_that_had_nothing_to_do_does_nothing_later_either() {
    let mut machine = started("no", 0);
    assert_eq!(answer(&machine.handle(Event::Ordered(order(2, Verb::Start)), 1)), Ok(S::Started));
    machine.handle(Event::Ordered(order(3, STOP)), 1);
    machine.handle(Event::Exited(exit(1, 0, 2)), 2);
    machine.handle(Event::Ordered(order(2, Verb::Start)), 3);
    assert_eq!(machine.record().state, S::Stopped);
}

#[test]
fn an_update_of_a_running_machine_exchanges_it() {
    let mut machine = started("always", 0);
    let effects = machine.handle(Event::Assigned(Box::new(assignment(2, "always", 0))), 1);
    assert!(matches!(&effects[..], [Effect::Journal, Effect::Prepare(_), Effect::Publish]));
    assert_eq!(machine.record().state, S::Started, "the old version serves while the new is prepared");
    let effects = machine.handle(prepared(2), 2);
    assert!(matches!(&effects[..], [Effect::Journal, Effect::Stop { .. }, Effect::Publish]));
    let effects = machine.handle(Event::Exited(exit(1, 0, 3)), 3);
    assert!(matches!(
        &effects[..],
        [Effect::Journal, Effect::CleanUp { attempt: 1 }, Effect::Spawn { attempt: 2 }, Effect::Publish]
    ));
    assert_eq!(machine.record().version(), &version(2));
}

/// How long a machine has run clients count from the last start that came after its last exit.
#[test]
fn what_starts_again_is_told_after_the_exit() {
    let told = |machine: &Machine| machine.record().events.iter().map(|event| event.kind).collect::<Vec<_>>();
    let mut restarted = started("no", 0);
    restarted.handle(Event::Ordered(order(2, RESTART)), 1);
    restarted.handle(Event::Exited(exit(1, 0, 2)), 2);
    assert_eq!(told(&restarted), [E::Launch, E::Start, E::Restart, E::Exit, E::Start]);
    let mut updated = started("no", 0);
    updated.handle(Event::Assigned(Box::new(assignment(2, "no", 0))), 1);
    updated.handle(prepared(2), 2);
    updated.handle(Event::Exited(exit(1, 0, 3)), 3);
    assert_eq!(told(&updated), [E::Launch, E::Start, E::Update, E::Exit, E::Launch, E::Start]);
    // Another version comes between two tries.
    let mut failed = started("always", 0);
    failed.handle(Event::Exited(exit(1, 1, 1)), 1);
    failed.handle(Event::Assigned(Box::new(assignment(2, "always", 0))), 2);
    failed.handle(prepared(2), 3);
    assert_eq!(failed.record().state, S::Starting);
    assert_eq!(told(&failed), [E::Launch, E::Start, E::Exit, E::Update, E::Launch, E::Start]);
    // A version that was taken up at rest is launched by whoever starts it.
    let mut rested = started("no", 0);
    rested.handle(Event::Ordered(order(2, STOP)), 1);
    rested.handle(Event::Exited(exit(1, 0, 2)), 2);
    rested.handle(Event::Assigned(Box::new(assignment(2, "no", 0))), 3);
    rested.handle(prepared(2), 4);
    rested.handle(Event::Ordered(order(3, Verb::Start)), 5);
    assert_eq!(told(&rested)[2..], [E::Stop, E::Exit, E::Update, E::Launch, E::Start]);
    // One that only waits has not been started.
    let mut waits = Machine::from_record(started("always", 0).record().clone());
    waits.handle(Event::Recovered(BOOTED), 1);
    waits.handle(Event::Assigned(Box::new(assignment(2, "always", 0))), 2);
    waits.handle(prepared(2), 3);
    assert_eq!(waits.record().state, S::Restarting);
    assert_eq!(told(&waits), [E::Launch, E::Start, E::Update]);
    waits.handle(Event::PlacementConfirmed, 4);
    assert_eq!(told(&waits), [E::Launch, E::Start, E::Update, E::Launch, E::Start]);
}

/// A version that rests.
fn resting(n: u8, restart: &str, memory_mb: u32) -> Event {
    let mut assignment = sized(n, restart, memory_mb);
    assignment.spec.rests = true;
    Event::Assigned(Box::new(assignment))
}

#[test]
fn an_update_that_rests_stops_what_runs() {
    // Also if there is no room to run it, and over a restart of the agent.
    let mut machine = started("always", 0);
    machine.handle(resting(2, "always", 512), 1);
    assert_eq!(machine.record().state, S::Started, "the old version serves while the new is prepared");
    let full = Event::Prepared { version: version(2), result: Ok(()), room: Err("full".into()) };
    let effects = machine.handle(full, 2);
    assert!(matches!(&effects[..], [Effect::Journal, Effect::Stop { .. }, Effect::Publish]), "{effects:?}");
    assert_eq!(machine.record().state, S::Stopping, "nobody is told that it runs already");
    let mut again = Machine::from_record(machine.record().clone());
    again.handle(Event::Recovered(Alive { attempt: Some(1), stopping: true, ..GONE }), 3);
    for machine in [&mut machine, &mut again] {
        let effects = machine.handle(Event::Exited(exit(1, 0, 4)), 4);
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Spawn { .. })), "{effects:?}");
        assert_eq!((machine.record().state, machine.record().version()), (S::Stopped, &version(2)));
        // Once: a start is a start, and the policy holds.
        assert!(machine.handle(Event::Ordered(order(2, Verb::Start)), 5).contains(&Effect::Spawn { attempt: 2 }));
        machine.handle(Event::Spawned { attempt: 2, result: Ok(()) }, 6);
        machine.handle(Event::Exited(exit(2, 0, 7)), 7);
        assert_eq!(machine.record().state, S::Restarting);
    }
    // The agent was killed before the version was prepared.
    let mut machine = started("always", 0);
    machine.handle(resting(2, "always", 256), 1);
    let mut again = Machine::from_record(machine.record().clone());
    let effects = again.handle(Event::Recovered(Alive { attempt: Some(1), ..GONE }), 2);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Prepare(_))), "{effects:?}");
    again.handle(prepared(2), 3);
    again.handle(Event::Exited(exit(1, 0, 4)), 4);
    assert_eq!((again.record().state, again.record().version()), (S::Stopped, &version(2)));
}

#[test]
fn an_update_that_rests_ends_restarts_and_updates_that_are_under_way() {
    let mut restarted = started("always", 0);
    restarted.handle(resting(2, "always", 256), 1);
    restarted.handle(Event::Ordered(order(2, RESTART)), 2);
    restarted.handle(prepared(2), 3);
    let mut updated = started("always", 0);
    updated.handle(Event::Assigned(Box::new(assignment(3, "always", 0))), 1);
    updated.handle(prepared(3), 2);
    updated.handle(resting(2, "always", 256), 3);
    updated.handle(prepared(2), 4);
    for mut machine in [restarted, updated] {
        assert_eq!(machine.record().state, S::Stopping);
        machine.handle(Event::Exited(exit(1, 0, 5)), 5);
        assert_eq!((machine.record().state, machine.record().version()), (S::Stopped, &version(2)));
    }
    let mut failed = started("always", 0);
    failed.handle(Event::Exited(exit(1, 1, 1)), 1);
    failed.handle(resting(2, "always", 256), 2);
    assert_eq!(failed.handle(prepared(2), 3), [Effect::Journal, Effect::Publish]);
    assert_eq!((failed.record().state, failed.record().version()), (S::Stopped, &version(2)));
    assert_eq!(failed.handle(Event::Tick, 1_000_000), []);
    // The next version does not inherit it.
    let mut next = started("always", 0);
    next.handle(resting(2, "always", 256), 1);
    next.handle(Event::Assigned(Box::new(assignment(3, "always", 0))), 2);
    assert_eq!(next.handle(prepared(2), 3), []);
    next.handle(prepared(3), 4);
    assert_eq!(next.record().state, S::Updating);
}

#[test]
fn an_update_of_a_stopped_machine_leaves_it_stopped() {
    let mut machine = started("no", 0);
    machine.handle(Event::Ordered(order(2, STOP)), 1);
    machine.handle(Event::Exited(exit(1, 0, 2)), 2);
    machine.handle(Event::Assigned(Box::new(assignment(2, "no", 0))), 3);
    machine.handle(prepared(2), 4);
    assert_eq!(machine.record().state, S::Stopped);
    assert_eq!(machine.record().version(), &version(2));
}

#[test]
fn an_update_that_needs_more_than_there_is_leaves_the_old_version_running() {
    let full = |n| Event::Prepared { version: version(n), result: Ok(()), room: Err("full".into()) };
    let mut machine = started("always", 0);
    machine.handle(Event::Assigned(Box::new(sized(2, "always", 512))), 1);
    assert_eq!(machine.handle(full(2), 2), [Effect::Journal, Effect::Publish]);
    assert_eq!((machine.record().state, machine.record().version()), (S::Started, &version(1)));
    assert!(machine.record().problem.as_ref().unwrap().contains("full"));
    assert_eq!(machine.record().reserved_mb(), 256);
    // One that is not larger needs no room, and one that fits holds its own from now on.
    machine.handle(Event::Assigned(Box::new(sized(3, "always", 256))), 3);
    machine.handle(full(3), 4);
    assert_eq!(machine.record().state, S::Updating);
    machine.handle(Event::Exited(exit(1, 0, 5)), 5);
    assert_eq!(machine.record().version(), &version(3));
    machine.handle(Event::Spawned { attempt: 2, result: Ok(()) }, 6);
    machine.handle(Event::Assigned(Box::new(sized(4, "always", 512))), 7);
    machine.handle(prepared(4), 8);
    assert_eq!((machine.record().state, machine.record().reserved_mb()), (S::Updating, 512));
    // What rests asks when it starts.
    let mut asleep = created("no", 0);
    asleep.handle(Event::Assigned(Box::new(sized(2, "no", 512))), 1);
    asleep.handle(full(2), 2);
    assert_eq!((asleep.record().version(), asleep.record().reserved_mb()), (&version(2), 0));
}

#[test]
fn a_version_that_is_not_prepared_is_not_taken_up() {
    let mut machine = started("no", 0);
    machine.handle(Event::Assigned(Box::new(assignment(2, "no", 0))), 1);
    machine.handle(Event::Ordered(order(2, RESTART)), 2);
    machine.handle(Event::Exited(exit(1, 0, 3)), 3);
    assert_eq!((machine.record().state, machine.record().version()), (S::Starting, &version(1)));
    let failed = Event::Prepared { version: version(2), result: Err("not found".into()), room: Ok(()) };
    machine.handle(failed, 4);
    assert_eq!((machine.record().state, machine.record().version()), (S::Starting, &version(1)));
}

#[test]
fn a_stop_is_told_once_with_its_own_signal_and_time() {
    let gently = Verb::Stop { signal: Some(10), timeout_ms: Some(60_000) };
    let stops = |effects: &[Effect]| -> Vec<(Option<i32>, u64)> {
        let stop = |effect: &Effect| match effect {
            Effect::Stop { signal, timeout_ms } => Some((*signal, *timeout_ms)),
            _ => None,
        };
        effects.iter().filter_map(stop).collect()
    };
    // While it starts: behind the spawn, and not again when that is done.
    let mut machine = created("no", 0);
    machine.handle(Event::Ordered(order(1, Verb::Start)), 0);
    assert_eq!(stops(&machine.handle(Event::Ordered(order(2, gently.clone())), 1_000)), [(Some(10), 60_000)]);
    assert_eq!(machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, 2_000), []);
    // Over a restart of the agent: only if the supervisor has not heard it, and with the time that is left.
    let recovered = |stopping| {
        let mut again = Machine::from_record(machine.record().clone());
        stops(&again.handle(Event::Recovered(Alive { attempt: Some(1), stopping, ..GONE }), 11_000))
    };
    assert_eq!(recovered(true), []);
    assert_eq!(recovered(false), [(Some(10), 50_000)]);
    // A restart that becomes a stop gives no more time than the restart did.
    let mut machine = started("always", 0);
    machine.handle(Event::Ordered(order(2, Verb::Restart { signal: None, timeout_ms: Some(5_000) })), 0);
    assert_eq!(stops(&machine.handle(Event::Ordered(order(3, gently)), 1_000)), [(Some(10), 4_000)]);
}

#[test]
fn a_stop_during_a_restart_is_final() {
    let mut machine = started("always", 0);
    machine.handle(Event::Ordered(order(2, RESTART)), 1);
    assert_eq!(answer(&machine.handle(Event::Ordered(order(3, STOP)), 2)), Ok(S::Stopping));
    machine.handle(Event::Exited(exit(1, 0, 3)), 3);
    assert_eq!(machine.record().state, S::Stopped);
}

#[test]
fn failures_are_tried_again_ever_later_and_then_given_up() {
    let mut machine = started("on-failure", 2);
    let mut now = 0;
    for n in 1..=2 {
        let attempt = machine.record().attempt;
        machine.handle(Event::Exited(exit(attempt, 1, now)), now);
        assert_eq!(machine.record().state, S::Restarting);
        let at = machine.record().restart_at_ms.unwrap();
        assert!((backoff_ms(n, 0)..=backoff_ms(n, 0) * 5 / 4).contains(&(at - now)));
        assert_eq!(machine.handle(Event::Tick, at - 1), [Effect::WakeAt { ms: at }], "not before its time");
        machine.handle(Event::Tick, at);
        assert_eq!(machine.record().state, S::Starting);
        now = at;
    }
    machine.handle(Event::Exited(exit(3, 1, now)), now);
    assert_eq!(machine.record().state, S::Failed);
    assert!(machine.record().problem.is_some());
    assert_eq!(backoff_ms(30, 0), 60_000, "bounded");
}

#[test]
fn a_good_end_is_an_end_unless_it_shall_run_always() {
    for (policy, state) in [("no", S::Stopped), ("on-failure", S::Stopped), ("always", S::Restarting)] {
        let mut machine = started(policy, 3);
        machine.handle(Event::Exited(exit(1, 0, 1)), 1);
        assert_eq!(machine.record().state, state, "{policy}");
    }
}

#[test]
fn a_long_run_begins_a_new_count() {
    let mut machine = started("on-failure", 1);
    machine.handle(Event::Exited(exit(1, 1, 1)), 1);
    machine.handle(Event::Tick, 10_000);
    machine.handle(Event::Spawned { attempt: 2, result: Ok(()) }, 10_000);
    machine.handle(Event::Exited(exit(2, 1, 100_000)), 100_000);
    assert_eq!((machine.record().state, machine.record().restarts), (S::Restarting, 1));
}

#[test]
fn only_a_tombstone_destroys() {
    let mut machine = started("no", 0);
    let effects = machine.handle(Event::Tombstone, 1);
    assert_eq!(effects, [Effect::Journal, Effect::Destroy, Effect::Publish]);
    assert_eq!(machine.handle(Event::Exited(exit(1, 0, 2)), 2), []);
    assert_eq!(denied(&mut machine, order(5, Verb::Start), 2), Deny::IllegalMove { state: S::Destroying });
    assert_eq!(machine.handle(Event::Destroyed, 3), [Effect::Publish, Effect::Forget]);
    // The disk is full and its record stays: nobody who asks is left without an answer, and it is dropped later.
    assert_eq!(denied(&mut machine, order(6, Verb::Start), 4), Deny::IllegalMove { state: S::Destroyed });
    assert_eq!(machine.handle(Event::Destroyed, 5), [Effect::Forget]);
}

const BOOTED: Alive = Alive { rebooted: true, ..GONE };

/// Started, and a service without files.
fn replaceable() -> Machine {
    let mut record = started("no", 0).record().clone();
    record.assignment = waking(1);
    record.current = Some(record.assignment.spec.clone());
    Machine::from_record(record)
}

#[test]
fn after_a_boot_what_may_run_twice_starts_at_once() {
    let mut again = Machine::from_record(replaceable().record().clone());
    let effects = again.handle(Event::Recovered(BOOTED), 9);
    assert!(effects.contains(&Effect::Spawn { attempt: 2 }), "{effects:?}");
    assert_eq!(again.record().restarts, 0, "it is not its failure");
    assert_eq!(again.handle(Event::PlacementConfirmed, 10), []);
}

/// An exclusive machine after a boot, and after another start of the agent.
fn waiting() -> Machine {
    let mut booted = Machine::from_record(started("no", 0).record().clone());
    let effects = booted.handle(Event::Recovered(BOOTED), 9);
    assert_eq!(effects, [Effect::Journal, Effect::CleanUp { attempt: 1 }, Effect::Publish]);
    let mut again = Machine::from_record(booted.record().clone());
    let effects = again.handle(Event::Recovered(GONE), 10);
    assert_eq!(effects, [Effect::Journal, Effect::CleanUp { attempt: 1 }, Effect::Publish]);
    assert_eq!(again.handle(Event::Tick, 1_000_000), []);
    assert_eq!((again.record().state, again.record().problem.as_deref()), (S::Restarting, Some(UNCONFIRMED)));
    again
}

#[test]
fn after_a_boot_an_exclusive_one_waits_until_its_placement_is_confirmed() {
    let mut machine = waiting();
    assert_eq!(denied(&mut machine, order(9, Verb::Wake), 11), Deny::Unconfirmed);
    let effects = machine.handle(Event::PlacementConfirmed, 12);
    assert_eq!(effects, [Effect::Journal, Effect::Spawn { attempt: 2 }, Effect::Publish]);
    assert_eq!((machine.record().restarts, machine.record().problem.as_deref()), (0, None));
    assert_eq!(machine.handle(Event::PlacementConfirmed, 13), []);
}

#[test]
fn a_start_is_a_confirmation_and_a_stop_ends_the_wait() {
    let mut machine = waiting();
    assert!(machine.handle(Event::Ordered(order(9, Verb::Start)), 11).contains(&Effect::Spawn { attempt: 2 }));
    assert!(!machine.record().unconfirmed);
    let mut machine = waiting();
    machine.handle(Event::Ordered(order(9, Verb::Stop { signal: None, timeout_ms: None })), 11);
    assert_eq!((machine.record().state, machine.record().problem.as_deref()), (S::Stopped, None));
    machine.handle(Event::PlacementConfirmed, 12);
    assert_eq!(machine.record().state, S::Stopped);
}

#[test]
fn one_that_failed_before_a_boot_waits_for_both_its_back_off_and_its_placement() {
    let mut failed = started("always", 0);
    failed.handle(Event::Exited(exit(1, 1, 5)), 5);
    let at = failed.record().restart_at_ms.unwrap();
    for confirmed_first in [true, false] {
        let mut machine = Machine::from_record(failed.record().clone());
        machine.handle(Event::Recovered(BOOTED), 6);
        let (first, second, second_at) =
            if confirmed_first { (Event::PlacementConfirmed, Event::Tick, at) } else { (Event::Tick, Event::PlacementConfirmed, at + 1) };
        let first_at = if confirmed_first { 7 } else { at };
        assert!(!machine.handle(first, first_at).contains(&Effect::Spawn { attempt: 2 }));
        assert!(machine.handle(second, second_at).contains(&Effect::Spawn { attempt: 2 }));
    }
}

#[test]
fn one_that_lives_waits_for_nothing() {
    let mut again = Machine::from_record(started("no", 0).record().clone());
    again.handle(Event::Recovered(Alive { attempt: Some(1), ..BOOTED }), 9);
    assert!(!again.record().unconfirmed);
}

#[test]
fn a_killed_supervisor_is_a_failure_that_the_policy_answers() {
    for (policy, state) in [("no", S::Failed), ("on-failure", S::Restarting)] {
        let mut again = Machine::from_record(started(policy, 3).record().clone());
        again.handle(Event::Recovered(GONE), 9);
        assert_eq!(again.record().state, state, "{policy}");
    }
}

#[test]
fn an_end_while_the_agent_was_away_is_seen() {
    let mut again = Machine::from_record(started("no", 0).record().clone());
    let alive = Alive { exit: Some(exit(1, 3, 5)), ..GONE };
    let effects = again.handle(Event::Recovered(alive), 9);
    assert!(effects.contains(&Effect::CleanUp { attempt: 1 }));
    assert_eq!(again.record().exit.as_ref().unwrap().exit_code, Some(3));
    assert_eq!(again.record().state, S::Failed);
}
