//! `volume`: create, list, show, extend, fork, destroy, and snapshots.

use crate::args::{SnapshotsCommand, VolumeArgs, VolumeCommand};
use crate::config_file::app_name;
use crate::{CliError, Exit, Session, ui};
use dunlin_api::volumes::{CreateVolume, ExtendVolume, Extended, Snapshot, UpdateVolume, Volume};
use dunlin_api::wire::AppList;
use dunlin_model::AppName;
use serde_json::{Value, json};

pub async fn volume(session: &Session, command: VolumeCommand) -> Result<Exit, CliError> {
    match command {
        VolumeCommand::Create { name, target, size, region, snapshot_id, snapshot_retention, scheduled_snapshots, encrypted, no_encryption } => {
            let app = app_name(&target)?;
            // A copy is as large as what it is of.
            let size_gb = size.or(snapshot_id.is_none().then_some(dunlin_model::volume::SIZE_DEFAULT_GB));
            let auto_backup_enabled = scheduled_snapshots;
            let encrypted = if no_encryption { Some(false) } else { encrypted };
            let body = CreateVolume {
                name, region, size_gb, snapshot_id, snapshot_retention, auto_backup_enabled, encrypted, ..CreateVolume::default()
            };
            create(session, &app, &body).await
        }
        VolumeCommand::List(args) => {
            let app = app_name(&args)?;
            let volumes: Vec<Volume> = session.client.get(&format!("/v1/apps/{app}/volumes")).await?;
            if session.json {
                ui::print_json(&volumes);
            } else {
                let rows: Vec<_> = volumes.iter().map(row).collect();
                ui::print_table(&["ID", "NAME", "SIZE", "USED", "REGION", "ENCRYPTED", "MACHINE", "STATE"], &rows);
            }
            Ok(Exit::Ok)
        }
        VolumeCommand::Show(target) => {
            let (app, id) = find(session, &target).await?;
            show(session, &session.client.get(&format!("/v1/apps/{app}/volumes/{id}")).await?)
        }
        VolumeCommand::Extend { target, size } => extend(session, &target, size).await,
        VolumeCommand::Update { target, snapshot_retention, scheduled_snapshots } => {
            let (app, id) = find(session, &target).await?;
            let body = UpdateVolume { snapshot_retention, auto_backup_enabled: scheduled_snapshots };
            show(session, &session.client.put(&format!("/v1/apps/{app}/volumes/{id}"), &body).await?)
        }
        VolumeCommand::Fork { target, name, size } => {
            let (app, id) = find(session, &target).await?;
            let of: Volume = session.client.get(&format!("/v1/apps/{app}/volumes/{id}")).await?;
            let (name, source_volume_id) = (name.unwrap_or(of.name), Some(id));
            let size_gb = Some(size.unwrap_or(of.size_gb));
            create(session, &app, &CreateVolume { name, size_gb, source_volume_id, ..CreateVolume::default() }).await
        }
        VolumeCommand::Destroy { target, yes } => {
            let (app, id) = find(session, &target).await?;
            if !yes && !ui::confirm(&format!("Destroy {id} of {app}, its files and snapshots?"))? {
                return Err(CliError::failed("nothing was destroyed"));
            }
            session.client.delete::<Value>(&format!("/v1/apps/{app}/volumes/{id}")).await?;
            if session.json {
                ui::print_json(&json!({ "id": id, "destroyed": true }));
            } else {
                ui::print_line(&format!("destroyed {id}"));
            }
            Ok(Exit::Ok)
        }
        VolumeCommand::Snapshots(SnapshotsCommand::List(target)) => {
            let (app, id) = find(session, &target).await?;
            let snapshots: Vec<Snapshot> = session.client.get(&format!("/v1/apps/{app}/volumes/{id}/snapshots")).await?;
            if session.json {
                ui::print_json(&snapshots);
            } else {
                let rows: Vec<_> = snapshots.iter().map(snapshot_row).collect();
                ui::print_table(&["ID", "CREATED", "ON DISK", "KEPT"], &rows);
            }
            Ok(Exit::Ok)
        }
        VolumeCommand::Snapshots(SnapshotsCommand::Create(target)) => {
            let (app, id) = find(session, &target).await?;
            let path = format!("/v1/apps/{app}/volumes/{id}/snapshots");
            let snapshot: Snapshot = session.client.post(&path, &json!({})).await?;
            if session.json {
                ui::print_json(&snapshot);
            } else {
                ui::print_line(snapshot.id.as_str());
            }
            Ok(Exit::Ok)
        }
    }
}

async fn create(session: &Session, app: &AppName, body: &CreateVolume) -> Result<Exit, CliError> {
    show(session, &session.client.post(&format!("/v1/apps/{app}/volumes"), body).await?)
}

async fn extend(session: &Session, target: &VolumeArgs, size_gb: u32) -> Result<Exit, CliError> {
    let (app, id) = find(session, target).await?;
    let path = format!("/v1/apps/{app}/volumes/{id}/extend");
    let extended: Extended = session.client.put(&path, &ExtendVolume { size_gb }).await?;
    if session.json {
        ui::print_json(&extended);
        return Ok(Exit::Ok);
    }
    ui::print_line(&format!("{id} has {} GB", extended.volume.size_gb));
    if let (true, Some(machine)) = (extended.needs_restart, &extended.volume.attached_machine_id) {
        ui::print_line(&format!("machine {machine} sees that after `dunlin machine restart {machine}`"));
    }
    Ok(Exit::Ok)
}

/// Ids are unique on the platform, so that the app needs no naming.
async fn find(session: &Session, target: &VolumeArgs) -> Result<(AppName, dunlin_model::VolumeId), CliError> {
    let VolumeArgs { id, app } = target;
    if let Some(app) = app {
        return Ok((app.clone(), id.clone()));
    }
    let list: AppList = session.client.get("/v1/apps").await?;
    for app in list.apps {
        let volumes: Vec<Volume> = session.client.get(&format!("/v1/apps/{}/volumes", app.name)).await?;
        if volumes.iter().any(|volume| volume.id == *id) {
            return Ok((app.name, id.clone()));
        }
    }
    Err(CliError::failed(format!("there is no volume {id}")).hint("`dunlin volume list --app APP` shows an app's volumes"))
}

fn show(session: &Session, volume: &Volume) -> Result<Exit, CliError> {
    if session.json {
        ui::print_json(volume);
        return Ok(Exit::Ok);
    }
    let line = |name: &str, value: &str| ui::print_line(&format!("{name:9} {value}"));
    line("volume", volume.id.as_str());
    line("name", &volume.name);
    line("state", &volume.state);
    line("size", &format!("{} GB", volume.size_gb));
    line("used", &used(volume));
    line("region", volume.region.as_str());
    line("host", &volume.zone);
    line("machine", &machine(volume));
    line("encrypted", encrypted(volume));
    let made = if volume.auto_backup_enabled { "one a day" } else { "when asked for" };
    line("snapshots", &format!("{made}, kept {} days", volume.snapshot_retention));
    line("created", &volume.created_at);
    Ok(Exit::Ok)
}

fn row(volume: &Volume) -> Vec<String> {
    vec![
        volume.id.to_string(),
        volume.name.clone(),
        format!("{} GB", volume.size_gb),
        used(volume),
        volume.region.to_string(),
        encrypted(volume).to_owned(),
        machine(volume),
        volume.state.clone(),
    ]
}

fn encrypted(volume: &Volume) -> &'static str {
    if volume.encrypted { "yes" } else { "no" }
}

fn machine(volume: &Volume) -> String {
    volume.attached_machine_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// Of what its host last said; nothing, if it said nothing.
fn used(volume: &Volume) -> String {
    let used = volume.blocks.saturating_sub(volume.blocks_avail);
    match (used * 100).checked_div(volume.blocks) {
        Some(percent) => format!("{percent}%"),
        None => "unknown".into(),
    }
}

fn snapshot_row(snapshot: &Snapshot) -> Vec<String> {
    vec![
        snapshot.id.to_string(),
        snapshot.created_at.clone(),
        format!("{} MB", snapshot.size.div_ceil(1 << 20)),
        format!("{} days", snapshot.retention_days),
    ]
}
