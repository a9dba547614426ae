//! Host facts as rows of a host's log: key `host`, and `m/<machine>` with the app as topic; JSON values.

use dunlin_gossip::{Change, Key, MAX_VALUE_BYTES, Row, Topic};
use dunlin_model::{HostId, MachineId};
use dunlin_view::{CheckState, HostFact, HostFacts, MachineFact, Snapshot};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Of the values, as heads of logs tell it.
pub(crate) const SCHEMA: u32 = 1;
const HOST_KEY: &str = "host";
const MACHINE_PREFIX: &str = "m/";
/// One fact a machine in this time, unless what readers decide by has changed.
const PAUSE: Duration = Duration::from_secs(1);
/// To how many bytes the texts of a fact are cut, one after the other, until it fits a row.
const CUTS: [usize; 4] = [512, 128, 32, 0];

/// What of this host's facts is published.
pub(crate) struct Published {
    host: HostId,
    said: Option<(Arc<HostFact>, Instant)>,
    machines: BTreeMap<MachineId, (Arc<MachineFact>, Instant)>,
}

/// The difference between the view and what is published.
#[derive(Default)]
pub(crate) struct Difference {
    pub changes: Vec<Change>,
    /// When to look again, because something was held back.
    pub again: Option<Instant>,
}

impl Published {
    pub fn nothing(host: HostId) -> Self {
        Self { host, said: None, machines: BTreeMap::new() }
    }

    /// The first time it is all that the host says, and waits until the host has said all: it speaks of itself last.
    pub fn difference(&mut self, view: &Snapshot, now: Instant) -> Difference {
        let mut difference = Difference::default();
        let Some(said) = view.hosts.get(&self.host) else { return difference };
        let held = self.said.as_ref().filter(|(held, at)| !Arc::ptr_eq(held, said) && *at + PAUSE > now).map(|(_, at)| *at + PAUSE);
        if held.is_none() && !self.said.as_ref().is_some_and(|(held, _)| Arc::ptr_eq(held, said)) {
            difference.changes.push(change(HOST_KEY.into(), "", Some(json(said.as_ref()))));
            self.said = Some((said.clone(), now));
        }
        difference.hold(held);
        let own: BTreeMap<&MachineId, &Arc<MachineFact>> = view.machines.iter().filter(|(_, fact)| fact.host == self.host).collect();
        let gone: Vec<MachineId> = self.machines.keys().filter(|id| !own.contains_key(id)).cloned().collect();
        for id in gone {
            self.machines.remove(&id);
            difference.changes.push(change(format!("{MACHINE_PREFIX}{id}"), "", None));
        }
        for (id, fact) in own {
            match self.machines.get(id) {
                Some((held, _)) if Arc::ptr_eq(held, fact) => continue,
                Some((held, at)) if *at + PAUSE > now && !decides(held, fact) => {
                    difference.hold(Some(*at + PAUSE));
                    continue;
                }
                _ => {}
            }
            difference.changes.push(change(format!("{MACHINE_PREFIX}{id}"), fact.app.as_str(), Some(machine_value(fact))));
            self.machines.insert(id.clone(), (fact.clone(), now));
        }
        difference
    }
}

impl Difference {
    fn hold(&mut self, until: Option<Instant>) {
        self.again = self.again.into_iter().chain(until).min();
    }
}

/// Whether readers would do something else for it.
fn decides(old: &MachineFact, new: &MachineFact) -> bool {
    (old.state, old.is_healthy(), old.cordoned, old.over) != (new.state, new.is_healthy(), new.cordoned, new.over)
        || (&old.version, old.attempt, old.placement) != (&new.version, new.attempt, new.placement)
}

fn change(key: String, topic: &str, value: Option<Vec<u8>>) -> Change {
    let topic = Topic::new(topic).expect("an app's name is shorter than a topic may be");
    Change { key: Key::new(key).expect("ids are shorter than a key may be"), value: value.map(|value| (topic, value)), seq: None }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}

/// What others need of a fact, in one row. Whether the machine is healthy stays as it is: of many checks those that fail are
/// told first.
fn machine_value(fact: &MachineFact) -> Vec<u8> {
    let value = json(fact);
    if value.len() <= MAX_VALUE_BYTES && fact.containers.is_empty() {
        return value;
    }
    let mut fact = fact.clone();
    fact.containers.clear();
    for most in CUTS {
        let value = json(&fact);
        if value.len() <= MAX_VALUE_BYTES {
            return value;
        }
        fact.checks.iter_mut().for_each(|check| cut(&mut check.output, most));
        fact.problem.iter_mut().for_each(|problem| cut(problem, most.max(64)));
        fact.exit.iter_mut().filter_map(|exit| exit.error.as_mut()).for_each(|error| cut(error, most.max(64)));
    }
    fact.checks.sort_by_key(|check| (check.status == CheckState::Passing, !check.gates_routing));
    loop {
        let value = json(&fact);
        if value.len() <= MAX_VALUE_BYTES {
            return value;
        }
        assert!(fact.checks.pop().is_some(), "the rest of a fact is bounded: ids, names, numbers");
    }
}

fn cut(text: &mut String, most: usize) {
    let end = text.floor_char_boundary(most.min(text.len()));
    text.truncate(end);
}

/// Rows that were not taken, and why.
#[derive(Default)]
pub(crate) struct Skipped {
    pub unreadable: u64,
    /// A host speaks of another, or of a machine under another's key.
    pub foreign: u64,
}

/// What a host's rows say.
pub(crate) fn read(host: &HostId, whole: bool, rows: &[Row], skipped: &mut Skipped) -> HostFacts {
    let mut facts = HostFacts { host: host.clone(), said: None, machines: vec![], gone: vec![], whole };
    for row in rows {
        let Ok(key) = std::str::from_utf8(row.key().as_bytes()) else {
            skipped.unreadable += 1;
            continue;
        };
        let machine = key.strip_prefix(MACHINE_PREFIX).map(str::parse::<MachineId>);
        match (machine, row.is_dead(), row.body()) {
            (Some(Ok(id)), true, _) => facts.gone.push(id),
            (Some(Ok(id)), false, Some(body)) => match serde_json::from_slice::<MachineFact>(body.value) {
                Ok(fact) if fact.id == id && fact.host == *host => facts.machines.push(fact),
                Ok(_) => skipped.foreign += 1,
                Err(_) => skipped.unreadable += 1,
            },
            (None, false, Some(body)) if key == HOST_KEY => match serde_json::from_slice::<HostFact>(body.value) {
                Ok(said) if said.id == *host => facts.said = Some(said),
                Ok(_) => skipped.foreign += 1,
                Err(_) => skipped.unreadable += 1,
            },
            (None, true, _) if key == HOST_KEY => {}
            // Another kind of row, of a later version.
            _ => skipped.unreadable += 1,
        }
    }
    facts
}
