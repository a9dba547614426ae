//! Executing a plan: what the current step needs, given what is observed.

use crate::health::{MAX_EXITS_BEFORE_HEALTHY, Verdict, details, judge, look_back, why_it_failed};
use crate::{Mark, Next, Observed, Plan, Progress, Step, StepKind};
use dunlin_model::{MachineSpec, MachineState, MachineVersion};
use dunlin_view::MachineFact;

/// A machine is good when it has been healthy for this long in one attempt, or for the plan's `wait_timeout_ms` if that
/// is shorter. Apps that open their port and only then find that something is missing (a database, a variable) end
/// within about this; a longer watch would be felt at every machine. Requests reach the machine from its first passing
/// check on, so this delays no request, only the next machine and the end of the deploy.
pub const STEADY_MS: u64 = 3_000;
/// A machine that cannot be stopped is destroyed by its tombstone; waiting for it has an end.
const STOP_GRACE_MS: u64 = 10_000;
/// A host that refuses a version for a reason of its own may need one more try; then the plan fails.
const PROBLEM_GRACE_MS: u64 = 5_000;

/// The next thing to do. Pure: the same again until something is marked or observed.
pub fn advance<'plan>(plan: &'plan Plan, progress: &Progress, observed: &Observed, now_ms: u64) -> Next<'plan> {
    if let Some(ended) = &progress.ended {
        return match ended {
            crate::Ended::Failed { machine, reason, details } => {
                Next::Failed { machine: machine.clone(), reason: reason.clone(), details: details.clone() }
            }
            crate::Ended::Done | crate::Ended::Superseded => Next::Done,
        };
    }
    let index = progress.next;
    let Some(step) = plan.steps.get(index) else {
        return look_back(plan, progress, observed, now_ms).unwrap_or(Next::Done);
    };
    if takes_down(&step.kind)
        && let Some(next) = look_back(plan, progress, observed, now_ms)
    {
        return next;
    }
    if needs_a_row(&step.kind) && !observed.assigned.contains(&step.machine) {
        return Next::Replan { why: format!("machine {} was destroyed meanwhile", step.machine) };
    }
    if let Some(next) = of_a_lost_host(progress, observed, step) {
        return next;
    }
    let fact = observed.machines.get(&step.machine).map(|fact| &**fact);
    match &step.kind {
        StepKind::Reserve { .. }
        | StepKind::Assign { .. }
        | StepKind::Update { .. }
        | StepKind::Cordon { .. }
        | StepKind::Uncordon { .. }
        | StepKind::Destroy { .. } => Next::Act { index, step },
        StepKind::Start { version, .. } => start(plan, progress, step, fact, version, now_ms),
        StepKind::Gate { .. } => gate(plan, progress, observed, step, now_ms),
        StepKind::Stop { timeout_ms, .. } => stop(progress, step, fact, *timeout_ms, now_ms),
    }
}

/// After it one machine less may serve.
fn takes_down(kind: &StepKind) -> bool {
    match kind {
        StepKind::Update { .. } | StepKind::Cordon { .. } | StepKind::Stop { .. } | StepKind::Destroy { .. } => true,
        StepKind::Reserve { .. }
        | StepKind::Assign { .. }
        | StepKind::Uncordon { .. }
        | StepKind::Start { .. }
        | StepKind::Gate { .. } => false,
    }
}

/// A machine without a row never gets there, however long one waits. To remove one that is gone is no work.
fn needs_a_row(kind: &StepKind) -> bool {
    match kind {
        StepKind::Update { .. } | StepKind::Uncordon { .. } | StepKind::Start { .. } | StepKind::Gate { .. } => true,
        StepKind::Reserve { .. }
        | StepKind::Assign { .. }
        | StepKind::Cordon { .. }
        | StepKind::Stop { .. }
        | StepKind::Destroy { .. } => false,
    }
}

/// Nobody waits for a host that is dead: what only it could do is left out, or needs another plan.
fn of_a_lost_host<'plan>(progress: &Progress, observed: &Observed, step: &Step) -> Option<Next<'plan>> {
    let is_lost = observed.lost.contains(&step.machine);
    match &step.kind {
        StepKind::Reserve { host, .. } | StepKind::Assign { host, .. } if observed.dead.contains(host) => {
            Some(Next::Replan { why: format!("host {host} is lost") })
        }
        StepKind::Start { .. } | StepKind::Gate { .. } | StepKind::Uncordon { .. } if is_lost => {
            Some(Next::Replan { why: format!("machine {} was lost with its host", step.machine) })
        }
        StepKind::Cordon { .. } | StepKind::Stop { .. } if is_lost => {
            Some(Next::Mark(Mark::Passed { index: progress.next, floor: None }))
        }
        _ => None, // what is written to the store waits for no host
    }
}

/// Waits until the host has the version prepared, then starts it unless it runs.
fn start<'plan>(
    plan: &Plan,
    progress: &Progress,
    step: &'plan Step,
    fact: Option<&MachineFact>,
    version: &MachineVersion,
    now_ms: u64,
) -> Next<'plan> {
    let index = progress.next;
    let deadline_ms = progress.since_ms.saturating_add(plan.wait_timeout_ms);
    let machine = &step.machine;
    let Some(fact) = fact else {
        return wait_or_fail(step, deadline_ms, now_ms, || {
            format!("machine {machine} was not taken up by its host")
        });
    };
    if fact.version != *version {
        return match &fact.problem {
            Some(problem) if now_ms >= progress.since_ms.saturating_add(PROBLEM_GRACE_MS) => failed(
                step,
                format!("machine {machine} could not be brought into the new version: {problem}"),
                vec![problem.clone()],
            ),
            Some(problem) => Next::Wait {
                until_ms: progress.since_ms.saturating_add(PROBLEM_GRACE_MS),
                why: format!("machine {machine}: {problem}"),
            },
            None => wait_or_fail(step, deadline_ms, now_ms, || {
                format!("machine {machine} was not brought into the new version")
            }),
        };
    }
    match fact.state {
        // Its exits are of an earlier time: a start begins a new count.
        MachineState::Restarting if fact.restarts >= MAX_EXITS_BEFORE_HEALTHY => Next::Act { index, step },
        MachineState::Starting | MachineState::Started | MachineState::Restarting => {
            Next::Mark(Mark::Passed { index, floor: Some(fact.sequence) })
        }
        // Never ran in this version: it could not be prepared, so a start would only say the same.
        MachineState::Failed if fact.exit.is_none() && fact.problem.is_some() => {
            let problem = fact.problem.clone().unwrap_or_default();
            failed(step, format!("machine {machine} could not be prepared: {problem}"), vec![problem])
        }
        MachineState::Created | MachineState::Stopped | MachineState::Suspended | MachineState::Failed => {
            Next::Act { index, step }
        }
        MachineState::Creating | MachineState::Updating | MachineState::Stopping | MachineState::Suspending => {
            wait_or_fail(step, deadline_ms, now_ms, || {
                format!("machine {machine} is still {}", fact.state.as_str())
            })
        }
        MachineState::Destroying | MachineState::Destroyed => {
            failed(step, format!("machine {machine} was destroyed meanwhile"), vec![])
        }
    }
}

/// Reads only facts of this version, at or after the sequence that the host answered.
fn gate<'plan>(
    plan: &'plan Plan,
    progress: &Progress,
    observed: &Observed,
    step: &'plan Step,
    now_ms: u64,
) -> Next<'plan> {
    if let Some(mark) = newly_healthy(plan, progress, observed) {
        return Next::Mark(mark);
    }
    let index = progress.next;
    let machine = &step.machine;
    let deadline_ms = progress.since_ms.saturating_add(plan.wait_timeout_ms);
    let (spec, fact) = match at_gate(plan, progress, observed, step) {
        Some((spec, Some(fact))) => (spec, fact),
        Some((_, None)) => {
            return wait_or_fail(step, deadline_ms, now_ms, || format!("nothing was heard of machine {machine}"));
        }
        None => return failed(step, "the plan has no spec of its process group".into(), vec![]),
    };
    match judge(fact, &spec) {
        Verdict::Healthy => {
            let since_ms = progress.healthy.get(machine).map_or(now_ms, |healthy| healthy.since_ms);
            let good_at_ms = since_ms.saturating_add(STEADY_MS.min(plan.wait_timeout_ms));
            if now_ms >= good_at_ms {
                return Next::Mark(Mark::Proven { index, attempt: fact.attempt });
            }
            Next::Wait { until_ms: good_at_ms, why: format!("machine {machine} is healthy; is it going to stay so?") }
        }
        Verdict::AtRest => Next::Mark(Mark::Passed { index, floor: None }),
        Verdict::Failed => failed(step, why_it_failed(machine, fact), details(fact)),
        Verdict::Gone => failed(step, format!("machine {machine} was destroyed meanwhile"), vec![]),
        Verdict::NotYet(what) if now_ms < deadline_ms => {
            Next::Wait { until_ms: deadline_ms, why: format!("machine {machine}: {what}") }
        }
        Verdict::NotYet(what) => {
            let reason = format!("machine {machine} did not become healthy in time: {what}");
            failed(step, reason, details(fact))
        }
    }
}

/// A machine at one of the gates that follow each other from the current step on, seen healthy in an attempt for the
/// first time. All of them at once, so that many new machines have to stay healthy side by side, not in turn.
fn newly_healthy(plan: &Plan, progress: &Progress, observed: &Observed) -> Option<Mark> {
    let gates = plan.steps[progress.next..].iter().take_while(|step| matches!(step.kind, StepKind::Gate { .. }));
    gates.filter_map(|step| {
        let (spec, fact) = at_gate(plan, progress, observed, step)?;
        let fact = fact.filter(|fact| matches!(judge(fact, &spec), Verdict::Healthy))?;
        let is_known = progress.healthy.get(&step.machine).is_some_and(|healthy| healthy.attempt == fact.attempt);
        (!is_known).then(|| Mark::Healthy { machine: step.machine.clone(), attempt: fact.attempt })
    }).next()
}

/// What a gate's machine should be, and its newest fact that counts.
fn at_gate<'o>(
    plan: &Plan,
    progress: &Progress,
    observed: &'o Observed,
    step: &Step,
) -> Option<(MachineSpec, Option<&'o MachineFact>)> {
    let StepKind::Gate { group, version } = &step.kind else { return None };
    let spec = plan.spec(group, version)?;
    let floor = progress.floors.get(&step.machine).copied().unwrap_or(0);
    let fact = observed.machines.get(&step.machine).map(|fact| &**fact);
    Some((spec, fact.filter(|fact| fact.version == *version && fact.sequence >= floor)))
}

fn stop<'plan>(
    progress: &Progress,
    step: &'plan Step,
    fact: Option<&MachineFact>,
    timeout_ms: u64,
    now_ms: u64,
) -> Next<'plan> {
    let index = progress.next;
    let passed = Next::Mark(Mark::Passed { index, floor: None });
    let Some(fact) = fact else { return passed };
    let deadline_ms = progress.since_ms.saturating_add(timeout_ms).saturating_add(STOP_GRACE_MS);
    match fact.state {
        MachineState::Starting | MachineState::Started | MachineState::Restarting | MachineState::Updating
            if now_ms < deadline_ms =>
        {
            Next::Act { index, step }
        }
        MachineState::Stopping if now_ms < deadline_ms => {
            Next::Wait { until_ms: deadline_ms, why: format!("machine {} is stopping", step.machine) }
        }
        _ => passed, // stopped, or the tombstone will end it
    }
}

fn wait_or_fail<'plan>(step: &Step, deadline_ms: u64, now_ms: u64, what: impl FnOnce() -> String) -> Next<'plan> {
    if now_ms < deadline_ms {
        return Next::Wait { until_ms: deadline_ms, why: format!("{}, yet", what()) };
    }
    failed(step, format!("{} in time", what()), vec![])
}

fn failed<'plan>(step: &Step, reason: String, details: Vec<String>) -> Next<'plan> {
    Next::Failed { machine: Some(step.machine.clone()), reason, details }
}
