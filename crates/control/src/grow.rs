//! Volumes that grow by themselves: when their host says that they are as full as the mount of their machine says.

use crate::api::volumes::write;
use crate::failure::Failure;
use crate::rows::key;
use crate::{Ctx, hosts, now_ms};
use dunlin_model::VolumeId;
use dunlin_model::volume::{AutoExtend, VolumeRow};
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often they are looked at: what is left above the threshold should last for longer.
const LOOK: Duration = Duration::from_secs(10);
/// After one has grown: what fills it may be faster.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Volumes that hosts are asked for side by side.
const MOST_AT_ONCE: usize = 64;
/// How often the same trouble is told.
const TELL_EVERY_MS: u64 = 3600 * 1000;

pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let mut told = BTreeMap::new();
    while !stop.is_cancelled() {
        let pause = if look(&ctx, &mut told).await { LOOK_AGAIN } else { LOOK };
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Whether one has grown. Who mounts what is in memory already; only what may grow is read from the store.
async fn look(ctx: &Ctx, told: &mut BTreeMap<VolumeId, u64>) -> bool {
    let mut grown = false;
    let view = ctx.view.current();
    let mounts = view.config.machines.values().flat_map(|machine| &machine.spec.mounts);
    let growing: Vec<_> = mounts.filter_map(|mount| Some((&mount.volume, mount.extend?))).collect();
    let mut looked = Vec::new();
    // Side by side: a host that does not answer holds up nobody else's volumes.
    for some in growing.chunks(MOST_AT_ONCE) {
        looked.extend(join_all(some.iter().map(async |(id, extend)| (*id, grow_if_full(ctx, id, *extend).await))).await);
    }
    for (id, outcome) in looked {
        match outcome {
            Ok(has_grown) => {
                grown |= has_grown;
                told.remove(id);
            }
            Err(failure) if told.get(id).is_none_or(|at_ms| now_ms() >= at_ms + TELL_EVERY_MS) => {
                tracing::warn!(volume = %id, %failure, "it is full and cannot grow by itself");
                told.insert(id.clone(), now_ms());
            }
            Err(_) => {}
        }
    }
    grown
}

async fn grow_if_full(ctx: &Ctx, id: &VolumeId, extend: AutoExtend) -> Result<bool, Failure> {
    let Some(row) = ctx.state.get::<VolumeRow>(&key::volume(id)).await? else { return Ok(false) };
    let has_gb = row.value.size_gb;
    // A host that does not answer is asked again.
    let Ok(host) = hosts::reach(ctx, &row.value.host) else { return Ok(false) };
    let Ok(status) = host.volume(id, has_gb).await else { return Ok(false) };
    // What it got before is not there yet: it would get more and more.
    if status.needs_restart {
        return Ok(false);
    }
    let used = status.blocks.saturating_sub(status.blocks_avail);
    let Some(size_gb) = extend.wants(has_gb, used, status.blocks) else { return Ok(false) };
    host.volume_room(size_gb - has_gb).await?;
    let next = write(ctx, &row, VolumeRow { size_gb, ..row.value.clone() }).await?;
    let status = host.volume(id, size_gb).await?;
    tracing::info!(
        app = %next.app, volume = %id, from_gb = has_gb, size_gb, percent = extend.percent,
        needs_restart = status.needs_restart, "volume extended by itself"
    );
    Ok(true)
}
