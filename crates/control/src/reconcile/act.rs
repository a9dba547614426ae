//! One step of a plan, done so that doing it again is harmless.

use super::confirm;
use super::finish::{self, Failed};
use super::story::tell;
use super::{Turn, record};
use crate::failure::Failure;
use crate::rows::{AddressRow, Change, Outcome, Row, key};
use crate::volumes::{self, NewVolume};
use crate::{Ctx, destroyed, hosts, now_ms, removal};
use dunlin_api::{Command, CommandKind, Refusal, Reserve, Source};
use dunlin_model::desired::{MachineRow, TombstoneReason, TombstoneRow};
use dunlin_model::{Generation, MachineState, MachineVersion};
use dunlin_planner::{Ended, Mark, Plan, Progress, Step, StepKind};

/// Between reservation and assignment lies one transaction.
const RESERVE_TTL_MS: u64 = 30_000;
/// How late a host may still take a plan's command.
const COMMAND_DEADLINE_MS: u64 = 15_000;
/// A host that has not caught up with the projection is asked again after this.
const RETRY_MS: u64 = 50;

pub(crate) async fn act(
    ctx: &Ctx,
    plan: &Plan,
    progress: &Row<Progress>,
    index: usize,
    step: &Step,
) -> Result<Turn, Failure> {
    let name = step.kind.name();
    ctx.kill.pass(name, "before");
    tracing::debug!(app = %plan.app, plan = plan.sequence, step = index, machine = %step.machine, why = %step.why, "{name}");
    let deadline_ms = progress.value.since_ms.saturating_add(plan.wait_timeout_ms);
    let done = match &step.kind {
        StepKind::Reserve { host, guest } => {
            let reserve = Reserve { machine: step.machine.clone(), guest: guest.clone(), ttl_ms: RESERVE_TTL_MS };
            let promised = match hosts::reach(ctx, host) {
                Ok(host) => host.reserve(reserve).await,
                Err(refusal) => Err(refusal),
            };
            match promised {
                Ok(()) => Done::Passed { floor: None, change: Change::default() },
                Err(refusal) => {
                    // The next plan goes elsewhere, or says what each host lacks.
                    confirm::look_at_claim(ctx, host, guest, &refusal);
                    ctx.room.refused_by(host, &plan.app, plan.release, &refusal, now_ms());
                    Done::Replan("a host has no room after all")
                }
            }
        }
        StepKind::Assign { .. } => assign(ctx, plan, step).await?,
        StepKind::Update { group, version } => update(ctx, plan, step, group, version, deadline_ms).await?,
        StepKind::Destroy { .. } => remove(ctx, plan, step, deadline_ms).await?,
        StepKind::Start { version, .. } => start(ctx, plan, step, version, deadline_ms).await?,
        StepKind::Cordon { .. } => match send(ctx, plan, step, None, CommandKind::Cordon).await? {
            Ok(_) => Done::Passed { floor: None, change: Change::default() },
            Err(refusal @ Refusal::Leased { .. }) => not_yet(plan, step, &refusal, deadline_ms, "cordoned"),
            Err(refusal) => {
                // It only helps a clean drain; the stop that follows is what counts.
                tracing::debug!(app = %plan.app, machine = %step.machine, %refusal, "not cordoned");
                Done::Passed { floor: None, change: Change::default() }
            }
        },
        StepKind::Uncordon { .. } => match send(ctx, plan, step, None, CommandKind::Uncordon).await? {
            Ok(_) => Done::Passed { floor: None, change: Change::default() },
            Err(refusal) => not_yet(plan, step, &refusal, deadline_ms, "taken back into service"),
        },
        StepKind::Stop { timeout_ms, .. } => {
            let kind = CommandKind::Stop { signal: None, timeout_ms: Some(*timeout_ms) };
            tell(ctx, plan, Some(&step.machine), format!("stopping machine {}", step.machine)).await?;
            match send(ctx, plan, step, None, kind).await? {
                Ok(_) => Done::Wait, // the planner passes it when the machine is seen stopped
                Err(Refusal::NoSuchMachine(_) | Refusal::IllegalMove { .. }) => {
                    Done::Passed { floor: None, change: Change::default() }
                }
                Err(refusal @ (Refusal::Leased { .. } | Refusal::Unreachable { .. })) => {
                    not_yet(plan, step, &refusal, deadline_ms, "stopped")
                }
                Err(refusal) => Done::Failed(format!("machine {} cannot be stopped: {refusal}", step.machine)),
            }
        }
        StepKind::Gate { .. } => Done::Wait,
    };
    match done {
        Done::Passed { floor, change } => {
            let is_store_step = !change.then.is_empty();
            if !is_store_step {
                ctx.kill.pass(name, "after");
            }
            let outcome = record(ctx, plan, progress, &Mark::Passed { index, floor }, change).await?;
            if is_store_step && outcome == Outcome::Committed {
                ctx.kill.pass(name, "after");
            }
            if is_store_step && outcome == Outcome::Conflict {
                return replan(ctx, plan, progress, "a row of the step changed").await;
            }
        }
        Done::Failed(reason) => {
            let Some(app) = ctx.state.get(&key::app(&plan.app)).await? else { return Ok(Turn::Settled) };
            let failed = Failed { machine: Some(step.machine.clone()), ..Failed::plain(reason) };
            return finish::failed(ctx, &app, plan, Some(progress), failed).await;
        }
        Done::Wait => {
            if name == "stop" {
                ctx.kill.pass(name, "after"); // answered; the planner passes it when it is seen stopped
            }
            return Ok(Turn::Wait { until_ms: now_ms() + RETRY_MS });
        }
        Done::Replan(why) => return replan(ctx, plan, progress, why).await,
    }
    Ok(Turn::Again)
}

enum Done {
    Passed { floor: Option<u64>, change: Change },
    Wait,
    Failed(String),
    /// The world is not what the plan was made for.
    Replan(&'static str),
}

/// Gives the plan up; the next turn makes another one for the same release and purpose.
pub(crate) async fn replan(ctx: &Ctx, plan: &Plan, progress: &Row<Progress>, why: &str) -> Result<Turn, Failure> {
    tracing::info!(app = %plan.app, plan = plan.sequence, why, "another plan is needed");
    record(ctx, plan, progress, &Mark::Ended(Ended::Superseded), Change::default()).await?;
    Ok(Turn::Again)
}

async fn assign(ctx: &Ctx, plan: &Plan, step: &Step) -> Result<Done, Failure> {
    let StepKind::Assign { name, host, region, address, group, version, volume } = &step.kind else {
        return Ok(Done::Wait);
    };
    let Some(mut spec) = plan.spec(group, version) else {
        return Ok(Done::Failed(format!("the plan has no spec of process group {group}")));
    };
    let mut claimed = Change::default();
    if let Some((taken, mount)) = volume.as_ref().zip(plan.mounts.get(group)) {
        let claim = if taken.is_new {
            let encrypted = match volumes::encrypted(ctx, host, mount.encrypted).await {
                Ok(encrypted) => encrypted,
                Err(failure) => return Ok(Done::Failed(format!("volume {}: {failure}", mount.name))),
            };
            Some(volumes::make(&spec, mount, &NewVolume { id: &taken.volume, host, region, encrypted }))
        } else {
            volumes::claim(ctx, &plan.app, &taken.volume).await?
        };
        let Some(claim) = claim else { return Ok(Done::Replan("the volume was taken meanwhile")) };
        claimed = claim;
        spec.mounts = vec![mount.of(taken.volume.clone())];
    }
    let row = MachineRow {
        id: step.machine.clone(),
        name: name.clone(),
        host: host.clone(),
        region: region.clone(),
        address: *address,
        placement: Generation { incarnation: ctx.state.incarnation(), revision: 0 },
        created_at_ms: now_ms(),
        spec,
    };
    let held = ctx.state.get::<AddressRow>(&key::address(*address)).await?;
    if held.as_ref().is_some_and(|held| !held.value.is_free(now_ms())) {
        return Ok(Done::Replan("the address was taken meanwhile"));
    }
    let Some(there) = removal::still_takes(ctx, host).await? else {
        return Ok(Done::Replan("its host was cordoned or removed meanwhile"));
    };
    tell(ctx, plan, Some(&step.machine), format!("creating machine {} ({group}) on host {host}", step.machine)).await?;
    let change = Change::default()
        .absent(key::machine(&step.machine))
        .put(key::machine(&step.machine), &row)
        .if_as_read(key::address(*address), held.as_ref())
        .put(key::address(*address), &AddressRow { machine: step.machine.clone(), freed_at_ms: None })
        .also(claimed)
        .also(there);
    Ok(Done::Passed { floor: None, change })
}

async fn update(
    ctx: &Ctx,
    plan: &Plan,
    step: &Step,
    group: &str,
    version: &MachineVersion,
    deadline_ms: u64,
) -> Result<Done, Failure> {
    if let Some(refusal) = leased(ctx, step).await {
        return Ok(not_yet(plan, step, &refusal, deadline_ms, "updated"));
    }
    let Some(row) = ctx.state.machine(&step.machine).await? else {
        return Ok(Done::Replan("a machine was destroyed meanwhile"));
    };
    let Some(mut spec) = plan.spec(group, version) else {
        return Ok(Done::Failed(format!("the plan has no spec of process group {group}")));
    };
    spec.mounts = plan.mounts(group, &row.value.spec.mounts);
    tell(ctx, plan, Some(&step.machine), format!("updating machine {} to v{}", step.machine, plan.release)).await?;
    if let Some(refusal) = leased(ctx, step).await {
        return Ok(not_yet(plan, step, &refusal, deadline_ms, "updated"));
    }
    let next = MachineRow { spec, ..row.value };
    let change =
        Change::default().unchanged(key::machine(&next.id), row.modified).put(key::machine(&next.id), &next);
    Ok(Done::Passed { floor: None, change })
}

/// What is written to the store is not refused by the host: it is asked before, and once more right before the write.
async fn leased(ctx: &Ctx, step: &Step) -> Option<Refusal> {
    // One that its host does not know yet, or cannot speak of, nobody has leased.
    let lease = hosts::of_machine(ctx, &step.machine).await.ok()?.lease(&step.machine).await.ok().flatten()?;
    Some(Refusal::Leased { machine: step.machine.clone(), owner: lease.owner, expires_at_ms: lease.expires_at_ms })
}

async fn remove(ctx: &Ctx, plan: &Plan, step: &Step, deadline_ms: u64) -> Result<Done, Failure> {
    if let Some(refusal) = leased(ctx, step).await {
        return Ok(not_yet(plan, step, &refusal, deadline_ms, "destroyed"));
    }
    let Some(row) = ctx.state.machine(&step.machine).await? else {
        return Ok(Done::Passed { floor: None, change: Change::default() }); // somebody destroyed it by hand
    };
    let host = &row.value.host;
    let (reason, said) = if ctx.watched.is_dead(host) {
        (TombstoneReason::HostLost, format!("machine {} is given up with host {host}, which is lost", step.machine))
    } else {
        (TombstoneReason::Plan, format!("destroying machine {}", step.machine))
    };
    tell(ctx, plan, Some(&step.machine), said).await?;
    let last = destroyed::last(ctx, &row.value).await;
    if let Some(refusal) = leased(ctx, step).await {
        return Ok(not_yet(plan, step, &refusal, deadline_ms, "destroyed"));
    }
    Ok(Done::Passed { floor: None, change: destroy_machine(&row, reason).also(destroyed::note(&row.value, last)) })
}

/// The change that destroys a machine: a tombstone for its host, and rest for its address.
pub(crate) fn destroy_machine(row: &Row<MachineRow>, reason: TombstoneReason) -> Change {
    let machine = &row.value;
    let now_ms = now_ms();
    let tombstone = TombstoneRow {
        machine: machine.id.clone(),
        host: machine.host.clone(),
        app: machine.spec.app.clone(),
        address: machine.address,
        at_ms: now_ms,
        reason,
    };
    let address = AddressRow { machine: machine.id.clone(), freed_at_ms: Some(now_ms) };
    Change::default()
        .unchanged(key::machine(&machine.id), row.modified)
        .delete(key::machine(&machine.id))
        .delete(key::configs(&machine.id))
        .delete(key::launch(&machine.id))
        .put(key::tombstone(&machine.id), &tombstone)
        .put(key::address(machine.address), &address)
}

async fn start(
    ctx: &Ctx,
    plan: &Plan,
    step: &Step,
    version: &MachineVersion,
    deadline_ms: u64,
) -> Result<Done, Failure> {
    let machine = &step.machine;
    match send(ctx, plan, step, Some(version), CommandKind::Start).await? {
        Ok(sequence) => {
            tell(ctx, plan, Some(machine), format!("starting machine {machine}")).await?;
            Ok(Done::Passed { floor: Some(sequence), change: Change::default() })
        }
        Err(Refusal::IllegalMove { state: MachineState::Starting | MachineState::Started, .. }) => {
            Ok(Done::Passed { floor: None, change: Change::default() })
        }
        Err(refusal) => Ok(not_yet(plan, step, &refusal, deadline_ms, "started")),
    }
}

/// Some refusals pass by themselves: the host has not seen the newest projection, or a person holds a lease.
fn not_yet(plan: &Plan, step: &Step, refusal: &Refusal, deadline_ms: u64, what: &str) -> Done {
    let machine = &step.machine;
    let passes = matches!(
        refusal,
        Refusal::NoSuchMachine(_)
            | Refusal::VersionMismatch { .. }
            | Refusal::IllegalMove { .. }
            | Refusal::OldGeneration { .. }
            | Refusal::TooLate
            | Refusal::Unreachable { .. }
            | Refusal::Leased { .. }
    );
    if !passes {
        return Done::Failed(format!("machine {machine} cannot be {what}: {refusal}"));
    }
    if now_ms() < deadline_ms {
        tracing::debug!(app = %plan.app, %machine, %refusal, what, "the host is not ready");
        return Done::Wait;
    }
    Done::Failed(format!("machine {machine} could not be {what} in time: {refusal}"))
}

/// Sends a plan's command; the outer error is ours, the inner one the host's.
async fn send(
    ctx: &Ctx,
    plan: &Plan,
    step: &Step,
    expected: Option<&MachineVersion>,
    kind: CommandKind,
) -> Result<Result<u64, Refusal>, Failure> {
    let row = ctx.state.machine(&step.machine).await?;
    let Some(id) = step.kind.command() else {
        return Ok(Err(Refusal::Invalid(format!("{} is no command", step.kind.name()))));
    };
    let command = Command {
        id: id.clone(),
        machine: step.machine.clone(),
        deadline_ms: now_ms() + COMMAND_DEADLINE_MS,
        generation: row.map(|row| row.value.placement),
        plan: Some(Generation { incarnation: ctx.state.incarnation(), revision: plan.sequence }),
        expected_version: expected.cloned(),
        nonce: None,
        source: Source::Plan,
        request_id: None,
        kind,
    };
    let sent = match hosts::of_machine(ctx, &step.machine).await {
        Ok(host) => host.command(command).await,
        Err(refusal) => Err(refusal),
    };
    Ok(sent.map(|answer| answer.sequence))
}
