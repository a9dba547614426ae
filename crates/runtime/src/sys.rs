//! Raw system calls that no library wraps the way we need, each with its safety argument.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Turns a -1 into the error that it stands for.
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// fork with namespace flags. The caller must be single-threaded: the child may then use the heap.
pub(crate) fn clone_process(flags: libc::c_int) -> io::Result<libc::pid_t> {
    let flags = (flags | libc::SIGCHLD) as libc::c_long;
    // SAFETY: a null stack makes clone behave as fork; no memory is shared (no CLONE_VM); the process
    // has one thread, so no lock can be held by a thread that the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    check(pid).map(|pid| pid as libc::pid_t)
}

pub(crate) fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only; the result is a new descriptor that we own.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: just returned by the kernel, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub(crate) fn setns(fd: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes a descriptor that is open for the call and an integer.
    check(libc::c_long::from(unsafe { libc::setns(fd.as_raw_fd(), kinds) })).map(drop)
}

pub(crate) fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes an integer; no memory or descriptors are shared with a thread, as there is but one.
    check(libc::c_long::from(unsafe { libc::unshare(kinds) })).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Mount attributes of [`detached_mount`].
pub(crate) const READ_ONLY_MOUNT: u64 = 0x1;
pub(crate) const NO_SUID_MOUNT: u64 = 0x2;
pub(crate) const NO_DEVICES_MOUNT: u64 = 0x4;

/// What a copy of a mount has more and less than the mount itself.
#[derive(Clone, Copy, Default)]
pub(crate) struct Attributes {
    pub set: u64,
    pub clear: u64,
}

/// A copy of the mount at `source`, with these attributes, attached nowhere yet; id-mapped if a user
/// namespace is given.
pub(crate) fn detached_mount(source: &Path, attributes: Attributes, map: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let source = c_path(source)?;
    let empty: &CStr = c"";
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `source` is a NUL-terminated string that outlives the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    // SAFETY: checked to be a descriptor that the kernel just gave us.
    let tree = unsafe { OwnedFd::from_raw_fd(check(tree)? as RawFd) };
    let attr = MountAttr {
        attr_set: attributes.set | if map.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 },
        attr_clr: attributes.clear,
        userns_fd: map.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..MountAttr::default()
    };
    // SAFETY: `attr` is a valid struct mount_attr of the size given; the strings are NUL-terminated.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })?;
    Ok(tree)
}

/// Attaches a detached mount at an open directory or file: no path is looked up again.
pub(crate) fn attach_mount(tree: &OwnedFd, target: BorrowedFd<'_>) -> io::Result<()> {
    /// MOVE_MOUNT_F_EMPTY_PATH and MOVE_MOUNT_T_EMPTY_PATH
    const BY_DESCRIPTOR: libc::c_uint = 0x04 | 0x40;
    let empty: &CStr = c"";
    // SAFETY: both descriptors are open for the call; the strings are NUL-terminated.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            target.as_raw_fd(),
            empty.as_ptr(),
            BY_DESCRIPTOR,
        )
    })
    .map(drop)
}

/// The one number in a file of the kernel's.
pub(crate) fn number_in(path: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{path} holds {:?}", text.trim())))
}

/// What this process has in memory stays there, and what it reads into what it has mapped by now. Not its children's.
pub(crate) fn lock_memory() -> io::Result<()> {
    // SAFETY: takes flags only.
    check(libc::c_long::from(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_ONFAULT) })).map(drop)
}

/// `prctl` with integer arguments.
pub(crate) fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options that we use take integers only.
    check(libc::c_long::from(unsafe { libc::prctl(option, argument, 0, 0, 0) })).map(drop)
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3, of this process.
const CAPABILITIES_OF_SELF: CapabilityHeader = CapabilityHeader { version: 0x2008_0522, pid: 0 };

fn permitted_capabilities() -> io::Result<u64> {
    let (header, mut data) = (CAPABILITIES_OF_SELF, [Capabilities::default(); 2]);
    // SAFETY: version 3 takes a header and fills two data structs of exactly this layout.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[1].permitted) << 32 | u64::from(data[0].permitted))
}

/// Sets effective, permitted and inheritable capabilities of this process.
pub(crate) fn set_capabilities(effective: u64, permitted: u64) -> io::Result<()> {
    let header = CAPABILITIES_OF_SELF;
    let half = |shift: u32| Capabilities {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes a header and two data structs of exactly this layout.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// [`clone_process`], with a user namespace among the flags that belongs to the user `owner` and not to this process's:
/// the kernel counts much of what is used inside (inotify, message queues, timers, processes) for the owner too, and would
/// hold all machines together to the limits of one user, who is the host's root.
pub(crate) fn clone_owned_by(owner: u32, flags: libc::c_int) -> io::Result<libc::pid_t> {
    const KEEP: libc::uid_t = libc::uid_t::MAX;
    let (own, permitted) = (nix::unistd::geteuid().as_raw(), permitted_capabilities()?);
    // SAFETY: integers only.
    let become_effectively = |uid: libc::uid_t| check(unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) });
    become_effectively(owner)?;
    // The change took the effective ones, without which some hosts allow no user namespace.
    let cloned = set_capabilities(permitted, permitted).and_then(|()| clone_process(flags));
    if !matches!(cloned, Ok(0)) {
        become_effectively(own)?; // which gives them back
    }
    cloned
}

/// Ids through the raw calls: single-threaded, so the kernel's per-thread ids are the process's.
pub(crate) fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length describe the slice; the others take integers.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// Marks all descriptors from `first` close-on-exec.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    /// CLOSE_RANGE_CLOEXEC
    const CLOEXEC: libc::c_uint = 4;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first as libc::c_uint, libc::c_uint::MAX, CLOEXEC) }).map(drop)
}

/// Closes descriptors from `first` on, except those in `keep`. Only in a fresh child: nothing here may
/// own them any more.
pub(crate) fn close_all_but(first: RawFd, keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd >= first).collect();
    keep.sort_unstable();
    let mut from = first as libc::c_uint;
    for fd in keep.iter().map(|fd| *fd as libc::c_uint).chain([libc::c_uint::MAX]) {
        if fd > from {
            // SAFETY: integers only; the caller gave up the descriptors.
            check(unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) })?;
        }
        from = fd.saturating_add(1);
    }
    Ok(())
}

/// The slave of an unlocked pseudo-terminal's master, not yet controlling anything.
pub(crate) fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    check(libc::c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }))?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes its open flags by value.
    let peer = check(libc::c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }))?;
    // SAFETY: checked to be a descriptor that the kernel just gave us.
    Ok(unsafe { OwnedFd::from_raw_fd(peer as RawFd) })
}

/// Makes a terminal the controlling one of this process's session, which has none.
pub(crate) fn control_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })).map(drop)
}

pub(crate) fn set_window(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    check(libc::c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })).map(drop)
}

/// `execve`; returns only on failure.
pub(crate) fn exec(program: &CStr, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays are NULL-terminated and point to NUL-terminated strings that outlive the call.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Leaves a descriptor open over `execve`.
pub(crate) fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: integers only.
    check(libc::c_long::from(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })).map(drop)
}

/// Puts `fd` at the number `target`, inheritable.
pub(crate) fn dup_to(fd: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    if fd.as_raw_fd() == target {
        // SAFETY: integers only.
        return check(libc::c_long::from(unsafe { libc::fcntl(target, libc::F_SETFD, 0) })).map(drop);
    }
    // SAFETY: integers only; 0-2 are owned by nobody.
    check(libc::c_long::from(unsafe { libc::dup2(fd.as_raw_fd(), target) })).map(drop)
}

/// Fails in a directory that no path leads to from this process's root. The C library's `getcwd` would look for one.
pub(crate) fn working_directory_is_below_root() -> io::Result<()> {
    let mut path = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most `path.len()` bytes into `path`.
    check(unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) })?;
    if path[0] == b'/' { Ok(()) } else { Err(io::Error::other("it is outside of the machine")) }
}

/// Signals of this process, all blocked or all let through.
pub(crate) fn block_signals(block: bool) -> io::Result<()> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    let how = if block { SigmaskHow::SIG_SETMASK } else { SigmaskHow::SIG_UNBLOCK };
    sigprocmask(how, Some(&SigSet::all()), None).map_err(io::Error::from)
}

/// Default handling of every signal, for a program that is about to be started.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            // SAFETY: SIG_DFL is always a valid handler; numbers that are refused stay as they are.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

/// An empty set of watched directories. Reading from it never blocks.
pub(crate) fn watcher() -> io::Result<OwnedFd> {
    // SAFETY: takes flags only; the result is a new descriptor.
    let fd = check(libc::c_long::from(unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) }))?;
    // SAFETY: just returned by the kernel, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Watches a directory for what is written to its files, and for new ones. Watching it again changes nothing.
pub(crate) fn watch(watcher: BorrowedFd<'_>, dir: &Path) -> io::Result<()> {
    let path = c_path(dir)?;
    let events = libc::IN_MODIFY | libc::IN_CREATE | libc::IN_ONLYDIR;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let result = unsafe { libc::inotify_add_watch(watcher.as_raw_fd(), path.as_ptr(), events) };
    check(libc::c_long::from(result)).map(drop)
}
