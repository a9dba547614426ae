//! Opening, closing, locks, other people's files, and history that trims itself.

use dunlin_model::Generation;
use dunlin_store::{Compare, HISTORY_REVISIONS, Op, Store, StoreError, WatchError};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// No watch here is silent for as long.
const LONG: Duration = Duration::from_secs(30);

fn put(key: &str, value: &str) -> Vec<Op> {
    vec![Op::Put(key.into(), value.as_bytes().to_vec())]
}

fn refusal(path: &Path) -> StoreError {
    Store::open(path).err().expect("it must not open")
}

#[tokio::test]
async fn everything_is_there_after_closing_and_opening() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Store::open(&path).unwrap();
    assert_eq!(store.generation(), Generation { incarnation: 1, revision: 0 });
    store.txn(vec![], put("a", "1")).await.unwrap();
    store.txn(vec![], put("a", "2")).await.unwrap();
    assert_eq!(store.raise_incarnation().await.unwrap(), 2);
    assert_eq!(store.generation(), Generation { incarnation: 2, revision: 2 });
    let mut changes = store.changes();
    changes.mark_unchanged();
    let mut watch = store.watch("", 2, LONG).await.unwrap();
    let clone = store.clone();
    store.close().await;
    assert!(changes.changed().await.is_err(), "closing is seen");
    assert!(matches!(watch.next().await, Err(WatchError::Closed)));
    assert!(matches!(clone.txn(vec![], put("a", "3")).await, Err(StoreError::Closed)));
    assert!(matches!(clone.get("a").await, Err(StoreError::Closed)));

    let store = Store::open(&path).expect("the lock is free, although a clone is still there");
    assert_eq!(store.generation(), Generation { incarnation: 2, revision: 2 });
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"2");
    assert_eq!(store.range_at("", 1).await.unwrap()[0].value, b"1", "history too");
    store.txn(vec![], put("a", "3")).await.unwrap();
    for file in ["store.db", "store.db-wal", "store.db.lock"] {
        let mode = std::fs::metadata(folder.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file} is for its owner only");
    }
}

#[tokio::test]
async fn only_one_may_have_it_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Store::open(&path).unwrap();
    let error = refusal(&path);
    assert!(matches!(&error, StoreError::Locked { holder: Some(pid), .. } if *pid == std::process::id()), "{error:?}");
    store.txn(vec![], put("a", "1")).await.expect("the holder goes on");
    store.close().await;
    Store::open(&path).unwrap();
}

#[tokio::test]
async fn other_files_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    std::fs::write(&path, "not a database, but quite long text. ".repeat(200)).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(matches!(refusal(&path), StoreError::Damaged { .. }), "{:?}", refusal(&path));
    assert_eq!(std::fs::read(&path).unwrap(), before);

    let path = folder.path().join("foreign.db");
    let foreign = rusqlite::Connection::open(&path).unwrap();
    foreign.execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
    drop(foreign);
    assert!(matches!(refusal(&path), StoreError::Damaged { .. }), "{:?}", refusal(&path));

    let path = folder.path().join("newer.db");
    Store::open(&path).unwrap().close().await;
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(refusal(&path), StoreError::NewerFormat { found: 99, .. }), "{:?}", refusal(&path));

    assert!(matches!(refusal(&folder.path().join("no/such/folder/store.db")), StoreError::Open { .. }));
}

#[tokio::test]
async fn damage_is_found_at_opening() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = Store::open(&path).unwrap();
    for n in 0..100 {
        store.txn(vec![], put(&format!("k/{n}"), &"x".repeat(2000))).await.unwrap();
    }
    store.close().await;
    let mut bytes = std::fs::read(&path).unwrap();
    let page = 4096;
    for byte in &mut bytes[page * 3..page * 6] {
        *byte = 0xaa;
    }
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(refusal(&path), StoreError::Damaged { .. }), "{:?}", refusal(&path));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_trims_itself_and_forgets_no_row() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store.db")).unwrap();
    store.txn(vec![], put("old", "kept")).await.unwrap();
    let total = HISTORY_REVISIONS + 1500;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..50 {
        let store = store.clone();
        writers.spawn(async move {
            for _ in 0..total / 50 {
                store.txn(vec![], put(&format!("n/{writer}"), "x")).await.unwrap();
            }
        });
    }
    writers.join_all().await;
    let newest = store.revision();
    assert_eq!(newest, 1 + total / 50 * 50);
    assert!(matches!(store.watch("", 1, LONG).await, Err(WatchError::Compacted { .. })));
    let oldest_promised = newest - HISTORY_REVISIONS;
    let rows = store.range_at("old", oldest_promised).await.unwrap();
    assert_eq!((rows[0].value.as_slice(), rows[0].modified), (b"kept".as_slice(), 1));
    let mut watch = store.watch("", oldest_promised, LONG).await.unwrap();
    for revision in oldest_promised + 1..=newest {
        assert_eq!(watch.next().await.unwrap()[0].revision(), revision);
    }
}

#[tokio::test]
async fn a_transaction_waits_for_nobody_who_went_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store.db")).unwrap();
    for n in 0..50 {
        let write = store.txn(vec![], put(&format!("n/{n}"), ""));
        // Cancelled at its first wait.
        let _ = tokio::time::timeout(std::time::Duration::ZERO, write).await;
    }
    let after = store.txn(vec![Compare::Absent("last".into())], put("last", "")).await.unwrap().unwrap();
    assert_eq!(store.revision(), after);
}
