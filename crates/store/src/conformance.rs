//! What every backend of desired state promises, as tests: [`all`] panics at the first broken promise.
//!
//! Durability is not here, as each backend has its own ways to lose power.

use crate::{Compare, Event, Kv, MAX_KEY_BYTES, MAX_OPS, MAX_VALUE_BYTES, Op, Page, Store, StoreError, WatchError};
use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

/// Nothing here waits longer for an event that must come.
const DEADLINE: Duration = Duration::from_secs(30);

/// A store, as the suite needs it. See [`Store`] for what each method means.
pub trait Backend: Clone + Send + Sync + 'static {
    type Watch: Events;
    fn txn(&self, c: Vec<Compare>, t: Vec<Op>) -> impl Future<Output = Result<Option<u64>, StoreError>> + Send;
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Kv>, StoreError>> + Send;
    fn range(&self, prefix: &str) -> impl Future<Output = Result<(Vec<Kv>, u64), StoreError>> + Send;
    fn ranges(&self, prefixes: &[&str]) -> impl Future<Output = Result<(Vec<Vec<Kv>>, u64), StoreError>> + Send;
    fn range_at(&self, prefix: &str, at: u64) -> impl Future<Output = Result<Vec<Kv>, StoreError>> + Send;
    fn page(
        &self,
        prefix: &str,
        from: Option<&str>,
        at: Option<u64>,
        limit: usize,
    ) -> impl Future<Output = Result<Page, StoreError>> + Send;
    fn watch(
        &self,
        prefix: &str,
        after: u64,
        silence: Duration,
    ) -> impl Future<Output = Result<Self::Watch, WatchError>> + Send;
    fn compact(&self, before: u64) -> impl Future<Output = Result<(), StoreError>> + Send;
}

pub trait Events: Send + 'static {
    fn next(&mut self) -> impl Future<Output = Result<Vec<Event>, WatchError>> + Send;
}

impl Backend for Store {
    type Watch = crate::Watch;
    async fn txn(&self, c: Vec<Compare>, t: Vec<Op>) -> Result<Option<u64>, StoreError> {
        Store::txn(self, c, t).await
    }
    async fn get(&self, key: &str) -> Result<Option<Kv>, StoreError> {
        Store::get(self, key).await
    }
    async fn range(&self, prefix: &str) -> Result<(Vec<Kv>, u64), StoreError> {
        Store::range(self, prefix).await
    }
    async fn ranges(&self, prefixes: &[&str]) -> Result<(Vec<Vec<Kv>>, u64), StoreError> {
        Store::ranges(self, prefixes).await
    }
    async fn range_at(&self, prefix: &str, at: u64) -> Result<Vec<Kv>, StoreError> {
        Store::range_at(self, prefix, at).await
    }
    async fn page(&self, p: &str, from: Option<&str>, at: Option<u64>, limit: usize) -> Result<Page, StoreError> {
        Store::page(self, p, from, at, limit).await
    }
    async fn watch(&self, prefix: &str, after: u64, silence: Duration) -> Result<Self::Watch, WatchError> {
        Store::watch(self, prefix, after, silence).await
    }
    async fn compact(&self, before: u64) -> Result<(), StoreError> {
        Store::compact(self, before).await
    }
}

impl Events for crate::Watch {
    async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        crate::Watch::next(self).await
    }
}

/// Runs everything; `fresh` makes an empty store each time.
pub async fn all<B: Backend>(mut fresh: impl AsyncFnMut() -> B) {
    rows_have_revisions(&fresh().await).await;
    compares_decide(&fresh().await).await;
    what_changes_nothing_has_no_revision(&fresh().await).await;
    ranges_are_prefixes_in_order(&fresh().await).await;
    several_ranges_are_one_revision(&fresh().await).await;
    pages_are_one_revision(&fresh().await).await;
    bounds_are_kept(&fresh().await).await;
    watches_are_complete(&fresh().await).await;
    watches_wait_and_may_be_cancelled(&fresh().await).await;
    a_silent_watch_says_so(&fresh().await).await;
    history_ends_where_it_is_compacted(&fresh().await).await;
    writers_never_undo_each_other(&fresh().await).await;
    everything_is_as_in_a_model(&fresh().await).await;
}

fn put(key: &str, value: &str) -> Op {
    Op::Put(key.into(), value.as_bytes().to_vec())
}

fn delete(key: &str) -> Op {
    Op::Delete(key.into())
}

async fn write<B: Backend>(store: &B, then: Vec<Op>) -> u64 {
    store.txn(vec![], then).await.expect("the write is valid").expect("nothing was compared")
}

async fn next<E: Events>(watch: &mut E) -> Result<Vec<Event>, WatchError> {
    tokio::time::timeout(DEADLINE, watch.next()).await.expect("the event never came")
}

fn keys(rows: &[Kv]) -> Vec<&str> {
    rows.iter().map(|row| row.key.as_str()).collect()
}

async fn rows_have_revisions<B: Backend>(store: &B) {
    assert_eq!(store.get("a").await.unwrap(), None);
    let first = write(store, vec![put("a", "1")]).await;
    let second = write(store, vec![put("a", "2"), put("b", "")]).await;
    assert!(second > first, "revisions grow");
    let expected = Kv { key: "a".into(), value: b"2".to_vec(), created: first, modified: second };
    assert_eq!(store.get("a").await.unwrap(), Some(expected));
    assert_eq!(store.get("b").await.unwrap().unwrap().value, b"", "an empty value is a value");
    let third = write(store, vec![delete("a")]).await;
    assert_eq!(store.get("a").await.unwrap(), None);
    let fourth = write(store, vec![put("a", "3")]).await;
    let row = store.get("a").await.unwrap().unwrap();
    assert!(third < fourth && row.created == fourth && row.modified == fourth, "a new life: {row:?}");
}

async fn compares_decide<B: Backend>(store: &B) {
    let revision = write(store, vec![put("here", "1")]).await;
    let here = || "here".to_owned();
    let gone = || "gone".to_owned();
    let cases = [
        (vec![Compare::Absent(gone())], true),
        (vec![Compare::Absent(here())], false),
        (vec![Compare::Exists(here())], true),
        (vec![Compare::Exists(gone())], false),
        (vec![Compare::Modified(here(), revision)], true),
        (vec![Compare::Modified(here(), revision + 1)], false),
        (vec![Compare::Modified(gone(), 0)], false),
        (vec![Compare::Exists(here()), Compare::Absent(gone())], true),
        (vec![Compare::Exists(here()), Compare::Exists(gone())], false),
    ];
    for (number, (compare, holds)) in cases.into_iter().enumerate() {
        let (left, right) = (format!("left/{number}"), format!("right/{number}"));
        let outcome = store.txn(compare.clone(), vec![put(&left, ""), put(&right, "")]).await.unwrap();
        assert_eq!(outcome.is_some(), holds, "{compare:?}");
        for key in [left, right] {
            assert_eq!(store.get(&key).await.unwrap().is_some(), holds, "{compare:?} wrote all or nothing");
        }
    }
}

async fn what_changes_nothing_has_no_revision<B: Backend>(store: &B) {
    let revision = write(store, vec![put("a", "")]).await;
    assert_eq!(store.txn(vec![Compare::Absent("a".into())], vec![delete("a")]).await.unwrap(), None);
    assert_eq!(write(store, vec![delete("never")]).await, revision);
    assert_eq!(write(store, vec![]).await, revision);
    assert_eq!(store.range("").await.unwrap().1, revision);
    assert_eq!(write(store, vec![put("a", "")]).await, revision + 1, "a put of the same value is a change");
}

async fn ranges_are_prefixes_in_order<B: Backend>(store: &B) {
    let all = ["apps", "apps/A", "apps/a", "apps/a/x", "apps/b", "apps0", "b", "~"];
    let revision = write(store, all.iter().rev().map(|key| put(key, key)).collect()).await;
    let (rows, at) = store.range("").await.unwrap();
    assert_eq!((keys(&rows), at), (all.to_vec(), revision));
    assert_eq!(keys(&store.range("apps/").await.unwrap().0), ["apps/A", "apps/a", "apps/a/x", "apps/b"]);
    assert_eq!(keys(&store.range("apps").await.unwrap().0), all[..6]);
    assert_eq!(keys(&store.range("apps/a").await.unwrap().0), ["apps/a", "apps/a/x"]);
    assert_eq!(keys(&store.range("~").await.unwrap().0), ["~"]);
    assert_eq!(store.range("nothing/").await.unwrap(), (vec![], revision));
}

async fn several_ranges_are_one_revision<B: Backend>(store: &B) {
    assert_eq!(store.ranges(&["left/", "right/"]).await.unwrap(), (vec![vec![], vec![]], 0));
    assert!(matches!(store.ranges(&["left/", "a//b"]).await, Err(StoreError::Invalid(_))));
    assert!(matches!(store.ranges(&["left/"; MAX_OPS + 1]).await, Err(StoreError::Invalid(_))));
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        for n in 1..=200 {
            // Each revision holds its number on both sides.
            let n = n.to_string();
            write(&writer, vec![put("left/n", &n), put("right/n", &n)]).await;
        }
    });
    let begun = std::time::Instant::now();
    loop {
        assert!(begun.elapsed() < DEADLINE, "the writer does not get to its end");
        let (rows, revision) = store.ranges(&["left/", "none/", "right/"]).await.unwrap();
        assert!(rows[1].is_empty());
        let side = |rows: &[Kv]| rows.first().map_or(0, |row| number(&row.value));
        assert_eq!((side(&rows[0]), side(&rows[2])), (revision, revision));
        if revision == 200 {
            break;
        }
    }
    writing.await.unwrap();
}

async fn pages_are_one_revision<B: Backend>(store: &B) {
    let names: Vec<String> = (0..25).map(|n| format!("p/{n:02}")).collect();
    let revision = write(store, names.iter().map(|key| put(key, "old")).collect()).await;
    let (mut found, mut from, mut at) = (Vec::new(), None, None);
    loop {
        let page = store.page("p/", from.as_deref(), at, 10).await.unwrap();
        assert!(page.rows.len() <= 10 && page.revision == revision);
        found.extend(page.rows);
        // Written between two pages: a reader that names the revision does not see it.
        write(store, vec![put("p/24", "new"), delete("p/23"), put(&format!("p/x{}", found.len()), "new")]).await;
        (from, at) = (page.next, Some(revision));
        if from.is_none() {
            break;
        }
    }
    assert_eq!(keys(&found), names);
    assert!(found.iter().all(|row| row.value == b"old"));
}

async fn bounds_are_kept<B: Backend>(store: &B) {
    let long = "k".repeat(MAX_KEY_BYTES + 1);
    for key in ["", "/a", "a/", "a//b", "a b", "ä", "a\n", "a\0b", &long] {
        let refused = store.txn(vec![], vec![put(key, "")]).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{key:?}: {refused:?}");
        let refused = store.txn(vec![Compare::Absent(key.into())], vec![]).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{key:?}: {refused:?}");
    }
    let big = |size: usize| Op::Put("big".into(), vec![7; size]);
    let many = |count: usize| (0..count).map(|n| put(&format!("many/{n}"), "")).collect::<Vec<_>>();
    let large: Vec<Op> = (0..5).map(|n| Op::Put(format!("large/{n}"), vec![7; MAX_VALUE_BYTES])).collect();
    for refused in [vec![big(MAX_VALUE_BYTES + 1)], many(MAX_OPS + 1), large, vec![put("a", "1"), delete("a")]] {
        let refused = store.txn(vec![], refused).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    assert_eq!(store.range("").await.unwrap(), (vec![], 0), "nothing refused was written");
    write(store, vec![big(MAX_VALUE_BYTES)]).await;
    write(store, many(MAX_OPS)).await;
    assert_eq!(store.get("big").await.unwrap().unwrap().value.len(), MAX_VALUE_BYTES);
}

async fn watches_are_complete<B: Backend>(store: &B) {
    let first = write(store, vec![put("w/a", "1"), put("other", "")]).await;
    write(store, vec![put("other", "1")]).await;
    let third = write(store, vec![put("w/b", "2"), delete("w/a")]).await;
    let mut watch = store.watch("w/", 0, DEADLINE).await.unwrap();
    let row = |key: &str, value: &str, created, modified| {
        Event::Put(Kv { key: key.into(), value: value.as_bytes().to_vec(), created, modified })
    };
    assert_eq!(next(&mut watch).await.unwrap(), [row("w/a", "1", first, first)]);
    let gone = Event::Delete { key: "w/a".into(), revision: third };
    assert_eq!(next(&mut watch).await.unwrap(), [row("w/b", "2", third, third), gone]);
    let fourth = write(store, vec![put("w/b", "3")]).await;
    assert_eq!(next(&mut watch).await.unwrap(), [row("w/b", "3", third, fourth)]);
    // From a list on, nothing is seen twice.
    let (_, listed) = store.range("w/").await.unwrap();
    let mut watch = store.watch("w/", listed, DEADLINE).await.unwrap();
    let fifth = write(store, vec![delete("w/b")]).await;
    assert_eq!(next(&mut watch).await.unwrap(), [Event::Delete { key: "w/b".into(), revision: fifth }]);
    assert!(matches!(store.watch("w/", fifth + 1, DEADLINE).await, Err(WatchError::Future { .. })));
}

async fn watches_wait_and_may_be_cancelled<B: Backend>(store: &B) {
    let mut watch = store.watch("w/", 0, DEADLINE).await.unwrap();
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        for n in 0..200 {
            write(&writer, vec![put("w/n", &n.to_string()), put("elsewhere", "")]).await;
        }
    });
    let begun = std::time::Instant::now();
    let mut seen = Vec::new();
    while seen.len() < 200 {
        assert!(begun.elapsed() < DEADLINE, "only {} events came", seen.len());
        // Dropped over and over, in the middle of a read or of a wait.
        if let Ok(batch) = tokio::time::timeout(Duration::from_micros(300), watch.next()).await {
            seen.extend(batch.unwrap().into_iter().map(|event| event.revision()));
        }
    }
    writing.await.unwrap();
    assert_eq!(seen, (1..=200).collect::<Vec<u64>>());
}

async fn a_silent_watch_says_so<B: Backend>(store: &B) {
    let silence = Duration::from_millis(100);
    let revision = write(store, vec![put("other", "")]).await;
    let mut watch = store.watch("w/", 0, silence).await.unwrap();
    for _ in 0..2 {
        let begun = std::time::Instant::now();
        let silent = next(&mut watch).await;
        assert!(matches!(silent, Err(WatchError::Silent { after, .. }) if after == revision), "{silent:?}");
        assert!(begun.elapsed() >= silence);
    }
    // It goes on where it was, for who prefers that to a new list.
    let seen = write(store, vec![put("w/a", "")]).await;
    assert_eq!(next(&mut watch).await.unwrap()[0].revision(), seen);
    // Changes elsewhere are no news of the prefix, but the store lives: the deadline is that of one call.
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        for n in 0..10 {
            tokio::time::sleep(Duration::from_millis(30)).await;
            write(&writer, vec![put("other", &n.to_string())]).await;
        }
    });
    assert!(matches!(next(&mut watch).await, Err(WatchError::Silent { .. })));
    writing.await.unwrap();
}

async fn history_ends_where_it_is_compacted<B: Backend>(store: &B) {
    write(store, vec![put("a", "1"), put("b", "1")]).await;
    let mut slow = store.watch("", 1, DEADLINE).await.unwrap();
    write(store, vec![put("a", "2")]).await;
    write(store, vec![delete("a")]).await;
    write(store, vec![put("c", "4")]).await;
    write(store, vec![put("c", "5"), put("a", "5")]).await;
    let mut before = Vec::new();
    for at in 0..=5 {
        before.push(store.range_at("", at).await.unwrap());
    }
    assert_eq!(keys(&before[1]), ["a", "b"]);
    assert_eq!(keys(&before[3]), ["b"]);
    assert!(matches!(store.range_at("", 6).await, Err(StoreError::Future { .. })));
    assert!(matches!(store.compact(6).await, Err(StoreError::Future { .. })));
    store.compact(3).await.unwrap();
    store.compact(2).await.expect("what is compacted already is fine");
    for at in 0..3 {
        assert!(matches!(store.range_at("", at).await, Err(StoreError::Compacted { oldest: 3, .. })), "{at}");
        assert!(matches!(store.watch("", at, DEADLINE).await, Err(WatchError::Compacted { oldest: 3, .. })), "{at}");
    }
    for at in 3..=5 {
        assert_eq!(store.range_at("", at).await.unwrap(), before[at as usize], "{at}");
    }
    assert!(matches!(next(&mut slow).await, Err(WatchError::Compacted { oldest: 3, .. })), "it must not skip");
    let mut watch = store.watch("", 3, DEADLINE).await.unwrap();
    let revisions: Vec<u64> = [next(&mut watch).await.unwrap(), next(&mut watch).await.unwrap()]
        .iter()
        .flatten()
        .map(Event::revision)
        .collect();
    assert_eq!(revisions, [4, 5, 5]);
}

async fn writers_never_undo_each_other<B: Backend>(store: &B) {
    const WRITERS: u64 = 8;
    const EACH: u64 = 20;
    let mut watch = store.watch("n", 0, DEADLINE).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let store = store.clone();
        writers.spawn(async move {
            let mut revisions = Vec::new();
            while revisions.len() < EACH as usize {
                let read = store.get("n").await.unwrap();
                let count = read.as_ref().map_or(0, |row| number(&row.value));
                let compare = read.map_or(Compare::Absent("n".into()), |row| Compare::Modified("n".into(), row.modified));
                revisions.extend(store.txn(vec![compare], vec![put("n", &(count + 1).to_string())]).await.unwrap());
            }
            revisions
        });
    }
    let mut revisions: Vec<u64> = writers.join_all().await.concat();
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len() as u64, WRITERS * EACH, "each transaction has a revision of its own");
    for expected in 1..=WRITERS * EACH {
        let batch = next(&mut watch).await.unwrap();
        let [Event::Put(row)] = batch.as_slice() else { panic!("one put at a time: {batch:?}") };
        assert_eq!(number(&row.value), expected, "no increment is lost, repeated or out of order");
    }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("a number")
}

/// Random transactions, and then every revision of the past, by range and by replaying a watch.
async fn everything_is_as_in_a_model<B: Backend>(store: &B) {
    const KEYS: [&str; 6] = ["a", "a/1", "a/2", "b/1", "b/2", "c"];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut model: BTreeMap<String, Kv> = BTreeMap::new();
    let mut past = vec![model.clone()];
    for step in 0..400 {
        let mut then = Vec::new();
        for key in KEYS {
            match draw(8) {
                0 | 1 => then.push(put(key, &step.to_string())),
                2 => then.push(delete(key)),
                _ => {}
            }
        }
        let key = KEYS[draw(6) as usize];
        let guess = past.len() as u64 - 1 - draw(2).min(past.len() as u64 - 1);
        let compare = match draw(4) {
            0 => vec![Compare::Absent(key.into())],
            1 => vec![Compare::Modified(key.into(), guess)],
            _ => vec![],
        };
        let holds = match compare.first() {
            Some(Compare::Absent(key)) => !model.contains_key(key),
            Some(Compare::Modified(key, revision)) => model.get(key).is_some_and(|row| row.modified == *revision),
            _ => true,
        };
        let revision = past.len() as u64;
        let changes = then.iter().any(|op| matches!(op, Op::Put(..)) || model.contains_key(op.key()));
        let outcome = store.txn(compare, then.clone()).await.unwrap();
        assert_eq!(outcome, holds.then_some(if changes { revision } else { revision - 1 }), "step {step}");
        if !holds || !changes {
            continue;
        }
        for op in then {
            match op {
                Op::Put(key, value) => {
                    let created = model.get(&key).map_or(revision, |row| row.created);
                    model.insert(key.clone(), Kv { key, value, created, modified: revision });
                }
                Op::Delete(key) => {
                    model.remove(&key);
                }
            }
        }
        past.push(model.clone());
    }
    assert!(past.len() > 200, "the model has changed");
    for (at, rows) in past.iter().enumerate() {
        let expected: Vec<Kv> = rows.values().cloned().collect();
        assert_eq!(store.range_at("", at as u64).await.unwrap(), expected, "revision {at}");
    }
    let mut watch = store.watch("", 0, DEADLINE).await.unwrap();
    let mut replayed: BTreeMap<String, Kv> = BTreeMap::new();
    for (revision, rows) in past.iter().enumerate().skip(1) {
        for event in next(&mut watch).await.unwrap() {
            assert_eq!(event.revision(), revision as u64);
            match event {
                Event::Put(row) => replayed.insert(row.key.clone(), row),
                Event::Delete { key, .. } => Some(replayed.remove(&key).expect("only what exists is deleted")),
            };
        }
        assert_eq!(&replayed, rows, "revision {revision}");
    }
}
