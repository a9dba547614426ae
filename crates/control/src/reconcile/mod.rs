//! Reconcilers: from desired and observed to a saved plan, and step by step to its end.
//!
//! One task an app that has work. It keeps nothing: every turn reads the store and the view, does at
//! most one thing, and writes down what it did, so that a new process goes on where the last one
//! stopped. It fires on a signal and on a timer.

mod act;
mod confirm;
mod destroy;
mod explain;
mod finish;
mod make;
mod room;
mod story;
mod want;

pub(crate) use act::destroy_machine;
pub(crate) use confirm::look_at_claim;
pub(crate) use room::Room;
pub(crate) use story::{history, note, region_note, summary};
pub(crate) use want::lacking;

use crate::failure::Failure;
use crate::rows::{Change, Outcome, Row, key};
use crate::{Ctx, now_ms};
use dunlin_api::ErrorCode;
use dunlin_model::AppName;
use dunlin_model::desired::AppRow;
use dunlin_planner::{Mark, Next, Plan, Progress, Purpose, advance};
use dunlin_view::Freshness;
use explain::Heard;
pub(crate) use make::{addresses_in_use, foresee, observe};
use make::{make, save};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use story::{events_of, tell};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use want::{active, wants_plan};

/// Without a signal, work is looked for this often.
const TICK: Duration = Duration::from_secs(5);
/// After an error of ours (store, view), before the next try.
const RETRY: Duration = Duration::from_secs(1);
/// A wait never lasts longer: somebody may have written to the store.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// Progress of a gate is told to those who follow at most this often.
const TELL_EVERY_MS: u64 = 2_000;

/// A process that has just started knows other hosts from its disk, with what they last said. They may have said more since, and
/// unknown counts as started, so they are waited for; hosts that are gone are not waited for longer.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// Runs until `stop`; then waits for the turns that are under way.
pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => return,
        () = all_have_told(&ctx) => {}
        () = tokio::time::sleep(TOLD_WITHIN) => {}
    }
    let mut busy = BTreeSet::new();
    let mut tasks = JoinSet::new();
    loop {
        match apps_with_work(&ctx).await {
            Ok(apps) => {
                for app in apps {
                    if busy.insert(app.clone()) {
                        let (ctx, stop) = (Arc::clone(&ctx), stop.clone());
                        tasks.spawn(async move {
                            reconcile_app(&ctx, &app, &stop).await;
                            app
                        });
                    }
                }
            }
            Err(failure) => tracing::error!(%failure, "desired state could not be read"),
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = ctx.work.notified() => {}
            () = tokio::time::sleep(TICK) => {}
            Some(ended) = tasks.join_next(), if !tasks.is_empty() => match ended {
                Ok(app) => {
                    busy.remove(&app);
                }
                Err(error) => {
                    // Which app it was is unknown: all are looked at again.
                    tracing::error!(%error, "a reconciler ended abnormally");
                    tasks.abort_all();
                    while tasks.join_next().await.is_some() {}
                    busy.clear();
                }
            },
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn all_have_told(ctx: &Ctx) {
    let mut changes = ctx.view.subscribe();
    let mut view = changes.current();
    while !view.hosts.keys().all(|host| view.told.contains(host) && view.freshness(host) == Freshness::Fresh) {
        view = changes.changed().await;
    }
}

async fn apps_with_work(ctx: &Ctx) -> Result<Vec<AppName>, Failure> {
    let mut with_work = Vec::new();
    let machines = ctx.state.machines().await?;
    for app in ctx.state.list::<AppRow>("apps/").await? {
        let app = app.value;
        if app.destroying || active(ctx, &app).await?.is_some() || wants_plan(ctx, &app, &machines).await?.is_some() {
            with_work.push(app.name);
        }
    }
    Ok(with_work)
}

enum Turn {
    Again,
    /// Until a fact or a row changes, or until then.
    Wait { until_ms: u64 },
    Settled,
}

/// What one task remembers between turns; losing it loses nothing.
#[derive(Default)]
pub(crate) struct Memory {
    told: (String, u64),
    deafness: explain::Deafness,
}

async fn reconcile_app(ctx: &Ctx, app: &AppName, stop: &CancellationToken) {
    let mut view = ctx.view.subscribe();
    let mut memory = Memory::default();
    while !stop.is_cancelled() {
        let turned = match turn(ctx, app, &mut memory).await {
            Err(failure) if failure.code == ErrorCode::Invalid => {
                tracing::error!(%app, %failure, "the store refuses a step of the reconciler; its release has failed");
                finish::refused(ctx, app, &failure).await
            }
            turned => turned,
        };
        let pause = match turned {
            Ok(Turn::Again) => continue,
            Ok(Turn::Settled) => return,
            Ok(Turn::Wait { until_ms }) => {
                Duration::from_millis(until_ms.saturating_sub(now_ms()).max(1)).min(LONGEST_WAIT)
            }
            Err(failure) => {
                tracing::error!(%app, %failure, "a step of the reconciler failed; it is tried again");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = view.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Reads, decides, does at most one thing.
async fn turn(ctx: &Ctx, name: &AppName, memory: &mut Memory) -> Result<Turn, Failure> {
    let Some(app) = ctx.state.get::<AppRow>(&key::app(name)).await? else { return Ok(Turn::Settled) };
    if app.value.destroying {
        return destroy::turn(ctx, &app).await;
    }
    if let Some((plan, progress)) = active(ctx, &app.value).await? {
        return step(ctx, &app, &plan, &progress, memory).await;
    }
    let machines = ctx.state.machines().await?;
    let Some((release, purpose)) = wants_plan(ctx, &app.value, &machines).await? else { return Ok(Turn::Settled) };
    let made = make(ctx, &app.value, &release, purpose).await?;
    if let Some(until_ms) = made.doubtful_until_ms {
        return Ok(Turn::Wait { until_ms });
    }
    if let Some((hosts, guest)) = &made.to_confirm
        && confirm::someone_has_room(ctx, name, hosts, guest).await
    {
        return Ok(Turn::Again);
    }
    if let Some(reason) = made.impossible {
        let before = ctx.state.get::<Progress>(&key::progress(name)).await?;
        return finish::failed(ctx, &app, &made.plan, before.as_ref(), finish::Failed { hint: made.hint, ..finish::Failed::plain(reason) }).await;
    }
    if purpose == Purpose::Rebalance && made.plan.steps.is_empty() {
        return Ok(Turn::Settled); // somebody made or lost room in this moment
    }
    if let Some(note) = region_note(ctx, &release).await? {
        tell(ctx, &made.plan, None, note).await?;
    }
    tell(ctx, &made.plan, None, summary(&made.plan)).await?;
    ctx.kill.pass("plan", "before");
    let change = save(ctx, &made).await?.unchanged(key::app(name), app.modified);
    if ctx.state.commit(change).await? == Outcome::Committed {
        ctx.kill.pass("plan", "after");
        let (plan, steps) = (made.plan.sequence, made.plan.steps.len());
        tracing::info!(app = %name, release = release.number, plan, steps, "plan saved");
    }
    Ok(Turn::Again)
}

/// One turn of the active plan.
async fn step(
    ctx: &Ctx,
    app: &Row<AppRow>,
    plan: &Plan,
    progress: &Row<Progress>,
    memory: &mut Memory,
) -> Result<Turn, Failure> {
    let observed = observe(ctx, &app.value.name).await?;
    match advance(plan, &progress.value, &observed, now_ms()) {
        Next::Act { index, step } => act::act(ctx, plan, progress, index, step).await,
        Next::Mark(mark) => {
            let gate = plan.steps.get(progress.value.next).filter(|step| step.kind.name() == "gate");
            let ended = gate.filter(|_| matches!(mark, Mark::Passed { .. } | Mark::Proven { .. }));
            if let Some(step) = ended {
                ctx.kill.pass("gate", "before");
                if matches!(mark, Mark::Proven { .. }) {
                    tell(ctx, plan, Some(&step.machine), format!("machine {} is healthy", step.machine)).await?;
                }
            }
            record(ctx, plan, progress, &mark, Change::default()).await?;
            if ended.is_some() {
                ctx.kill.pass("gate", "after");
            }
            Ok(Turn::Again)
        }
        Next::Wait { until_ms, why } => {
            // `None`: it waits at the end, for a machine that was healthy before.
            let current = plan.steps.get(progress.value.next);
            if let Some(current) = current {
                match memory.deafness.look(ctx, plan, current, &observed).await {
                    Heard::Nothing => {}
                    Heard::Tell(said) => tell(ctx, plan, Some(&current.machine), said).await?,
                    Heard::Deaf(failed) => return finish::failed(ctx, app, plan, Some(progress), failed).await,
                }
            }
            if memory.told.0 != why && now_ms() >= memory.told.1.saturating_add(TELL_EVERY_MS) {
                if !memory.told.0.is_empty() {
                    tell(ctx, plan, current.map(|step| &step.machine), why.clone()).await?;
                }
                memory.told = (why, now_ms());
            }
            Ok(Turn::Wait { until_ms })
        }
        Next::Replan { why } => act::replan(ctx, plan, progress, &why).await,
        Next::Done => finish::done(ctx, app, plan, progress).await,
        Next::Failed { machine, reason, details } => {
            let failed = finish::Failed { machine, reason, details, hint: None };
            finish::failed(ctx, app, plan, Some(progress), failed).await
        }
    }
}

/// Writes a mark, together with `change`, unless somebody took the plan over.
pub(crate) async fn record(
    ctx: &Ctx,
    plan: &Plan,
    progress: &Row<Progress>,
    mark: &Mark,
    change: Change,
) -> Result<Outcome, Failure> {
    let next = progress.value.record(plan, mark, now_ms());
    let change = change
        .unchanged(key::progress(&plan.app), progress.modified)
        .put(key::progress(&plan.app), &next)
        .also(events_of(ctx, plan).await?);
    ctx.state.commit(change).await
}
