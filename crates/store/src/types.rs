//! What goes in and out.

/// One row, as of the revision it was read at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kv {
    pub key: String,
    pub value: Vec<u8>,
    /// Revision of the put that made the key exist.
    pub created: u64,
    /// Revision of the newest put.
    pub modified: u64,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    Absent(String),
    Exists(String),
    /// The key exists and its newest put has this revision.
    Modified(String, u64),
}

impl Compare {
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::Modified(key, _) => key,
        }
    }
}

/// A write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put(String, Vec<u8>),
    /// Does nothing if the key does not exist.
    Delete(String),
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// A part of a range. Ask for the next part from `next`, at `revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub rows: Vec<Kv>,
    pub revision: u64,
    /// The first key that did not fit; `None` = this was the last page.
    pub next: Option<String>,
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put(Kv),
    Delete { key: String, revision: u64 },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(row) => &row.key,
            Self::Delete { key, .. } => key,
        }
    }

    pub fn revision(&self) -> u64 {
        match self {
            Self::Put(row) => row.modified,
            Self::Delete { revision, .. } => *revision,
        }
    }
}
