//! Anti-entropy: every 200 ms one peer is compared with, and beats are handed on.
//!
//! ```text
//! Sync{root, recent} --> equal: Same        --> both remember that they were equal here
//!                    --> differs, few know  --> Want, Batches, Entries: what changed since they were last equal
//!                    --> differs otherwise  --> Buckets --> Entries of the buckets that differ --> Want, Batches
//! ```
//! Nobody ever sends all that it has. A lie about a root or an entry only keeps the liar behind: what is taken is signed.

use crate::beat::{BEAT_BYTES, BEAT_MS, Beat};
use crate::head::Statement;
use crate::id::{Addr, OriginId};
use crate::log::Cursor;
use crate::message::{BUCKETS, Entry, MAX_ENTRIES, Message, Realm, Root, Wanted};
use crate::node::Node;
use crate::planted::planted;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub const SYNC_MS: u64 = 200;
/// One round in so many goes to any region instead of the own one.
const FAR_EVERY: u64 = 4;
/// Recent changes that go into a datagram beside two roots and some beats.
const MAX_RECENT: usize = 12;
/// More changes than this are found by buckets.
const MAX_DELTA: usize = 256;
/// To how many peers each beat is handed on. Fewer would leave readers without two in a row too often.
const BEAT_COPIES: u8 = 4;
/// And to how many in other regions those of global logs. Apart, or a region that has used up its copies among its own would
/// leave a lone host elsewhere without.
const FAR_COPIES: u8 = 2;
const BEAT_PEERS: usize = 3;
const BEATS_A_DATAGRAM: usize = 1_150 / BEAT_BYTES;
/// Beside roots and recent entries.
const BEATS_A_SYNC: usize = 12;
const MAX_QUEUED_BEATS: usize = 4_096;
const MAX_PEERS: usize = 16_384;
/// Who was compared with longer ago says nothing of now.
const COMPARED_WITHIN_MS: u64 = 60_000;

#[derive(Default)]
pub(crate) struct Syncs {
    began_ms: u64,
    pub next_ms: u64,
    pub next_beat_ms: u64,
    round: u64,
    peers: BTreeMap<(Addr, Realm), Equal>,
    beats: VecDeque<(Beat, Copies)>,
    /// Of certified origins only, so no more than there may be of those.
    behind: BTreeMap<OriginId, Behind>,
}

/// How often a beat is still to be told.
struct Copies {
    near: u8,
    far: u8,
}

/// When this host and a peer last had the same.
#[derive(Default, Clone, Copy)]
struct Equal {
    /// The change after which it was so.
    change: Option<u64>,
    /// The delta since then was sent and did not do it.
    tried: bool,
    /// When they were last compared, and whether they had the same then.
    compared: Option<(u64, bool)>,
    equal_at_ms: Option<u64>,
}

/// How a realm is here and at those that were compared with in the last minute. While there is news on its way, hosts differ as they
/// should; one whose age grows although little changes has something else than all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    pub realm: Realm,
    /// Peers that had the same when they were last compared with.
    pub equal: usize,
    pub differ: usize,
    /// Since any peer was last found to have the same, or since this process began.
    pub age_ms: u64,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Behind {
    pub epoch: u32,
    pub seq: u64,
    pub since_ms: u64,
}

impl Syncs {
    pub fn begin(now_ms: u64) -> Self {
        Self { began_ms: now_ms, ..Self::default() }
    }

    pub fn behind(&self, origin: OriginId) -> Option<&Behind> {
        self.behind.get(&origin)
    }

    /// Who has caught up is not behind; the next time counts from its own beginning.
    pub fn reached(&mut self, origin: OriginId, at: (u32, u64)) {
        if self.behind.get(&origin).is_some_and(|behind| (behind.epoch, behind.seq) <= at) {
            self.behind.remove(&origin);
        }
    }
}

impl Node {
    pub(crate) fn tick_sync(&mut self) {
        if self.now_ms < self.syncs.next_ms {
            return;
        }
        self.syncs.next_ms = self.now_ms + self.rng.around(SYNC_MS);
        self.syncs.round += 1;
        let others = self.members.others();
        let far = others.near.is_empty() || self.syncs.round.is_multiple_of(FAR_EVERY);
        let among = if far { others.all.len() } else { others.near.len() };
        if among == 0 {
            return;
        }
        let at = self.rng.below(among);
        let peer = &others.all[if far { at } else { others.near[at] }];
        if !planted!(NoAntiEntropy) {
            let mut roots = vec![self.root(&peer.addr, Realm::Global)];
            if peer.region == self.me.region {
                roots.push(self.root(&peer.addr, Realm::Region(peer.region.clone())));
            }
            let beats = self.beats_to_tell(peer.region == self.me.region, BEATS_A_SYNC);
            self.datagram(peer.addr.clone(), &Message::Sync { roots, beats });
        }
        for at in self.rng.choose(BEAT_PEERS, others.near.len()) {
            let beats = self.beats_to_tell(true, BEATS_A_DATAGRAM);
            if !beats.is_empty() {
                self.datagram(others.all[others.near[at]].addr.clone(), &Message::Beats(beats));
            }
        }
    }

    fn root(&self, peer: &Addr, realm: Realm) -> Root {
        let root = self.catalogue.root(&realm);
        let equal = self.syncs.peers.get(&(peer.clone(), realm.clone())).and_then(|equal| equal.change);
        let delta = equal.and_then(|change| self.catalogue.changed_since(&realm, change));
        let complete = delta.as_ref().is_some_and(|delta| delta.len() <= MAX_RECENT);
        let mut recent = delta.unwrap_or_default();
        recent.truncate(MAX_RECENT);
        Root { realm, root, recent, complete }
    }

    pub(crate) fn receive_root(&mut self, from: &Addr, theirs: Root) {
        let Root { realm, root, recent, complete } = theirs;
        if !self.holds(&realm) {
            return;
        }
        let at = (from.clone(), realm.clone());
        if root == self.catalogue.root(&realm) {
            self.remember_equal(at);
            return self.datagram(from.clone(), &Message::Same { realm, root });
        }
        self.note_differs(at.clone());
        let differs = self.compare(from, &recent);
        let equal = self.syncs.peers.get(&at).copied().unwrap_or_default();
        let mine = equal.change.and_then(|change| self.catalogue.changed_since(&realm, change)).filter(|mine| mine.len() <= MAX_DELTA);
        match mine {
            Some(entries) if complete && !equal.tried && (differs || !entries.is_empty()) => {
                self.syncs.peers.insert(at, Equal { tried: true, ..equal });
                let told: BTreeSet<OriginId> = recent.iter().map(|entry| entry.id).collect();
                let entries: Vec<Entry> = entries.into_iter().filter(|entry| !told.contains(&entry.id)).collect();
                if !entries.is_empty() {
                    self.stream(from.clone(), &Message::Entries { realm, buckets: vec![], entries });
                }
            }
            _ if !planted!(NoBuckets) => {
                self.counters.buckets_sent += 1;
                let hashes = self.catalogue.buckets(&realm);
                self.stream(from.clone(), &Message::Buckets { realm, hashes });
            }
            _ => {}
        }
    }

    pub(crate) fn receive_same(&mut self, from: &Addr, realm: &Realm, root: u64) {
        if self.holds(realm) && self.catalogue.root(realm) == root {
            self.remember_equal((from.clone(), realm.clone()));
        }
    }

    /// Answers with all that it has in the buckets that differ, as far as a message goes.
    pub(crate) fn receive_buckets(&mut self, from: &Addr, realm: Realm, theirs: &[u32]) {
        if !self.holds(&realm) || theirs.len() != BUCKETS {
            return;
        }
        let ours = self.catalogue.buckets(&realm);
        let differ = (0..BUCKETS).filter(|at| ours[*at] != theirs[*at]);
        let (mut buckets, mut entries) = (vec![], vec![]);
        for bucket in differ.map(|bucket| bucket as u8) {
            let mut of_it: Vec<Entry> = self.catalogue.entries(&realm, bucket).collect();
            if entries.len() + of_it.len() > MAX_ENTRIES {
                break;
            }
            entries.append(&mut of_it);
            buckets.push(bucket);
        }
        if !buckets.is_empty() {
            self.note_differs((from.clone(), realm.clone()));
            self.stream(from.clone(), &Message::Entries { realm, buckets, entries });
        }
    }

    pub(crate) fn receive_entries(&mut self, from: &Addr, realm: &Realm, buckets: &[u8], theirs: &[Entry]) {
        if !self.holds(realm) {
            return;
        }
        if buckets.is_empty() {
            self.note_differs((from.clone(), realm.clone())); // the answer to a root that was another
        }
        self.compare(from, theirs);
        let known: BTreeSet<OriginId> = theirs.iter().map(|entry| entry.id).collect();
        let missing = |bucket: &u8| self.catalogue.entries(realm, *bucket).filter(|entry| !known.contains(&entry.id)).collect::<Vec<_>>();
        let missing: Vec<Entry> = buckets.iter().flat_map(missing).collect();
        for entry in missing {
            self.offer(from, Wanted { id: entry.id, epoch: entry.epoch, after: Cursor::START });
        }
    }

    /// Asks for what is newer there and gives what is newer here; whether there was anything.
    pub(crate) fn compare(&mut self, from: &Addr, theirs: &[Entry]) -> bool {
        let mut differs = false;
        for theirs in theirs {
            let ours = self.catalogue.entry(theirs.id);
            // A log with foreign sequences may be newer by its chain alone; a fork is found by fetching the head.
            let contradicts = ours.is_some_and(|ours| ours.at() == theirs.at() && ours.tag != theirs.tag);
            if self.is_newer(theirs) || contradicts {
                differs = true;
                let same_epoch = ours.filter(|ours| ours.epoch == theirs.epoch && !ours.forked);
                let after = same_epoch.map_or(Cursor::START, |ours| Cursor::after(ours.seq));
                self.want(from, Wanted { id: theirs.id, epoch: theirs.epoch, after });
            } else if ours.is_some_and(|ours| ours.at() > theirs.at()) {
                differs = true;
                self.offer(from, Wanted { id: theirs.id, epoch: theirs.epoch, after: Cursor::after(theirs.seq) });
            }
        }
        differs
    }

    /// A head that its writer signed is ahead of what is held. What others merely claim says nothing about an origin.
    pub(crate) fn note_behind(&mut self, is: &Statement) {
        let fresh = Behind { epoch: is.epoch, seq: is.seq, since_ms: self.now_ms };
        let behind = self.syncs.behind.entry(is.id).or_insert(fresh);
        if (is.epoch, is.seq) > (behind.epoch, behind.seq) {
            (behind.epoch, behind.seq) = (is.epoch, is.seq);
        }
    }

    fn remember_equal(&mut self, at: (Addr, Realm)) {
        let (change, now_ms) = (self.catalogue.change(), self.now_ms);
        *self.peer(at) = Equal { change: Some(change), tried: false, compared: Some((now_ms, true)), equal_at_ms: Some(now_ms) };
    }

    fn note_differs(&mut self, at: (Addr, Realm)) {
        let now_ms = self.now_ms;
        self.peer(at).compared = Some((now_ms, false));
    }

    fn peer(&mut self, at: (Addr, Realm)) -> &mut Equal {
        if self.syncs.peers.len() >= MAX_PEERS && !self.syncs.peers.contains_key(&at) {
            self.syncs.peers.pop_first();
        }
        self.syncs.peers.entry(at).or_default()
    }

    /// For operators: of each realm that somebody else holds too.
    pub fn compared(&self) -> Vec<Compared> {
        let others = self.members.others();
        let region = Realm::Region(self.me.region.clone());
        let held = [(Realm::Global, others.all.is_empty()), (region, others.near.is_empty())];
        held.into_iter().filter(|(_, is_alone)| !is_alone).map(|(realm, _)| self.compared_in(&realm)).collect()
    }

    fn compared_in(&self, realm: &Realm) -> Compared {
        let peers = || self.syncs.peers.iter().filter(|((_, of), _)| of == realm).map(|(_, equal)| equal);
        let lately = |(at_ms, _): &(u64, bool)| self.now_ms.saturating_sub(*at_ms) < COMPARED_WITHIN_MS;
        let count = |wanted: bool| peers().filter_map(|peer| peer.compared).filter(lately).filter(|(_, is_equal)| *is_equal == wanted).count();
        let since_ms = peers().filter_map(|peer| peer.equal_at_ms).max().unwrap_or(self.syncs.began_ms);
        Compared { realm: realm.clone(), equal: count(true), differ: count(false), age_ms: self.now_ms.saturating_sub(since_ms) }
    }

    fn holds(&self, realm: &Realm) -> bool {
        match realm {
            Realm::Global => true,
            Realm::Region(region) => *region == self.me.region,
        }
    }

    // ---- signs of life

    pub(crate) fn tick_beats(&mut self) {
        if self.now_ms < self.syncs.next_beat_ms {
            return;
        }
        // Evenly, with a little chance: two beats in one step of the chain are one.
        self.syncs.next_beat_ms = self.now_ms + BEAT_MS - 50 + self.rng.draw() % 100;
        if self.speaks() {
            let beats = self.own_beats();
            beats.into_iter().for_each(|beat| self.queue_beat(beat));
        }
    }

    pub(crate) fn hear(&mut self, beats: &[Beat]) {
        for beat in beats {
            let receipt = self.receipt(false);
            let Some(log) = self.catalogue.log_mut(beat.id) else { continue };
            if planted!(AnyReceiptIsFresh) {
                log.fresh.newer_at_ms = receipt.now_ms;
            }
            if log.hear(beat, receipt) {
                self.queue_beat(*beat);
            }
        }
    }

    fn queue_beat(&mut self, beat: Beat) {
        self.syncs.beats.retain(|(queued, _)| queued.id != beat.id);
        let far = if self.catalogue.realm_of(beat.id) == Some(Realm::Global) { FAR_COPIES } else { 0 };
        self.syncs.beats.push_back((beat, Copies { near: BEAT_COPIES, far }));
        if self.syncs.beats.len() > MAX_QUEUED_BEATS {
            self.syncs.beats.pop_front();
        }
    }

    /// The newest first. To other regions only what is held there.
    fn beats_to_tell(&mut self, near: bool, max: usize) -> Vec<Beat> {
        let mut told = vec![];
        self.syncs.beats.iter_mut().rev().for_each(|(beat, left)| {
            let left = if near { &mut left.near } else { &mut left.far };
            if *left > 0 && told.len() < max {
                *left -= 1;
                told.push(*beat);
            }
        });
        self.syncs.beats.retain(|(_, left)| left.near > 0 || left.far > 0);
        told
    }
}
