//! Destroying an app: first its machines, in several transactions, then the app. The mark in the app's
//! row makes it durable work, so that a crash half way leaves nothing half there.

use super::Turn;
use super::act::destroy_machine;
use crate::failure::Failure;
use crate::rows::{Change, Row, SecretsVersionRow, key};
use crate::{Ctx, api, destroyed, registry, volumes};
use dunlin_model::desired::{AppRow, MachineRow, TombstoneReason};

/// Each machine takes six operations of the store's hundred.
const MACHINES_A_TURN: usize = 12;
/// Each takes two.
const VOLUMES_A_TURN: usize = 40;
const ROWS_A_TURN: usize = 80;

pub(crate) async fn turn(ctx: &Ctx, app: &Row<AppRow>) -> Result<Turn, Failure> {
    let name = &app.value.name;
    let rows = ctx.state.machines().await?;
    let machines: Vec<_> = rows.into_iter().filter(|row| row.value.spec.app == *name).take(MACHINES_A_TURN).collect();
    if !machines.is_empty() {
        ctx.kill.pass("app-destroy", "before");
        let destroy = |row: &Row<MachineRow>| {
            destroy_machine(row, TombstoneReason::Person).also(destroyed::note(&row.value, destroyed::heard(ctx, &row.value)))
        };
        ctx.state.commit(machines.iter().fold(Change::default(), |change, row| change.also(destroy(row)))).await?;
        ctx.kill.pass("app-destroy", "after");
        return Ok(Turn::Again);
    }
    let volumes = volumes::of_app(ctx, name).await?;
    if !volumes.is_empty() {
        let volumes = volumes.iter().take(VOLUMES_A_TURN);
        ctx.state.commit(volumes.fold(Change::default(), |change, row| change.also(volumes::destroy(row)))).await?;
        return Ok(Turn::Again);
    }
    let mut keys = vec![key::plan(name), key::progress(name)];
    for prefix in [
        key::releases(name), key::secrets(name), key::secrets_sets(name), key::all_events(name), key::destroyed_of(name),
    ] {
        keys.extend(ctx.state.keys(&prefix).await?);
    }
    let is_last = keys.len() <= ROWS_A_TURN;
    let mut change = Change::default().unchanged(key::app(name), app.modified);
    for key in keys.into_iter().take(ROWS_A_TURN) {
        change = change.delete(key);
    }
    if is_last {
        registry::forget_repository(ctx, name).await?;
        api::forget_builds(ctx, name);
        let version = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(name)).await?;
        if let Some(row) = version {
            let emptied = SecretsVersionRow { sets: Default::default(), ..row.value };
            change = change.put(key::secrets_version(name), &emptied);
        }
        change = change.delete(key::app(name));
    }
    ctx.state.commit(change).await?;
    if is_last {
        ctx.events.forget(name);
        tracing::info!(app = %name, "app destroyed");
    }
    Ok(Turn::Again)
}
