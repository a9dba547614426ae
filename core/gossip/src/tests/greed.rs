//! One member that takes all it can get leaves the others what is theirs.

use super::{addr, at, node, peer, row, sent, stream, writer};
use crate::*;

fn made_up(n: u32) -> OriginId {
    let [a, b, c, d] = n.to_be_bytes();
    OriginId([a, b, c, d, 1, 1, 1, 1])
}

#[test]
fn who_claims_everything_is_not_the_only_one_that_is_asked() {
    let mut node = node();
    let entries = |from: u32, count: u32| {
        let entry = |n| Entry { id: made_up(n), epoch: 1, forked: false, seq: 1, chain: 0, tag: 0 };
        Message::Entries { realm: Realm::Global, buckets: vec![], entries: (from..from + count).map(entry).collect() }
    };
    let asked = (0..12).flat_map(|round| {
        let outputs = node.handle(stream("greedy", &entries(round * 7_000, 7_000)), at(1));
        sent(&outputs, "greedy").into_iter().map(|message| if let Message::Want(wanted) = message { wanted.len() } else { 0 }).collect::<Vec<_>>()
    });
    assert_eq!(asked.sum::<usize>(), 4_096);
    let outputs = node.handle(stream("honest", &entries(500_000, 3)), at(2));
    let [Message::Want(wanted)] = &sent(&outputs, "honest")[..] else { panic!("{outputs:?}") };
    assert_eq!(wanted.len(), 3);
}

#[test]
fn who_subscribes_to_everything_is_not_the_only_one_that_is_told() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    node.handle(stream("x", &Message::Batches(vec![host.whole(1, &[row("a", 1, b"1")])])), at(1));
    for n in 0..5_000 {
        let topic = Topic::new(n.to_string()).unwrap();
        node.handle(stream("greedy", &Message::Subscribe { topic, entries: vec![] }), at(2));
    }
    let topic = Topic::new("shop").unwrap();
    let told = node.handle(stream("honest", &Message::Subscribe { topic, entries: vec![] }), at(3));
    assert!(matches!(sent(&told, "honest")[..], [Message::Batches(_), ..]), "{told:?}");
    let changed = node.handle(stream("x", &Message::Push(vec![host.step(&[row("a", 1, b"1"), row("b", 2, b"2")])])), at(4));
    assert!(matches!(sent(&changed, "honest")[..], [Message::Batches(_), ..]), "{changed:?}");
}

#[test]
fn a_flood_of_starts_hides_no_second_life() {
    let mut node = node();
    let (first, second) = (peer("host/a"), Peer { addr: addr("elsewhere"), life: 6, started_ms: 9, ..peer("host/a") });
    let recover = |of: &Peer, nonce: u64| Message::Recover { of: of.clone(), nonce, origins: vec![] };
    node.handle(stream("first", &recover(&first, 1)), at(1));
    for nonce in 0..300 {
        let made_up = Peer { life: nonce + 100, addr: addr("made up"), ..first.clone() };
        node.handle(stream("greedy", &recover(&made_up, nonce)), at(2));
    }
    let outputs = node.handle(stream("elsewhere", &recover(&second, 777)), at(3));
    assert!(sent(&outputs, "elsewhere").is_empty(), "it is not answered before the other life was asked: {outputs:?}");
    let asked = Message::AreYouAlive { id: first.id, life: first.life, nonce: 777 };
    assert!(sent(&outputs, "host/a").contains(&asked), "{outputs:?}");
}

#[test]
fn what_waits_for_one_peer_is_not_thrown_away_for_another() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let rows: Vec<Row> = (1..=3).map(|n| row(&format!("k{n}"), n, b"v")).collect();
    node.handle(stream("x", &Message::Batches(vec![host.whole(1, &rows[..1])])), at(1));
    node.handle(stream("x", &Message::Push(vec![host.step(&rows)])), at(2));
    for n in 0..600 {
        let early = Batch { certificate: None, ..writer(&format!("host/{n}"), 1, ("fra", Scope::Region)).whole(9, &[]) };
        node.handle(stream("greedy", &Message::Push(vec![early])), at(2));
    }
    node.handle(stream("x", &Message::Push(vec![host.step(&rows[..2])])), at(3));
    assert_eq!(node.catalogue().log(host.certificate.id).map(Log::len), Some(3));
}
