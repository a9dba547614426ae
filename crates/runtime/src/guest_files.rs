//! Files that a machine finds when it starts.
//!
//! Written by its first process, as root of the machine's ids, after it has left the host's root: a link of the image
//! ends in the machine, wherever it leads. Those that may be secrets are on a tmpfs to which nothing but the binds of
//! single files refers; on disk there are empty files in their places. The supervisor makes the tmpfs, because only root of the
//! computer may have one that is never swapped; the machine's first process writes to it, so it counts as the machine's memory.

use crate::rootfs::place;
use crate::spec::{GuestFile, Profile, SupervisorSpec};
use crate::sys;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;

const ROOT: &str = "/";

/// `store` is for those that are in memory only, and is there if there are such.
pub(crate) fn write(spec: &SupervisorSpec, store: Option<OwnedFd>) -> io::Result<()> {
    let explain = |file: &GuestFile, e: io::Error| {
        let why = match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
            Errno::EXDEV => "its path leads to a volume, or to a file system that the platform makes".to_owned(),
            Errno::EEXIST => "a link of the image is in its path, and leads nowhere".to_owned(),
            _ => e.to_string(),
        };
        io::Error::new(e.kind(), format!("file {}: {why}", file.path.display()))
    };
    // /proc and a volume of the machine have their own rules; only a builder's files may be in its caches.
    let resolve = match spec.profile {
        Profile::Tenant => ResolveFlag::RESOLVE_NO_XDEV,
        Profile::Builder => ResolveFlag::empty(),
    };
    let (kept, in_memory): (Vec<&GuestFile>, Vec<&GuestFile>) = spec.files.iter().partition(|file| file.on_disk);
    for file in kept {
        write_one(file, resolve).map_err(|e| explain(file, e))?;
    }
    if in_memory.is_empty() {
        return Ok(());
    }
    let tree = store.ok_or_else(|| io::Error::other("there is no place in memory for the files of secrets"))?;
    let store = Path::new("/dev/.files");
    fs::create_dir(store)?;
    sys::attach_mount(&tree, File::open(store)?.as_fd())?;
    drop(tree);
    for (nth, file) in in_memory.into_iter().enumerate() {
        bind_one(file, &store.join(nth.to_string()), resolve).map_err(|e| explain(file, e))?;
    }
    umount2(store, MntFlags::MNT_DETACH)?;
    fs::remove_dir(store)
}

/// Into the machine's writable layer. What stands there may be anything that an image holds, a pipe too.
fn write_one(file: &GuestFile, resolve: ResolveFlag) -> io::Result<()> {
    place(Path::new(ROOT), &file.path, false, 0, resolve)?;
    let root = openat(AT_FDCWD, ROOT, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let how = OpenHow::new()
        .flags(OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | resolve);
    let mut opened = File::from(openat2(&root, &file.path, how)?);
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other("the image has something else than a file there"));
    }
    opened.set_len(0)?;
    opened.write_all(&file.content)?;
    fchown(&opened, Some(0), Some(0))?;
    opened.set_permissions(Permissions::from_mode(file.mode))
}

fn bind_one(file: &GuestFile, source: &Path, resolve: ResolveFlag) -> io::Result<()> {
    fs::write(source, &file.content)?;
    fs::set_permissions(source, Permissions::from_mode(file.mode))?;
    let set = sys::READ_ONLY_MOUNT | sys::NO_SUID_MOUNT | sys::NO_DEVICES_MOUNT;
    let tree = sys::detached_mount(source, sys::Attributes { set, clear: 0 }, None)?;
    let target = place(Path::new(ROOT), &file.path, false, 0, resolve)?;
    sys::attach_mount(&tree, target.as_fd())
}
