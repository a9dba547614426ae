//! Volumes of this host: their files, and which machine has them.
//!
//! A volume is a directory `volumes/<id>` with `data.ext4` (the file system), `key` (sealed, of one that is encrypted),
//! `made` (it was whole once), `machine` (who has it), `mnt` and `snapshots/`. It is mounted on the host for as long as its
//! machine lives, so that the agent can ask how full it is, freeze and grow it; the machine gets an id-mapped view of that
//! mount.
//!
//! Files are made and grown as config facts say, and removed on a tombstone only.

use crate::agent::chain;
use crate::kill::kill_point;
use crate::promises::{DISK_KEPT_BYTES, Promise, Promises, Wanted};
use crate::{Shared, snapshots, volume_keys};
use dunlin_machine::Record;
use dunlin_model::volume::VolumeRow;
use dunlin_model::{MachineId, VolumeId};
use dunlin_runtime::Bind;
use dunlin_runtime::volume::{Grown, HEADER_BYTES, LoopVolume, MountedVolume, Usage, VolumeError, close};
use dunlin_view::ConfigState;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A machine that was just destroyed lets go of its volume within this.
const HANDOVER: Duration = Duration::from_secs(30);
/// The mounts of a machine that has ended, and copies of them in one that is being made, are gone within this.
const LET_GO: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
/// How often snapshots are looked at that may have expired.
const LOOK_AT_SNAPSHOTS: Duration = Duration::from_secs(3600);
/// How often what could not be done is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// One act at a time on a volume, and what is known of all.
#[derive(Default)]
pub struct Volumes {
    turns: Mutex<BTreeMap<VolumeId, Arc<Mutex<()>>>>,
    holders: Mutex<BTreeMap<VolumeId, MachineId>>,
    /// How full encrypted volumes are that nobody has: opening one to look takes some tenths of a second.
    looked: Mutex<BTreeMap<VolumeId, (Written, Usage)>>,
    /// Of the disk.
    pub(crate) promises: Arc<Promises>,
    /// It was tried, and works.
    pub(crate) encrypts: OnceLock<()>,
}

/// When a volume's file was last written to, and its length.
type Written = (SystemTime, u64);

/// How a volume is.
#[derive(Debug, Clone, Copy)]
pub struct State {
    pub usage: Usage,
    /// Grown while mounted where the kernel does not let us: larger from the next start of the machine on.
    pub needs_restart: bool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volumes {
    /// What the agent before this one wrote down. A freeze that it made ends here.
    pub fn open(data_dir: &Path) -> Self {
        let volumes = Self::default();
        for id in ids(data_dir) {
            let place = Place::of(data_dir, &id);
            let mended = match MountedVolume::find(&place.mnt()) {
                Ok(Some(mounted)) => mounted.thaw(),
                Ok(None) => close(&volume_keys::device_name(&id)),
                Err(error) => Err(error),
            };
            if let Err(error) = mended {
                tracing::error!(volume = %id, error = %chain(&error), "a volume may be frozen, or open without its machine");
            }
            let holder = fs::read_to_string(place.holder()).ok().and_then(|text| text.trim().parse().ok());
            if let Some(holder) = holder {
                lock(&volumes.holders).insert(id, holder);
            }
        }
        volumes
    }

    fn turn(&self, id: &VolumeId) -> Arc<Mutex<()>> {
        lock(&self.turns).entry(id.clone()).or_default().clone()
    }

    fn holder(&self, id: &VolumeId) -> Option<MachineId> {
        lock(&self.holders).get(id).cloned()
    }
}

/// Where a volume's files are.
pub(crate) struct Place(PathBuf);

impl Place {
    pub fn of(data_dir: &Path, id: &VolumeId) -> Self {
        Self(data_dir.join("volumes").join(id.as_str()))
    }
    pub fn data(&self) -> PathBuf {
        self.0.join("data.ext4")
    }
    pub fn key(&self) -> PathBuf {
        self.0.join("key")
    }
    fn made(&self) -> PathBuf {
        self.0.join("made")
    }
    fn holder(&self) -> PathBuf {
        self.0.join("machine")
    }
    fn mnt(&self) -> PathBuf {
        self.0.join("mnt")
    }
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    pub fn mounted(&self) -> Result<Option<MountedVolume>, String> {
        MountedVolume::find(&self.mnt()).map_err(|e| chain(&e))
    }
}

pub(crate) fn point(shared: &Shared, name: &str) {
    kill_point(shared.config.kill_at.as_deref(), name);
}

/// Runs `act` as the only one on a volume.
pub(crate) fn alone<T>(shared: &Shared, id: &VolumeId, act: impl FnOnce(&Place) -> T) -> T {
    let turn = shared.volumes.turn(id);
    let _turn = lock(&turn);
    act(&Place::of(&shared.config.data_dir, id))
}

/// Makes the volume if it was never made, in its size; grows one that is smaller.
pub fn ensure(shared: &Shared, row: &VolumeRow) -> Result<(), String> {
    alone(shared, &row.id, |place| ensure_alone(shared, row, place))
}

fn ensure_alone(shared: &Shared, row: &VolumeRow, place: &Place) -> Result<(), String> {
    if let Err(lack) = &shared.config.abilities.sizes {
        return Err(lack.refusal("have volumes"));
    }
    let io = |e: io::Error| format!("volume {}: {e}", row.id);
    let size_bytes = u64::from(row.size_gb) << 30;
    if !place.data().exists() {
        if place.made().exists() {
            return Err(format!(
                "the files of volume {} are gone from {}; restore one from a snapshot or a backup",
                row.id,
                place.0.display()
            ));
        }
        let _room = take_up(shared, row, place)?;
        for dir in [place.0.clone(), place.mnt(), place.snapshots()] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        }
        point(shared, "volume.before-make");
        make(shared, row, place, size_bytes)?;
        point(shared, "volume.after-make");
        tracing::info!(volume = %row.id, app = %row.app, size_gb = row.size_gb, "volume made");
    }
    if !place.made().exists() {
        write_synced(&place.made(), "").map_err(io)?;
    }
    let volume = open(shared, row, place)?;
    let has = volume.size_bytes().map_err(|e| chain(&e))?;
    if has < size_bytes {
        let _room = take_up(shared, row, place)?;
        let mounted = place.mounted()?;
        point(shared, "volume.before-grow");
        let grown = volume.grow(mounted.as_ref(), size_bytes).map_err(|e| chain(&e))?;
        point(shared, "volume.after-grow");
        tracing::info!(volume = %row.id, app = %row.app, size_gb = row.size_gb, now = grown == Grown::Now, "volume grown");
    }
    Ok(())
}

/// The volume's file, and what opens it.
pub(crate) fn open(shared: &Shared, row: &VolumeRow, place: &Place) -> Result<LoopVolume, String> {
    let volume = LoopVolume::open(&place.data()).map_err(|e| chain(&e))?;
    let encryption = volume_keys::of(shared, &row.id, place)?;
    if row.encrypted && encryption.is_none() {
        let key = place.key();
        return Err(format!("the key of volume {} is gone, without which nobody reads it; restore {}", row.id, key.display()));
    }
    Ok(volume.with_encryption(encryption))
}

fn make(shared: &Shared, row: &VolumeRow, place: &Place, size_bytes: u64) -> Result<(), String> {
    let encryption = volume_keys::give(shared, row, place)?;
    let file_bytes = size_bytes + if encryption.is_some() { HEADER_BYTES } else { 0 };
    let made = match &row.source {
        None => match encryption {
            Some(encryption) => LoopVolume::create_encrypted(&place.data(), size_bytes, encryption).map(drop),
            None => LoopVolume::create_reserved(&place.data(), size_bytes).map(drop),
        },
        Some(source) => {
            match &source.snapshot {
                Some(snapshot) => {
                    // Meanwhile nobody takes the snapshot away, nor what opens it.
                    let copied = alone(shared, &source.volume, |of| {
                        let file = of.snapshots().join(format!("{snapshot}.ext4"));
                        if !file.exists() {
                            return Err(format!("volume {} has no snapshot {snapshot} any more", source.volume));
                        }
                        snapshots::check(of, snapshot)?;
                        Ok(LoopVolume::create_copy(&place.data(), &file, file_bytes).map(drop))
                    });
                    copied?
                }
                None => {
                    // Versions before copied to a file of its own first, and a kill may have left it.
                    for name in ["source.ext4", "source.ext4.new"] {
                        let _ = fs::remove_file(place.0.join(name));
                    }
                    alone(shared, &source.volume, |of| {
                        let source = LoopVolume::open(&of.data()).map_err(|e| chain(&e))?;
                        let copied = || point(shared, "volume.after-source-copy");
                        Ok::<_, String>(source.fork(of.mounted()?.as_ref(), &place.data(), file_bytes, copied).map(drop))
                    })?
                }
            }
        }
    };
    made.map_err(|e| chain(&e))
}

/// Writes a consistent copy of a volume; its writers wait for the last part of it.
pub(crate) fn copy(of: &Place, to: &Path) -> Result<u64, String> {
    let volume = LoopVolume::open(&of.data()).map_err(|e| chain(&e))?;
    volume.snapshot(of.mounted()?.as_ref(), to).map_err(|e| chain(&e))
}

/// Whether its files are there.
pub(crate) fn is_made(shared: &Shared, id: &VolumeId) -> bool {
    Place::of(&shared.config.data_dir, id).made().exists()
}

/// The disk of the data directory, and what of it is free for volumes; whole GiB of both.
pub fn disk_gb(data_dir: &Path) -> Result<(u32, u32), String> {
    let (all, free) = disk(data_dir)?;
    let gb = |bytes: u64| u32::try_from(bytes >> 30).unwrap_or(u32::MAX);
    Ok((gb(all), gb(free.saturating_sub(DISK_KEPT_BYTES))))
}

/// The disk of the data directory, and what of it is free; bytes of both.
pub fn disk(data_dir: &Path) -> Result<(u64, u64), String> {
    let stat = nix::sys::statvfs::statvfs(data_dir).map_err(|e| format!("the disk cannot be asked for its room: {e}"))?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    Ok((bytes(stat.blocks()), bytes(stat.blocks_available())))
}

/// What the volume's file is to be.
fn wanted(row: &VolumeRow, place: &Place) -> Wanted {
    let header_bytes = if row.encrypted { HEADER_BYTES } else { 0 };
    Wanted { file: place.data(), bytes: (u64::from(row.size_gb) << 30) + header_bytes }
}

fn take_up(shared: &Shared, row: &VolumeRow, place: &Place) -> Result<Promise, String> {
    shared.volumes.promises.take_up(&shared.config.data_dir, wanted(row, place))
}

/// All volumes that desired state has here, but for those whose files are lost: they are not made again.
fn written(shared: &Shared) -> impl Iterator<Item = Wanted> {
    let config = shared.view.current().config.clone();
    let rows = config.volumes.values().filter(|row| row.host == shared.config.id && !config.volume_tombstones.contains_key(&row.id));
    let places = rows.map(|row| (row, Place::of(&shared.config.data_dir, &row.id)));
    let not_lost = places.filter(|(_, place)| place.data().exists() || !place.made().exists());
    not_lost.map(|(row, place)| wanted(row, &place)).collect::<Vec<_>>().into_iter()
}

/// Whether the disk has as much for a volume that control is about to write down.
pub fn offer(shared: &Shared, size_bytes: u64) -> Result<(), String> {
    shared.volumes.promises.offer(&shared.config.data_dir, size_bytes, written(shared))
}

/// Room for a file that is no volume's, for as long as it is made.
pub(crate) fn room_for(shared: &Shared, file: &Path, bytes: u64) -> Result<Promise, String> {
    let wanted = Wanted { file: file.to_owned(), bytes };
    shared.volumes.promises.begin(&shared.config.data_dir, wanted, written(shared))
}

/// How full it is.
pub fn state(shared: &Shared, row: &VolumeRow) -> Result<State, String> {
    alone(shared, &row.id, |place| {
        ensure_alone(shared, row, place)?;
        let volume = open(shared, row, place)?;
        let Some(mounted) = place.mounted()? else {
            return Ok(State { usage: usage_unmounted(shared, &row.id, &volume)?, needs_restart: false });
        };
        let fills = volume.size_bytes().and_then(|size_bytes| mounted.fills(size_bytes));
        let state = fills.and_then(|fills| Ok(State { usage: mounted.usage()?, needs_restart: !fills }));
        state.map_err(|e| chain(&e))
    })
}

/// Of a volume that nobody has.
pub(crate) fn usage_unmounted(shared: &Shared, id: &VolumeId, volume: &LoopVolume) -> Result<Usage, String> {
    let meta = fs::metadata(volume.path()).map_err(|e| format!("volume {id}: {e}"))?;
    let written = (meta.modified().map_err(|e| format!("volume {id}: {e}"))?, meta.len());
    let looked = lock(&shared.volumes.looked).get(id).copied();
    if let Some((_, usage)) = looked.filter(|(then, _)| *then == written) {
        return Ok(usage);
    }
    let usage = volume.usage().map_err(|e| chain(&e))?;
    if volume.is_encrypted() {
        lock(&shared.volumes.looked).insert(id.clone(), (written, usage));
    }
    Ok(usage)
}

/// Mounts a machine's volumes for it. Nothing of an earlier attempt of the machine lives.
pub fn attach(shared: &Shared, record: &Record) -> Result<Vec<Bind>, String> {
    let machine = &record.assignment.id;
    let view = shared.view.current();
    let mut binds = Vec::new();
    for mount in &record.spec().mounts {
        let row = view.config.volumes.get(&mount.volume).filter(|row| row.host == shared.config.id);
        let row = row.ok_or_else(|| format!("volume {} is not on this host", mount.volume))?;
        let deadline = Instant::now() + HANDOVER;
        let source = loop {
            match alone(shared, &row.id, |place| attach_alone(shared, row, machine, place)) {
                Ok(Attached::At(at)) => break at,
                Ok(Attached::Held(other)) if Instant::now() >= deadline => {
                    return Err(format!("machine {other} still has volume {}", row.id));
                }
                Ok(Attached::Held(_)) => std::thread::sleep(LOOK),
                Err(why) => return Err(why),
            }
        };
        binds.push(Bind { source, target: mount.path.clone().into(), readonly: false });
    }
    Ok(binds)
}

enum Attached {
    At(PathBuf),
    Held(MachineId),
}

fn attach_alone(shared: &Shared, row: &VolumeRow, machine: &MachineId, place: &Place) -> Result<Attached, String> {
    if let Some(other) = shared.volumes.holder(&row.id).filter(|holder| holder != machine) {
        return Ok(Attached::Held(other));
    }
    ensure_alone(shared, row, place)?;
    if place.mounted()?.is_some() {
        return Ok(Attached::At(place.mnt())); // by a spawn that was cut off
    }
    // Written before it is mounted: whatever happens from here, the machine's clean-up lets go of it.
    write_synced(&place.holder(), machine.as_str()).map_err(|e| format!("volume {}: {e}", row.id))?;
    lock(&shared.volumes.holders).insert(row.id.clone(), machine.clone());
    point(shared, "volume.before-mount");
    let volume = open(shared, row, place)?;
    let deadline = Instant::now() + LET_GO;
    loop {
        match volume.mount_ready(&place.mnt()) {
            Err(VolumeError::InUse { .. }) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Err(error) => return Err(format!("volume {}: {}", row.id, chain(&error))),
            Ok(_) => break,
        }
    }
    point(shared, "volume.after-mount");
    Ok(Attached::At(place.mnt()))
}

/// Takes the volumes of a machine from it; no process of it lives.
pub fn release(shared: &Shared, machine: &MachineId) -> Result<(), String> {
    let held: Vec<VolumeId> =
        lock(&shared.volumes.holders).iter().filter(|(_, holder)| *holder == machine).map(|(id, _)| id.clone()).collect();
    held.iter().try_for_each(|id| {
        alone(shared, id, |place| {
            point(shared, "volume.before-unmount");
            unmount(id, place)?;
            point(shared, "volume.after-unmount");
            match fs::remove_file(place.holder()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("volume {id}: {e}")),
                _ => {}
            }
            lock(&shared.volumes.holders).remove(id);
            Ok(())
        })
    })
}

/// Machines of which the journal knows nothing have no volumes either.
pub fn release_strangers(shared: &Shared, known: &BTreeSet<MachineId>) {
    let strangers: BTreeSet<MachineId> =
        lock(&shared.volumes.holders).values().filter(|holder| !known.contains(*holder)).cloned().collect();
    for machine in strangers {
        if let Err(error) = release(shared, &machine) {
            tracing::error!(%machine, error, "a machine that is not known keeps a volume");
        }
    }
}

fn unmount(id: &VolumeId, place: &Place) -> Result<(), String> {
    let deadline = Instant::now() + LET_GO;
    loop {
        let mounted = place.mounted()?;
        let is_last = mounted.is_none();
        match mounted.map_or_else(|| close(&volume_keys::device_name(id)), MountedVolume::unmount) {
            Ok(()) if is_last => return Ok(()),
            Ok(()) => {}
            Err(VolumeError::Busy(_)) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Err(error) => return Err(chain(&error)),
        }
    }
}

/// Unmounts all volumes of a data directory whose machines were ended.
pub fn unmount_all(data_dir: &Path) {
    for id in ids(data_dir) {
        if let Err(error) = unmount(&id, &Place::of(data_dir, &id)) {
            tracing::error!(volume = %id, error, "it stays mounted");
        }
    }
}

/// Brings the files to what config facts say, for as long as `lives`.
pub async fn follow(shared: Arc<Shared>, lives: impl Fn() -> bool) {
    let mut changes = shared.view.subscribe();
    let mut told = BTreeMap::new();
    let (mut done, mut looked) = (None, Instant::now());
    while lives() {
        let config = changes.current().config.clone();
        if done != Some(config.generation) || looked.elapsed() >= LOOK_AT_SNAPSHOTS {
            looked = Instant::now();
            let (turn, generation) = (shared.clone(), config.generation);
            let round = tokio::task::spawn_blocking(move || reconcile(&turn, &config));
            let Round { problems, waits } = round.await.unwrap_or_default(); // a panic was reported by itself
            for (id, why) in &problems {
                if told.get(id) != Some(why) {
                    tracing::warn!(volume = %id, why, "a volume is not as it should be");
                }
            }
            done = (problems.is_empty() && !waits).then_some(generation);
            told = problems;
        }
        let _ = tokio::time::timeout(AGAIN, changes.changed()).await; // looks again in any case
    }
}

#[derive(Default)]
struct Round {
    problems: BTreeMap<VolumeId, String>,
    /// For machines that are being destroyed, too.
    waits: bool,
}

fn reconcile(shared: &Shared, config: &ConfigState) -> Round {
    let ours = config.volumes.values().filter(|row| row.host == shared.config.id);
    let made = ours.filter(|row| !config.volume_tombstones.contains_key(&row.id));
    let made = made.filter_map(|row| Some((row.id.clone(), ensure(shared, row).err()?)));
    let old = ids(&shared.config.data_dir).into_iter().filter(|id| !config.volume_tombstones.contains_key(id));
    let old = old.filter_map(|id| Some((id.clone(), snapshots::expire(shared, &id).err()?)));
    let gone = config.volume_tombstones.iter().filter(|(_, host)| **host == shared.config.id);
    let mut round = Round { problems: made.chain(old).collect(), waits: false };
    for (id, _) in gone {
        match remove(shared, id) {
            Ok(Removed::Yes) => {}
            Ok(Removed::NotYet) => round.waits = true,
            Err(why) => drop(round.problems.insert(id.clone(), why)),
        }
    }
    round
}

enum Removed {
    Yes,
    /// A machine has it still.
    NotYet,
}

/// On its tombstone, once no machine has it.
fn remove(shared: &Shared, id: &VolumeId) -> Result<Removed, String> {
    alone(shared, id, |place| {
        if !place.0.exists() {
            return Ok(Removed::Yes);
        }
        if shared.volumes.holder(id).is_some() {
            return Ok(Removed::NotYet);
        }
        unmount(id, place)?;
        point(shared, "volume.before-remove");
        volume_keys::drop_key(id, place)?;
        dunlin_runtime::remove_tree(&place.0).map_err(|e| e.to_string())?;
        point(shared, "volume.after-remove");
        lock(&shared.volumes.looked).remove(id);
        tracing::info!(volume = %id, "volume destroyed");
        Ok(Removed::Yes)
    })
}

fn ids(data_dir: &Path) -> Vec<VolumeId> {
    let entries = fs::read_dir(data_dir.join("volumes")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// For root alone.
pub(crate) fn write_synced(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}
