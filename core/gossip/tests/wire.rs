//! What is written is read; what is not ours never panics; what is newer than us is handed on as it came.

use dunlin_gossip::*;
use ed25519_dalek::SigningKey;
use proptest::prelude::*;

fn key() -> SigningKey {
    SigningKey::from_bytes(&[3; 32])
}

fn certificate(name: &str, epoch: u32) -> Certificate {
    let (name, region) = (Name::new(name).unwrap(), Region::new("fra").unwrap());
    let subject = Subject { name, epoch, key: key().verifying_key(), region, scope: Scope::Global };
    Certificate::issue(&SigningKey::from_bytes(&[1; 32]), &subject)
}

fn rows() -> impl Strategy<Value = Vec<Row>> + Clone {
    let row = (prop::collection::vec(any::<u8>(), 0..128), any::<u64>(), prop::collection::vec(any::<u8>(), 0..300), any::<bool>());
    let row = row.prop_map(|(key, seq, value, dead)| {
        let key = Key::new(key).unwrap();
        if dead { Row::tombstone(key, seq) } else { Row::live(key, seq, &Topic::new("shop").unwrap(), &value).unwrap() }
    });
    prop::collection::vec(row, 0..8)
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let entry = (any::<[u8; 8]>(), any::<u32>(), any::<bool>(), any::<u64>(), any::<u32>(), any::<u32>());
    let entry = entry.prop_map(|(id, epoch, forked, seq, chain, tag)| Entry { id: OriginId(id), epoch, forked, seq, chain, tag });
    prop::collection::vec(entry, 0..20)
}

fn head(seq: u64, floor: u64) -> Head {
    let is = Statement {
        id: certificate("host/a", 1).id,
        epoch: 1,
        seq,
        floor: floor.min(seq),
        digest: [7; 32],
        schema: 2,
        time_ms: 3,
        life: 4,
        chain: 5,
        anchor: [0; 16],
    };
    Head::sign(&key(), is)
}

fn messages() -> impl Strategy<Value = Message> {
    let batch = (rows(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(rows, seq, floor, with)| Batch {
        certificate: with.then(|| certificate("host/a", 1)),
        head: head(seq, floor),
        after: Cursor { seq: floor, key: with.then(|| Key::new("k").unwrap()) },
        rows,
        more: if with { More::Ask } else { More::Last },
    });
    let batches = prop::collection::vec(batch, 0..4);
    let realm = prop_oneof![Just(Realm::Global), Just(Realm::Region(Region::new("fra").unwrap()))];
    let root = (realm.clone(), any::<u64>(), entries(), any::<bool>());
    let root = root.prop_map(|(realm, root, recent, complete)| Root { realm, root, recent, complete });
    let beat = (any::<[u8; 8]>(), 0..256u16, any::<[u8; 16]>()).prop_map(|(id, index, link)| Beat { id: OriginId(id), index, link });
    let beats = prop::collection::vec(beat, 0..10);
    let heard = beats.clone();
    let peer = any::<[u8; 8]>().prop_map(|id| Peer {
        id: OriginId(id),
        region: Region::new("fra").unwrap(),
        addr: Addr::new("[::1]:4").unwrap(),
        life: 3,
        started_ms: 4,
        renewed: 5,
    });
    let alive = any::<u64>().prop_map(|nonce| Alive { certificate: certificate("host/a", 1), life: 1, started_ms: 2, nonce, proof: [9; 64] });
    prop_oneof![
        batches.clone().prop_map(Message::Push),
        batches.prop_map(Message::Batches),
        (prop::collection::vec(root, 0..3), beats.clone()).prop_map(|(roots, beats)| Message::Sync { roots, beats }),
        (realm.clone(), any::<u64>()).prop_map(|(realm, root)| Message::Same { realm, root }),
        beats.prop_map(Message::Beats),
        heard.prop_map(Message::Heard),
        prop::collection::vec(any::<u8>(), 0..50).prop_map(Message::Members),
        (realm.clone(), prop::collection::vec(any::<u32>(), 0..256)).prop_map(|(realm, hashes)| Message::Buckets { realm, hashes }),
        (realm, prop::collection::vec(any::<u8>(), 0..256), entries())
            .prop_map(|(realm, buckets, entries)| Message::Entries { realm, buckets, entries }),
        (any::<[u8; 8]>(), any::<u64>()).prop_map(|(id, seq)| {
            Message::Want(vec![Wanted { id: OriginId(id), epoch: 3, after: Cursor { seq, key: None } }])
        }),
        any::<u64>().prop_map(|seq| Message::Fork(Box::new(Fork { certificate: certificate("host/a", 1), heads: [head(seq, 0), head(seq, 1)] }))),
        (peer, any::<u64>()).prop_map(|(of, nonce)| Message::Recover { origins: vec![of.id], of, nonce }),
        any::<u64>().prop_map(|nonce| {
            let certificate = certificate("host/a", 1);
            Message::Recovered(Recovered { id: certificate.id, nonce, heads: vec![(certificate, head(4, 2))] })
        }),
        alive.clone().prop_map(Message::IAmAlive),
        alive.prop_map(Message::Duplicate),
        any::<[u8; 8]>().prop_map(|id| Message::AreYouAlive { id: OriginId(id), life: 1, nonce: 2 }),
        entries().prop_map(|entries| Message::Subscribe { topic: Topic::new("shop").unwrap(), entries }),
    ]
}

fn node() -> Node {
    let cluster = SigningKey::from_bytes(&[1; 32]).verifying_key();
    let config = Config { cluster, seed: 1, peers: vec![], membership: true, hold_ms: 10 };
    let identity = Identity { certificate: certificate("host/me", 1), key: key(), addr: Addr::new("me").unwrap(), life: 1 };
    Node::new(config, identity, None, Now::default())
}

proptest! {
    #[test]
    fn what_is_written_is_read(message in messages()) {
        prop_assert_eq!(Message::decode(&message.encode()), Ok(Some(message)));
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..600), kind in 0..20u8) {
        let _ = Message::decode(&bytes);
        let framed = [&[1, kind], &bytes[..]].concat();
        let mut node = node();
        node.handle(Input::Datagram { from: Addr::new("x").unwrap(), bytes: framed }, Now { ms: 5, wall_ms: 5 });
        let _ = Certificate::from_bytes(&bytes);
        let _ = Snapshot::decode(SigningKey::from_bytes(&[1; 32]).verifying_key(), &bytes);
    }

    /// Nearly right is harder than noise: a byte of a good message is changed, then a node lives through it.
    #[test]
    fn altered_messages_are_survived(message in messages(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut bytes = message.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let mut node = node();
        node.handle(Input::Stream { from: Addr::new("x").unwrap(), bytes }, Now { ms: 5, wall_ms: 5 });
        for ms in [100, 1_000, 10_000] {
            node.handle(Input::Tick, Now { ms, wall_ms: ms });
        }
        prop_assert!(node.verify().is_empty());
    }

    #[test]
    fn what_follows_a_known_message_is_left_alone(message in messages(), more in prop::collection::vec(any::<u8>(), 1..20)) {
        prop_assume!(!matches!(message, Message::Members(_)));
        let bytes = [message.encode(), more].concat();
        prop_assert_eq!(Message::decode(&bytes), Ok(Some(message)));
    }
}

#[test]
fn an_unknown_kind_or_version_is_no_error() {
    assert_eq!(Message::decode(&[1, 200, 3]), Ok(None));
    assert_eq!(Message::decode(&[9, 1, 3]), Ok(None));
    assert!(Message::decode(&[1]).is_err());
}
