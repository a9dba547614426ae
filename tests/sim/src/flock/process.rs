//! One process: a node, its disk, its clock, and the reader that lives from what the node says.

use dunlin_gossip::{Key, Node, OriginId, Row};
use std::collections::BTreeMap;

/// A system's clock in 2026; every process is a little off.
const EPOCH_MS: u64 = 1_790_000_000_000;

pub struct Process {
    /// Whose identity it runs under. A clone has another's.
    pub host: usize,
    pub is_clone: bool,
    pub node: Option<Node>,
    /// The newest snapshot is the last; a rollback takes an earlier one.
    pub disk: Vec<Vec<u8>>,
    /// What its owner wants published; survives as the owner's own journal does.
    pub facts: BTreeMap<Key, Vec<u8>>,
    pub skew_ms: i64,
    pub started_ms: u64,
    pub lives: u64,
    pub silenced: bool,
    pub reader: BTreeMap<OriginId, Seen>,
    /// How far it has published the store, if it is control.
    pub published_revision: u64,
}

/// What a reader has been told of one origin.
#[derive(Default, Clone)]
pub struct Seen {
    pub at: (u32, u64),
    pub rows: BTreeMap<Key, Row>,
}

impl Process {
    pub fn new(host: usize) -> Self {
        Self {
            host,
            is_clone: false,
            node: None,
            disk: vec![],
            facts: BTreeMap::new(),
            skew_ms: 0,
            started_ms: 0,
            lives: 0,
            silenced: false,
            reader: BTreeMap::new(),
            published_revision: 0,
        }
    }

    pub fn wall_ms(&self, now_ms: u64) -> u64 {
        (EPOCH_MS + now_ms).saturating_add_signed(self.skew_ms)
    }

    /// In the world's time; a node counts from its own start.
    pub fn next_wake_ms(&self) -> u64 {
        self.node.as_ref().map_or(u64::MAX, |node| node.next_wake_ms().saturating_add(self.started_ms))
    }

    pub fn is_up(&self) -> bool {
        self.node.is_some() && !self.silenced
    }
}
