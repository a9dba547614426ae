//! Snapshots of volumes: sparse copies beside the volume, on the same disk, with a time after which they go.

use crate::agent::chain;
use crate::volumes::{Place, alone, copy, room};
use crate::{Shared, now_ms};
use dunlin_api::VolumeSnapshot;
use dunlin_model::volume::VolumeRow;
use dunlin_model::{SnapshotId, VolumeId};
use dunlin_runtime::volume::LoopVolume;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// Of one volume; more have to be asked for after some have expired.
const SNAPSHOTS_MAX: usize = 100;
const DAY_MS: u64 = 24 * 3600 * 1000;

/// Those that are whole, oldest first.
pub fn list(shared: &Shared, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, String> {
    alone(shared, id, of)
}

fn of(place: &Place) -> Result<Vec<VolumeSnapshot>, String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(place.snapshots()).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "json") {
            let text = fs::read(entry.path()).map_err(|e| e.to_string())?;
            let snapshot = serde_json::from_slice::<VolumeSnapshot>(&text);
            found.push(snapshot.map_err(|e| format!("{}: {e}", entry.path().display()))?);
        }
    }
    found.sort_by_key(|snapshot: &VolumeSnapshot| (snapshot.created_at_ms, snapshot.id.clone()));
    Ok(found)
}

fn described(place: &Place, id: &SnapshotId) -> PathBuf {
    place.snapshots().join(format!("{id}.json"))
}

/// Makes the snapshot, once: a repeat gets the first one.
pub fn make(shared: &Shared, row: &VolumeRow, id: &SnapshotId) -> Result<VolumeSnapshot, String> {
    alone(shared, &row.id, |place| {
        let there = of(place)?;
        if let Some(snapshot) = there.iter().find(|snapshot| snapshot.id == *id) {
            return Ok(snapshot.clone());
        }
        if there.len() >= SNAPSHOTS_MAX {
            return Err(format!("volume {} has {SNAPSHOTS_MAX} snapshots; wait until some expire", row.id));
        }
        let volume = LoopVolume::open(&place.data()).map_err(|e| chain(&e))?;
        let usage = match place.mounted()? {
            Some(mounted) => mounted.usage(),
            None => volume.usage(),
        };
        let usage = usage.map_err(|e| chain(&e))?;
        room(&shared.config.data_dir, (usage.blocks - usage.blocks_free) * usage.block_size)?;
        let size = copy(place, &place.snapshots().join(format!("{id}.ext4")))?;
        let snapshot = VolumeSnapshot {
            id: id.clone(),
            created_at_ms: now_ms(),
            size,
            volume_size: volume.size_bytes().map_err(|e| chain(&e))?,
            retention_days: row.snapshot_retention,
        };
        describe(place, &snapshot).map_err(|e| format!("snapshot {id}: {e}"))?;
        tracing::info!(volume = %row.id, snapshot = %id, size, "snapshot made");
        Ok(snapshot)
    })
}

/// Last: a copy without a description is none, and is removed with those that expired.
fn describe(place: &Place, snapshot: &VolumeSnapshot) -> io::Result<()> {
    let (path, unfinished) = (described(place, &snapshot.id), place.snapshots().join("unfinished"));
    let mut file = File::create(&unfinished)?;
    file.write_all(&serde_json::to_vec(snapshot)?)?;
    file.sync_all()?;
    fs::rename(&unfinished, &path)?;
    File::open(place.snapshots())?.sync_all()
}

/// Removes what has expired, and what a crash left half made.
pub fn expire(shared: &Shared, id: &VolumeId) -> Result<(), String> {
    alone(shared, id, |place| {
        let now = now_ms();
        let lasts = |snapshot: &VolumeSnapshot| {
            now < snapshot.created_at_ms.saturating_add(u64::from(snapshot.retention_days).saturating_mul(DAY_MS))
        };
        let kept: Vec<SnapshotId> = of(place)?.into_iter().filter(lasts).map(|snapshot| snapshot.id).collect();
        for entry in fs::read_dir(place.snapshots()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let stem = name.split('.').next().unwrap_or_default();
            if !kept.iter().any(|id| id.as_str() == stem) {
                tracing::info!(volume = %id, file = %name, "a snapshot's file is removed: it has expired, or was never whole");
                fs::remove_file(entry.path()).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    })
}
