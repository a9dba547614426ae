//! When a process may speak.

use super::{at, cluster, node_of, peer};
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
