//! When a log counts as alive: what was strictly newer must have come as it was said, not out of somebody's store.

use crate::beat::{BEAT_MS, CHAIN_MS};

/// What says of itself that it is older than this, by the reader's clock, is a replay and no sign of life. A writer whose
/// clock is further behind a reader's than this is never fresh to that reader.
pub const MAX_SKEW_MS: u64 = 300_000;
/// A log that was not heard of for so long is believed to live by its own news only, not because some were fetched.
const SILENT_MS: u64 = 30_000;
/// Fetched news confirm when the writer's clock has gone on, for so long, as the reader's has, give or take a beat.
const PACE_MS: u64 = 6_000;

/// How and when something came.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    pub now_ms: u64,
    /// The reader's clock, to compare with the writer's.
    pub clock_ms: u64,
    /// Asked for or found by comparing, so it may have been said long ago.
    pub fetched: bool,
}

impl Receipt {
    fn is_recent(&self, said_ms: u64) -> bool {
        said_ms.saturating_add(MAX_SKEW_MS) >= self.clock_ms
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Fresh {
    /// When something strictly newer was last heard: a head, or a beat of it.
    pub newer_at_ms: u64,
    /// False for what came from a snapshot or was only fetched, until live news cover it.
    pub confirmed: bool,
    /// The reader's time and the writer's at the first of the fetched news that may confirm together.
    pace: Option<(u64, u64)>,
}

impl Fresh {
    pub fn begin(said_ms: u64, receipt: Receipt) -> Self {
        let confirmed = !receipt.fetched && receipt.is_recent(said_ms);
        Self { newer_at_ms: receipt.now_ms, confirmed, pace: receipt.fetched.then_some((receipt.now_ms, said_ms)) }
    }

    /// Something strictly newer has come, which its writer said at `said_ms` by its own clock. Whether it is a sign of life.
    pub fn renew(&mut self, said_ms: u64, receipt: Receipt) -> bool {
        let lives = self.confirmed && receipt.now_ms.saturating_sub(self.newer_at_ms) < SILENT_MS;
        let is_live = receipt.is_recent(said_ms) && (lives || !receipt.fetched || self.keeps_pace(said_ms, receipt.now_ms));
        if is_live {
            *self = Self { newer_at_ms: receipt.now_ms, confirmed: true, pace: None };
        }
        is_live
    }

    /// A dead writer's clock stands still once all of its past is here; whoever replays it at its old pace is [`MAX_SKEW_MS`]
    /// late soon.
    fn keeps_pace(&mut self, said_ms: u64, now_ms: u64) -> bool {
        let (since_ms, from_ms) = *self.pace.get_or_insert((now_ms, said_ms));
        let (passed_ms, went_ms) = (now_ms.saturating_sub(since_ms), said_ms.saturating_sub(from_ms));
        let keeps_pace = went_ms.abs_diff(passed_ms) <= BEAT_MS;
        if !keeps_pace {
            self.pace = Some((now_ms, said_ms)); // a piece of the past: counted from here
        }
        keeps_pace && passed_ms >= PACE_MS
    }
}

/// When a beat is revealed, by its writer's clock.
pub(crate) fn beat_ms(chain: u32, index: u16) -> u64 {
    u64::from(chain) * CHAIN_MS + u64::from(index) * BEAT_MS
}
