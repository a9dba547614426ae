//! All logs that this host holds, what it knows about forks, and the hashes by which two hosts compare.

use crate::fresh::Receipt;
use crate::head::{Certificate, Head, Scope};
use crate::id::{OriginId, Region};
use crate::log::{Cursor, Log, Refusal};
use crate::message::{BUCKETS, Batch, Entry, Fork, Realm};
use crate::planted::planted;
use crate::row::Row;
use ed25519_dalek::VerifyingKey;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How many changes are remembered to tell a peer only what is new to it.
const REMEMBERED_CHANGES: usize = 4_096;
/// Origins in all; a cluster with more hosts than this needs another page of this design.
pub const MAX_ORIGINS: usize = 65_536;

pub struct Catalogue {
    cluster: VerifyingKey,
    /// The newest of each origin; there may be no log yet.
    certificates: BTreeMap<OriginId, Certificate>,
    logs: BTreeMap<OriginId, Log>,
    /// Of the origin's newest epoch.
    forks: BTreeMap<OriginId, Fork>,
    removed: BTreeSet<OriginId>,
    /// Heads of logs that were dropped to be fetched again: readers never go back behind them.
    reached: BTreeMap<OriginId, Head>,
    realms: BTreeMap<Realm, [u64; BUCKETS]>,
    summed: BTreeMap<OriginId, (Realm, u64)>,
    changes: VecDeque<(u64, OriginId)>,
    change: u64,
}

/// What became of a batch.
#[derive(Debug)]
pub enum Taken {
    /// The log moved on; these rows are new to readers.
    Changed { id: OriginId, rows: Vec<Row>, whole: bool },
    /// Only the chain of beats is new.
    Renewed { id: OriginId },
    Known,
    /// Something between is missing: ask for what is behind the log's sequence.
    Gap { id: OriginId },
    /// Two signed heads contradict each other. From now on this epoch is quarantined.
    Forked(Box<Fork>),
    /// No certificate is known for it.
    Stranger { id: OriginId },
    Bad { id: OriginId, why: Bad },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    Certificate,
    Signature,
    /// The rows are not those that the head signs.
    Rows,
    TooBig,
}

impl Catalogue {
    pub fn new(cluster: VerifyingKey) -> Self {
        Self {
            cluster,
            certificates: BTreeMap::new(),
            logs: BTreeMap::new(),
            forks: BTreeMap::new(),
            removed: BTreeSet::new(),
            reached: BTreeMap::new(),
            realms: BTreeMap::new(),
            summed: BTreeMap::new(),
            changes: VecDeque::new(),
            change: 0,
        }
    }

    /// Takes what can be verified. Nothing is changed before all of it is.
    pub fn take(&mut self, batch: Batch, receipt: Receipt) -> Taken {
        let Batch { certificate, head, after, rows, .. } = batch;
        let id = head.is.id;
        if certificate.is_some_and(|certificate| certificate.id != id || !self.admit(certificate)) {
            return Taken::Bad { id, why: Bad::Certificate };
        }
        let Some(certificate) = self.certificates.get(&id) else { return Taken::Stranger { id } };
        if head.is.epoch > certificate.epoch {
            return Taken::Stranger { id };
        }
        if self.removed.contains(&id) || (head.is.epoch < certificate.epoch && !planted!(OldEpoch)) || self.fork(id).is_some() {
            return Taken::Known;
        }
        if self.reached(id).is_some_and(|least| least.is.epoch == head.is.epoch && head.at() < least.at()) && !planted!(GoBack) {
            return Taken::Known;
        }
        let certificate = certificate.clone();
        let log = self.logs.get_mut(&id).filter(|log| log.head.is.epoch == head.is.epoch);
        if let Some(log) = &log {
            let contradiction = log.contradicts(&head).cloned();
            if contradiction.is_none() && head.at() <= log.head.at() && !planted!(GoBack) {
                return Taken::Known;
            }
            if let Some(other) = contradiction {
                return self.found_contradiction(certificate, [other, head]);
            }
        }
        let is_taken_as_sound = [planted!(TrustHeads), planted!(OldEpoch), head.verify(&certificate)];
        if !is_taken_as_sound.contains(&true) {
            return Taken::Bad { id, why: Bad::Signature };
        }
        let taken = match log {
            Some(log) if log.head.is.seq == head.is.seq => {
                log.follow(head, receipt);
                Ok((vec![], None))
            }
            Some(log) => log.check(&head, &after, rows).map(|change| (log.swap(head, change, receipt), Some(after == Cursor::START))),
            // What is not the whole cannot begin a log.
            None if after != Cursor::START => Err(Refusal::Gap),
            None => Log::begin(certificate, head, rows, receipt).map(|log| {
                let rows = log.rows().cloned().collect();
                self.logs.insert(id, log);
                (rows, Some(true))
            }),
        };
        match taken {
            Ok((rows, whole)) => {
                self.reached.remove(&id);
                self.note(id);
                whole.map_or(Taken::Renewed { id }, |whole| Taken::Changed { id, rows, whole })
            }
            Err(Refusal::Gap) => Taken::Gap { id },
            Err(Refusal::Mismatch) => Taken::Bad { id, why: Bad::Rows },
            Err(Refusal::TooBig) => Taken::Bad { id, why: Bad::TooBig },
        }
    }

    fn found_contradiction(&mut self, certificate: Certificate, heads: [Head; 2]) -> Taken {
        let id = certificate.id;
        if !heads.iter().all(|head| head.verify(&certificate)) {
            return Taken::Bad { id, why: Bad::Signature };
        }
        let fork = Fork { certificate, heads };
        self.quarantine(fork.clone());
        Taken::Forked(Box::new(fork))
    }

    /// Evidence that somebody else has found; whether it was news.
    pub fn take_fork(&mut self, fork: Fork) -> Result<bool, Bad> {
        let [one, other] = &fork.heads;
        let contradict = one.is.seq == other.is.seq && one.is.digest != other.is.digest;
        let (id, epoch) = (fork.certificate.id, fork.certificate.epoch);
        if self.fork(id).is_some_and(|known| known.certificate.epoch >= epoch) || self.epoch(id).is_some_and(|known| known > epoch) {
            return Ok(false);
        }
        if !contradict || !fork.heads.iter().all(|head| head.verify(&fork.certificate)) {
            return Err(Bad::Signature);
        }
        if !self.admit(fork.certificate.clone()) {
            return Err(Bad::Certificate);
        }
        self.quarantine(fork);
        Ok(true)
    }

    fn quarantine(&mut self, mut fork: Fork) {
        let id = fork.certificate.id;
        // Of what came with it only the key was compared.
        if let Some(known) = self.certificates.get(&id) {
            fork.certificate = known.clone();
        }
        self.forks.insert(id, fork);
        self.note(id);
    }

    /// Whether the certificate is the cluster's. A newer epoch ends the quarantine of the one before.
    pub fn admit(&mut self, certificate: Certificate) -> bool {
        let id = certificate.id;
        if let Some(known) = self.certificates.get(&id) {
            if known.name != certificate.name {
                return false;
            }
            if known.epoch >= certificate.epoch {
                // Of one epoch there is one key; an older certificate is no reason to refuse what comes with it.
                return known.epoch > certificate.epoch || known.key == certificate.key;
            }
        }
        let room = self.certificates.len() < MAX_ORIGINS || self.certificates.contains_key(&id);
        if !room || !(certificate.verify(&self.cluster) || planted!(TrustCertificates)) {
            return false;
        }
        self.certificates.insert(id, certificate);
        if self.forks.remove(&id).is_some() {
            self.note(id);
        }
        true
    }

    /// Of the origin's newest epoch, if it is quarantined.
    pub fn fork(&self, id: OriginId) -> Option<&Fork> {
        self.forks.get(&id)
    }

    pub fn epoch(&self, id: OriginId) -> Option<u32> {
        self.certificates.get(&id).map(|certificate| certificate.epoch)
    }

    pub fn certificate(&self, id: OriginId) -> Option<&Certificate> {
        self.certificates.get(&id)
    }

    pub fn log(&self, id: OriginId) -> Option<&Log> {
        self.logs.get(&id)
    }

    pub(crate) fn log_mut(&mut self, id: OriginId) -> Option<&mut Log> {
        self.logs.get_mut(&id)
    }

    pub fn logs(&self) -> impl Iterator<Item = &Log> {
        self.logs.values()
    }

    /// What came from a snapshot is silent from now on, not since some other process's zero.
    pub(crate) fn begin_ages(&mut self, now_ms: u64) {
        self.logs.values_mut().for_each(|log| log.fresh.newer_at_ms = now_ms);
    }

    /// The log behind `id`, round and round.
    pub(crate) fn next_log(&self, id: OriginId) -> Option<&Log> {
        let behind = self.logs.range((std::ops::Bound::Excluded(id), std::ops::Bound::Unbounded)).next();
        behind.or_else(|| self.logs.first_key_value()).map(|(_, log)| log)
    }

    pub(crate) fn removed(&self) -> impl Iterator<Item = OriginId> {
        self.removed.iter().copied()
    }

    pub fn forks(&self) -> impl Iterator<Item = &Fork> {
        self.forks.values()
    }

    /// A log of this host's own making.
    pub(crate) fn put(&mut self, log: Log) {
        let id = log.head.is.id;
        self.logs.insert(id, log);
        self.note(id);
    }

    /// Forgets a log, to fetch it again or because nobody wants it.
    pub(crate) fn drop_log(&mut self, id: OriginId) {
        self.logs.remove(&id);
        self.note(id);
    }

    /// Forgets a log whose memory has failed, but not how far it was.
    pub(crate) fn drop_unsound(&mut self, id: OriginId) {
        if let Some(log) = self.logs.get(&id) {
            self.reached.insert(id, log.head.clone());
        }
        self.drop_log(id);
    }

    /// The newest head that this host has taken of a log whose rows it no longer has.
    pub(crate) fn reached(&self, id: OriginId) -> Option<&Head> {
        self.reached.get(&id)
    }

    fn far<'a>(&'a self, region: &'a Region) -> impl Iterator<Item = &'a Log> {
        self.logs.values().filter(|log| log.certificate.scope == Scope::Region && log.certificate.region != *region)
    }

    /// Regions other than that, of which there is detail.
    pub(crate) fn far_regions(&self, region: &Region) -> BTreeSet<Region> {
        self.far(region).map(|log| log.certificate.region.clone()).collect()
    }

    /// Detail of other regions is fetched again when it is used.
    pub(crate) fn drop_far(&mut self, region: &Region) {
        let far: Vec<OriginId> = self.far(region).map(|log| log.head.is.id).collect();
        far.into_iter().for_each(|id| self.drop_log(id));
    }

    /// The origin is gone for good, by an order from outside: names are never used again.
    pub(crate) fn remove(&mut self, id: OriginId) {
        self.removed.insert(id);
        self.drop_log(id);
    }

    pub fn entry(&self, id: OriginId) -> Option<Entry> {
        if self.removed.contains(&id) {
            return None;
        }
        if let Some(fork) = self.forks.get(&id) {
            let epoch = fork.certificate.epoch;
            return Some(Entry { id, epoch, forked: true, seq: 0, chain: 0, tag: 0 });
        }
        let head = &self.logs.get(&id)?.head;
        let tag = u32::from_le_bytes(head.is.digest[..4].try_into().expect("a digest has 32 bytes"));
        Some(Entry { id, epoch: head.is.epoch, forked: false, seq: head.is.seq, chain: head.is.chain, tag })
    }

    pub fn realm_of(&self, id: OriginId) -> Option<Realm> {
        self.certificates.get(&id).map(|certificate| match certificate.scope {
            Scope::Global => Realm::Global,
            Scope::Region => Realm::Region(certificate.region.clone()),
        })
    }

    pub fn entries(&self, realm: &Realm, bucket: u8) -> impl Iterator<Item = Entry> {
        let (low, high) = ([bucket, 0, 0, 0, 0, 0, 0, 0], [bucket, 255, 255, 255, 255, 255, 255, 255]);
        let in_bucket = self.summed.range(OriginId(low)..=OriginId(high));
        in_bucket.filter(move |(_, (of, _))| of == realm).filter_map(|(id, _)| self.entry(*id))
    }

    /// A hint, not a proof: who lies about it only keeps himself behind.
    pub fn root(&self, realm: &Realm) -> u64 {
        self.realms.get(realm).map_or(0, |buckets| buckets.iter().fold(0, |sum, bucket| mix(sum ^ *bucket)))
    }

    pub fn buckets(&self, realm: &Realm) -> Vec<u32> {
        self.realms.get(realm).map_or(vec![0; BUCKETS], |buckets| buckets.iter().map(|bucket| mix(*bucket) as u32).collect())
    }

    pub fn change(&self) -> u64 {
        self.change
    }

    /// What has changed in `realm` after `change`, each origin once; None when that is too long ago.
    pub fn changed_since(&self, realm: &Realm, change: u64) -> Option<Vec<Entry>> {
        if self.changes.front().is_some_and(|(first, _)| *first > change + 1) {
            return None;
        }
        let newer = self.changes.iter().rev().take_while(|(at, _)| *at > change);
        let ids: BTreeSet<OriginId> = newer.map(|(_, id)| *id).collect();
        let in_realm = ids.into_iter().filter(|id| self.realm_of(*id).as_ref() == Some(realm));
        Some(in_realm.filter_map(|id| self.entry(id)).collect())
    }

    /// Brings the sums in line with an origin that has changed.
    pub(crate) fn note(&mut self, id: OriginId) {
        if let Some((realm, hash)) = self.summed.remove(&id) {
            let bucket = &mut self.realms.entry(realm).or_insert([0; BUCKETS])[id.bucket()];
            *bucket = bucket.wrapping_sub(hash);
        }
        if let (Some(entry), Some(realm)) = (self.entry(id), self.realm_of(id)) {
            let hash = hash(&entry);
            let bucket = &mut self.realms.entry(realm.clone()).or_insert([0; BUCKETS])[id.bucket()];
            *bucket = bucket.wrapping_add(hash);
            self.summed.insert(id, (realm, hash));
        }
        self.change += 1;
        self.changes.push_back((self.change, id));
        if self.changes.len() > REMEMBERED_CHANGES {
            self.changes.pop_front();
        }
    }

    /// Origins of a region that this host holds.
    pub fn of_region(&self, region: &Region) -> impl Iterator<Item = &Log> {
        self.logs.values().filter(move |log| log.certificate.scope == Scope::Region && log.certificate.region == *region)
    }
}

fn hash(entry: &Entry) -> u64 {
    let words = [u64::from_le_bytes(entry.id.0), u64::from(entry.epoch) << 1 | u64::from(entry.forked), entry.seq];
    let words = words.into_iter().chain([u64::from(entry.chain) << 32 | u64::from(entry.tag)]);
    words.fold(0x51_7c_c1_b7_27_22_0a_95, |sum, word| mix(sum ^ word))
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
