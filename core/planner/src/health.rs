//! Whether a machine does what its plan wants of it, and if not, why.

use crate::{Next, Plan, Progress, StepKind};
use dunlin_model::{ExitInfo, MachineId, MachineSpec, MachineState, RestartWhen};
use dunlin_view::{CheckState, MachineFact};

/// So many exits before it was healthy, and waiting longer would not help.
pub const MAX_EXITS_BEFORE_HEALTHY: u32 = 3;

/// What a fact says of a machine that should run `spec`.
pub(crate) enum Verdict {
    /// It runs, and every check that gates routing passes.
    Healthy,
    /// It is stopped, and rightly so.
    AtRest,
    /// What it lacks.
    NotYet(String),
    /// It will not become healthy by itself.
    Failed,
    Gone,
}

pub(crate) fn judge(fact: &MachineFact, spec: &MachineSpec) -> Verdict {
    let failing = failing_check(fact, spec);
    match fact.state {
        MachineState::Started if failing.is_none() => Verdict::Healthy,
        _ if fact.state == MachineState::Failed || fact.restarts >= MAX_EXITS_BEFORE_HEALTHY => Verdict::Failed,
        MachineState::Stopped | MachineState::Suspended => match &fact.exit {
            Some(exit) if ended_by_itself(exit, spec) && !is_done(exit, spec) => Verdict::Failed,
            _ => Verdict::AtRest, // somebody asked for it, and their decision stands
        },
        MachineState::Destroying | MachineState::Destroyed => Verdict::Gone,
        MachineState::Started => Verdict::NotYet(failing.unwrap_or_default()),
        state => Verdict::NotYet(format!("it is {}", state.as_str())),
    }
}

/// A machine comes to rest by itself only by an exit with code 0, and only if its policy does not start it again; every
/// other way is a request, that of stopping one which just crashed included.
fn ended_by_itself(exit: &ExitInfo, spec: &MachineSpec) -> bool {
    !exit.requested_stop && exit.exit_code == Some(0) && spec.restart.policy != RestartWhen::Always
}

/// A machine that serves nothing may come to its end.
fn is_done(exit: &ExitInfo, spec: &MachineSpec) -> bool {
    let is_job = spec.services.is_empty() && !spec.checks.iter().any(|check| check.gates_routing);
    is_job && exit.exit_code == Some(0)
}

fn failing_check(fact: &MachineFact, spec: &MachineSpec) -> Option<String> {
    spec.checks.iter().filter(|check| check.gates_routing).find_map(|check| {
        match fact.checks.iter().find(|status| status.name == check.name) {
            Some(status) if status.status == CheckState::Passing => None,
            Some(status) => Some(format!("check {} says: {}", check.name, status.output)),
            None => Some(format!("check {} has not answered yet", check.name)),
        }
    })
}

/// What passed its gate must still be healthy before anything else is taken down, and at the end. `None`: it is.
///
/// An exit that nobody asked for fails the plan at once: what came up once and did not stay is not what one wants on
/// all machines. A check that fails now and passed before gets the time that a gate has, and so does a machine whose
/// end was the platform's (a killed supervisor, a host that was restarted): that says nothing of the release.
pub(crate) fn look_back<'plan>(
    plan: &Plan,
    progress: &Progress,
    observed: &crate::Observed,
    now_ms: u64,
) -> Option<Next<'plan>> {
    let deadline_ms = progress.since_ms.saturating_add(plan.wait_timeout_ms);
    for (machine, attempt) in &progress.proven {
        if !observed.assigned.contains(machine) || observed.lost.contains(machine) {
            continue; // a person destroyed it, or its host is lost, and that is no fault of the release
        }
        let Some(spec) = gated_spec(plan, machine) else { continue };
        let fact = observed.machines.get(machine).filter(|fact| fact.version == spec.version);
        let Some(fact) = fact else {
            let what = "nothing is heard of it any more";
            return Some(wait_or_fail(machine, what, deadline_ms, now_ms, vec![]));
        };
        let is_its_own = |exit: &&ExitInfo| exit.attempt >= *attempt && !exit.requested_stop && exit.error.is_none();
        let fell = fact.exit.as_deref().filter(is_its_own);
        if let Some(exit) = fell.filter(|exit| !is_done(exit, &spec)) {
            let reason = format!("machine {machine} {} after it had been healthy", describe_exit(exit));
            return Some(failed(machine, reason, details(fact)));
        }
        match judge(fact, &spec) {
            Verdict::Healthy | Verdict::AtRest | Verdict::Gone => {}
            Verdict::NotYet(what) => return Some(wait_or_fail(machine, &what, deadline_ms, now_ms, details(fact))),
            Verdict::Failed => return Some(failed(machine, why_it_failed(machine, fact), details(fact))),
        }
    }
    None
}

fn gated_spec(plan: &Plan, machine: &MachineId) -> Option<MachineSpec> {
    let gate = plan.steps.iter().filter(|step| step.machine == *machine);
    gate.rev().find_map(|step| match &step.kind {
        StepKind::Gate { group, version } => plan.spec(group, version),
        _ => None,
    })
}

fn wait_or_fail<'plan>(
    machine: &MachineId,
    what: &str,
    deadline_ms: u64,
    now_ms: u64,
    details: Vec<String>,
) -> Next<'plan> {
    if now_ms < deadline_ms {
        return Next::Wait { until_ms: deadline_ms, why: format!("machine {machine}, which was healthy: {what}") };
    }
    failed(machine, format!("machine {machine} did not stay healthy: {what}"), details)
}

fn failed<'plan>(machine: &MachineId, reason: String, details: Vec<String>) -> Next<'plan> {
    Next::Failed { machine: Some(machine.clone()), reason, details }
}

pub(crate) fn why_it_failed(machine: &MachineId, fact: &MachineFact) -> String {
    let exit = fact.exit.as_deref().map(describe_exit);
    match (exit, &fact.problem) {
        (Some(exit), _) if fact.restarts >= MAX_EXITS_BEFORE_HEALTHY => {
            format!("machine {machine} {exit}, {} times before it was healthy", fact.restarts)
        }
        (Some(exit), _) => format!("machine {machine} {exit} before it was healthy"),
        (None, Some(problem)) => format!("machine {machine} cannot run: {problem}"),
        (None, None) => format!("machine {machine} failed"),
    }
}

fn describe_exit(exit: &ExitInfo) -> String {
    match exit {
        ExitInfo { error: Some(error), .. } => format!("could not start its process: {error}"),
        ExitInfo { oom_killed: true, .. } => "ran out of memory and was killed".into(),
        ExitInfo { signal: Some(signal), .. } => format!("was ended by signal {signal}"),
        ExitInfo { exit_code: Some(code), .. } => format!("exited with code {code}"),
        _ => "ended".into(),
    }
}

pub(crate) fn details(fact: &MachineFact) -> Vec<String> {
    let checks = fact.checks.iter().filter(|check| check.status != CheckState::Passing);
    let mut details: Vec<_> = checks.map(|check| format!("check {}: {}", check.name, check.output)).collect();
    details.extend(fact.problem.clone());
    details
}
