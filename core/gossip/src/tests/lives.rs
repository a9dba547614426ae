//! When a process may speak.

use super::{at, cluster, node_of, peer, row, sent, stream, writer};
use crate::*;

#[test]
fn a_host_whose_peers_are_all_gone_speaks_after_a_while() {
    let mut node = node_of(vec![peer("host/a"), peer("host/b")], None);
    node.handle(Input::Tick, at(4_900));
    assert!(!node.speaks());
    let outputs = node.handle(Input::Tick, at(5_100));
    assert!(node.speaks() && outputs.iter().any(|output| matches!(output, Output::Event(Event::Speaking { .. }))));
}

#[test]
fn a_removed_host_is_neither_waited_for_nor_saved() {
    let (gone, other) = (peer("host/a"), peer("host/b"));
    let mut node = node_of(vec![gone.clone(), other.clone()], None);
    node.handle(Input::Remove(gone.id), at(1));
    node.handle(Input::Peers(vec![gone.clone()]), at(2));
    let snapshot = || Snapshot::decode(cluster().verifying_key(), &node.snapshot()).unwrap();
    assert_eq!(snapshot().peers, [other]);
    // Also where the next start is told of it by its own configuration.
    let mut alone = node_of(vec![gone], Some(Snapshot { peers: vec![], ..snapshot() }));
    alone.handle(Input::Tick, at(1));
    assert!(alone.speaks());
}

#[test]
fn only_certified_hosts_of_a_region_speak_for_it() {
    let fra = Region::new("fra").unwrap();
    let mut node = super::node();
    let (host, from_far) = (writer("host/a", 1, ("fra", Scope::Region)), writer("summary/b", 1, ("iad", Scope::Global)));
    for writer in [&host, &from_far] {
        node.handle(stream("x", &Message::Batches(vec![writer.whole(5, &[])])), at(1));
    }
    let names = ["host/a", "summary/b", "host/made up"];
    node.members.put_active(names.map(peer).to_vec());
    let mut certified = vec![node.me().id, host.certificate.id];
    certified.sort_unstable();
    assert_eq!(node.reporters(&fra), certified);
    node.handle(Input::Remove(host.certificate.id), at(2));
    assert_eq!(node.reporters(&fra), [node.me().id]);
}

#[test]
fn what_a_subscriber_has_of_an_earlier_life_comes_back_to_the_region() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), super::node());
    node.handle(stream("x", &Message::Batches(vec![host.whole(5, &[row("a", 5, b"1")])])), at(1));
    let theirs = Entry { seq: 9, ..node.catalogue().entry(host.certificate.id).unwrap() };
    let subscribe = Message::Subscribe { topic: Topic::new("shop").unwrap(), entries: vec![theirs] };
    let outputs = node.handle(stream("far", &subscribe), at(2));
    let wanted = Message::Want(vec![Wanted { id: host.certificate.id, epoch: 1, after: Cursor::after(5) }]);
    assert!(sent(&outputs, "far").contains(&wanted), "{outputs:?}");
}

#[test]
fn a_log_that_becomes_its_to_write_later_is_asked_about_first() {
    let mut node = node_of(vec![peer("host/peer")], None);
    node.handle(Input::Tick, at(0));
    let me = node.me().clone();
    let answer = |node: &mut Node, to: &[Output], heads: Vec<(Certificate, Head)>, ms| {
        let asked = sent(to, "host/peer").into_iter().find_map(|message| match message {
            Message::Recover { nonce, origins, .. } => Some((nonce, origins)),
            _ => None,
        });
        let (nonce, origins) = asked.expect("it asks");
        node.handle(stream("host/peer", &Message::Recovered(Recovered { id: me.id, nonce, heads })), at(ms));
        origins
    };
    let to = node.handle(Input::Tick, at(500));
    answer(&mut node, &to, vec![], 510);
    assert!(node.speaks());
    // Control begins in a process that speaks for its host already; what it has said in an earlier life only the peer knows.
    let config = writer("config/0", 1, ("fra", Scope::Global));
    let origin = config.certificate.id;
    let to = node.handle(Input::Own { certificate: Box::new(config.certificate.clone()), key: Box::new(config.key.clone()) }, at(600));
    assert!(!node.speaks());
    let change = Change { key: Key::new("app/web").unwrap(), value: Some((Topic::new("").unwrap(), b"1".to_vec())), seq: None };
    node.handle(Input::Publish { origin, schema: 1, changes: vec![change], at: None }, at(700));
    assert!(node.status(origin).is_none(), "it waits");
    let high = 1 << 50;
    let head = config.head(high, &[row("app/web", high, b"0")]);
    let origins = answer(&mut node, &to, vec![(config.certificate.clone(), head)], 1_400);
    assert!(origins.contains(&origin));
    assert!(node.status(origin).unwrap().seq > high);
}
