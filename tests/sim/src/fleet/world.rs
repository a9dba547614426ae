//! Virtual time, the processes of the hosts and what passes between them.

use super::checks::{Checks, Lives};
use super::control::Control;
use super::edge::Request;
use super::member::{Identity, Kept, Member, Process};
use super::store::Store;
use super::wires::Wires;
use super::{Bug, Options, rows};
use crate::flock::liar::Liar;
use crate::flock::network::{Message, Network};
use crate::host::{Host, Input as Heard};
use crate::promises::Promises;
use crate::world::{Ctx, Happening};
use dunlin_gossip::{
    Addr, Certificate, Config, Event, Identity as Me, Input, Log, Name, Node, OriginId, Output, Peer, Region, Row, Scope, Snapshot, Subject,
};
use dunlin_model::{AppName, CommandId, Generation, HostId};
use dunlin_view::{ConfigState, Freshness, HostFacts};
use ed25519_dalek::SigningKey;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub const HOSTS: usize = 5;
/// The host that runs control.
pub const CONTROL: usize = 0;
/// What this host relays it alters; its machines it runs as the others do.
const LIAR: usize = HOSTS - 1;
/// Beyond all hosts: whose keys the writer of desired state has.
const CONFIG: usize = 100;
const REGIONS: [&str; 2] = ["fra", "iad"];
const FRESH_MS: u64 = 6_000;
const AGING_MS: u64 = 30_000;
const LOOK_EVERY_MS: u64 = 1_000;
/// A host speaks of itself at every so manieth look.
const SPEAKS_EVERY: u64 = 5;
/// A host that was behind has seconds to do what it has heard.
const EXCUSED_MS: u64 = 5_000;

pub struct World {
    pub ctx: Ctx,
    /// What is promised of the clone's machines, which are others.
    pub of_clone: Promises,
    pub members: Vec<Member>,
    pub network: Network,
    liar: Liar,
    pub wires: Wires,
    pub store: Store,
    /// A copy of it, of some time ago.
    pub backup: Option<Store>,
    /// The store is that copy, of this generation, and control has not adopted yet what the fleet knows.
    pub restored: Option<Generation>,
    /// What was published last is wrong.
    pub is_half: bool,
    pub control: Option<Control>,
    /// By command: the call that it came with.
    pub orders: BTreeMap<CommandId, u64>,
    pub requests: BTreeMap<u64, Request>,
    /// Ids that were given out.
    pub made: u64,
    /// Apps of which something was stopped by a person or lost with a disk.
    pub helps: BTreeSet<AppName>,
    pub checks: Checks,
    pub bug: Option<Bug>,
    cluster: SigningKey,
    pub config: Identity,
}

impl World {
    pub fn new(options: &Options) -> Self {
        let cluster = SigningKey::from_bytes(&[1; 32]);
        let members: Vec<Member> = (0..HOSTS).map(|at| Member::new(at, identity(&cluster, &format!("host/h{at}"), at, 1))).collect();
        let hosts: Vec<(HostId, &str)> = members.iter().map(|member| (member.identity.host.clone(), member.identity.region)).collect();
        let mut world = Self {
            ctx: Ctx::new(options.seed, options.bug.and_then(Bug::of_machines), options.story),
            of_clone: Promises::default(),
            members,
            network: Network::default(),
            liar: Liar::new(),
            wires: Wires::default(),
            store: Store::new(&hosts),
            backup: None,
            restored: None,
            is_half: false,
            control: None,
            orders: BTreeMap::new(),
            requests: BTreeMap::new(),
            made: 0,
            helps: BTreeSet::new(),
            checks: Checks::default(),
            bug: options.bug,
            config: identity(&cluster, "config/0", CONFIG, 1),
            cluster,
        };
        for at in 0..HOSTS {
            world.members[at].skew_ms = world.ctx.rng.between(0, 2_000) as i64 - 1_000;
            world.start(at);
        }
        world
    }

    pub fn is(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    pub fn broken(&self) -> Option<&String> {
        [&self.checks.broken, &self.ctx.promises.broken, &self.of_clone.broken].into_iter().find_map(Option::as_ref)
    }

    /// The member that a host's address belongs to.
    pub fn at(&self, host: &HostId) -> usize {
        self.members.iter().position(|member| member.identity.host == *host).expect("a host of this fleet")
    }

    // ---- time

    pub fn pass(&mut self, ms: u64) {
        let until_ms = self.ctx.now_ms + ms;
        while self.broken().is_none() {
            let members = self.members.iter().map(Member::next_ms).min().unwrap_or(u64::MAX);
            let control = self.control.as_ref().map_or(u64::MAX, |control| control.next_ms);
            let requests = self.requests.values().filter(|request| request.ended.is_none()).map(|request| request.next_ms).min().unwrap_or(u64::MAX);
            let next_ms = [members, control, requests, self.ctx.next_ms(), self.network.next_ms(), self.wires.next_ms()].into_iter().min().unwrap_or(u64::MAX);
            if next_ms > until_ms {
                break;
            }
            self.ctx.now_ms = next_ms.max(self.ctx.now_ms);
            self.moment();
        }
        self.ctx.now_ms = until_ms;
    }

    /// All that is due now.
    fn moment(&mut self) {
        let now_ms = self.ctx.now_ms;
        while let Some(happening) = self.ctx.take_next(now_ms) {
            self.happen(happening);
        }
        while let Some(Message { from, to, is_stream, bytes }) = self.network.arrive(now_ms) {
            let from = addr(from);
            self.handle(to, if is_stream { Input::Stream { from, bytes } } else { Input::Datagram { from, bytes } });
        }
        while let Some(wire) = self.wires.arrive(now_ms) {
            self.arrive(wire);
        }
        for at in 0..self.members.len() {
            let process = |world: &Self| world.members[at].process.as_ref().map(|process| (process.look_at_ms, process.node.next_wake_ms() + process.started_ms));
            if process(self).is_some_and(|(_, wake_ms)| wake_ms <= now_ms) {
                self.handle(at, Input::Tick);
            }
            if process(self).is_some_and(|(look_ms, _)| look_ms <= now_ms) {
                self.look(at);
            }
        }
        if self.control.as_ref().is_some_and(|control| control.next_ms <= now_ms) {
            self.control_acts();
        }
        self.edges_act();
    }

    fn happen(&mut self, happening: Happening) {
        let Some(at) = happening.host() else { return };
        match happening {
            Happening::AgentStarts { .. } => self.start(at),
            happening => self.with_agent(at, |agent, ctx| drop(agent.happen(ctx, happening))),
        }
    }

    /// The agent does something; then what it says is carried on.
    pub fn with_agent(&mut self, at: usize, act: impl FnOnce(&mut Host, &mut Ctx)) {
        let is_clone = self.members[at].is_clone;
        if is_clone {
            std::mem::swap(&mut self.ctx.promises, &mut self.of_clone);
        }
        act(&mut self.members[at].agent, &mut self.ctx);
        if is_clone {
            std::mem::swap(&mut self.ctx.promises, &mut self.of_clone);
        }
        let answers = std::mem::take(&mut self.ctx.answers);
        if self.members[at].agent.slots.is_none() && self.members[at].process.take().is_some() {
            self.process_ended(at);
            return;
        }
        for (command, answer) in answers {
            self.answered(at, &command, answer);
        }
        self.publish_news(at);
        let living = self.living();
        self.checks.lives(&living);
    }

    fn process_ended(&mut self, at: usize) {
        self.requests.retain(|_, request| request.edge != at);
        if at == CONTROL {
            self.control = None;
        }
    }

    pub fn kill(&mut self, at: usize, power: bool) {
        self.with_agent(at, |agent, ctx| if power { agent.lose_power(ctx) } else { agent.kill_agent(ctx, false) });
    }

    /// Every program that runs somewhere.
    pub fn living(&self) -> Vec<Lives> {
        let mut living = vec![];
        for (at, member) in self.members.iter().enumerate() {
            for (machine, kept) in &member.agent.kept {
                let Some(alive) = &kept.alive else { continue };
                living.push(Lives { member: at, machine: machine.clone(), attempt: alive.attempt, is_excused: member.is_clone || member.behind.is_some() });
            }
        }
        living
    }

    // ---- processes

    /// The server of a host starts from its disk.
    pub fn start(&mut self, at: usize) {
        if self.members[at].is_silenced || self.members[at].process.is_some() {
            return;
        }
        let now_ms = self.ctx.now_ms;
        let (life, seed, verifying) = (self.ctx.rng.draw(), self.ctx.rng.draw(), self.cluster.verifying_key());
        let peers = (0..HOSTS).filter(|peer| self.members[*peer].identity.host != self.members[at].identity.host).map(|peer| seed_peer(&self.members[peer].identity, peer));
        let config = Config { cluster: verifying, seed, peers: peers.collect(), membership: true, hold_ms: 60 };
        let member = &mut self.members[at];
        let Identity { certificate, key, .. } = member.identity.clone();
        let snapshot = member.kept.gossip.as_ref().map(|bytes| Snapshot::decode(verifying, bytes).expect("what was kept is read"));
        let now = dunlin_gossip::Now { ms: 0, ..member.now(now_ms) };
        let node = Node::new(config, Me { certificate, key, addr: addr(at), life }, snapshot, now);
        let logs: Vec<(OriginId, Vec<Row>)> = node.catalogue().logs().map(|log| (log.head.is.id, log.rows().cloned().collect())).collect();
        member.process = Some(Process::new(node, member.kept.config.clone(), now_ms));
        let generation = member.kept.config.generation;
        self.ctx.tell(|| format!("h{at}: its server starts, with desired state {generation}"));
        for (origin, rows) in logs {
            self.changed(at, origin, true, &rows);
        }
        if at == CONTROL {
            if self.restored.is_none() {
                self.own_config();
            }
            self.control = Some(Control::start(now_ms));
            self.store.commit(); // it writes down that it has started
            self.checks.reached_ms = self.members.iter().map(|member| (member.identity.host.clone(), now_ms)).collect();
        }
        self.read_config(at);
        self.with_agent(at, |agent, ctx| agent.start_agent(ctx));
        self.tell_agent(at);
    }

    pub fn own_config(&mut self) {
        let (certificate, key) = (self.config.certificate.clone().into(), self.config.key.clone().into());
        self.handle(CONTROL, Input::Own { certificate, key });
    }

    /// A copied disk: its server ends with its machines.
    fn silenced(&mut self, at: usize) {
        self.ctx.tell(|| format!("h{at}: another process has its identity: it ends with its machines"));
        self.members[at].is_silenced = true;
        self.kill(at, true);
    }

    /// Control knows it from its store; others once control's log lives and has nothing newer than what they have.
    fn confirm(&mut self, at: usize) {
        let Some(process) = &self.members[at].process else { return };
        let status = process.node.status(self.config.origin);
        let lives = status.is_some_and(|status| status.age_ms.is_some() && status.lag == 0 && !status.quarantined);
        let read = process.node.catalogue().log(self.config.origin).and_then(|log| rows::config(log.rows()));
        let is_newest = read.is_some_and(|read| read.generation == process.view.config.generation);
        let waits = self.members[at].agent.slots.iter().flatten().any(|(_, slot)| slot.machine.record().unconfirmed);
        if waits && (self.controls(at) || lives && is_newest) {
            self.with_agent(at, |agent, ctx| agent.confirm(ctx));
        }
    }

    /// It writes desired state, and need not read it.
    fn controls(&self, at: usize) -> bool {
        at == CONTROL && self.control.is_some() && self.restored.is_none()
    }

    fn look(&mut self, at: usize) {
        let now_ms = self.ctx.now_ms;
        self.confirm(at);
        let saves = self.ctx.rng.percent(50);
        let identities: Vec<(HostId, OriginId)> = self.members[..HOSTS].iter().map(|member| (member.identity.host.clone(), member.identity.origin)).collect();
        let member = &mut self.members[at];
        let Some(process) = &mut member.process else { return };
        process.look_at_ms = now_ms + LOOK_EVERY_MS;
        process.looks += 1;
        let heard: BTreeMap<HostId, Freshness> = identities
            .into_iter()
            .filter(|(host, _)| *host != member.identity.host)
            .map(|(host, origin)| (host, freshness(process.node.status(origin).and_then(|status| status.age_ms))))
            .collect();
        if *process.view.heard != heard {
            process.view = Arc::new(dunlin_view::Snapshot { heard: Arc::new(heard), ..(*process.view).clone() });
            process.table_is_stale = true;
        }
        if saves {
            member.kept.gossip = Some(process.node.snapshot());
            member.kept.config = process.view.config.clone();
        }
        let speaks = process.said.is_some() && process.looks.is_multiple_of(SPEAKS_EVERY);
        let knows = process.view.config.clone();
        if member.behind.is_some_and(|behind| knows.generation >= behind) && now_ms >= member.heard_since_ms + EXCUSED_MS {
            member.behind = None;
        }
        let doomed = |id: &dunlin_model::MachineId| knows.tombstones.get(id) == Some(&member.identity.host);
        let living = member.agent.kept.iter().filter(|(id, kept)| kept.alive.is_some() && doomed(id));
        let doomed: Vec<_> = living.map(|(id, _)| id.clone()).collect();
        self.checks.obeys(at, now_ms, &doomed);
        if speaks {
            let fact = self.members[at].fact_of_host(now_ms);
            self.checks.says_of_itself(&fact);
            let origin = self.members[at].identity.origin;
            let changes = vec![rows::of_host(&fact)];
            self.set_view(at, |view| view.with_host(Arc::new(fact)));
            self.handle(at, Input::Publish { origin, schema: 1, changes, at: None });
        }
    }

    // ---- what a host says

    fn publish_news(&mut self, at: usize) {
        let now_ms = self.ctx.now_ms;
        let news = self.members[at].news(now_ms);
        if news.changes.is_empty() {
            return;
        }
        for fact in &news.facts {
            self.checks.says(fact);
        }
        if let Some(fact) = &news.host {
            self.checks.says_of_itself(fact);
        }
        self.set_view(at, |view| {
            let mut view = news.facts.into_iter().fold(view.clone(), |view, fact| view.with_machine(Arc::new(fact)).unwrap_or(view));
            news.gone.iter().for_each(|id| view = view.without_machine(id));
            news.host.map_or(view.clone(), |fact| view.with_host(Arc::new(fact)))
        });
        let origin = self.members[at].identity.origin;
        self.handle(at, Input::Publish { origin, schema: 1, changes: news.changes, at: None });
    }

    pub fn set_view(&mut self, at: usize, next: impl FnOnce(&dunlin_view::Snapshot) -> dunlin_view::Snapshot) {
        if let Some(process) = &mut self.members[at].process {
            process.view = Arc::new(next(&process.view));
            process.table_is_stale = true;
        }
    }

    /// From control's store, or from its log.
    pub fn take_config(&mut self, at: usize, config: ConfigState) {
        let Some(before) = self.members[at].view().map(|view| view.config.clone()) else { return };
        if config.generation < before.generation && !self.is(Bug::OldConfig) || *before == config {
            return;
        }
        self.checks.shows_config(at, before.generation, &config);
        let now_ms = self.ctx.now_ms;
        let config = Arc::new(config);
        self.set_view(at, |view| dunlin_view::Snapshot { config: config.clone(), config_received_at_ms: Some(now_ms), ..view.clone() });
        let member = &mut self.members[at];
        if member.behind.is_some_and(|behind| before.generation < behind && config.generation >= behind) {
            member.heard_since_ms = now_ms;
        }
        if self.ctx.rng.percent(80) {
            member.kept.config = config;
        }
        self.tell_agent(at);
    }

    fn tell_agent(&mut self, at: usize) {
        let ignores = self.is(Bug::IgnoreTombstones);
        let member = &self.members[at];
        let Some(view) = member.view().map(|view| member.assigned(&view.config, ignores)) else { return };
        let life = member.agent.life;
        self.ctx.after(0, Happening::Heard { host: at, life, input: Box::new(Heard::View(view)) });
    }

    fn read_config(&mut self, at: usize) {
        let Some(process) = &mut self.members[at].process else { return };
        if !std::mem::take(&mut process.config_is_news) || at == CONTROL && self.restored.is_none() {
            return;
        }
        let log = process.node.catalogue().log(self.config.origin);
        if let Some(config) = log.and_then(|log| rows::config(log.rows())) {
            self.take_config(at, config);
        }
    }

    // ---- gossip

    pub fn handle(&mut self, at: usize, input: Input) {
        let now = self.members[at].now(self.ctx.now_ms);
        let (own, config) = (self.members[at].identity.origin, self.config.origin);
        let written: &[OriginId] = if self.controls(at) { &[own, config] } else { &[own] };
        let Some(process) = &mut self.members[at].process else { return };
        self.ctx.happened += 1;
        let node = &mut process.node;
        let digest = |node: &Node, origin| node.catalogue().log(origin).map(|log| log.head.is.digest);
        let before: Vec<_> = written.iter().map(|origin| digest(node, *origin)).collect();
        let is_foreign = matches!(input, Input::Datagram { .. } | Input::Stream { .. });
        let outputs = node.handle(input, now);
        // It writes when its owner says something, when time or the last answer lets it speak, and when a chain of beats has
        // ended, which changes no row. What it merely takes from others is not its truth.
        let begins = outputs.iter().any(|output| matches!(output, Output::Event(Event::Speaking { .. })));
        for (origin, before) in written.iter().zip(before) {
            let writes = !is_foreign || begins || before == digest(node, *origin);
            let is_of_this_life = |log: &&Log| *origin == config || log.head.is.life == node.me().life;
            if let Some(log) = node.catalogue().log(*origin).filter(is_of_this_life).filter(|_| writes) {
                self.checks.signs(log);
            }
        }
        let mut told = BTreeSet::new();
        for output in outputs {
            match output {
                Output::Datagram { to, bytes } => self.send(at, &to, false, bytes),
                Output::Stream { to, bytes } => self.send(at, &to, true, bytes),
                Output::Changed { origin, whole, rows, .. } => {
                    told.insert(origin);
                    self.changed(at, origin, whole, &rows);
                }
                Output::Event(event) => self.event(at, &event),
            }
        }
        for origin in told {
            let Some(process) = &self.members[at].process else { return };
            if let Some(log) = process.node.catalogue().log(origin) {
                self.checks.holds(at, log);
            }
        }
        self.read_config(at);
    }

    fn changed(&mut self, at: usize, origin: OriginId, whole: bool, rows: &[Row]) {
        let foreign = self.is(Bug::ForeignFacts);
        let host = self.members.iter().find(|member| member.identity.origin == origin).map(|member| member.identity.host.clone());
        let Some(process) = &mut self.members[at].process else { return };
        if origin == self.config.origin {
            process.config_is_news = true;
        } else if let Some(host) = host.filter(|_| origin != process.node.me().id) {
            let facts = rows::read(&host, whole, rows, foreign);
            self.fold(at, facts);
        }
    }

    fn fold(&mut self, at: usize, facts: HostFacts) {
        let Some(before) = self.members[at].view().cloned() else { return };
        let ids: Vec<_> = facts.machines.iter().map(|fact| fact.id.clone()).collect();
        let (host, speaks) = (facts.host.clone(), facts.said.is_some());
        let (view, _) = before.with_facts(vec![facts]);
        for id in ids {
            let Some(fact) = view.machines.get(&id) else { continue };
            if before.machines.get(&id).is_none_or(|held| !Arc::ptr_eq(held, fact)) {
                self.checks.shows(at, fact);
            }
        }
        if let Some(fact) = view.hosts.get(&host).filter(|_| speaks) {
            self.checks.shows_host(at, fact);
        }
        self.set_view(at, |_| view);
    }

    fn event(&mut self, at: usize, event: &Event) {
        match event {
            Event::MemberUp(peer) => self.ctx.tell(|| format!("h{at}: {:?} is up", peer.addr.as_bytes())),
            Event::MemberDown(peer) => self.ctx.tell(|| format!("h{at}: {:?} is down", peer.addr.as_bytes())),
            Event::DuplicateIdentity { .. } | Event::Superseded { .. } => self.silenced(at),
            Event::Refused { origin, why } => {
                let origin = *origin;
                self.checks.fail(|| format!("h{at} may not publish {origin:?}: {why}"));
            }
            other => self.ctx.tell(|| format!("h{at}: {other:?}")),
        }
    }

    fn send(&mut self, from: usize, to: &Addr, is_stream: bool, bytes: Vec<u8>) {
        let to = usize::from(to.as_bytes()[0]);
        let bytes = if from == LIAR { self.liar.lie(&mut self.ctx.rng, bytes) } else { bytes };
        if to < self.members.len() && !bytes.is_empty() {
            let far = self.is_far(from, to);
            self.network.send(&mut self.ctx.rng, self.ctx.now_ms, Message { from, to, is_stream, bytes }, far);
        }
    }

    pub fn is_far(&self, from: usize, to: usize) -> bool {
        self.members[from].identity.region != self.members[to].identity.region
    }

    /// Whoever writes desired state from now on is above whoever did.
    pub fn certify_control_again(&mut self) {
        self.config = identity(&self.cluster, "config/0", CONFIG, self.config.certificate.epoch + 1);
    }

    /// The same host and disk, with keys that nobody else has.
    pub fn certify_again(&mut self, at: usize) {
        let epoch = self.members[at].identity.certificate.epoch + 1;
        self.members[at].identity = identity(&self.cluster, &format!("host/h{at}"), at, epoch);
    }

    /// A host joins anew: its keys were on the disk that is gone.
    pub fn certify_anew(&mut self, at: usize) {
        self.certify_again(at);
        self.members[at].kept = Kept::default();
    }
}

pub fn freshness(age_ms: Option<u64>) -> Freshness {
    match age_ms {
        Some(age_ms) if age_ms < FRESH_MS => Freshness::Fresh,
        Some(age_ms) if age_ms < AGING_MS => Freshness::Aging,
        _ => Freshness::Old,
    }
}

fn identity(cluster: &SigningKey, name: &str, at: usize, epoch: u32) -> Identity {
    let key = SigningKey::from_bytes(&[10 + at as u8 + 20 * (epoch as u8 - 1); 32]);
    let region = REGIONS[at % REGIONS.len()];
    let (of, in_region) = (Name::new(name).expect("short"), Region::new(region).expect("short"));
    let subject = Subject { name: of, epoch, key: key.verifying_key(), region: in_region, scope: Scope::Global };
    let certificate = Certificate::issue(cluster, &subject);
    let host = name.rsplit('/').next().expect("a name").parse().expect("a host's name");
    Identity { host, origin: certificate.id, key, certificate, region }
}

fn addr(at: usize) -> Addr {
    Addr::new([at as u8]).expect("short")
}

fn seed_peer(of: &Identity, at: usize) -> Peer {
    Peer { id: of.origin, region: Region::new(of.region).expect("short"), addr: addr(at), life: 0, started_ms: 0, renewed: 0 }
}
