//! The file systems that a machine writes to beside its volumes: the writable layer of its root, and temporary
//! directories.
//!
//! `layers/` of the data directory has the templates, `machines/<id>/kept/` the layers that outlive an attempt. All are
//! sparse: they take up disk as they fill. So a reserve of the disk is nobody's, see [`room`].

use crate::agent::chain;
use crate::{Shared, volumes};
use dunlin_model::disk::{Persist, TempStorage};
use dunlin_model::{Container, MachineId, MachineSpec};
use dunlin_runtime::layer::{self, WritableLayer};
use dunlin_runtime::{TempDir, TempStorage as Storage};
use std::path::{Path, PathBuf};

/// Images, logs, the journal and machines that run already need it. Of a small disk, a twentieth.
const RESERVE_BYTES: u64 = 2 << 30;
const RESERVE_PART: u64 = 20;

/// What a root file system of a version writes to: that of a container, or the machine's one.
pub fn of_root(shared: &Shared, id: &MachineId, spec: &MachineSpec, container: Option<&Container>) -> WritableLayer {
    let has_size = shared.config.abilities.sizes.is_ok();
    let kept = |name: &str| {
        let of = container.map_or(String::new(), |container| format!(".{}", container.name));
        let dir = kept_dir(shared, id);
        match has_size {
            true => WritableLayer::Kept { file: dir.join(format!("{name}{of}.ext4")) },
            false => WritableLayer::KeptDirectory { dir: dir.join(format!("{name}{of}")) },
        }
    };
    match spec.rootfs.persist {
        Persist::Never if !has_size => WritableLayer::Directory,
        Persist::Never => WritableLayer::Passing { template: layer::template_path(&templates(shared), size_bytes(shared, spec), false) },
        Persist::Restart => kept(spec.version.as_str()),
        Persist::Always => kept("always"),
    }
}

/// Those of a container, or of the machine's one root file system.
pub fn temp_dirs(shared: &Shared, spec: &MachineSpec, container: Option<&Container>) -> Vec<TempDir> {
    let storage = |dir: &dunlin_model::disk::TempDir| match dir.storage {
        TempStorage::Memory => Storage::Memory { size_bytes: u64::from(dir.size_mb) << 20 },
        TempStorage::Disk if shared.config.abilities.sizes.is_err() => Storage::Disk(WritableLayer::Directory),
        TempStorage::Disk => {
            let template = layer::template_path(&templates(shared), temp_bytes(dir.size_mb), false);
            Storage::Disk(WritableLayer::Passing { template })
        }
    };
    let path = |dir: &dunlin_model::disk::TempDir| match container {
        None => Some(dir.path.clone()),
        Some(container) => container.mounts.iter().find(|mount| mount.name == dir.name).map(|mount| mount.path.clone()),
    };
    let placed = spec.temp_dirs.iter().filter_map(|dir| Some((path(dir)?, storage(dir))));
    placed.map(|(path, storage)| TempDir { target: path.into(), storage }).collect()
}

/// Makes what machines of a version begin with, if it is not there.
pub fn make_templates(shared: &Shared, spec: &MachineSpec) -> Result<(), String> {
    if shared.config.abilities.sizes.is_err() {
        return Ok(());
    }
    let kept = spec.rootfs.persist != Persist::Never;
    let on_disk = spec.temp_dirs.iter().filter(|dir| dir.storage == TempStorage::Disk);
    let sizes = on_disk.map(|dir| (temp_bytes(dir.size_mb), false)).chain([(size_bytes(shared, spec), kept)]);
    let mut made = sizes.map(|(size, kept)| layer::template(&templates(shared), size, kept));
    made.try_for_each(|made| made.map(drop)).map_err(|e| chain(&e))
}

/// Before an attempt, when nothing of the machine lives: all that its layers need is there, and what it wrote in a version that
/// is over is gone.
pub fn make_ready(shared: &Shared, id: &MachineId, spec: &MachineSpec) -> Result<(), String> {
    make_templates(shared, spec)?;
    let dir = kept_dir(shared, id);
    let roots: Vec<Option<&Container>> =
        if spec.containers.is_empty() { vec![None] } else { spec.containers.iter().map(Some).collect() };
    let kept = roots.into_iter().filter_map(|container| match of_root(shared, id, spec, container) {
        WritableLayer::Kept { file } | WritableLayer::KeptDirectory { dir: file } => Some(file),
        WritableLayer::Passing { .. } | WritableLayer::Directory => None,
    });
    let kept: Vec<PathBuf> = kept.collect();
    layer::remove_other_kept(&dir, &kept).map_err(|e| format!("what an earlier version wrote cannot be removed: {e}"))?;
    if shared.config.abilities.sizes.is_err() {
        return Ok(()); // a directory is made when it is mounted
    }
    let mut made = kept.iter().map(|file| layer::ready_kept(file, &templates(shared), size_bytes(shared, spec)));
    made.try_for_each(|made| made).map_err(|e| {
        format!("what it wrote to its root file system cannot be used, and begins anew with rootfs.persist = \"never\": {}", chain(&e))
    })
}

fn templates(shared: &Shared) -> PathBuf {
    shared.config.data_dir.join("layers")
}

fn kept_dir(shared: &Shared, id: &MachineId) -> PathBuf {
    shared.machine_dir(id.as_str()).join("kept")
}

fn size_bytes(shared: &Shared, spec: &MachineSpec) -> u64 {
    let gb = if spec.rootfs.size_gb == 0 { shared.config.rootfs_gb } else { spec.rootfs.size_gb };
    u64::from(gb) << 30
}

/// Each size has a template: small ones are powers of two, large ones whole GiB.
fn temp_bytes(size_mb: u32) -> u64 {
    let mb = if size_mb < 1024 { size_mb.next_power_of_two() } else { size_mb.next_multiple_of(1024) };
    u64::from(mb) << 20
}

/// Whether the disk has room for another machine that writes.
pub fn room(data_dir: &Path) -> Result<(), String> {
    let (all, free) = volumes::disk(data_dir)?;
    let reserve = reserve(all);
    if free >= reserve {
        return Ok(());
    }
    Err(format!("{} MiB of its disk are free, and {} are kept for what is there; free some space", free >> 20, reserve >> 20))
}

fn reserve(disk_bytes: u64) -> u64 {
    RESERVE_BYTES.min(disk_bytes / RESERVE_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_directories_have_few_sizes_and_never_less_than_was_asked_for() {
        let sizes: std::collections::BTreeSet<u64> = (16..=100 * 1024).map(temp_bytes).collect();
        assert!(sizes.len() <= 107, "{}", sizes.len());
        assert!((16..=100 * 1024).all(|mb| temp_bytes(mb) >= u64::from(mb) << 20 && temp_bytes(mb) < u64::from(mb) << 22));
        assert_eq!((temp_bytes(16), temp_bytes(100), temp_bytes(1025)), (16 << 20, 128 << 20, 2 << 30));
    }

    #[test]
    fn a_small_disk_keeps_a_part() {
        assert_eq!((reserve(2 << 30), reserve(1 << 40)), ((2 << 30) / 20, 2 << 30));
    }
}
