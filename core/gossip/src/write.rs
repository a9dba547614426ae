//! Logs of this process's own making: it alone signs them.

use crate::beat::{self, BEAT_MS, BEATS, Beat};
use crate::fresh::beat_ms;
use crate::head::{self, Certificate, Head, Statement};
use crate::id::{Key, OriginId};
use crate::log::{Cursor, Log};
use crate::lthash::LtHash;
use crate::message::{Batch, More};
use crate::planted::planted;
use crate::node::{At, Change, Event, Node};
use crate::row::Row;
use ed25519_dalek::SigningKey;
use std::collections::BTreeMap;

/// Older ones go below the floor: who is that far back fetches the whole.
const KEPT_TOMBSTONES: usize = 256;
/// Changes that wait until this process may speak.
const MAX_PENDING: usize = 100_000;

pub(crate) struct Writer {
    pub certificate: Certificate,
    key: SigningKey,
    /// What this life has begun: before, the log is what an earlier life left.
    pub begun: bool,
    /// Its sequence is somebody else's, and so others may write it too.
    pub foreign: bool,
    pending: BTreeMap<Key, Change>,
    schema: u32,
    /// Something was published that waits, be it nothing at all.
    said: bool,
    /// A log with foreign sequences that came too early.
    pending_at: Option<At>,
}

impl Writer {
    pub fn key(&self) -> &SigningKey {
        &self.key
    }
}

impl Node {
    pub(crate) fn own(&mut self, certificate: Certificate, key: SigningKey) {
        let origin = certificate.id;
        if key.verifying_key() != certificate.key || !self.catalogue.admit(certificate.clone()) {
            return self.event(Event::Refused { origin, why: "the certificate is not the cluster's, or for another key" });
        }
        let writer = Writer { certificate, key, begun: false, foreign: false, pending: BTreeMap::new(), schema: 0, said: false, pending_at: None };
        self.writers.insert(origin, writer);
        self.own.ask_again(|| self.rng.draw(), self.now_ms);
    }

    pub(crate) fn publish(&mut self, origin: OriginId, schema: u32, changes: Vec<Change>, at: Option<At>) {
        let speaks = self.speaks();
        let Some(writer) = self.writers.get_mut(&origin) else {
            return self.event(Event::Refused { origin, why: "this process does not write that origin" });
        };
        if writer.pending.len() + changes.len() > MAX_PENDING {
            return self.event(Event::Refused { origin, why: "too many changes wait until this process may speak" });
        }
        let too_long = |change: &Change| change.value.as_ref().is_some_and(|(_, value)| value.len() > crate::MAX_VALUE_BYTES);
        if changes.iter().any(too_long) {
            return self.event(Event::Refused { origin, why: "a value is longer than 4 KiB: split it" });
        }
        writer.schema = schema;
        writer.foreign = at.is_some();
        writer.said = true;
        if at.is_some_and(|at| at.since == 0) {
            writer.pending.clear();
        }
        let since = writer.pending_at.map(|at| at.since);
        writer.pending_at = at.map(|at| At { since: since.unwrap_or(at.since).min(at.since), ..at });
        writer.pending.extend(changes.into_iter().map(|change| (change.key.clone(), change)));
        if speaks {
            self.say(origin);
        }
    }

    /// Another life has written above: all of it again, above that.
    pub(crate) fn begin_again(&mut self) {
        for (origin, writer) in self.writers.iter_mut().filter(|(_, writer)| writer.begun && !writer.foreign) {
            writer.begun = false;
            let rows = self.catalogue.log(*origin).into_iter().flat_map(|log| log.rows()).filter(|row| !row.is_dead());
            for row in rows {
                let Some(body) = row.body() else { continue };
                let Ok(topic) = crate::Topic::new(body.topic) else { continue };
                let change = Change { key: row.key_of_its_own(), value: Some((topic, body.value.to_vec())), seq: None };
                writer.pending.entry(change.key.clone()).or_insert(change);
            }
        }
    }

    /// Signs and spreads what waits. The first of a life replaces everything.
    pub(crate) fn say(&mut self, origin: OriginId) {
        let Some(writer) = self.writers.get_mut(&origin) else { return };
        let certificate = writer.certificate.clone();
        if self.catalogue.fork(origin).is_some() || self.catalogue.epoch(origin) != Some(certificate.epoch) {
            return;
        }
        if writer.pending.is_empty() && writer.pending_at.is_none() && !writer.said {
            return;
        }
        writer.said = false;
        let changes: Vec<Change> = std::mem::take(&mut writer.pending).into_values().collect();
        let log = self.catalogue.log(origin).filter(|log| log.head.is.epoch == certificate.epoch);
        let held = log.map_or(0, |log| log.head.is.seq);
        let last = held.max(if writer.begun { 0 } else { self.own.base(origin, self.me.life) });
        let plan = match writer.pending_at.take() {
            Some(at) if at.seq <= held => {
                writer.begun = true; // others have said it already; this process beats for it too
                return;
            }
            Some(at) if at.since > held => {
                return self.event(Event::NeedWhole { origin, seq: at.seq });
            }
            Some(at) => foreign(at, changes, log.is_none()),
            None => numbered(last, changes, log.filter(|_| writer.begun)),
        };
        let Ok((seq, floor, after, rows)) = plan else {
            return self.event(Event::Refused { origin, why: "a change has no place in the log" });
        };
        writer.begun = true;
        self.sign(origin, (seq, floor), after, rows);
    }

    fn sign(&mut self, origin: OriginId, (seq, floor): (u64, u64), after: Cursor, rows: Vec<Row>) {
        let Some(writer) = self.writers.get(&origin) else { return };
        let (chain, _) = beat::position(self.clock_ms);
        let is_host = origin == self.me.id;
        let mut is = Statement {
            id: origin,
            epoch: writer.certificate.epoch,
            seq,
            floor,
            digest: LtHash::default().digest(),
            schema: writer.schema,
            time_ms: self.clock_ms,
            life: if is_host { self.me.life } else { 0 },
            chain,
            anchor: [0; 16],
        };
        let receipt = self.receipt(false);
        let log = self.catalogue.log_mut(origin).filter(|log| log.head.is.epoch == is.epoch);
        let shown = match log {
            Some(log) => log.prepare((seq, floor), &after, rows.clone()).map(|change| {
                is.digest = change.lanes.digest();
                log.swap(Head::sign(&writer.key, is), change, receipt)
            }),
            None => {
                let mut lanes = LtHash::default();
                rows.iter().filter(|row| !row.is_dead()).for_each(|row| lanes.add(row.raw()));
                is.digest = lanes.digest();
                let head = Head::sign(&writer.key, is);
                let live = rows.iter().filter(|row| !row.is_dead()).cloned().collect();
                Log::begin(writer.certificate.clone(), head, live, receipt).map(|log| {
                    self.catalogue.put(log);
                    rows.clone()
                })
            }
        };
        let Ok(shown) = shown else {
            return self.event(Event::Refused { origin, why: "the log would be larger than 64 MiB, or goes back" });
        };
        self.catalogue.note(origin);
        let head = self.catalogue.log(origin).expect("it was just written").head.clone();
        self.changed(origin, after == Cursor::START, shown);
        self.spread(Batch { certificate: None, head, after, rows, more: More::Last }, None);
        self.notify_subscribers(origin);
    }

    /// A sign of life for every log of this process, and a new chain of them where the old one is at its end.
    pub(crate) fn own_beats(&mut self) -> Vec<Beat> {
        let mut beats = vec![];
        for origin in self.writers.keys().copied().collect::<Vec<_>>() {
            let writer = &self.writers[&origin];
            let Some(log) = self.catalogue.log(origin) else { continue };
            let is = log.head.is.clone();
            if !writer.begun || self.catalogue.fork(origin).is_some() || is.epoch != writer.certificate.epoch {
                continue;
            }
            let (chain, index) = self.beat_position(log);
            if is.chain < chain {
                let foreign = is.life == 0;
                let seq = if foreign { is.seq } else { is.seq + 1 };
                let time_ms = self.clock_ms.max(beat_ms(chain, index));
                self.renew(origin, Statement { seq, chain, time_ms, ..is });
                continue;
            }
            if is.chain > chain {
                continue; // of a life whose clock was ahead of this one's
            }
            let beat = Beat { id: origin, index, link: beat::link(head::secret(writer.key(), &is), index) };
            let receipt = self.receipt(false);
            if self.catalogue.log_mut(origin).is_some_and(|log| log.hear(&beat, receipt)) {
                beats.push(beat);
            }
        }
        beats
    }

    /// Which beat of a log of this process is due. A log that others write too may have been signed by one with a faster clock:
    /// while that one beats, this says nothing new; when it has died, this goes on where it stopped, at the same pace.
    fn beat_position(&self, log: &Log) -> (u32, u16) {
        let own = beat::position(self.clock_ms);
        let is = &log.head.is;
        if is.chain < own.0 || is.life != 0 || planted!(LeaveBeats) {
            return own;
        }
        let silent_ms = self.now_ms.saturating_sub(log.fresh.newer_at_ms);
        let index = u64::from(log.heard.index) + silent_ms / BEAT_MS;
        let goes_on = if index > u64::from(BEATS) { (is.chain.saturating_add(1), 0) } else { (is.chain, index as u16) };
        own.max(goes_on)
    }

    /// The same rows, signed for the time that begins.
    fn renew(&mut self, origin: OriginId, is: Statement) {
        let head = Head::sign(self.writers[&origin].key(), is);
        let receipt = self.receipt(false);
        let Some(log) = self.catalogue.log_mut(origin) else { return };
        let after = Cursor::after(log.head.is.seq);
        log.follow(head.clone(), receipt);
        self.catalogue.note(origin);
        self.spread(Batch { certificate: None, head, after, rows: vec![], more: More::Last }, None);
    }
}

type Plan = Result<(u64, u64, Cursor, Vec<Row>), crate::Malformed>;

/// Each change gets the next sequence. Without a log of this life the changes are the whole, and the floor says so to all.
fn numbered(last: u64, changes: Vec<Change>, log: Option<&Log>) -> Plan {
    let mut seq = last;
    let mut rows = vec![];
    for change in changes {
        let is_there = log.and_then(|log| log.get(change.key.as_bytes())).is_some_and(|row| !row.is_dead());
        if change.value.is_none() && !is_there {
            continue;
        }
        seq += 1;
        rows.push(row(change, seq)?);
    }
    let Some(log) = log else { return Ok((seq.max(last + 1), last + 1, Cursor::START, rows)) };
    let floor = log.floor_that_keeps(KEPT_TOMBSTONES).unwrap_or(0).max(log.head.is.floor);
    Ok((seq.max(last + 1), floor, Cursor::after(last), rows))
}

/// Each change has its revision already; deletions go at once, so the floor is at the last of them.
fn foreign(at: At, changes: Vec<Change>, is_new: bool) -> Plan {
    let whole = at.since == 0 || is_new;
    let placed = |change: Change| {
        let seq = change.seq.filter(|seq| *seq <= at.seq && (whole || *seq > at.since));
        row(change, seq.ok_or(crate::Malformed { what: "the revision of a change" })?)
    };
    let rows = changes.into_iter().filter(|change| !whole || change.value.is_some()).map(placed).collect::<Result<_, _>>()?;
    Ok((at.seq, at.floor.min(at.seq), if whole { Cursor::START } else { Cursor::after(at.since) }, rows))
}

fn row(change: Change, seq: u64) -> Result<Row, crate::Malformed> {
    match change.value {
        Some((topic, value)) => Row::live(change.key, seq, &topic, &value),
        None => Ok(Row::tombstone(change.key, seq)),
    }
}
