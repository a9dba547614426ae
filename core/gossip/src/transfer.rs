//! Long logs that are on their way here: while one peer gives such a log, nobody else is asked for it.
//!
//! How long that takes is up to the line and to how busy this host is. Whoever is asked again meanwhile gives all of it once more,
//! which takes both still longer; so each further try waits twice as long as the one before.

use crate::id::{Addr, OriginId};
use std::collections::BTreeMap;

/// Without a part of it for so long, somebody else is asked: at first, and at most.
const PATIENCE_MS: u64 = 500;
const MOST_PATIENCE_MS: u64 = 16_000;
/// All of it has so many times longer than a part, so that nobody keeps it from this host by giving it slowly.
const PARTS_OF_PATIENCE: u64 = 32;
/// Of a log that nobody gives any more.
const FORGOTTEN_MS: u64 = 60_000;

#[derive(Default)]
pub(crate) struct Transfers(BTreeMap<OriginId, Transfer>);

struct Transfer {
    from: Addr,
    began_ms: u64,
    moved_ms: u64,
    patience_ms: u64,
}

impl Transfers {
    pub fn is_on_its_way(&self, id: OriginId, now_ms: u64) -> bool {
        self.0.get(&id).is_some_and(|transfer| {
            let lasts_ms = now_ms.saturating_sub(transfer.began_ms);
            now_ms.saturating_sub(transfer.moved_ms) < transfer.patience_ms && lasts_ms < transfer.patience_ms * PARTS_OF_PATIENCE
        })
    }

    /// A peer was asked for it, or for the rest of what it gives.
    pub fn asked(&mut self, id: OriginId, from: &Addr, now_ms: u64) {
        let goes_on = self.is_on_its_way(id, now_ms) && self.0[&id].from == *from;
        if goes_on {
            return self.moved(id, from, now_ms);
        }
        let patience_ms = self.0.get(&id).map_or(PATIENCE_MS, |before| (before.patience_ms * 2).min(MOST_PATIENCE_MS));
        self.0.insert(id, Transfer { from: from.clone(), began_ms: now_ms, moved_ms: now_ms, patience_ms });
    }

    /// A part has come; of others than who was asked last that says nothing.
    pub fn moved(&mut self, id: OriginId, from: &Addr, now_ms: u64) {
        if let Some(transfer) = self.0.get_mut(&id).filter(|transfer| transfer.from == *from) {
            transfer.moved_ms = now_ms;
        }
    }

    pub fn is_known(&self, id: OriginId) -> bool {
        self.0.contains_key(&id)
    }

    pub fn ended(&mut self, id: OriginId) {
        self.0.remove(&id);
    }

    pub fn forget(&mut self, now_ms: u64) {
        self.0.retain(|_, transfer| now_ms.saturating_sub(transfer.moved_ms) < FORGOTTEN_MS);
    }
}
