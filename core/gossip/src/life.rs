//! One identity, one life.
//!
//! ```text
//! start --> asking: three peers say how far they have heard this host --> speaking, above the highest of it
//!             |  a peer finds that an older life still answers, and shows its proof
//!             +--------------------------------------------------------> silent, until the process is ended
//! speaking --> asking again, when somebody else has written above
//! any      --> silent, when the identity goes on in a newer epoch elsewhere
//! ```
//! So a disk that was rolled back does not quarantine its own host, and a clone of a living host says nothing.

use crate::catalogue::MAX_ORIGINS;
use crate::head::alive;
use crate::id::{Addr, Life, OriginId, Peer};
use crate::message::{Alive, Batch, MAX_OWN, Message, Recovered};
use crate::node::{Event, Node};
use crate::planted::planted;
use std::collections::{BTreeMap, BTreeSet};

const ASKED: usize = 3;
const ASK_MS: u64 = 500;
/// Whoever has not answered by then is not waited for: a host whose peers are all gone must not be silent for ever. If
/// some come back later, the gap and the chance below keep lives apart, and what they know of it makes it ask again.
const PATIENCE_MS: u64 = 5_000;
/// What an earlier life may have published that none of the three has heard.
const GAP: u64 = 1 << 20;
/// Each life begins somewhere else in 2^40 above that: of two lives that did not know each other none takes a sequence
/// that the other took, or readers would see a fork. Sequences cost nothing; 2^23 starts fit.
const LIFE_SHIFT: u32 = 24;
/// How long an older life has to answer.
const PROBE_MS: u64 = 1_000;
/// Earlier lives of one identity that are remembered.
const MAX_LIVES: usize = 4;
/// Open at once for one peer that asks. It is not answered meanwhile, and asks again.
const MAX_PROBES_A_PEER: usize = 4;

/// Whether this process may publish.
pub(crate) struct Own {
    state: State,
    nonce: u64,
    highest: BTreeMap<OriginId, u64>,
}

enum State {
    Asking { since_ms: u64, next_ms: u64, answered: BTreeSet<Addr> },
    Speaking,
    Silenced,
}

impl Own {
    pub fn begin(nonce: u64, now_ms: u64) -> Self {
        Self { state: State::asking(now_ms), nonce, highest: BTreeMap::new() }
    }

    pub fn is_silenced(&self) -> bool {
        matches!(self.state, State::Silenced)
    }

    /// Another log is this process's to write, and nobody was asked about it: those that were have to be asked again.
    pub fn ask_again(&mut self, nonce: impl FnOnce() -> u64, now_ms: u64) {
        match &mut self.state {
            State::Asking { since_ms, next_ms, .. } if *next_ms <= *since_ms => return, // nobody was asked yet
            State::Asking { next_ms, answered, .. } => {
                answered.clear();
                *next_ms = now_ms;
            }
            State::Speaking => self.state = State::asking(now_ms),
            State::Silenced => return,
        }
        self.nonce = nonce();
    }

    /// The sequence above which this life begins.
    pub fn base(&self, origin: OriginId, life: Life) -> u64 {
        let highest = self.highest.get(&origin).copied().unwrap_or_default();
        if planted!(NoGap) { highest } else { highest + GAP + (life >> LIFE_SHIFT) }
    }

    pub fn next_ms(&self) -> u64 {
        match &self.state {
            State::Asking { next_ms, .. } => *next_ms,
            State::Speaking | State::Silenced => u64::MAX,
        }
    }
}

impl State {
    fn asking(now_ms: u64) -> Self {
        Self::Asking { since_ms: now_ms, next_ms: now_ms, answered: BTreeSet::new() }
    }
}

/// What this host knows of the lives of others.
#[derive(Default)]
pub(crate) struct Lives {
    known: BTreeMap<OriginId, Vec<Peer>>,
    probes: Vec<Probe>,
}

/// Somebody asks to speak, and older lives of it are asked whether they answer.
struct Probe {
    from: Addr,
    of: Peer,
    nonce: u64,
    origins: Vec<OriginId>,
    until_ms: u64,
}

impl Lives {
    pub fn next_ms(&self) -> u64 {
        self.probes.iter().map(|probe| probe.until_ms).min().unwrap_or(u64::MAX)
    }

    fn accept(&mut self, peer: Peer) {
        if self.known.len() >= MAX_ORIGINS && !self.known.contains_key(&peer.id) {
            self.known.pop_first();
        }
        let lives = self.known.entry(peer.id).or_default();
        lives.retain(|known| known.life != peer.life);
        lives.push(peer);
        let surplus = lives.len().saturating_sub(MAX_LIVES);
        lives.drain(..surplus);
    }
}

impl Node {
    pub fn speaks(&self) -> bool {
        matches!(self.own.state, State::Speaking)
    }

    /// A log that nobody else writes, and that this life has begun.
    pub(crate) fn writes_alone(&self, origin: OriginId) -> bool {
        self.writers.get(&origin).is_some_and(|writer| writer.begun && !writer.foreign)
    }

    pub(crate) fn tick_own(&mut self) {
        let now_ms = self.now_ms;
        let certified = self.writers.get(&self.me.id).map(|writer| writer.certificate.epoch);
        if let Some(epoch) = self.catalogue.epoch(self.me.id).filter(|epoch| certified.is_some_and(|certified| certified < *epoch)) {
            self.own.state = State::Silenced;
            return self.event(Event::Superseded { epoch });
        }
        let State::Asking { since_ms, next_ms, answered } = &mut self.own.state else { return };
        let known = self.members.known();
        let enough = answered.len() >= ASKED.min(known.len()) || now_ms >= *since_ms + PATIENCE_MS;
        if enough || planted!(PublishAtOnce) {
            return self.speak();
        }
        if now_ms < *next_ms {
            return;
        }
        *next_ms = now_ms + ASK_MS;
        let unanswered: Vec<Addr> = known.into_iter().map(|peer| peer.addr).filter(|addr| !answered.contains(addr)).collect();
        let origins: Vec<OriginId> = self.writers.keys().copied().take(MAX_OWN).collect();
        for at in self.rng.choose(ASKED, unanswered.len()) {
            let message = Message::Recover { of: self.me.clone(), nonce: self.own.nonce, origins: origins.clone() };
            self.stream(unanswered[at].clone(), &message);
        }
    }

    /// The others have had their say.
    fn speak(&mut self) {
        self.own.state = State::Speaking;
        for origin in self.writers.keys().copied().collect::<Vec<_>>() {
            let epoch = self.writers[&origin].certificate.epoch;
            let here = self.catalogue.log(origin).filter(|log| log.head.is.epoch == epoch).map(|log| log.head.is.seq);
            if let Some(seq) = here {
                let highest = self.own.highest.entry(origin).or_default();
                *highest = seq.max(*highest);
            }
        }
        self.event(Event::Speaking { above_seq: self.own.base(self.me.id, self.me.life) });
        self.writers.keys().copied().collect::<Vec<_>>().into_iter().for_each(|origin| self.say(origin));
    }

    pub(crate) fn receive_recovered(&mut self, from: &Addr, recovered: Recovered) {
        let Recovered { id, nonce, heads } = recovered;
        let State::Asking { answered, .. } = &mut self.own.state else { return };
        if id != self.me.id || nonce != self.own.nonce {
            return;
        }
        answered.insert(from.clone());
        for (certificate, head) in heads {
            let Some(writer) = self.writers.get(&head.is.id) else { continue };
            if certificate == writer.certificate && head.verify(&certificate) {
                let highest = self.own.highest.entry(head.is.id).or_default();
                *highest = head.is.seq.max(*highest);
            }
        }
    }

    /// Somebody tells this process what is its own to say. Above what it has said, it was another life.
    pub(crate) fn receive_own(&mut self, from: &Addr, batch: Batch) {
        let head = &batch.head;
        let Some(log) = self.catalogue.log(head.is.id) else { return };
        let certificate = &self.writers[&head.is.id].certificate;
        let contradicts = log.contradicts(head).is_some();
        if contradicts || head.at() <= log.head.at() || !head.verify(certificate) {
            if let crate::Taken::Forked(fork) = self.catalogue.take(batch, self.receipt(true)) {
                self.tell_fork(&fork, Some(from));
            }
            return;
        }
        self.own.highest.insert(head.is.id, head.is.seq);
        self.own.nonce = self.rng.draw();
        self.own.state = State::asking(self.now_ms);
        self.begin_again();
    }

    pub(crate) fn receive_duplicate(&mut self, alive: Alive) {
        let Alive { certificate, life, started_ms, nonce, proof } = alive;
        let asking = matches!(self.own.state, State::Asking { .. });
        let mine = self.writers.get(&self.me.id).is_some_and(|writer| writer.certificate == certificate);
        let older = (started_ms, life) < (self.me.started_ms, self.me.life);
        if !asking || !mine || !older || nonce != self.own.nonce || planted!(IgnoreDuplicate) {
            return;
        }
        if alive::verify(&certificate.key, (life, started_ms), nonce, &proof) {
            self.own.state = State::Silenced;
            self.event(Event::DuplicateIdentity { other: life });
        }
    }

    pub(crate) fn receive_are_you_alive(&mut self, from: Addr, (id, life): (OriginId, Life), nonce: u64) {
        if id != self.me.id || life != self.me.life {
            return;
        }
        let Some(writer) = self.writers.get(&id) else { return };
        let (certificate, started_ms) = (writer.certificate.clone(), self.me.started_ms);
        let proof = alive::sign(writer.key(), (life, started_ms), nonce);
        self.stream(from, &Message::IAmAlive(Alive { certificate, life, started_ms, nonce, proof }));
    }

    // ---- for others

    pub(crate) fn receive_recover(&mut self, from: Addr, of: Peer, nonce: u64, origins: Vec<OriginId>) {
        if of.id == self.me.id || self.lives.probes.iter().any(|probe| probe.of == of && probe.nonce == nonce) {
            return;
        }
        let members = self.members.get(of.id).into_iter();
        let lives = self.lives.known.get(&of.id).into_iter().flatten().chain(members);
        let others: Vec<Peer> = lives.filter(|other| other.life != of.life && other.addr != of.addr).cloned().collect();
        if others.is_empty() || planted!(NeverProbeLives) {
            return self.accept(of, nonce, &origins);
        }
        if self.lives.probes.iter().filter(|probe| probe.from == from).count() >= MAX_PROBES_A_PEER {
            return;
        }
        for other in others {
            self.stream(other.addr, &Message::AreYouAlive { id: of.id, life: other.life, nonce });
        }
        self.lives.probes.push(Probe { from, of, nonce, origins, until_ms: self.now_ms + PROBE_MS });
    }

    pub(crate) fn receive_i_am_alive(&mut self, alive: Alive) {
        let id = alive.certificate.id;
        let is_it = |probe: &Probe| probe.of.id == id && probe.nonce == alive.nonce;
        let Some(at) = self.lives.probes.iter().position(is_it) else { return };
        let of = &self.lives.probes[at].of;
        let older = (alive.started_ms, alive.life) < (of.started_ms, of.life);
        let known = self.catalogue.epoch(id).is_none_or(|epoch| epoch <= alive.certificate.epoch);
        let proven = known && self.catalogue.admit(alive.certificate.clone())
            && alive::verify(&alive.certificate.key, (alive.life, alive.started_ms), alive.nonce, &alive.proof);
        if older && proven {
            let to = self.lives.probes.remove(at).of.addr;
            self.stream(to, &Message::Duplicate(alive));
        }
    }

    pub(crate) fn tick_lives(&mut self) {
        let now_ms = self.now_ms;
        let (due, others) = std::mem::take(&mut self.lives.probes).into_iter().partition(|probe: &Probe| probe.until_ms <= now_ms);
        self.lives.probes = others;
        due.into_iter().for_each(|Probe { of, nonce, origins, .. }| self.accept(of, nonce, &origins));
    }

    fn accept(&mut self, of: Peer, nonce: u64, origins: &[OriginId]) {
        let head = |id: &OriginId| self.catalogue.log(*id).map(|log| &log.head).or(self.catalogue.reached(*id));
        let with_certificate = |id: &OriginId| {
            let epoch = head(id)?.is.epoch;
            let of_log = self.catalogue.log(*id).map(|log| &log.certificate).or(self.catalogue.certificate(*id));
            of_log.filter(|certificate| certificate.epoch == epoch).cloned().zip(head(id).cloned())
        };
        let heads = origins.iter().filter_map(with_certificate).collect();
        let (id, to) = (of.id, of.addr.clone());
        self.lives.accept(of);
        self.stream(to, &Message::Recovered(Recovered { id, nonce, heads }));
    }
}
