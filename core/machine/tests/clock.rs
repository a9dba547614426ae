//! Machines that the clock starts.

mod common;

use common::{assignment, exit, order, version};
use dunlin_machine::{Alive, Effect, Event, Machine, Verb};
use dunlin_model::{EventKind, MachineState as S, Source};

const STOP: Verb = Verb::Stop { signal: None, timeout_ms: None };
const MINUTE: u64 = 60_000;
const DUE: Event = Event::Due { room: Ok(()) };
const GONE: Alive = Alive { attempt: None, stopping: false, frozen: false, exit: None, rebooted: false };

/// Made half a minute before its time, not started by anybody.
fn created(schedule: &str, policy: &str) -> Machine {
    let mut assignment = assignment(1, policy, 3);
    assignment.spec.schedule = Some(schedule.parse().unwrap());
    let (mut machine, _) = Machine::assigned(assignment, 1_000_000, MINUTE / 2);
    assert_eq!(machine.record().due_ms, Some(MINUTE));
    machine.handle(prepared(1), MINUTE / 2);
    machine
}

fn prepared(n: u8) -> Event {
    Event::Prepared { version: version(n), result: Ok(()), room: Ok(()) }
}

fn spawns(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Spawn { .. }))
}

/// Started by the clock; the run lasts until `end`.
fn runs_until(machine: &mut Machine, from: u64, end: u64, code: i32) {
    assert!(spawns(&machine.handle(DUE, from)));
    let attempt = machine.record().attempt;
    machine.handle(Event::Spawned { attempt, result: Ok(()) }, from);
    machine.handle(Event::Exited(exit(attempt, code, end)), end);
}

#[test]
fn it_runs_at_its_time_and_stops() {
    let mut machine = created("* * * * *", "on-failure");
    assert_eq!(machine.handle(DUE, MINUTE - 1), [], "not yet");
    let effects = machine.handle(DUE, MINUTE);
    assert!(matches!(&effects[..], [Effect::Journal, Effect::Spawn { attempt: 1 }, Effect::Publish]), "{effects:?}");
    assert_eq!(machine.handle(DUE, MINUTE + 1), [], "once");
    let event = machine.record().events.back().unwrap();
    assert_eq!((event.kind, event.source), (EventKind::Start, Source::Host));
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, MINUTE + 2);
    machine.handle(Event::Exited(exit(1, 0, MINUTE + 10)), MINUTE + 10);
    assert_eq!((machine.record().state, machine.record().due_ms), (S::Stopped, Some(2 * MINUTE)));
    runs_until(&mut machine, 2 * MINUTE, 2 * MINUTE + 1, 0);
    assert_eq!(machine.record().attempt, 2);
}

#[test]
fn what_runs_at_its_time_is_left_alone() {
    let mut machine = created("* * * * *", "no");
    machine.handle(DUE, MINUTE);
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, MINUTE);
    assert_eq!(machine.handle(DUE, 2 * MINUTE), [Effect::Journal, Effect::Publish]);
    machine.handle(Event::Exited(exit(1, 0, 2 * MINUTE + 1)), 2 * MINUTE + 1);
    assert_eq!(machine.handle(DUE, 2 * MINUTE + 2), [], "its time passed while it ran");
    assert!(spawns(&machine.handle(DUE, 3 * MINUTE)));
}

#[test]
fn of_all_times_that_were_missed_one_is_made_good() {
    let mut machine = created("* * * * *", "no");
    runs_until(&mut machine, 100 * MINUTE + 7, 100 * MINUTE + 8, 0);
    assert_eq!(machine.record().due_ms, Some(101 * MINUTE));
    assert_eq!(machine.handle(DUE, 100 * MINUTE + 9), []);
}

#[test]
fn a_killed_agent_neither_forgets_a_time_nor_runs_it_twice() {
    // Killed before its time: the next one finds it.
    let mut again = Machine::from_record(created("* * * * *", "no").record().clone());
    again.handle(Event::Recovered(GONE), 3 * MINUTE);
    assert!(spawns(&again.handle(DUE, 3 * MINUTE)));
    // Killed after the journal and before the spawn: the same run, which nobody saw begin.
    let mut again = Machine::from_record(again.record().clone());
    assert!(spawns(&again.handle(Event::Recovered(GONE), 3 * MINUTE + 1)));
    assert_eq!(again.handle(DUE, 3 * MINUTE + 2), []);
    again.handle(Event::Spawned { attempt: 2, result: Ok(()) }, 3 * MINUTE + 3);
    // Killed while it ran, and it ended meanwhile.
    let mut again = Machine::from_record(again.record().clone());
    again.handle(Event::Recovered(Alive { exit: Some(exit(2, 0, 3 * MINUTE + 4)), ..GONE }), 3 * MINUTE + 5);
    assert_eq!((again.record().state, again.handle(DUE, 3 * MINUTE + 6)), (S::Stopped, vec![]));
}

#[test]
fn a_run_that_a_boot_broke_begins_again_only_as_its_policy_says() {
    for (policy, state) in [("no", S::Failed), ("on-failure", S::Restarting)] {
        let mut machine = created("* * * * *", policy);
        machine.handle(DUE, MINUTE);
        for was_seen in [false, true] {
            if was_seen {
                machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, MINUTE);
            }
            let mut again = Machine::from_record(machine.record().clone());
            let effects = again.handle(Event::Recovered(Alive { rebooted: true, ..GONE }), MINUTE + 9);
            assert_eq!((again.record().state, spawns(&effects)), (state, false), "{policy} {was_seen}");
        }
    }
}

#[test]
fn what_cannot_start_yet_starts_later() {
    let full = || Event::Due { room: Err("full".into()) };
    let mut machine = created("* * * * *", "no");
    assert_eq!(machine.handle(full(), MINUTE), [Effect::Journal, Effect::Publish]);
    assert_eq!(machine.record().problem.as_deref(), Some("its time has come and it waits for room: full"));
    assert_eq!(machine.handle(full(), MINUTE + 1), [], "said once");
    assert!(spawns(&machine.handle(DUE, MINUTE + 2)));
    assert_eq!(machine.record().problem, None);
    // Leased, or not at rest.
    let mut machine = created("* * * * *", "no");
    let lease = Verb::Lease { nonce: "n".into(), ttl_ms: 5 * MINUTE, owner: "o".into(), description: String::new() };
    machine.handle(Event::Ordered(order(1, lease)), MINUTE - 1);
    assert!(!machine.starts_by_clock(MINUTE));
    assert_eq!(machine.handle(DUE, MINUTE), []);
    assert!(machine.starts_by_clock(6 * MINUTE));
    runs_until(&mut machine, 6 * MINUTE, 6 * MINUTE + 1, 0);
    machine.handle(Event::Ordered(order(2, Verb::Start)), 6 * MINUTE + 2);
    machine.handle(Event::Spawned { attempt: 2, result: Ok(()) }, 6 * MINUTE + 3);
    machine.handle(Event::Ordered(order(3, STOP)), 7 * MINUTE);
    assert_eq!(machine.handle(DUE, 7 * MINUTE), [], "it stops");
    machine.handle(Event::Exited(exit(2, 0, 7 * MINUTE + 1)), 7 * MINUTE + 1);
    assert!(spawns(&machine.handle(DUE, 7 * MINUTE + 2)));
}

#[test]
fn a_suspended_one_goes_on() {
    let mut machine = created("* * * * *", "no");
    machine.handle(Event::Ordered(order(1, Verb::Start)), MINUTE / 2);
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, MINUTE / 2);
    machine.handle(Event::Ordered(order(2, Verb::Suspend)), MINUTE / 2);
    machine.handle(Event::Frozen { attempt: 1, result: Ok(()) }, MINUTE / 2);
    assert_eq!(machine.handle(DUE, MINUTE), [Effect::Journal, Effect::Thaw { attempt: 1 }, Effect::Publish]);
    assert_eq!(machine.record().events.back().unwrap().kind, EventKind::Resume);
}

#[test]
fn another_schedule_begins_anew_and_the_same_one_goes_on() {
    let mut machine = created("* * * * *", "no");
    let mut next = |n: u8, schedule: Option<&str>, now_ms| {
        let mut assignment = assignment(n, "no", 0);
        assignment.spec.schedule = schedule.map(|text| text.parse().unwrap());
        machine.handle(Event::Assigned(Box::new(assignment)), now_ms);
        machine.handle(prepared(n), now_ms);
        machine.record().due_ms
    };
    assert_eq!(next(2, Some("* * * * *"), 5 * MINUTE), Some(MINUTE), "still to be made good");
    assert_eq!(next(3, Some("*/5 * * * *"), 5 * MINUTE), Some(10 * MINUTE));
    assert_eq!(next(4, None, 20 * MINUTE), None);
    assert_eq!(next(5, Some("0 * * * *"), 30 * MINUTE), Some(60 * MINUTE));
}

#[test]
fn a_clock_that_was_wrong_once_does_no_lasting_harm() {
    let year = 365 * 24 * 60 * MINUTE;
    let mut machine = created("* * * * *", "no");
    runs_until(&mut machine, year, year + 1, 0);
    assert_eq!(machine.record().due_ms, Some(year + MINUTE));
    let mut again = Machine::from_record(machine.record().clone());
    again.handle(Event::Recovered(GONE), 3 * MINUTE + 1);
    assert_eq!(again.record().due_ms, Some(4 * MINUTE));
}
