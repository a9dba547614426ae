//! Tries the mounts of a machine: user namespace, overlayfs, id-mapped lower layers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{Outcome, c_path, missing};

/// As a machine's range; nothing runs with it here.
fn mapped_base() -> u32 {
    if super::in_user_namespace() { 1 } else { 1_000_000 }
}
const MAPPED_COUNT: u32 = 65_536;

const OPEN_TREE_CLONE: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

pub(super) fn user_namespaces() -> Outcome {
    match mapped_namespace() {
        Ok(_) => Ok("can be made and mapped".to_owned()),
        Err(error) => missing(
            format!("cannot be made: {error}"),
            "sysctl -w user.max_user_namespaces=65536; a kernel with CONFIG_USER_NS",
        ),
    }
}

/// Both at once, as they share the set-up: overlayfs on the file system of `near`, then with an id-mapped lower layer.
/// Runs on a thread of its own, whose mount namespace ends with it.
pub(super) fn overlay_and_idmap(near: &Path) -> (Outcome, Outcome) {
    let fix = "put the data directory on ext4, xfs or btrfs, with a kernel of at least 5.19";
    let scratch = near.join(format!(".dunlin-check-{}", std::process::id()));
    let prepared = prepare(&scratch);
    let outcomes = match &prepared {
        Err(error) => {
            let found = format!("cannot try at {}: {error}", near.display());
            (missing(found.clone(), fix), missing(found, fix))
        }
        Ok(()) => {
            let plain = overlay(&scratch, "lower").and_then(|()| owner_is(&scratch.join("merged/file"), 0));
            let mapped = idmap(&scratch)
                .and_then(|()| owner_is(&scratch.join("mapped/file"), mapped_base()))
                .and_then(|()| overlay(&scratch, "mapped"))
                .and_then(|()| owner_is(&scratch.join("merged/file"), mapped_base()));
            (outcome(plain, near, fix), outcome(mapped, near, fix))
        }
    };
    if let Err(error) = clean(&scratch) {
        tracing::warn!(path = %scratch.display(), %error, "a directory of the feature check stays behind");
    }
    outcomes
}

fn outcome(tried: io::Result<()>, near: &Path, fix: &str) -> Outcome {
    match tried {
        Ok(()) => Ok(format!("works at {}", near.display())),
        Err(error) => missing(format!("does not work at {}: {error}", near.display()), fix),
    }
}

fn prepare(scratch: &Path) -> io::Result<()> {
    for dir in ["lower", "upper", "work", "mapped", "merged"] {
        std::fs::create_dir_all(scratch.join(dir))?;
    }
    std::fs::write(scratch.join("lower/file"), b"x")?;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

/// Unmounts first: a directory that is a mount point here cannot be removed here.
fn clean(scratch: &Path) -> io::Result<()> {
    for dir in ["merged", "merged", "mapped"] {
        match nix::mount::umount2(&scratch.join(dir), nix::mount::MntFlags::MNT_DETACH) {
            // Not mounted: the check ended before.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match std::fs::remove_dir_all(scratch) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn overlay(scratch: &Path, lower: &str) -> io::Result<()> {
    let at = |dir: &str| scratch.join(dir).display().to_string();
    let (upper, work) = (format!("upper/{lower}"), format!("work/{lower}"));
    std::fs::create_dir_all(scratch.join(&upper))?;
    std::fs::create_dir_all(scratch.join(&work))?;
    let mut options = format!("lowerdir={},upperdir={},workdir={}", at(lower), at(&upper), at(&work));
    if super::in_user_namespace() {
        options.push_str(",userxattr");
    }
    mount(Some("overlay"), &scratch.join("merged"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(())
}

fn owner_is(path: &Path, uid: u32) -> io::Result<()> {
    let found = std::fs::metadata(path)?.uid();
    if found == uid { Ok(()) } else { Err(io::Error::other(format!("a file belongs to {found} instead of {uid}"))) }
}

fn idmap(scratch: &Path) -> io::Result<()> {
    let namespace = mapped_namespace()?;
    let (from, to): (PathBuf, PathBuf) = (scratch.join("lower"), scratch.join("mapped"));
    let (from, to) = (c_path(&from)?, c_path(&to)?);
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
    // SAFETY: the path ends in NUL; a result that is not negative is a descriptor that only we own.
    let tree = unsafe {
        let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags);
        owned(fd)?
    };
    let namespace_fd = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = libc::mount_attr { attr_set: MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd: namespace_fd };
    // SAFETY: the empty path ends in NUL, and pointer and size describe `attributes`.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    // SAFETY: both paths end in NUL and the descriptor is open.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
}

/// A user namespace that maps 0 to a machine's range. A short-lived child makes it, as a thread cannot.
fn mapped_namespace() -> io::Result<File> {
    let (ready_read, ready_write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let (go_read, go_write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: between fork and `_exit` the child makes plain system calls only, so it needs no lock that another thread
    // of the parent may hold.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => unsafe {
            let mut byte = 1_u8;
            libc::close(go_write.as_raw_fd());
            if libc::unshare(libc::CLONE_NEWUSER) == 0 {
                byte = 0;
            }
            libc::write(ready_write.as_raw_fd(), (&raw const byte).cast(), 1);
            libc::read(go_read.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0);
        },
        pid => pid,
    };
    drop((ready_write, go_read));
    let made = map(pid, ready_read);
    // By signal: closing the pipe would not end it while another thread's child happens to hold a copy. The namespace
    // lives on in our descriptor.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None)?;
    drop(go_write);
    made
}

fn map(pid: i32, ready: OwnedFd) -> io::Result<File> {
    let mut answer = [1_u8];
    File::from(ready).read_exact(&mut answer)?;
    if answer[0] != 0 {
        return Err(io::Error::other("unshare was refused"));
    }
    for file in ["uid_map", "gid_map"] {
        let mut map = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/{file}"))?;
        map.write_all(format!("0 {} {MAPPED_COUNT}", mapped_base()).as_bytes())?;
    }
    File::open(format!("/proc/{pid}/ns/user"))
}

/// # Safety
/// A `fd` that is not negative must be an open descriptor that nobody else owns.
unsafe fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the caller's promise.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
