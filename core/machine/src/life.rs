//! The state machine itself.

mod recovery;

use crate::command::{self, Asked, Checked, Deny, MAX_REMEMBERED, Order, Remembered, Verb};
use crate::event::{Effect, Event};
use crate::record::{Goal, Record, Stop};
use dunlin_model::hash::fnv1a;
use dunlin_model::{EventKind, ExitInfo, Lease, MachineId, MachineState, MachineVersion, RestartWhen, Source};
use dunlin_view::MachineAssignment;

/// An attempt that ran this long ran well: its failure begins a new count.
const RAN_WELL_MS: u64 = 60_000;
/// More check results than this between two journal entries would take weeks.
const SEQUENCE_GAP: u64 = 1 << 32;
const FIRST_BACKOFF_MS: u64 = 500;
const LONGEST_BACKOFF_MS: u64 = 60_000;
/// What is told of a machine that waits for [`Event::PlacementConfirmed`].
pub const UNCONFIRMED: &str = "its host was booted, and waits to hear from control that the machine is still placed here: \
    let the host reach control, or start the machine if it runs nowhere else";

/// A machine on its host.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    record: Record,
}

/// How the clock finds a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// It is to be started.
    Rests,
    /// It is left alone, and its time has passed.
    Runs,
    /// It is not its time, or it cannot be started now and its time waits.
    NotYet,
}

/// Time before the `n`th restart in a row (from 1): doubling, bounded, and up to a quarter more by the
/// seed, so that machines that failed together do not all come back together.
pub fn backoff_ms(n: u32, seed: u64) -> u64 {
    let base = (FIRST_BACKOFF_MS << n.saturating_sub(1).min(20)).min(LONGEST_BACKOFF_MS);
    base + seed % (base / 4)
}

/// Differs between machines and attempts, and is the same after a crash.
fn seed(id: &MachineId, attempt: u64) -> u64 {
    fnv1a(id.as_str().bytes().chain(attempt.to_le_bytes()))
}

impl Machine {
    /// A machine that was just assigned to this host.
    pub fn assigned(assignment: MachineAssignment, uid_base: u32, now_ms: u64) -> (Self, Vec<Effect>) {
        let spec = Box::new(assignment.spec.clone());
        let mut machine = Self { record: Record::new(assignment, uid_base, now_ms) };
        machine.record.note(EventKind::Launch, Source::Host, None, now_ms);
        let effects = machine.changed(now_ms, vec![Effect::Prepare(spec)]);
        (machine, effects)
    }

    /// From the journal; the next event must be [`Event::Recovered`].
    ///
    /// Facts since the last entry may have had higher sequences (check results are not journalled), so
    /// it goes on far above what it may have said.
    pub fn from_record(mut record: Record) -> Self {
        record.sequence += SEQUENCE_GAP;
        Self { record }
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What the checks say of an order, without giving it.
    pub fn check(&self, order: &Order, now_ms: u64) -> Checked {
        command::check(&self.record, order, now_ms)
    }

    /// A new fact is needed although the record's state is the same: a check's result changed. Not
    /// journalled: sequences skip ahead after a restart, see [`Machine::from_record`].
    pub fn touch(&mut self, now_ms: u64) {
        self.record.sequence += 1;
        self.record.updated_at_ms = now_ms;
    }

    /// Whether [`Event::Due`] would start it, if there is room.
    pub fn starts_by_clock(&self, now_ms: u64) -> bool {
        !self.record.unconfirmed && self.clock_finds(now_ms) == Found::Rests
    }

    /// The whole of it: what `event` means now.
    pub fn handle(&mut self, event: Event, now_ms: u64) -> Vec<Effect> {
        if self.record.state == MachineState::Destroyed {
            return match event {
                Event::Ordered(order) => self.on_order(&order, now_ms), // nothing is legal any more
                Event::Destroyed => vec![Effect::Forget],               // it could not be dropped the first time
                _ => Vec::new(),
            };
        }
        match event {
            Event::Assigned(assignment) => self.on_assigned(*assignment, now_ms),
            Event::Tombstone => self.on_tombstone(now_ms),
            Event::Ordered(order) => self.on_order(&order, now_ms),
            Event::Prepared { version, result, room } => self.on_prepared(&version, result, room, now_ms),
            Event::Spawned { attempt, result } => self.on_spawned(attempt, result, now_ms),
            Event::Frozen { attempt, result } => self.on_frozen(attempt, result, now_ms),
            Event::Exited(exit) => self.on_exited(exit, now_ms),
            Event::Tick => self.on_tick(now_ms),
            Event::Due { room } => self.on_due(room, now_ms),
            Event::Destroyed => self.on_destroyed(now_ms),
            Event::PlacementConfirmed => self.on_placement_confirmed(now_ms),
            Event::Recovered(alive) => self.on_recovered(alive, now_ms),
        }
    }

    /// Journal first, then the acts, then the fact.
    fn changed(&mut self, now_ms: u64, acts: Vec<Effect>) -> Vec<Effect> {
        self.record.look_at_schedule(now_ms);
        self.record.sequence += 1;
        self.record.updated_at_ms = now_ms;
        let mut effects = vec![Effect::Journal];
        effects.extend(acts);
        effects.push(Effect::Publish);
        effects
    }

    fn on_assigned(&mut self, assignment: MachineAssignment, now_ms: u64) -> Vec<Effect> {
        let record = &mut self.record;
        if assignment.placement < record.assignment.placement || record.state == MachineState::Destroying {
            return Vec::new();
        }
        let new_version = assignment.spec.version != record.assignment.spec.version;
        if !new_version && assignment.placement == record.assignment.placement {
            return Vec::new();
        }
        if assignment.placement != record.assignment.placement {
            record.lease = None;
        }
        let schedule = record.spec().schedule.clone();
        record.assignment = assignment;
        if record.spec().schedule != schedule {
            record.due_ms = None; // another schedule begins anew
        }
        if !new_version {
            return self.changed(now_ms, vec![]);
        }
        record.problem = None;
        record.prepared = false;
        let spec = Box::new(record.assignment.spec.clone());
        self.changed(now_ms, vec![Effect::Prepare(spec)])
    }

    fn on_tombstone(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.record.state == MachineState::Destroying {
            return Vec::new();
        }
        self.record.state = MachineState::Destroying;
        self.record.goal = Goal::Vanish;
        self.record.note(EventKind::Destroy, Source::Plan, None, now_ms);
        self.changed(now_ms, vec![Effect::Destroy])
    }

    fn on_order(&mut self, order: &Order, now_ms: u64) -> Vec<Effect> {
        let id = order.id.clone();
        let previous_state = self.record.state;
        let sequence = self.record.sequence;
        match command::check(&self.record, order, now_ms) {
            Checked::Repeated(answer) => vec![Effect::Answer { id, answer }],
            // A start that found no room is over for whoever sent it: room that comes later must not make it
            // happen behind his back. A request's start is never sent twice, and there may be many.
            Checked::Denied(deny @ Deny::NoRoom { .. }) if order.verb != Verb::Wake => {
                let answer = Err(deny);
                self.remember(Remembered { id: id.clone(), answer: answer.clone() });
                vec![Effect::Journal, Effect::Answer { id, answer }]
            }
            // Other refusals change nothing and are not remembered: a plan sends the same command until it
            // is right, for example until the host has seen the version that it expects.
            Checked::Denied(deny) => vec![Effect::Answer { id, answer: Err(deny) }],
            // Remembered as well, or a repeat that comes late would act.
            Checked::AlreadySo => {
                self.record.plan = self.record.plan.max(order.plan.unwrap_or_default());
                let answer = Ok(Asked { previous_state, sequence, lease: None });
                self.remember(Remembered { id: id.clone(), answer: answer.clone() });
                vec![Effect::Journal, Effect::Answer { id, answer }]
            }
            Checked::Allowed => {
                self.record.plan = self.record.plan.max(order.plan.unwrap_or_default());
                let then = self.obey(order, now_ms);
                let lease = self.record.lease(now_ms).filter(|_| matches!(order.verb, Verb::Lease { .. })).cloned();
                let answer = Ok(Asked { previous_state, sequence: sequence + 1, lease });
                self.remember(Remembered { id: id.clone(), answer: answer.clone() });
                let mut acts = vec![Effect::Answer { id, answer }];
                acts.extend(then);
                self.changed(now_ms, acts)
            }
        }
    }

    fn remember(&mut self, remembered: Remembered) {
        if self.record.commands.len() == MAX_REMEMBERED {
            self.record.commands.pop_front();
        }
        self.record.commands.push_back(remembered);
    }

    fn obey(&mut self, order: &Order, now_ms: u64) -> Vec<Effect> {
        let before = self.record.state;
        let effects = self.obey_verb(order, now_ms);
        let kind = match &order.verb {
            Verb::Start | Verb::Wake if matches!(before, MachineState::Suspending | MachineState::Suspended) => EventKind::Resume,
            Verb::Start | Verb::Wake => EventKind::Start,
            Verb::Stop { .. } => EventKind::Stop,
            Verb::Restart { .. } => EventKind::Restart,
            Verb::Signal { .. } => EventKind::Signal,
            Verb::Suspend => EventKind::Suspend,
            Verb::Cordon => EventKind::Cordon,
            Verb::Uncordon => EventKind::Uncordon,
            Verb::Lease { .. } | Verb::Release => return effects,
        };
        if kind == EventKind::Start {
            self.note_launch(now_ms);
        }
        self.record.note(kind, order.source, order.request_id.clone(), now_ms);
        effects
    }

    fn obey_verb(&mut self, order: &Order, now_ms: u64) -> Vec<Effect> {
        let record = &mut self.record;
        match &order.verb {
            // Whoever says it knows where it is to run; a wake is not let come so far.
            Verb::Start | Verb::Wake => {
                record.unconfirmed = false;
                self.start_or_resume(now_ms)
            }
            Verb::Suspend => {
                record.state = MachineState::Suspending;
                record.goal = Goal::Rest;
                record.suspended_at_ms = now_ms;
                vec![Effect::Freeze { attempt: record.attempt }]
            }
            Verb::Lease { nonce, ttl_ms, owner, description } => {
                let nonce = order.nonce.as_ref().unwrap_or(nonce).clone();
                let expires_at_ms = now_ms.saturating_add(*ttl_ms);
                record.lease = Some(Lease { nonce, owner: owner.clone(), description: description.clone(), expires_at_ms });
                vec![]
            }
            Verb::Release => {
                record.lease = None;
                vec![]
            }
            Verb::Stop { signal, timeout_ms } => {
                record.goal = Goal::Rest;
                if record.state == MachineState::Restarting {
                    record.state = MachineState::Stopped;
                    record.restart_at_ms = None;
                    record.problem.take_if(|problem| problem == UNCONFIRMED);
                    return vec![];
                }
                record.state = MachineState::Stopping;
                vec![self.stop(*signal, *timeout_ms, now_ms)]
            }
            Verb::Restart { signal, timeout_ms } => {
                record.goal = Goal::Again;
                record.state = MachineState::Stopping;
                vec![self.stop(*signal, *timeout_ms, now_ms)]
            }
            Verb::Signal { signal } => vec![Effect::Signal { signal: *signal }],
            Verb::Cordon => {
                record.cordoned = true;
                vec![]
            }
            Verb::Uncordon => {
                record.cordoned = false;
                vec![]
            }
        }
    }

    /// Somebody wants it to run.
    fn start_or_resume(&mut self, now_ms: u64) -> Vec<Effect> {
        let record = &mut self.record;
        if matches!(record.state, MachineState::Suspending | MachineState::Suspended) {
            record.state = MachineState::Started;
            record.goal = Goal::Run;
            return vec![Effect::Thaw { attempt: record.attempt }];
        }
        record.restarts = 0;
        self.start(now_ms)
    }

    /// Nobody asked for it now: it is to run.
    fn start_or_wait(&mut self, now_ms: u64) -> Vec<Effect> {
        if !self.record.unconfirmed {
            return self.start(now_ms);
        }
        let record = &mut self.record;
        record.state = MachineState::Restarting;
        record.goal = Goal::Run;
        record.restart_at_ms = None;
        record.stop = None;
        record.problem = Some(UNCONFIRMED.to_owned());
        vec![]
    }

    fn start(&mut self, now_ms: u64) -> Vec<Effect> {
        let record = &mut self.record;
        // A machine that could not be prepared and is told to start: the spawn tries once more.
        record.current.get_or_insert_with(|| record.assignment.spec.clone());
        record.attempt += 1;
        record.state = MachineState::Starting;
        record.goal = Goal::Run;
        record.started_at_ms = now_ms;
        record.restart_at_ms = None;
        record.stop = None;
        record.problem = None;
        vec![Effect::Spawn { attempt: record.attempt }]
    }

    /// Kept, so that it is told as it was asked for, however often the agent is killed before it tells. A second
    /// one never gives more time.
    fn stop(&mut self, signal: Option<i32>, timeout_ms: Option<u64>, now_ms: u64) -> Effect {
        let timeout_ms = timeout_ms.unwrap_or(self.record.spec().stop.timeout_ms);
        let until_ms = now_ms.saturating_add(timeout_ms);
        let until_ms = self.record.stop.map_or(until_ms, |earlier| earlier.until_ms.min(until_ms));
        self.record.stop = Some(Stop { signal, until_ms });
        Effect::Stop { signal, timeout_ms: until_ms.saturating_sub(now_ms) }
    }

    fn on_prepared(
        &mut self,
        version: &MachineVersion,
        result: Result<(), String>,
        room: Result<(), String>,
        now_ms: u64,
    ) -> Vec<Effect> {
        let superseded = *version != self.record.assignment.spec.version;
        if superseded || self.record.is_current() || self.record.state == MachineState::Destroying {
            return Vec::new();
        }
        let record = &mut self.record;
        if let Err(why) = result {
            record.problem = Some(why);
            if record.current.is_none() {
                record.state = MachineState::Failed;
            }
            return self.changed(now_ms, vec![]);
        }
        // Its next start would ask for room; one that goes on running never starts in between. What stops for
        // good holds nothing then.
        let rests = record.assignment.spec.rests;
        let goes_on = record.holds_resources() && record.goal != Goal::Rest && !rests;
        if let Err(why) = room
            && goes_on
            && record.grows()
        {
            record.problem = Some(format!("it stays in version {}: {why}", record.version()));
            return self.changed(now_ms, vec![]);
        }
        record.prepared = true;
        record.problem = None;
        use MachineState as S;
        match record.state {
            S::Starting | S::Started => {
                (record.state, record.goal) = if rests { (S::Stopping, Goal::Rest) } else { (S::Updating, Goal::Again) };
                let stop = self.stop(None, None, now_ms);
                self.changed(now_ms, vec![stop])
            }
            // Its end brings the new version.
            S::Stopping | S::Updating => {
                if rests {
                    (record.state, record.goal) = (S::Stopping, Goal::Rest);
                }
                self.changed(now_ms, vec![])
            }
            S::Destroying | S::Destroyed => unreachable!("returned above"),
            S::Restarting if rests => {
                self.swap(now_ms);
                let record = &mut self.record;
                (record.state, record.goal, record.restart_at_ms) = (S::Stopped, Goal::Rest, None);
                self.changed(now_ms, vec![])
            }
            S::Restarting => {
                self.swap(now_ms);
                let start = self.start_or_wait(now_ms);
                self.note_start(now_ms);
                self.changed(now_ms, start)
            }
            S::Creating | S::Created | S::Failed => {
                self.swap(now_ms);
                self.record.state = S::Created;
                self.changed(now_ms, vec![])
            }
            // It cannot go on in another version, and it goes on sleeping.
            S::Suspending | S::Suspended => {
                self.record.state = S::Stopping;
                let stop = self.stop(None, None, now_ms);
                self.changed(now_ms, vec![stop])
            }
            S::Stopped => {
                self.swap(now_ms);
                self.record.state = S::Stopped;
                self.changed(now_ms, vec![])
            }
        }
    }

    /// Takes up the version that it should be in: counts begin anew.
    fn swap(&mut self, now_ms: u64) {
        let record = &mut self.record;
        let first = record.current.is_none();
        if record.spec().schedule != record.assignment.spec.schedule {
            record.due_ms = None; // another schedule begins anew
        }
        record.current = Some(record.assignment.spec.clone());
        record.exit = None;
        record.restarts = 0;
        record.problem = None;
        let source = if record.spec().release == 0 { Source::User } else { Source::Plan };
        if first {
            return; // told by its launch
        }
        record.note(EventKind::Update, source, None, now_ms);
    }

    fn on_spawned(&mut self, attempt: u64, result: Result<(), String>, now_ms: u64) -> Vec<Effect> {
        if attempt != self.record.attempt {
            return Vec::new();
        }
        match (result, self.record.state) {
            (Ok(()), MachineState::Starting) => {
                self.record.state = MachineState::Started;
                self.changed(now_ms, vec![])
            }
            // Stopped or replaced while it started: the stop waits behind the spawn.
            (Ok(()), _) => Vec::new(),
            (Err(error), _) => self.on_exited(failed_attempt(attempt, error, now_ms), now_ms),
        }
    }

    fn on_frozen(&mut self, attempt: u64, result: Result<(), String>, now_ms: u64) -> Vec<Effect> {
        if attempt != self.record.attempt {
            return Vec::new();
        }
        match (self.record.state, result) {
            (MachineState::Suspending, Ok(())) => {
                self.record.state = MachineState::Suspended;
                self.changed(now_ms, vec![])
            }
            // Suspended already: an earlier freeze was heard of after the suspend that asked for this one.
            (MachineState::Suspending | MachineState::Suspended, Err(_)) => {
                self.record.state = MachineState::Started;
                self.record.goal = Goal::Run;
                self.record.note(EventKind::Resume, Source::Host, None, now_ms);
                self.changed(now_ms, vec![Effect::Thaw { attempt }])
            }
            _ => Vec::new(), // it was asked for something else meanwhile, which comes after the freeze
        }
    }

    fn on_exited(&mut self, exit: ExitInfo, now_ms: u64) -> Vec<Effect> {
        if exit.attempt != self.record.attempt || !self.record.may_live() {
            return vec![Effect::Acknowledge { attempt: exit.attempt }]; // told twice, or of an earlier one
        }
        if self.record.goal == Goal::Vanish {
            return Vec::new(); // being destroyed; that tells when it is done
        }
        let ran_ms = exit.at_ms.saturating_sub(self.record.started_at_ms);
        let failed = exit.exit_code != Some(0);
        let attempt = exit.attempt;
        self.record.exit = Some(exit.clone());
        self.record.stop = None;
        let mut acts = vec![Effect::CleanUp { attempt }];
        let again = self.record.goal == Goal::Again;
        match self.record.goal {
            Goal::Again => {
                self.take_new_version(now_ms);
                acts.extend(self.start_or_wait(now_ms));
            }
            Goal::Rest | Goal::Vanish => {
                self.take_new_version(now_ms);
                self.record.state = MachineState::Stopped;
            }
            Goal::Run => acts.extend(self.by_policy(failed, ran_ms, now_ms)),
        }
        self.record.note_exit(exit, now_ms);
        if again {
            self.note_start(now_ms);
        }
        self.changed(now_ms, acts)
    }

    /// A version that was prepared while the old one ran. One that is not prepared yet has to wait: it may
    /// never be, and the old one is known to work.
    fn take_new_version(&mut self, now_ms: u64) {
        if !self.record.is_current() && self.record.prepared {
            self.swap(now_ms);
        }
    }

    fn by_policy(&mut self, failed: bool, ran_ms: u64, now_ms: u64) -> Vec<Effect> {
        let policy = self.record.spec().restart.clone();
        let record = &mut self.record;
        if ran_ms >= RAN_WELL_MS {
            record.restarts = 0;
        }
        let again = match policy.policy {
            RestartWhen::No => false,
            RestartWhen::Always => true,
            RestartWhen::OnFailure => failed,
        };
        if !again {
            record.state = if failed { MachineState::Failed } else { MachineState::Stopped };
            return vec![];
        }
        record.restarts += 1;
        if policy.policy == RestartWhen::OnFailure && record.restarts > policy.max_retries {
            record.state = MachineState::Failed;
            record.problem = Some(format!("it failed {} times in a row; the restart policy gave up", record.restarts));
            return vec![];
        }
        let ms = now_ms + backoff_ms(record.restarts, seed(&record.assignment.id, record.attempt));
        record.state = MachineState::Restarting;
        record.restart_at_ms = Some(ms);
        vec![Effect::WakeAt { ms }]
    }

    fn on_tick(&mut self, now_ms: u64) -> Vec<Effect> {
        match self.record.restart_at_ms {
            Some(at) if self.record.state == MachineState::Restarting && now_ms >= at => {
                let start = self.start_or_wait(now_ms);
                self.note_start(now_ms);
                self.changed(now_ms, start)
            }
            Some(at) if self.record.state == MachineState::Restarting => vec![Effect::WakeAt { ms: at }],
            _ => Vec::new(),
        }
    }

    /// What runs at its time is left alone, and what cannot start yet is started later: once, however many times passed.
    fn on_due(&mut self, room: Result<(), String>, now_ms: u64) -> Vec<Effect> {
        use MachineState as S;
        let found = self.clock_finds(now_ms);
        let record = &mut self.record;
        if found == Found::NotYet {
            return Vec::new();
        }
        let waits = match room {
            _ if record.unconfirmed => Some(UNCONFIRMED.to_owned()),
            Err(why) => Some(format!("its time has come and it waits for room: {why}")),
            Ok(()) => None,
        };
        if found == Found::Rests
            && let problem @ Some(_) = waits
        {
            if record.problem == problem {
                return Vec::new();
            }
            record.problem = problem;
            return self.changed(now_ms, vec![]);
        }
        record.due_ms = None; // the next one is after now
        if found == Found::Runs {
            return self.changed(now_ms, vec![]);
        }
        let resumes = matches!(record.state, S::Suspending | S::Suspended);
        let acts = self.start_or_resume(now_ms);
        let kind = if resumes { EventKind::Resume } else { EventKind::Start };
        if !resumes {
            self.note_launch(now_ms);
        }
        self.record.note(kind, Source::Host, None, now_ms);
        self.changed(now_ms, acts)
    }

    fn clock_finds(&self, now_ms: u64) -> Found {
        use MachineState as S;
        let record = &self.record;
        let has_come = record.due_ms.is_some_and(|due| now_ms >= due);
        if !has_come || record.is_over() || record.lease(now_ms).is_some() {
            return Found::NotYet;
        }
        match record.state {
            S::Created | S::Stopped | S::Failed | S::Suspending | S::Suspended => Found::Rests,
            S::Starting | S::Started | S::Updating | S::Restarting => Found::Runs,
            S::Creating | S::Stopping | S::Destroying | S::Destroyed => Found::NotYet,
        }
    }

    /// What was to run meanwhile is started; what waits for its back-off or its time waits on.
    fn on_placement_confirmed(&mut self, now_ms: u64) -> Vec<Effect> {
        let record = &mut self.record;
        if !record.unconfirmed {
            return Vec::new();
        }
        record.unconfirmed = false;
        record.problem.take_if(|problem| problem == UNCONFIRMED);
        let mut acts = vec![]; // the alarm of a back-off is set already
        if record.state == MachineState::Restarting && record.restart_at_ms.is_none() {
            acts = self.start(now_ms);
            self.note_start(now_ms);
        }
        self.changed(now_ms, acts)
    }

    /// By its host, if it does not wait.
    fn note_start(&mut self, now_ms: u64) {
        if self.record.state == MachineState::Starting {
            self.note_launch(now_ms);
            self.record.note(EventKind::Start, Source::Host, None, now_ms);
        }
    }

    /// The first start of a version is its launch, too: clients count from there.
    fn note_launch(&mut self, now_ms: u64) {
        let newest = self.record.events.iter().rev().find(|event| matches!(event.kind, EventKind::Launch | EventKind::Update));
        if let Some(source) = newest.filter(|event| event.kind == EventKind::Update).map(|event| event.source) {
            self.record.note(EventKind::Launch, source, None, now_ms);
        }
    }

    fn on_destroyed(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.record.state != MachineState::Destroying {
            return Vec::new();
        }
        self.record.state = MachineState::Destroyed;
        self.record.sequence += 1;
        self.record.updated_at_ms = now_ms;
        vec![Effect::Publish, Effect::Forget]
    }
}

fn failed_attempt(attempt: u64, error: String, at_ms: u64) -> ExitInfo {
    ExitInfo {
        attempt,
        exit_code: None,
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms,
        error: Some(error),
    }
}
