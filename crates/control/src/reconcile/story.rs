//! What those who follow a release are told.

use crate::failure::Failure;
use crate::rows::{Change, key};
use crate::{Ctx, now_ms};
use dunlin_api::wire::DeployEvent;
use dunlin_model::desired::{HostRow, ReleaseRow};
use dunlin_model::{AppName, MachineId};
use dunlin_planner::{Plan, Purpose};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The release that people follow while this plan runs.
pub(crate) fn followed(plan: &Plan) -> u32 {
    match plan.purpose {
        Purpose::Deploy | Purpose::Repair | Purpose::Rebalance => plan.release,
        Purpose::Return { failed_release } => failed_release,
    }
}

/// The events so far, to be written with the next change.
pub(crate) async fn events_of(ctx: &Ctx, plan: &Plan) -> Result<Change, Failure> {
    let release = followed(plan);
    let history = history(ctx, &plan.app, release).await?.borrow().clone();
    Ok(Change::default().put(key::events(&plan.app, release), &*history))
}

pub(crate) async fn history(
    ctx: &Ctx,
    app: &AppName,
    release: u32,
) -> Result<tokio::sync::watch::Receiver<Arc<Vec<DeployEvent>>>, Failure> {
    let stored = ctx.state.get::<Vec<DeployEvent>>(&key::events(app, release)).await?;
    Ok(ctx.events.follow(app, release, || stored.map(|row| row.value).unwrap_or_default()))
}

/// One line for those who follow a plan; written to the store with the next change.
pub(crate) async fn tell(
    ctx: &Ctx,
    plan: &Plan,
    machine: Option<&MachineId>,
    message: String,
) -> Result<(), Failure> {
    say(ctx, &plan.app, followed(plan), machine, message).await
}

/// One line for those who follow a release.
pub(crate) async fn note(ctx: &Ctx, app: &AppName, release: u32, message: String) -> Result<(), Failure> {
    say(ctx, app, release, None, message).await
}

async fn say(
    ctx: &Ctx,
    app: &AppName,
    release: u32,
    machine: Option<&MachineId>,
    message: String,
) -> Result<(), Failure> {
    let event = DeployEvent {
        at_ms: now_ms(),
        release,
        message,
        machine: machine.cloned(),
        ended: None,
        details: vec![],
        hint: None,
    };
    history(ctx, app, release).await?;
    ctx.events.push(event, app, Vec::new);
    Ok(())
}

/// A file that comes from Fly names one of Fly's regions. The app runs all the same, where there are hosts; but nobody
/// shall believe that it runs in that region. Where several are named, nothing new goes anywhere else.
pub(crate) async fn region_note(ctx: &Ctx, release: &ReleaseRow) -> Result<Option<String>, Failure> {
    let Some(primary) = &release.config.primary_region else { return Ok(None) };
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    if hosts.iter().any(|row| primary.regions().rank(&row.value.region).is_some()) {
        return Ok(None);
    }
    let there: BTreeSet<_> = hosts.iter().map(|row| row.value.region.as_str()).collect();
    let there = there.into_iter().collect::<Vec<_>>().join(", ");
    let what = match primary.order() {
        None => format!("machines run in {there}"),
        Some(_) => format!("machines that run stay in {there}, and new ones have no place"),
    };
    let told = primary.named().unwrap_or_default();
    Ok(Some(format!("no host is in primary_region {primary}: {what}; PRIMARY_REGION says {told}")))
}

pub(crate) fn summary(plan: &Plan) -> String {
    let count = |name: &str| plan.steps.iter().filter(|step| step.kind.name() == name).count();
    let parts = [(count("assign"), "to create"), (count("update"), "to update"), (count("destroy"), "to remove")];
    let parts: Vec<_> = parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    if plan.purpose == Purpose::Rebalance {
        return format!("machines of release v{} move apart: {}", plan.release, parts.join(", "));
    }
    if parts.is_empty() && plan.steps.is_empty() {
        return format!("release v{} changes nothing: its machines are as it wants them", plan.release);
    }
    if parts.is_empty() {
        return format!("release v{}: machines are started and checked", plan.release);
    }
    format!("release v{}: machines {}", plan.release, parts.join(", "))
}
