//! What starts when, what is started again, and in which order all of it ends.

use super::Machine;
use crate::container;
use crate::exec::{self, Session};
use crate::member::{Ended, Member, Stage};
use crate::rootfs::{self, HostMounts};
use crate::wire::{ExecSpec, Phase};
use dunlin_model::Condition;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// A container is not made while the machine stands still; then this is waited.
const SUSPENDED_PAUSE: Duration = Duration::from_secs(1);

impl Machine<'_> {
    /// A container has ended: it is tried again, or is over, and the machine with it unless another one waited for that.
    pub(super) fn has_ended(&mut self, nth: usize) {
        let member = &mut self.members[nth];
        let next = if self.ending.is_some() { None } else { member.next_try() };
        member.stage = next.map_or(Stage::Over, |pause| Stage::Resting { until: Instant::now() + pause });
        let name = &member.rules.name;
        let how = member.last.as_ref();
        if let (false, Some(how)) = (name.is_empty(), how) {
            let then = next.map_or(String::new(), |pause| format!("; it is tried again in {} ms", pause.as_millis()));
            self.log.line_of(name, "system", &format!("container {name} {}{then}", how.said()));
        }
        if next.is_some() || self.ending.is_some() {
            return;
        }
        let waits = |other: &Member<'_>| {
            let mut needs = other.rules.depends_on.iter();
            needs.any(|need| need.name == *name && need.condition == Condition::ExitedSuccessfully)
        };
        if !(how.is_some_and(Ended::is_success) && self.members.iter().any(waits)) {
            self.cause = Some(nth);
            self.begin_ending(None, Duration::from_millis(self.spec.stop_timeout_ms));
        }
    }

    /// The end of a check's command is its result; false: it was none.
    pub(super) fn check_has_ended(&mut self, pid: libc::pid_t, status: WaitStatus) -> bool {
        let found = self.members.iter().enumerate().find_map(|(nth, member)| Some((nth, member.health.of_process(pid)?)));
        let Some((nth, check)) = found else { return false };
        self.check_result(nth, check, matches!(status, WaitStatus::Exited(_, 0)));
        true
    }

    fn check_result(&mut self, nth: usize, check: usize, passed: bool) {
        let member = &mut self.members[nth];
        let runs_for = member.runs_for();
        if let Some(news) = member.health.result(check, passed, runs_for) {
            let name = &member.rules.name;
            self.log.line_of(name, "system", &format!("container {name}: {news}"));
        }
        if member.stage == Stage::Running && member.health.asks_for_stop() {
            let own = member.rules.stop_signal.and_then(|signal| Signal::try_from(signal).ok());
            member.stop_unhealthy(own.unwrap_or(Signal::SIGTERM));
        }
    }

    /// Ends checks that take too long, and begins one a round: that may keep the supervisor waiting.
    fn make_checks(&mut self) {
        let running = self.members.iter().enumerate().filter(|(_, member)| member.stage == Stage::Running);
        let mut due = running.filter(|(_, member)| member.health.wakes_at().is_some_and(|at| Instant::now() >= at));
        let Some((nth, _)) = due.next() else { return };
        if self.cgroup.is_frozen().unwrap_or(false) {
            self.members[nth].health.put_off(SUSPENDED_PAUSE);
            return;
        }
        while let Some(late) = self.members[nth].health.late() {
            self.check_result(nth, late, false);
        }
        let Some((check, exec)) = self.members[nth].health.due() else { return };
        match self.begin_check(nth, &exec) {
            Ok(session) => self.members[nth].health.has_begun(check, session),
            Err(_) => self.check_result(nth, check, false),
        }
    }

    fn begin_check(&mut self, nth: usize, exec: &ExecSpec) -> io::Result<Session> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let stdio = (0..3).map(|_| exec::above_stdio(null()?)).collect::<io::Result<Vec<_>>>()?;
        self.begin_session(nth, exec, &stdio).map(|(session, _)| session)
    }

    /// All containers are to end within this time, each after those that depend on it. Asked again, it may become
    /// shorter, and those that were told already are told again.
    pub(super) fn begin_ending(&mut self, signal: Option<i32>, within: Duration) {
        let at = Instant::now() + within;
        self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
        if let (Some(_), Some(Ok(signal))) = (self.ending, signal.map(Signal::try_from)) {
            let told = self.members.iter().filter(|member| member.stage == Stage::Stopping);
            for member in told {
                let _ = member.signal(signal); // it may have ended
            }
        }
        self.ending = Some(signal.or(self.ending.flatten()));
        self.stop_in_order();
    }

    fn stop_in_order(&mut self) {
        let Some(asked) = self.ending else { return };
        let is_alone = self.members.len() == 1;
        for nth in 0..self.members.len() {
            let member = &self.members[nth];
            let is_needed = |other: &Member<'_>| {
                other.is_alive() && other.rules.depends_on.iter().any(|need| need.name == member.rules.name)
            };
            match member.stage {
                Stage::Stopping | Stage::Over => {}
                Stage::Resting { .. } => self.members[nth].stage = Stage::Over,
                _ if self.members.iter().any(is_needed) => {}
                _ => {
                    let own = member.rules.stop_signal;
                    let signal = if is_alone { asked.or(own) } else { own.or(asked) };
                    let signal = signal.and_then(|signal| Signal::try_from(signal).ok()).unwrap_or(Signal::SIGTERM);
                    self.members[nth].stop(signal);
                }
            }
        }
    }

    /// What its time or another container's progress brings to each container.
    pub(super) fn advance(&mut self) {
        let now = Instant::now();
        for member in &mut self.members {
            if member.kill_at.is_some_and(|at| now >= at) {
                member.kill_at = None;
                let _ = member.signal(Signal::SIGKILL); // it may have ended
            }
        }
        self.stop_in_order();
        self.make_checks();
        for nth in 0..self.members.len() {
            if matches!(self.members[nth].stage, Stage::Resting { until } if now >= until) {
                self.make_again(nth);
            }
        }
        if self.phase == Phase::Started
            && self.ending.is_none()
            && let Err(e) = self.start_waiting()
        {
            self.log.line("system", &format!("a container could not be started: {e}")); // its end follows
        }
    }

    pub(super) fn start_waiting(&mut self) -> io::Result<()> {
        for nth in 0..self.members.len() {
            let mut needs = self.members[nth].rules.depends_on.iter();
            let is_met = needs.all(|need| {
                self.members.iter().any(|other| other.rules.name == need.name && other.has_come_to(need.condition))
            });
            if is_met && self.members[nth].stage == Stage::Waiting {
                self.members[nth].start()?;
            }
        }
        Ok(())
    }

    /// A root file system, which is fresh unless its writable layer is kept, and a first process, in the machine's namespaces.
    fn make_again(&mut self, nth: usize) {
        if self.cgroup.is_frozen().unwrap_or(false) {
            self.members[nth].stage = Stage::Resting { until: Instant::now() + SUSPENDED_PAUSE };
            return;
        }
        let spec = &self.members[nth].spec;
        let made = HostMounts::leave().and_then(|host_mounts| {
            let join = |init| self.cgroup.add(init).map_err(io::Error::other);
            let made = rootfs::begin(spec)
                .and_then(|begun| container::create(spec, &self.filters, begun, &mut self.namespaces, join));
            host_mounts.come_back()?;
            made
        });
        if let Err(e) = made.and_then(|container| self.members[nth].take(container)) {
            self.members[nth].last = Some(Ended::Error(e.to_string()));
            self.has_ended(nth);
        }
    }
}
