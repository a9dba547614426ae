//! Making a machine's namespaces and the first process of each of its containers.
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
//!
//! The first container makes the machine's namespaces. Each further one, and each that is started again, is a child
//! that joins those of users, network, ipc and uts, and has processes, mounts and a root file system of its own.

use crate::cgroup::Layout;
use crate::net;
use crate::process::{self, Identity};
use crate::rootfs::{self, Assembled, Begun};
use crate::seccomp::Filters;
use crate::spec::{ProcessSpec, SupervisorSpec, UID_RANGE};
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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What the first process reports, one line of text each: a tag and what goes with it.
pub(crate) const READY: &str = "ready";
pub(crate) const STARTED: &str = "started";
pub(crate) const FAILED: &str = "failed ";
pub(crate) const EXITED: &str = "exited ";

/// The namespaces that all containers of a machine share.
pub(crate) struct Namespaces(Vec<(OwnedFd, libc::c_int)>);

impl Namespaces {
    /// That of users first: it gives the right to join the others.
    const SHARED: [(&str, libc::c_int); 4] = [
        ("user", libc::CLONE_NEWUSER), ("net", libc::CLONE_NEWNET), ("ipc", libc::CLONE_NEWIPC), ("uts", libc::CLONE_NEWUTS),
    ];

    fn of(pid: libc::pid_t) -> io::Result<Self> {
        let open = |(name, kind)| Ok((OwnedFd::from(File::open(format!("/proc/{pid}/ns/{name}"))?), kind));
        Self::SHARED.into_iter().map(open).collect::<io::Result<_>>().map(Self)
    }

    fn of_users(&self) -> BorrowedFd<'_> {
        self.0[0].0.as_fd()
    }

    fn join(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|(namespace, kind)| sys::setns(namespace.as_fd(), *kind))
    }
}

/// A container's first process, and the pipes to and from it.
pub(crate) struct Container {
    pub init: libc::pid_t,
    pub init_fd: OwnedFd,
    /// Standard output and standard error of each program.
    pub outputs: Vec<[PipeReader; 2]>,
    pub report: PipeReader,
    /// One byte starts the programs.
    pub start: PipeWriter,
    /// Of what it writes to, as long as their blocks go through the host's page cache.
    pub devices: Vec<File>,
}

impl Container {
    /// Blocks until it could start its programs, or says why it cannot.
    pub fn wait_until_ready(&self) -> io::Result<()> {
        let (mut text, mut byte) = (String::new(), [0]);
        while (&self.report).read(&mut byte)? == 1 && byte[0] != b'\n' {
            text.push(char::from(byte[0]));
        }
        if text == READY {
            return Ok(());
        }
        Err(io::Error::other(text.strip_prefix(FAILED).unwrap_or("its first process ended").to_owned()))
    }
}

/// Makes everything up to the point where the programs could start. The caller is single-threaded and
/// has mounts of its own. `join` moves it and the first process to their control groups: after all else, because the
/// first such move may have to wait (see [`Cgroups::hasten_moves`](crate::cgroup::Cgroups::hasten_moves)).
pub(crate) fn create(
    spec: &SupervisorSpec,
    filters: &Filters,
    begun: Begun,
    shared: &mut Option<Namespaces>,
    join: impl FnOnce(libc::pid_t) -> io::Result<()>,
) -> io::Result<Container> {
    let pipes = spec.programs().map(|_| Ok([io::pipe()?, io::pipe()?])).collect::<io::Result<Vec<_>>>()?;
    let (outputs, output_writers): (Vec<[PipeReader; 2]>, Vec<[PipeWriter; 2]>) =
        pipes.into_iter().map(|[(out, out_writer), (err, err_writer)]| ([out, err], [out_writer, err_writer])).unzip();
    let (report, report_writer) = io::pipe()?;
    let (go, go_sender) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let (start_reader, start) = io::pipe()?;
    let is_first = shared.is_none();
    let init = match shared {
        None => {
            let flags =
                libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            clone_counted(spec, flags)?
        }
        Some(shared) => clone_into(shared)?,
    };
    if init == 0 {
        let pipes = InitPipes { go, start: start_reader, outputs: output_writers, report: report_writer };
        init_main(spec, filters, pipes);
    }
    drop((output_writers, report_writer, go, start_reader));
    let init_fd = sys::pidfd_open(init)?;
    let shared = match shared {
        Some(shared) => shared,
        none => {
            let map = format!("0 {} {UID_RANGE}\n", spec.uid_base);
            fs::write(format!("/proc/{init}/uid_map"), &map)?;
            fs::write(format!("/proc/{init}/gid_map"), &map)?;
            none.insert(Namespaces::of(init)?)
        }
    };
    let Assembled { root, devices, files } = rootfs::assemble(spec, begun, shared.of_users())?;
    process::usual_oom_score(init);
    if let Some(net) = spec.net.as_ref().filter(|_| is_first) {
        net::attach(net, init).map_err(io::Error::other)?;
    }
    join(init)?;
    // Open, because the way to it leads through directories that are root's alone.
    let root = open(&root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let given: Vec<_> = std::iter::once(&root).chain(&files).map(AsRawFd::as_raw_fd).collect();
    wire::send(go_sender.as_raw_fd(), &(), &given)?;
    Ok(Container { init, init_fd, outputs, report, start, devices })
}

/// The machine's first process, in a user namespace whose processes are counted for its owner. Where no control group counts
/// them, the namespace keeps the limit that its maker had; what is too many, the kernel then refuses to make.
fn clone_counted(spec: &SupervisorSpec, flags: libc::c_int) -> io::Result<libc::pid_t> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let owner = spec.owner.unwrap_or(spec.uid_base);
    if spec.cgroups.layout() != Layout::None || spec.limits.pids == 0 {
        return sys::clone_owned_by(owner, flags);
    }
    let (usual, hard) = getrlimit(Resource::RLIMIT_NPROC)?;
    setrlimit(Resource::RLIMIT_NPROC, u64::from(spec.limits.pids).min(hard), hard)?;
    let cloned = sys::clone_owned_by(owner, flags);
    setrlimit(Resource::RLIMIT_NPROC, usual, hard)?;
    cloned
}

/// A child in a machine's namespaces, the first of a pid namespace of its own. The way leads over a process that joins
/// them, because the caller must not, and leaves its child to the caller.
fn clone_into(shared: &Namespaces) -> io::Result<libc::pid_t> {
    let (mut answer, mut answer_writer) = io::pipe()?;
    let between = sys::clone_process(0)?;
    if between == 0 {
        // The machine must not look into a process that still is the host's.
        let joined = sys::prctl(libc::PR_SET_DUMPABLE, 0).and_then(|()| shared.join());
        let text = match joined.and_then(|()| sys::clone_process(libc::CLONE_PARENT | libc::CLONE_NEWPID)) {
            Ok(0) => return Ok(0),
            Ok(pid) => pid.to_string(),
            Err(e) => e.to_string(),
        };
        let _ = answer_writer.write_all(text.as_bytes()); // the supervisor is gone
        // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
        unsafe { libc::_exit(0) };
    }
    drop(answer_writer);
    let mut text = String::new();
    answer.read_to_string(&mut text)?;
    let _ = waitpid(Pid::from_raw(between), None); // reaped already
    text.parse().map_err(|_| io::Error::other(format!("the machine's namespaces cannot be joined: {text}")))
}

struct InitPipes {
    /// Brings the root, and the place of files that are in memory only.
    go: OwnedFd,
    start: PipeReader,
    outputs: Vec<[PipeWriter; 2]>,
    report: PipeWriter,
}

/// Pid 1 of the container. Never returns.
fn init_main(spec: &SupervisorSpec, filters: &Filters, pipes: InitPipes) -> ! {
    let InitPipes { go, start, outputs, report } = &pipes;
    let say = |text: &str| {
        let line = format!("{}\n", text.replace('\n', " "));
        let _ = (&mut &*report).write_all(line.as_bytes()); // the supervisor is gone: so are we, soon
    };
    let outputs = outputs.iter().flatten().map(AsRawFd::as_raw_fd);
    let keep: Vec<_> = outputs.chain([go.as_raw_fd(), start.as_raw_fd(), report.as_raw_fd()]).collect();
    let prepared = sys::close_all_but(3, &keep).and_then(|()| prepare(spec, filters, go));
    let programs = match prepared {
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
    let started: io::Result<Vec<Pid>> =
        programs.iter().zip(&pipes.outputs).map(|(program, outputs)| start_program(program, outputs)).collect();
    match started {
        Ok(running) => {
            say(STARTED);
            // Only the programs and their children hold the outputs now: the end of those is theirs.
            let _ = sys::close_all_but(3, &[report.as_raw_fd()]);
            reap(running, |status| say(&format!("{EXITED}{status}")));
            std::process::exit(0)
        }
        Err(e) => {
            say(&format!("{FAILED}{e}"));
            std::process::exit(125)
        }
    }
}

/// A program that could start, with what it is run as.
struct Prepared<'a> {
    process: &'a ProcessSpec,
    identity: Identity,
    env: Vec<CString>,
}

/// With none of the machine's ids first, but all capabilities in its user namespace; as its root from then on.
fn prepare<'a>(spec: &'a SupervisorSpec, filters: &Filters, go: &OwnedFd) -> io::Result<Vec<Prepared<'a>>> {
    // Dies with its supervisor; the control group is the guarantee, this is the quick way.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
    nix::sys::prctl::set_name(c"init")?;
    let mut given = match wire::receive::<()>(go.as_raw_fd())? {
        Some(((), fds)) => fds.into_iter(),
        None => return Err(io::ErrorKind::UnexpectedEof.into()),
    };
    let root = given.next().ok_or(io::ErrorKind::UnexpectedEof)?;
    nix::unistd::setsid()?;
    nix::unistd::fchdir(&root)?;
    drop(root);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
    rootfs::reach()?;
    sys::become_user(0, 0, &[])?;
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?; // the change of user cleared it
    nix::unistd::sethostname(&spec.hostname)?;
    rootfs::enter(spec, given.next())?;
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    let program = |process: &'a ProcessSpec| {
        let identity = process::resolve_user(&process.user, Path::new("/"))?;
        let env = process::environment(process, &identity)?;
        Ok(Prepared { process, identity, env })
    };
    let programs = spec.programs().map(program).collect::<io::Result<_>>()?;
    process::limits()?;
    sys::block_signals(true)?;
    process::confine(spec.profile, filters)?;
    Ok(programs)
}

/// Forks the program; an error pipe that closes on exec tells whether it came that far.
fn start_program(program: &Prepared<'_>, outputs: &[PipeWriter; 2]) -> io::Result<Pid> {
    let (mut error, mut error_writer) = io::pipe()?;
    let child = sys::clone_process(0)?;
    if child == 0 {
        let failed = become_program(program, outputs);
        let _ = write!(error_writer, "{failed}");
        std::process::exit(127);
    }
    drop(error_writer);
    let mut message = String::new();
    error.read_to_string(&mut message)?;
    if message.is_empty() { Ok(Pid::from_raw(child)) } else { Err(io::Error::other(message)) }
}

fn become_program(program: &Prepared<'_>, outputs: &[PipeWriter; 2]) -> io::Error {
    let wired = || -> io::Result<()> {
        nix::unistd::setsid()?;
        let null = File::open("/dev/null")?;
        sys::dup_to(null.as_fd(), 0)?;
        sys::dup_to(outputs[0].as_fd(), 1)?;
        sys::dup_to(outputs[1].as_fd(), 2)?;
        sys::close_on_exec_from(3)
    };
    match wired() {
        Ok(()) => process::run_program(program.process, &program.identity, &program.env),
        Err(e) => e,
    }
}

/// Pid 1's whole duty: pass signals on to the programs, reap orphans, tell how the first of them ended, and end with the
/// last. Told is a raw wait status as `code N` or `signal N`.
fn reap(mut running: Vec<Pid>, tell: impl Fn(&str)) {
    let all = SigSet::all();
    let several = running.len();
    loop {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {}", signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => continue,
            };
            let before = running.len();
            running.retain(|program| *program != pid);
            if before == several && running.len() < several {
                tell(&how);
            }
            if running.is_empty() {
                return;
            }
        }
        match all.wait() {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            Ok(signal) => {
                for program in &running {
                    let _ = nix::sys::signal::kill(*program, signal); // it may just have ended: reaped next round
                }
            }
        }
    }
}
