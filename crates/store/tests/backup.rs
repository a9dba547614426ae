//! Backups of a store in use, and restoring them.

use dunlin_model::Generation;
use dunlin_store::{Op, Store, StoreError};
use std::path::Path;

async fn put(store: &Store, key: &str, value: &str) {
    store.txn(vec![], vec![Op::Put(key.into(), value.as_bytes().to_vec())]).await.unwrap();
}

async fn value(path: &Path, key: &str) -> Vec<u8> {
    let store = Store::open(path).unwrap();
    let value = store.get(key).await.unwrap().unwrap().value;
    store.close().await;
    value
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_one_moment_of_a_busy_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store.db")).unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = store.clone();
        writers.spawn(async move {
            for n in 0..200 {
                let (left, right) = (format!("left/{writer}"), format!("right/{writer}"));
                let value = format!("{n}").into_bytes();
                store.txn(vec![], vec![Op::Put(left, value.clone()), Op::Put(right, value)]).await.unwrap();
            }
        });
    }
    let mut taken = Vec::new();
    for n in 0..5 {
        let to = folder.path().join(format!("backup-{n}"));
        let before = store.revision();
        let generation = store.backup(&to).await.unwrap();
        assert!(generation.revision >= before, "what was acknowledged is in it");
        taken.push((to, generation));
    }
    writers.join_all().await;
    for (path, generation) in taken {
        let copy = Store::open(&path).unwrap();
        assert_eq!(copy.generation(), generation);
        let rows = copy.range("left/").await.unwrap().0;
        for row in rows {
            let right = copy.get(&row.key.replace("left", "right")).await.unwrap().unwrap();
            assert_eq!((row.value, row.modified), (right.value, right.modified), "half a transaction");
        }
        copy.close().await;
    }
    store.close().await;
}

#[tokio::test]
async fn a_restored_store_is_a_newer_incarnation_of_older_rows() {
    let folder = tempfile::tempdir().unwrap();
    let (path, saved) = (folder.path().join("store.db"), folder.path().join("saved"));
    let store = Store::open(&path).unwrap();
    put(&store, "a", "old").await;
    assert_eq!(store.backup(&saved).await.unwrap(), Generation { incarnation: 1, revision: 1 });
    put(&store, "a", "new").await;
    store.raise_incarnation().await.unwrap();
    let error = Store::restore(&saved, &path).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error:?}");
    let last = store.generation();
    store.close().await;

    let restored = Store::restore(&saved, &path).unwrap();
    assert!(restored > last, "{restored} must be newer than {last}");
    assert_eq!(restored, Generation { incarnation: 3, revision: 1 });
    assert_eq!(value(&path, "a").await, b"old");
    assert_eq!(value(&folder.path().join("store.db.replaced-2"), "a").await, b"new", "it is kept");
}

#[tokio::test]
async fn a_damaged_store_is_replaced_and_a_damaged_backup_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let (path, saved) = (folder.path().join("store.db"), folder.path().join("saved"));
    let store = Store::open(&path).unwrap();
    put(&store, "a", "1").await;
    store.backup(&saved).await.unwrap();
    store.raise_incarnation().await.unwrap();
    let last = store.generation();
    store.close().await;

    let bad = folder.path().join("bad");
    std::fs::write(&bad, "no database, whatever it is called. ".repeat(200)).unwrap();
    let error = Store::restore(&bad, &path).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    let error = Store::restore(&folder.path().join("missing"), &path).unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    assert_eq!(value(&path, "a").await, b"1", "nothing was touched");

    std::fs::copy(&bad, &path).unwrap();
    // A log of the old database beside it, which must not be replayed over the new one.
    std::fs::write(folder.path().join("store.db-wal"), "old log").unwrap();
    let restored = Store::restore(&saved, &path).unwrap();
    assert!(restored > last, "{restored} must be newer than {last}");
    assert_eq!(value(&path, "a").await, b"1");
    assert_eq!(std::fs::read(folder.path().join("store.db.replaced-unreadable")).unwrap(), std::fs::read(&bad).unwrap());
}
