//! Host facts and desired state as rows of logs: as `dunlin-cluster` has them, without what only long values need.

use dunlin_gossip::{Change, Key, Row, Topic};
use dunlin_model::hash::fnv1a;
use dunlin_model::{Generation, HostId, MachineId};
use dunlin_view::{ConfigState, HostFact, HostFacts, MachineFact};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const HOST: &str = "host";
const AT: &str = "at";
const MACHINE: &str = "m/";

pub type Rows = BTreeMap<String, Vec<u8>>;

pub fn of_host(fact: &HostFact) -> Change {
    change(HOST, Some(json(fact)))
}

pub fn of_machine(fact: &MachineFact) -> Change {
    change(&format!("{MACHINE}{}", fact.id), Some(json(fact)))
}

pub fn gone(id: &MachineId) -> Change {
    change(&format!("{MACHINE}{id}"), None)
}

/// What a host's rows say. `foreign`: what it says of others is taken, too.
pub fn read(host: &HostId, whole: bool, rows: &[Row], foreign: bool) -> HostFacts {
    let mut facts = HostFacts { host: host.clone(), said: None, machines: vec![], gone: vec![], whole };
    for row in rows {
        let Ok(key) = std::str::from_utf8(row.key()) else { continue };
        let machine = key.strip_prefix(MACHINE).and_then(|id| id.parse::<MachineId>().ok());
        match (machine, row.is_dead(), row.body()) {
            (Some(id), true, _) => facts.gone.push(id),
            (Some(id), false, Some(body)) => {
                let fact = serde_json::from_slice::<MachineFact>(body.value).ok();
                facts.machines.extend(fact.filter(|fact| fact.id == id && (foreign || fact.host == *host)));
            }
            (None, false, Some(body)) if key == HOST => {
                facts.said = serde_json::from_slice::<HostFact>(body.value).ok().filter(|said| said.id == *host);
            }
            _ => {}
        }
    }
    facts
}

/// Says which state the other rows are, so that readers take whole states only.
#[derive(Serialize, Deserialize)]
struct At {
    generation: Generation,
    entries: usize,
    digest: u64,
}

pub fn of_config(config: &ConfigState) -> Rows {
    let mut rows = Rows::new();
    rows.extend(config.apps.iter().map(|(name, app)| (format!("app/{name}"), json(app))));
    rows.extend(config.machines.iter().map(|(id, machine)| (format!("machine/{id}"), json(machine))));
    rows.extend(config.tombstones.iter().map(|(id, host)| (format!("tombstone/{id}"), json(host))));
    rows.extend(config.asked_for.iter().map(|id| (format!("asked/{id}"), json(&()))));
    rows.extend(config.volumes.iter().map(|(id, volume)| (format!("volume/{id}"), json(volume))));
    let at = At { generation: config.generation, entries: rows.len(), digest: digest(&rows) };
    rows.insert(AT.into(), json(&at));
    rows
}

/// What makes `new` out of `old`.
pub fn difference(old: &Rows, new: &Rows) -> Vec<Change> {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| change(key, None));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(value));
    gone.chain(changed.map(|(key, value)| change(key, Some(value.clone())))).collect()
}

/// The state that rows are, if they are one whole state.
pub fn config<'r>(rows: impl Iterator<Item = &'r Row>) -> Option<ConfigState> {
    let text = |row: &Row| Some((std::str::from_utf8(row.key()).ok()?.to_owned(), row.body()?.value.to_vec()));
    let mut rows: Rows = rows.filter(|row| !row.is_dead()).filter_map(text).collect();
    let at: At = serde_json::from_slice(&rows.remove(AT)?).ok()?;
    if at.entries != rows.len() || at.digest != digest(&rows) {
        return None;
    }
    let mut config = ConfigState { generation: at.generation, ..ConfigState::default() };
    for (key, value) in &rows {
        let (kind, id) = key.split_once('/')?;
        match kind {
            "app" => drop(config.apps.insert(id.parse().ok()?, serde_json::from_slice(value).ok()?)),
            "machine" => drop(config.machines.insert(id.parse().ok()?, serde_json::from_slice(value).ok()?)),
            "tombstone" => drop(config.tombstones.insert(id.parse().ok()?, serde_json::from_slice(value).ok()?)),
            "asked" => drop(config.asked_for.insert(id.parse().ok()?)),
            "volume" => drop(config.volumes.insert(id.parse().ok()?, serde_json::from_slice(value).ok()?)),
            _ => return None,
        }
    }
    Some(config)
}

fn digest(rows: &Rows) -> u64 {
    fnv1a(rows.iter().flat_map(|(key, value)| key.bytes().chain([0]).chain(value.iter().copied()).chain([0])))
}

fn change(key: &str, value: Option<Vec<u8>>) -> Change {
    let topic = Topic::new("").expect("short");
    Change { key: Key::new(key).expect("short"), value: value.map(|value| (topic, value)), seq: None }
}

pub fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}
