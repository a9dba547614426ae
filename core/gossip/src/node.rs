//! One process in the flock: what goes in, what comes out, and the order in which things are done.

use crate::beat::Beat;
use crate::catalogue::Catalogue;
use crate::clock::{Clock, Now};
use crate::fresh::Receipt;
use crate::head::Certificate;
use crate::id::{Addr, Key, Life, OriginId, Peer, Region, Topic};
use crate::life::{Lives, Own};
use crate::members::{Members, Wishes};
use crate::message::{Batch, Entry, Message, Wanted};
use crate::push::Pushes;
use crate::rng::Rng;
use crate::row::Row;
use crate::snapshot::Snapshot;
use crate::subscribe::Subscriptions;
use crate::sync::Syncs;
use crate::write::Writer;
use ed25519_dalek::{SigningKey, VerifyingKey};
use std::collections::BTreeMap;

/// Between two comparisons of memory with a digest, one origin at a time.
const CHECK_MS: u64 = 1_000;

#[derive(Debug, Clone)]
pub struct Config {
    pub cluster: VerifyingKey,
    /// For everything that is left to chance: which peers, which moments. Random in production.
    pub seed: u64,
    /// Where to begin, beside those that the snapshot names.
    pub peers: Vec<Peer>,
    /// Without it, the peers above are all there are: for simulations of very many hosts.
    pub membership: bool,
    /// About a round trip: for so long a push that came too early waits for the one before it.
    pub hold_ms: u64,
}

/// Who this process is. The life is new with every start.
pub struct Identity {
    pub certificate: Certificate,
    pub key: SigningKey,
    pub addr: Addr,
    pub life: Life,
}

/// What becomes of a snapshot's detail of other regions.
enum Far {
    Dropped,
    Kept,
}

/// What happens to a node.
#[derive(Debug)]
pub enum Input {
    Datagram { from: Addr, bytes: Vec<u8> },
    /// One message that came over a stream.
    Stream { from: Addr, bytes: Vec<u8> },
    /// The time has come that [`Node::next_wake_ms`] named.
    Tick,
    /// The first of a life is the whole truth of the origin: what it leaves out is gone.
    Publish { origin: OriginId, schema: u32, changes: Vec<Change>, at: Option<At> },
    /// Another origin is this process's to write, or an old one in a new epoch.
    Own { certificate: Box<Certificate>, key: Box<SigningKey> },
    Peers(Vec<Peer>),
    /// Somebody reads what bears on the topic in a region far away. Say so again while it is used.
    Use { region: Region, topic: Topic },
    /// By order of a signed tombstone: the origin is gone for good.
    Remove(OriginId),
    /// Says good-bye, so that nobody has to find out.
    Leave,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub key: Key,
    /// None: the key is gone.
    pub value: Option<(Topic, Vec<u8>)>,
    /// In a log with foreign sequences: the revision of the change.
    pub seq: Option<u64>,
}

/// The place of a publication in a log whose sequence is somebody else's, such as a store's revision. Everything in it must
/// be a pure function of `seq`: any process may publish it, and all must say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// The changes are all since then; 0 says that they are the whole.
    pub since: u64,
    pub seq: u64,
    /// The revision of the last deletion: tombstones are not kept.
    pub floor: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// At most [`crate::MAX_DATAGRAM_BYTES`]; may get lost.
    Datagram { to: Addr, bytes: Vec<u8> },
    /// One message, as long as [`crate::MAX_CHUNK_BYTES`] and a little; may get lost too.
    Stream { to: Addr, bytes: Vec<u8> },
    /// Verified news. With `whole`, what is not among the rows is not there any more (which orders nobody to do anything).
    Changed { origin: OriginId, epoch: u32, seq: u64, whole: bool, rows: Vec<Row> },
    Event(Event),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    MemberUp(Peer),
    MemberDown(Peer),
    /// This process publishes from now on.
    Speaking { above_seq: u64 },
    /// Another process has this identity and answers: this one stays silent until it is ended.
    DuplicateIdentity { other: Life },
    /// The cluster has certified this identity anew, elsewhere: this process stays silent.
    Superseded { epoch: u32 },
    /// Two signed heads of one sequence contradict each other; the epoch is quarantined everywhere.
    Forked { origin: OriginId, epoch: u32, seq: u64 },
    /// Memory no longer was what its head signs; the log was dropped and is fetched again.
    SelfCheckFailed { origin: OriginId },
    /// A log with foreign sequences cannot go on from `since`: give the whole.
    NeedWhole { origin: OriginId, seq: u64 },
    /// A publication was not taken.
    Refused { origin: OriginId, why: &'static str },
    /// Nobody used the detail of this region and topic for ten minutes.
    Unsubscribed { region: Region, topic: Topic },
}

/// What an operator sees of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub malformed: u64,
    pub unknown_kinds: u64,
    pub bad_certificates: u64,
    pub bad_signatures: u64,
    /// Batches whose rows were not those that their head signs.
    pub bad_rows: u64,
    pub too_big: u64,
    /// Rows that are relayed but whose body this version does not read.
    pub unread_rows: u64,
    pub dropped_pushes: u64,
    pub dropped_held: u64,
    pub dropped_stages: u64,
    pub buckets_sent: u64,
    pub self_checks: u64,
}

/// One origin as readers judge it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub origin: OriginId,
    pub epoch: u32,
    pub seq: u64,
    /// Since something strictly newer was heard of it; None until a live head or beat has covered it.
    pub age_ms: Option<u64>,
    /// By how much a head that its writer signed is ahead of this, and for how long that has been so.
    pub lag: u64,
    pub behind_ms: u64,
    pub quarantined: bool,
    pub rows: usize,
    pub bytes: usize,
}

pub struct Node {
    pub(crate) config: Config,
    pub(crate) me: Peer,
    pub(crate) rng: Rng,
    pub(crate) now_ms: u64,
    clock: Clock,
    /// What this host signs with; see [`Self::receipt`].
    pub(crate) clock_ms: u64,
    wall_ms: u64,
    pub(crate) catalogue: Catalogue,
    pub(crate) writers: BTreeMap<OriginId, Writer>,
    pub(crate) members: Members,
    pub(crate) own: Own,
    pub(crate) lives: Lives,
    pub(crate) pushes: Pushes,
    pub(crate) syncs: Syncs,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) counters: Counters,
    pub(crate) wants: BTreeMap<Addr, Vec<Wanted>>,
    pub(crate) gives: BTreeMap<Addr, Vec<Batch>>,
    next_check_ms: u64,
    checked: OriginId,
    out: Vec<Output>,
}

impl Node {
    /// Begins from a snapshot, or from nothing. Is silent until peers have said how far they have heard it. Detail of other regions
    /// is fetched again when it is used.
    pub fn new(config: Config, identity: Identity, snapshot: Option<Snapshot>, now: Now) -> Self {
        Self::begin(config, identity, snapshot, now, Far::Dropped)
    }

    /// The same for who plans over all regions: what one said last is known, also while none of its hosts is there to be asked. It
    /// counts as used now.
    pub fn keeping_far(config: Config, identity: Identity, snapshot: Option<Snapshot>, now: Now) -> Self {
        Self::begin(config, identity, snapshot, now, Far::Kept)
    }

    fn begin(config: Config, identity: Identity, snapshot: Option<Snapshot>, now: Now, far: Far) -> Self {
        let Identity { certificate, key, addr, life } = identity;
        let mut rng = Rng::new(config.seed);
        let mut snapshot = snapshot.unwrap_or_else(|| Snapshot::empty(config.cluster));
        let mut clock = Clock::start(snapshot.clock_ms, now);
        let clock_ms = clock.read(now);
        let (id, region) = (certificate.id, certificate.region.clone());
        let mut subscriptions = Subscriptions::default();
        match far {
            Far::Dropped => snapshot.catalogue.drop_far(&region),
            Far::Kept => subscriptions.use_all(snapshot.catalogue.far_regions(&region), now.ms),
        }
        let me = Peer { id, region, addr, life, started_ms: clock_ms, renewed: 0 };
        let mut peers = config.peers.clone();
        peers.extend(snapshot.peers);
        let mut members = Members::new(me.clone(), vec![], Rng::new(rng.draw()));
        snapshot.catalogue.removed().for_each(|id| members.remove(id));
        members.save(peers);
        snapshot.catalogue.begin_ages(now.ms);
        let mut node = Self {
            own: Own::begin(rng.draw(), now.ms),
            config,
            me,
            rng,
            now_ms: now.ms,
            clock,
            clock_ms,
            wall_ms: now.wall_ms,
            catalogue: snapshot.catalogue,
            writers: BTreeMap::new(),
            members,
            lives: Lives::default(),
            pushes: Pushes::default(),
            syncs: Syncs::begin(now.ms),
            subscriptions,
            counters: Counters::default(),
            wants: BTreeMap::new(),
            gives: BTreeMap::new(),
            next_check_ms: now.ms + CHECK_MS,
            checked: OriginId([0; 8]),
            out: vec![],
        };
        node.own(certificate, key);
        node
    }

    /// The whole of it: an input and the time go in, outputs come out.
    pub fn handle(&mut self, input: Input, now: Now) -> Vec<Output> {
        self.now_ms = now.ms.max(self.now_ms);
        self.clock_ms = self.clock.read(now);
        self.wall_ms = now.wall_ms;
        match input {
            Input::Datagram { from, bytes } | Input::Stream { from, bytes } => self.receive(from, &bytes),
            Input::Tick => {}
            Input::Publish { origin, schema, changes, at } => self.publish(origin, schema, changes, at),
            Input::Own { certificate, key } => self.own(*certificate, *key),
            Input::Peers(peers) => self.members.save(peers),
            Input::Use { region, topic } => self.use_detail(region, topic),
            Input::Remove(origin) => {
                self.catalogue.remove(origin);
                self.members.remove(origin);
            }
            Input::Leave => {
                let wishes = self.members.leave(self.now_ms);
                self.grant(wishes);
            }
        }
        self.tick();
        self.flush();
        std::mem::take(&mut self.out)
    }

    /// When [`Input::Tick`] is due, if nothing comes before.
    pub fn next_wake_ms(&self) -> u64 {
        let members = if self.takes_part() { self.members.next_wake_ms() } else { u64::MAX };
        let others = [self.syncs.next_ms, self.syncs.next_beat_ms, self.next_check_ms, self.own.next_ms(), members];
        let others = others.into_iter().chain([self.pushes_next_ms(), self.subscriptions.next_ms, self.lives.next_ms()]);
        others.min().unwrap_or(u64::MAX).max(self.now_ms + 1)
    }

    pub fn me(&self) -> &Peer {
        &self.me
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The members that answer, without this one.
    pub fn members(&self) -> impl Iterator<Item = &Peer> {
        self.members.active()
    }

    /// Everybody of whom this process knows where they are, whether they answer or not.
    pub fn peers(&self) -> Vec<Peer> {
        self.members.known()
    }

    /// To be kept on disk: who to ask after the next start, and what readers know meanwhile.
    pub fn snapshot(&self) -> Vec<u8> {
        crate::snapshot::encode(self.clock_ms, &self.members.known(), &self.catalogue)
    }

    pub fn status(&self, origin: OriginId) -> Option<Status> {
        let log = self.catalogue.log(origin)?;
        let is = &log.head.is;
        let behind = self.syncs.behind(origin).filter(|behind| (behind.epoch, behind.seq) > (is.epoch, is.seq));
        let mine = self.writers.contains_key(&origin) && self.speaks();
        let age_ms = if mine { Some(0) } else { log.fresh.confirmed.then(|| self.now_ms.saturating_sub(log.fresh.newer_at_ms)) };
        Some(Status {
            origin,
            epoch: is.epoch,
            seq: is.seq,
            age_ms,
            lag: behind.map_or(0, |behind| behind.seq.saturating_sub(is.seq).max(1)),
            behind_ms: behind.map_or(0, |behind| self.now_ms.saturating_sub(behind.since_ms)),
            quarantined: self.catalogue.fork(origin).is_some(),
            rows: log.len(),
            bytes: log.bytes(),
        })
    }

    /// Compares all that is held with what was signed; gives what is not sound.
    pub fn verify(&self) -> Vec<OriginId> {
        self.catalogue.logs().filter(|log| !log.is_sound()).map(|log| log.head.is.id).collect()
    }

    /// Memory that fails, for the simulator; whether there was anything to flip.
    #[cfg(feature = "planted")]
    pub fn flip_memory(&mut self, origin: OriginId) -> bool {
        self.catalogue.log_mut(origin).is_some_and(crate::Log::flip_memory)
    }

    /// The hosts that speak for a region: the same three for all who see the same members. Only those that the cluster has
    /// certified for it, whatever members say of themselves.
    pub fn reporters(&self, region: &Region) -> Vec<OriginId> {
        let me = std::iter::once(&self.me).filter(|_| self.speaks());
        let there = self.members.active().chain(me).filter(|peer| peer.region == *region).map(|peer| peer.id);
        let is_certified = |id: &OriginId| self.catalogue.certificate(*id).is_some_and(|certificate| certificate.region == *region);
        let mut ids: Vec<OriginId> = there.filter(is_certified).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.truncate(3);
        ids
    }

    // ---- one input

    fn receive(&mut self, from: Addr, bytes: &[u8]) {
        if self.own.is_silenced() {
            return;
        }
        match Message::decode(bytes) {
            Ok(Some(message)) => self.dispatch(from, message),
            Ok(None) => self.counters.unknown_kinds += 1,
            Err(_) => self.counters.malformed += 1,
        }
    }

    fn dispatch(&mut self, from: Addr, message: Message) {
        match message {
            Message::Push(batches) => batches.into_iter().for_each(|batch| self.receive_push(&from, batch)),
            Message::Batches(batches) => batches.into_iter().for_each(|batch| self.receive_part(&from, batch)),
            Message::Fork(fork) => self.receive_fork(&from, *fork),
            Message::Sync { roots, beats } => {
                self.hear(&beats);
                roots.into_iter().for_each(|root| self.receive_root(&from, root));
            }
            Message::Same { realm, root } => self.receive_same(&from, &realm, root),
            Message::Beats(beats) => self.hear(&beats),
            Message::Heard(beats) => beats.iter().for_each(|beat| {
                if let Some(log) = self.catalogue.log_mut(beat.id) {
                    log.heard_before(beat);
                }
            }),
            Message::Buckets { realm, hashes } => self.receive_buckets(&from, realm, &hashes),
            Message::Entries { realm, buckets, entries } => self.receive_entries(&from, &realm, &buckets, &entries),
            Message::Want(wanted) => wanted.into_iter().for_each(|wanted| self.give(&from, wanted)),
            Message::Recover { of, nonce, origins } => self.receive_recover(from, of, nonce, origins),
            Message::Recovered(recovered) => self.receive_recovered(&from, recovered),
            Message::AreYouAlive { id, life, nonce } => self.receive_are_you_alive(from, (id, life), nonce),
            Message::IAmAlive(alive) => self.receive_i_am_alive(alive),
            Message::Duplicate(alive) => self.receive_duplicate(alive),
            Message::Subscribe { topic, entries } => self.receive_subscribe(from, topic, &entries),
            Message::Members(bytes) if self.takes_part() => {
                let (wishes, understood) = self.members.receive(&bytes, self.now_ms);
                self.counters.malformed += u64::from(!understood);
                self.grant(wishes);
            }
            Message::Members(_) => {}
        }
    }

    // ---- what time brings

    fn tick(&mut self) {
        if !self.own.is_silenced() {
            self.tick_own();
        }
        if self.own.is_silenced() {
            return;
        }
        self.tick_lives();
        if self.takes_part() {
            let wishes = self.members.tick(self.now_ms, &mut self.rng);
            self.grant(wishes);
        }
        self.tick_sync();
        self.tick_beats();
        self.tick_held();
        self.tick_subscriptions();
        self.check_one();
    }

    /// One origin at a time, so that it costs little and yet finds memory that has gone bad.
    fn check_one(&mut self) {
        if self.now_ms < self.next_check_ms {
            return;
        }
        self.next_check_ms = self.now_ms + CHECK_MS;
        let next = self.catalogue.next_log(self.checked);
        let Some(log) = next.filter(|_| !crate::planted::planted!(NoSelfCheck)) else { return };
        let origin = log.head.is.id;
        self.checked = origin;
        self.counters.self_checks += 1;
        if !log.is_sound() && !self.writers.contains_key(&origin) {
            self.catalogue.drop_unsound(origin);
            self.event(Event::SelfCheckFailed { origin });
        }
    }

    // ---- what the parts share

    pub(crate) fn grant(&mut self, wishes: Wishes) {
        for (to, bytes) in wishes.sends {
            self.datagram(to.addr, &Message::Members(bytes));
        }
        wishes.up.into_iter().for_each(|peer| self.event(Event::MemberUp(peer)));
        wishes.down.into_iter().for_each(|peer| self.event(Event::MemberDown(peer)));
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.out.push(Output::Event(event));
    }

    pub(crate) fn changed(&mut self, origin: OriginId, whole: bool, rows: Vec<Row>) {
        if let Some(log) = self.catalogue.log(origin) {
            self.counters.unread_rows += rows.iter().filter(|row| !row.is_dead() && row.body().is_none()).count() as u64;
            let (epoch, seq) = (log.head.is.epoch, log.head.is.seq);
            self.out.push(Output::Changed { origin, epoch, seq, whole, rows });
        }
    }

    /// What this host signs never goes back; others are judged by the system's clock, so that one that was far ahead for a
    /// while, and is right again, leaves the host deaf to nobody.
    pub(crate) fn receipt(&self, fetched: bool) -> Receipt {
        Receipt { now_ms: self.now_ms, clock_ms: self.clock_ms.min(self.wall_ms), fetched: fetched && !crate::planted::planted!(FetchedIsFresh) }
    }

    pub(crate) fn output(&mut self, output: Output) {
        self.out.push(output);
    }

    pub(crate) fn datagram(&mut self, to: Addr, message: &Message) {
        let bytes = message.encode();
        debug_assert!(bytes.len() <= crate::MAX_DATAGRAM_BYTES, "{message:?}");
        self.out.push(Output::Datagram { to, bytes });
    }

    pub(crate) fn stream(&mut self, to: Addr, message: &Message) {
        self.out.push(Output::Stream { to, bytes: message.encode() });
    }

    fn takes_part(&self) -> bool {
        self.config.membership && self.speaks()
    }

    fn flush(&mut self) {
        if self.own.is_silenced() {
            return;
        }
        self.flush_pushes();
        for (to, wanted) in std::mem::take(&mut self.wants) {
            self.stream(to, &Message::Want(wanted));
        }
        for (to, batches) in std::mem::take(&mut self.gives) {
            self.send_batches(to, batches);
        }
    }

    pub(crate) fn beat_of(&self, origin: OriginId) -> Option<Beat> {
        self.catalogue.log(origin)?.last_beat()
    }

    pub(crate) fn is_newer(&self, theirs: &Entry) -> bool {
        self.catalogue.entry(theirs.id).is_none_or(|ours| theirs.at() > ours.at())
    }
}
