//! Desired state as rows of the log `config/0`: one entry of the projection a row, in numbered pieces where it is longer.
//!
//! The row `at` says which generation the others are, how many they are, and a sum over them, so that readers take whole states
//! only. Where they come from is the log's signature's business.

use dunlin_gossip::{Change, Key, MAX_VALUE_BYTES, Topic};
use dunlin_model::{AppName, Generation, HostId, MachineId, VolumeId};
use dunlin_view::{CertificateFact, ConfigState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

const AT: &str = "at";
/// Between an entry's key and the number of a piece; no id has it.
const PIECE: char = '#';
/// So many pieces are 40 MB: a longer entry is an error of whoever wrote it.
const MAX_PIECES: usize = 10_000;

/// Entries that this version cannot read. They are left out, and the rest is taken.
pub type Unreadable = Vec<String>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct At {
    generation: Generation,
    entries: usize,
    digest: String,
}

/// A config state as entries: key to JSON. The generation is not among them.
pub fn entries(config: &ConfigState) -> BTreeMap<String, Vec<u8>> {
    let mut entries = BTreeMap::new();
    let mut put = |key: String, value: Vec<u8>| drop(entries.insert(key, value));
    // Whoever adds a field is told here: what is no entry does not reach other hosts.
    let ConfigState {
        generation: _,
        apps,
        machines,
        tombstones,
        asked_for,
        volumes,
        volume_tombstones,
        secrets,
        certificates,
        revoked_tokens,
        removed_hosts,
        platform,
    } = config;
    apps.iter().for_each(|(name, app)| put(format!("app/{name}"), json(app)));
    machines.iter().for_each(|(id, machine)| put(format!("machine/{id}"), json(machine)));
    tombstones.iter().for_each(|(id, host)| put(format!("tombstone/{id}"), json(host)));
    asked_for.iter().for_each(|id| put(format!("asked/{id}"), json(&())));
    volumes.iter().for_each(|(id, volume)| put(format!("volume/{id}"), json(volume)));
    volume_tombstones.iter().for_each(|(id, host)| put(format!("volume_tombstone/{id}"), json(host)));
    secrets.iter().for_each(|(app, facts)| put(format!("secrets/{app}"), json(facts)));
    certificates.iter().enumerate().for_each(|(at, certificate)| put(format!("certificate/{at:06}"), json(certificate)));
    revoked_tokens.iter().for_each(|id| put(format!("revoked/{}", short(id)), json(id)));
    removed_hosts.iter().for_each(|host| put(format!("removed_host/{host}"), json(&())));
    platform.iter().for_each(|fact| put("platform/".into(), json(fact)));
    entries
}

/// The counterpart of [`entries`]. Revoked tokens come in the order of their keys.
pub fn from_entries(generation: Generation, entries: &BTreeMap<String, Vec<u8>>) -> (ConfigState, Unreadable) {
    let mut config = ConfigState { generation, ..ConfigState::default() };
    let mut unreadable = vec![];
    for (key, value) in entries {
        if take(&mut config, key, value).is_none() {
            unreadable.push(key.clone());
        }
    }
    (config, unreadable)
}

fn take(config: &mut ConfigState, key: &str, value: &[u8]) -> Option<()> {
    let (kind, id) = key.split_once('/')?;
    match kind {
        "app" => drop(config.apps.insert(parse::<AppName>(id)?, read(value)?)),
        "machine" => drop(config.machines.insert(parse::<MachineId>(id)?, read(value)?)),
        "tombstone" => drop(config.tombstones.insert(parse::<MachineId>(id)?, read(value)?)),
        "asked" => drop(config.asked_for.insert(parse::<MachineId>(id)?)),
        "volume" => drop(config.volumes.insert(parse::<VolumeId>(id)?, read(value)?)),
        "volume_tombstone" => drop(config.volume_tombstones.insert(parse::<VolumeId>(id)?, read(value)?)),
        "secrets" => drop(config.secrets.insert(parse::<AppName>(id)?, read(value)?)),
        "certificate" => config.certificates.push(read::<CertificateFact>(value)?),
        "revoked" => config.revoked_tokens.push(read(value)?),
        "platform" => config.platform = Some(read(value)?),
        "removed_host" => drop(config.removed_hosts.insert(parse::<HostId>(id)?)),
        _ => return None,
    }
    Some(())
}

/// All rows of a config state, `at` included.
pub(crate) fn rows(config: &ConfigState) -> BTreeMap<String, Vec<u8>> {
    let mut rows = BTreeMap::new();
    for (key, value) in entries(config) {
        if value.len() <= MAX_VALUE_BYTES {
            rows.insert(key, value);
            continue;
        }
        let pieces = value.chunks(MAX_VALUE_BYTES).enumerate();
        rows.extend(pieces.map(|(at, piece)| (format!("{key}{PIECE}{at:04}"), piece.to_vec())));
    }
    let at = At { generation: config.generation, entries: rows.len(), digest: digest(&rows) };
    rows.insert(AT.into(), json(&at));
    rows
}

/// What makes `new` out of `old`.
pub(crate) fn difference(old: &BTreeMap<String, Vec<u8>>, new: &BTreeMap<String, Vec<u8>>) -> Vec<Change> {
    let change = |key: &String, value: Option<&Vec<u8>>| {
        let topic = Topic::new("").expect("it is short");
        let value = value.map(|value| (topic, value.clone()));
        Change { key: Key::new(key).expect("ids are shorter than a key may be"), value, seq: None }
    };
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| change(key, None));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(value)).map(|(key, value)| change(key, Some(value)));
    gone.chain(changed).collect()
}

/// The state that rows are, if they are one whole state.
pub(crate) fn assemble(mut rows: BTreeMap<String, Vec<u8>>) -> Option<(ConfigState, Unreadable)> {
    let at: At = read(&rows.remove(AT)?)?;
    if at.entries != rows.len() || at.digest != digest(&rows) {
        return None;
    }
    let mut entries: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (key, value) in rows {
        match key.split_once(PIECE) {
            None => drop(entries.insert(key, value)),
            // In the order of their numbers, which is that of their keys.
            Some((entry, number)) if number.parse::<usize>().is_ok_and(|number| number < MAX_PIECES) => {
                entries.entry(entry.to_owned()).or_default().extend_from_slice(&value);
            }
            Some(_) => return None,
        }
    }
    Some(from_entries(at.generation, &entries))
}

fn digest(rows: &BTreeMap<String, Vec<u8>>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (key, value) in rows {
        for part in [key.as_bytes(), value] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// A token's id is whatever its maker took: bounded here.
fn short(id: &str) -> String {
    blake3::hash(id.as_bytes()).to_hex()[..32].to_owned()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}

fn read<T: DeserializeOwned>(value: &[u8]) -> Option<T> {
    serde_json::from_slice(value).ok()
}

fn parse<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_view::{AppFact, PlatformFact, SecretsFact};
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    fn machine(byte: u8) -> MachineId {
        MachineId::from_random([byte; 7])
    }

    prop_compose! {
        fn app()(hostnames in vec("[a-z]{1,9}", 0..4), current_release in any::<u32>()) -> AppFact {
            AppFact { org: "personal".parse().unwrap(), hostnames, current_release, created_at_ms: 7 }
        }
    }

    prop_compose! {
        /// Some longer than a row, some than several, some as long as one.
        fn secrets()(sealed in prop_oneof!["[a-z]{0,40}", "[a-z]{3990,4100}", "[a-z]{9000,20000}"], version in any::<u64>()) -> SecretsFact {
            SecretsFact { host: "h1".parse().unwrap(), version, sealed }
        }
    }

    prop_compose! {
        fn certificate()(names in vec("[a-z]{1,9}", 0..3), chain_pem in "[a-z]{0,9000}") -> CertificateFact {
            CertificateFact { names, chain_pem, sealed_key: "key".into(), sealed: BTreeMap::from([("h1".parse().unwrap(), "k".into())]), not_after_ms: 5 }
        }
    }

    prop_compose! {
        fn config()(
            revision in 1..1_000_u64,
            apps in btree_map("[a-z]{1,9}", app(), 0..4),
            secrets in btree_map("[a-z]{1,9}", vec(secrets(), 0..4), 0..3),
            certificates in vec(certificate(), 0..12),
            tombstones in btree_set(any::<u8>(), 0..6),
            revoked in btree_set("[ -~]{0,300}", 0..4),
            removed in btree_set("[a-z]{1,9}", 0..4),
        ) -> ConfigState {
            let mut revoked_tokens: Vec<String> = revoked.into_iter().collect();
            revoked_tokens.sort_by_key(|id| short(id));
            ConfigState {
                generation: Generation { incarnation: 1, revision },
                apps: apps.into_iter().map(|(name, app)| (name.parse().unwrap(), app)).collect(),
                asked_for: tombstones.iter().map(|byte| machine(*byte)).collect(),
                tombstones: tombstones.iter().map(|byte| (machine(*byte), "h1".parse().unwrap())).collect(),
                volume_tombstones: tombstones.iter().map(|byte| (VolumeId::from_random([*byte; 8]), "h2".parse().unwrap())).collect(),
                secrets: secrets.into_iter().map(|(app, facts)| (app.parse().unwrap(), facts)).collect(),
                certificates,
                revoked_tokens,
                platform: (revision % 2 == 0).then(|| PlatformFact { control: "h1".parse().unwrap(), token_key: "00".repeat(32) }),
                removed_hosts: removed.into_iter().map(|host| host.parse().unwrap()).collect(),
                ..ConfigState::default()
            }
        }
    }

    fn apply(rows: &mut BTreeMap<String, Vec<u8>>, changes: Vec<Change>) {
        for Change { key, value, .. } in changes {
            let key = String::from_utf8(key.as_bytes().to_vec()).unwrap();
            match value {
                Some((_, value)) => drop(rows.insert(key, value)),
                None => drop(rows.remove(&key)),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_state_is_its_entries(config in config()) {
            prop_assert_eq!(from_entries(config.generation, &entries(&config)), (config, vec![]));
        }

        #[test]
        fn readers_who_follow_the_differences_see_each_state_whole(states in vec(config(), 1..4)) {
            let (mut held, mut published) = (BTreeMap::new(), BTreeMap::new());
            for state in states {
                let next = rows(&state);
                prop_assert!(next.iter().all(|(key, value)| key.len() <= 128 && value.len() <= MAX_VALUE_BYTES));
                apply(&mut held, difference(&published, &next));
                published = next;
                prop_assert_eq!(assemble(held.clone()), Some((state, vec![])));
            }
        }

        #[test]
        fn half_a_state_is_none(config in config(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let whole = rows(&config);
            let key = at.get(&whole.keys().cloned().collect::<Vec<_>>()).clone();
            let mut without = whole.clone();
            without.remove(&key);
            prop_assert_eq!(assemble(without), None);
            let mut other = whole.clone();
            other.entry(key.clone()).or_default().push(byte);
            // White space behind the row `at` changes nothing that it says.
            prop_assume!(key != AT || !byte.is_ascii_whitespace());
            prop_assert_eq!(assemble(other), None);
        }
    }

    #[test]
    fn what_a_later_version_says_beside_it_is_left_out_and_named() {
        let mut entries = entries(&ConfigState { removed_hosts: ["h9".parse().unwrap()].into(), ..ConfigState::default() });
        entries.insert("moon/phase".into(), b"1".to_vec());
        entries.insert("app/web".into(), b"{}".to_vec());
        let (config, unreadable) = from_entries(Generation::default(), &entries);
        assert_eq!(unreadable, ["app/web", "moon/phase"]);
        assert!(config.apps.is_empty() && config.removed_hosts.len() == 1);
    }
}
