//! What is to be done for an app: the plan that is under way, or the one that is still to be made.

use super::make::{desired, observe};
use crate::failure::Failure;
use crate::rows::{Row, key};
use crate::{Ctx, now_ms, spec};
use dunlin_model::HostId;
use dunlin_model::desired::{AppRow, HostRow, MachineRow, ReleaseRow, ReleaseStatus};
use dunlin_planner::{Ended, Move, Observed, Plan, Progress, Purpose, drift, is_replaceable, stays};
use std::collections::BTreeMap;

/// A repair or a move that failed, for lack of room for example, is tried again after this.
const REPAIR_RETRY_MS: u64 = 30_000;

/// After the end of any plan, and after control has started, machines stay where they are for so long: what a person just
/// did settles first, hosts that were away speak, and nobody's machines move all the time.
const REBALANCE_REST_MS: u64 = 600_000;

/// The app's plan, if it is not ended and still wanted.
pub(crate) async fn active(ctx: &Ctx, app: &AppRow) -> Result<Option<(Plan, Row<Progress>)>, Failure> {
    let Some(progress) = ctx.state.get::<Progress>(&key::progress(&app.name)).await? else { return Ok(None) };
    if progress.value.ended.is_some() {
        return Ok(None);
    }
    let plan = ctx.state.get::<Plan>(&key::plan(&app.name)).await?;
    let progress = Row { value: progress.value.resumed(ctx.started_ms), ..progress };
    let current = |plan: &Plan| plan.sequence == progress.value.sequence && plan.release == app.current_release;
    Ok(plan.map(|row| row.value).filter(current).map(|plan| (plan, progress)))
}

/// The release that a plan is still to be made for, and why.
pub(crate) async fn wants_plan(
    ctx: &Ctx,
    app: &AppRow,
    machines: &[Row<MachineRow>],
) -> Result<Option<(ReleaseRow, Purpose)>, Failure> {
    let Some(current) = release(ctx, app, app.current_release).await? else { return Ok(None) };
    if current.status == ReleaseStatus::Running {
        return Ok(Some((current, Purpose::Deploy)));
    }
    let plan = ctx.state.get::<Plan>(&key::plan(&app.name)).await?.map(|row| row.value);
    let progress = ctx.state.get::<Progress>(&key::progress(&app.name)).await?.map(|row| row.value);
    let last = plan.zip(progress).filter(|(plan, progress)| plan.sequence == progress.sequence);
    // A way back that was given up half-way, because the world was not what it was made for: until the release that
    // failed has ended, the way has to be gone to its end. The good release is not `Running`, so nothing else asks.
    if let Some((plan, progress)) = &last
        && let Purpose::Return { failed_release } = plan.purpose
        && plan.release == app.current_release
        && progress.ended == Some(Ended::Superseded)
    {
        let failed = release(ctx, app, failed_release).await?;
        if failed.is_some_and(|failed| failed.status == ReleaseStatus::Running) {
            return Ok(Some((current, plan.purpose)));
        }
    }
    let is_resting = last.as_ref().is_some_and(|(plan, progress)| {
        let retry_at_ms = progress.since_ms.saturating_add(REPAIR_RETRY_MS);
        let failed = matches!(progress.ended, Some(Ended::Failed { .. }));
        plan.purpose == Purpose::Repair && failed && now_ms() < retry_at_ms
    });
    if current.status != ReleaseStatus::Succeeded || is_resting {
        return Ok(None);
    }
    // A move that was given up half-way leaves a machine too many, and so does a lost host that came back meanwhile.
    let moved_half = last.as_ref().is_some_and(|(plan, progress)| {
        let moves = matches!(plan.purpose, Purpose::Rebalance | Purpose::Repair);
        moves && progress.ended.as_ref().is_some_and(|ended| *ended != Ended::Done)
    });
    let is_short = !lacking(app, &current, machines).is_empty() || has_lost(ctx, app, machines);
    if is_short || (moved_half && has_too_many(app, &current, machines)) {
        return Ok(Some((current, Purpose::Repair)));
    }
    let failed_lately = last.as_ref().is_some_and(|(plan, progress)| {
        let failed = matches!(progress.ended, Some(Ended::Failed { .. }));
        plan.purpose == Purpose::Rebalance && failed && now_ms() < progress.since_ms.saturating_add(REPAIR_RETRY_MS)
    });
    // An operator waits for it: neither the rest nor what was found a moment ago keeps it from going on.
    if !failed_lately && is_moved_off(ctx, app, &current, machines).await? {
        return Ok(Some((current, Purpose::Rebalance)));
    }
    let ended_at_ms = last.map_or(0, |(_, progress)| progress.since_ms).max(ctx.started_ms);
    let drifts = now_ms() >= ended_at_ms.saturating_add(REBALANCE_REST_MS) && has_drifted(ctx, app, &current).await?;
    Ok(drifts.then_some((current, Purpose::Rebalance)))
}

/// Whether some machines of the app should move apart. Not looked at for every signal: it takes the whole fleet.
async fn has_drifted(ctx: &Ctx, app: &AppRow, release: &ReleaseRow) -> Result<bool, Failure> {
    if let Some(known) = ctx.room.drift(&app.name, now_ms()) {
        return Ok(known);
    }
    let is_fleet = ctx.state.keys("hosts/").await?.len() > 1;
    let found = is_fleet && !drift_now(ctx, app, release).await?.is_empty();
    ctx.room.looked_for_drift(&app.name, found, now_ms());
    Ok(found)
}

async fn drift_now(ctx: &Ctx, app: &AppRow, release: &ReleaseRow) -> Result<Vec<Move>, Failure> {
    let desired = desired(ctx, app, release, Purpose::Rebalance).await?;
    let observed = Observed { refused: ctx.room.refused(&app.name, release.number, now_ms()), ..observe(ctx, &app.name).await? };
    let moves = drift(&desired, &observed);
    for moved in &moves {
        tracing::debug!(app = %app.name, machine = %moved.machine, from = %moved.from, to = %moved.to, why = %moved.why, "spread has drifted");
    }
    Ok(moves)
}

/// Whether a machine of the app moves now off a host that is drained.
async fn is_moved_off(ctx: &Ctx, app: &AppRow, release: &ReleaseRow, machines: &[Row<MachineRow>]) -> Result<bool, Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let drained: Vec<HostId> = hosts.into_iter().filter(|row| row.value.draining).map(|row| row.value.id).collect();
    let may_move = |row: &Row<MachineRow>| {
        row.value.spec.app == app.name && drained.contains(&row.value.host) && stays(&row.value.spec).is_none()
    };
    let is_in_question = !drained.is_empty() && machines.iter().any(may_move);
    Ok(is_in_question && drift_now(ctx, app, release).await?.iter().any(|moved| drained.contains(&moved.from)))
}

/// Machines of a dead host that another host can run.
fn has_lost(ctx: &Ctx, app: &AppRow, machines: &[Row<MachineRow>]) -> bool {
    let dead = ctx.watched.dead();
    let is_lost = |row: &MachineRow| dead.contains(&row.host) && row.spec.release != 0 && is_replaceable(&row.spec);
    !dead.is_empty() && machines.iter().any(|row| row.value.spec.app == app.name && is_lost(&row.value))
}

fn has_too_many(app: &AppRow, release: &ReleaseRow, machines: &[Row<MachineRow>]) -> bool {
    let wanted = spec::counts(&release.config, &app.scale);
    let count = |group: &str| count(app, group, machines);
    wanted.into_iter().any(|(group, wanted)| count(&group) > wanted as usize)
}

/// Of those that releases made.
fn count(app: &AppRow, group: &str, machines: &[Row<MachineRow>]) -> usize {
    let of_app = |row: &&Row<MachineRow>| row.value.spec.app == app.name && row.value.spec.release != 0;
    machines.iter().filter(of_app).filter(|row| row.value.spec.process_group == group).count()
}

/// The process groups that have fewer machines than they should.
///
/// How many there should be is what `scale` says and nothing else. A machine that a person destroys therefore comes
/// back: reconcilers compare existence and count, an app does not end because its only machine was destroyed to be rid
/// of its state, and to want fewer machines is said with `scale count`. The answer to the destroy says so.
pub(crate) fn lacking(app: &AppRow, release: &ReleaseRow, machines: &[Row<MachineRow>]) -> BTreeMap<String, u32> {
    let wanted = spec::counts(&release.config, &app.scale);
    wanted.into_iter().filter(|(group, wanted)| count(app, group, machines) < *wanted as usize).collect()
}

async fn release(ctx: &Ctx, app: &AppRow, number: u32) -> Result<Option<ReleaseRow>, Failure> {
    Ok(ctx.state.get::<ReleaseRow>(&key::release(&app.name, number)).await?.map(|row| row.value))
}
