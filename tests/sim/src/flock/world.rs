//! Virtual time, the owners, control, and the trouble that networks, disks, clocks and people make.

use super::Options;
use super::checks::{self, Checks};
use super::liar::Liar;
use super::network::{Message, Network};
use super::process::Process;
use crate::rng::Rng;
use dunlin_gossip::planted::Bug;
use dunlin_gossip::{
    Addr, At, Certificate, Change, Config, Cursor, Event, Head, Identity, Input, Key, LtHash, Name, Node, Now, OriginId, Output,
    Peer, Region, Row, Scope, Snapshot, Statement, Subject, Topic,
};
use ed25519_dalek::SigningKey;
use std::collections::{BTreeMap, BTreeSet};

pub const HOSTS: usize = 6;
/// Hosts 0 and 1 run control as well; the last host lies.
const CONTROLS: [usize; 2] = [0, 1];
const LIAR: usize = HOSTS - 1;
const REGIONS: [&str; 2] = ["fra", "iad"];

pub struct Host {
    pub id: OriginId,
    pub key: SigningKey,
    pub certificate: Certificate,
}

/// What the store holds, and what a publication of it is a pure function of.
#[derive(Default)]
struct Store {
    revision: u64,
    rows: BTreeMap<Key, (Vec<u8>, u64)>,
    last_deletion: u64,
}

pub struct World {
    pub checks: Checks,
    pub now_ms: u64,
    pub handled: u64,
    pub story: Vec<String>,
    tells: bool,
    bug: Option<Bug>,
    rng: Rng,
    cluster: SigningKey,
    pub hosts: Vec<Host>,
    pub processes: Vec<Process>,
    network: Network,
    liar: Liar,
    store: Store,
    pub config: Host,
    healed_at_ms: u64,
    restarts: Vec<(u64, usize)>,
    subscribed: Option<(usize, Region, Topic)>,
    forked: bool,
}

impl World {
    pub fn new(options: &Options) -> Self {
        let cluster = SigningKey::from_bytes(&[1; 32]);
        let host = |at: usize| host(&cluster, &format!("host/w{at}"), at as u8 + 10, (region(at), Scope::Region));
        let config = super::world::host(&cluster, "config/0", 2, (Region::new([]).expect("short"), Scope::Global));
        let mut world = Self {
            checks: Checks::default(),
            now_ms: 0,
            handled: 0,
            story: vec![],
            tells: options.story,
            bug: options.bug,
            rng: Rng::new(options.seed),
            hosts: (0..HOSTS).map(host).collect(),
            processes: (0..HOSTS).map(Process::new).collect(),
            cluster,
            network: Network::default(),
            liar: Liar::new(),
            store: Store::default(),
            config,
            healed_at_ms: 0,
            restarts: vec![],
            subscribed: None,
            forked: false,
        };
        for at in 0..HOSTS {
            world.processes[at].skew_ms = world.rng.between(0, 4_000) as i64 - 2_000;
            world.fact(at);
            world.start(at, None);
        }
        world
    }

    // ---- acts

    pub fn step(&mut self) {
        let at = self.rng.below(self.processes.len() as u64) as usize;
        match self.rng.below(100) {
            0..45 => self.change(at),
            45..55 => self.change_store(),
            55..65 => self.publish_store(),
            65..70 => self.keep_snapshot(at),
            70..77 => self.cut_links(),
            77..84 => self.network.heal(),
            84..90 => self.kill(at),
            90..92 => self.set_clock(at),
            92..94 => self.flip_memory(at),
            94..95 => self.clone_host(),
            95..96 => self.contradict(),
            96..98 => self.subscribe(at),
            98..99 => self.churn(at),
            _ => {}
        }
        let pause_ms = self.rng.between(20, 800);
        self.pass(pause_ms);
    }

    fn change(&mut self, at: usize) {
        let Some(change) = self.fact(at) else { return };
        if self.processes[at].is_up() {
            let origin = self.hosts[self.processes[at].host].id;
            self.handle(at, Input::Publish { origin, schema: 1, changes: vec![change], at: None });
        }
    }

    /// The owner's own journal has it first.
    fn fact(&mut self, at: usize) -> Option<Change> {
        let key = Key::new(format!("m{}", self.rng.below(24))).expect("short");
        let facts = &mut self.processes[at].facts;
        if self.rng.percent(25) {
            facts.remove(&key)?;
            return Some(Change { key, value: None, seq: None });
        }
        let value = format!("{}:{}", self.rng.draw(), "x".repeat(self.rng.below(400) as usize)).into_bytes();
        facts.insert(key.clone(), value.clone());
        Some(Change { key, value: Some((topic(), value)), seq: None })
    }

    fn change_store(&mut self) {
        let key = Key::new(format!("app{}", self.rng.below(12))).expect("short");
        let store = &mut self.store;
        store.revision += 1;
        if self.rng.percent(25) && store.rows.remove(&key).is_some() {
            store.last_deletion = store.revision;
        } else {
            store.rows.insert(key, (self.rng.draw().to_le_bytes().to_vec(), store.revision));
        }
        // The truth is the store's own, whoever publishes what of it.
        let row = |(key, (value, revision)): (&Key, &(Vec<u8>, u64))| Row::live(key.clone(), *revision, &topic(), value).expect("short");
        let rows: Vec<Row> = store.rows.iter().map(row).collect();
        let mut lanes = LtHash::default();
        rows.iter().for_each(|row| lanes.add(row.raw()));
        self.checks.wrote_state((self.config.id, self.config.certificate.epoch, store.revision, lanes.digest()), rows);
    }

    /// Either control process, at its own pace, whole or in part: the same revision must be the same state.
    fn publish_store(&mut self) {
        let control = self.rng.pick(&CONTROLS).expect("there are two");
        self.publish_store_at(control);
    }

    fn publish_store_at(&mut self, at: usize) {
        let store = &self.store;
        if !self.processes[at].is_up() || store.revision == 0 {
            return;
        }
        let published = self.processes[at].published_revision;
        let since = if self.rng.percent(30) || store.last_deletion > published { 0 } else { published };
        let newer = store.rows.iter().filter(|(_, (_, revision))| *revision > since);
        let change = |(key, (value, revision)): (&Key, &(Vec<u8>, u64))| Change {
            key: key.clone(),
            value: Some((topic(), value.clone())),
            seq: Some(*revision),
        };
        let changes = newer.map(change).collect();
        let place = At { since, seq: store.revision, floor: store.last_deletion };
        self.processes[at].published_revision = store.revision;
        self.handle(at, Input::Publish { origin: self.config.id, schema: 1, changes, at: Some(place) });
    }

    fn keep_snapshot(&mut self, at: usize) {
        if let Some(node) = &self.processes[at].node {
            let snapshot = node.snapshot();
            self.processes[at].disk.push(snapshot);
        }
    }

    fn cut_links(&mut self) {
        let count = self.processes.len();
        let side: Vec<bool> = (0..count).map(|_| self.rng.percent(40)).collect();
        let one_way = self.rng.percent(40);
        self.tell(|| format!("cut off: {:?}{}", (0..count).filter(|at| side[*at]).collect::<Vec<_>>(), if one_way { ", one way" } else { "" }));
        for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
            if side[from] && !side[to] || !one_way && !side[from] && side[to] {
                self.network.cut(from, to);
            }
        }
    }

    fn kill(&mut self, at: usize) {
        let process = &mut self.processes[at];
        if process.node.take().is_none() {
            return;
        }
        let after_ms = self.rng.between(50, 12_000);
        self.restarts.push((self.now_ms + after_ms, at));
        self.tell(|| format!("process {at} is killed"));
    }

    fn restart(&mut self, at: usize) {
        if self.processes[at].node.is_some() {
            return;
        }
        let disk = self.processes[at].disk.len() as u64;
        let chosen = match self.rng.below(10) {
            0 => None,
            1..4 => (disk > 0).then(|| self.rng.below(disk) as usize),
            _ => disk.checked_sub(1).map(|last| last as usize),
        };
        self.start(at, chosen);
    }

    pub fn start(&mut self, at: usize, snapshot: Option<usize>) {
        let process = &mut self.processes[at];
        (process.lives, process.silenced) = (process.lives + 1, false);
        (process.started_ms, process.published_revision) = (self.now_ms, 0);
        let now = now(self.now_ms, process);
        let snapshot_of = snapshot;
        let bytes = snapshot.map(|which| process.disk[which].clone());
        if snapshot.is_none() {
            process.disk.clear();
        }
        let cluster = self.cluster.verifying_key();
        let snapshot = bytes.map(|bytes| Snapshot::decode(cluster, &bytes).expect("what was kept is read"));
        let host = &self.hosts[process.host];
        let identity = Identity { certificate: host.certificate.clone(), key: host.key.clone(), addr: addr(at), life: self.rng.draw() };
        let peers = (0..HOSTS).filter(|peer| *peer != process.host).map(|peer| seed_peer(&self.hosts, peer)).collect();
        let config = Config { cluster, seed: self.rng.draw(), peers, membership: true, hold_ms: 60 };
        let node = Node::new(config, identity, snapshot, now);
        self.checks.started(at, &node);
        process.reader = checks::seen_from(&node);
        process.node = Some(node);
        self.tell(|| format!("process {at} starts from {}", snapshot_of.map_or("nothing".into(), |which| format!("snapshot {which}"))));
        if CONTROLS.contains(&at) {
            let (certificate, key) = (self.config.certificate.clone().into(), self.config.key.clone().into());
            self.handle(at, Input::Own { certificate, key });
        }
        let facts = self.processes[at].facts.iter();
        let changes = facts.map(|(key, value)| Change { key: key.clone(), value: Some((topic(), value.clone())), seq: None }).collect();
        let origin = self.hosts[self.processes[at].host].id;
        self.handle(at, Input::Publish { origin, schema: 1, changes, at: None });
    }

    fn set_clock(&mut self, at: usize) {
        let by_ms = self.rng.between(0, 120_000) as i64 - 60_000;
        self.processes[at].skew_ms += by_ms;
        self.tell(|| format!("the clock of process {at} jumps by {by_ms} ms"));
    }

    fn flip_memory(&mut self, at: usize) {
        let own = self.hosts[self.processes[at].host].id;
        let Some(node) = &mut self.processes[at].node else { return };
        let foreign: Vec<OriginId> = node.catalogue().logs().map(|log| log.head.is.id).filter(|id| *id != own && *id != self.config.id).collect();
        if let Some(origin) = self.rng.pick(&foreign).filter(|origin| node.flip_memory(*origin)) {
            self.tell(|| format!("memory of process {at} fails in {origin:?}"));
        }
    }

    /// A copy of a host's disk is started elsewhere.
    fn clone_host(&mut self) {
        if self.processes.len() > HOSTS {
            return;
        }
        let of = self.rng.below(HOSTS as u64 - 1) as usize;
        if CONTROLS.contains(&of) || self.processes[of].disk.is_empty() {
            return;
        }
        let mut clone = Process::new(of);
        clone.is_clone = true;
        clone.disk = self.processes[of].disk.clone();
        clone.facts = self.processes[of].facts.clone();
        clone.facts.insert(Key::new("clone").expect("short"), b"was here".to_vec());
        self.processes.push(clone);
        self.checks.in_two_hands.insert(self.hosts[of].id);
        self.tell(|| format!("a clone of host {of} starts"));
        let last = self.processes[HOSTS].disk.len() - 1;
        self.start(HOSTS, Some(last));
    }

    /// Two heads of one sequence, both signed by the host: its key is in two hands.
    fn contradict(&mut self) {
        let at = 2 + self.rng.below(HOSTS as u64 - 3) as usize;
        let host = &self.hosts[at];
        let log = self.processes[at].node.as_ref().filter(|_| !self.forked).and_then(|node| node.catalogue().log(host.id));
        let Some(log) = log.filter(|log| log.head.is.epoch == host.certificate.epoch) else { return };
        let row = Row::live(Key::new("other").expect("short"), log.head.is.seq, &topic(), b"hand").expect("short");
        let mut lanes = LtHash::default();
        lanes.add(row.raw());
        let is = Statement { digest: lanes.digest(), floor: log.head.is.seq, ..log.head.is.clone() };
        let head = Head::sign(&host.key, is);
        let certificate = Some(host.certificate.clone());
        let batch = dunlin_gossip::Batch { certificate, head, after: Cursor::START, rows: vec![row.clone()], more: dunlin_gossip::More::Last };
        let is = &batch.head.is;
        self.checks.wrote_state((is.id, is.epoch, is.seq, is.digest), vec![row]);
        self.checks.in_two_hands.insert(host.id);
        self.checks.may_fork.insert((host.id, is.epoch));
        self.forked = true;
        self.tell(|| format!("the key of host {at} signs two heads of one sequence"));
        let (seq, first_epoch) = (batch.head.is.seq, batch.head.is.epoch);
        let bytes = dunlin_gossip::Message::Batches(vec![batch]).encode();
        // Somebody of its region, who may hold the first of the two; the others are to hear of it.
        let to = if at.is_multiple_of(REGIONS.len()) { 0 } else { self.rng.pick(&[1, LIAR]).expect("two") };
        let id = self.hosts[at].id;
        let state = |world: &Self| world.processes[to].node.as_ref().and_then(|node| node.catalogue().log(id).map(|log| (log.head.at(), log.head.is.epoch)));
        let both = state(self).is_some_and(|(held, epoch)| held.0 == seq && epoch == first_epoch);
        self.handle(to, Input::Stream { from: addr(at), bytes });
        let knows = self.processes[to].node.as_ref().is_some_and(|node| node.catalogue().fork(id).is_some());
        if both && !knows {
            self.checks.fail(|| format!("process {to} holds two heads of {id:?} at {seq} and does not mind"));
        }
    }

    /// So many rows come and go that tombstones fall below the floor.
    fn churn(&mut self, at: usize) {
        if !self.processes[at].is_up() {
            return;
        }
        let origin = self.hosts[self.processes[at].host].id;
        for value in [Some((topic(), vec![])), None] {
            let change = |n| Change { key: Key::new(format!("t{n}")).expect("short"), value: value.clone(), seq: None };
            self.handle(at, Input::Publish { origin, schema: 1, changes: (0..300).map(change).collect(), at: None });
        }
        self.change(at);
    }

    fn subscribe(&mut self, at: usize) {
        let far = region(self.processes[at].host + 1);
        if at < HOSTS && self.processes[at].node.is_some() {
            // Some want to know of a topic, some all of the region.
            let topic = if at.is_multiple_of(2) { topic() } else { Topic::new([]).expect("short") };
            self.subscribed = Some((at, far.clone(), topic.clone()));
            self.handle(at, Input::Use { region: far, topic });
        }
    }

    // ---- time

    pub fn pass(&mut self, ms: u64) {
        let until_ms = self.now_ms + ms;
        loop {
            let wakes = self.processes.iter().map(Process::next_wake_ms);
            let restart = self.restarts.iter().map(|(at, _)| *at);
            let next_ms = wakes.chain(restart).chain([self.network.next_ms()]).min().unwrap_or(u64::MAX);
            if next_ms > until_ms || self.checks.broken.is_some() {
                break;
            }
            self.now_ms = next_ms.max(self.now_ms);
            while let Some(Message { from, to, is_stream, bytes }) = self.network.arrive(self.now_ms) {
                let from = addr(from);
                self.handle(to, if is_stream { Input::Stream { from, bytes } } else { Input::Datagram { from, bytes } });
            }
            for at in 0..self.processes.len() {
                if self.processes[at].next_wake_ms() <= self.now_ms {
                    self.handle(at, Input::Tick);
                }
            }
            let (due, later) = std::mem::take(&mut self.restarts).into_iter().partition(|(at_ms, _)| *at_ms <= self.now_ms);
            self.restarts = later;
            let due: Vec<(u64, usize)> = due;
            due.into_iter().for_each(|(_, at)| self.restart(at));
        }
        self.now_ms = until_ms;
    }

    pub fn handle(&mut self, at: usize, input: Input) {
        let process = &mut self.processes[at];
        let now = now(self.now_ms, process);
        let Some(node) = process.node.as_mut() else { return };
        self.handled += 1;
        let origin = self.hosts[process.host].id;
        let digest = |node: &Node| node.catalogue().log(origin).map(|log| log.head.is.digest);
        let (before, is_foreign) = (digest(node), matches!(input, Input::Datagram { .. } | Input::Stream { .. }));
        let outputs = node.handle(input, now);
        // It writes when its owner says something, when time or the last answer lets it speak, and when a chain of beats has
        // ended, which changes no row. What it merely takes from others is not its truth.
        let begins = outputs.iter().any(|output| matches!(output, Output::Event(Event::Speaking { .. })));
        let writes = !is_foreign || begins || before == digest(node);
        if let Some(log) = node.catalogue().log(origin).filter(|log| writes && log.head.is.life == node.me().life) {
            self.checks.wrote(log);
        }
        if process.is_clone && node.speaks() {
            self.checks.may_fork.extend(node.catalogue().epoch(origin).map(|epoch| (origin, epoch)));
        }
        let mut told = BTreeSet::new();
        for output in outputs {
            if let Output::Changed { origin, .. } = &output {
                told.insert(*origin);
            }
            self.output(at, output);
        }
        // Several changes of one log may come at once; the last of them is what it is now.
        told.into_iter().for_each(|origin| self.checks.is_true(at, &self.processes[at], origin));
    }

    fn output(&mut self, at: usize, output: Output) {
        match output {
            Output::Datagram { to, bytes } => {
                if bytes.len() > dunlin_gossip::MAX_DATAGRAM_BYTES {
                    self.checks.fail(|| format!("process {at} sends a datagram of {} bytes", bytes.len()));
                }
                self.send(at, &to, false, bytes);
            }
            Output::Stream { to, bytes } => self.send(at, &to, true, bytes),
            Output::Changed { origin, epoch, seq, whole, rows } => {
                let seen = self.processes[at].reader.entry(origin).or_default();
                self.checks.told(at, seen, (origin, (epoch, seq), whole), rows);
            }
            Output::Event(event) => self.event(at, event),
        }
    }

    fn event(&mut self, at: usize, event: Event) {
        self.tell(|| format!("process {at}: {event:?}"));
        match event {
            Event::Forked { origin, epoch, .. } => self.checks.forked(at, (origin, epoch)),
            Event::DuplicateIdentity { .. } | Event::Superseded { .. } => {
                let host = self.processes[at].host;
                if !self.checks.in_two_hands.contains(&self.hosts[host].id) {
                    self.checks.fail(|| format!("process {at} is called a duplicate, but there is no other"));
                }
                self.processes[at].silenced = true;
            }
            // What is fetched again comes as a whole, and is no older than what was dropped.
            Event::SelfCheckFailed { origin } => self.processes[at].reader.entry(origin).or_default().rows.clear(),
            Event::NeedWhole { .. } => self.processes[at].published_revision = 0,
            Event::Refused { origin, why } => self.checks.fail(|| format!("process {at} was refused {origin:?}: {why}")),
            Event::Unsubscribed { region, .. } => {
                let node = self.processes[at].node.as_ref().expect("it said something");
                let held: Vec<OriginId> = node.catalogue().of_region(&region).map(|log| log.head.is.id).collect();
                let reader = &mut self.processes[at].reader;
                self.hosts.iter().filter(|host| !held.contains(&host.id) && host.certificate.region == region).for_each(|host| {
                    reader.remove(&host.id);
                });
            }
            _ => {}
        }
    }

    fn send(&mut self, from: usize, to: &Addr, is_stream: bool, bytes: Vec<u8>) {
        let to = usize::from(to.as_bytes()[0]);
        let bytes = if from == LIAR { self.liar.lie(&mut self.rng, bytes) } else { bytes };
        if to < self.processes.len() && !bytes.is_empty() {
            let far = region(self.processes[from].host) != region(self.processes[to].host);
            self.network.send(&mut self.rng, self.now_ms, Message { from, to, is_stream, bytes }, far);
        }
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.tells {
            self.story.push(format!("{:>9} {}", self.now_ms, line()));
        }
    }
}

mod settle;

fn now(now_ms: u64, process: &Process) -> Now {
    Now { ms: now_ms - process.started_ms, wall_ms: process.wall_ms(now_ms) }
}

pub fn topic() -> Topic {
    Topic::new("shop").expect("short")
}

pub fn region(at: usize) -> Region {
    Region::new(REGIONS[at % REGIONS.len()]).expect("short")
}

pub fn addr(at: usize) -> Addr {
    Addr::new([at as u8]).expect("short")
}

fn seed_peer(hosts: &[Host], at: usize) -> Peer {
    Peer { id: hosts[at].id, region: region(at), addr: addr(at), life: 0, started_ms: 0, renewed: 0 }
}

pub fn host(cluster: &SigningKey, name: &str, seed: u8, (region, scope): (Region, Scope)) -> Host {
    let key = SigningKey::from_bytes(&[seed; 32]);
    let name = Name::new(name).expect("short");
    let subject = Subject { name, epoch: 1, key: key.verifying_key(), region, scope };
    let certificate = Certificate::issue(cluster, &subject);
    Host { id: certificate.id, key, certificate }
}
