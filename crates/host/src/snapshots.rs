//! Snapshots of volumes: sparse copies beside the volume, on the same disk, with a time after which they go.
//!
//! One a day is made by itself where the volume's row says so. Days are counted from when the volume was made, so that
//! not all are copied at once. What was made is on disk and nowhere else: a host that was killed, or off, makes the one
//! of the day that it finds missing.

use crate::agent::chain;
use crate::volumes::{self, Place, alone, copy, point, room_for};
use crate::{Shared, digest, now_ms};
use dunlin_api::{Refusal, VolumeSnapshot};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{SnapshotId, VolumeId};
use dunlin_runtime::volume::LoopVolume;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of one volume; more have to be asked for after some have expired.
const SNAPSHOTS_MAX: usize = 100;
const DAY_MS: u64 = 24 * 3600 * 1000;

/// How often it is looked whether one is due.
const LOOK: Duration = Duration::from_secs(60);
/// What could not be made is not tried again and again: a copy may be large.
const AFTER_FAILURE: Duration = Duration::from_secs(3600);

/// Makes what is due, one after the other, for as long as `lives`.
pub async fn follow(shared: Arc<Shared>, lives: impl Fn() -> bool) {
    let mut failed: BTreeMap<VolumeId, Instant> = BTreeMap::new();
    while lives() {
        failed.retain(|_, at| at.elapsed() < AFTER_FAILURE);
        let config = shared.view.current().config.clone();
        let ours = config.volumes.values().filter(|row| row.host == shared.config.id && row.auto_backup);
        let wanted = ours.filter(|row| !config.volume_tombstones.contains_key(&row.id) && !failed.contains_key(&row.id));
        for row in wanted.cloned().collect::<Vec<_>>() {
            let (turn, id) = (shared.clone(), row.id.clone());
            let made = tokio::task::spawn_blocking(move || make_if_due(&turn, &row)).await;
            if let Ok(Err(why)) = made {
                tracing::warn!(volume = %id, why, "the snapshot of the day could not be made; tried again in an hour");
                failed.insert(id, Instant::now());
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn make_if_due(shared: &Shared, row: &VolumeRow) -> Result<(), String> {
    if !volumes::is_made(shared, &row.id) {
        return Ok(());
    }
    let made: Vec<u64> = list(shared, &row.id)?.iter().filter(|made| made.scheduled).map(|made| made.created_at_ms).collect();
    match due(row.created_at_ms, &made, now_ms()) {
        Some(day) => make(shared, row, &id_of(&row.id, day), For::Schedule).map(drop).map_err(|refusal| refusal.to_string()),
        None => Ok(()),
    }
}

/// The day of the volume's life that has no snapshot yet. The first one ends before there is any.
fn due(created_at_ms: u64, made: &[u64], now_ms: u64) -> Option<u64> {
    let day_of = |at_ms: u64| at_ms.saturating_sub(created_at_ms) / DAY_MS;
    let today = day_of(now_ms);
    (today > 0 && !made.iter().any(|at_ms| day_of(*at_ms) == today)).then_some(today)
}

/// The same for the same day: a repeat makes no other.
fn id_of(volume: &VolumeId, day: u64) -> SnapshotId {
    let digest = Sha256::digest(format!("{volume} {day}"));
    SnapshotId::from_random(std::array::from_fn(|at| digest[at]))
}

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

/// Who wants a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum For {
    Somebody,
    /// One a day.
    Schedule,
}

/// Makes the snapshot, once: a repeat gets the first one.
pub fn make(shared: &Shared, row: &VolumeRow, id: &SnapshotId, whom: For) -> Result<VolumeSnapshot, Refusal> {
    alone(shared, &row.id, |place| {
        let there = of(place).map_err(Refusal::Failed)?;
        if let Some(snapshot) = there.iter().find(|snapshot| snapshot.id == *id) {
            return Ok(snapshot.clone());
        }
        if there.len() >= SNAPSHOTS_MAX {
            return Err(Refusal::Failed(format!("volume {} has {SNAPSHOTS_MAX} snapshots; wait until some expire", row.id)));
        }
        let file = place.snapshots().join(format!("{id}.ext4"));
        let volume = volumes::open(shared, row, place).map_err(Refusal::Failed)?;
        let bytes = bytes_of(shared, row, place, &volume).map_err(Refusal::Failed)?;
        let no_room = |why| Refusal::InsufficientCapacity { host: shared.config.id.clone(), why };
        let _room = room_for(shared, &file, bytes).map_err(no_room)?;
        make_file(shared, row, place, &volume, (id, &file, whom)).map_err(Refusal::Failed)
    })
}

/// About what a copy takes up.
fn bytes_of(shared: &Shared, row: &VolumeRow, place: &Place, volume: &LoopVolume) -> Result<u64, String> {
    let usage = match place.mounted()? {
        Some(mounted) => mounted.usage().map_err(|e| chain(&e))?,
        None => volumes::usage_unmounted(shared, &row.id, volume)?,
    };
    Ok((usage.blocks - usage.blocks_free) * usage.block_size)
}

fn make_file(
    shared: &Shared,
    row: &VolumeRow,
    place: &Place,
    volume: &LoopVolume,
    (id, file, whom): (&SnapshotId, &Path, For),
) -> Result<VolumeSnapshot, String> {
    point(shared, "volume.before-snapshot");
    let created_at_ms = now_ms();
    let size = copy(place, file)?;
    point(shared, "volume.after-snapshot-copy");
    let snapshot = VolumeSnapshot {
        id: id.clone(),
        created_at_ms,
        size,
        volume_size: volume.size_bytes().map_err(|e| chain(&e))?,
        digest: digest::of(file).map_err(|e| format!("{}: {e}", file.display()))?,
        scheduled: whom == For::Schedule,
        retention_days: row.snapshot_retention,
    };
    describe(place, &snapshot).map_err(|e| format!("snapshot {id}: {e}"))?;
    point(shared, "volume.after-snapshot");
    tracing::info!(volume = %row.id, snapshot = %id, size, scheduled = snapshot.scheduled, "snapshot made");
    Ok(snapshot)
}

/// Whether the copy is still what was copied.
pub(crate) fn check(place: &Place, id: &SnapshotId) -> Result<(), String> {
    let Some(snapshot) = of(place)?.into_iter().find(|snapshot| snapshot.id == *id) else {
        return Err(format!("snapshot {id} is not whole; choose another one"));
    };
    let file = place.snapshots().join(format!("{id}.ext4"));
    let digest = digest::of(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    if snapshot.digest.is_empty() || snapshot.digest == digest {
        return Ok(());
    }
    Err(format!("the disk has damaged snapshot {id}: it was {} and is {digest}; choose another one", snapshot.digest))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_due_each_day_of_the_volumes_life() {
        let made_at = 5 * DAY_MS + 1000;
        let at = |days: u64, ms: u64| made_at + days * DAY_MS + ms;
        for (made, now, expected) in [
            (vec![], at(0, DAY_MS - 1), None),
            (vec![], at(1, 0), Some(1)),
            (vec![at(1, 60_000)], at(1, DAY_MS - 1), None),
            (vec![at(1, DAY_MS - 1)], at(2, 0), Some(2)),
            // The host was off.
            (vec![at(1, 0)], at(9, 5), Some(9)),
            // Its clock was set back.
            (vec![at(9, 5)], at(2, 5), Some(2)),
            (vec![], made_at - 1, None),
        ] {
            assert_eq!(due(made_at, &made, now), expected, "{made:?} at {now}");
        }
    }

    #[test]
    fn ids_are_of_a_volume_and_a_day() {
        let of = |n: u8, day| id_of(&VolumeId::from_random([n; 8]), day);
        assert_eq!(of(1, 1), of(1, 1));
        assert!(of(1, 1) != of(1, 2) && of(1, 1) != of(2, 1));
    }
}
