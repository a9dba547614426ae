//! Writes to a store until it is killed, and says on standard output what was acknowledged.
//!
//! `dunlin-store-load <store> <writers>`: each writer counts up in two keys that change together, and
//! prints `<writer> <count>` after each acknowledgement.

use dunlin_store::{Compare, Op, Store};
use std::io::Write;
use std::path::Path;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let path = args.next().expect("usage: dunlin-store-load <store> <writers>");
    let writers: usize = args.next().and_then(|n| n.parse().ok()).expect("the second argument is a number of writers");
    let store = Store::open(Path::new(&path)).unwrap_or_else(|error| panic!("{error}: {error:?}"));
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..writers {
        tasks.spawn(write(store.clone(), writer));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a writer failed");
    }
}

async fn write(store: Store, writer: usize) {
    let (left, right) = (format!("left/{writer}"), format!("right/{writer}"));
    let found = store.get(&left).await.expect("the row can be read");
    let mut count: u64 = found.as_ref().map_or(0, |row| String::from_utf8_lossy(&row.value).parse().expect("a number"));
    let mut compare = found.map_or(Compare::Absent(left.clone()), |row| Compare::Modified(left.clone(), row.modified));
    loop {
        count += 1;
        let value = count.to_string().into_bytes();
        let then = vec![Op::Put(left.clone(), value.clone()), Op::Put(right.clone(), value)];
        let revision = store.txn(vec![compare], then).await.expect("a write").expect("nobody else writes this key");
        compare = Compare::Modified(left.clone(), revision);
        // One write call a line, so that a kill never leaves half of one before another.
        let mut out = std::io::stdout().lock();
        if out.write_all(format!("{writer} {count}\n").as_bytes()).and_then(|()| out.flush()).is_err() {
            return; // the reader is gone
        }
    }
}
