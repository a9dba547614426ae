//! Cordon, drain, and the removal of a host for good.

use crate::failure::Failure;
use crate::reconcile::destroy_machine;
use crate::rows::{Change, MemberRow, Outcome, RemovedHostRow, Row, key};
use crate::{Ctx, destroyed, now_ms};
use dunlin_api::ErrorCode;
use dunlin_api::fleet::HostRemoved;
use dunlin_model::{HostId, MachineId};
use dunlin_model::desired::{HostRow, MachineRow, TombstoneReason};
use dunlin_model::volume::VolumeRow;
use dunlin_view::Snapshot;
use std::time::Duration;

/// Each machine takes six operations of the store's hundred.
const MACHINES_AT_ONCE: usize = 12;
/// Machines have some seconds to end; whoever removes a host by force does not wait for longer ones.
const OBEYED_WITHIN: Duration = Duration::from_secs(15);
const VOLUMES_AT_ONCE: usize = 80;

/// What an operator wants of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Cordon,
    Uncordon,
    Drain,
}

pub(crate) async fn load(ctx: &Ctx, id: &HostId) -> Result<Row<HostRow>, Failure> {
    ctx.state.get::<HostRow>(&key::host(id)).await?.ok_or_else(|| {
        Failure::not_found(format!("there is no host {id}")).hint("`dunlin host list` shows those there are")
    })
}

/// Wanting it twice is the same as wanting it once.
pub(crate) async fn wish(ctx: &Ctx, id: &HostId, wish: Wish) -> Result<(), Failure> {
    let _one_at_a_time = ctx.hosts_writer.lock().await;
    let row = load(ctx, id).await?;
    let (cordoned, draining) = match wish {
        // A drain goes on: who wants no new machines there wants no less.
        Wish::Cordon => (true, row.value.draining),
        Wish::Uncordon => (false, false),
        Wish::Drain => (true, true),
    };
    if (row.value.cordoned, row.value.draining) != (cordoned, draining) {
        let next = HostRow { cordoned, draining, ..row.value };
        put(ctx, id, row.modified, &next).await?;
        tracing::info!(host = %id, cordoned, draining, "an operator has said what the host is for");
    }
    ctx.work.notify_one();
    Ok(())
}

async fn put(ctx: &Ctx, id: &HostId, modified: u64, next: &HostRow) -> Result<(), Failure> {
    let change = Change::default().unchanged(key::host(id), modified).put(key::host(id), next);
    match ctx.state.commit(change).await? {
        Outcome::Committed => Ok(()),
        Outcome::Conflict => Err(changed_meanwhile(id)),
    }
}

fn changed_meanwhile(id: &HostId) -> Failure {
    Failure::new(ErrorCode::Conflict, format!("host {id} was changed in this moment")).hint("try again")
}

/// What is to become of that which is on a host that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leftovers {
    /// There must be none.
    Refuse,
    /// Machines are destroyed, and volumes forgotten: their files stay where they are, and nobody knows of them any more.
    GiveUp,
}

/// Nobody talks to it any more, and its id is never used again. It may end half way and be done again.
pub(crate) async fn remove(ctx: &Ctx, id: &HostId, leftovers: Leftovers) -> Result<HostRemoved, Failure> {
    let _one_at_a_time = ctx.hosts_writer.lock().await;
    if *id == ctx.host_row.id {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("control runs on host {id}"))
            .hint("let control run elsewhere first: restore a backup of it on another host"));
    }
    let row = load(ctx, id).await?;
    let (machines, volumes) = on(ctx, id).await?;
    if leftovers == Leftovers::Refuse && (!machines.is_empty() || !volumes.is_empty()) {
        let why = format!("host {id} has {} machines and {} volumes", machines.len(), volumes.len());
        return Err(Failure::new(ErrorCode::FailedPrecondition, why).hint(format!(
            "`dunlin host drain {id}` moves what can move, and `dunlin host status {id}` shows what stays; if the host is lost, \
             --force destroys its machines and gives its volumes up"
        )));
    }
    let destroyed: Vec<MachineId> = machines.iter().map(|row| row.value.id.clone()).collect();
    // Nothing new comes there from here on, and what was on its way finds the row changed.
    put(ctx, id, row.modified, &HostRow { cordoned: true, ..row.value }).await?;
    let removed = match leftovers {
        Leftovers::Refuse => HostRemoved { id: id.clone(), machines: 0, volumes: 0, not_heard_of: 0 },
        Leftovers::GiveUp => give_up(ctx, id).await?,
    };
    let (machines, volumes) = on(ctx, id).await?;
    if !machines.is_empty() || !volumes.is_empty() {
        return Err(changed_meanwhile(id));
    }
    let removed = HostRemoved { not_heard_of: not_rid_of(ctx, id, &destroyed).await, ..removed };
    let row = load(ctx, id).await?;
    let member = ctx.state.get::<MemberRow>(&key::member(id)).await?;
    let removed_row = RemovedHostRow { removed_at_ms: now_ms(), prefix: row.value.prefix };
    let change = Change::default()
        .unchanged(key::host(id), row.modified)
        .if_as_read(key::member(id), member.as_ref())
        .delete(key::host(id))
        .delete(key::member(id))
        .put(key::removed_host(id), &removed_row);
    if ctx.state.commit(change).await? == Outcome::Conflict {
        return Err(changed_meanwhile(id));
    }
    ctx.work.notify_one();
    tracing::info!(host = %id, machines = removed.machines, volumes = removed.volumes, not_heard_of = removed.not_heard_of, "host removed for good");
    Ok(removed)
}

/// A host that answers obeys its tombstones before nobody talks to it any more. One that does not, or has not done so in time, asks
/// whether it was removed as soon as it finds that it is refused. Says how many machines it has still.
async fn not_rid_of(ctx: &Ctx, id: &HostId, machines: &[MachineId]) -> u32 {
    let mut changes = ctx.view.subscribe();
    let mut view = changes.current();
    let left = |view: &Snapshot| machines.iter().filter(|machine| !view.is_rid_of(id, machine)).count() as u32;
    let wait = async {
        while left(&view) > 0 {
            view = changes.changed().await;
        }
    };
    if ctx.watched.answers(id) {
        let _ = tokio::time::timeout(OBEYED_WITHIN, wait).await; // what is left is said
    }
    left(&ctx.view.current())
}

/// A few in a transaction; releases find that their machines are gone, and make others elsewhere.
async fn give_up(ctx: &Ctx, id: &HostId) -> Result<HostRemoved, Failure> {
    let mut removed = HostRemoved { id: id.clone(), machines: 0, volumes: 0, not_heard_of: 0 };
    let (machines, volumes) = on(ctx, id).await?;
    for some in machines.chunks(MACHINES_AT_ONCE) {
        let destroy = |row: &Row<MachineRow>| destroy_machine(row, TombstoneReason::Person).also(destroyed::note(&row.value, destroyed::heard(ctx, &row.value)));
        commit(ctx, id, some.iter().fold(Change::default(), |change, row| change.also(destroy(row)))).await?;
        removed.machines += some.len() as u32;
    }
    for some in volumes.chunks(VOLUMES_AT_ONCE) {
        // Without a tombstone: nothing orders the host to remove the files.
        let forget = |change: Change, row: &Row<VolumeRow>| {
            let key = key::volume(&row.value.id);
            change.unchanged(key.clone(), row.modified).delete(key)
        };
        commit(ctx, id, some.iter().fold(Change::default(), forget)).await?;
        removed.volumes += some.len() as u32;
    }
    Ok(removed)
}

async fn commit(ctx: &Ctx, id: &HostId, change: Change) -> Result<(), Failure> {
    match ctx.state.commit(change).await? {
        Outcome::Committed => Ok(()),
        Outcome::Conflict => Err(changed_meanwhile(id)),
    }
}

pub(crate) async fn on(ctx: &Ctx, id: &HostId) -> Result<(Vec<Row<MachineRow>>, Vec<Row<VolumeRow>>), Failure> {
    let machines = ctx.state.machines().await?.into_iter().filter(|row| row.value.host == *id).collect();
    let volumes = ctx.state.list::<VolumeRow>("volumes/").await?.into_iter().filter(|row| row.value.host == *id).collect();
    Ok((machines, volumes))
}

/// The part of a transaction that puts something on a host: it is still there, and still takes what is new.
pub(crate) async fn still_takes(ctx: &Ctx, id: &HostId) -> Result<Option<Change>, Failure> {
    let row = ctx.state.get::<HostRow>(&key::host(id)).await?.filter(|row| !row.value.cordoned);
    Ok(row.map(|row| Change::default().unchanged(key::host(id), row.modified)))
}
