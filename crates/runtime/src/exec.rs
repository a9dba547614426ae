//! Commands beside a machine's program: inside all its namespaces, its control group and its filters.
//!
//! The supervisor forks A; A joins a control group of the session's own below the machine's, enters the
//! namespaces through the first process's pidfd, clones B as the supervisor's child and ends; B gives
//! up what it has and runs the command. The session's control group takes with it whatever B left.

use crate::cgroup::MachineCgroup;
use crate::health;
use crate::process;
use crate::seccomp::Filters;
use crate::spec::{ProcessSpec, SupervisorSpec};
use crate::sys;
use crate::transfer;
use crate::wire::{self, ExecSpec, WindowSize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Pid, Uid, fchown};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
const KILL_DEADLINE: Duration = Duration::from_secs(1);
/// Together with the deadline for killing less than the agent's patience with its supervisor, which answers
/// nobody meanwhile.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(2);

/// A running command.
pub(crate) struct Session {
    pub pid: libc::pid_t,
    cgroup: MachineCgroup,
    /// Where there are no control groups, what its processes are known by.
    time: Option<OwnedFd>,
}

impl Session {
    /// To its process group, as a terminal would.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match nix::sys::signal::killpg(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends whatever is left of it and removes its control group.
    pub fn clear(self) {
        let _ = self.cgroup.kill_until_empty(KILL_DEADLINE); // the machine's own clean-up tries again
        let _ = self.cgroup.remove();
    }
}

pub(crate) struct Target<'a> {
    pub spec: &'a SupervisorSpec,
    pub init: BorrowedFd<'a>,
    pub cgroup: &'a MachineCgroup,
    pub filters: &'a Filters,
}

/// What A and B tell the supervisor; the end of the connection says that the command runs.
#[derive(Serialize, Deserialize)]
enum Step {
    Cloned { pid: libc::pid_t },
    /// Comes with the time namespace that the command and all that it starts will be in.
    Known,
    /// Comes with the terminal's master.
    Terminal,
    Failed { error: String },
}

/// Starts a command; the caller is single-threaded and reaps its children. With a terminal its master
/// is returned.
pub(crate) fn start(
    target: &Target<'_>,
    exec: &ExecSpec,
    stdio: &[OwnedFd],
    name: &str,
) -> io::Result<(Session, Option<OwnedFd>)> {
    if target.cgroup.is_frozen().map_err(io::Error::other)? {
        return Err(io::Error::other("the machine is suspended; resume it first"));
    }
    let cgroup = target.cgroup.session(name).map_err(io::Error::other)?;
    let mut session = Session { pid: 0, cgroup, time: None };
    match begin(target, exec, stdio, &mut session) {
        Ok(master) => Ok((session, master)),
        Err(e) => {
            session.clear(); // A and B are reaped by the caller's loop
            Err(e)
        }
    }
}

fn begin(
    target: &Target<'_>,
    exec: &ExecSpec,
    stdio: &[OwnedFd],
    session: &mut Session,
) -> io::Result<Option<OwnedFd>> {
    let procs = session.cgroup.open_procs().map_err(io::Error::other)?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let child = sys::clone_process(0)?;
    if child == 0 {
        let code = match enter(target, &procs, &theirs).and_then(|()| sys::clone_process(libc::CLONE_PARENT)) {
            Ok(0) => {
                let error = run(target, exec, stdio, &theirs).to_string();
                let _ = wire::send(theirs.as_raw_fd(), &Step::Failed { error }, &[]);
                127
            }
            Ok(pid) => {
                let _ = wire::send(theirs.as_raw_fd(), &Step::Cloned { pid }, &[]);
                0
            }
            Err(e) => {
                let _ = wire::send(theirs.as_raw_fd(), &Step::Failed { error: e.to_string() }, &[]);
                1
            }
        };
        // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
        unsafe { libc::_exit(code) };
    }
    drop((theirs, procs));
    let deadline = Instant::now() + HANDSHAKE_DEADLINE;
    let mut master = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::POLLIN)], timeout) {
            // Suspended meanwhile, or out of processor time or memory: the supervisor must not wait for it.
            Ok(0) => {
                let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
                return Err(io::Error::other("the command was not started in time"));
            }
            Err(Errno::EINTR) => continue,
            ready => drop(ready?),
        }
        match wire::receive::<Step>(ours.as_raw_fd())? {
            Some((Step::Cloned { pid }, _)) => session.pid = pid,
            Some((Step::Known, mut fds)) => {
                let time = fds.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
                session.cgroup.add_time_namespace(fstat(&time)?.st_ino).map_err(io::Error::other)?;
                session.time = Some(time);
                nix::unistd::write(&ours, b"k")?;
            }
            Some((Step::Terminal, mut fds)) => master = fds.pop(),
            Some((Step::Failed { error }, _)) => return Err(io::Error::other(error)),
            None if session.pid == 0 => return Err(io::Error::other("the command was killed before it started")),
            None => return Ok(master),
        }
    }
}

fn enter(target: &Target<'_>, procs: &[OwnedFd], socket: &OwnedFd) -> io::Result<()> {
    process::usual_oom_score(nix::unistd::getpid().as_raw());
    // The machine must not look into a process that still is the host's.
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    for file in procs {
        nix::unistd::write(file, b"0")?;
    }
    if !target.cgroup.is_list() {
        return sys::setns(target.init, NAMESPACES);
    }
    // Opened before, because the machine's /proc is another.
    let own = open("/proc/self/ns", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    sys::setns(target.init, NAMESPACES)?;
    sys::unshare(libc::CLONE_NEWTIME).map_err(|e| io::Error::new(e.kind(), format!("a time namespace for the command: {e}")))?;
    let time = nix::fcntl::openat(&own, "time_for_children", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    wire::send(socket.as_raw_fd(), &Step::Known, &[time.as_raw_fd()])?;
    // Nothing runs that nobody could find again.
    if nix::unistd::read(socket, &mut [0])? == 1 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn run(target: &Target<'_>, exec: &ExecSpec, stdio: &[OwnedFd], socket: &OwnedFd) -> io::Error {
    let prepared = || -> io::Result<(ProcessSpec, process::Identity, Vec<std::ffi::CString>)> {
        nix::unistd::setsid()?;
        sys::become_user(0, 0, &[])?;
        sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
        sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?; // the change of user clears it
        if exec.terminal.is_none() {
            for (i, fd) in stdio.iter().enumerate() {
                sys::dup_to(fd.as_fd(), i as i32)?;
            }
        }
        // What the supervisor has open is the host's. Closed now and not by the program's start: its path and its
        // working directory may name a descriptor.
        sys::close_all_but(3, &[socket.as_raw_fd()])?;
        let mut process = process_of(&target.spec.process, exec);
        if exec.transfer.is_some() {
            process.user = "0".into();
        }
        let identity = process::resolve_user(&process.user, Path::new("/"))?;
        let env = process::environment(&process, &identity)?;
        process::limits()?;
        if let Some(size) = exec.terminal {
            terminal(size, identity.uid, socket)
                .map_err(|e| io::Error::new(e.kind(), format!("the machine's /dev/pts: {e}")))?;
        }
        process::confine(target.spec.profile, target.filters)?;
        sys::close_on_exec_from(3)?;
        Ok((process, identity, env))
    };
    match prepared() {
        Ok((_, identity, _)) if exec.transfer.is_some() => match become_copier(&identity) {
            // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
            Ok(()) => unsafe { libc::_exit(exec.transfer.as_ref().map_or(1, transfer::serve)) },
            Err(e) => e,
        },
        Ok((_, identity, _)) if exec.probe.is_some() => match become_copier(&identity) {
            // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
            Ok(()) => unsafe { libc::_exit(exec.probe.as_ref().map_or(1, |probe| health::ask(probe, target.spec.address))) },
            Err(e) => e,
        },
        Ok((process, identity, env)) => process::run_program(&process, &identity, &env),
        Err(e) => e,
    }
}

/// What `execve` would do for a program: nothing of the supervisor's stays open, and that the handshake's
/// socket closes says that the copy runs. The memory still is the supervisor's, so nobody may look into it.
fn become_copier(identity: &process::Identity) -> io::Result<()> {
    sys::become_user(identity.uid, identity.gid, &[])?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
    nix::unistd::chdir("/")?;
    nix::sys::prctl::set_name(c"dunlin-files")?;
    sys::reset_signals();
    sys::block_signals(false)?;
    sys::close_all_but(3, &[])
}

/// The command, with what it does not say taken from the machine's program.
fn process_of(own: &ProcessSpec, exec: &ExecSpec) -> ProcessSpec {
    let or_own = |value: &String, own: &String| if value.is_empty() { own.clone() } else { value.clone() };
    let mut env = own.env.clone();
    if exec.terminal.is_some() && !env.iter().any(|(name, _)| name == "TERM") {
        env.push(("TERM".into(), "xterm".into()));
    }
    env.extend(exec.env.iter().cloned());
    ProcessSpec {
        command: exec.command.clone(),
        env: last_wins(env),
        user: or_own(&exec.user, &own.user),
        working_dir: or_own(&exec.working_dir, &own.working_dir),
    }
}

/// A new terminal of the machine's own: controlling, on descriptors 0-2; its master goes to the
/// supervisor. The machine's root may have put anything in place of /dev/pts, so it is looked at first.
fn terminal(size: WindowSize, uid: u32, socket: &OwnedFd) -> io::Result<()> {
    /// DEVPTS_SUPER_MAGIC, the inode of its ptmx, and that device's number.
    const DEVPTS: (i64, u64, u64) = (0x1cd1, 2, libc::makedev(5, 2));
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let master = open("/dev/pts/ptmx", flags, Mode::empty())?;
    let (stat, file_system) = (fstat(&master)?, fstatfs(&master)?);
    if ({ file_system.filesystem_type().0 }, stat.st_ino, stat.st_rdev) != DEVPTS {
        return Err(io::Error::other("it is not a file system of terminals"));
    }
    let slave = sys::terminal_peer(master.as_fd())?;
    sys::set_window(slave.as_fd(), size.rows, size.columns)?;
    fchown(&slave, Some(Uid::from_raw(uid)), None)?;
    sys::control_terminal(slave.as_fd())?;
    for number in 0..3 {
        sys::dup_to(slave.as_fd(), number)?;
    }
    fcntl(&master, FcntlArg::F_SETFL(OFlag::empty()))?;
    wire::send(socket.as_raw_fd(), &Step::Terminal, &[master.as_raw_fd()])
}

fn last_wins(env: Vec<(String, String)>) -> Vec<(String, String)> {
    let map: std::collections::BTreeMap<String, String> = env.into_iter().collect();
    map.into_iter().collect()
}

/// Descriptors 0-2 must not be among those that are moved there.
pub(crate) fn above_stdio(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() > 2 { Ok(fd) } else { fd.as_fd().try_clone_to_owned() }
}
