//! The suite that every backend must pass, on SQLite.

use dunlin_store::{Store, conformance};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let mut count = 0;
    conformance::all(async || {
        count += 1;
        Store::open(&folder.path().join(format!("{count}.db"))).unwrap()
    })
    .await;
}
