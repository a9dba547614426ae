//! Detail of other regions.

use super::{at, node, peer, row, sent, stream, writer};
use crate::*;

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

#[test]
fn the_empty_topic_is_all_of_the_region_whatever_its_logs_are_about() {
    let (bearing, empty, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), writer("host/b", 1, ("fra", Scope::Region)), node());
    let logs = vec![bearing.whole(1, &[row("a", 1, b"1")]), empty.whole(1, &[])];
    node.handle(stream("x", &Message::Batches(logs)), at(1));
    let given = |outputs: &[Output], to: &str| -> Vec<OriginId> {
        let batches = sent(outputs, to).into_iter().filter_map(|message| if let Message::Batches(batches) = message { Some(batches) } else { None });
        batches.flatten().map(|batch| batch.head.is.id).collect()
    };
    let subscribe = |topic| Message::Subscribe { topic, entries: vec![] };
    let to_shop = node.handle(stream("shopper", &subscribe(topic("shop"))), at(2));
    assert_eq!(given(&to_shop, "shopper"), [bearing.certificate.id]);
    let to_all = node.handle(stream("control", &subscribe(topic(""))), at(3));
    let mut all = given(&to_all, "control");
    all.sort_unstable();
    let mut wanted = [bearing.certificate.id, empty.certificate.id];
    wanted.sort_unstable();
    assert_eq!(all, wanted);
    // And what begins later is told without being asked for.
    let later = writer("host/c", 1, ("fra", Scope::Region));
    let changed = node.handle(stream("x", &Message::Batches(vec![later.whole(1, &[])])), at(4));
    assert_eq!(given(&changed, "control"), [later.certificate.id]);
    assert!(given(&changed, "shopper").is_empty());
}

#[test]
fn only_what_is_new_is_asked_for_at_once_and_what_nobody_uses_is_dropped() {
    let (far, mut node) = (writer("host/far", 1, ("iad", Scope::Region)), node());
    node.members.put_active(vec![Peer { region: far.certificate.region.clone(), ..peer("host/far") }]);
    let uses = |name: &str| Input::Use { region: far.certificate.region.clone(), topic: topic(name) };
    let asked = |outputs: &[Output]| sent(outputs, "host/far").iter().filter(|message| matches!(message, Message::Subscribe { .. })).count();
    let first = node.handle(uses("shop"), at(1));
    assert!(asked(&first) > 0);
    let second = node.handle(uses("blog"), at(2));
    assert_eq!(asked(&second), 1, "the first was asked for a moment ago");
    assert_eq!(asked(&node.handle(uses("blog"), at(3))), 0);
    node.handle(stream("host/far", &Message::Batches(vec![far.whole(1, &[row("a", 1, b"1")])])), at(4));
    assert!(node.catalogue().log(far.certificate.id).is_some());
    node.handle(uses("blog"), at(IDLE_MS));
    let dropped = node.handle(Input::Tick, at(IDLE_MS + 3_000));
    let gone = |event: &Output| matches!(event, Output::Event(Event::Unsubscribed { topic, .. }) if topic.as_bytes() == b"shop");
    assert!(dropped.iter().any(gone), "{dropped:?}");
    assert!(node.catalogue().log(far.certificate.id).is_none(), "none of its rows is about what is still used");
}
