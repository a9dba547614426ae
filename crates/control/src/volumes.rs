//! Volumes in desired state: who has which, and the changes that make, take and destroy them.
//!
//! Which machine has a volume is in the machines' specs. Whoever puts it into one writes the volume's row again in the
//! same transaction, so that of two who saw it free one finds the row changed.

use crate::failure::Failure;
use crate::rows::{Change, Row, key};
use crate::{Ctx, hosts, now_ms};
use dunlin_api::VolumeEncryption;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_model::volume::{VolumeRow, VolumeTombstoneRow};
use dunlin_model::{AppName, HostId, MachineId, MachineSpec, Region, VolumeId};
use dunlin_planner::MountTarget;

/// An app's volumes, in the order of their ids.
pub(crate) async fn of_app(ctx: &Ctx, app: &AppName) -> Result<Vec<Row<VolumeRow>>, Failure> {
    let rows = ctx.state.list::<VolumeRow>("volumes/").await?;
    Ok(rows.into_iter().filter(|row| row.value.app == *app).collect())
}

/// Those of them that no machine has.
pub(crate) async fn free(ctx: &Ctx, app: &AppName) -> Result<Vec<Row<VolumeRow>>, Failure> {
    let volumes = of_app(ctx, app).await?;
    let machines = ctx.state.machines_of(app).await?;
    Ok(volumes.into_iter().filter(|row| holder(&machines, &row.value.id).is_none()).collect())
}

/// The machine that has a volume. Its row is gone while its host still ends it; the host waits for that end.
pub(crate) fn holder(machines: &[Row<MachineRow>], id: &VolumeId) -> Option<MachineId> {
    let has = |row: &&Row<MachineRow>| row.value.spec.mounts.iter().any(|mount| mount.volume == *id);
    machines.iter().find(has).map(|row| row.value.id.clone())
}

/// The part of a transaction that puts a volume into a machine; `None`: somebody has it, or it is gone.
pub(crate) async fn claim(ctx: &Ctx, app: &AppName, id: &VolumeId) -> Result<Option<Change>, Failure> {
    let row = free(ctx, app).await?.into_iter().find(|row| row.value.id == *id);
    let claim = |row: Row<VolumeRow>| {
        let key = key::volume(&row.value.id);
        Change::default().unchanged(key.clone(), row.modified).put(key, &row.value)
    };
    Ok(row.map(claim))
}

/// Whether a new volume is encrypted: as it was asked for, and otherwise wherever its host can.
pub(crate) async fn encrypted(ctx: &Ctx, host: &HostId, asked: Option<bool>) -> Result<bool, Failure> {
    if asked == Some(false) {
        return Ok(false);
    }
    match (hosts::reach(ctx, host)?.volume_encryption().await?, asked) {
        (VolumeEncryption::Offered, _) => Ok(true),
        (VolumeEncryption::Lacking { .. }, None) => Ok(false),
        (VolumeEncryption::Lacking { what, fix }, Some(_)) => {
            Err(Failure::invalid(format!("encrypted: host {} cannot encrypt volumes: {what}", host)).hint(format!(
                "{fix}; or leave it out, and put the server's data directory on an encrypted disk"
            )))
        }
    }
}

/// Whether there is a host where a volume could be as it was asked for; the refusal is that of the host that is here.
pub(crate) async fn encrypted_somewhere(ctx: &Ctx, asked: Option<bool>) -> Result<(), Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let others = hosts.iter().map(|row| &row.value.id).filter(|id| *id != ctx.host.host_id());
    let (here, others) = tokio::join!(
        encrypted(ctx, ctx.host.host_id(), asked),
        futures_util::future::join_all(others.map(|host| encrypted(ctx, host, asked))),
    );
    here.map(drop).or_else(|refused| others.iter().any(Result::is_ok).then_some(()).ok_or(refused))
}

/// The volume of a new machine.
pub(crate) fn make(spec: &MachineSpec, mount: &MountTarget, taken: &NewVolume<'_>) -> Change {
    let NewVolume { id, host, region, encrypted } = taken;
    let row = VolumeRow {
        id: (*id).clone(),
        name: mount.name.clone(),
        org: spec.org.clone(),
        app: spec.app.clone(),
        host: (*host).clone(),
        region: (*region).clone(),
        size_gb: mount.size_gb,
        created_at_ms: now_ms(),
        snapshot_retention: mount.snapshot_retention,
        auto_backup: mount.auto_backup,
        encrypted: *encrypted,
        source: None,
    };
    create(&row)
}

/// What a plan says of a volume that is made, and what its host can.
pub(crate) struct NewVolume<'a> {
    pub id: &'a VolumeId,
    pub host: &'a HostId,
    pub region: &'a Region,
    pub encrypted: bool,
}

pub(crate) fn create(row: &VolumeRow) -> Change {
    let key = key::volume(&row.id);
    Change::default().absent(key.clone()).put(key, row)
}

/// A tombstone for its host. Nobody puts it into a machine meanwhile: that would change the row.
pub(crate) fn destroy(row: &Row<VolumeRow>) -> Change {
    let volume = &row.value;
    let (id, host, app) = (volume.id.clone(), volume.host.clone(), volume.app.clone());
    let tombstone = VolumeTombstoneRow { volume: id, host, app, at_ms: now_ms() };
    Change::default()
        .unchanged(key::volume(&volume.id), row.modified)
        .delete(key::volume(&volume.id))
        .put(key::volume_tombstone(&volume.id), &tombstone)
}
