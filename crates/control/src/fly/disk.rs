//! What a machine writes to: `rootfs`, `mounts` and `volumes`.

use super::Fields;
use super::programs::AskedContainer;
use crate::failure::Failure;
use dunlin_model::disk::{MAX_TEMP_DIRS, MachineRootfs, Persist, ROOTFS_GB, TEMP_DIR_MB, TempDir, TempStorage};
use dunlin_model::volume::{self, AutoExtend};
use dunlin_model::{Guest, Mount, VolumeId};
use std::collections::BTreeMap;

/// `older` is what `guest.persist_rootfs` says of the same.
pub(super) fn rootfs(fields: &mut Fields, older: Option<Persist>) -> Result<MachineRootfs, Failure> {
    let Some(mut given) = fields.object("rootfs")? else {
        return Ok(MachineRootfs { size_gb: 0, persist: older.unwrap_or_default() });
    };
    let persist = persist(&mut given, "persist")?;
    if persist.zip(older).is_some_and(|(newer, older)| newer != older) {
        return Err(given.wrong("persist", "guest.persist_rootfs says otherwise; leave that out"));
    }
    let size_gb = given.take::<u32>("size_gb")?.unwrap_or(0);
    if size_gb != 0 && !ROOTFS_GB.contains(&size_gb) {
        let why = format!("{size_gb} is not from {} to {}, nor 0 for the host's default", ROOTFS_GB.start(), ROOTFS_GB.end());
        return Err(given.wrong("size_gb", &why));
    }
    given.not_honoured("fs_size_gb", "the size is size_gb")?;
    given.finish()?;
    Ok(MachineRootfs { size_gb, persist: persist.or(older).unwrap_or_default() })
}

pub(super) fn persist(fields: &mut Fields, name: &str) -> Result<Option<Persist>, Failure> {
    let Some(word) = fields.text(name)? else { return Ok(None) };
    Persist::named(&word).map(Some).ok_or_else(|| fields.wrong(name, "use never, restart or always"))
}

/// Volumes by their ids, temporary directories by the names that `volumes` gives them: those that are mounted nowhere have
/// no path, see [`check_placed`].
pub(super) fn mounts(fields: &mut Fields, guest: &Guest) -> Result<(Vec<Mount>, Vec<TempDir>), Failure> {
    let mut declared = declared(fields)?;
    let all: Vec<String> = declared.keys().cloned().collect();
    let (mut mounts, mut temp_dirs, mut paths) = (vec![], vec![], Vec::<String>::new());
    for mut given in fields.objects("mounts", 1 + MAX_TEMP_DIRS)? {
        let (id, name) = (given.text("volume")?, given.text("name")?);
        let path = given.text("path")?.unwrap_or_default();
        volume::mount_path(&path).map_err(|why| given.wrong("path", why))?;
        check_beside(&given, &path, paths.iter().map(String::as_str))?;
        paths.push(path.clone());
        for name in ["encrypted", "size_gb"] {
            given.not_honoured(name, "that is the volume's own, and nothing that a machine changes")?;
        }
        let (percent, add, limit) = (given.take("extend_threshold_percent")?, given.take("add_size_gb")?, given.take("size_gb_limit")?);
        let extend = AutoExtend::read(percent, add, limit).map_err(|(name, why)| given.wrong(name, &why))?;
        let temporary = id.as_ref().or(name.as_ref()).and_then(|name| declared.remove_entry(name));
        match (temporary, id) {
            (Some(_), _) if extend.is_some() => {
                return Err(given.wrong("extend_threshold_percent", "a temporary directory does not grow; give it a larger size_mb"));
            }
            (Some((name, (storage, size_mb))), _) => temp_dirs.push(TempDir { name, path, storage, size_mb }),
            (None, Some(_)) if !mounts.is_empty() => return Err(given.wrong("volume", "a machine has at most one volume")),
            (None, Some(id)) => {
                let volume = id.parse::<VolumeId>().map_err(|error| given.wrong("volume", &format!("{error}")))?;
                let name = name.unwrap_or_default();
                if all.contains(&name) {
                    return Err(given.wrong("name", "an entry of config.volumes has it"));
                }
                mounts.push(Mount { volume, name, path, extend });
            }
            (None, None) if name.is_some() => return Err(given.wrong("name", "no entry of config.volumes has it, or a mount before has taken it")),
            (None, None) => return Err(given.wrong("volume", "name the volume by its id")),
        }
        given.finish()?;
    }
    // Containers name those that they see, whether or not config.mounts does.
    let left = declared.into_iter().map(|(name, (storage, size_mb))| TempDir { name, path: String::new(), storage, size_mb });
    temp_dirs.extend(left);
    let in_memory: u64 = temp_dirs.iter().filter(|dir| dir.storage == TempStorage::Memory).map(|dir| u64::from(dir.size_mb)).sum();
    if in_memory > u64::from(guest.memory_mb) {
        let why = format!(
            "config.volumes: temporary directories of {in_memory} MiB in memory are more than the machine's {} MiB", guest.memory_mb
        );
        return Err(Failure::invalid(why).hint("they count as its memory; make them smaller, or use storage_type disk"));
    }
    Ok((mounts, temp_dirs))
}

/// Each temporary directory is in the machine's root file system, or in that of one container.
pub(super) fn check_placed(temp_dirs: &[TempDir], containers: &[AskedContainer]) -> Result<(), Failure> {
    for dir in temp_dirs {
        let named = containers.iter().flat_map(AskedContainer::mounts).filter(|mount| mount.name == dir.name).count();
        let (why, hint) = match (containers.is_empty(), named) {
            (true, _) if dir.path.is_empty() => ("is mounted nowhere", "add it to config.mounts"),
            (false, 0) => ("is mounted nowhere", "add it to the mounts of a container"),
            (false, 2..) => ("is mounted twice, and not shared by containers", "give each a temporary directory of its own, or a volume to share"),
            _ => continue,
        };
        return Err(Failure::invalid(format!("config.volumes: {:?} {why}", dir.name)).hint(hint));
    }
    Ok(())
}

/// A mount's path is neither below nor above another's.
pub(super) fn check_beside<'a>(given: &Fields, path: &str, mut others: impl Iterator<Item = &'a str>) -> Result<(), Failure> {
    match others.find(|other| is_within(path, other) || is_within(other, path)) {
        Some(other) => Err(given.wrong("path", &format!("{other} is a mount already, and one would hide the other"))),
        None => Ok(()),
    }
}

type Declared = BTreeMap<String, (TempStorage, u32)>;

fn declared(fields: &mut Fields) -> Result<Declared, Failure> {
    let mut declared = Declared::new();
    for mut given in fields.objects("volumes", MAX_TEMP_DIRS)? {
        let name = given.text("name")?.unwrap_or_default();
        let is_fine = (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
        if !is_fine {
            return Err(given.wrong("name", "use 1 to 63 letters, digits, dashes and underscores"));
        }
        given.not_honoured("image", "images are those of the machine and its containers; use temp_dir")?;
        let mut dir = given.object("temp_dir")?.ok_or_else(|| given.wrong("temp_dir", "it is missing"))?;
        let storage = match dir.text("storage_type")?.as_deref() {
            None | Some("disk") => TempStorage::Disk,
            Some("memory") => TempStorage::Memory,
            Some(_) => return Err(dir.wrong("storage_type", "use disk or memory")),
        };
        let size_mb = dir.number("size_mb", TEMP_DIR_MB)?.ok_or_else(|| dir.wrong("size_mb", "it is missing"))?;
        dir.finish()?;
        if declared.insert(name.clone(), (storage, size_mb)).is_some() {
            return Err(given.wrong("name", &format!("{name:?} is there twice")));
        }
        given.finish()?;
    }
    Ok(declared)
}

fn is_within(path: &str, other: &str) -> bool {
    std::path::Path::new(path).starts_with(other)
}
