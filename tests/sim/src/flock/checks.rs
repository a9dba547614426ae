//! What must hold. A checker knows the truth, because it sees every writer write; it judges what every reader is told.

use super::process::{Process, Seen};
use dunlin_gossip::{Cursor, Log, Node, OriginId, Row};
use std::collections::{BTreeMap, BTreeSet};

type State = (OriginId, u32, u64, [u8; 32]);

#[derive(Default)]
pub struct Checks {
    pub broken: Option<String>,
    /// Every state that was ever signed, by whoever rightly held the key.
    truth: BTreeMap<State, Vec<Row>>,
    /// Identities that were in two hands at some time: of them one may be told that there is another.
    pub in_two_hands: BTreeSet<OriginId>,
    /// Epochs in which both hands spoke, or two heads of one sequence were made on purpose.
    pub may_fork: BTreeSet<(OriginId, u32)>,
}

impl Checks {
    pub fn fail(&mut self, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    pub fn wrote(&mut self, log: &Log) {
        self.truth.entry(state_of(log)).or_insert_with(|| log.rows().cloned().collect());
    }

    pub fn wrote_state(&mut self, state: State, rows: Vec<Row>) {
        self.truth.insert(state, rows);
    }

    /// A reader is never told an older state than before.
    pub fn told(&mut self, who: usize, seen: &mut Seen, (origin, at, whole): (OriginId, (u32, u64), bool), rows: Vec<Row>) {
        if at < seen.at {
            self.fail(|| format!("process {who}: {origin:?} went back from {:?} to {at:?}", seen.at));
        }
        seen.at = at;
        if whole {
            seen.rows.clear();
        }
        for row in rows {
            match row.is_dead() {
                true => drop(seen.rows.remove(&row.key_of_its_own())),
                false => drop(seen.rows.insert(row.key_of_its_own(), row)),
            }
        }
    }

    /// What a reader has been told is a state that the origin really had, whole.
    pub fn is_true(&mut self, who: usize, process: &Process, origin: OriginId) {
        let Some(log) = process.node.as_ref().and_then(|node| node.catalogue().log(origin)) else {
            return self.fail(|| format!("process {who} was told of {origin:?}, which it does not hold"));
        };
        let seen = &process.reader[&origin];
        let floor = log.head.is.floor;
        if let Some(row) = log.rows().find(|row| row.is_dead() && row.seq() <= floor) {
            return self.fail(|| format!("process {who}: {origin:?} keeps {row:?} though its floor is {floor}"));
        }
        let Some(truth) = self.truth.get(&state_of(log)) else {
            return self.fail(|| format!("process {who} was told a state of {origin:?} at {:?} that nobody wrote", seen.at));
        };
        let live: BTreeMap<_, _> = truth.iter().filter(|row| !row.is_dead()).map(|row| (row.key_of_its_own(), row.clone())).collect();
        if live != seen.rows {
            let (seen, live): (Vec<&Row>, Vec<&Row>) = (seen.rows.values().collect(), live.values().collect());
            self.fail(|| format!("process {who} was told {seen:?} of {origin:?}, but {live:?} was written"));
        }
    }

    /// What a snapshot brought is nobody's word until a live head or beat has covered it.
    pub fn started(&mut self, who: usize, node: &Node) {
        let sure = node.catalogue().logs().find(|log| node.status(log.head.is.id).is_some_and(|status| status.age_ms.is_some()));
        if let Some(log) = sure {
            self.fail(|| format!("process {who} calls {} fresh, right after its start from a snapshot", log.certificate.name));
        }
    }

    /// Only an identity of which two processes wrote is ever quarantined: a rolled-back disk is no fork.
    pub fn forked(&mut self, who: usize, (origin, epoch): (OriginId, u32)) {
        if !self.may_fork.contains(&(origin, epoch)) {
            self.fail(|| format!("process {who} quarantined epoch {epoch} of {origin:?}, which never contradicted itself in it"));
        }
    }
}

pub fn state_of(log: &Log) -> State {
    let is = &log.head.is;
    (is.id, is.epoch, is.seq, is.digest)
}

/// After the last trouble two logs of one origin are one.
pub fn equal(one: &Log, other: &Log) -> bool {
    let rows = |log: &Log| log.rows_after(&Cursor::START, usize::MAX).0;
    state_of(one) == state_of(other) && rows(one) == rows(other)
}

/// What a reader starts from after a restart from disk.
pub fn seen_from(node: &Node) -> BTreeMap<OriginId, Seen> {
    let seen = |log: &Log| {
        let rows = log.rows().filter(|row| !row.is_dead()).map(|row| (row.key_of_its_own(), row.clone())).collect();
        (log.head.is.id, Seen { at: (log.head.is.epoch, log.head.is.seq), rows })
    };
    node.catalogue().logs().map(seen).collect()
}
