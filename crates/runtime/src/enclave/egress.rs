//! The way out of an enclave's network: a program of the user's that takes packets from a device in there and makes
//! connections of its own of them. It runs outside and outlives the keeper; a lock that it inherits says whether it lives.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Enclave;
use crate::features::EGRESS_RESOLVER;
use crate::net::firewall::find_program;
use crate::sys;

const LOCK: &str = "egress.lock";
const DEVICE: &str = "egress0";
/// It needs some 50 ms.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// As large as its device takes: each packet costs a system call.
const MTU: &str = "65520";

/// A way out that is there.
pub struct Egress {
    pub resolver: Ipv4Addr,
    /// If it was started just now: to be waited for, by a process that stays.
    pub started: Option<Child>,
}

/// What would carry connections, if it is installed.
pub fn tool() -> Option<PathBuf> {
    find_program("slirp4netns")
}

pub(super) fn ensure(enclave: &Enclave, run: &Path) -> io::Result<Option<Egress>> {
    let Some(program) = tool() else { return Ok(None) };
    let mut lock = open_lock(run)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Some(Egress { resolver: EGRESS_RESOLVER, started: None })), // it lives
        Err(TryLockError::Error(e)) => return Err(e),
    }
    let (mut ready, ready_writer) = io::pipe()?;
    let [users, _, net] = enclave.descriptors();
    let namespace = |fd: BorrowedFd<'_>| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let log = File::create(run.join("egress.log"))?;
    let mut command = Command::new(&program);
    command
        // Without the first machines would reach what listens on this computer's loopback.
        .args(["--disable-host-loopback", "--configure", "--mtu", MTU, "--netns-type", "path"])
        .args(["--userns-path", &namespace(users), "--ready-fd", &ready_writer.as_raw_fd().to_string()])
        .args([&namespace(net), DEVICE])
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let inherited = [lock.as_raw_fd(), ready_writer.as_raw_fd()];
    // In the child only: what this process starts elsewhere meanwhile must not hold the lock.
    // SAFETY: between fork and exec it makes system calls on two descriptors that are open, and allocates nothing.
    unsafe { command.pre_exec(move || inherited.into_iter().try_for_each(sys::inherit)) };
    let mut child = command.spawn()?;
    drop(ready_writer);
    lock.set_len(0)?;
    lock.write_all(child.id().to_string().as_bytes())?;
    let timeout = PollTimeout::try_from(READY_WITHIN).unwrap_or(PollTimeout::MAX);
    let heard = poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], timeout)? > 0;
    let mut byte = [0];
    if heard && ready.read(&mut byte)? == 1 {
        // Our copy of the lock is closed here, and not unlocked: the child's holds on.
        return Ok(Some(Egress { resolver: EGRESS_RESOLVER, started: Some(child) }));
    }
    let _ = child.kill(); // it may have ended by itself
    let _ = child.wait();
    let said = fs::read_to_string(run.join("egress.log")).unwrap_or_default();
    Err(io::Error::other(format!("{} does not work: {}", program.display(), said.trim())))
}

/// Ends the one of this server, if it lives.
pub fn end_egress(run: &Path) -> io::Result<()> {
    let mut file = open_lock(run)?;
    let mut pid = String::new();
    file.read_to_string(&mut pid)?;
    if file.try_lock().is_err()
        && let Ok(pid) = pid.trim().parse()
    {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL); // it just ended
    }
    Ok(())
}

fn open_lock(run: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(run.join(LOCK))
}
