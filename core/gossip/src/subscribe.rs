//! Detail of another region: whole logs, because a digest covers the whole, of the hosts there that have to do with a topic.
//!
//! Who reads it asks some host there every two seconds, and hears of changes in between. After ten idle minutes it is dropped.
//! The empty topic stands for all of the region: that is for the few who have to know everything.

use crate::beat::Beat;
use crate::head::{Certificate, Scope};
use crate::id::{Addr, OriginId, Region, Topic};
use crate::log::{Cursor, Log};
use crate::message::{Entry, Message, Wanted};
use crate::node::{Event, Node};
use crate::planted::planted;
use std::collections::{BTreeMap, BTreeSet};

const POLL_MS: u64 = 2_000;
/// Somebody waits, and one of them may just have died.
const ASKED_AT_FIRST: usize = 2;
pub const IDLE_MS: u64 = 600_000;
/// Without a poll for this long, nobody is told of changes any more.
const SERVED_MS: u64 = 15_000;
const MAX_SUBSCRIPTIONS: usize = 4_096;
/// What one peer may subscribe to here; each has its own room.
const MAX_TOPICS_A_PEER: usize = MAX_SUBSCRIPTIONS;
const BEATS_A_DATAGRAM: usize = 40;

/// The topic that every log bears.
const ALL: &[u8] = b"";

#[derive(Default)]
pub(crate) struct Subscriptions {
    used: BTreeMap<(Region, Topic), u64>,
    pub next_ms: u64,
    served: BTreeMap<Addr, Served>,
}

/// What one peer is told of, and until when if it does not ask again.
#[derive(Default)]
struct Served {
    topics: BTreeMap<Topic, u64>,
    origins: BTreeMap<OriginId, Told>,
}

struct Told {
    at: (u32, u64),
    until_ms: u64,
}

impl Subscriptions {
    /// All detail of these regions is used from now on.
    pub(crate) fn use_all(&mut self, regions: BTreeSet<Region>, now_ms: u64) {
        let all = || Topic::new(ALL).expect("an empty topic is short");
        self.used.extend(regions.into_iter().take(MAX_SUBSCRIPTIONS).map(|region| ((region, all()), now_ms)));
    }
}

impl Node {
    pub(crate) fn use_detail(&mut self, region: Region, topic: Topic) {
        let at = (region, topic);
        if at.0 == self.me.region || (self.subscriptions.used.len() >= MAX_SUBSCRIPTIONS && !self.subscriptions.used.contains_key(&at)) {
            return;
        }
        if self.subscriptions.used.insert(at.clone(), self.now_ms).is_none() {
            self.ask_for_detail(at, ASKED_AT_FIRST);
        }
    }

    /// Some hosts of the region, others each time.
    fn ask_for_detail(&mut self, (region, topic): (Region, Topic), count: usize) {
        let others = self.members.others();
        let there: Vec<&Addr> = others.all.iter().filter(|peer| peer.region == region).map(|peer| &peer.addr).collect();
        let to: Vec<Addr> = self.rng.choose(count, there.len()).into_iter().map(|at| there[at].clone()).collect();
        let held = self.catalogue.of_region(&region).map(|log| log.head.is.id);
        let entries = held.filter_map(|id| self.catalogue.entry(id)).collect();
        let message = Message::Subscribe { topic, entries };
        to.into_iter().for_each(|to| self.stream(to, &message));
    }

    pub(crate) fn tick_subscriptions(&mut self) {
        if self.now_ms < self.subscriptions.next_ms {
            return;
        }
        let now_ms = self.now_ms;
        self.subscriptions.next_ms = now_ms + self.rng.around(POLL_MS);
        self.subscriptions.served.retain(|_, served| {
            served.topics.retain(|_, until_ms| *until_ms > now_ms);
            served.origins.retain(|_, told| told.until_ms > now_ms);
            !served.topics.is_empty()
        });
        let is_idle = |used: &u64| now_ms.saturating_sub(*used) >= IDLE_MS && !planted!(SubscribeForEver);
        let idle: Vec<(Region, Topic)> = self.subscriptions.used.iter().filter(|(_, used)| is_idle(used)).map(|(at, _)| at.clone()).collect();
        idle.into_iter().for_each(|at| self.unsubscribe(at));
        self.subscriptions.used.keys().cloned().collect::<Vec<_>>().into_iter().for_each(|at| self.ask_for_detail(at, 1));
    }

    fn unsubscribe(&mut self, at: (Region, Topic)) {
        self.subscriptions.used.remove(&at);
        let (region, topic) = at;
        let left: Vec<&Topic> = self.subscriptions.used.keys().filter(|(of, _)| *of == region).map(|(_, topic)| topic).collect();
        let is_used = |log: &&Log| left.iter().any(|topic| bears(log, topic));
        let unused: Vec<OriginId> = self.catalogue.of_region(&region).filter(|log| !is_used(log)).map(|log| log.head.is.id).collect();
        unused.into_iter().for_each(|id| self.catalogue.drop_log(id));
        self.event(Event::Unsubscribed { region, topic });
    }

    /// Not every log is this host's to hold: the global ones, those of its region, those that it subscribed to.
    pub(crate) fn wants_origin(&self, certificate: &Certificate) -> bool {
        let region = &certificate.region;
        let first = self.subscriptions.used.range((region.clone(), Topic::new([]).expect("an empty topic is short"))..).next();
        certificate.scope == Scope::Global || *region == self.me.region || first.is_some_and(|((of, _), _)| of == region)
    }

    pub(crate) fn receive_subscribe(&mut self, from: Addr, topic: Topic, theirs: &[Entry]) {
        let region = self.me.region.clone();
        let with_topic = self.catalogue.of_region(&region).filter(|log| bears(log, &topic));
        let bearing: BTreeSet<OriginId> = with_topic.map(|log| log.head.is.id).collect();
        let known: BTreeMap<OriginId, &Entry> = theirs.iter().map(|entry| (entry.id, entry)).collect();
        let mut beats: Vec<Beat> = vec![];
        let mut served = self.subscriptions.served.remove(&from).unwrap_or_default();
        let until_ms = self.now_ms + SERVED_MS;
        let has_room = served.topics.len() < MAX_TOPICS_A_PEER || served.topics.contains_key(&topic);
        if !has_room {
            self.subscriptions.served.insert(from, served);
            return;
        }
        served.topics.insert(topic, until_ms);
        for id in bearing.into_iter().chain(known.keys().copied()).collect::<BTreeSet<_>>() {
            let Some(ours) = self.catalogue.entry(id) else { continue };
            let theirs = known.get(&id);
            if theirs.is_none_or(|theirs| theirs.at() < ours.at()) {
                let after = theirs.map_or(Cursor::START, |theirs| Cursor::after(theirs.seq));
                let epoch = theirs.map_or(ours.epoch, |theirs| theirs.epoch);
                self.give(&from, Wanted { id, epoch, after });
            }
            // It has what an earlier life wrote and nobody here knows any more: the writer has to go on above that.
            if let Some(theirs) = theirs.filter(|theirs| theirs.at() > ours.at()) {
                let after = if theirs.epoch == ours.epoch && !ours.forked { Cursor::after(ours.seq) } else { Cursor::START };
                self.want(&from, Wanted { id, epoch: theirs.epoch, after });
            }
            served.origins.insert(id, Told { at: (ours.epoch, ours.seq), until_ms });
            beats.extend(self.beat_of(id));
        }
        self.subscriptions.served.insert(from.clone(), served);
        for beats in beats.chunks(BEATS_A_DATAGRAM) {
            self.datagram(from.clone(), &Message::Beats(beats.to_vec()));
        }
    }

    /// A log of this region has changed: who subscribed hears of it at once.
    pub(crate) fn notify_subscribers(&mut self, id: OriginId) {
        let Some(log) = self.catalogue.log(id).filter(|_| !self.subscriptions.served.is_empty()) else { return };
        if log.certificate.scope == Scope::Global || log.certificate.region != self.me.region {
            return;
        }
        let (now, new_until_ms) = ((log.head.is.epoch, log.head.is.seq), self.now_ms + SERVED_MS);
        // All rows are looked at only for who does not know the log yet.
        let is_new = self.subscriptions.served.values().any(|served| !served.origins.contains_key(&id));
        let bodies = log.rows().filter(|_| is_new).filter_map(|row| row.body());
        let topics: BTreeSet<&[u8]> = bodies.map(|body| body.topic).chain([ALL]).collect();
        let mut told = vec![];
        for (to, served) in &mut self.subscriptions.served {
            let known = served.origins.get(&id).map(|told| (told.at, told.until_ms));
            if known.is_some() || served.topics.keys().any(|topic| topics.contains(topic.as_bytes())) {
                let until_ms = known.map_or(new_until_ms, |(_, until_ms)| until_ms);
                served.origins.insert(id, Told { at: now, until_ms });
                told.push((to.clone(), known.map(|(at, _)| at)));
            }
        }
        for (to, known) in told {
            let after = known.map_or(Cursor::START, |(_, seq)| Cursor::after(seq));
            self.give(&to, Wanted { id, epoch: known.map_or(now.0, |(epoch, _)| epoch), after });
        }
    }
}

fn bears(log: &Log, topic: &Topic) -> bool {
    topic.as_bytes() == ALL || log.rows().any(|row| row.has_topic(topic))
}
