//! What the fuzzer (`fuzz/`) sends through: what a member, or somebody who would be one, may say.

use crate::facts::{Skipped, read};
use crate::{JoinAnswer, JoinRequest, JoinToken, config_rows};
use dunlin_gossip::{Key, Row, Topic};
use dunlin_model::{Generation, HostId};
use std::collections::BTreeMap;

/// One row: a byte that says under which key, and its value.
///
/// # Panics
/// When a host's row says something of another host.
pub fn row(bytes: &[u8]) {
    let Some((kind, value)) = bytes.split_first() else { return };
    let host: HostId = "h1".parse().expect("an id");
    let key = match kind % 4 {
        0 => "host",
        1 => "m/00000000000000",
        2 => "m/no machine",
        _ => "later",
    };
    let topic = Topic::new("web").expect("it is short");
    if let Ok(row) = Row::live(Key::new(key).expect("it is short"), 1, &topic, value) {
        let facts = read(&host, true, &[row], &mut Skipped::default());
        assert!(facts.said.is_none_or(|said| said.id == host));
        assert!(facts.machines.iter().all(|fact| fact.host == host));
    }
}

/// Desired state: lines of a key, a tab and a value.
///
/// # Panics
/// When what was understood is written as something else.
pub fn config(bytes: &[u8]) {
    let mut entries = BTreeMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(at) = line.iter().position(|byte| *byte == b'\t') else { continue };
        if let Ok(key) = std::str::from_utf8(&line[..at]) {
            entries.insert(key.to_owned(), line[at + 1..].to_vec());
        }
    }
    let (state, _) = config_rows::from_entries(Generation::default(), &entries);
    let written = config_rows::entries(&state);
    let (again, unreadable) = config_rows::from_entries(Generation::default(), &written);
    assert_eq!(unreadable, config_rows::Unreadable::default(), "an own entry cannot be read");
    assert_eq!(config_rows::entries(&again), written);
}

/// What comes before anybody is known.
pub fn join(bytes: &[u8]) {
    let _ = serde_json::from_slice::<JoinRequest>(bytes);
    let _ = serde_json::from_slice::<JoinAnswer>(bytes);
    let _ = std::str::from_utf8(bytes).map(str::parse::<JoinToken>);
}
