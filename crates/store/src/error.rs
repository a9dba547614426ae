//! What can go wrong, and what to do next.

use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store {path} is in use by another process{}: stop that one first", holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Locked { path: PathBuf, holder: Option<u32> },
    #[error("cannot open the store {path}: check that its folder exists and that this user may write there")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a dunlin store or is damaged ({what}): restore it from a backup")]
    Damaged { path: PathBuf, what: String },
    #[error("the store {path} has format {found}, this program knows up to {known}: run a newer version")]
    NewerFormat { path: PathBuf, found: i64, known: i64 },
    #[error("the disk of the store is full, nothing was written: free some space and repeat")]
    Full,
    #[error("the store refuses the request: {0}")]
    Invalid(String),
    #[error("revision {asked} is no longer in the history, which begins at {oldest}: list again")]
    Compacted { asked: u64, oldest: u64 },
    #[error("revision {asked} does not exist yet, the newest is {newest}: list again")]
    Future { asked: u64, newest: u64 },
    #[error("more than {limit} bytes are under {prefix:?}: read it in pages")]
    RangeTooLarge { prefix: String, limit: usize },
    /// After a failed write nobody knows what is on the disk; only opening again tells.
    #[error("the store stopped after a failed write ({0}): check the disk, then restart")]
    Stopped(String),
    #[error("the store is closed")]
    Closed,
    #[error("the database failed")]
    Sql(#[from] rusqlite::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("events after revision {asked} are no longer in the history, which begins at {oldest}: list again")]
    Compacted { asked: u64, oldest: u64 },
    #[error("revision {asked} does not exist yet, the newest is {newest}: list again")]
    Future { asked: u64, newest: u64 },
    #[error("nothing was heard for {silence:?} after revision {after}: list again")]
    Silent { after: u64, silence: Duration },
    #[error("the store is closed")]
    Closed,
    #[error("the history cannot be read")]
    Store(#[source] StoreError),
}

impl From<StoreError> for WatchError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { asked, oldest } => Self::Compacted { asked, oldest },
            StoreError::Future { asked, newest } => Self::Future { asked, newest },
            StoreError::Closed => Self::Closed,
            other => Self::Store(other),
        }
    }
}
