//! The per-machine supervisor: a hidden personality of the binary, single-threaded, without an async
//! runtime. It outlives the agent, so that an upgrade or a crash of the agent stops no machine.
//!
//! It takes the machine's lock, makes the machine, keeps its log, answers the agent, and when the
//! program ends writes the exit record (fsynced) and ends itself. What becomes of several containers is `life`'s.

mod life;

use crate::cgroup::{CgroupError, Limits, MachineCgroup};
use crate::container::{self, FAILED, Namespaces};
use crate::exec::{self, Session, Target};
use crate::files::{self, ExitFile, ExitRecord, now_ms};
use crate::layer;
use crate::logs::LogWriter;
use crate::member::{Ended, Member, Stage};
use crate::rootfs::{self, Begun, HostMounts};
use crate::seccomp::Filters;
use crate::spec::{SupervisorSpec, WIRE_VERSION, text_buffer};
use crate::wire::{self, Ask, Phase, Request, Say, Status};
use crate::sys;
use dunlin_model::containers::default_container;
use dunlin_model::ContainerStatus;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Connections at once; more of them wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 64;
/// Commands beside the program at once: fewer than connections, so that a stop is always heard.
const MAX_SESSIONS: usize = 32;
const KILL_DEADLINE: Duration = Duration::from_secs(10);
const READ_BYTES: usize = 16 * 1024;
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
    let mut text = text_buffer();
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
    // What is in memory by now counts for the control group of the agent, whatever that of the supervisor says of swap.
    let _ = sys::lock_memory(); // refused to ordinary users, whose servers may be swapped
    let _lock = files::take_lock(&spec.machine_dir)
        .map_err(|e| io::Error::other(format!("another supervisor has machine {}: {e}", spec.machine_id)))?;
    let _ = fs::write("/proc/self/oom_score_adj", "-900"); // refused without CAP_SYS_RESOURCE: the agent says so
    // First, because mounting waits longest.
    let begun = HostMounts::leave().and_then(|host| {
        let begun = spec.members().map(|(spec, _)| rootfs::begin(&spec)).collect::<io::Result<Vec<_>>>()?;
        Ok((host, begun))
    });
    let mut exit_file = ExitFile::prepare(&spec.machine_dir, spec.attempt)
        .map_err(|e| io::Error::new(e.kind(), format!("the place for its exit record cannot be made: {e}")))?;
    kill_point(&spec, "supervisor.before-make");
    let own = fresh_cgroup(&spec, &SupervisorSpec::supervisor_cgroup(&spec.machine_id), None)?;
    let cgroup = fresh_cgroup(&spec, &SupervisorSpec::machine_cgroup(&spec.machine_id), Some(&spec.limits))?;
    if let Some(cpus) = &spec.cpus {
        cgroup.set_cpus(cpus).map_err(io::Error::other)?;
    }
    let made = begun.and_then(|begun| Machine::create(&spec, &own, &cgroup, begun)).and_then(|machine| {
        own.set_cpu_limit(&Limits { cpu_millis: OWN_CPU_MILLIS, ..Limits::NONE }).map_err(io::Error::other)?;
        Ok(machine)
    });
    let record = match made {
        Ok(mut machine) => {
            kill_point(&spec, "supervisor.before-announce");
            announce()?;
            kill_point(&spec, "supervisor.after-announce");
            let record = machine.supervise();
            (spec.start || machine.started_at_ms.is_some()).then_some(record)
        }
        Err(e) => {
            // The agent hears of it now and finds it again after a crash of its own.
            say(&format!("{FAILED}{e}"));
            spec.start.then(|| failed_record(&spec, e.to_string()))
        }
    };
    let _ = cgroup.kill_until_empty(KILL_DEADLINE); // the agent's clean-up tries again
    // One that only stood ready was no attempt: its number is that of the next, which must not find a record of it.
    let Some(record) = record else { return exit_file.discard() };
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
    namespaces: Option<Namespaces>,
    /// Its containers; the first has the machine's own root.
    members: Vec<Member<'a>>,
    listener: OwnedFd,
    signals: SignalFd,
    connections: Vec<Connection>,
    log: LogWriter,
    phase: Phase,
    started_at_ms: Option<u64>,
    kill_at: Option<Instant>,
    /// All containers are being ended, with the signal that was asked for.
    ending: Option<Option<i32>>,
    /// The one whose end is the machine's.
    cause: Option<usize>,
    sessions: u64,
    oom_kills_before: u64,
    /// Those that the log tells of, and when to look again.
    oom_kills_said: u64,
    memory_look_at: Instant,
    buffer: Vec<u8>,
}

impl<'a> Machine<'a> {
    fn create(
        spec: &'a SupervisorSpec,
        own: &MachineCgroup,
        cgroup: &'a MachineCgroup,
        begun: (HostMounts, Vec<Begun>),
    ) -> io::Result<Self> {
        let (host_mounts, begun) = begun;
        let filters = Filters::compile(spec.profile).map_err(io::Error::other)?;
        let mut namespaces = None;
        let mut members: Vec<Member<'a>> = spec.members().map(|(spec, rules)| Member::new(spec, rules)).collect();
        for (member, begun) in members.iter_mut().zip(begun) {
            let is_first = namespaces.is_none();
            let join = |init| {
                if is_first {
                    kill_point(spec, "supervisor.before-join");
                    own.add(0).map_err(io::Error::other)?;
                }
                cgroup.add(init).map_err(io::Error::other)
            };
            let container = container::create(&member.spec, &filters, begun, &mut namespaces, join)?;
            container.wait_until_ready()?;
            member.take(container)?;
            member.stage = Stage::Waiting;
        }
        host_mounts.come_back()?;
        let signals = SignalFd::with_flags(
            &SigSet::from_iter([Signal::SIGCHLD]),
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?;
        let oom_kills = cgroup.oom_kills().unwrap_or(0);
        let mut machine = Self {
            spec,
            cgroup,
            filters,
            namespaces,
            members,
            listener: listen(spec)?,
            signals,
            connections: Vec::new(),
            log: LogWriter::open(&spec.machine_dir, spec.attempt, spec.log_limits),
            phase: Phase::Created,
            started_at_ms: None,
            kill_at: None,
            ending: None,
            cause: None,
            sessions: 0,
            oom_kills_before: oom_kills,
            oom_kills_said: oom_kills,
            memory_look_at: Instant::now() + MEMORY_LOOK,
            buffer: vec![0; READ_BYTES],
        };
        if spec.limits.swap_bytes > 0 && !has_swap() {
            machine.log.line("system", "swap_size_mb has no effect: this host has no swap; `swapon` gives it some");
        }
        if spec.start {
            machine.start_programs()?;
        }
        Ok(machine)
    }

    fn start_programs(&mut self) -> io::Result<()> {
        self.phase = Phase::Started;
        self.started_at_ms = Some(now_ms());
        self.start_waiting()
    }

    /// The loop; returns how the machine ended.
    fn supervise(&mut self) -> ExitRecord {
        loop {
            self.wait_for_something();
            self.read_output();
            self.read_reports();
            self.serve_connections();
            self.start_one_exec();
            self.accept();
            self.reap();
            self.advance();
            if self.members.iter().all(|member| member.stage == Stage::Over) {
                return self.finish();
            }
            self.look_at_memory();
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.kill_at = None;
                self.kill();
            }
        }
    }

    fn wait_for_something(&self) {
        let listener = (self.connections.len() < MAX_CONNECTIONS).then(|| self.listener.as_fd());
        let mut fds: Vec<PollFd<'_>> = [self.signals.as_fd()]
            .into_iter()
            .chain(listener)
            .chain(self.members.iter().flat_map(Member::pipes))
            .chain(self.connections.iter().map(|connection| connection.socket.as_fd()))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let timeout = if self.connections.iter().any(|connection| connection.asked.is_some()) {
            PollTimeout::ZERO
        } else {
            let timers = self.members.iter().filter_map(Member::wakes_at).chain(self.kill_at);
            let next = timers.fold(self.memory_look_at, Instant::min);
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
        self.bypass_caches();
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

    /// Not while a program starts: it would wait for the disk.
    fn bypass_caches(&mut self) {
        let containers = self.members.iter_mut().filter_map(|member| member.container.as_mut());
        let devices = containers.flat_map(|container| std::mem::take(&mut container.devices)).collect();
        if let Err(e) = layer::bypass_cache_of(devices) {
            self.log.line("system", &format!("what it writes stays in the host's page cache too: {e}"));
        }
    }

    fn read_output(&mut self) {
        for member in &mut self.members {
            member.read_output(&mut self.buffer, &mut self.log);
        }
    }

    fn read_reports(&mut self) {
        self.members.iter_mut().for_each(Member::read_report);
        let broken = self.members.iter().position(Member::is_broken);
        if let (Some(_), None) = (broken, self.ending) {
            self.cause = broken;
            self.begin_ending(None, Duration::from_millis(self.spec.stop_timeout_ms));
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
                init_pid: self.init_pid(),
                started_at_ms: self.started_at_ms,
                containers: self.statuses(),
            }),
            Ask::Start if self.phase == Phase::Created => done(self.start_programs()),
            Ask::Start => Say::Done,
            Ask::Signal { signal } => done(self.signal(signal)),
            Ask::Stop { signal, .. } if Signal::try_from(signal).is_err() => {
                Say::Refused { error: format!("{signal} is no signal") }
            }
            Ask::Stop { signal, timeout_ms } => {
                let _ = self.cgroup.thaw(); // suspended or not: a frozen process hears no signal
                self.phase = Phase::Stopping;
                self.begin_ending(Some(signal), Duration::from_millis(timeout_ms.min(MAX_STOP_MS)));
                Say::Done
            }
            Ask::Kill => {
                self.phase = Phase::Stopping;
                self.begin_ending(Some(libc::SIGKILL), Duration::ZERO);
                self.kill();
                Say::Done
            }
            Ask::Exec(exec) => {
                let Connection { session, asked, .. } = &mut self.connections[connection];
                if session.is_none() && asked.is_none() {
                    *asked = Some((*exec, fds));
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
        let nth = self.member_of(&exec.container)?;
        let stdio: Vec<OwnedFd> = fds.into_iter().map(exec::above_stdio).collect::<io::Result<_>>()?;
        if stdio.len() != if exec.terminal.is_some() { 0 } else { 3 } {
            return Err(io::Error::other("an exec comes with three descriptors, on a terminal with none"));
        }
        self.begin_session(nth, exec, &stdio)
    }

    fn begin_session(
        &mut self,
        nth: usize,
        exec: &wire::ExecSpec,
        stdio: &[OwnedFd],
    ) -> io::Result<(Session, Option<OwnedFd>)> {
        let member = &self.members[nth];
        let (Phase::Started, Some(container), true) = (self.phase, &member.container, member.is_up()) else {
            let name = &member.rules.name;
            let which = if name.is_empty() { "the machine's program".into() } else { format!("container {name}") };
            return Err(io::Error::other(format!("{which} is not running")));
        };
        self.sessions += 1;
        let target = Target {
            spec: &member.spec,
            init: container.init_fd.as_fd(),
            cgroup: self.cgroup,
            filters: &self.filters,
        };
        exec::start(&target, exec, stdio, &format!("x{}", self.sessions))
    }

    /// The container of this name; of none, the default one.
    fn member_of(&self, name: &str) -> io::Result<usize> {
        let names = || self.members.iter().map(|member| member.rules.name.as_str());
        if name.is_empty() {
            return Ok(default_container(names()));
        }
        names().position(|other| other == name).ok_or_else(|| {
            let those: Vec<&str> = names().filter(|name| !name.is_empty()).collect();
            let those = if those.is_empty() { "no names for its one program".into() } else { those.join(", ") };
            io::Error::other(format!("there is no container {name:?}; the machine has {those}"))
        })
    }

    fn init_pid(&self) -> i32 {
        let default = default_container(self.members.iter().map(|member| member.rules.name.as_str()));
        let alive = |member: &Member<'_>| member.container.as_ref().map(|container| container.init);
        self.members.get(default).and_then(alive).or_else(|| self.members.iter().find_map(alive)).unwrap_or(0)
    }

    fn statuses(&self) -> Vec<ContainerStatus> {
        let named = self.members.iter().filter(|member| !member.rules.name.is_empty());
        named.map(|member| ContainerStatus { name: member.rules.name.clone(), state: member.state() }).collect()
    }

    /// To all programs. SIGKILL ends the machine: no policy starts a container again that a person killed.
    fn signal(&mut self, signal: i32) -> io::Result<()> {
        let signal = Signal::try_from(signal)?;
        if signal == Signal::SIGKILL && self.ending.is_none() {
            self.begin_ending(Some(libc::SIGKILL), Duration::ZERO);
        }
        self.members.iter().try_for_each(|member| member.signal(signal))
    }

    fn kill(&mut self) {
        if let Err(e) = self.cgroup.kill_until_empty(KILL_DEADLINE) {
            self.log.line("system", &format!("the machine could not be ended: {e}"));
        }
    }

    /// Reaps children: exec sessions, and the first processes of containers.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => status,
            };
            let Some(pid) = status.pid() else { continue };
            let is_init = |member: &Member<'_>| member.container.as_ref().is_some_and(|c| c.init == pid.as_raw());
            if let Some(nth) = self.members.iter().position(is_init) {
                self.members[nth].end(status, &mut self.buffer, &mut self.log);
                self.has_ended(nth);
                continue;
            }
            if self.check_has_ended(pid.as_raw(), status) {
                continue;
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

    fn finish(&mut self) -> ExitRecord {
        for connection in std::mem::take(&mut self.connections) {
            if let Some(session) = connection.session {
                session.clear();
            }
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
        let default = default_container(self.members.iter().map(|member| member.rules.name.as_str()));
        match &self.members[self.cause.unwrap_or(default)].last {
            Some(Ended::Code(code)) => record.exit_code = Some(*code),
            Some(Ended::Signal(signal)) => record.signal = Some(*signal),
            Some(Ended::Error(error)) => record.error = Some(error.clone()),
            None => {} // it was not made again
        }
        // Out of memory often shows as another exit: only the kernel's own kill counts.
        record.oom_killed &= record.signal == Some(libc::SIGKILL) || record.exit_code == Some(137);
        if self.started_at_ms.is_some() {
            self.log.line("system", &said(&record));
        }
        record
    }
}

/// A table with a line of titles. One that cannot be read says nothing against it.
fn has_swap() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |table| table.lines().count() > 1)
}

fn said(record: &ExitRecord) -> String {
    match record {
        ExitRecord { error: Some(error), .. } => Ended::Error(error.clone()).said(),
        ExitRecord { oom_killed: true, .. } => "ended: out of memory".into(),
        ExitRecord { exit_code: Some(code), .. } => Ended::Code(*code).said(),
        ExitRecord { signal: Some(signal), .. } => Ended::Signal(*signal).said(),
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

pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
