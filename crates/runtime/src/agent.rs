//! The agent's side: starting a supervisor, talking to it, and clearing up after one that died.
//! Everything here blocks for milliseconds; async callers use a blocking thread.

use crate::cgroup::{CgroupError, Cgroups};
use crate::container::FAILED;
use crate::files::lock_holder;
use crate::net;
use crate::remove::remove_tree;
use crate::rootfs;
use crate::spec::SupervisorSpec;
use crate::supervisor::UP;
use crate::sys;
use crate::wire::{self, Ask, ExecSpec, Request, Say, Status, WindowSize};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// First argument of the supervisor's personality.
pub const PERSONALITY: &str = "__supervisor";
/// A supervisor that does not answer in this time is wedged.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Making a machine takes some 10 ms; on a host that swaps, or whose disk is slow, much more.
const SPAWN_TIMEOUT: Duration = Duration::from_secs(30);
/// What a supervisor says of a failure is not longer.
const MAX_ANSWER: u64 = 64 * 1024;

/// Whether this process, by its first argument, is to be a supervisor.
pub fn is_personality(argument: &str) -> bool {
    argument == PERSONALITY
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The machine itself cannot be made or started: its image, command or user is wrong.
    #[error("{0}")]
    Machine(String),
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    /// No supervisor lives: ask the exit records.
    #[error("no supervisor of this machine is alive")]
    NotRunning,
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Net(#[from] net::NetError),
}

pub type Result<T> = std::result::Result<T, RuntimeError>;

fn io_error(what: &str) -> impl FnOnce(io::Error) -> RuntimeError {
    let what = what.to_owned();
    move |source| RuntimeError::Io { what, source }
}

/// A sealed copy of this binary in memory: supervisors run it, so that an upgrade on disk, or a tenant
/// who got hold of /proc/self/exe, changes nothing under them.
pub struct SealedExe(File);

impl SealedExe {
    pub fn new() -> Result<Self> {
        Self::of(Path::new("/proc/self/exe"))
    }

    /// Of another binary that has the supervisor's personality.
    pub fn of(path: &Path) -> Result<Self> {
        let make = || -> io::Result<File> {
            let mut from = File::open(path)?;
            let fd = memfd_create(c"dunlin", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?;
            let mut to = File::from(fd);
            io::copy(&mut from, &mut to)?;
            let seals =
                SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
            fcntl(&to, FcntlArg::F_ADD_SEALS(seals))?;
            Ok(to)
        };
        make().map(Self).map_err(io_error("no sealed copy of this binary could be made"))
    }

    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

/// Starts a supervisor and waits until its machine is made (and started, if the spec says so).
pub fn spawn(exe: &SealedExe, spec: &SupervisorSpec) -> Result<()> {
    for dir in ["", "exit", "log"] {
        let path = spec.machine_dir.join(dir);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(io_error(&format!("the machine's directory {} cannot be made", path.display())))?;
    }
    let mut child = Command::new(exe.path())
        .arg0("dunlin-supervisor")
        .args([PERSONALITY, &spec.machine_id])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io_error("the supervisor cannot be started"))?;
    let mut stdin = child.stdin.take().expect("piped");
    let written = stdin.write_all(&spec.to_json());
    drop(stdin);
    let answer = child.stdout.take().expect("piped");
    let answered = readable_within(answer.as_fd(), SPAWN_TIMEOUT);
    if !matches!(answered, Ok(true)) {
        // It must not finish later what its agent has given up.
        let _ = child.kill();
        if let Ok(Some(pid)) = lock_holder(&spec.machine_dir) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = child.wait();
        let late = io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {} s", SPAWN_TIMEOUT.as_secs()));
        return Err(io_error("the supervisor cannot make its machine")(answered.err().unwrap_or(late)));
    }
    let mut line = String::new();
    let read = BufReader::new(answer.take(MAX_ANSWER)).read_line(&mut line);
    let _ = child.wait(); // the first half of the double fork
    written.map_err(io_error("the supervisor ended before it read its spec"))?;
    read.map_err(io_error("the supervisor's answer could not be read"))?;
    match line.trim_end() {
        UP => Ok(()),
        "" => Err(RuntimeError::Machine("its supervisor ended without a word".into())),
        other => Err(RuntimeError::Machine(other.strip_prefix(FAILED).unwrap_or(other).to_owned())),
    }
}

fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let deadline = Instant::now() + timeout.min(Duration::from_secs(24 * 3600));
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left) {
            Err(nix::errno::Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

/// Tells the commands of a session how large its terminal is now.
pub fn resize(master: &OwnedFd, size: WindowSize) -> io::Result<()> {
    sys::set_window(master.as_fd(), size.rows, size.columns)
}

/// A connection to a living supervisor.
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Asks the lock first: a socket outlives its supervisor.
    pub fn connect(machine_dir: &Path) -> Result<Self> {
        if lock_holder(machine_dir).map_err(io_error("the machine's lock cannot be asked"))?.is_none() {
            return Err(RuntimeError::NotRunning);
        }
        let connect = || -> io::Result<OwnedFd> {
            use nix::sys::socket::{connect, setsockopt, sockopt};
            use nix::sys::time::TimeVal;
            let socket = wire::socket()?;
            let timeout = TimeVal::new(ANSWER_TIMEOUT.as_secs() as i64, 0);
            setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
            setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
            let dir = File::open(machine_dir)?;
            connect(socket.as_raw_fd(), &wire::address(&dir)?)?;
            Ok(socket)
        };
        match connect() {
            Ok(socket) => Ok(Self { socket }),
            // Between taking its lock and binding, or between its end and ours of looking.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                Err(RuntimeError::NotRunning)
            }
            Err(e) => Err(io_error("the supervisor cannot be reached")(e)),
        }
    }

    pub fn status(&self) -> Result<Status> {
        match self.ask(Ask::Status, &[])?.0 {
            Say::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts the program of a created machine.
    pub fn start(&self) -> Result<()> {
        self.done(Ask::Start)
    }

    pub fn signal(&self, signal: i32) -> Result<()> {
        self.done(Ask::Signal { signal })
    }

    /// Signal now, kill after the time-out; the exit comes as a record.
    pub fn stop(&self, signal: i32, timeout: Duration) -> Result<()> {
        self.done(Ask::Stop { signal, timeout_ms: timeout.as_millis() as u64 })
    }

    pub fn kill(&self) -> Result<()> {
        self.done(Ask::Kill)
    }

    /// Runs a command with these standard streams. The connection becomes the session: dropping it
    /// ends the command and all that it started.
    pub fn exec(self, exec: ExecSpec, stdio: [OwnedFd; 3]) -> Result<ExecHandle> {
        let fds: Vec<_> = stdio.iter().map(AsRawFd::as_raw_fd).collect();
        match self.ask(Ask::Exec(Box::new(ExecSpec { terminal: None, ..exec })), &fds)?.0 {
            Say::Done => Ok(ExecHandle { socket: self.socket }),
            other => Err(unexpected(&other)),
        }
    }

    /// The same on a terminal of the machine's own; its master is returned. Reading the master fails
    /// with EIO once the command and all that it started are gone.
    pub fn exec_tty(self, exec: ExecSpec, size: WindowSize) -> Result<(ExecHandle, OwnedFd)> {
        match self.ask(Ask::Exec(Box::new(ExecSpec { terminal: Some(size), ..exec })), &[])? {
            (Say::Done, mut fds) => match fds.pop() {
                Some(master) => Ok((ExecHandle { socket: self.socket }, master)),
                None => Err(RuntimeError::Machine("the supervisor sent no terminal".into())),
            },
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn done(&self, ask: Ask) -> Result<()> {
        match self.ask(ask, &[])?.0 {
            Say::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, ask: Ask, fds: &[i32]) -> Result<(Say, Vec<OwnedFd>)> {
        let fd = self.socket.as_raw_fd();
        let broken = |e: io::Error| match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => RuntimeError::NotRunning,
            _ => io_error("the supervisor does not answer")(e),
        };
        wire::send(fd, &Request { v: crate::spec::WIRE_VERSION, ask }, fds).map_err(broken)?;
        match wire::receive::<Say>(fd).map_err(broken)? {
            Some(answer) => Ok(answer),
            None => Err(RuntimeError::NotRunning),
        }
    }
}

fn unexpected(say: &Say) -> RuntimeError {
    match say {
        Say::Refused { error } => RuntimeError::Machine(error.clone()),
        other => RuntimeError::Machine(format!("the supervisor answered {other:?}")),
    }
}

/// A running command; dropping it ends the command.
pub struct ExecHandle {
    socket: OwnedFd,
}

impl ExecHandle {
    /// To the command and its process group.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let request = Request { v: crate::spec::WIRE_VERSION, ask: Ask::SignalExec { signal } };
        wire::send(self.socket.as_raw_fd(), &request, &[]).map_err(io_error("the supervisor does not take the signal"))
    }

    /// Waits for its end: exit code, or 128 + signal; `None` when the time is over and it still runs.
    pub fn wait(&self, timeout: Duration) -> Result<Option<i32>> {
        if !readable_within(self.socket.as_fd(), timeout).map_err(io_error("poll"))? {
            return Ok(None);
        }
        match wire::receive::<Say>(self.socket.as_raw_fd()) {
            Ok(Some((Say::ExecExited { exit_code, signal }, _))) => {
                Ok(Some(exit_code.unwrap_or_else(|| 128 + signal.unwrap_or(0))))
            }
            Ok(None) => Err(RuntimeError::NotRunning),
            Ok(Some((other, _))) => Err(unexpected(&other)),
            Err(e) => Err(io_error("the session broke")(e)),
        }
    }
}

/// Readable when the command has ended.
impl AsRawFd for ExecHandle {
    fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }
}

/// A descriptor that becomes readable when the machine's supervisor has ended; `None` if none lives.
pub fn supervisor_pidfd(machine_dir: &Path) -> Result<Option<OwnedFd>> {
    let Some(pid) = lock_holder(machine_dir).map_err(io_error("the machine's lock cannot be asked"))? else {
        return Ok(None);
    };
    match sys::pidfd_open(pid) {
        // The pid may have passed to another process before the descriptor was opened: ask again.
        Ok(fd) => match lock_holder(machine_dir) {
            Ok(Some(holder)) if holder == pid => Ok(Some(fd)),
            _ => Ok(None),
        },
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(io_error("pidfd_open")(e)),
    }
}

/// Ends whatever is left of a machine whose supervisor is gone, and removes what it wrote to its root file
/// system: that lives as long as an attempt. Safe to repeat.
pub fn cleanup(machine_dir: &Path, machine_id: &str, cgroups: &Cgroups, ifname: Option<&str>) -> Result<()> {
    for name in [SupervisorSpec::machine_cgroup(machine_id), SupervisorSpec::supervisor_cgroup(machine_id)] {
        match cgroups.open(&name) {
            Ok(cgroup) => {
                cgroup.kill_until_empty(KILL_DEADLINE)?;
                cgroup.remove()?;
            }
            Err(CgroupError::NotFound(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    if let Some(ifname) = ifname {
        net::detach(ifname)?;
    }
    let written = || {
        rootfs::remove_written(machine_dir)?;
        remove_tree(&machine_dir.join(SupervisorSpec::CONTAINERS))
    };
    written().map_err(io_error("what the machine wrote cannot be removed"))?;
    match fs::remove_file(machine_dir.join("sock")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("the machine's socket cannot be removed")(e)),
        _ => Ok(()),
    }
}

