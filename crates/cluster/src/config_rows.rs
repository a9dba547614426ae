//! Desired state as rows of the log `config/0`: one entry of the projection a row, in numbered pieces where it is longer.
//!
//! ```text
//! writer: state, next state --> entries that differ --> changed rows and the row `at` --> one signed head of the log
//! reader: changed rows --> the sum is that of `at`? --> decodes the entries that differ, shares all others
//! ```
//!
//! The row `at` says which generation the others are, how many they are, and a sum of their hashes, which follows each change
//! without looking at the rest; so readers take whole states only. The sum finds mistakes, not forgers: where rows come from,
//! and that they are those that were signed, is the log's business.

use dunlin_gossip::{Change, Key, MAX_VALUE_BYTES, Row, Topic};
use dunlin_model::{AppName, Generation, HostId, MachineId, VolumeId};
use dunlin_view::{CertificateFact, ConfigState, PlatformFact};
use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet, Vector};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::str::FromStr;

const AT: &str = "at";
/// Between an entry's key and the number of a piece; no id has it.
const PIECE: char = '#';
/// So many pieces are 40 MB: a longer entry is an error of whoever wrote it.
const MAX_PIECES: usize = 10_000;
/// Kinds that have an order: one change reads all of them again. The state's is that of their keys.
const CERTIFICATE: &str = "certificate";
const REVOKED: &str = "revoked";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct At {
    generation: Generation,
    entries: usize,
    digest: String,
}

/// Of a set of rows, whatever their order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    rows: usize,
    hashes: u128,
}

impl Sum {
    fn add(&mut self, hash: u128) {
        (self.rows, self.hashes) = (self.rows + 1, self.hashes.wrapping_add(hash));
    }

    fn remove(&mut self, hash: u128) {
        (self.rows, self.hashes) = (self.rows - 1, self.hashes.wrapping_sub(hash));
    }

    fn at(&self, generation: Generation) -> At {
        At { generation, entries: self.rows, digest: format!("{:032x}", self.hashes) }
    }
}

// ---- the writer

/// What a writer has said: of the next state it says what differs.
#[derive(Clone, Default)]
pub(crate) struct Published {
    config: ConfigState,
    sum: Sum,
}

impl Published {
    /// The changes of rows that make `next` out of it, and what is published then.
    pub fn next(&self, next: &ConfigState) -> (Vec<Change>, Self) {
        let mut sum = self.sum;
        let mut changes = vec![];
        for Entry { key, old, new } in differences(&self.config, next) {
            let (old, new) = (pieces(&key, old), pieces(&key, new));
            for (key, value) in old.iter().filter(|(key, value)| new.get(*key) != Some(value)) {
                sum.remove(hash(key, value));
                if !new.contains_key(key) {
                    changes.push(change(key, None));
                }
            }
            for (key, value) in new.into_iter().filter(|(key, value)| old.get(key) != Some(value)) {
                sum.add(hash(&key, &value));
                changes.push(change(&key, Some(value)));
            }
        }
        changes.push(change(AT, Some(json(&sum.at(next.generation)))));
        (changes, Self { config: next.clone(), sum })
    }
}

/// One that differs between two states, as JSON; `None` where it is not there.
struct Entry {
    key: String,
    old: Option<Vec<u8>>,
    new: Option<Vec<u8>>,
}

/// What two states share is not looked at. The generation is no entry.
fn differences(old: &ConfigState, new: &ConfigState) -> Vec<Entry> {
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
    } = new;
    let mut found = vec![];
    of_map("app", &old.apps, apps, &mut found);
    of_map("machine", &old.machines, machines, &mut found);
    of_map("tombstone", &old.tombstones, tombstones, &mut found);
    of_set("asked", &old.asked_for, asked_for, &mut found);
    of_map("volume", &old.volumes, volumes, &mut found);
    of_map("volume_tombstone", &old.volume_tombstones, volume_tombstones, &mut found);
    of_map("secrets", &old.secrets, secrets, &mut found);
    if old.certificates != *certificates {
        let numbered = |all: &Vector<CertificateFact>| -> OrdMap<String, CertificateFact> { all.iter().enumerate().map(|(at, fact)| (format!("{at:06}"), fact.clone())).collect() };
        of_map(CERTIFICATE, &numbered(&old.certificates), &numbered(certificates), &mut found);
    }
    if old.revoked_tokens != *revoked_tokens {
        let named = |all: &Vector<String>| -> OrdMap<String, String> { all.iter().map(|id| (short(id), id.clone())).collect() };
        of_map(REVOKED, &named(&old.revoked_tokens), &named(revoked_tokens), &mut found);
    }
    of_set("removed_host", &old.removed_hosts, removed_hosts, &mut found);
    let named = |fact: &Option<PlatformFact>| -> OrdMap<String, PlatformFact> { fact.iter().map(|fact| (String::new(), fact.clone())).collect() };
    of_map("platform", &named(&old.platform), &named(platform), &mut found);
    found
}

fn of_map<K: Ord + Display, V: PartialEq + Serialize>(kind: &str, old: &OrdMap<K, V>, new: &OrdMap<K, V>, found: &mut Vec<Entry>) {
    found.extend(old.diff(new).map(|item| {
        let (id, old, new) = match item {
            DiffItem::Add(id, value) => (id, None, Some(value)),
            DiffItem::Update { old: (id, old), new: (_, new) } => (id, Some(old), Some(new)),
            DiffItem::Remove(id, value) => (id, Some(value), None),
        };
        Entry { key: format!("{kind}/{id}"), old: old.map(json), new: new.map(json) }
    }));
}

fn of_set<K: Ord + Clone + Display>(kind: &str, old: &OrdSet<K>, new: &OrdSet<K>, found: &mut Vec<Entry>) {
    if old != new {
        let with_nothing = |set: &OrdSet<K>| -> OrdMap<K, ()> { set.iter().map(|id| (id.clone(), ())).collect() };
        of_map(kind, &with_nothing(old), &with_nothing(new), found);
    }
}

/// The rows of an entry.
fn pieces(key: &str, value: Option<Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    match value {
        None => BTreeMap::new(),
        Some(value) if value.len() <= MAX_VALUE_BYTES => BTreeMap::from([(key.to_owned(), value)]),
        Some(value) => value.chunks(MAX_VALUE_BYTES).enumerate().map(|(at, piece)| (format!("{key}{PIECE}{at:04}"), piece.to_vec())).collect(),
    }
}

fn change(key: &str, value: Option<Vec<u8>>) -> Change {
    let topic = Topic::new("").expect("it is short");
    let value = value.map(|value| (topic, value));
    Change { key: Key::new(key).expect("ids are shorter than a key may be"), value, seq: None }
}

// ---- the reader

/// The last whole state, and what has come since.
#[derive(Default)]
pub(crate) struct Reader {
    at: Option<At>,
    /// The hash of each row that the log has, but for `at`.
    hashes: BTreeMap<String, u128>,
    sum: Sum,
    /// Entries whose rows are others than those that `config` was read from.
    changed: BTreeSet<String>,
    config: ConfigState,
    unreadable: BTreeSet<String>,
}

/// A whole state, with the entries that this version cannot read and that it could, or that were not there, before. They are
/// left out.
pub(crate) struct Whole {
    pub config: ConfigState,
    pub unreadable: Vec<String>,
}

impl Reader {
    /// What the log says is new. With `whole`, what is not among the rows is not there any more.
    pub fn take(&mut self, whole: bool, rows: &[Row]) {
        if whole {
            let named: BTreeSet<&[u8]> = rows.iter().map(|row| row.key()).collect();
            let gone: Vec<String> = self.hashes.keys().filter(|key| !named.contains(key.as_bytes())).cloned().collect();
            gone.iter().for_each(|key| self.put(key, None));
            self.at = self.at.take().filter(|_| named.contains(AT.as_bytes()));
        }
        for row in rows {
            let Ok(key) = std::str::from_utf8(row.key()) else { continue };
            let value = row.body().filter(|_| !row.is_dead()).map(|body| body.value);
            if key == AT {
                self.at = value.and_then(read);
            } else {
                self.put(key, value.map(|value| hash(key, value)));
            }
        }
    }

    fn put(&mut self, key: &str, hash: Option<u128>) {
        let held = match hash {
            Some(hash) => self.hashes.insert(key.to_owned(), hash),
            None => self.hashes.remove(key),
        };
        if held != hash {
            held.into_iter().for_each(|held| self.sum.remove(held));
            hash.into_iter().for_each(|hash| self.sum.add(hash));
            self.changed.insert(entry_of(key).to_owned());
        }
    }

    /// The state that the rows are, if they are one whole state. `value` gives what a row says.
    pub fn read<'a>(&mut self, value: impl Fn(&str) -> Option<&'a [u8]>) -> Option<Whole> {
        let at = self.at.as_ref().filter(|at| **at == self.sum.at(at.generation))?;
        self.config.generation = at.generation;
        let changed = std::mem::take(&mut self.changed);
        let of_kind = |kind: &str| changed.iter().any(|entry| entry.split('/').next() == Some(kind));
        let in_order = [CERTIFICATE, REVOKED].into_iter().filter(|kind| of_kind(kind)).flat_map(|kind| self.entries_of(kind));
        let changed: BTreeSet<String> = in_order.chain(changed.iter().cloned()).collect();
        if of_kind(CERTIFICATE) {
            self.config.certificates.clear();
        }
        if of_kind(REVOKED) {
            self.config.revoked_tokens.clear();
        }
        let mut unreadable = vec![];
        for entry in changed {
            let told = self.unreadable.remove(&entry);
            let Some(value) = self.value_of(&entry, &value) else {
                remove(&mut self.config, &entry);
                continue;
            };
            if insert(&mut self.config, &entry, &value).is_none() {
                remove(&mut self.config, &entry);
                self.unreadable.insert(entry.clone());
                unreadable.extend(Some(entry).filter(|_| !told));
            }
        }
        Some(Whole { config: self.config.clone(), unreadable })
    }

    /// In the order of their keys.
    fn entries_of(&self, kind: &str) -> BTreeSet<String> {
        let of_kind = self.hashes.range(format!("{kind}/")..).map(|(key, _)| entry_of(key));
        of_kind.take_while(|entry| entry.split('/').next() == Some(kind)).map(str::to_owned).collect()
    }

    /// `None`: it has no rows. Pieces come in the order of their numbers, which is that of their keys.
    fn value_of<'a>(&self, entry: &str, value: &impl Fn(&str) -> Option<&'a [u8]>) -> Option<Vec<u8>> {
        if self.hashes.contains_key(entry) {
            return value(entry).map(<[u8]>::to_vec);
        }
        let first = format!("{entry}{PIECE}");
        let pieces = self.hashes.range(first.clone()..).map(|(key, _)| key).take_while(|key| key.starts_with(&first));
        let pieces: Vec<&[u8]> = pieces.take(MAX_PIECES).filter_map(|key| value(key)).collect();
        (!pieces.is_empty()).then(|| pieces.concat())
    }
}

fn entry_of(key: &str) -> &str {
    key.split_once(PIECE).map_or(key, |(entry, _)| entry)
}

pub(crate) fn insert(config: &mut ConfigState, entry: &str, value: &[u8]) -> Option<()> {
    let (kind, id) = entry.split_once('/')?;
    match kind {
        "app" => drop(config.apps.insert(parse::<AppName>(id)?, read(value)?)),
        "machine" => drop(config.machines.insert(parse::<MachineId>(id)?, read(value)?)),
        "tombstone" => drop(config.tombstones.insert(parse::<MachineId>(id)?, read(value)?)),
        "asked" => drop(config.asked_for.insert(parse::<MachineId>(id)?)),
        "volume" => drop(config.volumes.insert(parse::<VolumeId>(id)?, read(value)?)),
        "volume_tombstone" => drop(config.volume_tombstones.insert(parse::<VolumeId>(id)?, read(value)?)),
        "secrets" => drop(config.secrets.insert(parse::<AppName>(id)?, read(value)?)),
        CERTIFICATE => config.certificates.push_back(read::<CertificateFact>(value)?),
        REVOKED => config.revoked_tokens.push_back(read(value)?),
        "platform" => config.platform = Some(read(value)?),
        "removed_host" => drop(config.removed_hosts.insert(parse::<HostId>(id)?)),
        _ => return None,
    }
    Some(())
}

/// Kinds that have an order were cleared before.
fn remove(config: &mut ConfigState, entry: &str) -> Option<()> {
    let (kind, id) = entry.split_once('/')?;
    match kind {
        "app" => drop(config.apps.remove(&parse::<AppName>(id)?)),
        "machine" => drop(config.machines.remove(&parse::<MachineId>(id)?)),
        "tombstone" => drop(config.tombstones.remove(&parse::<MachineId>(id)?)),
        "asked" => drop(config.asked_for.remove(&parse::<MachineId>(id)?)),
        "volume" => drop(config.volumes.remove(&parse::<VolumeId>(id)?)),
        "volume_tombstone" => drop(config.volume_tombstones.remove(&parse::<VolumeId>(id)?)),
        "secrets" => drop(config.secrets.remove(&parse::<AppName>(id)?)),
        "removed_host" => drop(config.removed_hosts.remove(&parse::<HostId>(id)?)),
        "platform" => config.platform = None,
        _ => {}
    }
    Some(())
}

fn hash(key: &str, value: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes()).update(value);
    u128::from_le_bytes(hasher.finalize().as_bytes()[..16].try_into().expect("a hash has 32 bytes"))
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
    use dunlin_view::{AppFact, SecretsFact};
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
                certificates: certificates.into(),
                revoked_tokens: revoked_tokens.into(),
                platform: (revision % 2 == 0).then(|| PlatformFact { control: "h1".parse().unwrap(), token_key: "00".repeat(32) }),
                removed_hosts: removed.into_iter().map(|host| host.parse().unwrap()).collect(),
                ..ConfigState::default()
            }
        }
    }

    /// A log's rows at a reader.
    #[derive(Default)]
    struct Held {
        rows: BTreeMap<String, Vec<u8>>,
        reader: Reader,
    }

    impl Held {
        fn take(&mut self, changes: Vec<Change>) {
            for Change { key, value, .. } in changes {
                let name = String::from_utf8(key.as_bytes().to_vec()).unwrap();
                let row = match value {
                    Some((topic, value)) => {
                        let row = Row::live(key, 1, &topic, &value).unwrap();
                        self.rows.insert(name, value);
                        row
                    }
                    None => {
                        self.rows.remove(&name);
                        Row::tombstone(key, 1)
                    }
                };
                self.reader.take(false, &[row]);
            }
        }

        fn read(&mut self) -> Option<(ConfigState, Vec<String>)> {
            let Self { rows, reader } = self;
            reader.read(|key| rows.get(key).map(Vec::as_slice)).map(|whole| (whole.config, whole.unreadable))
        }
    }

    fn whole(config: &ConfigState) -> Held {
        let mut held = Held::default();
        held.take(Published::default().next(config).0);
        held
    }

    fn all_rows(rows: &BTreeMap<String, Vec<u8>>) -> Vec<Row> {
        rows.iter().map(|(key, value)| Row::live(Key::new(key).unwrap(), 1, &Topic::new("").unwrap(), value).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn readers_who_follow_the_differences_see_each_state_whole(states in vec(config(), 1..4)) {
            let (mut held, mut published) = (Held::default(), Published::default());
            for state in states {
                let (changes, next) = published.next(&state);
                let short = |change: &Change| change.key.as_bytes().len() <= 128 && change.value.as_ref().is_none_or(|(_, value)| value.len() <= MAX_VALUE_BYTES);
                prop_assert!(changes.iter().all(short));
                held.take(changes);
                published = next;
                prop_assert_eq!(held.read(), Some((state.clone(), vec![])));
                prop_assert_eq!(&held.rows, &whole(&state).rows, "the rows are a function of the state");
            }
        }

        #[test]
        fn who_is_given_the_whole_is_where_those_are_who_followed(before in config(), state in config()) {
            let mut held = whole(&before);
            prop_assert_eq!(held.read(), Some((before, vec![])));
            held.rows = whole(&state).rows;
            held.reader.take(true, &all_rows(&held.rows));
            prop_assert_eq!(held.read(), Some((state, vec![])));
        }

        #[test]
        fn half_a_state_is_none(config in config(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let rows = whole(&config).rows;
            let key = at.get(&rows.keys().cloned().collect::<Vec<_>>()).clone();
            let mut without = whole(&config);
            without.take(vec![change(&key, None)]);
            prop_assert_eq!(without.read(), None);
            let mut value = rows[&key].clone();
            value.pop();
            value.push(byte);
            prop_assume!(value != rows[&key]);
            let mut other = whole(&config);
            other.take(vec![change(&key, Some(value))]);
            prop_assert_eq!(other.read(), None);
            other.take(vec![change(&key, Some(rows[&key].clone()))]);
            prop_assert_eq!(other.read(), Some((config, vec![])));
        }
    }

    #[test]
    fn one_entry_of_many_is_two_rows() {
        let mut state = ConfigState { removed_hosts: (0..1_000).map(|number| format!("h{number}").parse().unwrap()).collect(), ..ConfigState::default() };
        let (all, published) = Published::default().next(&state);
        state.removed_hosts.insert("moon".parse().unwrap());
        assert_eq!((all.len(), published.next(&state).0.len()), (1_001, 2));
    }

    #[test]
    fn what_a_later_version_says_beside_it_is_left_out_and_named_once() {
        let config = ConfigState { removed_hosts: ["h9".parse().unwrap()].into_iter().collect(), ..ConfigState::default() };
        let mut held = whole(&config);
        let mut sum = held.reader.sum;
        for (key, value) in [("moon/phase", "1"), ("app/web", "{}")] {
            sum.add(hash(key, value.as_bytes()));
            held.take(vec![change(key, Some(value.into()))]);
        }
        let at = |generation, sum: Sum| change(AT, Some(json(&sum.at(generation))));
        held.take(vec![at(Generation::default(), sum)]);
        assert_eq!(held.read(), Some((config.clone(), vec!["app/web".into(), "moon/phase".into()])));
        let later = Generation { incarnation: 1, revision: 1 };
        held.take(vec![at(later, sum)]);
        assert_eq!(held.read(), Some((ConfigState { generation: later, ..config }, vec![])));
    }
}
