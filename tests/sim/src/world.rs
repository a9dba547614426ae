//! Virtual time, what is under way, and the trouble that hosts, networks and people make.

use crate::Options;
use crate::host::{Host, Input};
use crate::mutation::Mutation;
use crate::promises::{Intent, Promises};
use crate::rng::Rng;
use crate::supervisor::{Behaviour, End, fate};
use dunlin_machine::{Asked, Deny, Order, Record, Verb};
use dunlin_model::{CommandId, Generation, MachineId, MachineState as S, MachineVersion, Source};
use dunlin_view::MachineAssignment;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const HOSTS: usize = 3;
const MACHINES_PER_HOST: usize = 3;
/// What a host has for its machines: the largest sizes do not all fit.
pub const MEMORY_MB: u32 = 1024;
/// After the last trouble everything comes to rest within this: longest of all stop times, restarts and preparations.
const CALM_MS: u64 = 20 * 60_000;
const PATIENCE_MS: u64 = 10 * 60_000;
const TRIES: u32 = 5;

/// What control says that there is.
#[derive(Debug, Clone, Default)]
pub struct Assigned {
    pub generation: u64,
    pub machines: BTreeMap<MachineId, MachineAssignment>,
    pub tombstones: BTreeSet<MachineId>,
}

#[derive(Debug)]
pub enum Happening {
    Heard { host: usize, life: u64, input: Box<Input> },
    ActEnds { host: usize, life: u64, machine: MachineId },
    AttemptEnds { host: usize, machine: MachineId, attempt: u64, end: End },
    AgentStarts { host: usize },
    DiskHasRoom { host: usize },
    Call { command: usize },
    Reply { command: CommandId },
    Retry { command: usize },
    View { host: usize, view: Rc<Assigned> },
}

impl Happening {
    /// The host that it happens to.
    pub fn host(&self) -> Option<usize> {
        match self {
            Self::Heard { host, .. }
            | Self::ActEnds { host, .. }
            | Self::AttemptEnds { host, .. }
            | Self::AgentStarts { host }
            | Self::DiskHasRoom { host }
            | Self::View { host, .. } => Some(*host),
            Self::Call { .. } | Self::Reply { .. } | Self::Retry { .. } => None,
        }
    }
}

/// What everything that happens may use.
pub struct Ctx {
    pub now_ms: u64,
    pub rng: Rng,
    pub promises: Promises,
    pub mutation: Option<Mutation>,
    /// No more trouble.
    pub calm: bool,
    queue: BTreeMap<(u64, u64), Happening>,
    queued: u64,
    pub happened: u64,
    /// What hosts said last of machines whose run is over and that are to be destroyed then.
    pub said_over: BTreeMap<MachineId, MachineVersion>,
    /// What hosts answered, for a world that carries it to whoever asked.
    pub answers: Vec<(CommandId, Result<Asked, Deny>)>,
    pub story: Option<Vec<String>>,
}

impl Ctx {
    pub fn new(seed: u64, mutation: Option<Mutation>, story: bool) -> Self {
        Self {
            now_ms: 1_000,
            rng: Rng::new(seed),
            promises: Promises::default(),
            mutation,
            calm: false,
            queue: BTreeMap::new(),
            queued: 0,
            happened: 0,
            said_over: BTreeMap::new(),
            answers: Vec::new(),
            story: story.then(Vec::new),
        }
    }

    /// When something happens next.
    pub fn next_ms(&self) -> u64 {
        self.queue.first_key_value().map_or(u64::MAX, |((at, _), _)| *at)
    }

    /// What happens next, if that is not later; the time is then.
    pub fn take_next(&mut self, until_ms: u64) -> Option<Happening> {
        let ((at, _), happening) = self.queue.first_entry().filter(|entry| entry.key().0 <= until_ms)?.remove_entry();
        self.now_ms = at.max(self.now_ms);
        self.happened += 1;
        Some(happening)
    }

    pub fn after(&mut self, in_ms: u64, happening: Happening) {
        self.queued += 1;
        self.queue.insert((self.now_ms + in_ms, self.queued), happening);
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(format!("{:>9.3} s  {}", self.now_ms as f64 / 1e3, line()));
        }
    }
}

struct Command {
    machine: MachineId,
    host: usize,
    order: Order,
    tries: u32,
    answered: bool,
}

pub struct World {
    pub ctx: Ctx,
    hosts: Vec<Host>,
    assigned: Assigned,
    home: BTreeMap<MachineId, usize>,
    incarnation: u64,
    plan: u64,
    commands: Vec<Command>,
    /// The nonce that was sent last for each machine.
    leases: BTreeMap<MachineId, String>,
}

impl World {
    pub fn new(options: &Options) -> Self {
        let ctx = Ctx::new(options.seed, options.mutation, options.story);
        let mut world = Self {
            ctx,
            hosts: (0..HOSTS).map(Host::new).collect(),
            assigned: Assigned::default(),
            home: BTreeMap::new(),
            incarnation: 1,
            plan: 1,
            commands: Vec::new(),
            leases: BTreeMap::new(),
        };
        for host in 0..HOSTS {
            world.hosts[host].start_agent(&mut world.ctx);
            world.create(host);
        }
        world
    }

    pub fn into_story(self) -> Vec<String> {
        self.ctx.story.unwrap_or_default()
    }

    /// Some time passes, and then somebody does something.
    pub fn step(&mut self) {
        let pause_ms = if self.ctx.rng.percent(80) { self.ctx.rng.between(0, 1_000) } else { self.ctx.rng.between(0, 20_000) };
        self.pass(pause_ms);
        if self.broken() {
            return;
        }
        match self.ctx.rng.below(100) {
            0..55 => self.command(),
            55..62 => self.update(),
            62..64 => self.tombstone(),
            64..67 => {
                let host = self.any_host();
                self.create(host);
            }
            67..69 => self.restore(),
            69..71 => {
                let nothing = Assigned { generation: self.next_generation(), ..Assigned::default() };
                self.send_view(Rc::new(nothing));
            }
            71..76 => self.send_view(Rc::new(self.assigned.clone())),
            76..90 => {
                let (host, power) = (self.any_host(), self.ctx.rng.percent(25));
                self.hosts[host].dies_after = Some((self.ctx.rng.below(8), power));
            }
            90..94 => {
                let (host, power) = (self.any_host(), self.ctx.rng.percent(30));
                self.hosts[host].kill_agent(&mut self.ctx, power);
            }
            _ => {
                let host = self.any_host();
                self.hosts[host].disk.full = true;
                let for_ms = self.ctx.rng.between(100, 20_000);
                self.ctx.after(for_ms, Happening::DiskHasRoom { host });
            }
        }
    }

    pub fn broken(&self) -> bool {
        self.ctx.promises.broken.is_some()
    }

    fn any_host(&mut self) -> usize {
        self.ctx.rng.below(HOSTS as u64) as usize
    }

    fn pass(&mut self, ms: u64) {
        let until = self.ctx.now_ms + ms;
        while let Some(happening) = self.ctx.take_next(until) {
            self.happen(happening);
            self.carry_answers();
            if self.broken() {
                return;
            }
        }
        self.ctx.now_ms = until;
        for host in &mut self.hosts {
            host.look_at_clock(&mut self.ctx);
        }
        self.carry_answers();
        self.destroy_what_is_over();
    }

    fn happen(&mut self, happening: Happening) {
        let ctx = &mut self.ctx;
        let happening = match happening.host() {
            Some(host) => self.hosts[host].happen(ctx, happening),
            None => Some(happening),
        };
        let Some(happening) = happening else { return };
        match happening {
            Happening::AgentStarts { host } => self.hosts[host].start_agent(ctx),
            Happening::DiskHasRoom { host } => self.hosts[host].disk.full = false,
            Happening::Call { command } => {
                let Command { machine, host, order, .. } = &self.commands[command];
                self.hosts[*host].order(ctx, machine, order.clone());
            }
            Happening::Reply { command } => {
                let index: usize = command.as_str()[1..].parse().expect("ids here are c and a number");
                self.commands[index].answered = true;
            }
            Happening::Retry { command } => self.send(command),
            Happening::View { host, view } => {
                let life = self.hosts[host].life;
                let input = Box::new(Input::View(view));
                ctx.after(0, Happening::Heard { host, life, input });
                ctx.after(0, Happening::Heard { host, life, input: Box::new(Input::Confirmed) });
            }
            Happening::Heard { .. } | Happening::ActEnds { .. } | Happening::AttemptEnds { .. } => unreachable!("hosts hear of it"),
        }
    }

    /// Some are lost on their way.
    fn carry_answers(&mut self) {
        for (command, _) in std::mem::take(&mut self.ctx.answers) {
            if self.ctx.calm || self.ctx.rng.percent(85) {
                let in_ms = self.ctx.rng.between(0, 50);
                self.ctx.after(in_ms, Happening::Reply { command });
            }
        }
    }

    // People, plans and edges.

    fn command(&mut self) {
        let machines: Vec<MachineId> = self.home.keys().cloned().collect();
        let Some(machine) = self.ctx.rng.pick(&machines) else { return };
        let rng = &mut self.ctx.rng;
        let ttl_ms = rng.between(1_000, 60_000);
        let nonce = format!("n{}", self.commands.len());
        let verb = match rng.below(25) {
            0..7 => Verb::Start,
            7..10 => Verb::Wake,
            10..14 => Verb::Stop { signal: None, timeout_ms: if rng.percent(50) { Some(rng.between(0, 10_000)) } else { None } },
            14..16 => Verb::Restart { signal: None, timeout_ms: None },
            16 => Verb::Signal { signal: 1 },
            17 => Verb::Uncordon,
            18..20 => Verb::Lease { nonce: nonce.clone(), ttl_ms, owner: "somebody".into(), description: String::new() },
            20 => Verb::Release,
            21..24 => Verb::Suspend,
            _ => Verb::Cordon,
        };
        let assignment = self.assigned.machines.get(&machine);
        let placement = assignment.map(|assignment| assignment.placement);
        let back = rng.below(3);
        let generation = placement.filter(|_| rng.percent(60)).map(|placement| Generation {
            revision: placement.revision.saturating_sub(if rng.percent(20) { back } else { 0 }),
            ..placement
        });
        let plan = rng.percent(40).then(|| Generation {
            incarnation: 1,
            revision: self.plan - rng.below(2).min(self.plan - 1),
        });
        let version = assignment.map(|assignment| assignment.spec.version.clone()).filter(|_| rng.percent(15));
        let late_ms = if rng.percent(30) { rng.between(0, 3_000) } else { rng.between(10_000, 60_000) };
        // Who took the lease last, or somebody who knows nothing of it.
        let held = self.leases.get(&machine).cloned().filter(|_| rng.percent(50));
        if let Verb::Lease { .. } = verb {
            self.leases.insert(machine.clone(), held.clone().unwrap_or(nonce));
        }
        if rng.percent(5) {
            self.plan += 1;
        }
        let index = self.commands.len();
        let order = Order {
            id: format!("c{index}").parse().expect("a command id"),
            deadline_ms: self.ctx.now_ms + late_ms,
            generation,
            plan,
            expected_version: version,
            nonce: held,
            source: Source::User,
            request_id: None,
            verb,
            room: Ok(()), // the agent looks
        };
        self.ctx.tell(|| format!("{machine}: somebody sends {} {}", order.verb.name(), order.id));
        self.ctx.promises.sent(&order);
        let host = self.home[&machine];
        self.commands.push(Command { machine, host, order, tries: 0, answered: false });
        self.send(index);
    }

    /// Calls get lost, come twice, come late; who gets no answer asks again with the same id.
    fn send(&mut self, index: usize) {
        let command = &mut self.commands[index];
        if command.answered || command.tries == TRIES {
            return;
        }
        command.tries += 1;
        let rng = &mut self.ctx.rng;
        let copies = if rng.percent(10) { 0 } else { 1 + u64::from(rng.percent(15)) };
        for _ in 0..copies {
            let rng = &mut self.ctx.rng;
            let in_ms = if rng.percent(90) { rng.between(0, 50) } else { rng.between(0, 30_000) };
            self.ctx.after(in_ms, Happening::Call { command: index });
        }
        let in_ms = self.ctx.rng.between(200, 5_000);
        self.ctx.after(in_ms, Happening::Retry { command: index });
    }

    // Control.

    fn next_generation(&mut self) -> u64 {
        self.assigned.generation += 1;
        self.assigned.generation
    }

    fn create(&mut self, host: usize) {
        let living = self.assigned.machines.keys().filter(|id| self.home[*id] == host).count();
        if living == MACHINES_PER_HOST {
            return;
        }
        let n = self.home.len() as u8;
        let id = MachineId::from_random([host as u8, 0, 0, 0, 0, 0, n]);
        self.home.insert(id.clone(), host);
        self.ctx.promises.of.entry(id.clone()).or_default();
        self.assign(id);
    }

    fn update(&mut self) {
        let machines: Vec<MachineId> = self.assigned.machines.keys().cloned().collect();
        if let Some(id) = self.ctx.rng.pick(&machines) {
            self.assign(id);
        }
    }

    /// A new version of it, sometimes with a new placement.
    fn assign(&mut self, id: MachineId) {
        let generation = self.next_generation();
        let rng = &mut self.ctx.rng;
        let behaviour = rng.pick(Behaviour::ALL).unwrap_or(Behaviour::Serves);
        let policy = rng.pick(&["always", "on-failure", "no"]).unwrap_or("always");
        let schedule = rng.pick(&["* * * * *", "*/7 * * * *"]).filter(|_| rng.percent(25));
        let auto_destroy = rng.percent(20);
        let services = if rng.percent(50) { json!([{"internal_port": 80}]) } else { json!([]) };
        let mut random = [0; 10];
        random[..8].copy_from_slice(&generation.to_be_bytes());
        let held = self.assigned.machines.get(&id).map(|held| held.placement).filter(|_| !rng.percent(30));
        let placement = held.unwrap_or(Generation { incarnation: self.incarnation, revision: generation });
        let assignment: MachineAssignment = serde_json::from_value(json!({
            "id": id, "name": "x", "host": format!("h{}", self.home[&id]), "region": "local", "address": "10.0.0.1",
            "placement": placement, "created_at_ms": 0,
            "spec": {
                "version": MachineVersion::new(self.ctx.now_ms, random), "org": "personal", "app": "web",
                "process_group": "app", "release": generation,
                "image": {"repository": "web", "digest": behaviour.image()},
                "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 128 * rng.between(1, 4)},
                "restart": {"policy": policy, "max_retries": rng.below(4)}, "services": services,
                "auto_destroy": auto_destroy, "schedule": schedule
            }
        }))
        .expect("an assignment");
        self.ctx.tell(|| {
            let version = &assignment.spec.version;
            format!("{id} is to be in {version}, {behaviour:?}, restart {policy}, {schedule:?}, auto_destroy {auto_destroy}, {placement:?}")
        });
        self.ctx.promises.made(&assignment);
        self.assigned.machines.insert(id, assignment);
        self.send_view(Rc::new(self.assigned.clone()));
    }

    fn tombstone(&mut self) {
        let machines: Vec<MachineId> = self.assigned.machines.keys().cloned().collect();
        if let Some(id) = self.ctx.rng.pick(&machines) {
            self.destroy(id);
        }
    }

    /// Control hears of it sooner or later. A machine that is to be in another version by then has another life.
    fn destroy_what_is_over(&mut self) {
        if self.ctx.mutation == Some(Mutation::KeepOver) || !self.ctx.calm && !self.ctx.rng.percent(30) {
            return;
        }
        for (id, version) in self.ctx.said_over.clone() {
            if self.assigned.machines.get(&id).is_some_and(|assigned| assigned.spec.version == version) {
                self.destroy(id);
            }
        }
    }

    fn destroy(&mut self, id: MachineId) {
        self.ctx.tell(|| format!("{id} gets a tombstone"));
        self.next_generation();
        self.assigned.machines.remove(&id);
        self.assigned.tombstones.insert(id.clone());
        self.ctx.promises.tombstoned(&id);
        self.send_view(Rc::new(self.assigned.clone()));
    }

    /// The store comes back from a backup, in a new incarnation.
    fn restore(&mut self) {
        self.ctx.tell(|| "the store is restored".into());
        self.incarnation += 1;
        let generation = self.next_generation();
        for assignment in self.assigned.machines.values_mut() {
            assignment.placement = Generation { incarnation: self.incarnation, revision: generation };
        }
        self.send_view(Rc::new(self.assigned.clone()));
    }

    fn send_view(&mut self, view: Rc<Assigned>) {
        for host in 0..HOSTS {
            let rng = &mut self.ctx.rng;
            if rng.percent(10) && !self.ctx.calm {
                continue;
            }
            let in_ms = if rng.percent(85) { rng.between(0, 500) } else { rng.between(0, 20_000) };
            let mut own = (*view).clone();
            own.machines.retain(|id, _| self.home[id] == host);
            self.ctx.after(in_ms, Happening::View { host, view: Rc::new(own) });
        }
    }

    // The end.

    /// No more trouble: everything comes to rest, and is as it was promised; also after one more crash.
    pub fn settle(&mut self) {
        self.ctx.tell(|| "--- calm".into());
        self.ctx.calm = true;
        for crash in [false, true] {
            for host in &mut self.hosts {
                host.disk.full = false;
                host.dies_after = None;
                if crash {
                    host.kill_agent(&mut self.ctx, false);
                }
            }
            let newest = self.next_generation();
            self.assigned.generation = newest;
            for minute in 0..CALM_MS / 60_000 {
                if minute < 3 {
                    for host in 0..HOSTS {
                        let mut own = self.assigned.clone();
                        own.machines.retain(|id, _| self.home[id] == host);
                        self.ctx.after(0, Happening::View { host, view: Rc::new(own) });
                    }
                }
                self.pass(60_000);
            }
            let deadline = self.ctx.now_ms + PATIENCE_MS;
            while !self.broken() && !self.rests() && self.ctx.now_ms < deadline {
                self.pass(500);
            }
            self.check_settled();
            if self.broken() {
                return;
            }
        }
    }

    fn rests(&self) -> bool {
        let to_destroy = |record: &Record| record.is_over() && record.is_current();
        let may_stay = |state| matches!(state, S::Created | S::Started | S::Stopped | S::Suspended | S::Failed | S::Restarting);
        let alarm_is_set = |record: &Record| record.restart_at_ms.is_none_or(|at| at + 1_000 > self.ctx.now_ms);
        self.hosts.iter().all(|host| {
            let records = || host.slots.iter().flatten().map(|(_, slot)| slot.machine.record());
            host.rests() && records().all(|record| may_stay(record.state) && !to_destroy(record) && alarm_is_set(record))
        })
    }

    fn check_settled(&mut self) {
        let rests = self.rests();
        self.ctx.promises.must(rests, || "a host never comes to rest".into());
        if self.broken() {
            return;
        }
        for (id, host) in self.home.clone() {
            let host = &mut self.hosts[host];
            let (journal, _) = host.disk.replay();
            let promises = &mut self.ctx.promises;
            let Some(promised) = promises.of.get(&id) else { continue };
            let (alive, intent, cordoned) = (promised.alive, promised.intent, promised.cordoned);
            if promised.tombstoned {
                let left = host.slots.as_ref().is_some_and(|slots| slots.contains_key(&id)) || journal.contains_key(&id);
                let kept = host.kept.get(&id).is_some_and(|kept| kept.alive.is_some() || !kept.exits.is_empty());
                promises.must(!left && !kept && alive.is_none(), || format!("{id} has a tombstone, and something of it is left"));
                continue;
            }
            let Some(slot) = host.slots.as_ref().and_then(|slots| slots.get(&id)) else {
                promises.must(false, || format!("{id} is lost"));
                continue;
            };
            let record = slot.machine.record();
            let state = record.state;
            let same = journal.get(&id).is_some_and(|kept| {
                let plain = |record: &Record| Record { sequence: 0, updated_at_ms: 0, ..record.clone() };
                plain(kept) == plain(record)
            });
            promises.must(same, || format!("{id}: the journal is not the state"));
            promises.must(!(record.is_over() && record.is_current()), || format!("{id} is over and was not destroyed"));
            let runs = state == S::Started && alive == Some(record.attempt);
            let why_not = state == S::Restarting && record.exit.is_some() && alive.is_none();
            let sleeps = alive.is_none() && matches!(state, S::Created | S::Stopped | S::Failed);
            let frozen = host.kept.get(&id).and_then(|kept| kept.alive.as_ref()).is_some_and(|alive| alive.frozen);
            let kept_its_word = match intent {
                Intent::Run => runs && !frozen || why_not,
                Intent::Sleep => sleeps || state == S::Suspended && frozen,
                Intent::Rest | Intent::Nothing | Intent::Over => sleeps,
            };
            promises.must(kept_its_word, || format!("{id} is to be {intent:?}, and is {} (alive {alive:?}, frozen {frozen})", state.as_str()));
            promises.must(record.cordoned == cordoned, || format!("{id}: cordoned is {}, promised {cordoned}", record.cordoned));
            let target = &self.assigned.machines[&id];
            let told_why = record.problem.is_some() || fate(&target.spec) == Behaviour::Missing;
            let there = record.is_current() && record.assignment.spec.version == target.spec.version;
            promises.must(there || told_why, || format!("{id} is in {} and not in {}", record.version(), target.spec.version));
            let acknowledged = host.kept.get(&id).is_none_or(|kept| kept.exits.keys().all(|attempt| *attempt < record.attempt));
            promises.must(acknowledged, || format!("{id}: the end of an attempt was never acknowledged"));
        }
    }
}
