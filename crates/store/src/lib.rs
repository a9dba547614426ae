//! Desired state on disk: a key-value store with transactions, revisions and watches, on SQLite.
//!
//! Owns one database file and its lock. A transaction that is acknowledged survives a power loss: one
//! writer thread commits everything that waits in one SQLite transaction (WAL, `synchronous=FULL`) and
//! answers after it. Never interprets a value, never drops or repeats an event of a watch, and never
//! queues for a slow watcher: watches read the history table at their own speed.
//!
//! Tested by the [`conformance`] suite, which a second backend would have to pass too, by killing a
//! writing process over and over, and by power losses of a loop-mounted disk.
#![forbid(unsafe_code)]

mod backup;
pub mod conformance;
mod db;
mod error;
mod limits;
mod read;
mod store;
mod types;
mod watch;
mod writer;

pub use error::{StoreError, WatchError};
pub use limits::{
    HISTORY_REVISIONS, MAX_COMPARES, MAX_KEY_BYTES, MAX_OPS, MAX_PAGE_ROWS, MAX_RANGE_BYTES, MAX_REQUEST_BYTES,
    MAX_VALUE_BYTES,
};
pub use store::Store;
pub use types::{Compare, Event, Kv, Op, Page};
pub use watch::Watch;
