//! What the fuzzer (`fuzz/`) sends through: what a member, or somebody who would be one, may say.

use crate::facts::{Skipped, read_host, read_machines};
use crate::{JoinAnswer, JoinRequest, JoinToken, config_rows};
use dunlin_gossip::{Change, Key, Row, Topic};
use dunlin_model::{Generation, HostId, Region};
use dunlin_view::ConfigState;
use std::collections::BTreeMap;

/// One row of either log of a host: a byte that says under which key, and its value.
///
/// # Panics
/// When a host's row says something of another host, or of a region that is not its own.
pub fn row(bytes: &[u8]) {
    let Some((kind, value)) = bytes.split_first() else { return };
    let host: HostId = "h1".parse().expect("an id");
    let region: Region = "fra".parse().expect("a region");
    let key = match kind % 6 {
        0 => "host",
        1 => "m/00000000000000",
        2 => "m/no machine",
        3 => "app/web",
        4 => "app/No App",
        _ => "later",
    };
    let topic = Topic::new("web").expect("it is short");
    if let Ok(row) = Row::live(Key::new(key).expect("it is short"), 1, &topic, value) {
        let (rows, mut skipped) = ([row], Skipped::default());
        let (said, report) = read_host(&host, Some(region.clone()), true, &rows, &mut skipped);
        assert!(said.is_none_or(|said| said.id == host));
        assert!(report.is_none_or(|report| report.host == host && report.region == region));
        let facts = read_machines(&host, true, &rows, &mut skipped);
        assert!(facts.said.is_none() && facts.machines.iter().all(|fact| fact.host == host));
    }
}

/// Desired state: lines of a key, a tab and a value.
///
/// # Panics
/// When what was understood is read as something else by others.
pub fn config(bytes: &[u8]) {
    let mut state = ConfigState { generation: Generation { incarnation: 1, revision: 1 }, ..ConfigState::default() };
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some(at) = line.iter().position(|byte| *byte == b'\t') else { continue };
        if let Ok(key) = std::str::from_utf8(&line[..at]) {
            let _ = config_rows::insert(&mut state, key, &line[at + 1..]);
        }
    }
    // What has an order has that of its keys from then on.
    let read = published(&state);
    assert_eq!(published(&read), read);
}

fn published(state: &ConfigState) -> ConfigState {
    let (changes, _) = config_rows::Published::default().next(state);
    let (mut reader, mut rows) = (config_rows::Reader::default(), BTreeMap::new());
    for Change { key, value, .. } in changes {
        let (topic, value) = value.expect("nothing was there before");
        let row = Row::live(key.clone(), 1, &topic, &value).expect("rows that are published are no longer than they may be");
        reader.take(false, &[row]);
        rows.insert(key, value);
    }
    let value = |key: &str| rows.get(&Key::new(key).ok()?).map(Vec::as_slice);
    let whole = reader.read(value).expect("all of it has come");
    assert_eq!(whole.unreadable, [] as [String; 0], "an own entry cannot be read");
    whole.config
}

/// What comes before anybody is known.
pub fn join(bytes: &[u8]) {
    let _ = serde_json::from_slice::<JoinRequest>(bytes);
    let _ = serde_json::from_slice::<JoinAnswer>(bytes);
    let _ = std::str::from_utf8(bytes).map(str::parse::<JoinToken>);
}
