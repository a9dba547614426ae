//! The per-machine supervisor: a hidden personality of the binary, single-threaded, without an async
//! runtime. It outlives the agent, so that an upgrade or a crash of the agent stops no machine.
//!
//! It takes the machine's lock, makes the machine, keeps its log, answers the agent, and when the
//! program ends writes the exit record (fsynced) and ends itself.

use crate::cgroup::{CgroupError, Limits, MachineCgroup};
use crate::container::{self, Container, EXITED, FAILED, READY, STARTED};
use crate::exec::{self, Session, Target};
use crate::files::{self, ExitFile, ExitRecord, now_ms};
use crate::logs::{LineSplitter, LogWriter};
use crate::rootfs::HostMounts;
use crate::seccomp::Filters;
use crate::spec::{SupervisorSpec, USUAL_SPEC_BYTES, WIRE_VERSION};
use crate::wire::{self, Ask, Phase, Request, Say, Status};
use crate::sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Connections at once; more of them wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 64;
/// Commands beside the program at once: fewer than connections, so that a stop is always heard.
const MAX_SESSIONS: usize = 32;
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long output that is still in the pipes is read after the end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
const READ_BYTES: usize = 16 * 1024;
/// Output is read this long before everything else gets its turn.
const READ_WITHIN: Duration = Duration::from_millis(10);
/// What a supervisor may use once its machine is made. A program that prints without end costs the host no
/// more than this: the pipe is full then, and slows it down.
const OWN_CPU_MILLIS: u32 = 250;
/// How often it asks the kernel whether processes were ended for want of memory.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// A stop waits a day at most.
const MAX_STOP_MS: u64 = 24 * 3600 * 1000;
/// A spec is refused above this size.
const MAX_SPEC_BYTES: u64 = 8 << 20;
/// Said on standard output once the machine is made; then standard output is closed.
pub(crate) const UP: &str = "up";

/// Runs the personality. Standard input carries the spec, standard output says `up` or what failed.
pub fn supervisor_main() -> ! {
    let code = match run() {
        Ok(()) => 0,
        Err(e) => {
            say(&format!("{FAILED}{e}"));
            1
        }
    };
    std::process::exit(code)
}

/// Every boundary between a durable write of the supervisor, or one that its agent waits for, and an act.
pub const KILL_POINTS: &[&str] = &[
    // The place of the exit record is on disk, nothing else is there.
    "supervisor.before-make",
    // Processes, mounts and network are there, and are in no control group of theirs.
    "supervisor.before-join",
    "supervisor.before-announce",
    "supervisor.after-announce",
    // The program has ended, and nobody knows how.
    "supervisor.before-record",
    "supervisor.after-record",
];

/// Ends the process here, as `kill -9` would, if a test asked for it.
fn kill_point(spec: &SupervisorSpec, point: &str) {
    debug_assert!(KILL_POINTS.contains(&point), "{point} is not listed");
    if spec.kill_at.as_deref() == Some(point) {
        let _ = nix::sys::signal::raise(Signal::SIGKILL);
    }
}

fn run() -> io::Result<()> {
    // Whatever descriptors of the agent leaked, a machine must not get them.
    sys::close_all_but(3, &[])?;
    // Whatever the server was started with: a machine's programs read the files that are made here.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    nix::sys::prctl::set_name(c"dunlin-super")?;
    // The spec has the machine's secrets: no core file may hold them.
    nix::sys::prctl::set_dumpable(false)?;
    let mut text = Zeroizing::new(Vec::with_capacity(USUAL_SPEC_BYTES));
    io::stdin().take(MAX_SPEC_BYTES).read_to_end(&mut text)?;
    let spec: SupervisorSpec = serde_json::from_slice(&text)?;
    drop(text);
    if spec.v != WIRE_VERSION {
        return Err(io::Error::other(format!("this supervisor speaks version {WIRE_VERSION}, not {}", spec.v)));
    }
    // The agent waits for the first process only; the supervisor itself is nobody's child.
    if sys::clone_process(0)? != 0 {
        // SAFETY: ends this half at once, without running destructors that the other half needs.
        unsafe { libc::_exit(0) };
    }
    nix::unistd::setsid()?;
    sys::block_signals(true)?;
    let _lock = files::take_lock(&spec.machine_dir)
        .map_err(|e| io::Error::other(format!("another supervisor has machine {}: {e}", spec.machine_id)))?;
    let _ = fs::write("/proc/self/oom_score_adj", "-900"); // refused without CAP_SYS_RESOURCE: the agent says so
    let mut exit_file = ExitFile::prepare(&spec.machine_dir, spec.attempt)
        .map_err(|e| io::Error::new(e.kind(), format!("the place for its exit record cannot be made: {e}")))?;
    kill_point(&spec, "supervisor.before-make");
    let own = fresh_cgroup(&spec, &SupervisorSpec::supervisor_cgroup(&spec.machine_id), None)?;
    let cgroup = fresh_cgroup(&spec, &SupervisorSpec::machine_cgroup(&spec.machine_id), Some(&spec.limits))?;
    let made = Machine::create(&spec, &own, &cgroup).and_then(|machine| {
        own.set_limits(&Limits { cpu_millis: OWN_CPU_MILLIS, ..Limits::NONE }).map_err(io::Error::other)?;
        Ok(machine)
    });
    let record = match made {
        Ok(mut machine) => {
            kill_point(&spec, "supervisor.before-announce");
            announce()?;
            kill_point(&spec, "supervisor.after-announce");
            machine.supervise()
        }
        Err(e) => {
            // The agent hears of it now and finds it again after a crash of its own.
            say(&format!("{FAILED}{e}"));
            failed_record(&spec, e.to_string())
        }
    };
    let _ = cgroup.kill_until_empty(KILL_DEADLINE); // the agent's clean-up tries again
    kill_point(&spec, "supervisor.before-record");
    write_record(&mut exit_file, &record)?;
    kill_point(&spec, "supervisor.after-record");
    Ok(())
}

/// The agent may have been killed meanwhile: nobody reads it then, and the machine goes on.
fn say(line: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

fn announce() -> io::Result<()> {
    say(UP);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for number in 0..3 {
        sys::dup_to(null.as_fd(), number)?;
    }
    Ok(())
}

/// A control group of this attempt; what an earlier one left is ended first.
fn fresh_cgroup(spec: &SupervisorSpec, name: &str, limits: Option<&Limits>) -> io::Result<MachineCgroup> {
    let create = || match limits {
        Some(limits) => spec.cgroups.create(name, limits),
        None => spec.cgroups.create_plain(name),
    };
    match create() {
        Err(CgroupError::AlreadyExists(_)) => {
            let old = spec.cgroups.open(name).map_err(io::Error::other)?;
            old.kill_until_empty(KILL_DEADLINE).map_err(io::Error::other)?;
            old.remove().map_err(io::Error::other)?;
            create().map_err(io::Error::other)
        }
        made => made.map_err(io::Error::other),
    }
}

fn failed_record(spec: &SupervisorSpec, error: String) -> ExitRecord {
    ExitRecord {
        attempt: spec.attempt,
        exit_code: None,
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms: now_ms(),
        error: Some(error),
    }
}

/// An exit that is not recorded would be taken for a crash. Its place is there, but renaming it may want a
/// block too: on a full disk it is tried again.
fn write_record(exit_file: &mut ExitFile, record: &ExitRecord) -> io::Result<()> {
    const TRIES: u32 = 600;
    for _ in 0..TRIES {
        match exit_file.write(record) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            written => return written,
        }
    }
    exit_file.write(record)
}

struct Connection {
    socket: OwnedFd,
    session: Option<Session>,
    /// A command that waits for its round.
    asked: Option<(wire::ExecSpec, Vec<OwnedFd>)>,
}

struct Machine<'a> {
    spec: &'a SupervisorSpec,
    cgroup: &'a MachineCgroup,
    filters: Filters,
    container: Container,
    listener: OwnedFd,
    signals: SignalFd,
    connections: Vec<Connection>,
    log: LogWriter,
    lines: [LineSplitter; 2],
    phase: Phase,
    started_at_ms: Option<u64>,
    kill_at: Option<Instant>,
    sessions: u64,
    oom_kills_before: u64,
    /// Those that the log tells of, and when to look again.
    oom_kills_said: u64,
    memory_look_at: Instant,
    /// Set by the first process's report.
    ended: Option<Ended>,
    /// Of standard output, standard error, report: nobody can write to it any more. A program may close
    /// its output and live on.
    over: [bool; 3],
    buffer: Vec<u8>,
}

enum Ended {
    Code(i32),
    Signal(i32),
    Error(String),
}

impl<'a> Machine<'a> {
    fn create(spec: &'a SupervisorSpec, own: &MachineCgroup, cgroup: &'a MachineCgroup) -> io::Result<Self> {
        let filters = Filters::compile(spec.profile).map_err(io::Error::other)?;
        let host_mounts = HostMounts::leave()?;
        let join = |init| {
            kill_point(spec, "supervisor.before-join");
            own.add(0).and_then(|()| cgroup.add(init)).map_err(io::Error::other)
        };
        let container = container::create(spec, &filters, join)?;
        let mut report = &container.report;
        let mut text = String::new();
        let mut byte = [0];
        while report.read(&mut byte)? == 1 && byte[0] != b'\n' {
            text.push(char::from(byte[0]));
        }
        if text != READY {
            let why = text.strip_prefix(FAILED).unwrap_or("its first process ended").to_owned();
            return Err(io::Error::other(why));
        }
        host_mounts.come_back()?;
        for pipe in [container.stdout.as_fd(), container.stderr.as_fd(), container.report.as_fd()] {
            set_nonblocking(pipe)?;
        }
        let signals = SignalFd::with_flags(
            &SigSet::from_iter([Signal::SIGCHLD]),
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?;
        let oom_kills = cgroup.oom_kills().unwrap_or(0);
        let mut machine = Self {
            spec,
            cgroup,
            filters,
            container,
            listener: listen(spec)?,
            signals,
            connections: Vec::new(),
            log: LogWriter::open(&spec.machine_dir, spec.attempt, spec.log_limits),
            lines: Default::default(),
            phase: Phase::Created,
            started_at_ms: None,
            kill_at: None,
            sessions: 0,
            oom_kills_before: oom_kills,
            oom_kills_said: oom_kills,
            memory_look_at: Instant::now() + MEMORY_LOOK,
            ended: None,
            over: [false; 3],
            buffer: vec![0; READ_BYTES],
        };
        if spec.limits.swap_bytes > 0 && !has_swap() {
            machine.log.line("system", "swap_size_mb has no effect: this host has no swap; `swapon` gives it some");
        }
        if spec.start {
            machine.start_program()?;
        }
        Ok(machine)
    }

    fn start_program(&mut self) -> io::Result<()> {
        self.container.start.write_all(b"s")?;
        self.phase = Phase::Started;
        self.started_at_ms = Some(now_ms());
        Ok(())
    }

    /// The loop; returns how the machine ended.
    fn supervise(&mut self) -> ExitRecord {
        let init_status = loop {
            self.wait_for_something();
            self.read_output();
            self.read_report();
            self.serve_connections();
            self.start_one_exec();
            self.accept();
            if let Some(status) = self.reap() {
                break status;
            }
            self.look_at_memory();
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.kill_at = None;
                self.kill();
            }
        };
        self.finish(init_status)
    }

    fn wait_for_something(&self) {
        let pipes =
            [self.container.stdout.as_fd(), self.container.stderr.as_fd(), self.container.report.as_fd()];
        // A pipe that is over is always ready: asking for it would keep a processor busy.
        let pipes = pipes.into_iter().zip(self.over).filter(|(_, over)| !over).map(|(pipe, _)| pipe);
        let listener = (self.connections.len() < MAX_CONNECTIONS).then(|| self.listener.as_fd());
        let mut fds: Vec<PollFd<'_>> = [self.signals.as_fd()]
            .into_iter()
            .chain(listener)
            .chain(pipes)
            .chain(self.connections.iter().map(|connection| connection.socket.as_fd()))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let timeout = if self.connections.iter().any(|connection| connection.asked.is_some()) {
            PollTimeout::ZERO
        } else {
            let next = self.kill_at.map_or(self.memory_look_at, |at| at.min(self.memory_look_at));
            // Rounded up, or its last millisecond would be spent asking.
            let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)
        };
        let _ = poll(&mut fds, timeout); // interrupted: look at everything once more
    }

    /// The kernel ends one process of many: the program lives on, only worse, and nobody would know why.
    fn look_at_memory(&mut self) {
        if Instant::now() < self.memory_look_at {
            return;
        }
        self.memory_look_at = Instant::now() + MEMORY_LOOK;
        self.log.look();
        let kills = self.cgroup.oom_kills().unwrap_or(self.oom_kills_said); // looked at again soon
        if kills > self.oom_kills_said {
            self.oom_kills_said = kills;
            let limit = self.spec.limits.memory_bytes >> 20;
            let line = format!(
                "out of memory: the kernel ended a process, because all together used the machine's {limit} MiB; \
                 give it more with `memory` under [[vm]]"
            );
            self.log.line("system", &line);
        }
    }

    fn read_output(&mut self) -> bool {
        let mut read_any = false;
        for i in 0..2 {
            let stream = if i == 0 { "stdout" } else { "stderr" };
            let until = Instant::now() + READ_WITHIN;
            while Instant::now() < until {
                let read = if i == 0 {
                    (&self.container.stdout).read(&mut self.buffer)
                } else {
                    (&self.container.stderr).read(&mut self.buffer)
                };
                match read {
                    Ok(n) if n > 0 => {
                        read_any = true;
                        self.lines[i].push(&self.buffer[..n], |line| self.log.line(stream, line));
                    }
                    Ok(_) => {
                        self.over[i] = true;
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
        read_any
    }

    fn read_report(&mut self) {
        let mut bytes = vec![0; 4096];
        while let Ok(n) = (&self.container.report).read(&mut bytes) {
            if n == 0 {
                self.over[2] = true;
                break;
            }
            for line in String::from_utf8_lossy(&bytes[..n]).lines() {
                if line == STARTED {
                    continue;
                }
                self.ended = if let Some(why) = line.strip_prefix(FAILED) {
                    Some(Ended::Error(why.to_owned()))
                } else if let Some(how) = line.strip_prefix(EXITED) {
                    match how.split_once(' ').map(|(kind, number)| (kind, number.parse())) {
                        Some(("code", Ok(code))) => Some(Ended::Code(code)),
                        Some(("signal", Ok(signal))) => Some(Ended::Signal(signal)),
                        _ => None,
                    }
                } else {
                    None
                };
            }
        }
    }

    fn accept(&mut self) {
        use nix::sys::socket::{SockFlag, accept4};
        use std::os::fd::FromRawFd;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        while self.connections.len() < MAX_CONNECTIONS
            && let Ok(fd) = accept4(self.listener.as_raw_fd(), flags)
        {
            // SAFETY: just accepted, owned by nobody else.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            self.connections.push(Connection { socket, session: None, asked: None });
        }
    }

    fn serve_connections(&mut self) {
        let mut i = 0;
        while i < self.connections.len() {
            let fd = self.connections[i].socket.as_raw_fd();
            match wire::receive::<Request>(fd) {
                Ok(Some((request, fds))) => {
                    self.serve(i, fd, request, fds);
                    i += 1;
                }
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => i += 1,
                // Gone, or not speaking our language: what it started ends with it.
                Ok(None) | Err(_) => {
                    let connection = self.connections.swap_remove(i);
                    if let Some(session) = connection.session {
                        session.clear();
                    }
                }
            }
        }
    }

    /// A command may keep the supervisor waiting for seconds. One of them a round, after everything else
    /// that was asked: the agent's patience with a stop is longer than that.
    fn start_one_exec(&mut self) {
        let Some(i) = self.connections.iter().position(|connection| connection.asked.is_some()) else { return };
        let Some((exec, fds)) = self.connections[i].asked.take() else { return };
        let sessions = self.connections.iter().filter(|connection| connection.session.is_some()).count();
        let started = if sessions < MAX_SESSIONS {
            self.exec(&exec, fds)
        } else {
            Err(io::Error::other(format!("{MAX_SESSIONS} commands run beside the program; end one, then try again")))
        };
        let (answer, master) = match started {
            Ok((session, master)) => {
                self.connections[i].session = Some(session);
                (Say::Done, master)
            }
            Err(e) => (Say::Refused { error: e.to_string() }, None),
        };
        let master: Vec<RawFd> = master.iter().map(AsRawFd::as_raw_fd).collect();
        // It hung up: noticed in the next round.
        let _ = wire::send(self.connections[i].socket.as_raw_fd(), &answer, &master);
    }

    fn serve(&mut self, connection: usize, fd: RawFd, request: Request, fds: Vec<OwnedFd>) {
        let done = |result: io::Result<()>| match result {
            Ok(()) => Say::Done,
            Err(e) => Say::Refused { error: e.to_string() },
        };
        if request.v != WIRE_VERSION {
            let error = format!("this supervisor speaks version {WIRE_VERSION}, not {}", request.v);
            let _ = wire::send(fd, &Say::Refused { error }, &[]);
            return;
        }
        let answer = match request.ask {
            Ask::Status => Say::Status(Status {
                attempt: self.spec.attempt,
                phase: self.phase,
                init_pid: self.container.init,
                started_at_ms: self.started_at_ms,
            }),
            Ask::Start if self.phase == Phase::Created => done(self.start_program()),
            Ask::Start => Say::Done,
            Ask::Signal { signal } => done(self.signal(signal)),
            Ask::Stop { signal, timeout_ms } => {
                let at = Instant::now() + Duration::from_millis(timeout_ms.min(MAX_STOP_MS));
                self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
                let _ = self.cgroup.thaw(); // suspended or not: a frozen process hears no signal
                let created = self.phase == Phase::Created;
                self.phase = Phase::Stopping;
                done(if created { self.signal(libc::SIGKILL) } else { self.signal(signal) })
            }
            Ask::Kill => {
                self.phase = Phase::Stopping;
                self.kill();
                Say::Done
            }
            Ask::Exec(exec) => {
                let Connection { session, asked, .. } = &mut self.connections[connection];
                if session.is_none() && asked.is_none() {
                    *asked = Some((exec, fds));
                    return;
                }
                Say::Refused { error: "a connection carries one session".into() }
            }
            Ask::SignalExec { signal } => {
                if let (Some(session), Ok(signal)) = (&self.connections[connection].session, Signal::try_from(signal)) {
                    let _ = session.signal(signal); // it may have ended
                }
                return;
            }
        };
        let _ = wire::send(fd, &answer, &[]); // it hung up: noticed in the next round
    }

    fn exec(&mut self, exec: &wire::ExecSpec, fds: Vec<OwnedFd>) -> io::Result<(Session, Option<OwnedFd>)> {
        if self.phase != Phase::Started {
            return Err(io::Error::other("the machine's program is not running"));
        }
        let stdio: Vec<OwnedFd> = fds.into_iter().map(exec::above_stdio).collect::<io::Result<_>>()?;
        if stdio.len() != if exec.terminal.is_some() { 0 } else { 3 } {
            return Err(io::Error::other("an exec comes with three descriptors, on a terminal with none"));
        }
        self.sessions += 1;
        let target = Target {
            spec: self.spec,
            init: self.container.init_fd.as_fd(),
            cgroup: self.cgroup,
            filters: &self.filters,
        };
        exec::start(&target, exec, &stdio, &format!("x{}", self.sessions))
    }

    /// To the program, through its parent; SIGKILL cannot be passed on and ends the machine.
    fn signal(&self, signal: i32) -> io::Result<()> {
        let signal = Signal::try_from(signal)?;
        match nix::sys::signal::kill(Pid::from_raw(self.container.init), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn kill(&mut self) {
        if let Err(e) = self.cgroup.kill_until_empty(KILL_DEADLINE) {
            self.log.line("system", &format!("the machine could not be ended: {e}"));
        }
    }

    /// Reaps children: exec sessions, and the first process, whose end is the machine's.
    fn reap(&mut self) -> Option<WaitStatus> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return None,
                Ok(status) => status,
            };
            let Some(pid) = status.pid() else { continue };
            if pid.as_raw() == self.container.init {
                return Some(status);
            }
            let session_of = |c: &Connection| c.session.as_ref().is_some_and(|s| s.pid == pid.as_raw());
            if let Some(i) = self.connections.iter().position(session_of) {
                let mut connection = self.connections.swap_remove(i);
                let (exit_code, signal) = code_and_signal(status);
                let _ = wire::send(connection.socket.as_raw_fd(), &Say::ExecExited { exit_code, signal }, &[]);
                if let Some(session) = connection.session.take() {
                    session.clear();
                }
            }
        }
    }

    fn finish(&mut self, init_status: WaitStatus) -> ExitRecord {
        self.read_report();
        for connection in std::mem::take(&mut self.connections) {
            if let Some(session) = connection.session {
                session.clear();
            }
        }
        let deadline = Instant::now() + DRAIN_DEADLINE;
        while self.read_output() && Instant::now() < deadline {}
        for i in 0..2 {
            let stream = if i == 0 { "stdout" } else { "stderr" };
            self.lines[i].finish(|line| self.log.line(stream, line));
        }
        let requested_stop = self.phase == Phase::Stopping;
        let oom_killed = self.cgroup.oom_kills().is_ok_and(|kills| kills > self.oom_kills_before);
        let mut record = ExitRecord {
            attempt: self.spec.attempt,
            exit_code: None,
            signal: None,
            oom_killed: oom_killed && !requested_stop,
            requested_stop,
            at_ms: now_ms(),
            error: None,
        };
        match self.ended.take() {
            Some(Ended::Code(code)) => record.exit_code = Some(code),
            Some(Ended::Signal(signal)) => record.signal = Some(signal),
            Some(Ended::Error(error)) => record.error = Some(error),
            None => (record.exit_code, record.signal) = code_and_signal(init_status),
        }
        // Out of memory often shows as another exit: only the kernel's own kill counts.
        record.oom_killed &= record.signal == Some(libc::SIGKILL) || record.exit_code == Some(137);
        self.log.line("system", &said(&record));
        record
    }
}

/// A table with a line of titles. One that cannot be read says nothing against it.
fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |table| table.lines().count() > 1)
}

fn said(record: &ExitRecord) -> String {
    match record {
        ExitRecord { error: Some(error), .. } => format!("could not be started: {error}"),
        ExitRecord { oom_killed: true, .. } => "ended: out of memory".into(),
        ExitRecord { exit_code: Some(code), .. } => format!("ended with exit code {code}"),
        ExitRecord { signal: Some(signal), .. } => {
            let name = Signal::try_from(*signal).map_or("unknown", Signal::as_str);
            format!("ended by signal {name}")
        }
        _ => "ended".into(),
    }
}

fn code_and_signal(status: WaitStatus) -> (Option<i32>, Option<i32>) {
    match status {
        WaitStatus::Exited(_, code) => (Some(code), None),
        WaitStatus::Signaled(_, signal, _) => (None, Some(signal as i32)),
        _ => (None, None),
    }
}

fn listen(spec: &SupervisorSpec) -> io::Result<OwnedFd> {
    use nix::sys::socket::{Backlog, bind, listen};
    let dir = File::open(&spec.machine_dir)?;
    match fs::remove_file(spec.machine_dir.join("sock")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = wire::socket()?;
    bind(socket.as_raw_fd(), &wire::address(&dir)?)?;
    fs::set_permissions(spec.machine_dir.join("sock"), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    listen(&socket, Backlog::new(16)?)?;
    set_nonblocking(socket.as_fd())?;
    Ok(socket)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
