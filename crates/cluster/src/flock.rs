//! The driver of gossip: a task that owns the node, gives it what comes, sends what it says, and keeps the view.
//!
//! ```text
//! links --datagrams, messages--> Node --> links
//!  view --own facts, config---->  |  --> facts of others, config, how lately each was heard --> view
//!                                 |  --> what regions have, see `region`
//!                                 +--> snapshot on disk
//! ```

mod keep;
mod region;

use crate::authority::{CONFIG_LOG, log_name, machines_log_name};
use crate::cluster::Shared;
use crate::config_rows;
use crate::facts::{Published, SCHEMA, Skipped};
use crate::link::{Arrival, Expect, Links, Packet, Target, count};
use crate::live::{News, View};
use crate::member::now_ms;
use crate::status::{ComparedStatus, GossipCounts, LogScope, LogStatus, Silenced};
use crate::tls::Tls;
use dunlin_gossip::{Addr, Certificate, Event, Input, Name, Node, Now, OriginId, Output, Peer, Realm, Row};
use dunlin_model::{AppName, Generation, HostId, Region};
use dunlin_view::{ConfigState, Freshness};
use ed25519_dalek::SigningKey;
pub(crate) use keep::{Keep, forget, load};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// About a round trip between regions.
pub(crate) const HOLD_MS: u64 = 50;
/// How lately hosts were heard, and what an operator sees, is worked out this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Of what waits, in one go: then the view is swapped once.
const MAX_BATCH: usize = 64;

pub(crate) enum Command {
    SeeDetail { region: Region, app: AppName },
    PublishConfig { certificate: Box<Certificate>, key: Box<SigningKey> },
    /// This host was removed for good.
    Removed,
    Verify(oneshot::Sender<Vec<String>>),
    /// So much time has passed, says a test.
    #[cfg(test)]
    Pass(Duration),
}

/// Where a member is, by membership.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub addr: SocketAddr,
    pub region: Option<Region>,
}

/// What others ask of the driver without waiting for it.
#[derive(Default)]
pub(crate) struct Seen {
    pub members: BTreeMap<OriginId, Seat>,
    /// Names of writers, as far as they are known.
    pub names: BTreeMap<OriginId, HostId>,
    pub regions: BTreeMap<OriginId, Region>,
    pub ages_ms: BTreeMap<OriginId, Option<u64>>,
    pub logs: Vec<LogStatus>,
    pub compared: Vec<ComparedStatus>,
    pub speaks: bool,
    pub silenced: Option<Silenced>,
    pub gossip: GossipCounts,
}

pub(crate) struct Inlets {
    pub datagrams: mpsc::Receiver<Arrival>,
    pub messages: mpsc::Receiver<Arrival>,
    pub commands: mpsc::Receiver<Command>,
    pub stop: CancellationToken,
}

pub(crate) struct Driver {
    node: Node,
    links: Links,
    view: View,
    tls: Arc<Tls>,
    shared: Arc<Shared>,
    host: HostId,
    own: OriginId,
    /// The log of its machines.
    machines: OriginId,
    started: Instant,
    targets: HashMap<Addr, Target>,
    /// Hosts that were known from the beginning, by their logs.
    seeds: BTreeMap<OriginId, HostId>,
    published: Published,
    publish_at: Option<Instant>,
    /// What others have said and is not in the view yet.
    news: News,
    reports: region::Reports,
    heard: Arc<BTreeMap<HostId, Freshness>>,
    config: Config,
    removed: BTreeSet<HostId>,
    /// This host itself was.
    pub(crate) is_removed: bool,
    silenced: Option<Silenced>,
    skipped: Skipped,
    old_facts: u64,
    keep: Keep,
}

/// Desired state: read from its log, or written to it.
struct Config {
    origin: OriginId,
    /// The epoch in which this process writes it.
    writes: Option<u32>,
    published: config_rows::Published,
    reader: config_rows::Reader,
    published_generation: Generation,
    /// Of what was read last, whole.
    read: Option<Generation>,
    was_refused: bool,
    /// The log has changed since it was last read.
    is_news: bool,
}

impl Config {
    fn of(origin: OriginId) -> Self {
        Self {
            origin,
            writes: None,
            published: config_rows::Published::default(),
            reader: config_rows::Reader::default(),
            published_generation: Generation::default(),
            read: None,
            was_refused: false,
            is_news: false,
        }
    }
}

impl Driver {
    pub fn new(node: Node, links: Links, view: View, tls: Arc<Tls>, shared: Arc<Shared>, keep: Keep) -> Self {
        let host = shared.member.host.clone();
        let seeds = shared.member.peers.iter().map(|(host, _)| (OriginId::of(&log_name(host)), host.clone())).collect();
        let origin = OriginId::of(&Name::new(CONFIG_LOG).expect("it is short"));
        Self {
            own: node.me().id,
            machines: OriginId::of(&machines_log_name(&host)),
            node,
            links,
            view,
            tls,
            shared,
            started: Instant::now(),
            targets: HashMap::new(),
            seeds,
            published: Published::nothing(host.clone()),
            host,
            publish_at: None,
            news: News::default(),
            reports: region::Reports::new(Instant::now()),
            heard: Arc::default(),
            config: Config::of(origin),
            removed: BTreeSet::new(),
            is_removed: false,
            silenced: None,
            skipped: Skipped::default(),
            old_facts: 0,
            keep,
        }
    }

    /// Until it is told to stop; then it says good-bye and saves. It comes with the right to write the log of the host's machines;
    /// that to write the host's own is the node's.
    pub async fn run(mut self, (certificate, key): (Certificate, SigningKey), mut inlets: Inlets) {
        let mut own = self.view.subscribe_own();
        self.recall();
        self.handle(Input::Own { certificate: Box::new(certificate), key: Box::new(key) });
        self.follow_view();
        let mut look_at = Instant::now();
        let (mut datagrams, mut messages) = (Vec::with_capacity(MAX_BATCH), Vec::with_capacity(4));
        loop {
            let wake_at = self.started + Duration::from_millis(self.node.next_wake_ms());
            let next = [Some(wake_at), Some(look_at), self.publish_at, self.reports.due].into_iter().flatten().min().expect("two are always there");
            tokio::select! {
                () = inlets.stop.cancelled() => break,
                Some(command) = inlets.commands.recv() => self.obey(command),
                _ = own.changed() => self.follow_view(), // the sender lives in the view
                taken = inlets.messages.recv_many(&mut messages, 4) => {
                    if taken == 0 { break } // the links are gone
                    for Arrival { from, bytes } in messages.drain(..) {
                        self.handle(Input::Stream { from: addr(from), bytes });
                    }
                }
                taken = inlets.datagrams.recv_many(&mut datagrams, MAX_BATCH) => {
                    if taken == 0 { break }
                    for Arrival { from, bytes } in datagrams.drain(..) {
                        self.handle(Input::Datagram { from: addr(from), bytes });
                    }
                }
                () = tokio::time::sleep_until(next) => self.handle(Input::Tick),
            }
            let now = Instant::now();
            if self.publish_at.is_some_and(|at| at <= now) {
                self.publish_facts();
            }
            if look_at <= now {
                self.look();
                look_at = now + LOOK_EVERY;
            }
            self.tell_view();
            if self.reports.due.is_some_and(|at| at <= now) {
                self.report(now);
            }
            self.keep.save_if_due(&self.node);
        }
        self.handle(Input::Leave);
        self.keep.save_now(&self.node).await;
    }

    fn now(&self) -> Now {
        Now { ms: self.started.elapsed().as_millis() as u64, wall_ms: now_ms() }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::PublishConfig { certificate, key } => {
                let writes = (certificate.id == self.config.origin).then_some(certificate.epoch);
                self.config = Config { writes, ..Config::of(self.config.origin) };
                self.handle(Input::Own { certificate, key });
                self.publish_config();
                self.look_at_region();
            }
            Command::SeeDetail { region, app } => self.see_detail(&region, &app),
            Command::Removed => {
                self.is_removed = true;
                let config = ConfigState::clone(&self.view.current().config);
                self.take_config(config);
            }
            Command::Verify(reply) => {
                let names = self.node.verify().into_iter().map(|origin| self.name(origin));
                let _ = reply.send(names.collect()); // whoever asked may have gone away
            }
            #[cfg(test)]
            Command::Pass(time) => self.started -= time,
        }
    }

    // ---- the node

    fn handle(&mut self, input: Input) {
        let now = self.now();
        for output in self.node.handle(input, now) {
            match output {
                Output::Datagram { to, bytes } => self.send(&to, Packet::Datagram(bytes)),
                Output::Stream { to, bytes } => self.send(&to, Packet::Message(bytes)),
                Output::Changed { origin, whole, rows, .. } => self.changed(origin, whole, &rows),
                Output::Event(event) => self.event(event),
            }
        }
    }

    fn send(&self, to: &Addr, packet: Packet) {
        let target = self.targets.get(to).cloned().or_else(|| Some(Target { addr: socket_addr(to)?, expect: Expect::AnyHost }));
        match target {
            Some(target) => self.links.send(target, packet),
            None => count(&self.links.counters().dropped_out),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::MemberUp(peer) => {
                tracing::info!(host = self.name(peer.id), addr = %peer.addr, "a host is up");
                self.see_members();
            }
            Event::MemberDown(peer) => {
                tracing::info!(host = self.name(peer.id), addr = %peer.addr, "a host is down");
                self.see_members();
            }
            Event::Speaking { above_seq } => tracing::debug!(above_seq, "this host publishes from now on"),
            Event::DuplicateIdentity { .. } => self.silence(Silenced::DuplicateIdentity),
            Event::Superseded { epoch } => self.silence(Silenced::Superseded { epoch }),
            Event::Forked { origin, epoch, seq } => tracing::error!(
                log = self.name(origin), epoch, seq,
                "two signed heads of a log contradict each other: its key is in two hands; what was verified before stays in use. \
                 Remove that host, or let it join anew"
            ),
            Event::SelfCheckFailed { origin } => {
                tracing::warn!(log = self.name(origin), "memory no longer is what was signed: the log is fetched again; check this host's memory");
            }
            Event::NeedWhole { .. } => {}
            Event::Unsubscribed { region, .. } => self.dropped(&region),
            Event::Refused { origin, why } => {
                tracing::error!(log = self.name(origin), why, "this host's own publication was refused");
                self.config.was_refused |= origin == self.config.origin;
                if origin == self.own || origin == self.machines {
                    self.published = Published::nothing(self.host.clone());
                    self.publish_at = Some(Instant::now() + LOOK_EVERY);
                    self.report_anew();
                }
            }
        }
    }

    fn silence(&mut self, why: Silenced) {
        tracing::error!(host = %self.host, "this process says nothing in the cluster any more: {why}");
        self.silenced = Some(why);
        self.look();
    }

    // ---- what others say

    /// What was known when the last process ended, before anybody is heard.
    fn recall(&mut self) {
        let logs: Vec<(OriginId, Vec<Row>)> = self.node.catalogue().logs().map(|log| (log.head.is.id, log.rows().cloned().collect())).collect();
        for (origin, rows) in logs {
            self.changed(origin, true, &rows);
        }
        self.look();
        self.tell_view();
    }

    fn changed(&mut self, origin: OriginId, whole: bool, rows: &[Row]) {
        if origin == self.config.origin {
            return self.desired(whole, rows);
        }
        if origin != self.own && origin != self.machines {
            self.read_log(origin, whole, rows);
        }
    }

    /// Whoever writes it knows it, until somebody writes it in a later epoch: control that was restored elsewhere.
    fn desired(&mut self, whole: bool, rows: &[Row]) {
        let Some(own) = self.config.writes else {
            self.config.reader.take(whole, rows);
            self.config.is_news = true;
            return;
        };
        if self.node.catalogue().epoch(self.config.origin) <= Some(own) {
            return;
        }
        tracing::warn!("another process writes desired state in a later epoch; this one does not any more");
        self.config = Config::of(self.config.origin);
        let rows: Vec<Row> = self.node.catalogue().log(self.config.origin).into_iter().flat_map(|log| log.rows().cloned()).collect();
        self.config.reader.take(true, &rows);
        self.config.is_news = true;
    }

    /// All that has come, in one swap each.
    fn tell_view(&mut self) {
        let mut news = std::mem::take(&mut self.news);
        news.facts.retain(|facts| !self.removed.contains(&facts.host));
        news.reports.retain(|report| !self.removed.contains(&report.host));
        if !news.is_empty() {
            let unheard: BTreeSet<HostId> = news.facts.iter().filter(|facts| self.freshness(&facts.host) != self.heard.get(&facts.host).copied()).map(|facts| facts.host.clone()).collect();
            if !unheard.is_empty() {
                let mut heard = BTreeMap::clone(&self.heard);
                heard.extend(unheard.into_iter().filter_map(|host| self.freshness(&host).map(|freshness| (host, freshness))));
                self.heard = Arc::new(heard);
            }
            self.old_facts += self.view.fold(news, self.heard.clone()) as u64;
        }
        if std::mem::take(&mut self.config.is_news) {
            self.read_config();
        }
    }

    fn read_config(&mut self) {
        self.config.read = None;
        let Some(log) = self.node.catalogue().log(self.config.origin) else { return };
        let value = |key: &str| Some(log.get(key.as_bytes())?.body()?.value);
        let Some(config_rows::Whole { config, unreadable }) = self.config.reader.read(value) else {
            tracing::debug!("desired state is not whole yet");
            return;
        };
        if !unreadable.is_empty() {
            tracing::error!(entries = unreadable.len(), first = unreadable[0], "some of desired state cannot be read by this version: update this host");
            self.skipped.unreadable += unreadable.len() as u64;
        }
        self.config.read = Some(config.generation);
        self.take_config(config);
    }

    fn take_config(&mut self, config: ConfigState) {
        let held = self.view.current();
        let config = if self.is_removed { crate::removal::without(config, &self.host, &held) } else { config };
        if config.generation < held.config.generation || (held.config_received_at_ms.is_some() && *held.config == config) {
            return;
        }
        if let Err(error) = self.view.publish_config(config, now_ms()) {
            tracing::debug!(%error, "desired state is older than what is held");
        }
    }

    // ---- what this host says

    /// Something was said in this process: by its host, or by control.
    fn follow_view(&mut self) {
        let current = self.view.current();
        self.obey_removals(&current.config);
        self.publish_facts();
        self.publish_config();
        self.reports.touch();
    }

    fn publish_facts(&mut self) {
        let difference = self.published.difference(&self.view.current(), Instant::now());
        self.publish_at = difference.again;
        if !difference.machines.is_empty() || difference.begins {
            self.handle(Input::Publish { origin: self.machines, schema: SCHEMA, changes: difference.machines, at: None });
        }
        if !difference.host.is_empty() {
            self.handle(Input::Publish { origin: self.own, schema: SCHEMA, changes: difference.host, at: None });
        }
    }

    fn publish_config(&mut self) {
        let config = self.view.current().config.clone();
        let is_published = config.generation == self.config.published_generation;
        if self.config.writes.is_none() || is_published || config.generation == Generation::default() {
            return;
        }
        let (changes, published) = self.config.published.next(&config);
        let before = std::mem::replace(&mut self.config.published, published);
        self.config.published_generation = config.generation;
        self.handle(Input::Publish { origin: self.config.origin, schema: SCHEMA, changes, at: None });
        if std::mem::take(&mut self.config.was_refused) {
            // The next change is told from what was taken last.
            self.config.published = before;
            self.config.published_generation = Generation::default();
        }
    }

    /// By control's word, which is signed: they are gone for good.
    fn obey_removals(&mut self, config: &ConfigState) {
        let new: Vec<HostId> = config.removed_hosts.iter().filter(|host| **host != self.host && !self.removed.contains(*host)).cloned().collect();
        if new.is_empty() {
            return;
        }
        self.removed.extend(new.iter().cloned());
        self.tls.refuse(self.removed.clone());
        self.links.cut_off_removed();
        for host in new {
            tracing::info!(%host, "a host was removed from the cluster");
            self.handle(Input::Remove(OriginId::of(&log_name(&host))));
            self.handle(Input::Remove(OriginId::of(&machines_log_name(&host))));
        }
        self.view.forget_hosts(&self.removed);
        self.see_members();
    }

    // ---- what is seen

    /// How lately each host was heard; what operators see.
    fn look(&mut self) {
        self.see_members();
        let seen = self.shared.seen.load_full();
        let logs = seen.names.iter().filter(|(origin, host)| **origin != self.own && !self.removed.contains(*host));
        let class = |(origin, host): (&OriginId, &HostId)| {
            let without_log = || seen.members.contains_key(origin).then_some(Freshness::Old);
            Some((host.clone(), self.freshness(host).or_else(without_log)?))
        };
        let heard: BTreeMap<HostId, Freshness> = logs.filter_map(class).collect();
        if *self.heard != heard {
            self.heard = Arc::new(heard);
            self.view.fold(News::default(), self.heard.clone());
        }
        self.look_at_region();
        self.confirm_config();
    }

    /// Its writer lives, and has nothing newer than what is held: a copied or an old disk cannot say that by itself, nor can
    /// a host that knows no more than this one.
    fn confirm_config(&self) {
        if self.config.writes.is_some() || self.config.is_news || self.view.current().config_confirmed {
            return;
        }
        let status = self.node.status(self.config.origin).filter(|status| status.age_ms.is_some() && status.lag == 0 && !status.quarantined);
        if let Some(generation) = self.config.read.filter(|_| status.is_some()) {
            self.view.confirm_config(generation);
        }
    }

    /// Who is where, by membership.
    fn see_members(&mut self) {
        let catalogue = self.node.catalogue();
        let mut seen = Seen { silenced: self.silenced.clone(), speaks: self.node.speaks(), ..Seen::default() };
        seen.names = self.seeds.clone();
        seen.names.extend(self.links.connected().iter().map(|link| (link.origin, link.host.clone())));
        for log in catalogue.logs() {
            let (origin, name) = (log.head.is.id, &log.certificate.name);
            seen.names.extend(region::host_of(name).map(|host| (origin, host)));
            seen.regions.extend(region(&log.certificate.region).map(|region| (origin, region)));
            let Some(status) = self.node.status(origin) else { continue };
            seen.ages_ms.insert(origin, status.age_ms);
            seen.logs.push(LogStatus {
                name: name.to_string(),
                scope: region::scope_of(log, &self.node.me().region),
                region: region(&log.certificate.region),
                epoch: status.epoch,
                seq: status.seq,
                age_ms: status.age_ms,
                lag: status.lag,
                behind_ms: status.behind_ms,
                rows: status.rows,
                bytes: status.bytes,
                quarantined: status.quarantined,
            });
        }
        let seat = |peer: &Peer| Some((peer.id, Seat { addr: socket_addr(&peer.addr)?, region: region(&peer.region) }));
        seen.members = self.node.members().filter_map(seat).collect();
        let scope = |realm: &Realm| if *realm == Realm::Global { LogScope::Global } else { LogScope::Region };
        let compared = self.node.compared().into_iter();
        seen.compared = compared.map(|of| ComparedStatus { scope: scope(&of.realm), equal: of.equal, differ: of.differ, age_ms: of.age_ms }).collect();
        seen.gossip = GossipCounts { unreadable_facts: self.skipped.unreadable, foreign_facts: self.skipped.foreign, old_facts: self.old_facts, ..GossipCounts::default() };
        seen.gossip.take(self.node.counters());
        let expect = |origin: OriginId| seen.names.get(&origin).cloned().map_or(Expect::Writer(origin), Expect::Host);
        let target = |peer: &Peer| Some((peer.addr.clone(), Target { addr: socket_addr(&peer.addr)?, expect: expect(peer.id) }));
        // Members come last: where one of them is now, nobody else is.
        self.targets = self.node.peers().iter().filter_map(target).chain(self.node.members().filter_map(target)).collect();
        self.shared.seen.store(Arc::new(seen));
    }

    /// For people.
    fn name(&self, origin: OriginId) -> String {
        let certified = self.node.catalogue().certificate(origin).map(|certificate| certificate.name.to_string());
        certified.or_else(|| Some(self.seeds.get(&origin)?.to_string())).unwrap_or_else(|| format!("{origin:?}"))
    }
}

fn region(region: &dunlin_gossip::Region) -> Option<Region> {
    std::str::from_utf8(region.as_bytes()).ok()?.parse().ok()
}

pub(crate) fn addr(addr: SocketAddr) -> Addr {
    Addr::new(addr.to_string()).expect("a socket address as text is short enough")
}

fn socket_addr(addr: &Addr) -> Option<SocketAddr> {
    std::str::from_utf8(addr.as_bytes()).ok()?.parse().ok()
}
