//! What of a machine survives a crash of its host's agent.

use crate::command::Remembered;
use dunlin_model::{
    CpuKind, EventKind, ExitInfo, Generation, Guest, Lease, MachineEvent, MachineSpec, MachineState, MachineVersion, Source,
};
use dunlin_view::{CheckStatus, MachineAssignment, MachineFact};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events of a machine that its host keeps.
pub const MAX_EVENTS: usize = 64;

/// What follows the end of the running attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Run, and be restarted as the policy says.
    Run,
    /// Somebody asked it to stop.
    Rest,
    /// Stop, then start again: a restart, or a new version.
    Again,
    /// Stop and be gone.
    Vanish,
}

/// How an attempt shall end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// `None`: as the spec or the image says.
    pub signal: Option<i32>,
    /// It is killed then.
    pub until_ms: u64,
}

/// The journalled state of one machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The newest assignment that was obeyed; its spec is the version to be in.
    pub assignment: MachineAssignment,
    /// The version that runs, or would run when started; `None` before the first is prepared.
    pub current: Option<MachineSpec>,
    /// Whether the files of the assignment's version are there.
    pub prepared: bool,
    /// First of the user ids that it owns on this host.
    pub uid_base: u32,
    pub state: MachineState,
    pub goal: Goal,
    /// Number of the newest try to run it.
    pub attempt: u64,
    /// When the newest attempt was started.
    pub started_at_ms: u64,
    /// Of the newest fact.
    pub sequence: u64,
    pub cordoned: bool,
    pub exit: Option<ExitInfo>,
    /// Failed attempts since it last ran well.
    pub restarts: u32,
    pub restart_at_ms: Option<u64>,
    /// The earliest time of its schedule that is not dealt with yet.
    #[serde(default)]
    pub due_ms: Option<u64>,
    /// The stop that was asked of the running attempt.
    #[serde(default)]
    pub stop: Option<Stop>,
    pub problem: Option<String>,
    /// The host was booted, and has not heard since that the machine, which is exclusive, is still placed here: the disk
    /// may be a copy, or an old one. Until then it is not started, but by a command.
    #[serde(default)]
    pub unconfirmed: bool,
    pub commands: VecDeque<Remembered>,
    /// The latest plan that was obeyed: (store incarnation, sequence).
    #[serde(default)]
    pub plan: Generation,
    /// May have ended: ask [`Record::lease`].
    #[serde(default)]
    pub lease: Option<Lease>,
    /// When it was suspended.
    #[serde(default)]
    pub suspended_at_ms: u64,
    /// The newest is last. Those that a journal has already it need not write again.
    #[serde(default)]
    pub events: VecDeque<MachineEvent>,
    /// Of the newest event.
    #[serde(default)]
    pub last_event: u64,
    pub updated_at_ms: u64,
}

impl Record {
    pub(crate) fn new(assignment: MachineAssignment, uid_base: u32, now_ms: u64) -> Self {
        Self {
            assignment,
            current: None,
            prepared: false,
            uid_base,
            state: MachineState::Creating,
            goal: Goal::Rest,
            attempt: 0,
            started_at_ms: 0,
            sequence: 0,
            cordoned: false,
            exit: None,
            restarts: 0,
            restart_at_ms: None,
            due_ms: None,
            stop: None,
            problem: None,
            unconfirmed: false,
            commands: VecDeque::new(),
            plan: Generation::default(),
            lease: None,
            suspended_at_ms: 0,
            events: VecDeque::new(),
            last_event: 0,
            updated_at_ms: now_ms,
        }
    }

    /// The spec that counts: what runs, or what is to be prepared first.
    pub fn spec(&self) -> &MachineSpec {
        self.current.as_ref().unwrap_or(&self.assignment.spec)
    }

    /// Whether the version that it should be in is the one that it is in.
    pub fn is_current(&self) -> bool {
        self.current.as_ref().is_some_and(|spec| spec.version == self.assignment.spec.version)
    }

    /// Whether its run has ended and it is to be destroyed then. Only a new version gives it another life.
    pub fn is_over(&self) -> bool {
        let rests = matches!(self.state, MachineState::Stopped | MachineState::Failed);
        rests && self.exit.is_some() && self.spec().auto_destroy
    }

    /// A schedule begins with its first time after now, and one that has gone is forgotten.
    pub(crate) fn look_at_schedule(&mut self, now_ms: u64) {
        self.due_ms = match (&self.spec().schedule, self.due_ms) {
            (Some(schedule), None) => schedule.next(&self.assignment.id, now_ms),
            (Some(_), known) => known,
            (None, _) => None,
        };
    }

    /// Whether an attempt may have processes.
    pub fn may_live(&self) -> bool {
        use MachineState::{Destroying, Started, Starting, Stopping, Suspended, Suspending, Updating};
        matches!(self.state, Starting | Started | Suspending | Suspended | Stopping | Updating)
            || self.state == Destroying && self.goal == Goal::Vanish && self.attempt > 0
    }

    /// Memory that counts as reserved.
    pub fn reserved_mb(&self) -> u32 {
        self.holding().map(|spec| spec.guest.memory_mb).max().unwrap_or(0)
    }

    /// Cores that are its alone.
    pub fn reserved_cores(&self) -> u32 {
        self.holding().map(|spec| own_cores(&spec.guest)).max().unwrap_or(0)
    }

    /// What runs, and what was let in to follow it.
    fn holding(&self) -> impl Iterator<Item = &MachineSpec> {
        let follows = self.prepared && !self.is_current() && self.goal != Goal::Rest;
        let next = follows.then_some(&self.assignment.spec);
        [self.spec()].into_iter().chain(next).filter(|_| self.holds_resources())
    }

    /// The lease that holds now.
    pub fn lease(&self, now_ms: u64) -> Option<&Lease> {
        self.lease.as_ref().filter(|lease| lease.is_live(now_ms))
    }

    /// Kept even if what follows it forgets how it ended.
    pub(crate) fn note_exit(&mut self, exit: ExitInfo, at_ms: u64) {
        self.note(EventKind::Exit, Source::Host, None, at_ms);
        if let Some(event) = self.events.back_mut() {
            event.exit = Some(exit);
        }
    }

    pub(crate) fn note(&mut self, kind: EventKind, source: Source, request_id: Option<String>, at_ms: u64) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.last_event += 1;
        self.events.push_back(MachineEvent {
            id: self.last_event,
            kind,
            status: self.state,
            source,
            at_ms,
            exit: None,
            restarts: self.restarts,
            request_id,
        });
    }

    /// Whether a request may start it.
    pub fn wakes(&self) -> bool {
        self.spec().services.iter().any(|service| service.autostart)
    }

    /// Whether the version that it should be in takes more of the host than what it holds.
    pub(crate) fn grows(&self) -> bool {
        let next = &self.assignment.spec.guest;
        next.memory_mb > self.reserved_mb() || own_cores(next) > self.reserved_cores()
    }

    pub fn holds_resources(&self) -> bool {
        self.may_live() || self.state == MachineState::Restarting
    }

    /// The version of the running attempt's spec, or of the next.
    pub fn version(&self) -> &MachineVersion {
        &self.spec().version
    }

    /// What the host publishes.
    pub fn fact(&self, checks: Vec<CheckStatus>) -> MachineFact {
        let spec = self.spec();
        MachineFact {
            id: self.assignment.id.clone(),
            host: self.assignment.host.clone(),
            app: spec.app.clone(),
            sequence: self.sequence,
            placement: self.assignment.placement,
            state: self.state,
            version: spec.version.clone(),
            release: spec.release,
            process_group: spec.process_group.as_str().into(),
            attempt: self.attempt,
            address: self.assignment.address,
            cordoned: self.cordoned,
            checks,
            exit: self.exit.clone().map(Box::new),
            restarts: self.restarts,
            problem: self.problem.clone(),
            over: self.is_over(),
            unconfirmed: self.unconfirmed && self.state == MachineState::Restarting,
            due_ms: self.due_ms,
            containers: vec![],
            updated_at_ms: self.updated_at_ms,
        }
    }
}

/// Shared cpus share all cores; a performance cpu has one for itself.
fn own_cores(guest: &Guest) -> u32 {
    if guest.cpu_kind == CpuKind::Performance { guest.cpus } else { 0 }
}
