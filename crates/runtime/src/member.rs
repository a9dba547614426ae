//! One container of a machine as its supervisor sees it: its first process, what it prints, and where it is in its life.

use crate::container::{Container, EXITED, FAILED, READY, STARTED};
use crate::health::Health;
use crate::logs::{LineSplitter, LogWriter};
use crate::spec::{ContainerRules, SupervisorSpec};
use dunlin_model::{Condition, ContainerState, RestartWhen};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

const STREAMS: [&str; 2] = ["stdout", "stderr"];
/// Output is read this long before everything else gets its turn.
const READ_WITHIN: Duration = Duration::from_millis(10);
/// How long output that is still in the pipes is read after the end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
/// One that ran this long ran well: its failure begins a new count.
const RAN_WELL: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
    Error(String),
}

impl Ended {
    fn by(status: WaitStatus) -> Self {
        match status {
            WaitStatus::Exited(_, code) => Self::Code(code),
            WaitStatus::Signaled(_, signal, _) => Self::Signal(signal as i32),
            other => Self::Error(format!("its first process is {other:?}")),
        }
    }

    pub fn is_success(&self) -> bool {
        *self == Self::Code(0)
    }

    pub fn said(&self) -> String {
        match self {
            Self::Error(error) => format!("could not be started: {error}"),
            Self::Code(code) => format!("ended with exit code {code}"),
            Self::Signal(signal) => {
                let name = Signal::try_from(*signal).map_or("unknown", Signal::as_str);
                format!("ended by signal {name}")
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its first process makes its root file system.
    Making,
    /// Made; waits for the machine's start, and for what it depends on.
    Waiting,
    Starting,
    Running,
    /// Told to end.
    Stopping,
    /// Ended, and is tried again.
    Resting { until: Instant },
    /// Ended for good.
    Over,
}

pub(crate) struct Member<'a> {
    /// As if it were the machine's only container.
    pub spec: Cow<'a, SupervisorSpec>,
    pub rules: &'a ContainerRules,
    /// While its first process lives.
    pub container: Option<Container>,
    pub stage: Stage,
    pub has_run: bool,
    pub health: Health<'a>,
    /// It was told to end because a check failed.
    pub was_unhealthy: bool,
    /// How it ended the last time.
    pub last: Option<Ended>,
    /// When it is killed, having been told to end.
    pub kill_at: Option<Instant>,
    outputs: Vec<Output>,
    /// Set by its first process's report.
    reported: Option<Ended>,
    /// Nobody can write to its report any more.
    report_over: bool,
    running_since: Option<Instant>,
    /// In a row.
    retries: u32,
}

/// What one program prints.
#[derive(Default)]
struct Output {
    /// Whose lines these are, where there is a choice.
    program: String,
    lines: [LineSplitter; 2],
    /// Nobody can write to it any more. A program may close its output and live on.
    over: [bool; 2],
}

impl<'a> Member<'a> {
    pub fn new(spec: Cow<'a, SupervisorSpec>, rules: &'a ContainerRules) -> Self {
        Self {
            spec,
            rules,
            container: None,
            stage: Stage::Making,
            has_run: false,
            health: Health::of(&rules.healthchecks),
            was_unhealthy: false,
            last: None,
            kill_at: None,
            outputs: vec![],
            reported: None,
            report_over: false,
            running_since: None,
            retries: 0,
        }
    }

    /// Its first process has been made.
    pub fn take(&mut self, container: Container) -> io::Result<()> {
        let pipes = container.outputs.iter().flatten().map(AsFd::as_fd);
        pipes.chain([container.report.as_fd()]).try_for_each(super::supervisor::set_nonblocking)?;
        let several = container.outputs.len() > 1;
        let program = |nth| if several { format!("processes[{nth}]") } else { self.rules.name.clone() };
        self.outputs =
            (0..container.outputs.len()).map(|nth| Output { program: program(nth), ..Output::default() }).collect();
        self.container = Some(container);
        self.stage = Stage::Making;
        (self.reported, self.report_over, self.running_since, self.kill_at) = (None, false, None, None);
        self.was_unhealthy = false;
        Ok(())
    }

    /// What to look at for something to read. A pipe that is over is always ready: asking for it would keep a
    /// processor busy.
    pub fn pipes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.container.iter().flat_map(|container| {
            let over = self.outputs.iter().flat_map(|output| output.over);
            let outputs = container.outputs.iter().flatten().map(AsFd::as_fd).zip(over);
            outputs.chain([(container.report.as_fd(), self.report_over)]).filter(|(_, over)| !over).map(|(pipe, _)| pipe)
        })
    }

    pub fn read_output(&mut self, buffer: &mut [u8], log: &mut LogWriter) -> bool {
        let Some(container) = &self.container else { return false };
        let mut read_any = false;
        for (pipes, output) in container.outputs.iter().zip(&mut self.outputs) {
            for (i, stream) in STREAMS.into_iter().enumerate() {
                let until = Instant::now() + READ_WITHIN;
                while Instant::now() < until {
                    match (&pipes[i]).read(buffer) {
                        Ok(n) if n > 0 => {
                            read_any = true;
                            output.lines[i].push(&buffer[..n], |line| log.line_of(&output.program, stream, line));
                        }
                        Ok(_) => {
                            output.over[i] = true;
                            break;
                        }
                        Err(_) => break,
                    }
                }
            }
        }
        read_any
    }

    /// Since it started.
    pub fn runs_for(&self) -> Duration {
        self.running_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn read_report(&mut self) {
        let Some(container) = &self.container else { return };
        let mut bytes = vec![0; 4096];
        while let Ok(n) = (&container.report).read(&mut bytes) {
            if n == 0 {
                self.report_over = true;
                break;
            }
            for line in String::from_utf8_lossy(&bytes[..n]).lines() {
                match line {
                    READY if self.stage == Stage::Making => self.stage = Stage::Waiting,
                    STARTED => {
                        self.has_run = true;
                        self.running_since = Some(Instant::now());
                        self.health.forget();
                        if self.stage == Stage::Starting {
                            self.stage = Stage::Running;
                        }
                    }
                    _ => self.reported = ended(line).or(self.reported.take()),
                }
            }
        }
    }

    /// Told to end because a check fails; its restart policy decides what follows.
    pub fn stop_unhealthy(&mut self, signal: Signal) {
        self.stop(signal);
        let within = self.rules.stop_timeout_ms.unwrap_or(self.spec.stop_timeout_ms);
        self.kill_at = Some(Instant::now() + Duration::from_millis(within));
        self.was_unhealthy = true;
    }

    /// Of several programs one has ended, and the others have not yet.
    pub fn is_broken(&self) -> bool {
        self.container.is_some() && self.outputs.len() > 1 && self.reported.is_some()
    }

    /// Its first process is there.
    pub fn is_alive(&self) -> bool {
        self.container.is_some()
    }

    pub fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Running)
    }

    /// When something is to be done for it.
    pub fn wakes_at(&self) -> Option<Instant> {
        match self.stage {
            Stage::Resting { until } => Some(until),
            Stage::Running => self.health.wakes_at(),
            _ => self.kill_at,
        }
    }

    /// Whether others may start that wait for this.
    pub fn has_come_to(&self, condition: Condition) -> bool {
        match condition {
            Condition::Started => self.has_run,
            Condition::Healthy => self.stage == Stage::Running && self.health.is_healthy() == Some(true),
            Condition::ExitedSuccessfully => {
                self.stage == Stage::Over && self.last.as_ref().is_some_and(Ended::is_success)
            }
        }
    }

    pub fn state(&self) -> ContainerState {
        match self.stage {
            Stage::Making | Stage::Waiting | Stage::Resting { .. } => ContainerState::Pending,
            Stage::Starting => ContainerState::Starting,
            Stage::Running => match self.health.is_healthy() {
                None => ContainerState::Running,
                Some(true) => ContainerState::Healthy,
                Some(false) => ContainerState::Unhealthy,
            },
            Stage::Stopping => ContainerState::Stopping,
            Stage::Over => ContainerState::Stopped,
        }
    }

    pub fn start(&mut self) -> io::Result<()> {
        if let Some(container) = &mut self.container {
            container.start.write_all(b"s")?;
            self.stage = Stage::Starting;
        }
        Ok(())
    }

    /// To its programs, through their parent. SIGKILL cannot be passed on: it ends the container.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let Some(container) = &self.container else { return Ok(()) };
        match kill(Pid::from_raw(container.init), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Told to end. One that has no program yet has nothing to tidy up.
    pub fn stop(&mut self, signal: Signal) {
        let signal = if self.is_up() { signal } else { Signal::SIGKILL };
        let _ = self.signal(signal); // its own child: there, or ended
        self.kill_at = self.rules.stop_timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        self.stage = Stage::Stopping;
    }

    /// Its first process has ended, and with it all of its processes.
    pub fn end(&mut self, status: WaitStatus, buffer: &mut [u8], log: &mut LogWriter) -> &Ended {
        self.read_report();
        let deadline = Instant::now() + DRAIN_DEADLINE;
        while self.read_output(buffer, log) && Instant::now() < deadline {}
        for output in &mut self.outputs {
            for (lines, stream) in output.lines.iter_mut().zip(STREAMS) {
                lines.finish(|line| log.line_of(&output.program, stream, line));
            }
        }
        self.health.forget();
        (self.container, self.kill_at) = (None, None);
        let ended = self.reported.take();
        self.last.insert(ended.unwrap_or_else(|| Ended::by(status)))
    }

    /// How long after its last end it is tried again, by its restart policy.
    pub fn next_try(&mut self) -> Option<Duration> {
        if self.runs_for() >= RAN_WELL {
            self.retries = 0;
        }
        let has_failed = self.was_unhealthy || !self.last.as_ref().is_some_and(Ended::is_success);
        let again = match self.rules.restart.policy {
            RestartWhen::No => false,
            RestartWhen::Always => true,
            RestartWhen::OnFailure => has_failed && self.retries < self.rules.restart.max_retries,
        };
        again.then(|| {
            self.retries += 1;
            pause(self.retries)
        })
    }
}

/// Before the `n`th try in a row, from 1.
fn pause(n: u32) -> Duration {
    (FIRST_PAUSE * (1 << n.saturating_sub(1).min(10))).min(LONGEST_PAUSE)
}

fn ended(line: &str) -> Option<Ended> {
    if let Some(why) = line.strip_prefix(FAILED) {
        return Some(Ended::Error(why.to_owned()));
    }
    let (kind, number) = line.strip_prefix(EXITED)?.split_once(' ')?;
    let number = number.parse().ok()?;
    match kind {
        "code" => Some(Ended::Code(number)),
        "signal" => Some(Ended::Signal(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        let pauses: Vec<u64> = [1, 2, 3, 4, 8, 100].map(|n| pause(n).as_millis() as u64).into();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 60_000, 60_000]);
    }

    #[test]
    fn reports_are_read() {
        assert_eq!(ended("exited code 3"), Some(Ended::Code(3)));
        assert_eq!(ended("exited signal 9"), Some(Ended::Signal(9)));
        assert_eq!(ended("failed no such file"), Some(Ended::Error("no such file".into())));
        assert_eq!(ended("started"), None);
        assert_eq!(ended("exited code x"), None);
    }
}
