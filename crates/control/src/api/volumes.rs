//! Volumes and their snapshots.

use super::given::Body;
use crate::failure::Failure;
use crate::releases::{busy, load_app};
use crate::rows::{Change, Outcome, Row, key};
use crate::hosts::{self, VolumeWanted};
use crate::{Ctx, now_ms, volumes};
use axum::Json;
use axum::extract::{Path, State};
use dunlin_api::volumes::{CreateVolume, Extended, ExtendVolume, Snapshot, UpdateVolume, Volume};
use dunlin_api::{ErrorCode, Refusal, VolumeStatus};
use dunlin_model::config::PrimaryRegion;
use dunlin_model::desired::{AppRow, ReleaseRow};
use dunlin_model::volume::{
    SIZE_MAX_GB, SIZE_MIN_GB, SNAPSHOT_RETENTION, SNAPSHOT_RETENTION_DEFAULT, VOLUME_NAME_RULE, VolumeRow, is_volume_name,
};
use dunlin_model::{AppName, RegionExpr, SnapshotId, VolumeId, VolumeSource};
use futures_util::future::join_all;
use http::StatusCode;
use std::sync::Arc;

/// Of a volume that a request does not size, as the Machines API has it.
const SIZE_DEFAULT_GB: u32 = 3;
/// Volumes, while they are listed.
const MOST_ASKED_AT_ONCE: usize = 64;
/// Of one app.
const VOLUMES_MAX: usize = 200;

async fn load(ctx: &Ctx, app: &AppName, id: &VolumeId) -> Result<Row<VolumeRow>, Failure> {
    load_app(ctx, app).await?;
    let row = ctx.state.get::<VolumeRow>(&key::volume(id)).await?.filter(|row| row.value.app == *app);
    row.ok_or_else(|| {
        Failure::not_found(format!("app {app} has no volume {id}"))
            .hint(format!("`dunlin volume list --app {app}` shows those it has"))
    })
}

/// A volume as the API shows it, with the word of its host on it.
async fn shown(ctx: &Ctx, row: &VolumeRow) -> Result<Volume, Failure> {
    let status = match hosts::reach(ctx, &row.host) {
        Ok(host) => hosts::look(ctx.host.host_id(), &row.host, host.volume(&row.id, row.size_gb)).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = &status {
        tracing::debug!(volume = %row.id, %refusal, "the host does not answer for the volume");
    }
    with_status(ctx, row, status.ok()).await
}

async fn with_status(ctx: &Ctx, row: &VolumeRow, status: Option<VolumeStatus>) -> Result<Volume, Failure> {
    let machines = ctx.state.machines_of(&row.app).await?;
    Ok(Volume::new(row, volumes::holder(&machines, &row.id), status))
}

pub async fn list(State(ctx): State<Arc<Ctx>>, Path(app): Path<AppName>) -> Result<Json<Vec<Volume>>, Failure> {
    load_app(&ctx, &app).await?;
    let mut all = Vec::new();
    // Each host is asked for a few at a time, and no host is waited for before another.
    for some in volumes::of_app(&ctx, &app).await?.chunks(MOST_ASKED_AT_ONCE) {
        all.extend(join_all(some.iter().map(|row| shown(&ctx, &row.value))).await);
    }
    Ok(Json(all.into_iter().collect::<Result<_, _>>()?))
}

pub async fn get(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
) -> Result<Json<Volume>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    Ok(Json(shown(&ctx, &row.value).await?))
}

/// Where a volume without a region goes. Where the app names an order of regions, one elsewhere would be no machine's.
async fn of_its_machines(ctx: &Ctx, app: &AppRow) -> Result<RegionExpr, Failure> {
    let release = ctx.state.get::<ReleaseRow>(&key::release(&app.name, app.current_release)).await?;
    let primary = release.and_then(|row| row.value.config.primary_region);
    Ok(primary.as_ref().and_then(PrimaryRegion::order).cloned().unwrap_or_else(RegionExpr::any))
}

pub async fn create(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Body(body): Body<CreateVolume>,
) -> Result<Json<Volume>, Failure> {
    let app_row = load_app(&ctx, &app).await?;
    can_be_honoured(&body)?;
    let there = volumes::of_app(&ctx, &app).await?;
    if there.len() >= VOLUMES_MAX {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("app {app} has {VOLUMES_MAX} volumes, the most"))
            .hint("destroy those that nobody needs"));
    }
    let (source, least_gb) = match source(&ctx, &app, &there, &body).await? {
        Some((source, size_gb)) => (Some(source), size_gb),
        None => (None, SIZE_MIN_GB),
    };
    let size_gb = body.size_gb.unwrap_or(if source.is_some() { least_gb } else { SIZE_DEFAULT_GB });
    if !(least_gb..=SIZE_MAX_GB).contains(&size_gb) {
        return Err(Failure::invalid(format!("size_gb is {size_gb}; it must be from {least_gb} to {SIZE_MAX_GB}")));
    }
    let of = source.as_ref().and_then(|source| there.iter().find(|row| row.value.id == source.volume)).map(|row| &row.value);
    let regions = match &body.region {
        Some(region) => RegionExpr::only(region.clone()),
        None if of.is_some() => RegionExpr::any(),
        None => of_its_machines(&ctx, &app_row.value).await?,
    };
    let wanted = VolumeWanted {
        app: &app,
        size_gb,
        regions: &regions,
        only: of.map(|of| &of.host),
        beside: there.iter().filter(|row| row.value.name == body.name).map(|row| &row.value.host).collect(),
    };
    let host = hosts::with_volume_room(&ctx, &wanted).await?;
    let encrypted = match of {
        Some(of) => as_its_source(body.encrypted, of)?,
        None => volumes::encrypted(&ctx, &host.id, body.encrypted).await?,
    };
    let row = VolumeRow {
        id: VolumeId::from_random(crate::keys::random()),
        name: body.name,
        org: app_row.value.org.clone(),
        app: app.clone(),
        host: host.id.clone(),
        region: host.region,
        size_gb,
        created_at_ms: now_ms(),
        snapshot_retention: body.snapshot_retention.unwrap_or(SNAPSHOT_RETENTION_DEFAULT),
        auto_backup: body.auto_backup_enabled.unwrap_or(true),
        encrypted,
        source,
    };
    // Not for an app that is being destroyed in this moment.
    let change = volumes::create(&row).unchanged(key::app(&app), app_row.modified);
    if ctx.state.commit(change).await? == Outcome::Conflict {
        return Err(busy(&app));
    }
    match hosts::reach(&ctx, &host.id)?.volume(&row.id, size_gb).await {
        Ok(status) => Ok(Json(with_status(&ctx, &row, Some(status)).await?)),
        Err(refusal) => {
            // A volume that could not be made is none.
            if let Some(row) = ctx.state.get::<VolumeRow>(&key::volume(&row.id)).await? {
                ctx.state.commit(volumes::destroy(&row)).await?;
            }
            Err(Failure::from(refusal))
        }
    }
}

/// What a volume here cannot be is refused, not left out.
fn can_be_honoured(body: &CreateVolume) -> Result<(), Failure> {
    if !is_volume_name(&body.name) {
        return Err(Failure::invalid(format!("name: {VOLUME_NAME_RULE}")));
    }
    if body.fstype.as_deref().is_some_and(|fstype| fstype != "ext4") {
        return Err(Failure::invalid("fstype: volumes are ext4").hint("leave it out"));
    }
    check_retention(body.snapshot_retention)
}

/// What is copied is what is on the disk.
fn as_its_source(asked: Option<bool>, of: &VolumeRow) -> Result<bool, Failure> {
    if asked.is_some_and(|asked| asked != of.encrypted) {
        let is = if of.encrypted { "is" } else { "is not" };
        return Err(Failure::invalid(format!("encrypted: a copy is as what it is of, and volume {} {is} encrypted", of.id))
            .hint("leave it out; for the other, make a new volume and copy the files in a machine"));
    }
    Ok(of.encrypted)
}

fn check_retention(snapshot_retention: Option<u32>) -> Result<(), Failure> {
    if snapshot_retention.is_some_and(|days| !SNAPSHOT_RETENTION.contains(&days)) {
        return Err(Failure::invalid("snapshot_retention must be from 1 to 60 days"));
    }
    Ok(())
}

/// What it begins as a copy of, if anything, and how large that is. Only of the same app: an id is no permission.
async fn source(
    ctx: &Ctx,
    app: &AppName,
    there: &[Row<VolumeRow>],
    body: &CreateVolume,
) -> Result<Option<(VolumeSource, u32)>, Failure> {
    let find = |id: &VolumeId| there.iter().find(|row| row.value.id == *id).map(|row| &row.value);
    match (&body.source_volume_id, &body.snapshot_id) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Failure::invalid("source_volume_id and snapshot_id cannot be given both")),
        (Some(id), None) => {
            let row = find(id).ok_or_else(|| Failure::not_found(format!("app {app} has no volume {id}")))?;
            Ok(Some((VolumeSource { volume: id.clone(), snapshot: None }, row.size_gb)))
        }
        (None, Some(id)) => {
            for row in there {
                // Whose host is lost cannot be copied from either.
                let Ok(host) = hosts::reach(ctx, &row.value.host) else { continue };
                let Ok(snapshots) = host.snapshots(&row.value.id).await else { continue };
                if let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.id == *id) {
                    let source = VolumeSource { volume: row.value.id.clone(), snapshot: Some(id.clone()) };
                    let size_gb = u32::try_from(snapshot.volume_size.div_ceil(1 << 30)).unwrap_or(SIZE_MAX_GB);
                    return Ok(Some((source, size_gb)));
                }
            }
            Err(Failure::not_found(format!("no volume of app {app} has a snapshot {id}"))
                .hint("`dunlin volume snapshots list` shows a volume's; they are kept for the days of its retention"))
        }
    }
}

fn no_room(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::InsufficientCapacity { host, why } => {
            Failure::new(ErrorCode::InsufficientCapacity, format!("host {host} has no room for it: {why}"))
                .hint(hosts::VOLUME_ROOM_HINT)
        }
        other => Failure::from(other),
    }
}

pub async fn update(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
    Body(body): Body<UpdateVolume>,
) -> Result<Json<Volume>, Failure> {
    check_retention(body.snapshot_retention)?;
    let row = load(&ctx, &app, &id).await?;
    let snapshot_retention = body.snapshot_retention.unwrap_or(row.value.snapshot_retention);
    let auto_backup = body.auto_backup_enabled.unwrap_or(row.value.auto_backup);
    let next = write(&ctx, &row, VolumeRow { snapshot_retention, auto_backup, ..row.value.clone() }).await?;
    Ok(Json(shown(&ctx, &next).await?))
}

pub(crate) async fn write(ctx: &Ctx, row: &Row<VolumeRow>, next: VolumeRow) -> Result<VolumeRow, Failure> {
    let key = key::volume(&next.id);
    let change = Change::default().unchanged(key.clone(), row.modified).put(key, &next);
    match ctx.state.commit(change).await? {
        Outcome::Committed => Ok(next),
        Outcome::Conflict => Err(busy(&next.app)),
    }
}

pub async fn extend(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
    Body(body): Body<ExtendVolume>,
) -> Result<Json<Extended>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let has = row.value.size_gb;
    if body.size_gb < has || body.size_gb > SIZE_MAX_GB {
        return Err(Failure::invalid(format!("size_gb is {}; volume {id} has {has} GB and never shrinks", body.size_gb))
            .hint(format!("ask for more than {has} and at most {SIZE_MAX_GB}")));
    }
    let host = hosts::reach(&ctx, &row.value.host)?;
    host.volume_room(body.size_gb - has).await.map_err(no_room)?;
    let next = write(&ctx, &row, VolumeRow { size_gb: body.size_gb, ..row.value.clone() }).await?;
    let status = host.volume(&id, next.size_gb).await?;
    let volume = with_status(&ctx, &next, Some(status)).await?;
    Ok(Json(Extended { volume, needs_restart: status.needs_restart }))
}

pub async fn destroy(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
) -> Result<Json<Volume>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let machines = ctx.state.machines_of(&app).await?;
    if let Some(machine) = volumes::holder(&machines, &id) {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("machine {machine} has volume {id}"))
            .hint("destroy the machine first, or scale its process group down"));
    }
    match ctx.state.commit(volumes::destroy(&row)).await? {
        Outcome::Committed => {
            tracing::info!(%app, volume = %id, "volume is being destroyed");
            Ok(Json(Volume { state: "destroyed".into(), host_status: "ok".into(), ..Volume::new(&row.value, None, None) }))
        }
        Outcome::Conflict => Err(busy(&app)),
    }
}

pub async fn snapshots(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
) -> Result<Json<Vec<Snapshot>>, Failure> {
    let row = load(&ctx, &app, &id).await?;
    let snapshots = hosts::reach(&ctx, &row.value.host)?.snapshots(&id).await?;
    Ok(Json(snapshots.into_iter().map(Snapshot::from).collect()))
}

pub async fn snapshot(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, VolumeId)>,
) -> Result<(StatusCode, Json<Snapshot>), Failure> {
    let row = load(&ctx, &app, &id).await?;
    let made = hosts::reach(&ctx, &row.value.host)?.snapshot(&id, &SnapshotId::from_random(crate::keys::random())).await;
    let made = made.map_err(no_room)?;
    Ok((StatusCode::OK, Json(made.into())))
}
