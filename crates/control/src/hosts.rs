//! Hosts: how control reaches them, and which one takes a machine that is made by hand.

use crate::failure::Failure;
use crate::rows::{Row, key};
use crate::{Ctx, reconcile};
use dunlin_api::{ErrorCode, HostApi, Refusal, Reserve};
use dunlin_model::desired::{HostRow, MachineRow, TombstoneRow};
use dunlin_model::{AppName, HostId, Lease, MachineId, MachineSpec, RegionExpr};
use dunlin_planner::{Ask, Capacity, Demand, For, Observed};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

/// Between reservation and assignment lies one transaction, then the start.
const RESERVE_TTL_MS: u64 = 30_000;
/// Hosts that are asked for one machine before the answer is no.
const MOST_ASKED: usize = 20;
/// Of them, those that have no room by their last word, which is seconds old: they may have by now.
const MOST_ASKED_ANYWAY: usize = 3;

/// Of a host elsewhere, while somebody looks at a machine or a list: then what was last heard is shown.
const LOOK_WAIT: Duration = Duration::from_millis(800);

pub(crate) const VOLUME_ROOM_HINT: &str =
    "a volume takes its whole size at once; ask for less, name another region, or destroy volumes that nobody needs";

/// The host's own ear. One that is dead is not tried again: nobody waits for it.
pub(crate) fn reach(ctx: &Ctx, host: &HostId) -> Result<Arc<dyn HostApi>, Refusal> {
    if ctx.host.host_id() == host {
        return Ok(Arc::clone(&ctx.host));
    }
    let unreachable = |why: &str| Refusal::Unreachable { host: host.clone(), why: why.to_owned() };
    if ctx.watched.is_dead(host) {
        return Err(unreachable("it is down"));
    }
    let found = ctx.reach.as_ref().and_then(|reach| reach(host));
    found.ok_or_else(|| unreachable("no address of it is known here"))
}

/// The host of a machine; of one that was destroyed, the host that still ends it.
pub(crate) async fn of_machine(ctx: &Ctx, id: &MachineId) -> Result<Arc<dyn HostApi>, Refusal> {
    let unread = |failure: Failure| Refusal::Failed(failure.message);
    if let Some(row) = ctx.state.machine(id).await.map_err(unread)? {
        return reach(ctx, &row.value.host);
    }
    let tombstone = ctx.state.get::<TombstoneRow>(&key::tombstone(id)).await.map_err(unread)?;
    let tombstone = tombstone.ok_or_else(|| Refusal::NoSuchMachine(id.clone()))?;
    reach(ctx, &tombstone.value.host)
}

/// What is written to the store its host cannot refuse: it is asked who has the lease, as late as can be before the write.
/// A nonce whose lease has ended opens nothing.
pub(crate) async fn check_lease(ctx: &Ctx, machine: &MachineRow, nonce: Option<&str>) -> Result<(), Refusal> {
    let id = &machine.id;
    let lease = match reach(ctx, &machine.host)?.lease(id).await {
        Ok(lease) => lease,
        Err(Refusal::NoSuchMachine(_)) => None, // its host has not taken it up yet
        Err(refusal) => return Err(refusal),
    };
    match (lease, nonce) {
        (Some(lease), Some(nonce)) if lease.nonce == nonce => Ok(()),
        (Some(Lease { owner, expires_at_ms, .. }), _) => Err(Refusal::Leased { machine: id.clone(), owner, expires_at_ms }),
        (None, Some(_)) => Err(Refusal::NotLeased { machine: id.clone() }),
        (None, None) => Ok(()),
    }
}

/// For people who look: an answer of a host elsewhere is not waited for long.
pub(crate) async fn look<T>(here: &HostId, host: &HostId, asked: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    if here == host {
        return asked.await;
    }
    let late = |_| Refusal::Unreachable { host: host.clone(), why: format!("no answer within {} ms", LOOK_WAIT.as_millis()) };
    tokio::time::timeout(LOOK_WAIT, asked).await.map_err(late)?
}

/// A machine that somebody makes by hand.
pub(crate) struct Wanted<'w> {
    pub app: &'w AppName,
    pub id: &'w MachineId,
    pub spec: &'w MachineSpec,
    pub regions: &'w RegionExpr,
    /// Where its volume is.
    pub only: Option<&'w HostId>,
    /// Where what it stands in for is.
    pub not: &'w BTreeSet<HostId>,
}

/// A host that has promised the room, and an address there. The best one is asked first; who refuses is left out.
pub(crate) async fn promised(ctx: &Ctx, wanted: &Wanted<'_>) -> Result<(HostRow, Ipv4Addr), Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let hosts: Vec<HostRow> = hosts.into_iter().map(|row| row.value).collect();
    some_are_there(&hosts, wanted.regions)?;
    let hosts: Vec<HostRow> = hosts.into_iter().filter(|host| !wanted.not.contains(&host.id)).collect();
    if some_are_there(&hosts, wanted.regions).is_err() {
        return Err(Failure::invalid("config.standbys cannot be used: every host there would be lost with what the machine stands in for")
            .hint("name another region, or add a host: `dunlin host token` tells how"));
    }
    let used = reconcile::addresses_in_use(ctx).await?;
    let machines = ctx.state.machines_of(wanted.app).await?;
    let mut observed = reconcile::observe(ctx, wanted.app).await?;
    let mut asked_anyway = 0;
    for _ in 0..MOST_ASKED {
        let (best, no_room) = match best_host(&hosts, &observed, &machines, wanted) {
            Ok(host) => (Some(host), None),
            Err(no_room) => (unasked(&hosts, &observed, wanted).filter(|_| asked_anyway < MOST_ASKED_ANYWAY), Some(no_room)),
        };
        let Some(host) = best else {
            let no_room = no_room.unwrap_or_default();
            return Err(Failure::new(ErrorCode::InsufficientCapacity, no_room)
                .hint("name more regions, for example `fra,eu,any`, ask for less, or stop machines that you do not need"));
        };
        asked_anyway += usize::from(no_room.is_some());
        let free = (0u32..).map_while(|n| host.prefix.nth(n)).find(|address| !used.contains(address));
        let refusal = match free {
            None => {
                let why = "it has no free address for another machine; those of destroyed ones are free again after a day".into();
                Refusal::InsufficientCapacity { host: host.id.clone(), why }
            }
            Some(address) => match reserve(ctx, host, wanted).await {
                Ok(()) => return Ok((host.clone(), address)),
                Err(refusal) => refusal,
            },
        };
        if hosts.len() == 1 {
            return Err(refusal.into());
        }
        reconcile::look_at_claim(ctx, &host.id, &wanted.spec.guest, &refusal);
        tracing::debug!(app = %wanted.app, machine = %wanted.id, host = %host.id, %refusal, "the next best host is asked");
        let why = match refusal {
            Refusal::InsufficientCapacity { why, .. } => why,
            other => other.to_string(),
        };
        observed.refused.insert(host.id.clone(), why);
    }
    Err(Failure::new(ErrorCode::InsufficientCapacity, format!("{MOST_ASKED} hosts were asked, and each has refused the machine"))
        .hint("try again in a moment: hosts say every few seconds what room they have"))
}

/// A volume that somebody makes by hand.
pub(crate) struct VolumeWanted<'w> {
    pub app: &'w AppName,
    pub size_gb: u32,
    pub regions: &'w RegionExpr,
    /// Where what it begins as a copy of is.
    pub only: Option<&'w HostId>,
    /// Where volumes of its name are: their machines are not to be lost together.
    pub beside: Vec<&'w HostId>,
}

/// A host whose disk has room for a new volume, by its own word.
pub(crate) async fn with_volume_room(ctx: &Ctx, wanted: &VolumeWanted<'_>) -> Result<HostRow, Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let hosts: Vec<HostRow> = hosts.into_iter().map(|row| row.value).collect();
    let is_asked_for = |host: &&HostRow| {
        wanted.regions.rank(&host.region).is_some() && wanted.only.is_none_or(|only| *only == host.id)
    };
    let asked: Vec<HostRow> = hosts.iter().filter(is_asked_for).cloned().collect();
    if asked.is_empty() {
        let there = hosts.iter().filter(|host| wanted.only.is_none_or(|only| *only == host.id));
        return Err(no_such_region(wanted.regions, there.map(|host| &host.region)));
    }
    let mut observed = reconcile::observe(ctx, wanted.app).await?;
    for _ in 0..MOST_ASKED {
        let found = {
            let mut capacity = Capacity::new(&asked, &observed);
            let mut spread = capacity.spread(wanted.beside.iter().copied());
            // The disk's room is as old as its host's last fact: it is asked itself, below.
            let ask = Ask { demand: Demand::default(), regions: wanted.regions, only: wanted.only, purpose: For::New };
            capacity.place(&ask, &mut spread)
        };
        let host = found.map_err(|no_room| {
            let why = observed.refused.values().cloned().collect::<Vec<_>>().join("; ");
            let why = if why.is_empty() { no_room.to_string() } else { format!("no host has room for it: {why}") };
            Failure::new(ErrorCode::InsufficientCapacity, why).hint(VOLUME_ROOM_HINT)
        })?;
        let refusal = match reach(ctx, &host.id) {
            Ok(there) => match there.volume_room(wanted.size_gb).await {
                Ok(()) => return Ok(host.clone()),
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        let id = host.id.clone();
        let why = match refusal {
            Refusal::InsufficientCapacity { why, .. } => format!("host {id}: {why}"),
            // Room is not what it lacks, and there is no other to ask.
            other if asked.len() == 1 => return Err(other.into()),
            other => other.to_string(),
        };
        observed.refused.insert(id, why);
    }
    Err(Failure::new(ErrorCode::InsufficientCapacity, format!("{MOST_ASKED} hosts were asked, and each has refused the volume"))
        .hint(VOLUME_ROOM_HINT))
}

async fn reserve(ctx: &Ctx, host: &HostRow, wanted: &Wanted<'_>) -> Result<(), Refusal> {
    let reserve = Reserve { machine: wanted.id.clone(), guest: wanted.spec.guest.clone(), ttl_ms: RESERVE_TTL_MS };
    reach(ctx, &host.id)?.reserve(reserve).await
}

fn some_are_there(hosts: &[HostRow], regions: &RegionExpr) -> Result<(), Failure> {
    if hosts.iter().any(|host| regions.rank(&host.region).is_some()) {
        return Ok(());
    }
    Err(no_such_region(regions, hosts.iter().map(|host| &host.region)))
}

/// There are hosts, and none in what was asked for.
pub(crate) fn no_such_region<'r>(
    wanted: &RegionExpr,
    there: impl Iterator<Item = &'r dunlin_model::Region>,
) -> Failure {
    let there: std::collections::BTreeSet<&str> = there.map(dunlin_model::Region::as_str).collect();
    let there = there.into_iter().collect::<Vec<_>>().join(" or ");
    Failure::invalid(format!("there is no host in region {wanted}"))
        .hint(format!("use {there}, or leave the region out; GET /v1/platform/regions shows those there are"))
}

fn best_host<'h>(
    hosts: &'h [HostRow],
    observed: &Observed,
    machines: &[Row<MachineRow>],
    wanted: &Wanted<'_>,
) -> Result<&'h HostRow, String> {
    let mut capacity = Capacity::new(hosts, observed);
    let group = &wanted.spec.process_group;
    let peers = machines.iter().filter(|row| row.value.spec.process_group == *group);
    let mut spread = capacity.spread(peers.map(|row| &row.value.host));
    let ask = Ask { demand: Demand::of(wanted.spec, 0), regions: wanted.regions, only: wanted.only, purpose: For::New };
    let found = capacity.place(&ask, &mut spread).map_err(|no_room| no_room.to_string())?;
    hosts.iter().find(|host| host.id == found.id).ok_or_else(|| format!("host {} is gone", found.id))
}

/// The roomiest of those in question that have not been asked.
fn unasked<'h>(hosts: &'h [HostRow], observed: &Observed, wanted: &Wanted<'_>) -> Option<&'h HostRow> {
    let free_mb = |host: &HostRow| {
        let fact = observed.hosts.get(&host.id);
        fact.map_or(host.memory_mb, |fact| fact.memory_mb.saturating_sub(fact.memory_reserved_mb))
    };
    let in_question = hosts.iter().filter(|host| {
        let is_asked_for = wanted.only.map_or_else(|| wanted.regions.rank(&host.region).is_some(), |only| *only == host.id);
        is_asked_for && !host.cordoned && !observed.dead.contains(&host.id) && !observed.refused.contains_key(&host.id)
    });
    in_question.min_by_key(|host| (wanted.regions.rank(&host.region), std::cmp::Reverse(free_mb(host)), host.id.clone()))
}
