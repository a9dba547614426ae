//! A member that says what no reader understands: it has a host's own keys, or control's, and what it says is signed as it
//! should be.

use dunlin_cluster::{Authority, CONFIG_LOG, Member, log_name};
use dunlin_gossip::{Addr, Change, Config, Event, Identity, Input, Key, Name, Node, Now, OriginId, Output, Snapshot, Topic};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// No reader knows it.
const LATER_SCHEMA: u32 = 99;
/// After this a life of a log publishes although it could ask nobody.
const ALONE_MS: u64 = 10_000;

/// Of an app in desired state of a later version, `<it>.localhost`: by it one knows that readers have taken the rest of that.
pub const OTHER_NAME: &str = "later";

/// Goes on with the log of the host whose data this is, and puts what came of it among what `carrier` has seen: from there it
/// spreads as anything does. Both are stopped. What was good in the log stays, and the host has `reserved_mb` taken; gives how many
/// rows nobody can read.
pub fn spread_from(host: &Path, carrier: &Path, reserved_mb: u64) -> u64 {
    let (mut node, member) = node_of(host);
    let origin = OriginId::of(&log_name(&member.host));
    until_it_speaks(&mut node);
    let rows = node.catalogue().log(origin).unwrap().rows().filter(|row| !row.is_dead());
    let mut changes: Vec<Change> = rows.filter_map(|row| {
        let body = row.body()?;
        let value = if row.key() == b"host" { with_reserved(body.value, reserved_mb) } else { body.value.to_vec() };
        Some(change(row.key(), Topic::new(body.topic).unwrap(), value))
    }).collect();
    let bad = bad_rows(member.host.as_str());
    let count = bad.len() as u64;
    changes.extend(bad);
    publish(&mut node, origin, changes, carrier);
    count
}

/// The same with the log of desired state, as a control of a later version would go on with it: all that there was, of which the
/// app has one name more, and entries of which this version can make nothing. `control` is the data of the host that has control.
/// The generation stays: the store is no further, and its control's next word must not be the older one. Gives how many entries
/// nobody can read.
pub fn spread_desired_of(control: &Path, carrier: &Path, app: &str) -> u64 {
    let (mut node, member) = node_of(control);
    let origin = OriginId::of(&Name::new(CONFIG_LOG).unwrap());
    let authority = Authority::load_or_create(&control.join("control/cluster"), wall_ms()).unwrap();
    let incarnation = node.catalogue().epoch(origin).expect("control has spoken");
    let (certificate, key) = authority.config_log(&member.region, incarnation.into());
    node.handle(Input::Own { certificate: Box::new(certificate), key: Box::new(key) }, now(0));
    until_it_speaks(&mut node);

    let rows = node.catalogue().log(origin).unwrap().rows().filter(|row| !row.is_dead());
    let mut rows: BTreeMap<String, Vec<u8>> = rows.filter_map(|row| {
        let key = String::from_utf8(row.key().to_vec()).ok()?;
        Some((key, row.body()?.value.to_vec()))
    }).collect();
    let mut at: Value = serde_json::from_slice(&rows.remove("at").expect("it is whole")).unwrap();
    assert_eq!(at["digest"], sum(&rows), "desired state is summed up in another way by now: this test, too, has to");
    let named = rows.get_mut(&format!("app/{app}")).expect("control has told of the app");
    let mut fact: Value = serde_json::from_slice(named).unwrap();
    fact["hostnames"].as_array_mut().unwrap().push(json!(format!("{OTHER_NAME}.localhost")));
    *named = serde_json::to_vec(&fact).unwrap();
    let bad = bad_entries();
    let count = bad.len() as u64;
    rows.extend(bad);
    at["entries"] = rows.len().into();
    at["digest"] = sum(&rows).into();
    rows.insert("at".into(), serde_json::to_vec(&at).unwrap());

    let topic = || Topic::new("").unwrap();
    let changes = rows.into_iter().map(|(key, value)| change(key.as_bytes(), topic(), value)).collect();
    publish(&mut node, origin, changes, carrier);
    count
}

/// A process with the identity of the member whose data this is, and what that one had seen. It meets nobody.
fn node_of(data: &Path) -> (Node, Member) {
    let dir = data.join("cluster");
    let member = Member::load(&dir).unwrap().expect("it has joined");
    let cluster = member.cluster_key().unwrap();
    let snapshot = Snapshot::decode(cluster, &fs::read(dir.join("flock.snapshot")).unwrap()).unwrap();
    let identity = Identity {
        certificate: member.log_certificate().unwrap(),
        key: member.keys.gossip().unwrap(),
        addr: Addr::new("10.77.0.200:7373").unwrap(),
        life: 7,
    };
    let config = Config { cluster, seed: 1, peers: vec![], membership: false, hold_ms: 50 };
    (Node::new(config, identity, Some(snapshot), now(0)), member)
}

fn until_it_speaks(node: &mut Node) {
    for ms in (0..=ALONE_MS).step_by(50) {
        node.handle(Input::Tick, now(ms));
    }
    assert!(node.speaks());
}

fn publish(node: &mut Node, origin: OriginId, changes: Vec<Change>, carrier: &Path) {
    let outputs = node.handle(Input::Publish { origin, schema: LATER_SCHEMA, changes, at: None }, now(ALONE_MS));
    let is_refusal = |output: &Output| matches!(output, Output::Event(Event::Refused { .. }));
    assert!(!outputs.iter().any(is_refusal), "{outputs:?}");
    fs::write(carrier.join("cluster/flock.snapshot"), node.snapshot()).unwrap();
}

fn now(ms: u64) -> Now {
    Now { ms, wall_ms: wall_ms() }
}

fn wall_ms() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

/// Of entries' rows, as the row `at` has it.
fn sum(rows: &BTreeMap<String, Vec<u8>>) -> String {
    let hash = |(key, value): (&String, &Vec<u8>)| {
        let hash = blake3::hash(&[&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), value].concat());
        u128::from_le_bytes(hash.as_bytes()[..16].try_into().unwrap())
    };
    format!("{:032x}", rows.iter().map(hash).fold(0, u128::wrapping_add))
}

/// Kinds that are yet to come, ids and values that are none, also of kinds that are read in their order.
fn bad_entries() -> Vec<(String, Vec<u8>)> {
    let unreadable: [(&str, &[u8]); 9] = [
        ("moon/1", b"a kind of entry that is yet to come"),
        ("alone", b"{}"),
        ("app/another", br#"{"org": 5}"#),
        ("machine/00000000000001", b"{"),
        ("volume/no id", b"{}"),
        ("tombstone/00000000000002", b"[]"),
        ("secrets/another", &[0xff; 64]),
        ("certificate/999999", b"{"),
        ("revoked/another", b"{}"),
    ];
    unreadable.into_iter().map(|(key, value)| (key.to_owned(), value.to_vec())).collect()
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
