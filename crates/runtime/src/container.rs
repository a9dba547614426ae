//! Making a machine's namespaces and its first process.
//!
//! ```text
//! supervisor                              child (pid 1 of the machine)
//!   clone(user, net, pid, ipc, uts) ----->  waits
//!   uid and gid maps, overlay, network,
//!   cgroups
//!   "go" -------------------------------->  unshare(mount, cgroup), mounts, pivot, confine
//!                                  <------- "ready" or what failed
//!   "start" (at once, or when asked) ---->  forks the program
//!                                  <------- "started" or what failed
//!                                  <------- "exited" with its wait status
//! ```

use crate::net;
use crate::process::{self, Identity};
use crate::rootfs;
use crate::seccomp::Filters;
use crate::spec::{SupervisorSpec, UID_RANGE};
use crate::{sys, wire};
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// What the first process reports, one line of text each: a tag and what goes with it.
pub(crate) const READY: &str = "ready";
pub(crate) const STARTED: &str = "started";
pub(crate) const FAILED: &str = "failed ";
pub(crate) const EXITED: &str = "exited ";

/// A machine's first process, and the pipes to and from it.
pub(crate) struct Container {
    pub init: libc::pid_t,
    pub init_fd: OwnedFd,
    pub stdout: PipeReader,
    pub stderr: PipeReader,
    pub report: PipeReader,
    /// One byte starts the program.
    pub start: PipeWriter,
}

/// Makes everything up to the point where the program could start. The caller is single-threaded and
/// has mounts of its own. `join` moves it and the first process to their control groups: after all else, because the
/// first such move may have to wait (see [`Cgroups::hasten_moves`](crate::cgroup::Cgroups::hasten_moves)).
pub(crate) fn create(
    spec: &SupervisorSpec,
    filters: &Filters,
    join: impl FnOnce(libc::pid_t) -> io::Result<()>,
) -> io::Result<Container> {
    let (stdout, stdout_writer) = io::pipe()?;
    let (stderr, stderr_writer) = io::pipe()?;
    let (report, report_writer) = io::pipe()?;
    let (go, go_sender) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let (start_reader, start) = io::pipe()?;
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let init = sys::clone_owned_by(spec.uid_base, flags)?;
    if init == 0 {
        let pipes = InitPipes { go, start: start_reader, stdout: stdout_writer, stderr: stderr_writer, report: report_writer };
        init_main(spec, filters, pipes);
    }
    drop((stdout_writer, stderr_writer, report_writer, go, start_reader));
    let init_fd = sys::pidfd_open(init)?;
    let map = format!("0 {} {UID_RANGE}\n", spec.uid_base);
    fs::write(format!("/proc/{init}/uid_map"), &map)?;
    fs::write(format!("/proc/{init}/gid_map"), &map)?;
    let user_namespace = File::open(format!("/proc/{init}/ns/user"))?;
    let root = rootfs::assemble(spec, user_namespace.as_fd())?;
    process::usual_oom_score(init);
    if let Some(net) = &spec.net {
        net::attach(net, init).map_err(io::Error::other)?;
    }
    join(init)?;
    // Open, because the way to it leads through directories that are root's alone.
    let root = open(&root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    wire::send(go_sender.as_raw_fd(), &(), &[root.as_raw_fd()])?;
    Ok(Container { init, init_fd, stdout, stderr, report, start })
}

struct InitPipes {
    /// Brings the root.
    go: OwnedFd,
    start: PipeReader,
    stdout: PipeWriter,
    stderr: PipeWriter,
    report: PipeWriter,
}

/// Pid 1 of the machine. Never returns.
fn init_main(spec: &SupervisorSpec, filters: &Filters, pipes: InitPipes) -> ! {
    let InitPipes { go, start, stdout, stderr, report } = &pipes;
    let say = |text: &str| {
        let line = format!("{}\n", text.replace('\n', " "));
        let _ = (&mut &*report).write_all(line.as_bytes()); // the supervisor is gone: so are we, soon
    };
    let keep = [go.as_raw_fd(), start.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd(), report.as_raw_fd()];
    let prepared = sys::close_all_but(3, &keep).and_then(|()| prepare(spec, filters, go));
    let (identity, env) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => {
            say(&format!("{FAILED}{e}"));
            std::process::exit(125);
        }
    };
    say(READY);
    let mut byte = [0];
    if !matches!((&mut &*start).read(&mut byte), Ok(1)) {
        std::process::exit(0); // the supervisor decided otherwise
    }
    match start_program(spec, &identity, &env, &pipes) {
        Ok(program) => {
            say(STARTED);
            // Only the program and its children hold the output now: its end is theirs.
            let _ = sys::close_all_but(3, &[report.as_raw_fd()]);
            let status = reap(program);
            say(&format!("{EXITED}{status}"));
            std::process::exit(0)
        }
        Err(e) => {
            say(&format!("{FAILED}{e}"));
            std::process::exit(125)
        }
    }
}

/// With none of the machine's ids first, but all capabilities in its user namespace; as its root from then on.
fn prepare(spec: &SupervisorSpec, filters: &Filters, go: &OwnedFd) -> io::Result<(Identity, Vec<CString>)> {
    // Dies with its supervisor; the control group is the guarantee, this is the quick way.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
    nix::sys::prctl::set_name(c"init")?;
    let root = match wire::receive::<()>(go.as_raw_fd())? {
        Some(((), mut fds)) if fds.len() == 1 => fds.remove(0),
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    };
    nix::unistd::setsid()?;
    nix::unistd::fchdir(&root)?;
    drop(root);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
    rootfs::reach()?;
    sys::become_user(0, 0, &[])?;
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?; // the change of user cleared it
    nix::unistd::sethostname(&spec.hostname)?;
    rootfs::enter(spec)?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    let identity = process::resolve_user(&spec.process.user, Path::new("/"))?;
    let env = process::environment(&spec.process, &identity)?;
    process::limits()?;
    sys::block_signals(true)?;
    process::confine(spec.profile, filters)?;
    Ok((identity, env))
}

/// Forks the program; an error pipe that closes on exec tells whether it came that far.
fn start_program(spec: &SupervisorSpec, identity: &Identity, env: &[CString], pipes: &InitPipes) -> io::Result<Pid> {
    let (mut error, mut error_writer) = io::pipe()?;
    let child = sys::clone_process(0)?;
    if child == 0 {
        let failed = become_program(spec, identity, env, pipes);
        let _ = write!(error_writer, "{failed}");
        std::process::exit(127);
    }
    drop(error_writer);
    let mut message = String::new();
    error.read_to_string(&mut message)?;
    if message.is_empty() { Ok(Pid::from_raw(child)) } else { Err(io::Error::other(message)) }
}

fn become_program(spec: &SupervisorSpec, identity: &Identity, env: &[CString], pipes: &InitPipes) -> io::Error {
    let wired = || -> io::Result<()> {
        nix::unistd::setsid()?;
        let null = File::open("/dev/null")?;
        sys::dup_to(null.as_fd(), 0)?;
        sys::dup_to(pipes.stdout.as_fd(), 1)?;
        sys::dup_to(pipes.stderr.as_fd(), 2)?;
        sys::close_on_exec_from(3)
    };
    match wired() {
        Ok(()) => process::run_program(&spec.process, identity, env),
        Err(e) => e,
    }
}

/// Pid 1's whole duty: pass signals on to the program, reap orphans, end with the program.
/// Returns the program's raw wait status as `code N` or `signal N`.
fn reap(program: Pid) -> String {
    let all = SigSet::all();
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == program => return format!("code {code}"),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => return format!("signal {}", signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => {}
            }
        }
        match all.wait() {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            Ok(signal) => {
                let _ = nix::sys::signal::kill(program, signal); // it may just have ended: reaped next round
            }
        }
    }
}
