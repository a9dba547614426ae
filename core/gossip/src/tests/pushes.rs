//! What a node keeps of what others send it, and from whom.

use super::{addr, at, node, row, sent, stream, writer};
use crate::*;
use ed25519_dalek::SigningKey;

/// The two halves of a log that does not fit a message.
fn halves(batch: Batch) -> [Batch; 2] {
    let (first, second) = batch.rows.split_at(1);
    let after = Cursor { seq: first[0].seq(), key: Some(first[0].key_of_its_own()) };
    let second = Batch { after, rows: second.to_vec(), ..batch.clone() };
    [Batch { rows: first.to_vec(), more: More::Follows, ..batch.clone() }, second]
}

#[test]
fn a_lie_about_a_log_leaves_what_another_has_sent_of_it() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let (id, rows) = (host.certificate.id, [row("a", 4, b"1"), row("b", 5, b"2")]);
    let [first, second] = halves(host.whole(5, &rows));
    node.handle(stream("honest", &Message::Batches(vec![first.clone()])), at(1));
    // Signed by nobody who may, and signed once but with rows that are not the log's.
    let unsigned = Batch { head: Head::sign(&SigningKey::from_bytes(&[9; 32]), host.head(9, &rows).is), ..first.clone() };
    let other_rows = Batch { rows: vec![row("z", 5, b"lie")], ..first };
    for lie in [unsigned, other_rows] {
        let lie = Batch { more: More::Ask, ..lie };
        node.handle(stream("liar", &Message::Batches(vec![lie])), at(2));
    }
    node.handle(stream("honest", &Message::Batches(vec![second])), at(3));
    assert_eq!(node.catalogue().log(id).map(Log::len), Some(2));
}

#[test]
fn what_nobody_signed_is_not_kept_for_its_rest() {
    let mut node = node();
    let known = writer("host/a", 1, ("fra", Scope::Region));
    node.handle(stream("x", &Message::Batches(vec![known.whole(5, &[row("a", 5, b"1")])])), at(1));
    for n in 0..200 {
        let made_up = writer(&format!("host/{n}"), 1, ("fra", Scope::Region));
        let head = Head::sign(&SigningKey::from_bytes(&[9; 32]), made_up.head(5, &[]).is);
        let unsigned = Batch { head, more: More::Follows, ..made_up.whole(5, &[]) };
        let old = Batch { more: More::Follows, ..known.whole(n % 5 + 1, &[]) };
        let elsewhere = Batch { more: More::Follows, ..writer(&format!("far/{n}"), 1, ("iad", Scope::Region)).whole(5, &[]) };
        node.handle(stream("liar", &Message::Batches(vec![unsigned, old, elsewhere])), at(2));
    }
    assert_eq!(node.pushes.stages(), 0);
    assert_eq!(node.counters().bad_signatures, 200);
}

#[test]
fn one_peer_has_only_so_many_unfinished_logs() {
    let mut node = node();
    for n in 0..100 {
        let begun = Batch { more: More::Follows, ..writer(&format!("host/{n}"), 1, ("fra", Scope::Region)).whole(5, &[]) };
        node.handle(stream("greedy", &Message::Batches(vec![begun])), at(1));
    }
    let host = writer("host/other", 1, ("fra", Scope::Region));
    let [first, second] = halves(host.whole(5, &[row("a", 4, b"1"), row("b", 5, b"2")]));
    node.handle(stream("honest", &Message::Batches(vec![first, second])), at(2));
    assert_eq!(node.catalogue().log(host.certificate.id).map(Log::len), Some(2));
    assert_eq!((node.pushes.stages(), node.counters().dropped_stages), (64, 36));
}

#[test]
fn the_rest_of_a_log_is_asked_for_where_its_beginning_came_from() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let (id, rows) = (host.certificate.id, [row("a", 4, b"1"), row("b", 5, b"2")]);
    let [first, _] = halves(host.whole(5, &rows));
    let outputs = node.handle(stream("one", &Message::Batches(vec![Batch { more: More::Ask, ..first }])), at(1));
    let after = Cursor { seq: 4, key: Some(Key::new("a").unwrap()) };
    assert_eq!(sent(&outputs, "one"), [Message::Want(vec![Wanted { id, epoch: 1, after }])]);
    // Nobody else while it may come; then what the other has, from its beginning.
    node.want(&addr("other"), Wanted { id, epoch: 1, after: Cursor::START });
    assert_eq!(sent(&node.handle(Input::Tick, at(600)), "other"), []);
    node.want(&addr("other"), Wanted { id, epoch: 1, after: Cursor::START });
    let outputs = node.handle(Input::Tick, at(601));
    assert_eq!(sent(&outputs, "other"), [Message::Want(vec![Wanted { id, epoch: 1, after: Cursor::START }])]);
}

#[test]
fn a_long_log_is_asked_for_once_while_it_comes_and_each_further_try_waits_longer() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let (id, rows) = (host.certificate.id, [row("a", 1_004, b"1"), row("b", 1_005, b"2"), row("c", 1_006, b"3")]);
    node.handle(stream("x", &Message::Batches(vec![host.whole(1, &[row("z", 1, b"0")])])), at(1));
    let told = Batch { after: Cursor::after(1_006), rows: vec![], ..host.whole(1_006, &rows) };
    let wants = |node: &mut Node, peer: &str, ms: u64| {
        let outputs = node.handle(stream(peer, &Message::Push(vec![told.clone()])), at(ms));
        sent(&outputs, peer).iter().filter(|message| matches!(message, Message::Want(_))).count()
    };
    assert_eq!(wants(&mut node, "one", 10), 1);
    assert_eq!((wants(&mut node, "two", 100), wants(&mut node, "one", 450)), (0, 0), "it may be on its way");
    // A part is a sign that it is, if it is one that was asked for.
    let [first, second] = halves(host.whole(1_006, &rows));
    node.handle(stream("stranger", &Message::Batches(vec![first.clone()])), at(480));
    assert_eq!(wants(&mut node, "two", 520), 1);
    node.handle(stream("two", &Message::Batches(vec![first])), at(1_400));
    assert_eq!((wants(&mut node, "three", 1_600), wants(&mut node, "three", 2_300)), (0, 0));
    assert_eq!(wants(&mut node, "three", 2_500), 1, "nothing has come for a second");
    assert_eq!((wants(&mut node, "four", 4_400), wants(&mut node, "four", 4_600)), (0, 1));
    node.handle(stream("two", &Message::Batches(vec![second])), at(4_700));
    assert_eq!(node.catalogue().log(id).map(Log::len), Some(3), "whoever gives it first");
}

#[test]
fn all_that_waited_is_taken_once_what_was_missing_is_here() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let rows: Vec<Row> = (1..=6).map(|n| row(&format!("k{n}"), n, b"v")).collect();
    node.handle(stream("x", &Message::Batches(vec![host.whole(1, &rows[..1])])), at(1));
    // The fifth is lost, so the sixth goes on waiting.
    for n in [3, 4, 6, 2] {
        node.handle(stream("x", &Message::Push(vec![host.step(&rows[..n])])), at(2));
    }
    assert_eq!(node.catalogue().log(host.certificate.id).map(Log::len), Some(4));
    node.handle(stream("x", &Message::Push(vec![host.step(&rows[..5])])), at(3));
    assert_eq!(node.catalogue().log(host.certificate.id).map(Log::len), Some(6));
}

#[test]
fn only_a_signed_head_says_that_this_host_is_behind_and_only_until_it_is_not() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let id = host.certificate.id;
    let rows: Vec<Row> = (1..=6).map(|n| row(&format!("k{n}"), n, b"v")).collect();
    node.handle(stream("x", &Message::Batches(vec![host.whole(1, &rows[..1])])), at(1));
    let entries = vec![Entry { seq: 900, ..node.catalogue().entry(id).unwrap() }];
    let realm = Realm::Region(Region::new("fra").unwrap());
    node.handle(stream("liar", &Message::Entries { realm, buckets: vec![], entries }), at(2));
    assert_eq!(node.status(id).unwrap().lag, 0);
    let lag = |node: &Node| (node.status(id).unwrap().lag, node.status(id).unwrap().behind_ms);
    node.handle(stream("x", &Message::Push(vec![host.step(&rows[..3])])), at(10));
    node.handle(Input::Tick, at(30));
    assert_eq!(lag(&node), (2, 20));
    node.handle(stream("x", &Message::Push(vec![host.step(&rows[..2])])), at(40));
    assert_eq!(lag(&node), (0, 0));
    node.handle(stream("x", &Message::Push(vec![host.step(&rows[..5])])), at(50));
    node.handle(Input::Tick, at(60));
    assert_eq!(lag(&node), (2, 10), "counted from its own beginning");
}

#[test]
fn memory_that_fails_is_fetched_again_and_never_from_before() {
    let (host, mut node) = (writer("host/a", 1, ("fra", Scope::Region)), node());
    let (id, rows) = (host.certificate.id, [row("a", 1, b"1"), row("b", 2, b"2")]);
    node.handle(stream("x", &Message::Batches(vec![host.whole(2, &rows)])), at(1));
    node.catalogue.log_mut(id).unwrap().flip_memory();
    let outputs: Vec<Output> = (1..4).flat_map(|s| node.handle(Input::Tick, at(s * 1_100))).collect();
    assert!(outputs.contains(&Output::Event(Event::SelfCheckFailed { origin: id })));
    let outputs = node.handle(stream("late", &Message::Batches(vec![host.whole(1, &rows[..1])])), at(4_000));
    assert!(node.catalogue().log(id).is_none(), "an older state is not taken");
    // Whoever writes below what was reached sees it, and goes on above.
    let shown = sent(&outputs, "late");
    assert!(matches!(&shown[..], [Message::Batches(batches)] if batches[0].head == host.head(2, &rows)), "{shown:?}");
    node.handle(stream("x", &Message::Batches(vec![host.whole(2, &rows)])), at(4_100));
    assert_eq!(node.catalogue().log(id).map(Log::len), Some(2));
}
