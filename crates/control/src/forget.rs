//! Rows and images that nobody needs any more are removed, a few at a time.

use crate::failure::{Failure, chain};
use crate::rows::{ADDRESS_REST_MS, AddressRow, Change, RevokedRow, key};
use crate::tokens::MAX_LIFETIME_S;
use crate::{Ctx, destroyed, now_ms, registry, secret_sets};
use dunlin_model::desired::{AppRow, TombstoneRow};
use dunlin_model::volume::VolumeTombstoneRow;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Longer than any host may be away and come back with its machines; a removed host is removed by hand.
const TOMBSTONE_MS: u64 = 30 * 24 * 3600 * 1000;
const LOOK_EVERY: Duration = Duration::from_secs(600);
const ROWS_A_LOOK: usize = 80;

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    loop {
        if let Err(failure) = look(&ctx).await {
            tracing::error!(error = %chain(&failure), "rows that nobody needs could not be removed");
        }
        if let Err(failure) = registry::forget_builds(&ctx).await {
            tracing::error!(error = %chain(&failure), "images of builds that nobody uses could not be removed");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

async fn look(ctx: &Ctx) -> Result<(), Failure> {
    let now_ms = now_ms();
    let older = |at_ms: u64, than_ms: u64| now_ms > at_ms.saturating_add(than_ms);
    let mut change = Change::default();
    let view = ctx.view.current();
    for row in ctx.state.list::<TombstoneRow>("tombstones/").await? {
        if view.is_rid_of(&row.value.host, &row.value.machine) && older(row.value.at_ms, TOMBSTONE_MS) {
            change = change.delete(key::tombstone(&row.value.machine));
        }
    }
    for row in ctx.state.list::<VolumeTombstoneRow>("volume_tombstones/").await? {
        if older(row.value.at_ms, TOMBSTONE_MS) {
            change = change.delete(key::volume_tombstone(&row.value.volume));
        }
    }
    for (key, row) in ctx.state.list_keyed::<AddressRow>("addresses/").await? {
        if row.value.freed_at_ms.is_some_and(|at_ms| older(at_ms, ADDRESS_REST_MS)) {
            // Somebody may take it in this moment.
            change = change.unchanged(key.clone(), row.modified).delete(key);
        }
    }
    for (key, row) in ctx.state.list_keyed::<RevokedRow>("revoked/").await? {
        if older(row.value.at_ms, MAX_LIFETIME_S * 1000) {
            change = change.delete(key); // it has expired by now
        }
    }
    change.compare.truncate(ROWS_A_LOOK);
    change.then.truncate(ROWS_A_LOOK);
    if !change.then.is_empty() {
        ctx.state.commit(change).await?;
    }
    destroyed::forget(ctx, ROWS_A_LOOK).await?;
    for app in ctx.state.list::<AppRow>("apps/").await? {
        // A conflict is looked at again in the next round.
        if let Some(change) = secret_sets::prune(ctx, &app).await? {
            ctx.state.commit(change).await?;
        }
    }
    Ok(())
}
