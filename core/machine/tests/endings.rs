//! Machines that destroy themselves when their run has ended.

mod common;

use common::{assignment, exit, order, version, waking};
use dunlin_machine::{Alive, Checked, Deny, Effect, Event, Machine, Verb};
use dunlin_model::{MachineState as S, RestartWhen};

const STOP: Verb = Verb::Stop { signal: None, timeout_ms: None };
const GONE: Alive = Alive { attempt: None, stopping: false, frozen: false, exit: None, rebooted: false };

/// Started, and requests may wake it.
fn started(policy: RestartWhen) -> Machine {
    let mut assignment = waking(1);
    assignment.spec.auto_destroy = true;
    assignment.spec.restart.policy = policy;
    let (mut machine, _) = Machine::assigned(assignment, 1_000_000, 0);
    machine.handle(Event::Prepared { version: version(1), result: Ok(()), room: Ok(()) }, 0);
    assert!(!machine.record().is_over(), "it never ran");
    machine.handle(Event::Ordered(order(1, Verb::Start)), 0);
    machine.handle(Event::Spawned { attempt: 1, result: Ok(()) }, 0);
    machine
}

/// Said in its fact, also by the next agent, and nothing starts it.
fn is_over(machine: &Machine) {
    let mut again = Machine::from_record(machine.record().clone());
    let effects = again.handle(Event::Recovered(GONE), 50);
    assert!(effects.contains(&Effect::Publish), "{effects:?}");
    for (n, machine) in [machine.clone(), again].iter().enumerate() {
        assert!(machine.record().fact(vec![]).over, "{n}: {:?}", machine.record().state);
        for verb in [Verb::Start, Verb::Wake] {
            assert_eq!(machine.check(&order(9, verb), 60), Checked::Denied(Deny::Over));
        }
        assert_eq!(machine.check(&order(9, STOP), 60), Checked::AlreadySo);
    }
}

#[test]
fn an_end_that_nothing_follows_is_the_last() {
    for (policy, code) in [(RestartWhen::No, 0), (RestartWhen::No, 3), (RestartWhen::OnFailure, 0)] {
        let mut machine = started(policy);
        assert!(!machine.record().is_over());
        machine.handle(Event::Exited(exit(1, code, 10)), 10);
        is_over(&machine);
    }
}

#[test]
fn one_that_the_policy_starts_again_goes_on_until_the_policy_gives_up() {
    let mut machine = started(RestartWhen::OnFailure); // without a retry that counts
    machine.handle(Event::Exited(exit(1, 1, 10)), 10);
    is_over(&machine);
    let mut machine = started(RestartWhen::Always);
    machine.handle(Event::Exited(exit(1, 0, 10)), 10);
    assert_eq!((machine.record().state, machine.record().is_over()), (S::Restarting, false));
    machine.handle(Event::Ordered(order(2, STOP)), 11);
    is_over(&machine);
}

#[test]
fn a_stop_is_an_end_and_a_sleep_is_none() {
    let mut machine = started(RestartWhen::Always);
    machine.handle(Event::Ordered(order(2, Verb::Suspend)), 1);
    machine.handle(Event::Frozen { attempt: 1, result: Ok(()) }, 2);
    assert_eq!((machine.record().state, machine.record().is_over()), (S::Suspended, false));
    machine.handle(Event::Ordered(order(3, STOP)), 3);
    assert!(!machine.record().is_over(), "its program may still tidy up");
    machine.handle(Event::Exited(exit(1, 0, 10)), 10);
    is_over(&machine);
}

#[test]
fn one_that_could_not_be_started_has_ended() {
    let mut machine = started(RestartWhen::No);
    machine.handle(Event::Exited(exit(1, 0, 10)), 10);
    let mut machine = Machine::from_record(machine.record().clone());
    machine.handle(Event::Recovered(GONE), 11);
    // A newer version is another life.
    let mut next = assignment(2, "no", 0);
    next.spec.auto_destroy = true;
    machine.handle(Event::Assigned(Box::new(next)), 12);
    assert!(machine.record().is_over(), "not yet");
    machine.handle(Event::Prepared { version: version(2), result: Ok(()), room: Ok(()) }, 13);
    assert!(!machine.record().is_over());
    machine.handle(Event::Ordered(order(2, Verb::Start)), 14);
    assert_eq!(machine.record().state, S::Starting);
    machine.handle(Event::Spawned { attempt: 2, result: Err("no such program".into()) }, 15);
    assert_eq!(machine.record().state, S::Failed);
    is_over(&machine);
}
