//! A member that says what no reader understands: it has a host's own keys, and what it says is signed as it should be.

use dunlin_cluster::{Member, log_name};
use dunlin_gossip::{Addr, Change, Config, Identity, Input, Key, Node, Now, OriginId, Snapshot, Topic};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// No reader knows it.
const LATER_SCHEMA: u32 = 99;
/// After this a life of a log publishes although it could ask nobody.
const ALONE_MS: u64 = 10_000;

/// Goes on with the log of the host whose data this is, and puts what came of it among what `carrier` has seen: from there it
/// spreads as anything does. Both are stopped. What was good in the log stays, and the host has `reserved_mb` taken; gives how many
/// rows nobody can read.
pub fn spread_from(host: &Path, carrier: &Path, reserved_mb: u64) -> u64 {
    let dir = host.join("cluster");
    let member = Member::load(&dir).unwrap().expect("it has joined");
    let (cluster, origin) = (member.cluster_key().unwrap(), OriginId::of(&log_name(&member.host)));
    let snapshot = Snapshot::decode(cluster, &fs::read(dir.join("flock.snapshot")).unwrap()).unwrap();
    let identity = Identity {
        certificate: member.log_certificate().unwrap(),
        key: member.keys.gossip().unwrap(),
        addr: Addr::new("10.77.0.200:7373").unwrap(),
        life: 7,
    };
    let wall_ms = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    let config = Config { cluster, seed: 1, peers: vec![], membership: false, hold_ms: 50 };
    let mut node = Node::new(config, identity, Some(snapshot), Now { ms: 0, wall_ms: wall_ms() });
    for ms in (0..=ALONE_MS).step_by(50) {
        node.handle(Input::Tick, Now { ms, wall_ms: wall_ms() });
    }
    assert!(node.speaks());
    let rows = node.catalogue().log(origin).unwrap().rows().filter(|row| !row.is_dead());
    let mut changes: Vec<Change> = rows.filter_map(|row| {
        let body = row.body()?;
        let value = if row.key().as_bytes() == b"host" { with_reserved(body.value, reserved_mb) } else { body.value.to_vec() };
        Some(change(row.key().as_bytes(), Topic::new(body.topic).unwrap(), value))
    }).collect();
    let bad = bad_rows(member.host.as_str());
    let count = bad.len() as u64;
    changes.extend(bad);
    node.handle(Input::Publish { origin, schema: LATER_SCHEMA, changes, at: None }, Now { ms: ALONE_MS, wall_ms: wall_ms() });
    fs::write(carrier.join("cluster/flock.snapshot"), node.snapshot()).unwrap();
    count
}

fn with_reserved(value: &[u8], reserved_mb: u64) -> Vec<u8> {
    let mut fact: Value = serde_json::from_slice(value).unwrap();
    fact["memory_reserved_mb"] = reserved_mb.into();
    fact["of_a_later_version"] = json!({ "kept": true });
    serde_json::to_vec(&fact).unwrap()
}

fn bad_rows(host: &str) -> Vec<Change> {
    let nested = "[".repeat(4_000).into_bytes();
    let long = json!({ "id": "x".repeat(4_000) }).to_string().into_bytes();
    let unreadable: [(&[u8], Vec<u8>); 7] = [
        (b"m/00000000000001", b"{".to_vec()),
        (b"m/00000000000002", nested),
        (b"m/00000000000003", json!({ "id": 5, "host": [host], "state": { "running": null } }).to_string().into_bytes()),
        (b"m/00000000000004", long),
        (b"m/00000000000005", vec![0xff; 64]),
        (b"moon/1", b"a kind of row that is yet to come".to_vec()),
        (&[0xff, 0xfe], b"{}".to_vec()),
    ];
    let topic = || Topic::new("web").unwrap();
    unreadable.into_iter().map(|(key, value)| change(key, topic(), value)).collect()
}

fn change(key: &[u8], topic: Topic, value: Vec<u8>) -> Change {
    Change { key: Key::new(key).unwrap(), value: Some((topic, value)), seq: None }
}
