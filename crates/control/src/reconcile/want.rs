//! What is to be done for an app: the plan that is under way, or the one that is still to be made.

use crate::failure::Failure;
use crate::rows::{Row, key};
use crate::{Ctx, now_ms, spec};
use dunlin_model::desired::{AppRow, MachineRow, ReleaseRow, ReleaseStatus};
use dunlin_planner::{Ended, Plan, Progress, Purpose};
use std::collections::BTreeMap;

/// A repair that failed, for lack of room for example, is tried again after this.
const REPAIR_RETRY_MS: u64 = 30_000;

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
    let is_resting = last.is_some_and(|(plan, progress)| {
        let retry_at_ms = progress.since_ms.saturating_add(REPAIR_RETRY_MS);
        let failed = matches!(progress.ended, Some(Ended::Failed { .. }));
        plan.purpose == Purpose::Repair && failed && now_ms() < retry_at_ms
    });
    let lacks = current.status == ReleaseStatus::Succeeded && !is_resting && !lacking(app, &current, machines).is_empty();
    Ok(lacks.then_some((current, Purpose::Repair)))
}

/// The process groups that have fewer machines than they should.
///
/// How many there should be is what `scale` says and nothing else. A machine that a person destroys therefore comes
/// back: reconcilers compare existence and count, an app does not end because its only machine was destroyed to be rid
/// of its state, and to want fewer machines is said with `scale count`. The answer to the destroy says so.
pub(crate) fn lacking(app: &AppRow, release: &ReleaseRow, machines: &[Row<MachineRow>]) -> BTreeMap<String, u32> {
    let of_app = |row: &&Row<MachineRow>| row.value.spec.app == app.name && row.value.spec.release != 0;
    let count = |group: &str| machines.iter().filter(of_app).filter(|row| row.value.spec.process_group == group).count();
    let wanted = spec::counts(&release.config, &app.scale);
    wanted.into_iter().filter(|(group, wanted)| count(group) < *wanted as usize).collect()
}

async fn release(ctx: &Ctx, app: &AppRow, number: u32) -> Result<Option<ReleaseRow>, Failure> {
    Ok(ctx.state.get::<ReleaseRow>(&key::release(&app.name, number)).await?.map(|row| row.value))
}
