//! Random histories of one machine, with a crash of the agent after any effect. A small host keeps
//! what a real one would: the journal, the supervisors, the exit records; inputs under way are lost in
//! a crash.

mod common;

use common::{exit, order, sized, waking};
use dunlin_machine::{Alive, Asked, Deny, Effect, Event, Machine, Order, Record, Verb};
use dunlin_model::{CommandId, ExitInfo, MachineState as S};
use dunlin_view::MachineAssignment;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};

#[derive(Debug, Clone)]
enum Op {
    /// A new version of this size, in quarters of a GiB, whether requests may wake it, and whether it rests.
    Assign { quarters: u32, wakes: bool, rests: bool },
    /// From now on new versions destroy themselves when their run has ended, or are started by the clock.
    Kind { auto_destroy: bool, by_clock: bool },
    /// The agent looks at the clock.
    Clock,
    /// What other machines hold of the host's GiB.
    Others { quarters: u32 },
    Tombstone,
    Start,
    Wake,
    Stop,
    Restart,
    Signal,
    Suspend,
    /// Somebody takes the lease, or makes it last longer.
    Lease,
    Release,
    /// From now on orders come with this lease's nonce, of those that were given; `None`: without.
    Hold(Option<usize>),
    Cordon,
    Uncordon,
    /// Send a command of before once more.
    Repeat(usize),
    /// One of the inputs under way arrives; `ok` is how its act went.
    Deliver { which: usize, ok: bool },
    /// The program ends by itself.
    End { code: i32 },
    /// The supervisor is killed: no exit record.
    KillSupervisor,
    Pass { ms: u64 },
    /// The agent is killed between two inputs.
    Crash { rebooted: bool },
    /// The host hears that the machine is still its.
    Confirm,
    /// The next input's effects end after this many, by a kill.
    CrashAfter { effects: usize, rebooted: bool },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1u32..=4, any::<bool>(), prop::bool::weighted(0.3))
            .prop_map(|(quarters, wakes, rests)| Op::Assign { quarters, wakes, rests }),
        2 => (0u32..=4).prop_map(|quarters| Op::Others { quarters }),
        2 => any::<(bool, bool)>().prop_map(|(auto_destroy, by_clock)| Op::Kind { auto_destroy, by_clock }),
        4 => Just(Op::Clock),
        1 => Just(Op::Tombstone),
        6 => Just(Op::Start),
        4 => Just(Op::Wake),
        4 => Just(Op::Stop),
        3 => Just(Op::Restart),
        1 => Just(Op::Signal),
        4 => Just(Op::Suspend),
        1 => Just(Op::Lease),
        1 => Just(Op::Release),
        2 => prop::option::of(any::<usize>()).prop_map(Op::Hold),
        1 => Just(Op::Cordon),
        1 => Just(Op::Uncordon),
        3 => any::<usize>().prop_map(Op::Repeat),
        20 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(which, ok)| Op::Deliver { which, ok }),
        4 => (0..2).prop_map(|code| Op::End { code }),
        2 => Just(Op::KillSupervisor),
        5 => (1u64..100_000).prop_map(|ms| Op::Pass { ms }),
        2 => Just(Op::Confirm),
        3 => prop::bool::weighted(0.3).prop_map(|rebooted| Op::Crash { rebooted }),
        8 => (0usize..6, prop::bool::weighted(0.3))
            .prop_map(|(effects, rebooted)| Op::CrashAfter { effects, rebooted }),
    ]
}

/// An act under way, whose end the agent will hear of.
#[derive(Debug, Clone)]
enum Pending {
    Prepare(dunlin_model::MachineVersion),
    Spawn(u64),
    /// The supervisor of an attempt has heard the stop.
    End(u64),
    /// And whether a thaw comes right after it: the host acts in order.
    Freeze { attempt: u64, thaw: bool },
    /// The agent watches an attempt that has ended.
    Exited(ExitInfo),
    Tick(u64),
    Destroy,
}

/// What the newest acknowledged command wants.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Intent {
    Run,
    Sleep,
    Rest,
    Nothing,
}

struct Host {
    now: u64,
    journal: Option<Record>,
    machine: Option<Machine>,
    /// The attempt whose supervisor lives, and whether it was told to stop.
    alive: Option<u64>,
    told: bool,
    /// Its processes stand still.
    frozen: bool,
    /// Nonces that were given, and the one that is sent.
    nonces: Vec<String>,
    nonce: Option<String>,
    /// A stop that waits behind the spawn of its attempt.
    stop_waits: bool,
    may_be_told_twice: bool,
    exits: BTreeMap<u64, ExitInfo>,
    pending: Vec<Pending>,
    crash: Option<(usize, bool)>,
    sent: Vec<Order>,
    answers: HashMap<CommandId, Result<Asked, Deny>>,
    versions: u8,
    auto_destroy: bool,
    by_clock: bool,
    /// Times that it was started for.
    handled: Option<u64>,
    assigned: Option<MachineAssignment>,
    /// Held by other machines, and the most that this one was let have.
    others_mb: u32,
    admitted_mb: u32,
    tombstoned: bool,
    published: u64,
    /// Booted, and nothing was heard since of where it is to be.
    unconfirmed: bool,
    /// The boot is not written down: until all is recovered each start of the agent finds that the host was booted.
    booted: bool,
    intent: Intent,
    /// The input under way takes up a version that rests.
    comes_to_rest: bool,
    spawned: Vec<u64>,
}

impl Host {
    fn new() -> Self {
        Self {
            now: 1,
            journal: None,
            machine: None,
            alive: None,
            frozen: false,
            nonces: vec![],
            nonce: None,
            told: false,
            stop_waits: false,
            may_be_told_twice: false,
            exits: BTreeMap::new(),
            pending: vec![],
            crash: None,
            sent: vec![],
            answers: HashMap::new(),
            versions: 0,
            auto_destroy: false,
            by_clock: false,
            handled: None,
            assigned: None,
            others_mb: 0,
            admitted_mb: 0,
            tombstoned: false,
            published: 0,
            unconfirmed: false,
            booted: false,
            intent: Intent::Nothing,
            comes_to_rest: false,
            spawned: vec![],
        }
    }

    fn apply(&mut self, op: Op) {
        self.now += 1;
        match op {
            Op::Kind { auto_destroy, by_clock } => (self.auto_destroy, self.by_clock) = (auto_destroy, by_clock),
            Op::Clock => self.look_at_clock(),
            Op::Others { quarters } => self.others_mb = quarters * 256,
            Op::Assign { quarters, wakes, rests } => {
                self.versions += 1;
                let mut assigned = sized(self.versions, "always", quarters * 256);
                assigned.spec.services = if wakes { waking(1).spec.services } else { vec![] };
                assigned.spec.auto_destroy = self.auto_destroy;
                assigned.spec.rests = rests;
                assigned.spec.schedule = self.by_clock.then(|| "* * * * *".parse().unwrap());
                self.assigned = Some(assigned.clone());
                match self.machine {
                    Some(_) => self.hear(Event::Assigned(Box::new(assigned))),
                    None if self.tombstoned => {}
                    None => {
                        let (machine, effects) = Machine::assigned(assigned, 1_000_000, self.now);
                        self.machine = Some(machine);
                        self.perform(effects);
                    }
                }
            }
            Op::Tombstone => {
                self.tombstoned |= self.machine.is_some();
                self.hear(Event::Tombstone);
            }
            Op::Start => self.send(Verb::Start),
            Op::Wake => self.send(Verb::Wake),
            Op::Stop => self.send(Verb::Stop { signal: None, timeout_ms: None }),
            Op::Restart => self.send(Verb::Restart { signal: None, timeout_ms: None }),
            Op::Signal => self.send(Verb::Signal { signal: 1 }),
            Op::Suspend => self.send(Verb::Suspend),
            Op::Lease => {
                let nonce = format!("n{}", self.sent.len());
                self.send(Verb::Lease { nonce, ttl_ms: 50_000, owner: "o".into(), description: String::new() });
            }
            Op::Release => self.send(Verb::Release),
            Op::Hold(which) => self.nonce = which.and_then(|which| pick(&self.nonces, which).cloned()),
            Op::Cordon => self.send(Verb::Cordon),
            Op::Uncordon => self.send(Verb::Uncordon),
            Op::Repeat(which) => {
                if let Some(order) = pick(&self.sent, which).cloned() {
                    self.hear(Event::Ordered(order));
                }
            }
            Op::Deliver { which, ok } => self.deliver(which, ok),
            Op::End { code } => self.end(code),
            Op::KillSupervisor => {
                if let Some(attempt) = self.alive.take() {
                    let killed = ExitInfo { exit_code: None, error: Some("killed".into()), ..exit(attempt, 0, self.now) };
                    self.pending.push(Pending::Exited(killed));
                }
            }
            Op::Pass { ms } => self.now += ms,
            Op::Crash { rebooted } => self.crash(rebooted),
            Op::Confirm => self.confirm(),
            Op::CrashAfter { effects, rebooted } => self.crash = Some((effects, rebooted)),
        }
    }

    fn send(&mut self, verb: Verb) {
        let nonce = self.nonce.clone();
        let mut order = Order { nonce, ..order(self.sent.len() as u64, verb) };
        self.sent.push(order.clone());
        if let Some(machine) = &self.machine {
            order.room = self.room(machine.record().spec().guest.memory_mb);
        }
        self.hear(Event::Ordered(order));
    }

    fn confirm(&mut self) {
        self.unconfirmed = false;
        self.hear(Event::PlacementConfirmed);
    }

    fn look_at_clock(&mut self) {
        let Some(machine) = &self.machine else { return };
        let (starts, due_ms) = (machine.starts_by_clock(self.now), machine.record().due_ms);
        let room = self.room(machine.record().spec().guest.memory_mb);
        let starts = starts && room.is_ok();
        assert!(!starts || due_ms.is_some_and(|due| due <= self.now && self.handled.is_none_or(|handled| handled < due)));
        self.hear(Event::Due { room });
        // Once it is durable it is to run, whatever became of the agent, and never again for this time.
        if starts && self.journal.as_ref().is_some_and(|record| record.due_ms != due_ms) {
            self.handled = due_ms;
            self.intent = Intent::Run;
        }
    }

    /// A GiB for all.
    fn room(&self, wanted_mb: u32) -> Result<(), String> {
        if self.others_mb + wanted_mb <= 1024 { Ok(()) } else { Err("full".into()) }
    }

    fn end(&mut self, code: i32) {
        if let Some(attempt) = self.alive.take() {
            self.frozen = false;
            let ended = exit(attempt, code, self.now);
            self.exits.insert(attempt, ended.clone());
            self.pending.push(Pending::Exited(ended));
        }
    }

    fn deliver(&mut self, which: usize, ok: bool) {
        if self.pending.is_empty() {
            return;
        }
        let mut which = which % self.pending.len();
        let is_freeze = |pending: &Pending| matches!(pending, Pending::Freeze { .. });
        if is_freeze(&self.pending[which]) {
            which = self.pending.iter().position(is_freeze).expect("there is one");
        }
        let pending = self.pending.remove(which);
        let result = if ok { Ok(()) } else { Err("it failed".to_owned()) };
        match pending {
            Pending::Prepare(version) => {
                let room = self.room(self.assigned.as_ref().expect("assigned").spec.guest.memory_mb);
                self.hear(Event::Prepared { version, result, room });
            }
            Pending::Spawn(attempt) => {
                if ok {
                    self.comes_up(attempt);
                }
                self.hear(Event::Spawned { attempt, result });
            }
            Pending::End(attempt) => {
                if self.alive == Some(attempt) {
                    self.end(0);
                }
            }
            Pending::Freeze { attempt, thaw } => {
                self.frozen = ok && self.alive == Some(attempt) && !thaw;
                self.hear(Event::Frozen { attempt, result });
            }
            Pending::Exited(exit) => self.hear(Event::Exited(exit)),
            Pending::Tick(at) => {
                self.now = self.now.max(at);
                self.hear(Event::Tick);
            }
            Pending::Destroy => {
                self.alive = None;
                self.frozen = false;
                self.exits.clear();
                self.hear(Event::Destroyed);
            }
        }
    }

    fn comes_up(&mut self, attempt: u64) {
        assert_eq!(self.alive, None, "two attempts live at once");
        self.alive = Some(attempt);
        self.frozen = false;
        self.told = false;
        if std::mem::take(&mut self.stop_waits) {
            self.tell();
        }
    }

    fn tell(&mut self) {
        if let Some(attempt) = self.alive {
            assert!(!self.told || self.may_be_told_twice, "a supervisor was told to stop a second time");
            self.told = true;
            self.frozen = false; // the supervisor thaws
            self.pending.push(Pending::End(attempt));
        }
    }

    fn hear(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else { return };
        let room = match &event {
            Event::Ordered(Order { room, .. }) | Event::Prepared { room, .. } | Event::Due { room } => room.is_ok(),
            _ => false,
        };
        let woken = matches!(&event, Event::Ordered(order) if order.verb == Verb::Wake);
        let before = machine.record();
        self.comes_to_rest = match &event {
            Event::Prepared { version, result: Ok(()), .. } => {
                let next = &before.assignment.spec;
                next.rests && next.version == *version && !before.is_current() && before.state != S::Destroying
            }
            _ => false,
        };
        let may_wake = !before.cordoned && before.state.is_asleep() && before.spec().services.iter().any(|s| s.autostart);
        let stranger = match &event {
            Event::Ordered(order) => before.lease(self.now).filter(|lease| order.nonce.as_ref() != Some(&lease.nonce)).is_some(),
            _ => false,
        };
        let over = before.is_over() && !matches!(event, Event::Prepared { .. });
        let held_mb = before.reserved_mb();
        let was = (before.state, before.attempt, before.cordoned, before.lease(self.now).cloned());
        let effects = machine.handle(event, self.now);
        let spawns = effects.iter().any(|effect| matches!(effect, Effect::Spawn { .. }));
        let now = machine.record();
        if stranger {
            let is = (now.state, now.attempt, now.cordoned, now.lease(self.now).cloned());
            assert_eq!(was, is, "somebody moved a machine that another has leased");
        }
        if let Some(lease) = now.lease(self.now).filter(|lease| !self.nonces.contains(&lease.nonce)) {
            self.nonces.push(lease.nonce.clone());
        }
        assert!(!(over && spawns), "what is over was started");
        assert!(may_wake || !(woken && spawns), "a request started what it may not");
        // What is being destroyed may still hold something, and asks nobody.
        let ending = machine.record().state == S::Destroying;
        let holds_mb = if ending { held_mb } else { machine.record().reserved_mb() };
        // What it holds grows only with the host's leave; a start after a crash is of what it held.
        self.admitted_mb = if room { self.admitted_mb.max(holds_mb) } else { self.admitted_mb };
        assert!(holds_mb <= held_mb.max(self.admitted_mb), "{held_mb} MiB became {holds_mb} and nobody was asked");
        if holds_mb == 0 {
            self.admitted_mb = 0;
        }
        self.perform(effects);
        self.check();
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        let crash = self.crash.take();
        for (n, effect) in effects.iter().enumerate() {
            if let Some((after, rebooted)) = crash
                && after == n
            {
                return self.crash(rebooted);
            }
            self.act(effect, &effects);
        }
    }

    fn act(&mut self, effect: &Effect, all: &[Effect]) {
        let record = self.machine.as_ref().expect("it acts").record().clone();
        let durable = self.journal.clone();
        match effect {
            Effect::Journal => {
                if self.intent == Intent::Sleep && record.state == S::Started {
                    self.intent = Intent::Run; // it could not be suspended, and goes on
                }
                if self.comes_to_rest && self.intent == Intent::Run {
                    self.intent = Intent::Rest;
                }
                self.journal = Some(record);
                let answered = all.iter().any(|effect| matches!(effect, Effect::Answer { answer: Ok(_), .. }));
                if answered && let Some(id) = answered_id(all) {
                    let verb = &self.sent.iter().find(|order| order.id == id).expect("sent").verb;
                    self.unconfirmed &= *verb != Verb::Start;
                    match verb {
                        Verb::Start | Verb::Wake | Verb::Restart { .. } => self.intent = Intent::Run,
                        Verb::Suspend => self.intent = Intent::Sleep,
                        Verb::Stop { .. } => self.intent = Intent::Rest,
                        _ => {}
                    }
                }
            }
            Effect::Answer { id, answer } => {
                let wakes = self.sent.iter().any(|order| order.id == *id && order.verb == Verb::Wake);
                if answer.is_ok() || matches!(answer, Err(Deny::NoRoom { .. })) && !wakes {
                    let remembered = durable.expect("journalled").commands.iter().any(|old| old.id == *id);
                    assert!(remembered, "answered before it was durable");
                    let first = self.answers.entry(id.clone()).or_insert_with(|| answer.clone());
                    assert_eq!(first, answer, "a repeat got another answer");
                }
            }
            Effect::Prepare(spec) => self.pending.push(Pending::Prepare(spec.version.clone())),
            Effect::Spawn { attempt } => {
                let durable = durable.expect("journalled");
                assert_eq!((durable.state, durable.attempt), (S::Starting, *attempt), "not durable");
                assert!(!self.unconfirmed, "an exclusive one was started before its placement was confirmed");
                assert_eq!(self.alive, None, "spawned beside a living attempt");
                assert!(!self.spawned.contains(attempt), "an attempt's number was used twice");
                self.spawned.push(*attempt);
                self.stop_waits = false;
                self.pending.push(Pending::Spawn(*attempt));
            }
            Effect::Stop { signal, .. } => {
                assert_eq!(record.stop.expect("kept").signal, *signal);
                // An order that makes a stop of a restart.
                self.may_be_told_twice = answered_id(all).is_some();
                match self.pending.iter().any(|pending| matches!(pending, Pending::Spawn(_))) {
                    true => self.stop_waits = true,
                    false => self.tell(),
                }
            }
            Effect::Signal { .. } => {}
            Effect::Freeze { attempt } => {
                assert_eq!(durable.expect("journalled").state, S::Suspending);
                        self.pending.push(Pending::Freeze { attempt: *attempt, thaw: false });
            }
            Effect::Thaw { attempt } => {
                assert_eq!(durable.expect("journalled").state, S::Started, "thawed before it was durable");
                let last = self.pending.iter_mut().rev().find_map(|pending| match pending {
                    Pending::Freeze { attempt: freezes, thaw } if freezes == attempt => Some(thaw),
                    _ => None,
                });
                match last {
                    Some(thaw) => *thaw = true,
                    None => self.frozen = false,
                }
            }
            Effect::CleanUp { attempt } => {
                let durable = durable.expect("journalled");
                assert!(
                    self.alive.is_none_or(|alive| alive != durable.attempt || !durable.may_live()),
                    "a clean-up killed a machine that should run"
                );
                self.alive = None;
                self.frozen = false;
                self.exits.remove(attempt);
            }
            Effect::Acknowledge { attempt } => {
                assert_ne!(self.alive, Some(*attempt));
                self.exits.remove(attempt);
            }
            Effect::WakeAt { ms } => self.pending.push(Pending::Tick(*ms)),
            Effect::Publish => {
                assert!(record.sequence > self.published, "a fact's sequence went back");
                self.published = record.sequence;
            }
            Effect::Destroy => {
                assert!(self.tombstoned, "destroyed without a tombstone");
                assert_eq!(durable.expect("journalled").state, S::Destroying);
                // The host makes a spawn that is under way wait or not happen at all.
                self.pending.retain(|pending| !matches!(pending, Pending::Spawn(_)));
                self.pending.push(Pending::Destroy);
            }
            Effect::Forget => {
                assert!(self.tombstoned && self.alive.is_none());
                self.journal = None;
                self.machine = None;
            }
        }
    }

    fn crash(&mut self, rebooted: bool) {
        // A supervisor that was being started comes up, unless the whole computer went down.
        let spawning = self.pending.iter().find_map(|pending| match pending {
            Pending::Spawn(attempt) => Some(*attempt),
            _ => None,
        });
        self.pending.clear();
        self.stop_waits = false;
        if rebooted {
            let is_exclusive = |record: &Record| record.spec().is_exclusive() || record.assignment.spec.is_exclusive();
            self.unconfirmed |= self.journal.as_ref().is_some_and(is_exclusive);
            self.alive = None;
        } else if let Some(attempt) = spawning {
            self.comes_up(attempt);
        }
        self.frozen &= self.alive.is_some();
        // What a supervisor was told it does, whatever becomes of the agent.
        if let Some(attempt) = self.alive.filter(|_| self.told) {
            self.pending.push(Pending::End(attempt));
        }
        self.machine = self.journal.clone().map(Machine::from_record);
        let Some(machine) = &self.machine else { return };
        let frozen = self.frozen;
        self.booted |= rebooted;
        let rebooted = self.booted;
        let exit = self.exits.get(&machine.record().attempt).cloned();
        self.hear(Event::Recovered(Alive { attempt: self.alive, stopping: self.told, frozen, exit, rebooted }));
        self.booted = false;
        // The agent watches what it found alive; here, `end` tells by itself. Then it reads the view.
        if self.tombstoned {
            self.hear(Event::Tombstone);
        } else {
            self.hear(Event::Assigned(Box::new(self.assigned.clone().expect("assigned"))));
        }
    }

    /// What must hold between any two inputs.
    fn check(&self) {
        let Some(machine) = &self.machine else { return };
        let (mut durable, mut held) = (self.journal.clone().expect("journalled"), machine.record().clone());
        for record in [&mut durable, &mut held] {
            record.sequence = 0;
            record.updated_at_ms = 0;
        }
        assert_eq!(durable, held, "the journal is the state");
    }

    /// Nothing fails any more, and all that is under way ends.
    fn settle(&mut self) {
        self.crash = None;
        self.confirm();
        for _ in 0..200 {
            if self.pending.is_empty() {
                return;
            }
            self.deliver(0, true);
        }
        panic!("it never comes to rest");
    }

    fn check_settled(&self) {
        let Some(machine) = &self.machine else {
            assert!(self.journal.is_none() && self.alive.is_none());
            return;
        };
        let record = machine.record();
        assert!(!self.tombstoned, "a tombstone was not obeyed: {:?}", record.state);
        match self.intent {
            Intent::Run => {
                assert_eq!(record.state, S::Started, "an acknowledged start was undone");
                assert_eq!(self.alive, Some(record.attempt));
                assert!(!self.frozen, "it runs and stands still");
            }
            // A new version, an end and a boot make one that sleeps a stopped one.
            Intent::Sleep => match record.state {
                S::Suspended => assert_eq!((self.alive, self.frozen), (Some(record.attempt), true)),
                S::Stopped | S::Created | S::Failed => assert_eq!(self.alive, None),
                state => panic!("it should sleep and is {state:?}"),
            },
            Intent::Rest => {
                assert!(matches!(record.state, S::Stopped | S::Created | S::Failed), "an acknowledged stop was undone: {:?}", record.state);
                assert_eq!(self.alive, None);
            }
            Intent::Nothing => assert_eq!(self.alive, None, "nobody started it"),
        }
        assert!(self.exits.keys().all(|attempt| *attempt < record.attempt), "an exit was not acknowledged");
    }
}

fn answered_id(effects: &[Effect]) -> Option<CommandId> {
    effects.iter().find_map(|effect| match effect {
        Effect::Answer { id, .. } => Some(id.clone()),
        _ => None,
    })
}

fn pick<T>(items: &[T], which: usize) -> Option<&T> {
    items.get(which.checked_rem(items.len())?)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_a_promise(ops in prop::collection::vec(op(), 1..60)) {
        let mut host = Host::new();
        host.apply(Op::Assign { quarters: 1, wakes: true, rests: false });
        for op in ops {
            host.apply(op);
        }
        host.settle();
        host.check_settled();
        host.crash(false);
        host.settle();
        host.check_settled();
    }
}
