//! Whose sign of life it is, and when: the dead must not look fresh because somebody still has what they said.

use super::{Writer, at, cluster, node, node_of, peer, row, sent, stream, writer};
use crate::beat;
use crate::*;

/// A batch of the whole, said at `time_ms` by the writer's clock.
fn said(host: &Writer, time_ms: u64, rows: &[Row]) -> Batch {
    let seq = rows.last().map_or(1, Row::seq);
    Batch { head: host.head_at(seq, time_ms, rows), ..host.whole(seq, rows) }
}

fn beat_of(host: &Writer, batch: &Batch, index: u16) -> Beat {
    Beat { id: host.certificate.id, index, link: beat::link(crate::head::secret(&host.key, &batch.head.is), index) }
}

fn age(node: &Node, host: &Writer) -> Option<u64> {
    node.status(host.certificate.id).unwrap().age_ms
}

#[test]
fn what_was_only_fetched_is_unconfirmed_and_what_the_giver_has_heard_is_no_news() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let batch = said(&host, 1_000, &[row("a", 1, b"1")]);
    node.handle(stream("x", &Message::Batches(vec![batch.clone()])), at(1));
    assert_eq!(age(&node, &host), None);
    node.handle(stream("x", &Message::Heard(vec![beat_of(&host, &batch, 5)])), at(2));
    assert_eq!(age(&node, &host), None, "a baseline is no sign of life");
    for index in [4, 5] {
        node.handle(stream("x", &Message::Beats(vec![beat_of(&host, &batch, index)])), at(3));
        assert_eq!(age(&node, &host), None, "beat {index} was heard by others before");
    }
    // Told that way, the next beat would be no news either; only the first word counts.
    node.handle(stream("liar", &Message::Heard(vec![beat_of(&host, &batch, 6)])), at(4));
    node.handle(stream("x", &Message::Beats(vec![beat_of(&host, &batch, 6)])), at(5));
    assert_eq!(age(&node, &host), Some(0));
    let outputs = node.handle(stream("y", &Message::Want(vec![Wanted { id: host.certificate.id, epoch: 1, after: Cursor::START }])), at(6));
    assert!(sent(&outputs, "y").contains(&Message::Heard(vec![beat_of(&host, &batch, 6)])), "{outputs:?}");
}

#[test]
fn a_clock_that_was_ahead_for_a_while_leaves_nobody_deaf() {
    const HOUR_MS: u64 = 3_600_000;
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    node.handle(Input::Tick, Now { ms: 1, wall_ms: 1_000 + HOUR_MS });
    let hear = |node: &mut Node, seq: u64, now_ms: u64| {
        let batch = said(&host, 1_000 + now_ms, &[row("a", seq, b"1")]);
        node.handle(stream("a", &Message::Push(vec![batch])), at(now_ms));
        age(node, &host)
    };
    assert_eq!(hear(&mut node, 1, 2), Some(0));
    // What is kept on disk knows of that hour, too.
    let kept = Snapshot::decode(cluster().verifying_key(), &node.snapshot()).unwrap();
    let mut node = node_of(vec![], Some(kept));
    assert_eq!(hear(&mut node, 2, 3), Some(0));
}

#[test]
fn fetched_news_confirm_only_while_the_writer_goes_on() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let fetch = |node: &mut Node, seq: u64, time_ms: u64, now_ms: u64| {
        let batch = said(&host, time_ms, &[row("a", seq, b"1")]);
        node.handle(stream("x", &Message::Batches(vec![batch])), at(now_ms));
        age(node, &host)
    };
    // The past of a dead host, piece by piece.
    for (seq, time_ms, now_ms) in [(1, 1_000, 100_000), (2, 40_000, 103_000), (3, 60_000, 110_000)] {
        assert_eq!(fetch(&mut node, seq, time_ms, now_ms), None);
    }
    // It lives: its clock goes on as this one's does.
    assert_eq!(fetch(&mut node, 4, 64_000, 114_000), None);
    assert_eq!(fetch(&mut node, 5, 67_000, 117_000), Some(0));
    assert_eq!(fetch(&mut node, 6, 67_500, 117_500), Some(0));
    // Not heard of for long, then one more thing it had said: no sign of life.
    assert_eq!(fetch(&mut node, 7, 70_000, 160_000), Some(42_500));
}

#[test]
fn what_was_said_long_ago_is_no_sign_of_life() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let late_ms = MAX_SKEW_MS + 10_000;
    let first = said(&host, 1_000, &[row("a", 1, b"1")]);
    node.handle(stream("x", &Message::Push(vec![first.clone()])), at(late_ms));
    node.handle(stream("x", &Message::Beats(vec![beat_of(&host, &first, 1)])), at(late_ms + 1));
    assert_eq!(age(&node, &host), None);
    let now_ms = late_ms + 2;
    let second = said(&host, 1_000 + now_ms, &[row("a", 2, b"2")]);
    node.handle(stream("x", &Message::Push(vec![second])), at(now_ms));
    assert_eq!(age(&node, &host), Some(0));
}

#[test]
fn a_snapshot_keeps_how_far_a_log_was_heard() {
    let (host, mut first) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let batch = said(&host, 1_000, &[row("a", 1, b"1")]);
    first.handle(stream("x", &Message::Push(vec![batch.clone()])), at(1));
    first.handle(stream("x", &Message::Beats(vec![beat_of(&host, &batch, 3)])), at(2));
    let snapshot = Snapshot::decode(cluster().verifying_key(), &first.snapshot()).unwrap();
    let mut node = node_of(vec![], Some(snapshot));
    node.handle(stream("x", &Message::Beats(vec![beat_of(&host, &batch, 3)])), at(3));
    assert_eq!(age(&node, &host), None);
    node.handle(stream("x", &Message::Beats(vec![beat_of(&host, &batch, 4)])), at(4));
    assert_eq!(age(&node, &host), Some(0));
}

#[test]
fn config_goes_on_beating_after_the_process_with_the_fastest_clock_has_died() {
    let (config, mut node) = (writer("config/0", 1, ("", Scope::Global)), node());
    let id = config.certificate.id;
    let ahead_ms = 10 * CHAIN_MS;
    let rows = [row("a", 1, b"1")];
    let signed = said(&config, ahead_ms, &rows);
    let batch = Batch { head: Head::sign(&config.key, Statement { life: 0, ..signed.head.is.clone() }), ..signed };
    node.handle(stream("x", &Message::Push(vec![batch.clone()])), at(1));
    node.handle(Input::Own { certificate: config.certificate.clone().into(), key: config.key.clone().into() }, at(2));
    let change = Change { key: Key::new("a").unwrap(), value: Some((Topic::new("shop").unwrap(), b"1".to_vec())), seq: Some(1) };
    node.handle(Input::Publish { origin: id, schema: 1, changes: vec![change], at: Some(At { since: 0, seq: 1, floor: 0 }) }, at(3));
    let mut ages = (10..60).map(|s| {
        node.handle(Input::Tick, at(s * 1_000));
        let log = node.catalogue.log(id).unwrap();
        node.now_ms - log.fresh.newer_at_ms
    });
    assert!(ages.all(|age_ms| age_ms < 2 * BEAT_MS));
    let heard = node.catalogue.log(id).unwrap().last_beat().unwrap();
    assert_eq!(heard, beat_of(&config, &batch, heard.index));
    assert!((15..=20).contains(&heard.index), "one each three seconds: {}", heard.index);
    // At the end of that chain the head is signed for the next.
    (60..1_000).for_each(|s| drop(node.handle(Input::Tick, at(s * 1_000))));
    assert_eq!(node.catalogue.log(id).unwrap().head.is.chain, 11);
}

#[test]
fn a_lone_host_elsewhere_hears_the_beats_of_global_logs() {
    let (config, mut node) = (writer("config/0", 1, ("", Scope::Global)), node());
    let far = Peer { region: Region::new("iad").unwrap(), ..peer("host/far") };
    node.members.put_active(vec![peer("host/a"), peer("host/b"), peer("host/c"), far]);
    let batch = said(&config, 1_000, &[row("a", 1, b"1")]);
    node.handle(stream("x", &Message::Push(vec![batch.clone()])), at(1));
    let beat = beat_of(&config, &batch, 1);
    node.handle(stream("x", &Message::Beats(vec![beat])), at(2));
    let outputs: Vec<Output> = (1..100).flat_map(|n| node.handle(Input::Tick, at(n * 50))).collect();
    let told = |message: &Message| matches!(message, Message::Sync { beats, .. } | Message::Beats(beats) if beats.contains(&beat));
    assert!(sent(&outputs, "host/far").iter().any(told));
    assert_eq!(["host/a", "host/b", "host/c"].map(|near| sent(&outputs, near).iter().filter(|message| told(message)).count()).iter().sum::<usize>(), 4);
}
