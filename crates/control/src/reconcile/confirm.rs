//! What hosts say of their room may be wrong: they are asked before anybody is told that there is none.

use crate::{Ctx, hosts, now_ms};
use dunlin_api::{Refusal, Reserve};
use dunlin_model::{AppName, Guest, HostId, MachineId};
use dunlin_planner::Demand;
use dunlin_view::{HostFact, HostRoom};

/// Of those that say that they are full.
const MOST_CONFIRMED: usize = 3;
/// The promise is only to be heard: it is over before the place is asked for in earnest.
const PROMISE_MS: u64 = 1;

/// Whether one of these hosts, who all say that they are full, would take the machine. From then on its word counts for nothing, so
/// that the next plan may ask it in earnest.
pub(super) async fn someone_has_room(ctx: &Ctx, app: &AppName, full: &[HostId], guest: &Guest) -> bool {
    let mut found = false;
    // Whose word counts for nothing was asked a moment ago, and what is assigned to it leaves no room either: it is not asked for ever.
    for host in full.iter().filter(|host| ctx.room.believes(host, now_ms())).take(MOST_CONFIRMED) {
        let Ok(there) = hosts::reach(ctx, host) else { continue };
        let machine = MachineId::from_random(crate::keys::random());
        if there.reserve(Reserve { machine, guest: guest.clone(), ttl_ms: PROMISE_MS }).await.is_err() {
            continue;
        }
        found = true;
        ctx.room.disbelieve(host, now_ms());
        let said = ctx.view.current().hosts.get(host).map_or_else(|| "nothing".to_owned(), |fact| told(fact));
        tracing::error!(
            %app, %host, said,
            "the host says that it is full, and has room when it is asked: what it says of itself is not counted for a minute; \
             compare `dunlin host status` with what runs there"
        );
    }
    found
}

/// A host has refused a machine. If it says again and again that it has the room, somebody must look at it.
pub(crate) fn look_at_claim(ctx: &Ctx, host: &HostId, guest: &Guest, refusal: &Refusal) {
    let view = ctx.view.current();
    let Some(fact) = view.hosts.get(host) else { return };
    let Refusal::InsufficientCapacity { why, .. } = refusal else { return };
    if claims_room(fact, guest) && ctx.room.boasts(host, fact.updated_at_ms, now_ms()) {
        let said = told(fact);
        tracing::error!(
            %host, said, why,
            "the host says that it has room, and refuses when it is asked: machines go to others; compare `dunlin host status` with what runs there"
        );
    }
}

fn claims_room(fact: &HostFact, guest: &Guest) -> bool {
    let demand = Demand::of_guest(guest);
    let fits = |room: &HostRoom| room.machines < room.machines_max && fact.cpus.saturating_sub(room.cores_reserved) >= demand.cores;
    fact.memory_mb.saturating_sub(fact.memory_reserved_mb) >= demand.memory_mb && fact.room.as_ref().is_none_or(fits)
}

fn told(fact: &HostFact) -> String {
    format!("{} of {} MB are taken", fact.memory_reserved_mb, fact.memory_mb)
}
