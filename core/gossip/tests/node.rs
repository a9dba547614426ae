//! A few nodes on a perfect network: what each feature does when nothing goes wrong. Everything else is `tests/sim`'s.

use dunlin_gossip::*;
use ed25519_dalek::SigningKey;
use std::collections::BTreeMap;

struct Flock {
    nodes: Vec<Option<Node>>,
    keys: Vec<(Certificate, SigningKey)>,
    now_ms: u64,
    events: Vec<(usize, Event)>,
    told: BTreeMap<(usize, OriginId), usize>,
}

fn cluster() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

fn certify(name: &str, epoch: u32, seed: u8, (region, scope): (&str, Scope)) -> (Certificate, SigningKey) {
    let key = SigningKey::from_bytes(&[seed; 32]);
    let (name, region) = (Name::new(name).unwrap(), Region::new(region).unwrap());
    let subject = Subject { name, epoch, key: key.verifying_key(), region, scope };
    (Certificate::issue(&cluster(), &subject), key)
}

fn addr(at: usize) -> Addr {
    Addr::new([at as u8]).unwrap()
}

impl Flock {
    fn of(regions: &[&str]) -> Self {
        let keys: Vec<_> = (0..regions.len()).map(|at| certify(&format!("host/{at}"), 1, at as u8 + 10, (regions[at], Scope::Region))).collect();
        let mut flock = Self { nodes: vec![], keys, now_ms: 1_000, events: vec![], told: BTreeMap::new() };
        for at in 0..regions.len() {
            let node = flock.node(at, None);
            flock.nodes.push(Some(node));
        }
        flock.pass(10_000);
        flock
    }

    fn node(&self, at: usize, snapshot: Option<&[u8]>) -> Node {
        let (certificate, key) = self.keys[at].clone();
        let peer = |other: usize| {
            let certificate = &self.keys[other].0;
            Peer { id: certificate.id, region: certificate.region.clone(), addr: addr(other), life: 0, started_ms: 0, renewed: 0 }
        };
        let peers = (0..self.keys.len()).filter(|other| *other != at).map(peer).collect();
        let config = Config { cluster: cluster().verifying_key(), seed: at as u64, peers, membership: true, hold_ms: 20 };
        let snapshot = snapshot.map(|bytes| Snapshot::decode(cluster().verifying_key(), bytes).unwrap());
        Node::new(config, Identity { certificate, key, addr: addr(at), life: self.now_ms + at as u64 }, snapshot, self.now())
    }

    fn now(&self) -> Now {
        Now { ms: self.now_ms, wall_ms: 1_700_000_000_000 + self.now_ms }
    }

    fn handle(&mut self, at: usize, input: Input) {
        let now = self.now();
        let mut inputs = vec![(at, input)];
        while let Some((at, input)) = inputs.pop() {
            let Some(node) = self.nodes.get_mut(at).and_then(Option::as_mut) else { continue };
            for output in node.handle(input, now) {
                match output {
                    Output::Datagram { to, bytes } => inputs.insert(0, (to.as_bytes()[0].into(), Input::Datagram { from: addr(at), bytes })),
                    Output::Stream { to, bytes } => inputs.insert(0, (to.as_bytes()[0].into(), Input::Stream { from: addr(at), bytes })),
                    Output::Changed { origin, rows, .. } => *self.told.entry((at, origin)).or_default() += rows.len(),
                    Output::Event(event) => self.events.push((at, event)),
                }
            }
        }
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.now_ms += 10;
            for at in 0..self.nodes.len() {
                if self.nodes[at].as_ref().is_some_and(|node| node.next_wake_ms() <= self.now_ms) {
                    self.handle(at, Input::Tick);
                }
            }
        }
    }

    fn publish(&mut self, at: usize, changes: &[(&str, Option<&str>)]) {
        let change = |(key, value): &(&str, Option<&str>)| Change {
            key: Key::new(key).unwrap(),
            value: value.map(|value| (Topic::new("shop").unwrap(), value.as_bytes().to_vec())),
            seq: None,
        };
        let changes = changes.iter().map(change).collect();
        self.handle(at, Input::Publish { origin: self.keys[at].0.id, schema: 1, changes, at: None });
        self.pass(10); // pushes of one millisecond go out together
    }

    fn read(&self, at: usize, of: OriginId) -> Vec<String> {
        let log = self.nodes[at].as_ref().and_then(|node| node.catalogue().log(of));
        let text = |row: &Row| format!("{}={}", row.key_of_its_own(), String::from_utf8_lossy(row.body().unwrap().value));
        log.into_iter().flat_map(Log::rows).filter(|row| !row.is_dead()).map(text).collect()
    }

    fn check(&self, readers: &[usize], of: OriginId, expected: &[&str]) {
        for reader in readers {
            assert_eq!(self.read(*reader, of), expected, "at {reader}");
        }
    }
}

#[test]
fn rows_are_in_the_region_at_once_and_stay_there() {
    let mut flock = Flock::of(&["fra", "fra", "fra", "iad"]);
    let id = flock.keys[0].0.id;
    flock.publish(0, &[("a", Some("1")), ("b", Some("2"))]);
    flock.check(&[0, 1, 2], id, &["a=1", "b=2"]);
    flock.publish(0, &[("a", Some("3")), ("b", None)]);
    flock.check(&[0, 1, 2], id, &["a=3"]);
    flock.check(&[3], id, &[]);
    flock.pass(20_000);
    flock.check(&[3], id, &[]);
    for reader in [1, 2] {
        let status = flock.nodes[reader].as_ref().unwrap().status(id).unwrap();
        assert!(status.age_ms.unwrap() < 6_000 && status.lag == 0, "{status:?}");
    }
}

#[test]
fn who_has_the_same_is_known_and_who_has_something_else() {
    let mut flock = Flock::of(&["fra", "fra", "fra", "iad"]);
    let region = |name: &str| Realm::Region(Region::new(name).unwrap());
    let compared = |flock: &Flock, at: usize, realm: &Realm| flock.nodes[at].as_ref().unwrap().compared().into_iter().find(|of| of.realm == *realm);
    let counts = |of: &Compared| (of.equal, of.differ);
    flock.publish(0, &[("a", Some("1"))]);
    flock.pass(20_000);
    let of = compared(&flock, 0, &Realm::Global).unwrap();
    assert_eq!(counts(&of), (3, 0));
    let of = compared(&flock, 0, &region("fra")).unwrap();
    assert!(counts(&of) == (2, 0) && of.age_ms < 2_000, "{of:?}");
    assert_eq!(compared(&flock, 3, &region("iad")), None, "it is alone there");
    // One that takes nothing of a log has something else for as long as that lasts.
    let id = flock.keys[0].0.id;
    flock.handle(1, Input::Remove(id));
    flock.pass(20_000);
    let of = compared(&flock, 1, &region("fra")).unwrap();
    assert!(counts(&of) == (0, 2) && of.age_ms > 15_000, "{of:?}");
    let of = compared(&flock, 2, &region("fra")).unwrap();
    assert!(counts(&of) == (1, 1) && of.age_ms < 2_000, "the others have the same as before: {of:?}");
    // Whoever is gone does not count for longer than a minute.
    flock.nodes[1] = None;
    flock.pass(61_000);
    assert_eq!(counts(&compared(&flock, 2, &region("fra")).unwrap()), (1, 0));
}

#[test]
fn a_log_of_many_chunks_reaches_a_wiped_host() {
    let mut flock = Flock::of(&["fra", "fra", "fra"]);
    let id = flock.keys[0].0.id;
    let (keys, value): (Vec<String>, String) = ((0..3_000).map(|n| format!("m{n:04}")).collect(), "x".repeat(1_000));
    let changes: Vec<(&str, Option<&str>)> = keys.iter().map(|key| (key.as_str(), Some(value.as_str()))).collect();
    flock.publish(0, &changes);
    flock.pass(2_000);
    assert_eq!(flock.read(1, id).len(), 3_000);
    flock.nodes[2] = Some(flock.node(2, None));
    flock.pass(3_000);
    assert_eq!(flock.read(2, id).len(), 3_000);
    assert!(flock.nodes[2].as_ref().unwrap().verify().is_empty());
}

#[test]
fn a_rolled_back_host_goes_on_above_what_others_know() {
    let mut flock = Flock::of(&["fra", "fra", "fra", "fra"]);
    let id = flock.keys[0].0.id;
    flock.publish(0, &[("a", Some("1"))]);
    let old = flock.nodes[0].as_ref().unwrap().snapshot();
    flock.publish(0, &[("a", Some("2")), ("b", Some("2"))]);
    flock.nodes[0] = Some(flock.node(0, Some(&old)));
    let status = flock.nodes[0].as_ref().unwrap().status(flock.keys[1].0.id);
    assert!(status.is_none_or(|status| status.age_ms.is_none()), "what is from disk is unconfirmed");
    flock.publish(0, &[("a", Some("3"))]);
    flock.pass(3_000);
    flock.check(&[0, 1, 2, 3], id, &["a=3"]);
    assert!(!flock.events.iter().any(|(_, event)| matches!(event, Event::Forked { .. } | Event::DuplicateIdentity { .. })));
}

#[test]
fn a_clone_of_a_living_host_is_told_so_and_stays_silent() {
    let mut flock = Flock::of(&["fra", "fra", "fra"]);
    let id = flock.keys[0].0.id;
    flock.publish(0, &[("a", Some("1"))]);
    flock.keys.push(flock.keys[0].clone());
    let clone = flock.node(3, Some(&flock.nodes[0].as_ref().unwrap().snapshot()));
    flock.nodes.push(Some(clone));
    flock.publish(3, &[("a", Some("clone"))]);
    flock.pass(5_000);
    flock.check(&[0, 1, 2], id, &["a=1"]);
    assert!(flock.events.iter().any(|(at, event)| *at == 3 && matches!(event, Event::DuplicateIdentity { .. })));
    flock.publish(0, &[("a", Some("2"))]);
    flock.check(&[1, 2], id, &["a=2"]);
}

#[test]
fn config_is_one_whoever_publishes_it() {
    let mut flock = Flock::of(&["fra", "fra", "iad", "iad"]);
    let (certificate, key) = certify("config/3", 1, 77, ("", Scope::Global));
    for at in [0, 2] {
        flock.handle(at, Input::Own { certificate: certificate.clone().into(), key: key.clone().into() });
    }
    let change = |key: &str, seq: u64| {
        let value = Some((Topic::new("shop").unwrap(), seq.to_string().into_bytes()));
        Change { key: Key::new(key).unwrap(), value, seq: Some(seq) }
    };
    let publish = |since, seq, changes| Input::Publish { origin: certificate.id, schema: 1, changes, at: Some(At { since, seq, floor: 0 }) };
    flock.handle(0, publish(0, 5, vec![change("a", 2), change("b", 5)]));
    flock.pass(1_000);
    flock.handle(2, publish(5, 9, vec![change("a", 9)]));
    flock.handle(0, publish(5, 9, vec![change("a", 9)]));
    flock.pass(1_000);
    flock.check(&[0, 1, 2, 3], certificate.id, &["a=9", "b=5"]);
    // Whole or in steps, it is the same state.
    flock.handle(0, publish(0, 9, vec![change("a", 9), change("b", 5)]));
    flock.pass(1_000);
    assert!(!flock.events.iter().any(|(_, event)| matches!(event, Event::Forked { .. })));
}

#[test]
fn detail_of_another_region_comes_by_subscription() {
    let mut flock = Flock::of(&["fra", "fra", "iad"]);
    let id = flock.keys[0].0.id;
    flock.publish(0, &[("a", Some("1"))]);
    flock.pass(1_000);
    flock.handle(2, Input::Use { region: Region::new("fra").unwrap(), topic: Topic::new("shop").unwrap() });
    flock.pass(3_000);
    flock.check(&[2], id, &["a=1"]);
    flock.publish(0, &[("a", Some("2"))]);
    flock.check(&[2], id, &["a=2"]);
    flock.pass(4_000);
    assert!(flock.nodes[2].as_ref().unwrap().status(id).unwrap().age_ms.unwrap() < 6_000);
    flock.pass(IDLE_MS + 5_000);
    flock.check(&[2], id, &[]);
    assert!(flock.nodes[2].as_ref().unwrap().catalogue().log(id).is_none());
}

#[test]
fn tombstones_go_below_the_floor() {
    let mut flock = Flock::of(&["fra", "fra"]);
    let id = flock.keys[0].0.id;
    for n in 0..600 {
        let key = format!("k{n}");
        flock.publish(0, &[(&key, Some("1"))]);
        flock.publish(0, &[(&key, None)]);
    }
    flock.publish(0, &[("last", Some("1"))]);
    flock.pass(1_000);
    flock.check(&[0, 1], id, &["last=1"]);
    let held = flock.nodes[1].as_ref().unwrap().catalogue().log(id).unwrap().len();
    assert!(held < 300, "{held} rows are held");
}

#[test]
fn a_snapshot_with_a_flipped_bit_is_none() {
    let flock = Flock::of(&["fra", "fra"]);
    let mut bytes = flock.nodes[0].as_ref().unwrap().snapshot();
    assert!(Snapshot::decode(cluster().verifying_key(), &bytes).is_ok());
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    assert!(Snapshot::decode(cluster().verifying_key(), &bytes).is_err());
}

/// A writer of the next version: its rows have fields behind the value, and one has a body of another kind.
#[test]
fn what_a_newer_version_writes_is_kept_and_relayed_as_it_came() {
    let mut flock = Flock::of(&["fra", "fra", "fra"]);
    let (certificate, key) = certify("host/new", 1, 88, ("fra", Scope::Region));
    let more_fields: &[u8] = &[1, b'a', 1, 0, 4, b's', b'h', b'o', b'p', 1, b'v', 9, 9, 9];
    let other_body: &[u8] = &[1, b'b', 2, 0, 0xff, 0xff, 0xff];
    let mut lanes = LtHash::default();
    [more_fields, other_body].iter().for_each(|row| lanes.add(row));
    let is = Statement {
        id: certificate.id, epoch: 1, seq: 2, floor: 0, digest: lanes.digest(), schema: 9, time_ms: 1, life: 5, chain: 0, anchor: [0; 16],
    };
    let head = Head::sign(&key, is);
    let batch = Batch { certificate: Some(certificate.clone()), head, after: Cursor::START, rows: vec![], more: More::Last };
    let mut bytes = Message::Batches(vec![batch]).encode();
    bytes.truncate(bytes.len() - 2); // no rows, the last part
    bytes.push(2);
    for row in [more_fields, other_body] {
        bytes.push(row.len() as u8);
        bytes.extend_from_slice(row);
    }
    bytes.push(0);
    flock.handle(0, Input::Stream { from: addr(9), bytes });
    flock.pass(3_000);
    for reader in 0..3 {
        let node = flock.nodes[reader].as_ref().unwrap();
        let rows: Vec<&[u8]> = node.catalogue().log(certificate.id).unwrap().rows().map(Row::raw).collect();
        assert_eq!(rows, [more_fields, other_body], "at {reader}");
        let log = node.catalogue().log(certificate.id).unwrap();
        let bodies: Vec<Option<&[u8]>> = log.rows().map(|row| row.body().map(|body| body.value)).collect();
        assert_eq!(bodies, [Some(&b"v"[..]), None]);
        assert_eq!(node.counters().unread_rows, 1);
    }
}
