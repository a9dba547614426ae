//! What must hold, whatever happens. Each hook hears of one thing as it happens and compares it with what was
//! promised before; the first promise that is broken ends the run.
//!
//! Nothing in here asks the core what is right.

use crate::world::MEMORY_MB;
use dunlin_machine::{Asked, Deny, MAX_REMEMBERED, Order, Record, Verb};
use dunlin_model::{CommandId, ExitInfo, Generation, Lease, MachineId, MachineState as S, MachineVersion, RestartWhen};
use dunlin_view::MachineAssignment;
use std::collections::{BTreeMap, BTreeSet};

/// What the newest acknowledged command wants of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Intent {
    /// Nobody ever started it.
    #[default]
    Nothing,
    Run,
    Rest,
    /// Suspended, until somebody starts it.
    Sleep,
    /// It was to run, and ended as its restart policy allows.
    Over,
}

#[derive(Default)]
pub struct Promised {
    pub intent: Intent,
    pub cordoned: bool,
    pub tombstoned: bool,
    pub alive: Option<u64>,
    counted: BTreeSet<CommandId>,
    /// First answers that are to be remembered, in their order.
    answers: Vec<(CommandId, Result<Asked, Deny>)>,
    /// As it was before the new command that was heard last.
    before: Option<(CommandId, Box<Record>, Option<Lease>)>,
    lease: Option<Lease>,
    /// Before the clock was looked at: when, the time of its schedule, and its attempt.
    looked: Option<(u64, Option<u64>, u64)>,
    /// The latest time of a schedule that was dealt with, and the version that ended for good.
    dealt_with: u64,
    over: Option<MachineVersion>,
    /// Attempts that could not be frozen go on.
    awake: BTreeSet<u64>,
    durable: Option<Box<Record>>,
    plan: Generation,
    /// How many versions control had made before each, and the latest that was obeyed.
    made: BTreeMap<MachineVersion, usize>,
    obeyed: usize,
    placement: Generation,
    published: u64,
    spawned: BTreeSet<u64>,
    /// How attempts really ended, where a record of it is on disk.
    ends: BTreeMap<u64, ExitInfo>,
}

impl Promised {
    /// Newer than all that was made.
    fn next(&self) -> usize {
        self.made.values().max().map_or(0, |newest| newest + 1)
    }
}

#[derive(Default)]
pub struct Promises {
    pub broken: Option<String>,
    pub of: BTreeMap<MachineId, Promised>,
    orders: BTreeMap<CommandId, Order>,
}

impl Promises {
    fn promised(&mut self, id: &MachineId) -> &mut Promised {
        self.of.entry(id.clone()).or_default()
    }

    /// Notes the first breach.
    pub fn must(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds && self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    /// Their host has another disk, and nothing of them runs: what that disk says is what is promised now.
    pub fn disk_lost(&mut self, machines: &[MachineId]) {
        for id in machines {
            let Promised { tombstoned, made, .. } = std::mem::take(self.promised(id));
            *self.promised(id) = Promised { tombstoned, made, ..Promised::default() };
        }
    }

    /// What control and the clients did of which others were told.
    pub fn follow(&mut self, others: &Self) {
        self.orders.clone_from(&others.orders);
        for (id, of) in &others.of {
            let (tombstoned, made) = (of.tombstoned, of.made.clone());
            self.of.insert(id.clone(), Promised { tombstoned, made, ..Promised::default() });
        }
    }

    // What control and the clients do.

    pub fn sent(&mut self, order: &Order) {
        self.orders.insert(order.id.clone(), order.clone());
    }

    pub fn made(&mut self, assignment: &MachineAssignment) {
        let promised = self.promised(&assignment.id);
        let next = promised.next();
        promised.made.entry(assignment.spec.version.clone()).or_insert(next);
    }

    /// What was decided later is lost with control's store: only its own host had heard of it.
    pub fn adopted(&mut self, assignment: &MachineAssignment) {
        let promised = self.promised(&assignment.id);
        let next = promised.next();
        promised.made.insert(assignment.spec.version.clone(), next);
    }

    pub fn tombstoned(&mut self, id: &MachineId) {
        self.promised(id).tombstoned = true;
    }

    // What the agent does.

    /// Only the first time that it is obeyed a command is judged; its journalled answer may be told at any time.
    pub fn ordered(&mut self, now_ms: u64, id: &MachineId, record: &Record, order: &Order) {
        let promised = self.promised(id);
        // A start that found no room is remembered, too, though the agent may have been killed before it said so.
        let known = promised.counted.contains(&order.id) || record.commands.iter().any(|known| known.id == order.id);
        let lease = promised.lease.clone().filter(|lease| now_ms < lease.expires_at_ms);
        promised.before = (!known).then(|| (order.id.clone(), Box::new(record.clone()), lease));
    }

    pub fn clock(&mut self, now_ms: u64, id: &MachineId, record: &Record) {
        self.promised(id).looked = Some((now_ms, record.due_ms, record.attempt));
    }

    pub fn looked_away(&mut self, id: &MachineId) {
        self.promised(id).looked = None;
    }

    /// A time is dealt with once, when it has come; what was started for it is to run.
    fn dealt_with(&mut self, id: &MachineId, record: &Record) {
        let promised = self.promised(id);
        let Some((now_ms, due_ms, attempt)) = promised.looked.take().filter(|(_, due_ms, _)| *due_ms != record.due_ms) else { return };
        let before = promised.dealt_with;
        promised.dealt_with = due_ms.unwrap_or_default();
        if record.attempt > attempt || promised.intent == Intent::Sleep && record.state == S::Started {
            promised.intent = Intent::Run;
        }
        let has_come = due_ms.is_some_and(|due| before < due && due <= now_ms);
        self.must(has_come, || format!("{id} was started for {due_ms:?} at {now_ms}, and before for {before}"));
    }

    pub fn moved(&mut self, id: &MachineId, before: &Record, after: &Record) {
        let (from, to) = (before.state, after.state);
        self.must(from == to || legal(from, to), || format!("{id} went from {} to {}", from.as_str(), to.as_str()));
        self.must(after.sequence >= before.sequence, || format!("{id}: the sequence of facts went back"));
        self.must(after.attempt >= before.attempt, || format!("{id}: attempts went back"));
    }

    /// The record is on disk: what it says of commands is promised, though nobody may hear of it.
    pub fn journalled(&mut self, id: &MachineId, record: &Record) {
        if self.promised(id).placement != record.assignment.placement {
            self.promised(id).lease = None;
        }
        for remembered in &record.commands {
            if let Ok(asked) = &remembered.answer {
                self.count(id, &remembered.id, asked);
            }
        }
        self.dealt_with(id, record);
        let promised = self.promised(id);
        let revived = record.state == S::Starting && promised.over.as_ref() == Some(record.version());
        let rests = matches!(record.state, S::Stopped | S::Failed) && record.exit.is_some();
        promised.over = Some(record.version().clone()).filter(|_| rests && record.spec().auto_destroy);
        let made = promised.made.get(&record.assignment.spec.version).copied().unwrap_or_default();
        let before = std::mem::replace(&mut promised.obeyed, made);
        let placement = record.assignment.placement;
        let placed = std::mem::replace(&mut promised.placement, placement);
        let ended = promised.intent == Intent::Run && matches!(record.state, S::Stopped | S::Failed);
        if ended {
            promised.intent = Intent::Over;
        }
        if promised.intent == Intent::Sleep && record.state == S::Started && promised.awake.contains(&record.attempt) {
            promised.intent = Intent::Run;
        }
        promised.durable = Some(Box::new(record.clone()));
        self.must(!revived, || format!("{id} is started again although its run is over"));
        self.must(placement >= placed, || format!("{id} went back to an older placement"));
        self.must(made >= before, || format!("{id} went back to an assignment of before"));
        if ended {
            let policy = record.spec().restart.policy;
            let exit = record.exit.as_ref();
            let well = exit.is_some_and(|exit| exit.exit_code == Some(0));
            let may = match policy {
                RestartWhen::Always => false,
                RestartWhen::OnFailure => well || record.state == S::Failed,
                RestartWhen::No => true,
            };
            self.must(may && exit.is_some(), || {
                format!("{id}: an acknowledged start was undone: {} with {exit:?} and restart {policy:?}", record.state.as_str())
            });
        }
    }

    /// Once for each command that was obeyed.
    fn count(&mut self, id: &MachineId, command: &CommandId, asked: &Asked) {
        let Some(order) = self.orders.get(command).cloned() else { return };
        let promised = self.promised(id);
        if !promised.counted.insert(command.clone()) {
            return;
        }
        promised.plan = promised.plan.max(order.plan.unwrap_or_default());
        match order.verb {
            Verb::Cordon => promised.cordoned = true,
            Verb::Uncordon => promised.cordoned = false,
            Verb::Start | Verb::Wake | Verb::Restart { .. } => promised.intent = Intent::Run,
            Verb::Stop { .. } => promised.intent = Intent::Rest,
            Verb::Suspend => promised.intent = Intent::Sleep,
            Verb::Lease { .. } => promised.lease = asked.lease.clone(),
            Verb::Release => promised.lease = None,
            Verb::Signal { .. } => {}
        }
    }

    pub fn answered(&mut self, now_ms: u64, id: &MachineId, command: &CommandId, answer: &Result<Asked, Deny>) {
        let Some(order) = self.orders.get(command).cloned() else {
            return self.must(false, || format!("{id} answers {command}, which nobody sent"));
        };
        let promised = self.promised(id);
        let remembered = promised.answers.iter().rev().take(MAX_REMEMBERED);
        let first = remembered.clone().find(|(known, _)| known == command).map(|(_, first)| first.clone());
        if let Some(first) = first {
            return self.must(first == *answer, || format!("{id}: {command} was answered {first:?}, and now {answer:?}"));
        }
        let kept = answer.is_ok() || matches!(answer, Err(Deny::NoRoom { .. })) && order.verb != Verb::Wake;
        if !kept {
            return;
        }
        promised.answers.push((command.clone(), answer.clone()));
        let durable = promised.durable.as_ref().is_some_and(|record| record.commands.iter().any(|known| known.id == *command));
        let plan = promised.plan;
        let before = promised.before.take().filter(|(heard, ..)| heard == command);
        self.must(durable, || format!("{id} answered {command} before it was durable"));
        let Some((_, before, lease)) = before else { return };
        self.must(now_ms <= order.deadline_ms, || format!("{id} obeyed {command} after its time"));
        let holds_it = lease.as_ref().is_none_or(|lease| order.nonce.as_ref() == Some(&lease.nonce));
        self.must(holds_it, || format!("{id} obeyed {command}, and is leased to another: {lease:?}"));
        let held = before.assignment.placement;
        self.must(order.generation.is_none_or(|offered| offered >= held), || format!("{id} obeyed {command} of an older placement"));
        let old_plan = order.plan.is_some_and(|offered| offered < plan);
        self.must(!old_plan, || format!("{id} obeyed {command} of an older plan"));
        let other = order.expected_version.as_ref().is_some_and(|expected| expected != before.version());
        self.must(!other, || format!("{id} obeyed {command} meant for another version"));
        if let Ok(asked) = answer {
            self.must(may_be_asked(&order.verb, &before), || {
                format!("{id} obeyed {} in state {}", order.verb.name(), before.state.as_str())
            });
            self.count(id, command, asked);
        }
    }

    pub fn published(&mut self, id: &MachineId, record: &Record) {
        let promised = self.promised(id);
        let last = std::mem::replace(&mut promised.published, record.sequence);
        let said = |record: &Record| (record.state, record.attempt, record.cordoned, record.exit.clone());
        // What is gone is gone, and is destroyed again should its record come back.
        let gone = |durable: &Record| record.state == S::Destroyed && durable.state == S::Destroying;
        let durable = promised.durable.as_ref().is_some_and(|durable| gone(durable) || said(durable) == said(record));
        let end = record.exit.as_ref().and_then(|exit| promised.ends.get(&exit.attempt)).cloned();
        self.must(record.sequence > last, || format!("{id}: fact {} after {last}", record.sequence));
        self.must(durable, || format!("{id} published what is not durable: {}", record.state.as_str()));
        self.must(end.is_none() || end == record.exit, || format!("{id} ended as {end:?} and is told to have {:?}", record.exit));
    }

    pub fn holds(&mut self, host: usize, held_mb: u32) {
        self.must(held_mb <= MEMORY_MB, || format!("h{host} let in {held_mb} MiB of {MEMORY_MB}"));
    }

    pub fn spawns(&mut self, id: &MachineId, attempt: u64) {
        let promised = self.promised(id);
        let durable = promised.durable.as_ref().is_some_and(|record| (record.state, record.attempt) == (S::Starting, attempt));
        let (intent, new) = (promised.intent, promised.spawned.insert(attempt));
        self.must(durable, || format!("{id} spawns attempt {attempt}, which is not durable"));
        self.must(new, || format!("{id} uses attempt {attempt} twice"));
        self.must(intent == Intent::Run, || format!("{id} spawns attempt {attempt} although it is to be {intent:?}"));
    }

    pub fn destroys(&mut self, id: &MachineId) {
        let promised = self.promised(id);
        let durable = promised.durable.as_ref().is_some_and(|record| record.state == S::Destroying);
        let asked = promised.tombstoned;
        self.must(asked, || format!("{id} is destroyed and has no tombstone"));
        self.must(durable, || format!("{id} is destroyed before that is durable"));
    }

    pub fn forgotten(&mut self, id: &MachineId) {
        let promised = self.promised(id);
        let (asked, alive) = (promised.tombstoned, promised.alive);
        promised.durable = None;
        self.must(asked && alive.is_none(), || format!("{id} is forgotten (tombstone {asked}, alive {alive:?})"));
    }

    /// What an agent finds in the journal must be what the one before knew to be in it, or newer.
    pub fn recovered(&mut self, id: &MachineId, record: &Record) {
        let durable = self.promised(id).durable.clone();
        let lost = durable.is_some_and(|durable| durable.sequence > record.sequence);
        self.must(!lost, || format!("{id}: what was journalled is gone"));
        if !lost {
            self.journalled(id, record);
        }
    }

    // What happens to processes.

    pub fn lives(&mut self, id: &MachineId, attempt: u64) {
        let before = self.promised(id).alive.replace(attempt);
        self.must(before.is_none(), || format!("{id}: attempts {before:?} and {attempt} live at once"));
    }

    pub fn frozen(&mut self, id: &MachineId, attempt: u64, done: bool) {
        if !done {
            self.promised(id).awake.insert(attempt);
        }
    }

    pub fn ended(&mut self, id: &MachineId, attempt: u64, exit: Option<&ExitInfo>) {
        let promised = self.promised(id);
        promised.alive = None;
        if let Some(exit) = exit {
            promised.ends.insert(attempt, exit.clone());
        }
    }

    /// Nothing here leaves strays behind, so a clean-up that finds somebody alive ends what was to live.
    pub fn cleaned_up(&mut self, id: &MachineId, alive: u64) {
        let tombstoned = self.promised(id).tombstoned;
        self.must(tombstoned, || format!("{id}: attempt {alive} lives and is cleaned up"));
    }
}

/// States that may follow one another, as the state diagram has them.
fn legal(from: S, to: S) -> bool {
    match from {
        S::Creating => matches!(to, S::Created | S::Failed | S::Destroying),
        S::Created | S::Failed => matches!(to, S::Starting | S::Created | S::Destroying),
        S::Starting => matches!(to, S::Started | S::Stopping | S::Updating | S::Restarting | S::Stopped | S::Failed | S::Destroying),
        S::Started => {
            matches!(to, S::Stopping | S::Updating | S::Restarting | S::Stopped | S::Failed | S::Suspending | S::Starting | S::Destroying)
        }
        // What was to start again waits after a boot, if it is exclusive.
        S::Stopping => matches!(to, S::Stopped | S::Starting | S::Restarting | S::Destroying),
        S::Updating => matches!(to, S::Starting | S::Stopping | S::Restarting | S::Destroying),
        S::Stopped => matches!(to, S::Starting | S::Destroying),
        S::Suspending => matches!(to, S::Suspended | S::Started | S::Stopping | S::Stopped | S::Destroying),
        S::Suspended => matches!(to, S::Suspending | S::Started | S::Stopping | S::Stopped | S::Destroying),
        S::Restarting => matches!(to, S::Starting | S::Stopped | S::Destroying),
        S::Destroying => to == S::Destroyed,
        S::Destroyed => false,
    }
}

fn may_be_asked(verb: &Verb, before: &Record) -> bool {
    match verb {
        Verb::Start => !matches!(before.state, S::Creating | S::Stopping | S::Destroying | S::Destroyed),
        Verb::Wake => {
            let asleep = before.state.is_asleep() && before.spec().services.iter().any(|service| service.autostart);
            let comes_up = matches!(before.state, S::Starting | S::Started | S::Updating | S::Restarting);
            !before.cordoned && (asleep || comes_up)
        }
        Verb::Stop { .. } => !matches!(before.state, S::Creating | S::Destroying | S::Destroyed),
        Verb::Restart { .. } => matches!(before.state, S::Started | S::Starting),
        Verb::Signal { .. } => before.state == S::Started,
        Verb::Suspend => matches!(before.state, S::Started | S::Suspending | S::Suspended),
        Verb::Cordon | Verb::Uncordon | Verb::Lease { .. } | Verb::Release => !matches!(before.state, S::Destroying | S::Destroyed),
    }
}
