//! What becomes of a machine of the small host, turn by turn.

use super::now_ms;
use dunlin_model::{EventKind, ExitInfo, MachineEvent, MachineState, Source};
use dunlin_view::{CheckState, CheckStatus, MachineAssignment, MachineFact};

/// Longer than a deploy here wants to see a machine healthy, shorter than it takes to replace three.
const WITHERS_MS: u64 = 2_500;

pub fn created(assignment: &MachineAssignment) -> MachineFact {
    MachineFact {
        id: assignment.id.clone(),
        host: assignment.host.clone(),
        app: assignment.spec.app.clone(),
        sequence: 1,
        placement: assignment.placement,
        state: MachineState::Creating,
        version: assignment.spec.version.clone(),
        release: assignment.spec.release,
        process_group: assignment.spec.process_group.as_str().into(),
        attempt: 0,
        address: assignment.address,
        cordoned: false,
        checks: vec![],
        exit: None,
        restarts: 0,
        problem: None,
        over: false,
        unconfirmed: false,
        due_ms: None,
        containers: vec![],
        updated_at_ms: 0,
    }
}

pub fn live(fact: &mut MachineFact, assignment: &MachineAssignment) {
    let spec = &assignment.spec;
    let behave = spec.env.get("BEHAVE").map_or("good", String::as_str);
    if fact.version != spec.version {
        if behave == "missing" {
            fact.problem = Some("image not found".into());
            return;
        }
        let ran = !fact.state.is_asleep();
        fact.version = spec.version.clone();
        fact.release = spec.release;
        (fact.restarts, fact.exit, fact.checks, fact.problem) = (0, None, vec![], None);
        if ran && spec.rests {
            fact.state = MachineState::Stopping;
            return;
        }
        fact.state = if ran { MachineState::Starting } else { fact.state };
        fact.attempt += u64::from(ran);
        return;
    }
    let lives_ms = match behave {
        "crashes" => Some(0),
        "fades" => Some(300),
        "withers" => Some(WITHERS_MS),
        _ => None,
    };
    match fact.state {
        MachineState::Creating if behave == "missing" => {
            fact.state = MachineState::Failed;
            fact.problem = Some("image not found".into());
        }
        MachineState::Creating => fact.state = MachineState::Created,
        MachineState::Starting => fact.state = MachineState::Started,
        MachineState::Stopping => fact.state = MachineState::Stopped,
        MachineState::Restarting => {
            fact.state = MachineState::Starting;
            fact.attempt += 1;
        }
        MachineState::Started if behave == "ends" => {
            fact.state = MachineState::Stopped;
            fact.exit = Some(Box::new(exit(fact.attempt, 0)));
            fact.over = spec.auto_destroy;
        }
        MachineState::Started if lives_ms.is_some_and(|ms| now_ms() >= fact.updated_at_ms + ms) => {
            fact.restarts += 1;
            (fact.state, fact.checks) = (MachineState::Restarting, vec![]);
            fact.exit = Some(Box::new(exit(fact.attempt, 3)));
        }
        MachineState::Started if fact.checks.is_empty() => {
            let good = ["good", "fades", "withers"].contains(&behave);
            let checks = spec.checks.iter().map(|check| CheckStatus {
                name: check.name.clone(),
                status: if good { CheckState::Passing } else { CheckState::Critical },
                gates_routing: check.gates_routing,
                output: "HTTP 500, 12 bytes".into(),
                updated_at_ms: 0,
            });
            fact.checks = checks.collect();
        }
        _ => {}
    }
}

/// What a host tells of a machine.
pub fn told(exit: Option<Box<ExitInfo>>, taken_up_ms: Option<u64>) -> Vec<MachineEvent> {
    let event = |id, kind, status, at_ms, exit| MachineEvent { id, kind, status, source: Source::Host, at_ms, exit, restarts: 0, request_id: None };
    let ended = exit.map(|exit| event(exit.attempt, EventKind::Exit, MachineState::Stopped, exit.at_ms, Some(*exit)));
    let updated = taken_up_ms.map(|at_ms| event(0, EventKind::Update, MachineState::Stopped, at_ms, None));
    ended.into_iter().chain(updated).collect()
}

pub fn exit(attempt: u64, code: i32) -> ExitInfo {
    ExitInfo {
        attempt,
        exit_code: Some(code),
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms: 0,
        error: None,
    }
}
