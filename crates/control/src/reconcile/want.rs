//! What is to be done for an app: the plan that is under way, or the one that is still to be made.

use super::make::{desired, observe};
use crate::failure::Failure;
use crate::rows::{Row, key};
use crate::{Ctx, now_ms, spec};
use dunlin_model::HostId;
use dunlin_model::desired::{AppRow, HostRow, MachineRow, ReleaseRow, ReleaseStatus};
use dunlin_planner::{Desired, Move, Observed, Plan, Progress, Purpose, Standing, drift, is_replaceable, stays};
use std::collections::{BTreeMap, BTreeSet};

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
    let (wanted, rows, dead) = (spec::counts(&current.config, &app.scale), made_by_releases(app, machines), ctx.watched.dead());
    let last = last.as_ref().map(|(plan, progress)| (plan, progress));
    let standing = Standing { status: current.status, wanted: &wanted, machines: &rows, last, dead: &dead };
    if let Some((failed, purpose)) = standing.broken_return(app.current_release) {
        let failed = release(ctx, app, failed).await?;
        if failed.is_some_and(|failed| failed.status == ReleaseStatus::Running) {
            return Ok(Some((current, purpose)));
        }
    }
    if let Some(purpose) = standing.purpose(now_ms()) {
        return Ok(Some((current, purpose)));
    }
    if current.status != ReleaseStatus::Succeeded || standing.has_failed_lately(Purpose::Repair, now_ms()) {
        return Ok(None);
    }
    let failed_lately = standing.has_failed_lately(Purpose::Rebalance, now_ms());
    // An operator waits for it: neither the rest nor what was found a moment ago keeps it from going on.
    if !failed_lately && is_moved_off(ctx, app, &current, machines).await? {
        return Ok(Some((current, Purpose::Rebalance)));
    }
    // After any plan, and after control has started: what a person just did settles first, hosts that were away speak, and
    // nobody's machines move all the time.
    let ended_at_ms = last.map_or(0, |(_, progress)| progress.since_ms).max(ctx.started_ms);
    let drifts = now_ms() >= ended_at_ms.saturating_add(ctx.rebalance_after_ms) && has_drifted(ctx, app, &current).await?;
    Ok(drifts.then_some((current, Purpose::Rebalance)))
}

/// Whether some machines of the app should move apart. Not looked at for every signal: it takes the whole fleet.
async fn has_drifted(ctx: &Ctx, app: &AppRow, release: &ReleaseRow) -> Result<bool, Failure> {
    if let Some(known) = ctx.room.drift(&app.name, now_ms()) {
        return Ok(known);
    }
    let is_fleet = ctx.state.keys("hosts/").await?.len() > 1;
    let (mut found, mut crowded) = (false, None);
    if is_fleet {
        let desired = desired(ctx, app, release, Purpose::Rebalance).await?;
        found = !drift_now(ctx, app, release, &desired).await?.is_empty();
        crowded = if found { None } else { all_on_one_host(&desired) };
    }
    if ctx.room.looked_for_drift(&app.name, found, crowded.is_some(), now_ms(), ctx.rebalance_after_ms)
        && let Some((group, host, count)) = crowded
    {
        tracing::warn!(
            app = %app.name, group, %host, machines = count,
            "all machines of the group are on one host, and no other that it may use has room: they are lost together; add a host, or name more regions"
        );
    }
    Ok(found)
}

/// A group whose machines would all be lost with one host.
fn all_on_one_host(desired: &Desired) -> Option<(String, HostId, usize)> {
    let movable = desired.groups.iter().filter(|(_, group)| group.mount.is_none() && is_replaceable(&group.spec));
    movable.map(|(name, _)| name).find_map(|name| {
        let mut hosts = desired.machines.iter().filter(|row| row.spec.process_group == *name).map(|row| &row.host);
        let first = hosts.next()?;
        let rest = hosts.clone().count();
        (rest > 0 && hosts.all(|host| host == first)).then(|| (name.clone(), first.clone(), rest + 1))
    })
}

async fn drift_now(ctx: &Ctx, app: &AppRow, release: &ReleaseRow, desired: &Desired) -> Result<Vec<Move>, Failure> {
    let observed = Observed { refused: ctx.room.refused(&app.name, release.number, now_ms()), ..observe(ctx, &app.name).await? };
    let moves = drift(desired, &observed);
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
    if !is_in_question {
        return Ok(false);
    }
    let desired = desired(ctx, app, release, Purpose::Rebalance).await?;
    Ok(drift_now(ctx, app, release, &desired).await?.iter().any(|moved| drained.contains(&moved.from)))
}

fn made_by_releases<'r>(app: &AppRow, machines: &'r [Row<MachineRow>]) -> Vec<&'r MachineRow> {
    let rows = machines.iter().map(|row| &row.value);
    rows.filter(|row| row.spec.app == app.name && row.spec.release != 0).collect()
}

/// As [`Standing::lacking`], for an app whatever it does.
pub(crate) fn lacking(app: &AppRow, release: &ReleaseRow, machines: &[Row<MachineRow>]) -> BTreeMap<String, u32> {
    let (wanted, rows, dead) = (spec::counts(&release.config, &app.scale), made_by_releases(app, machines), BTreeSet::new());
    Standing { status: release.status, wanted: &wanted, machines: &rows, last: None, dead: &dead }.lacking()
}

async fn release(ctx: &Ctx, app: &AppRow, number: u32) -> Result<Option<ReleaseRow>, Failure> {
    Ok(ctx.state.get::<ReleaseRow>(&key::release(&app.name, number)).await?.map(|row| row.value))
}
