//! One origin's log as this host holds it: a verified head and exactly the rows that it signs.
//!
//! ```text
//! head + rows after a cursor ---> new lanes, on the side ---> digest as signed? ---> swap
//!                                                              no: nothing has changed
//! ```

use crate::beat::{Beat, Heard};
use crate::fresh::{Fresh, Receipt, beat_ms};
use crate::head::{Certificate, Head};
use crate::id::Key;
use crate::lthash::LtHash;
use crate::planted::planted;
use crate::row::Row;
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeSet, VecDeque};

/// Above this the lanes (2 KiB) are kept; for fewer rows they are made again when they are needed.
const KEEP_LANES_ABOVE: usize = 16;
/// Of one origin, with what its rows take in memory. A host with more is broken; the rest of the cluster must not pay for it.
pub const MAX_LOG_BYTES: usize = 64 << 20;
/// So many rows at most: one message or record can name them all, and their places in memory stay bounded too.
pub const MAX_ROWS: usize = 1 << 18;
/// What a row takes beside its bytes: its places, and what is allocated around them.
pub(crate) const ROW_COST_BYTES: usize = 200;
/// The newest heads, so that a fork is seen a little later too, and can be shown.
const REMEMBERED_HEADS: usize = 4;

/// A place in a log: rows are ordered by sequence, then key. Rows of one sequence may be split between messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    pub seq: u64,
    /// None: all rows of `seq` are behind it.
    pub key: Option<Key>,
}

impl Cursor {
    pub const START: Self = Self { seq: 0, key: None };

    pub fn after(seq: u64) -> Self {
        Self { seq, key: None }
    }

    pub(crate) fn is_before(&self, row: &Row) -> bool {
        row.seq() > self.seq || (row.seq() == self.seq && self.key.as_ref().is_some_and(|key| row.key() > key.as_bytes()))
    }
}

pub struct Log {
    pub certificate: Certificate,
    pub head: Head,
    rows: BTreeSet<ByKey>,
    by_seq: BTreeSet<BySeq>,
    tombstones: BTreeSet<BySeq>,
    lanes: Option<LtHash>,
    bytes: usize,
    /// Earlier heads of this epoch, oldest first.
    earlier: VecDeque<Head>,
    pub(crate) heard: Heard,
    pub(crate) fresh: Fresh,
}

/// Why a batch was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Rows between are missing.
    Gap,
    /// The rows are not those that the head signs.
    Mismatch,
    TooBig,
}

/// What a verified batch changes.
pub struct Change {
    pub(crate) lanes: LtHash,
    rows: BTreeSet<ByKey>,
    whole: bool,
}

/// A row found by its key.
struct ByKey(Row);

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        self.0.key()
    }
}

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.key().cmp(other.0.key())
    }
}

/// A row in its place: by sequence, then key.
struct BySeq {
    seq: u64,
    row: Row,
}

impl BySeq {
    fn of(row: &Row) -> Self {
        Self { seq: row.seq(), row: row.clone() }
    }
}

impl Ord for BySeq {
    fn cmp(&self, other: &Self) -> Ordering {
        self.seq.cmp(&other.seq).then_with(|| self.row.key().cmp(other.row.key()))
    }
}

macro_rules! ordered {
    ($($name:ident)*) => {$(
        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }

        impl Eq for $name {}
    )*};
}

ordered!(ByKey BySeq);

impl Log {
    /// A log of which nothing is known yet but its first head, which must be for the whole.
    pub fn begin(certificate: Certificate, head: Head, rows: Vec<Row>, receipt: Receipt) -> Result<Self, Refusal> {
        let heard = Heard::anchor(head.is.anchor);
        let mut log = Self {
            certificate,
            head: head.clone(),
            rows: BTreeSet::new(),
            by_seq: BTreeSet::new(),
            tombstones: BTreeSet::new(),
            lanes: None,
            bytes: 0,
            earlier: VecDeque::new(),
            heard,
            fresh: Fresh::begin(head.is.time_ms, receipt),
        };
        let change = log.check(&head, &Cursor::START, rows)?;
        log.put_in_place(head, change);
        Ok(log)
    }

    /// Whether `rows` after `after` lead from here to `head`, which the caller has found to be signed. Changes nothing.
    pub fn check(&self, head: &Head, after: &Cursor, rows: Vec<Row>) -> Result<Change, Refusal> {
        let change = self.prepare((head.is.seq, head.is.floor), after, rows)?;
        if change.lanes.digest() != head.is.digest && !planted!(TrustDigest) {
            return Err(Refusal::Mismatch);
        }
        Ok(change)
    }

    /// What the log would be with `rows`, worked out beside it.
    pub(crate) fn prepare(&self, (seq, floor): (u64, u64), after: &Cursor, rows: Vec<Row>) -> Result<Change, Refusal> {
        let whole = *after == Cursor::START;
        if !whole && (after.seq > self.head.is.seq || after.key.is_some() || floor > self.head.is.seq) {
            return Err(Refusal::Gap);
        }
        let held = |key: &[u8]| if whole { None } else { self.get(key) };
        let mut newest: BTreeSet<ByKey> = BTreeSet::new();
        for row in rows {
            let known = newest.get(row.key()).map(|known| &known.0).or_else(|| held(row.key()));
            if row.seq() > seq || !after.is_before(&row) {
                return Err(Refusal::Mismatch);
            }
            if known.is_none_or(|known| known.seq() < row.seq()) {
                newest.replace(ByKey(row));
            }
        }
        let replaced = newest.iter().filter_map(|row| held(row.0.key()));
        let over = self.over(floor).filter(|old| !whole && !newest.contains(old.key()));
        let gone: Vec<&Row> = replaced.chain(over).collect();
        let come = || newest.iter().map(|row| &row.0).filter(|row| !is_over(row, floor));
        // Limits come before hashes: what is too big costs nothing.
        let (held_rows, held_bytes) = if whole { (0, 0) } else { (self.rows.len(), self.bytes) };
        let bytes = held_bytes + length_of(come()) - length_of(gone.iter().copied());
        let rows = held_rows + come().count() - gone.len();
        if rows > MAX_ROWS || bytes + rows * ROW_COST_BYTES > MAX_LOG_BYTES {
            return Err(Refusal::TooBig);
        }
        let mut lanes = if whole { LtHash::default() } else { self.lanes() };
        gone.iter().for_each(|row| lanes.remove(row.raw()));
        come().for_each(|row| lanes.add(row.raw()));
        Ok(Change { lanes, rows: newest, whole })
    }

    /// Puts a checked change in place and gives the rows that readers have not seen.
    pub fn swap(&mut self, head: Head, change: Change, receipt: Receipt) -> Vec<Row> {
        let old = self.head.clone();
        self.fresh.renew(head.is.time_ms, receipt);
        let rows = self.put_in_place(head, change);
        self.remember(old);
        rows
    }

    fn put_in_place(&mut self, head: Head, change: Change) -> Vec<Row> {
        let floor = head.is.floor;
        if change.whole {
            self.rows.clear();
            self.by_seq.clear();
            self.tombstones.clear();
            self.bytes = 0;
        }
        for row in &change.rows {
            self.put(row.0.clone());
        }
        let over: Vec<Row> = self.over(floor).cloned().collect();
        over.iter().for_each(|row| self.take(row.key()));
        self.lanes = (self.rows.len() > KEEP_LANES_ABOVE).then_some(change.lanes);
        self.heard = Heard::anchor(head.is.anchor);
        self.head = head;
        change.rows.into_iter().map(|row| row.0).collect()
    }

    /// The same rows under a head that differs only in its chain of beats.
    pub fn follow(&mut self, head: Head, receipt: Receipt) {
        self.heard = Heard::anchor(head.is.anchor);
        self.fresh.renew(head.is.time_ms, receipt);
        let old = std::mem::replace(&mut self.head, head);
        self.remember(old);
    }

    fn remember(&mut self, old: Head) {
        if old.is.epoch == self.head.is.epoch && old.is.seq < self.head.is.seq {
            self.earlier.push_back(old);
            let surplus = self.earlier.len().saturating_sub(REMEMBERED_HEADS);
            self.earlier.drain(..surplus);
        }
    }

    /// Whether the beat is a sign of life: the next of this head's, and revealed lately.
    pub fn hear(&mut self, beat: &Beat, receipt: Receipt) -> bool {
        let Some(heard) = self.heard.follows(beat) else { return false };
        self.heard = heard;
        self.fresh.renew(beat_ms(self.head.is.chain, beat.index), receipt)
    }

    pub(crate) fn last_beat(&self) -> Option<Beat> {
        let Heard { index, link } = self.heard;
        (index > 0).then_some(Beat { id: self.head.is.id, index, link })
    }

    /// How far whoever gave this log had heard it: told again, those beats are no news. Only the first word of a head counts,
    /// and only where nothing live was heard yet, so nobody keeps a log from being fresh by telling its beats this way.
    pub(crate) fn heard_before(&mut self, beat: &Beat) {
        if let Some(heard) = self.heard.follows(beat).filter(|_| self.heard.index == 0 && !self.fresh.confirmed) {
            self.heard = heard;
        }
    }

    /// The head of the same epoch and sequence that says something else, if one is remembered.
    pub fn contradicts(&self, head: &Head) -> Option<&Head> {
        if planted!(IgnoreForks) {
            return None;
        }
        let (seq, digest) = (head.is.seq, head.is.digest);
        let same_epoch = |known: &&Head| known.is.epoch == head.is.epoch && known.is.seq == seq && known.is.digest != digest;
        std::iter::once(&self.head).chain(&self.earlier).find(same_epoch)
    }

    /// Rows behind the cursor in order, as many as fit into `max_bytes`, and whether those were all.
    pub fn rows_after(&self, cursor: &Cursor, max_bytes: usize) -> (Vec<Row>, Option<Cursor>) {
        // No key is before the empty one.
        let key = cursor.key.clone().unwrap_or_else(|| Key::new([]).expect("an empty key is short"));
        let seq = if cursor.key.is_some() { cursor.seq } else { cursor.seq.saturating_add(1) };
        let (mut rows, mut bytes) = (Vec::new(), 0);
        for BySeq { row, .. } in self.by_seq.range(BySeq { seq, row: Row::tombstone(key, seq) }..) {
            if !cursor.is_before(row) {
                continue;
            }
            if bytes + row.length() > max_bytes {
                let last = rows.last().map(|row: &Row| Cursor { seq: row.seq(), key: Some(row.key_of_its_own()) });
                return (rows, Some(last.unwrap_or_else(|| cursor.clone())));
            }
            bytes += row.length();
            rows.push(row.clone());
        }
        (rows, None)
    }

    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().map(|row| &row.0)
    }

    pub fn get(&self, key: &[u8]) -> Option<&Row> {
        self.rows.get(key).map(|row| &row.0)
    }

    /// The sequence up to which tombstones go when all but the newest `keep` are dropped.
    pub(crate) fn floor_that_keeps(&self, keep: usize) -> Option<u64> {
        self.tombstones.iter().rev().nth(keep).map(|row| row.seq)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Bytes of its rows on the wire.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the rows still are what the head signs: memory fails too.
    pub fn is_sound(&self) -> bool {
        let lanes = self.lanes_of_rows();
        self.lanes.as_ref().is_none_or(|kept| *kept == lanes) && lanes.digest() == self.head.is.digest
    }

    /// Memory that fails, for the simulator: another value under the first key.
    #[cfg(any(test, feature = "planted"))]
    pub(crate) fn flip_memory(&mut self) -> bool {
        let Some(row) = self.rows().find(|row| !row.is_dead()) else { return false };
        let topic = crate::Topic::new("flipped").expect("short");
        let flipped = Row::live(row.key_of_its_own(), row.seq(), &topic, b"").expect("short");
        self.rows.replace(ByKey(flipped));
        true
    }

    fn lanes(&self) -> LtHash {
        self.lanes.clone().unwrap_or_else(|| self.lanes_of_rows())
    }

    fn lanes_of_rows(&self) -> LtHash {
        let mut lanes = LtHash::default();
        self.rows().for_each(|row| lanes.add(row.raw()));
        lanes
    }

    /// Tombstones that the floor has passed.
    fn over(&self, floor: u64) -> impl Iterator<Item = &Row> {
        let first = self.tombstones.iter().take_while(move |row| row.seq <= floor);
        first.map(|row| &row.row).filter(move |row| is_over(row, floor))
    }

    fn put(&mut self, row: Row) {
        self.take(row.key());
        self.bytes += row.length();
        self.by_seq.insert(BySeq::of(&row));
        if row.is_dead() {
            self.tombstones.insert(BySeq::of(&row));
        }
        self.rows.insert(ByKey(row));
    }

    fn take(&mut self, key: &[u8]) {
        if let Some(ByKey(old)) = self.rows.take(key) {
            self.bytes -= old.length();
            let place = BySeq::of(&old);
            self.by_seq.remove(&place);
            self.tombstones.remove(&place);
        }
    }
}

fn length_of<'a>(rows: impl Iterator<Item = &'a Row>) -> usize {
    rows.map(Row::length).sum()
}

fn is_over(row: &Row, floor: u64) -> bool {
    row.is_dead() && row.seq() <= floor && !planted!(KeepTombstones)
}
