//! The end of a plan: the release succeeded, or the last good one comes back.

use super::make::{desired, make, save};
use super::story::{followed, history, summary, tell};
use super::want::{active, wants_plan};
use super::{Turn, explain};
use crate::events::{bounded, cut};
use crate::failure::Failure;
use crate::rows::{Change, Outcome, Row, key};
use crate::{Ctx, now_ms};
use dunlin_api::ErrorCode;
use dunlin_api::wire::DeployEvent;
use dunlin_model::config::Strategy;
use dunlin_model::desired::{AppRow, ReleaseRow, ReleaseStatus};
use dunlin_model::{AppName, MachineId};
use dunlin_planner::{Ended, Plan, Progress, Purpose, Tested};

const MAX_REASON_BYTES: usize = 1024;

/// Why a plan failed, for people.
#[derive(Debug, Clone, Default)]
pub(crate) struct Failed {
    pub machine: Option<MachineId>,
    pub reason: String,
    pub details: Vec<String>,
    pub hint: Option<String>,
}

impl Failed {
    pub fn plain(reason: String) -> Self {
        Self { reason, ..Self::default() }
    }
}

/// Every step is complete.
pub(crate) async fn done(
    ctx: &Ctx,
    app: &Row<AppRow>,
    plan: &Plan,
    progress: &Row<Progress>,
) -> Result<Turn, Failure> {
    let ended = Progress { ended: Some(Ended::Done), ..progress.value.clone() };
    let base = Change::default()
        .unchanged(key::progress(&plan.app), progress.modified)
        .unchanged(key::app(&plan.app), app.modified)
        .put(key::progress(&plan.app), &ended);
    let (status, event, next_app) = match plan.purpose {
        Purpose::Repair | Purpose::Rebalance => {
            ctx.kill.pass("done", "before");
            if ctx.state.commit(base).await? == Outcome::Committed {
                let what = if plan.purpose == Purpose::Repair { "machines that were gone are there again" } else { "machines moved apart" };
                tracing::info!(app = %plan.app, release = plan.release, plan = plan.sequence, "{what}");
            }
            ctx.kill.pass("done", "after");
            return Ok(Turn::Again);
        }
        Purpose::Deploy => {
            let machines = count_machines(ctx, plan).await?;
            // One that was seen healthy nowhere is live, and not known to be good: nothing returns to it.
            let is_proven = match plan.tests() {
                Tested::Healthy => true,
                Tested::Unchanged => plan.from_release != 0 && plan.from_release == app.value.last_good_release,
                Tested::Unseen => false,
            };
            let untested = match plan.tests() {
                _ if is_proven || plan.strategy == Strategy::Immediate => "",
                Tested::Unchanged => ", not tested",
                Tested::Healthy | Tested::Unseen => ", asleep, not tested",
            };
            let message = format!("release v{} is live on {machines}{untested}", plan.release);
            let last_good_release = if is_proven { plan.release } else { app.value.last_good_release };
            let next = AppRow { last_good_release, ..app.value.clone() };
            (ReleaseStatus::Succeeded, closing(plan, ReleaseStatus::Succeeded, message), next)
        }
        Purpose::Return { failed_release } => {
            let why = failure_told(ctx, plan).await?;
            let message = format!("release v{failed_release} failed, v{} runs again: {}", plan.release, why.message);
            let event = DeployEvent {
                details: why.details,
                hint: why.hint,
                machine: why.machine,
                ..closing(plan, ReleaseStatus::RolledBack, message)
            };
            (ReleaseStatus::RolledBack, event, app.value.clone())
        }
    };
    ctx.kill.pass("done", "before");
    let change = base.put(key::app(&plan.app), &next_app).also(end_release(ctx, plan, status, None).await?);
    end(ctx, plan, event, change).await?;
    ctx.kill.pass("done", "after");
    Ok(Turn::Again)
}

/// A step failed for good.
pub(crate) async fn failed(
    ctx: &Ctx,
    app: &Row<AppRow>,
    plan: &Plan,
    progress: Option<&Row<Progress>>,
    failed: Failed,
) -> Result<Turn, Failure> {
    if matches!(plan.purpose, Purpose::Repair | Purpose::Rebalance) {
        return repair_failed(ctx, app, plan, progress, failed).await;
    }
    let explained = explain::explain(ctx, plan, failed).await;
    tracing::warn!(app = %plan.app, plan = plan.sequence, release = plan.release, reason = %explained.reason, "plan failed");
    let base = Change::default()
        .if_as_read(key::progress(&plan.app), progress)
        .unchanged(key::app(&plan.app), app.modified);
    match plan.purpose {
        Purpose::Deploy if app.value.last_good_release != 0 => go_back(ctx, app, plan, base, explained).await,
        Purpose::Deploy | Purpose::Repair | Purpose::Rebalance => {
            let message = format!("release v{} failed: {}", plan.release, explained.reason);
            give_up(ctx, plan, progress, base, message, explained).await
        }
        Purpose::Return { failed_release } => {
            let why = failure_told(ctx, plan).await?;
            let message = format!(
                "release v{failed_release} failed ({}), and so did the return to v{}: {}",
                why.message, plan.release, explained.reason
            );
            give_up(ctx, plan, progress, base, message, explained).await
        }
    }
}

/// The store takes a change for invalid, which it will do every time: the plan is too large, for example. What it was
/// for has failed then.
pub(crate) async fn refused(ctx: &Ctx, name: &AppName, failure: &Failure) -> Result<Turn, Failure> {
    let Some(app) = ctx.state.get::<AppRow>(&key::app(name)).await? else { return Ok(Turn::Settled) };
    let (plan, progress) = match active(ctx, &app.value).await? {
        Some((plan, progress)) => (plan, Some(progress)),
        None => {
            let machines = ctx.state.machines().await?;
            let wanted = wants_plan(ctx, &app.value, &machines).await?;
            let Some((release, purpose)) = wanted else { return Ok(Turn::Settled) };
            let progress = ctx.state.get::<Progress>(&key::progress(name)).await?;
            (Plan::empty(&desired(ctx, &app.value, &release, purpose).await?), progress)
        }
    };
    let reason = format!("it cannot be written down: {failure}");
    match failed(ctx, &app, &plan, progress.as_ref(), Failed::plain(reason.clone())).await {
        Err(again) if again.code == ErrorCode::Invalid => {}
        other => return other,
    }
    // Without its story, which may be what is too large.
    let last = ended_badly(&plan, progress.as_ref(), None, reason.clone());
    let change = Change::default()
        .if_as_read(key::progress(name), progress.as_ref())
        .unchanged(key::app(name), app.modified)
        .put(key::progress(name), &last)
        .also(end_release(ctx, &plan, ReleaseStatus::Failed, Some(reason)).await?);
    ctx.state.commit(change).await?;
    Ok(Turn::Again)
}

/// The release stays what it was; there is nobody to tell but the log, and another try later.
async fn repair_failed(
    ctx: &Ctx,
    app: &Row<AppRow>,
    plan: &Plan,
    progress: Option<&Row<Progress>>,
    failed: Failed,
) -> Result<Turn, Failure> {
    let what = if plan.purpose == Purpose::Repair { "machines are missing and could not be replaced" } else { "machines could not move apart" };
    tracing::warn!(app = %plan.app, plan = plan.sequence, release = plan.release, reason = %failed.reason, "{what}");
    let change = Change::default()
        .if_as_read(key::progress(&plan.app), progress)
        .unchanged(key::app(&plan.app), app.modified)
        .put(key::plan(&plan.app), plan)
        .put(key::progress(&plan.app), &ended_badly(plan, progress, failed.machine, failed.reason));
    ctx.state.commit(change).await?;
    Ok(Turn::Again)
}

fn ended_badly(
    plan: &Plan,
    progress: Option<&Row<Progress>>,
    machine: Option<MachineId>,
    reason: String,
) -> Progress {
    let ended = Some(Ended::Failed { machine, reason, details: vec![] });
    match progress {
        Some(row) if row.value.sequence == plan.sequence => Progress { ended, ..row.value.clone() },
        _ => Progress { ended, ..Progress::new(plan, now_ms()) },
    }
}

/// The last good release becomes the current one, with a plan of its own, in one transaction.
async fn go_back(
    ctx: &Ctx,
    app: &Row<AppRow>,
    plan: &Plan,
    base: Change,
    failed: Failed,
) -> Result<Turn, Failure> {
    let good = app.value.last_good_release;
    let Some(release) = ctx.state.get::<ReleaseRow>(&key::release(&plan.app, good)).await? else {
        let message = format!("release v{} failed, and v{good} is not known any more: {}", plan.release, failed.reason);
        return give_up(ctx, plan, None, base, message, failed).await;
    };
    let back = AppRow { current_release: good, scale: release.value.scale.clone(), ..app.value.clone() };
    let purpose = Purpose::Return { failed_release: plan.release };
    let made = make(ctx, &back, &release.value, purpose).await?;
    if let Some(until_ms) = made.doubtful_until_ms {
        return Ok(Turn::Wait { until_ms });
    }
    let told = DeployEvent {
        at_ms: now_ms(),
        release: plan.release,
        message: failed.reason.clone(),
        machine: failed.machine.clone(),
        ended: None,
        details: failed.details.clone(),
        hint: failed.hint.clone(),
    };
    history(ctx, &plan.app, plan.release).await?;
    ctx.events.push(told, &plan.app, Vec::new);
    if let Some(impossible) = made.impossible {
        let message = format!("release v{} failed ({}), and there is no way back to v{good}: {impossible}", plan.release, failed.reason);
        return give_up(ctx, plan, None, base, message, failed).await;
    }
    tell(ctx, &made.plan, None, format!("returning to {}", summary(&made.plan))).await?;
    let reason: String = failed.reason.chars().take(MAX_REASON_BYTES).collect();
    let change = base
        .also(save(ctx, &made).await?)
        .put(key::app(&plan.app), &back)
        .also(with_reason(ctx, plan.release, plan, ReleaseStatus::Running, Some(reason)).await?);
    ctx.kill.pass("failed", "before");
    if ctx.state.commit(change).await? == Outcome::Committed {
        ctx.kill.pass("failed", "after");
    }
    Ok(Turn::Again)
}

async fn give_up(
    ctx: &Ctx,
    plan: &Plan,
    progress: Option<&Row<Progress>>,
    base: Change,
    message: String,
    failed: Failed,
) -> Result<Turn, Failure> {
    let last = ended_badly(plan, progress, failed.machine.clone(), failed.reason);
    let event = DeployEvent {
        details: failed.details,
        hint: failed.hint,
        machine: failed.machine,
        ..closing(plan, ReleaseStatus::Failed, message.clone())
    };
    let change = base
        .put(key::plan(&plan.app), plan)
        .put(key::progress(&plan.app), &last)
        .also(end_release(ctx, plan, ReleaseStatus::Failed, Some(message)).await?);
    ctx.kill.pass("failed", "before");
    end(ctx, plan, event, change).await?;
    ctx.kill.pass("failed", "after");
    Ok(Turn::Again)
}

/// Commits, and only then tells the end: those who follow must not hear of what is not durable.
async fn end(ctx: &Ctx, plan: &Plan, event: DeployEvent, change: Change) -> Result<(), Failure> {
    let release = followed(plan);
    let event = bounded(event);
    let mut events = history(ctx, &plan.app, release).await?.borrow().as_ref().clone();
    events.push(event.clone());
    let change = change.put(key::events(&plan.app, release), &events);
    if ctx.state.commit(change).await? == Outcome::Committed {
        tracing::info!(app = %plan.app, release, plan = plan.sequence, "{}", event.message);
        ctx.events.push(event, &plan.app, Vec::new);
    }
    Ok(())
}

async fn end_release(
    ctx: &Ctx,
    plan: &Plan,
    status: ReleaseStatus,
    reason: Option<String>,
) -> Result<Change, Failure> {
    with_reason(ctx, followed(plan), plan, status, reason).await
}

async fn with_reason(
    ctx: &Ctx,
    number: u32,
    plan: &Plan,
    status: ReleaseStatus,
    reason: Option<String>,
) -> Result<Change, Failure> {
    let key = key::release(&plan.app, number);
    let Some(row) = ctx.state.get::<ReleaseRow>(&key).await? else { return Ok(Change::default()) };
    let reason = reason.unwrap_or_else(|| row.value.reason.clone());
    let next = ReleaseRow { status, reason: reason.chars().take(MAX_REASON_BYTES).collect(), ..row.value };
    Ok(Change::default().unchanged(key.clone(), row.modified).put(key, &next))
}

/// What was told when the release failed: the newest event with details, else the newest one.
async fn failure_told(ctx: &Ctx, plan: &Plan) -> Result<DeployEvent, Failure> {
    let release = followed(plan);
    let events = history(ctx, &plan.app, release).await?.borrow().clone();
    let row = ctx.state.get::<ReleaseRow>(&key::release(&plan.app, release)).await?;
    let reason = row.map(|row| row.value.reason).unwrap_or_default();
    // Both may have been cut, each in its way.
    let whole = cut(reason.clone());
    let whole = whole.trim_end_matches('…');
    let told = events.iter().rev().find(|event| event.message.trim_end_matches('…') == whole).cloned();
    Ok(told.unwrap_or_else(|| DeployEvent { ended: None, ..closing(plan, ReleaseStatus::Failed, reason) }))
}

fn closing(plan: &Plan, status: ReleaseStatus, message: String) -> DeployEvent {
    DeployEvent {
        at_ms: now_ms(),
        release: followed(plan),
        message,
        machine: None,
        ended: Some(status),
        details: vec![],
        hint: None,
    }
}

async fn count_machines(ctx: &Ctx, plan: &Plan) -> Result<String, Failure> {
    let rows = ctx.state.machines().await?;
    let machines = rows.iter().filter(|row| row.value.spec.app == plan.app && row.value.spec.release != 0).count();
    Ok(if machines == 1 { "1 machine".into() } else { format!("{machines} machines") })
}
