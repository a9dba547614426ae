//! The agent's thread: owns all machines and the journal, hears inputs one at a time.

use crate::act::{self, Acts};
use crate::checks::Checks;
use crate::journal::{Journal, JournalError, Replayed};
use crate::kill::kill_point;
use crate::sleep::Load;
use crate::{Shared, convert, cpus, now_ms, tombstones, volumes};
use dunlin_api::{Refusal, Reserve};
use dunlin_cluster::View;
use dunlin_machine::{Alive, Asked, Deny, Effect, Event, Machine, Order, Record, Verb};
use dunlin_model::{CommandId, MachineId, MachineState};
use dunlin_runtime::Phase;
use dunlin_view::{CheckStatus, ConfigState, HostFact, MachineFact, Snapshot};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Machines that a host carries at most; also the number of uid ranges.
pub const MAX_MACHINES: usize = 4096;
/// Uid ranges begin here: above what distributions and people use.
pub(crate) const FIRST_UID: u32 = 100_000_000;
/// Between tries to journal what happened while the disk is full.
const FULL_DISK_PAUSE: Duration = Duration::from_secs(1);
/// Between facts of a machine that only say a check's result in other words.
const CHECK_FACTS_PAUSE: Duration = Duration::from_secs(1);
/// How often the host says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);

pub type Reply = oneshot::Sender<Result<Asked, No>>;

/// Why a command is not obeyed.
#[derive(Debug)]
pub enum No {
    Denied(Deny),
    /// There is no such machine yet, or no more.
    NotKnown,
    /// It could not be written down.
    DiskFull,
}

/// All that the agent ever hears.
pub enum Input {
    /// There is a newer view.
    View,
    /// The newest view once more, after the disk was full. One that was kept would be old by now.
    ViewAgain,
    /// What could not be recovered while the disk was full.
    Recover(MachineId),
    Event(MachineId, Event),
    Command { machine: MachineId, order: Order, reply: Reply },
    /// `answer` is the start of what the app said, for people who ask for it.
    Check { machine: MachineId, attempt: u64, status: CheckStatus, answer: String },
    CheckAnswer { machine: MachineId, check: String, reply: oneshot::Sender<Result<String, Refusal>> },
    Reserve(Reserve, oneshot::Sender<Result<(), Refusal>>),
    /// And whether it has containers, of which its supervisor knows more.
    Fact(MachineId, oneshot::Sender<Option<(MachineFact, bool)>>),
    /// Of it, what no fact says.
    Record(MachineId, oneshot::Sender<Option<Box<Record>>>),
    /// What its machines are made of.
    Images(oneshot::Sender<BTreeSet<String>>),
    Heartbeat,
    /// Which stopped machines should stand ready may have changed.
    Ready,
    Quit,
}

pub struct Slot {
    pub machine: Machine,
    /// Until then nothing is decided: the record does not say what is really there.
    recovered: bool,
    /// As they were published.
    pub statuses: BTreeMap<String, CheckStatus>,
    /// When a check last made a fact.
    said_at: Option<Instant>,
    /// What the app last said to each check.
    answers: BTreeMap<String, String>,
    checks: Option<Checks>,
    pub(crate) load: Option<Load>,
    /// It was told to end because others need its memory.
    pub(crate) makes_room: bool,
    replies: HashMap<CommandId, Reply>,
    pub(crate) acts: Acts,
}

pub struct Agent {
    pub(crate) shared: Arc<Shared>,
    pub(crate) journal: Journal,
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) slots: BTreeMap<MachineId, Slot>,
    /// Orders that wait until others have made room.
    pub(crate) parked: Vec<(MachineId, Order, Reply)>,
    /// That the host has given by itself.
    pub(crate) own_orders: u64,
    /// The computer was booted since the journal was written.
    rebooted: bool,
    looks_again: bool,
    pub(crate) looks_at_ready: bool,
    pub(crate) began: Instant,
}

/// Every newer snapshot becomes an input.
pub fn follow_view(view: View, inputs: mpsc::Sender<Input>) {
    let heartbeat = inputs.clone();
    tokio::spawn(async move {
        let mut changes = view.subscribe();
        let mut seen = None;
        let mut snapshot = changes.current();
        loop {
            // Only config facts concern the agent: host facts are its own.
            // A host that hears that it was removed has more tombstones in the generation that it knew.
            let news = (snapshot.config.generation, snapshot.config_confirmed, snapshot.config.tombstones.len());
            if seen != Some(news) {
                seen = Some(news);
                if inputs.send(Input::View).await.is_err() {
                    return;
                }
            }
            snapshot = changes.changed().await;
        }
    });
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(HEARTBEAT);
        loop {
            ticks.tick().await;
            if heartbeat.send(Input::Heartbeat).await.is_err() {
                return;
            }
        }
    });
}

impl Agent {
    pub fn new(shared: Arc<Shared>, journal: Journal, inputs: mpsc::Sender<Input>) -> Self {
        Self {
            shared,
            journal,
            inputs,
            slots: BTreeMap::new(),
            parked: Vec::new(),
            own_orders: 0,
            rebooted: false,
            looks_again: false,
            looks_at_ready: false,
            began: Instant::now(),
        }
    }

    pub fn run(mut self, replayed: Replayed, mut receiver: mpsc::Receiver<Input>) {
        self.recover(replayed);
        self.shared.recovered.send_replace(true);
        while let Some(input) = receiver.blocking_recv() {
            match input {
                Input::View => self.on_view(&self.shared.view.current()),
                Input::ViewAgain => {
                    self.looks_again = false;
                    self.on_view(&self.shared.view.current());
                }
                Input::Recover(id) => {
                    self.recover_one(&id);
                    self.mark_boot();
                }
                Input::Event(id, event) => self.dispatch(&id, event),
                Input::Command { machine, order, reply } => self.on_command(machine, order, reply),
                Input::Check { machine, attempt, status, answer } => self.on_check(&machine, attempt, status, answer),
                Input::CheckAnswer { machine, check, reply } => {
                    let _ = reply.send(self.check_answer(machine, &check)); // the caller went away
                }
                Input::Reserve(reserve, reply) => {
                    let _ = reply.send(self.reserve(reserve)); // the caller went away: it expires
                }
                Input::Fact(id, reply) => {
                    let fact = |slot: &Slot| (slot.fact(), !slot.machine.record().spec().containers.is_empty());
                    let _ = reply.send(self.slots.get(&id).map(fact));
                }
                Input::Record(id, reply) => {
                    let _ = reply.send(self.slots.get(&id).map(|slot| Box::new(slot.machine.record().clone())));
                }
                Input::Images(reply) => {
                    let _ = reply.send(self.images()); // as above
                }
                Input::Heartbeat => {
                    self.heartbeat();
                    self.put_to_sleep();
                    self.end_left_consoles();
                    self.start_what_is_due();
                    self.try_parked();
                }
                Input::Ready => self.fill_ready(),
                Input::Quit => return,
            }
        }
    }

    /// Machines live on while agents come and go: ask each supervisor, believe the kernel.
    fn recover(&mut self, replayed: Replayed) {
        self.rebooted = replayed.rebooted;
        let mut adopted = 0;
        volumes::release_strangers(&self.shared, &replayed.machines.keys().cloned().collect());
        cpus::recover(&self.shared, replayed.machines.values());
        for (id, record) in replayed.machines {
            self.slots.insert(id.clone(), Slot { recovered: false, ..Slot::new(Machine::from_record(record)) });
            adopted += usize::from(self.recover_one(&id));
        }
        self.mark_boot();
        tracing::info!(host = %self.shared.config.id, machines = self.slots.len(), adopted, "recovered");
        self.heartbeat();
    }

    /// Asks what is there at the time when it is believed; whether a supervisor lives.
    fn recover_one(&mut self, id: &MachineId) -> bool {
        let Some(slot) = self.slots.get(id).filter(|slot| !slot.recovered) else { return false };
        let dir = self.shared.machine_dir(id.as_str());
        let attempt = slot.machine.record().attempt;
        // One that stands ready is not this attempt: recovery ends it.
        let status = act::ask_supervisor(&dir).filter(|status| status.phase != Phase::Created);
        let exit = dunlin_runtime::read_exit(&dir, attempt).ok().flatten().map(convert::exit_info);
        let frozen = status.is_some() && act::is_frozen(&self.shared, id);
        let alive = Alive {
            frozen,
            attempt: status.as_ref().map(|status| status.attempt),
            stopping: status.is_some_and(|status| status.phase == Phase::Stopping),
            exit,
            rebooted: self.rebooted,
        };
        let lives = alive.attempt;
        self.dispatch(id, Event::Recovered(alive));
        if let Some(attempt) = lives.filter(|_| self.slots.get(id).is_some_and(|slot| slot.recovered)) {
            act::watch_exit(&self.shared, &self.inputs, id, attempt);
        }
        lives.is_some()
    }

    /// Once nothing of the boot is left to recover.
    fn mark_boot(&mut self) {
        if self.slots.values().all(|slot| slot.recovered)
            && let Err(error) = self.journal.mark_boot()
        {
            tracing::error!(error = %chain(&error), "the boot could not be recorded; the next start recovers as after a boot");
        }
    }

    fn on_view(&mut self, snapshot: &Arc<Snapshot>) {
        let config = &snapshot.config;
        let mut again = false;
        for (id, assignment) in &config.machines {
            if assignment.host != self.shared.config.id || config.tombstones.contains_key(id) {
                continue;
            }
            if self.slots.contains_key(id) {
                self.dispatch(id, Event::Assigned(Box::new(assignment.clone())));
                self.confirm_placement(id, snapshot);
                continue;
            }
            if self.rebooted && !snapshot.config_confirmed && assignment.spec.is_exclusive() {
                continue; // this disk's memory of desired state is no more than that of its journal
            }
            let Some(uid_base) = self.free_uid_base() else {
                tracing::error!(machine = %id, "this host carries {MAX_MACHINES} machines and takes no more");
                continue;
            };
            let (machine, effects) = Machine::assigned(assignment.clone(), uid_base, now_ms());
            self.slots.insert(id.clone(), Slot::new(machine));
            if !self.perform(id, effects) {
                self.slots.remove(id);
                again = true;
            }
        }
        self.obey_tombstones(config);
        if again {
            self.hear_again(Input::ViewAgain);
        }
    }

    /// What waits since the boot is started if it is here still, in the very placement that its record has.
    fn confirm_placement(&mut self, id: &MachineId, snapshot: &Snapshot) {
        let Some(slot) = self.slots.get(id).filter(|_| snapshot.config_confirmed) else { return };
        let record = slot.machine.record();
        let placement = snapshot.config.machines.get(id).map(|assignment| assignment.placement);
        if slot.recovered && record.unconfirmed && placement == Some(record.assignment.placement) {
            self.dispatch(id, Event::PlacementConfirmed);
        }
    }

    fn obey_tombstones(&mut self, config: &ConfigState) {
        let lives = |id: &MachineId| {
            self.slots.get(id).is_some_and(|slot| slot.machine.record().state != MachineState::Destroying)
        };
        let ours = config.tombstones.iter().filter(|(id, host)| **host == self.shared.config.id && lives(id));
        let (asked, unasked): (Vec<_>, Vec<_>) = ours.map(|(id, _)| id.clone()).partition(|id| config.asked_for.contains(id));
        let data_dir = &self.shared.config.data_dir;
        let waits = tombstones::wait_for_operator(unasked.len(), self.slots.len()) && !tombstones::take_approval(data_dir);
        let waiting = if waits { unasked.len() } else { 0 };
        if waiting > 0 && self.shared.tombstones_waiting.swap(waiting, Ordering::Relaxed) != waiting {
            tracing::error!(
                tombstones = waiting, machines = self.slots.len(),
                "more than a tenth of this host's machines would be destroyed at once, and no person asked for it: \
                 they live on; if it is right, run: touch {}", tombstones::approval(data_dir).display()
            );
        }
        self.shared.tombstones_waiting.store(waiting, Ordering::Relaxed);
        for id in asked.iter().chain(unasked.iter().filter(|_| !waits)) {
            self.dispatch(id, Event::Tombstone);
        }
    }

    /// The disk was full: the input comes back. Commands do not, their senders were told.
    fn hear_again(&mut self, input: Input) {
        // One look serves all machines: were there one for each, each would bring as many again.
        if matches!(input, Input::ViewAgain) && std::mem::replace(&mut self.looks_again, true) {
            return;
        }
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FULL_DISK_PAUSE).await;
            let _ = inputs.send(input).await; // the agent ended
        });
    }

    pub(crate) fn on_command(&mut self, id: MachineId, mut order: Order, reply: Reply) {
        order.room = self.room_to_start(&id);
        if order.verb == Verb::Wake && order.room.is_ok() {
            order.room = self.runs_enough(&id);
        }
        let Some((order, reply)) = self.park(&id, order, reply) else { return };
        let Some(slot) = self.slots.get_mut(&id) else {
            let _ = reply.send(Err(No::NotKnown)); // the caller did not wait
            return;
        };
        slot.replies.insert(order.id.clone(), reply);
        self.dispatch(&id, Event::Ordered(order));
    }

    /// What changes only the words of a result is a fact once a second at most, the latest: the next result
    /// brings it.
    fn on_check(&mut self, id: &MachineId, attempt: u64, status: CheckStatus, answer: String) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        let record = slot.machine.record();
        if record.attempt != attempt || record.state != MachineState::Started {
            return;
        }
        slot.answers.insert(status.name.clone(), answer);
        let published = slot.statuses.get(&status.name);
        let decides = published.is_none_or(|published| published.status != status.status);
        let says_more = published.is_some_and(|published| published.output != status.output);
        let rested = slot.said_at.is_none_or(|at| at.elapsed() >= CHECK_FACTS_PAUSE);
        if decides || says_more && rested {
            slot.statuses.insert(status.name.clone(), status);
            slot.said_at = Some(Instant::now());
            slot.machine.touch(now_ms());
            self.publish(id);
        }
    }

    fn check_answer(&self, machine: MachineId, check: &str) -> Result<String, Refusal> {
        let Some(slot) = self.slots.get(&machine) else { return Err(Refusal::NoSuchMachine(machine)) };
        if !slot.machine.record().spec().checks.iter().any(|known| known.name == check) {
            return Err(Refusal::Invalid(format!("machine {machine} has no check {check:?}")));
        }
        Ok(slot.answers.get(check).cloned().unwrap_or_default())
    }

    pub(crate) fn dispatch(&mut self, id: &MachineId, mut event: Event) {
        match &mut event {
            Event::Prepared { room, .. } => *room = self.room_to_update(id),
            Event::Due { room } => *room = self.room_to_start(id),
            _ => {}
        }
        let Some(slot) = self.slots.get_mut(id) else { return };
        let before = slot.machine.clone();
        let now = now_ms();
        let is_frozen = matches!(event, Event::Frozen { .. });
        let again = match &event {
            Event::Ordered(_) => None,
            // Meanwhile it may be assigned otherwise.
            Event::Assigned(_) => Some(Input::ViewAgain),
            Event::Recovered(_) => Some(Input::Recover(id.clone())),
            other => Some(Input::Event(id.clone(), other.clone())),
        };
        let recovers = matches!(event, Event::Recovered(_));
        if !slot.recovered && !recovers {
            if let Event::Ordered(order) = &event {
                let reply = slot.replies.remove(&order.id);
                let _ = reply.map(|reply| reply.send(Err(No::DiskFull))); // as below
            }
            if let Some(input) = again {
                self.hear_again(input);
            }
            return;
        }
        slot.recovered = true;
        let lost = if let Event::Exited(exit) = &event { exit.error.clone() } else { None };
        let effects = slot.machine.handle(event, now);
        let (from, to) = (before.record().state, slot.machine.record().state);
        if from != to {
            let record = slot.machine.record();
            tracing::info!(
                machine = %id, app = %record.spec().app, release = record.spec().release, attempt = record.attempt,
                from = from.as_str(), to = to.as_str(), "machine"
            );
            // One that is being destroyed is expected to lose its supervisor, and stays in its state.
            if let Some(why) = lost {
                tracing::warn!(machine = %id, attempt = record.attempt, "{why}");
            }
        }
        if !self.perform(id, effects)
            && let Some(slot) = self.slots.get_mut(id)
        {
            slot.machine = before;
            slot.recovered = !recovers;
            if let Some(input) = again {
                self.hear_again(input);
            }
        }
        if is_frozen {
            self.wake_if_needed(id);
        }
        if from == MachineState::Stopped || to == MachineState::Stopped {
            self.look_at_ready();
        }
        if from != to && !self.parked.is_empty() {
            self.try_parked();
        }
    }

    /// In order; `false` if the journal refused, and then nothing was done.
    fn perform(&mut self, id: &MachineId, effects: Vec<Effect>) -> bool {
        for effect in effects {
            let point = |name| kill_point(self.shared.config.kill_at.as_deref(), name);
            match effect {
                Effect::Journal => {
                    point("host.before-journal");
                    if !self.write_journal(id) {
                        return false;
                    }
                }
                Effect::Answer { id: command, answer } => {
                    point("host.before-answer");
                    let reply = self.slots.get_mut(id).and_then(|slot| slot.replies.remove(&command));
                    if let Some(reply) = reply {
                        let _ = reply.send(answer.map_err(No::Denied)); // the caller did not wait
                    }
                }
                Effect::Publish => {
                    point("host.before-publish");
                    self.publish(id);
                }
                Effect::Forget => {
                    point("host.before-forget");
                    self.forget(id);
                }
                other => {
                    if let Some(Slot { machine, acts, .. }) = self.slots.get_mut(id) {
                        act::perform(&self.shared, &self.inputs, acts, machine.record(), other);
                    }
                }
            }
        }
        true
    }

    fn write_journal(&mut self, id: &MachineId) -> bool {
        let Some(slot) = self.slots.get_mut(id) else { return false };
        let began = Instant::now();
        let written = self.journal.write(slot.machine.record());
        self.shared.journal_writes.fetch_add(1, Ordering::Relaxed);
        self.shared.journal_us.fetch_add(began.elapsed().as_micros() as u64, Ordering::Relaxed);
        match written {
            Ok(()) => true,
            Err(error @ JournalError::Full(_)) => {
                tracing::error!(machine = %id, %error, "nothing was done; free some space");
                for (_, reply) in slot.replies.drain() {
                    let _ = reply.send(Err(No::DiskFull)); // the caller did not wait
                }
                false
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the journal cannot be written; ending");
                std::process::abort();
            }
        }
    }

    /// Makes the newest fact known: to the last hop first, which must never admit what is over.
    fn publish(&mut self, id: &MachineId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        let record = slot.machine.record();
        if record.state != MachineState::Started {
            slot.statuses.clear();
            slot.checks = None;
        } else if slot.checks.as_ref().is_none_or(|checks| checks.attempt() != record.attempt) {
            slot.answers.clear();
            slot.statuses = record.spec().checks.iter().map(|check| (check.name.clone(), crate::checks::pending(check))).collect();
            slot.checks = Some(Checks::start(&self.shared, &self.inputs, record));
        }
        self.shared.table.set(id, record);
        let fact = slot.fact();
        if let Err(error) = self.shared.view.publish_machine(fact) {
            tracing::debug!(machine = %id, %error, "the view has a newer fact");
        }
    }

    fn forget(&mut self, id: &MachineId) {
        match self.journal.forget(id) {
            Ok(()) => {}
            Err(error @ JournalError::Full(_)) => {
                tracing::error!(machine = %id, %error, "a destroyed machine is not forgotten yet; free some space");
                return self.hear_again(Input::Event(id.clone(), Event::Destroyed));
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the journal cannot be written; ending");
                std::process::abort();
            }
        }
        self.slots.remove(id);
        self.shared.table.remove(id);
        self.shared.view.remove_machine(id);
    }

    fn heartbeat(&mut self) {
        let now = now_ms();
        self.journal.drop_expired(now);
        if self.shared.tombstones_waiting.load(Ordering::Relaxed) > 0 {
            self.obey_tombstones(&self.shared.view.current().config.clone());
        }
        let config = &self.shared.config;
        self.shared.view.publish_host(HostFact {
            id: config.id.clone(),
            region: config.region.clone(),
            cpus: config.cpus,
            memory_mb: config.memory_mb,
            memory_reserved_mb: self.held(&[]).memory_mb,
            room: Some(self.room_told()),
            updated_at_ms: now,
        });
    }

    /// The lowest range that no machine of the journal owns; a range is free once its files are gone.
    fn free_uid_base(&self) -> Option<u32> {
        let used: std::collections::BTreeSet<u32> =
            self.slots.values().map(|slot| slot.machine.record().uid_base).collect();
        (0..MAX_MACHINES as u32)
            .map(|n| FIRST_UID + n * dunlin_runtime::UID_RANGE)
            .find(|base| !used.contains(base))
    }
}

impl Slot {
    fn new(machine: Machine) -> Self {
        Self {
            machine,
            recovered: true,
            statuses: BTreeMap::new(),
            said_at: None,
            answers: BTreeMap::new(),
            checks: None,
            load: None,
            makes_room: false,
            replies: HashMap::new(),
            acts: Acts::default(),
        }
    }

    fn fact(&self) -> MachineFact {
        self.machine.record().fact(self.statuses.values().cloned().collect())
    }
}

/// An error with its sources, for one log line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
