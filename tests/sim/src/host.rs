//! A host: the agent as `dunlin_host` is built, with its journal, its supervisors, and what happens to them.
//!
//! The core decides everything. What is here only does what its effects say, in the agent's order: acts of one
//! machine follow one another, beside the agent; what they find comes back as inputs, which die with the agent.

use crate::disk::{Disk, Entry};
use crate::mutation::{self, Mutation};
use crate::supervisor::{Behaviour, End, Kept, Living, fate};
use crate::world::{Assigned, Ctx, Happening, MEMORY_MB};
use dunlin_machine::{Alive, Effect, Event, Machine, Order, Record};
use dunlin_model::{ExitInfo, MachineId, MachineState};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Between tries to journal while the disk is full.
const FULL_DISK_PAUSE_MS: u64 = 1_000;
const SEQUENCE_GAP: u64 = 1 << 32;

#[expect(clippy::large_enum_variant, reason = "it travels in a box")]
#[derive(Debug, Clone)]
pub enum Input {
    View(Rc<Assigned>),
    /// What the host has of desired state is not only its disk's memory.
    Confirmed,
    /// The newest view once more.
    Look,
    /// What could not be recovered while the disk was full.
    Recover(MachineId),
    Event(MachineId, Event),
    /// What a check found, in other words than before.
    Check(MachineId),
}

/// What takes its time.
#[derive(Debug, Clone)]
pub enum Act {
    Spawn { attempt: u64, behaviour: Behaviour },
    Stop { timeout_ms: u64 },
    Freeze { attempt: u64 },
    Thaw { attempt: u64 },
    CleanUp { attempt: u64 },
    Acknowledge { attempt: u64 },
    Destroy,
}

pub struct Slot {
    pub machine: Machine,
    /// Until then nothing is decided: the record does not say what is really there.
    recovered: bool,
    acts: VecDeque<Act>,
}

pub struct Host {
    pub index: usize,
    pub disk: Disk,
    pub kept: BTreeMap<MachineId, Kept>,
    /// `None` while no agent runs.
    pub slots: Option<BTreeMap<MachineId, Slot>>,
    /// Counts agents: what was under way for one of before is lost.
    pub life: u64,
    boot: u64,
    boot_is_noted: bool,
    rebooted: bool,
    looks_again: bool,
    /// The newest view, which is on disk too.
    view: Rc<Assigned>,
    /// The agent is killed, or the power lost, before it does this many more effects.
    pub dies_after: Option<(u64, bool)>,
}

/// What is on a host's disk, for who copies it or puts it back.
#[derive(Clone)]
pub struct Image {
    disk: Disk,
    view: Rc<Assigned>,
}

impl Host {
    pub fn new(index: usize) -> Self {
        Self {
            index,
            disk: Disk::default(),
            kept: BTreeMap::new(),
            slots: None,
            life: 0,
            boot: 1,
            boot_is_noted: false,
            rebooted: false,
            looks_again: false,
            view: Rc::default(),
            dies_after: None,
        }
    }

    /// What concerns it alone; the rest is given back.
    pub fn happen(&mut self, ctx: &mut Ctx, happening: Happening) -> Option<Happening> {
        match happening {
            Happening::Heard { life, input, .. } => {
                if self.life == life && self.slots.is_some() {
                    self.hear(ctx, *input);
                }
            }
            Happening::ActEnds { life, machine, .. } => {
                if self.life == life && self.slots.is_some() {
                    self.end_act(ctx, &machine);
                }
            }
            Happening::AttemptEnds { machine, attempt, end, .. } => self.end_attempt(ctx, &machine, attempt, end),
            other => return Some(other),
        }
        None
    }

    pub fn image(&self) -> Image {
        Image { disk: self.disk.clone(), view: self.view.clone() }
    }

    /// Another disk is in it at its next boot; nothing of it runs.
    pub fn put_back(&mut self, image: Option<&Image>) {
        assert!(self.slots.is_none() && self.kept.values().all(|kept| kept.alive.is_none()), "h{} is off", self.index);
        (self.disk, self.view) = image.map_or_else(Default::default, |image| (image.disk.clone(), image.view.clone()));
        self.kept.clear();
        self.boot += 1 << (16 + 4 * self.index); // another boot than any that a disk from elsewhere has noted
    }

    /// Whether all that its journal names was found or given up.
    pub fn is_recovered(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.values().all(|slot| slot.recovered))
    }

    /// Replays the journal and asks the living supervisors.
    pub fn start_agent(&mut self, ctx: &mut Ctx) {
        if self.slots.is_some() {
            return;
        }
        self.life += 1;
        self.slots = Some(BTreeMap::new());
        self.looks_again = false;
        let (records, noted) = self.disk.replay();
        let rebooted = noted.is_some_and(|noted| noted != self.boot);
        (self.rebooted, self.boot_is_noted) = (rebooted, noted == Some(self.boot));
        ctx.tell(|| format!("h{}: the agent starts with {} machines{}", self.index, records.len(), if rebooted { ", after a boot" } else { "" }));
        for (id, mut record) in records {
            ctx.promises.recovered(&id, &record);
            if ctx.mutation == Some(Mutation::SequenceBack) {
                record.sequence = record.sequence.saturating_sub(SEQUENCE_GAP);
            }
            let slot = Slot { machine: Machine::from_record(record), recovered: false, acts: VecDeque::new() };
            let Some(slots) = &mut self.slots else { return };
            slots.insert(id.clone(), slot);
            self.recover(ctx, &id);
        }
        if self.slots.is_none() {
            return; // killed meanwhile
        }
        self.note_boot();
        self.on_view(ctx, self.view.clone());
    }

    /// Asks what is there, at the time when it is believed.
    fn recover(&mut self, ctx: &mut Ctx, id: &MachineId) {
        let rebooted = self.rebooted;
        let Some(slot) = self.slots.as_ref().and_then(|slots| slots.get(id)) else { return };
        let kept = self.kept.entry(id.clone()).or_default();
        let alive = Alive {
            attempt: kept.alive.as_ref().map(|alive| alive.attempt),
            stopping: kept.alive.as_ref().is_some_and(|alive| alive.told),
            frozen: kept.alive.as_ref().is_some_and(|alive| alive.frozen),
            exit: kept.exits.get(&slot.machine.record().attempt).cloned(),
            rebooted,
        };
        self.dispatch(ctx, id, Event::Recovered(alive));
        self.note_boot();
    }

    /// Once nothing of it is left to recover.
    fn note_boot(&mut self) {
        let recovered = self.slots.as_ref().is_some_and(|slots| slots.values().all(|slot| slot.recovered));
        if recovered && !self.boot_is_noted && self.disk.append(&Entry::Boot { boot: self.boot }).is_ok() {
            self.disk.sync();
            self.boot_is_noted = true;
        }
    }

    /// The agent is killed; with the power, everything that is not on disk goes too.
    pub fn kill_agent(&mut self, ctx: &mut Ctx, power: bool) {
        let Some(slots) = self.slots.take() else { return };
        self.dies_after = None;
        ctx.tell(|| format!("h{}: {}", self.index, if power { "the power is lost" } else { "the agent is killed" }));
        for (id, slot) in slots {
            // What was being done is done or is not: the next agent waits until that is clear.
            if let Some(act) = slot.acts.front()
                && !power
                && ctx.rng.percent(60)
            {
                self.do_act(ctx, &id, act.clone());
            }
        }
        if power {
            self.end_all(ctx);
        }
        let pause_ms = if power { ctx.rng.between(2_000, 30_000) } else { ctx.rng.between(50, 3_000) };
        ctx.after(pause_ms, Happening::AgentStarts { host: self.index });
    }

    /// Whether an agent runs or not.
    pub fn lose_power(&mut self, ctx: &mut Ctx) {
        match self.slots {
            Some(_) => self.kill_agent(ctx, true),
            None => self.end_all(ctx), // the agent was to start again anyway
        }
    }

    fn end_all(&mut self, ctx: &mut Ctx) {
        self.boot += 1;
        self.disk.lose_power(&mut ctx.rng);
        for (id, kept) in &mut self.kept {
            if let Some(alive) = kept.alive.take() {
                ctx.promises.ended(id, alive.attempt, None);
            }
        }
    }

    pub fn hear(&mut self, ctx: &mut Ctx, input: Input) {
        if matches!(input, Input::Look) {
            self.looks_again = false;
        }
        match input {
            Input::View(view) => self.on_view(ctx, view),
            Input::Recover(id) => self.recover(ctx, &id),
            Input::Confirmed => self.confirm(ctx),
            Input::Look => self.on_view(ctx, self.view.clone()),
            Input::Event(id, event) => self.dispatch(ctx, &id, event),
            Input::Check(id) => {
                let Some(slot) = self.slot(&id) else { return };
                if slot.machine.record().state == MachineState::Started {
                    slot.machine.touch(ctx.now_ms);
                    self.publish(ctx, &id);
                }
            }
        }
    }

    /// A command arrives; nobody hears it where no agent runs.
    pub fn order(&mut self, ctx: &mut Ctx, id: &MachineId, mut order: Order) {
        let wanted = |slot: &Slot| slot.machine.record().spec().guest.memory_mb;
        let Some(wanted_mb) = self.slot(id).map(|slot| wanted(slot)) else { return };
        order.room = self.room(id, wanted_mb);
        self.dispatch(ctx, id, Event::Ordered(order));
    }

    fn on_view(&mut self, ctx: &mut Ctx, view: Rc<Assigned>) {
        let stale = view.generation < self.view.generation;
        if !stale {
            self.view = view.clone();
        }
        for (id, assignment) in &view.machines {
            let Some(slots) = &mut self.slots else { return };
            if slots.contains_key(id) {
                // The view goes on in order, so what is stale can only be of a placement of before.
                let newest = self.view.machines.get(id).map(|newest| newest.placement);
                if !stale || newest.is_some_and(|newest| assignment.placement < newest) {
                    self.dispatch(ctx, id, Event::Assigned(Box::new(assignment.clone())));
                }
            } else if !stale && !view.tombstones.contains(id) {
                let (machine, effects) = Machine::assigned(assignment.clone(), 100_000_000, ctx.now_ms);
                slots.insert(id.clone(), Slot { machine, recovered: true, acts: VecDeque::new() });
                if !self.perform(ctx, id, effects)
                    && let Some(slots) = &mut self.slots
                {
                    slots.remove(id);
                    self.hear_again(ctx, Input::Look);
                }
            }
        }
        let Some(slots) = &self.slots else { return };
        let absent = |id: &MachineId| ctx.mutation == Some(Mutation::AbsenceDestroys) && !view.machines.contains_key(id);
        let doomed = |id: &MachineId| view.tombstones.contains(id) || absent(id);
        let doomed: Vec<MachineId> = slots.keys().filter(|id| doomed(id)).cloned().collect();
        for id in doomed {
            self.dispatch(ctx, &id, Event::Tombstone);
        }
    }

    /// What waits since a boot, and is still here.
    pub fn confirm(&mut self, ctx: &mut Ctx) {
        let view = self.view.clone();
        let is_here = |id: &MachineId, record: &Record| view.machines.get(id).is_some_and(|row| row.placement == record.assignment.placement);
        let waits = self.slots.iter().flatten().filter(|(id, slot)| {
            let record = slot.machine.record();
            slot.recovered && record.unconfirmed && is_here(id, record)
        });
        let waits: Vec<MachineId> = waits.map(|(id, _)| id.clone()).collect();
        for id in waits {
            self.dispatch(ctx, &id, Event::PlacementConfirmed);
        }
    }

    /// As with every heartbeat of the agent.
    pub fn look_at_clock(&mut self, ctx: &mut Ctx) {
        let slots = self.slots.iter().flatten();
        let due = slots.filter(|(_, slot)| slot.machine.record().due_ms.is_some_and(|due| due <= ctx.now_ms));
        let due: Vec<MachineId> = due.map(|(id, _)| id.clone()).collect();
        for id in due {
            self.dispatch(ctx, &id, Event::Due { room: Ok(()) });
        }
    }

    fn slot(&mut self, id: &MachineId) -> Option<&mut Slot> {
        self.slots.as_mut()?.get_mut(id)
    }

    pub fn room(&self, id: &MachineId, wanted_mb: u32) -> Result<(), String> {
        let others = self.slots.iter().flatten().filter(|(other, _)| *other != id);
        let held_mb: u32 = others.map(|(_, slot)| slot.machine.record().reserved_mb()).sum();
        if held_mb + wanted_mb <= MEMORY_MB { Ok(()) } else { Err("the host is full".into()) }
    }

    /// One look serves all machines: were there one for each, each would bring as many again.
    fn hear_again(&mut self, ctx: &mut Ctx, input: Input) {
        if matches!(input, Input::Look) && std::mem::replace(&mut self.looks_again, true) {
            return;
        }
        ctx.after(FULL_DISK_PAUSE_MS, Happening::Heard { host: self.index, life: self.life, input: Box::new(input) });
    }

    fn dispatch(&mut self, ctx: &mut Ctx, id: &MachineId, mut event: Event) {
        if let Event::Prepared { room, .. } = &mut event
            && let Some(slots) = &self.slots
            && let Some(slot) = slots.get(id)
        {
            *room = self.room(id, slot.machine.record().assignment.spec.guest.memory_mb);
        }
        if let Event::Due { room } = &mut event
            && let Some(slots) = &self.slots
            && let Some(slot) = slots.get(id)
        {
            *room = self.room(id, slot.machine.record().spec().guest.memory_mb);
            ctx.promises.clock(ctx.now_ms, id, slot.machine.record());
        }
        let mutation = ctx.mutation;
        let Some(slot) = self.slot(id) else { return };
        let before = slot.machine.clone();
        let again = match &event {
            Event::Ordered(_) => None,
            Event::Assigned(_) if mutation != Some(Mutation::OldNews) => Some(Input::Look),
            Event::Recovered(_) if mutation != Some(Mutation::OldRecovery) => Some(Input::Recover(id.clone())),
            other => Some(Input::Event(id.clone(), other.clone())),
        };
        let recovers = matches!(event, Event::Recovered(_)) || mutation == Some(Mutation::OldRecovery);
        if !slot.recovered && !recovers {
            if let Some(input) = again {
                self.hear_again(ctx, input);
            }
            return;
        }
        slot.recovered = true;
        ctx.tell(|| format!("    {id} hears {}", short(&event)));
        if let Event::Ordered(order) = &event {
            ctx.promises.ordered(ctx.now_ms, id, before.record(), order);
        }
        let recovering = matches!(event, Event::Recovered(_));
        let looks = matches!(event, Event::Due { .. });
        let recovered = if let Event::Recovered(alive) = &event { Some(alive.clone()) } else { None };
        mutation::event(ctx.mutation, before.record(), &mut event);
        let mut effects = slot.machine.handle(event, ctx.now_ms);
        mutation::effects(ctx.mutation, recovered.as_ref(), before.record(), &mut effects);
        let after = slot.machine.record().clone();
        if before.record().state != after.state {
            ctx.tell(|| format!("    {id} {} -> {} (attempt {})", before.record().state.as_str(), after.state.as_str(), after.attempt));
        }
        ctx.promises.moved(id, before.record(), &after);
        if !self.perform(ctx, id, effects)
            && let Some(slot) = self.slot(id)
        {
            slot.machine = before;
            slot.recovered = !recovering;
            if let Some(input) = again {
                self.hear_again(ctx, input);
            }
        } else if let Some(slots) = &self.slots {
            // What is being destroyed may still hold something, and asks nobody.
            let records = slots.values().map(|slot| slot.machine.record());
            let held_mb = records.filter(|record| record.state != MachineState::Destroying).map(Record::reserved_mb).sum();
            ctx.promises.holds(self.index, held_mb);
        }
        if looks && self.slots.is_some() {
            ctx.promises.looked_away(id); // one that was killed may have done it
        }
    }

    /// In order; `false` if the journal refused, and then nothing was done.
    fn perform(&mut self, ctx: &mut Ctx, id: &MachineId, effects: Vec<Effect>) -> bool {
        for effect in effects {
            if let Some((0, power)) = self.dies_after {
                self.kill_agent(ctx, power);
            }
            if let Some((left, _)) = &mut self.dies_after {
                *left -= 1;
            }
            if self.slots.is_none() {
                return true; // nobody is left to go on
            }
            match effect {
                Effect::Journal => {
                    if !self.write(ctx, id) {
                        return false;
                    }
                }
                Effect::Answer { id: command, answer } => {
                    ctx.tell(|| format!("h{}: {id} answers {command}: {answer:?}", self.index));
                    ctx.promises.answered(ctx.now_ms, id, &command, &answer);
                    ctx.answers.push((command, answer));
                }
                Effect::Publish => self.publish(ctx, id),
                Effect::Forget => self.forget(ctx, id),
                other => self.begin(ctx, id, other),
            }
        }
        true
    }

    fn write(&mut self, ctx: &mut Ctx, id: &MachineId) -> bool {
        let Some(slot) = self.slot(id) else { return true };
        let mut record = slot.machine.record().clone();
        mutation::record(ctx.mutation, &mut record);
        if self.disk.append(&Entry::Machine(Box::new(record.clone()))).is_err() {
            ctx.tell(|| format!("h{}: the disk is full, {id} stays as it was", self.index));
            return false;
        }
        // Between the write and the sync.
        if let Some((0, power)) = self.dies_after {
            self.kill_agent(ctx, power);
            return true;
        }
        if ctx.mutation != Some(Mutation::NoSync) {
            self.disk.sync();
        }
        ctx.promises.journalled(id, &record);
        true
    }

    fn publish(&mut self, ctx: &mut Ctx, id: &MachineId) {
        let Some(slot) = self.slot(id) else { return };
        let record = slot.machine.record();
        ctx.promises.published(id, record);
        match record.is_over() {
            true => drop(ctx.said_over.insert(id.clone(), record.version().clone())),
            false => drop(ctx.said_over.remove(id)),
        }
        if record.state == MachineState::Started && ctx.rng.percent(30) {
            let host = self.index;
            let after_ms = ctx.rng.between(100, 5_000);
            ctx.after(after_ms, Happening::Heard { host, life: self.life, input: Box::new(Input::Check(id.clone())) });
        }
    }

    fn forget(&mut self, ctx: &mut Ctx, id: &MachineId) {
        if self.disk.append(&Entry::Forgotten { machine: id.clone() }).is_err() {
            return self.hear_again(ctx, Input::Event(id.clone(), Event::Destroyed));
        }
        self.disk.sync();
        ctx.promises.forgotten(id);
        if let Some(slots) = &mut self.slots {
            slots.remove(id);
        }
    }

    fn begin(&mut self, ctx: &mut Ctx, id: &MachineId, effect: Effect) {
        let (host, life) = (self.index, self.life);
        let heard = |event| Happening::Heard { host, life, input: Box::new(Input::Event(id.clone(), event)) };
        let Some(slot) = self.slot(id) else { return };
        let act = match effect {
            Effect::Prepare(spec) => {
                let result = if fate(&spec) == Behaviour::Missing { Err("no such image".to_owned()) } else { Ok(()) };
                let event = Event::Prepared { version: spec.version.clone(), result, room: Ok(()) };
                let takes_ms = ctx.rng.between(1, 4_000);
                return ctx.after(takes_ms, heard(event));
            }
            Effect::WakeAt { ms } => {
                let after_ms = ms.saturating_sub(ctx.now_ms);
                return ctx.after(after_ms, heard(Event::Tick));
            }
            Effect::Signal { .. } => return, // the programs here do not care
            Effect::Spawn { attempt } => {
                ctx.promises.spawns(id, attempt);
                Act::Spawn { attempt, behaviour: fate(slot.machine.record().spec()) }
            }
            Effect::Stop { timeout_ms, .. } => Act::Stop { timeout_ms },
            Effect::Freeze { attempt } => Act::Freeze { attempt },
            Effect::Thaw { attempt } => Act::Thaw { attempt },
            Effect::CleanUp { attempt } => Act::CleanUp { attempt },
            Effect::Acknowledge { attempt } => Act::Acknowledge { attempt },
            Effect::Destroy => {
                ctx.promises.destroys(id);
                Act::Destroy
            }
            Effect::Journal | Effect::Answer { .. } | Effect::Publish | Effect::Forget => unreachable!("done by the agent itself"),
        };
        slot.acts.push_back(act);
        if slot.acts.len() == 1 {
            let takes_ms = ctx.rng.between(1, 60);
            ctx.after(takes_ms, Happening::ActEnds { host, life, machine: id.clone() });
        }
    }

    pub fn end_act(&mut self, ctx: &mut Ctx, id: &MachineId) {
        let Some(slot) = self.slot(id) else { return };
        let Some(act) = slot.acts.pop_front() else { return };
        let more = !slot.acts.is_empty();
        self.do_act(ctx, id, act);
        if more {
            let takes_ms = ctx.rng.between(1, 60);
            ctx.after(takes_ms, Happening::ActEnds { host: self.index, life: self.life, machine: id.clone() });
        }
    }

    fn do_act(&mut self, ctx: &mut Ctx, id: &MachineId, act: Act) {
        match act {
            Act::Spawn { attempt, behaviour } => {
                let fails = behaviour == Behaviour::Missing || !ctx.calm && ctx.rng.percent(5);
                let result = if fails { Err("it cannot be started".to_owned()) } else { Ok(()) };
                if !fails {
                    self.comes_up(ctx, id, attempt, behaviour);
                }
                self.soon(ctx, id, Event::Spawned { attempt, result });
            }
            Act::Stop { timeout_ms } => {
                let Some(alive) = self.kept.get_mut(id).and_then(|kept| kept.alive.as_mut()) else { return };
                (alive.told, alive.frozen) = (true, false);
                let deaf = alive.behaviour == Behaviour::Deaf;
                let in_ms = if deaf { timeout_ms } else { ctx.rng.between(0, timeout_ms.min(2_000)) };
                let end = if deaf { End::Killed } else { End::Exits(0) };
                let attempt = alive.attempt;
                ctx.after(in_ms, Happening::AttemptEnds { host: self.index, machine: id.clone(), attempt, end });
            }
            Act::Freeze { attempt } => {
                let fails = !ctx.calm && ctx.rng.percent(10);
                let alive = self.living(id, attempt).filter(|_| !fails);
                let result = alive.map(|alive| alive.frozen = true).ok_or_else(|| "it cannot be frozen".to_owned());
                ctx.promises.frozen(id, attempt, result.is_ok());
                self.soon(ctx, id, Event::Frozen { attempt, result });
            }
            Act::Thaw { attempt } => {
                if let Some(alive) = self.living(id, attempt) {
                    alive.frozen = false;
                }
            }
            Act::CleanUp { attempt } => {
                let kept = self.kept.entry(id.clone()).or_default();
                if let Some(alive) = kept.alive.take() {
                    ctx.promises.cleaned_up(id, alive.attempt);
                    ctx.promises.ended(id, alive.attempt, None);
                }
                kept.exits.remove(&attempt);
            }
            Act::Acknowledge { attempt } => drop(self.kept.entry(id.clone()).or_default().exits.remove(&attempt)),
            Act::Destroy => {
                if let Some(alive) = self.kept.remove(id).and_then(|kept| kept.alive) {
                    ctx.promises.ended(id, alive.attempt, None);
                }
                self.soon(ctx, id, Event::Destroyed);
            }
        }
    }

    fn living(&mut self, id: &MachineId, attempt: u64) -> Option<&mut Living> {
        self.kept.get_mut(id)?.alive.as_mut().filter(|alive| alive.attempt == attempt)
    }

    fn comes_up(&mut self, ctx: &mut Ctx, id: &MachineId, attempt: u64, behaviour: Behaviour) {
        ctx.tell(|| format!("h{}: {id} attempt {attempt} comes up ({behaviour:?})", self.index));
        ctx.promises.lives(id, attempt);
        self.kept.entry(id.clone()).or_default().come_up(attempt, behaviour);
        if let Some((in_ms, end)) = behaviour.ends_by_itself(&mut ctx.rng, ctx.calm) {
            ctx.after(in_ms, Happening::AttemptEnds { host: self.index, machine: id.clone(), attempt, end });
        }
    }

    /// A program ended, or its supervisor was killed. The agent that lives then hears of it.
    pub fn end_attempt(&mut self, ctx: &mut Ctx, id: &MachineId, attempt: u64, end: End) {
        if end != End::SupervisorKilled && self.living(id, attempt).is_some_and(|alive| alive.frozen) {
            // What stands still ends later.
            return ctx.after(10_000, Happening::AttemptEnds { host: self.index, machine: id.clone(), attempt, end });
        }
        let Some(kept) = self.kept.get_mut(id) else { return };
        let Some(exit) = kept.end(attempt, end, ctx.now_ms) else { return };
        ctx.tell(|| format!("h{}: {id} attempt {attempt} ends: {end:?}", self.index));
        ctx.promises.ended(id, attempt, (end != End::SupervisorKilled).then_some(&exit));
        if self.slots.is_some() {
            self.soon(ctx, id, Event::Exited(exit));
        }
    }

    fn soon(&self, ctx: &mut Ctx, id: &MachineId, event: Event) {
        let in_ms = ctx.rng.between(0, 20);
        let input = Box::new(Input::Event(id.clone(), event));
        ctx.after(in_ms, Happening::Heard { host: self.index, life: self.life, input });
    }

    /// Whether nothing but alarms is under way.
    pub fn rests(&self) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.values().all(|slot| slot.acts.is_empty()))
    }
}

fn short(event: &Event) -> String {
    match event {
        Event::Assigned(assignment) => format!("its assignment: {} {:?}", assignment.spec.version, assignment.placement),
        Event::Ordered(order) => format!("{} {} (room {})", order.verb.name(), order.id, order.room.is_ok()),
        other => format!("{other:?}"),
    }
}

/// The end of an attempt as its record says it.
pub fn exit_info(attempt: u64, at_ms: u64) -> ExitInfo {
    ExitInfo { attempt, exit_code: None, signal: None, oom_killed: false, requested_stop: false, at_ms, error: None }
}
