//! What is known of the room on hosts beyond their facts, which are a few seconds old. In memory only: losing it costs
//! one more question.

use dunlin_api::Refusal;
use dunlin_model::{AppName, HostId};
use dunlin_planner::Observed;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A host that refused is not asked again for the same release for this long; its next fact is there by then. Another
/// release asks anew: its maker may have made room.
const REFUSED_MS: u64 = 10_000;
/// A host speaks of itself every 5 s: one that has not for this long has nothing better to say.
const SPEAKS_WITHIN_MS: u64 = 12_000;

/// An app's spread is looked at this often. Hosts join and are cordoned by people, and machines rest for minutes anyway.
const DRIFT_LOOK_MS: u64 = 60_000;

#[derive(Default)]
pub(crate) struct Room(Mutex<Known>);

/// What a host says of its room is left out of account for this long once it was found to be wrong.
const DISBELIEVED_MS: u64 = 60_000;
/// Claims and answers that differ for longer than facts travel, and twice in this time, are no matter of moments.
const DIFFERS_WITHIN_MS: u64 = 120_000;

#[derive(Default)]
struct Known {
    disbelieved: BTreeMap<HostId, u64>,
    /// Of hosts that refused although they had said that they have room: when, and when they had said so.
    boasted: BTreeMap<HostId, (u64, u64)>,
    refused: BTreeMap<(AppName, u32), BTreeMap<HostId, Refused>>,
    doubts: BTreeMap<AppName, Doubt>,
    drifts: BTreeMap<AppName, Drift>,
}

/// Whether an app's machines stood too close together when that was last looked at.
struct Drift {
    found: bool,
    /// They are all on one host, and have nowhere to go.
    crowded: bool,
    until_ms: u64,
}

struct Refused {
    why: String,
    until_ms: u64,
}

/// Facts from which it follows that a plan finds no room.
struct Doubt {
    sequence: u64,
    spoke_at_ms: BTreeMap<HostId, u64>,
    until_ms: u64,
}

impl Room {
    /// A host refused a reservation for a release.
    pub fn refused_by(&self, host: &HostId, app: &AppName, release: u32, refusal: &Refusal, now_ms: u64) {
        let why = match refusal {
            Refusal::InsufficientCapacity { why, .. } => why.clone(),
            other => other.to_string(),
        };
        let refused = Refused { why, until_ms: now_ms + REFUSED_MS };
        self.lock().refused.entry((app.clone(), release)).or_default().insert(host.clone(), refused);
    }

    /// It says that it is full, and promises room when it is asked: until it says something sensible its word counts for nothing.
    pub fn disbelieve(&self, host: &HostId, now_ms: u64) {
        self.lock().disbelieved.insert(host.clone(), now_ms + DISBELIEVED_MS);
    }

    pub fn believes(&self, host: &HostId, now_ms: u64) -> bool {
        self.lock().disbelieved.get(host).is_none_or(|until_ms| now_ms >= *until_ms)
    }

    /// It refused, and its fact of `spoke_at_ms` claims room. Once means nothing: another app may have been faster. True if it has
    /// claimed that again since it last refused.
    pub fn boasts(&self, host: &HostId, spoke_at_ms: u64, now_ms: u64) -> bool {
        let before = self.lock().boasted.insert(host.clone(), (now_ms, spoke_at_ms));
        before.is_some_and(|(at_ms, spoke_before_ms)| now_ms < at_ms + DIFFERS_WITHIN_MS && spoke_at_ms > spoke_before_ms)
    }

    /// Who refused the release lately, and why.
    pub fn refused(&self, app: &AppName, release: u32, now_ms: u64) -> BTreeMap<HostId, String> {
        let mut known = self.lock();
        for refused in known.refused.values_mut() {
            refused.retain(|_, refused| now_ms < refused.until_ms);
        }
        known.refused.retain(|_, refused| !refused.is_empty());
        let refused = known.refused.get(&(app.clone(), release));
        refused.into_iter().flatten().map(|(host, refused)| (host.clone(), refused.why.clone())).collect()
    }

    /// No room, say the facts of hosts: may they be older than what made room? Then until when to wait for newer ones.
    /// `None`: every host that did not refuse has spoken since, or has had its time.
    pub fn doubt(&self, app: &AppName, sequence: u64, observed: &Observed, now_ms: u64) -> Option<u64> {
        let mut known = self.lock();
        let unasked = observed.hosts.iter().filter(|(host, _)| !observed.refused.contains_key(*host));
        let spoke_at_ms: BTreeMap<HostId, u64> = unasked.map(|(id, fact)| (id.clone(), fact.updated_at_ms)).collect();
        if let Some(doubt) = known.doubts.get_mut(app).filter(|doubt| doubt.sequence == sequence) {
            let is_new = |(host, at_ms): (&HostId, &u64)| doubt.spoke_at_ms.get(host).is_none_or(|before| at_ms > before);
            if spoke_at_ms.iter().all(is_new) {
                doubt.until_ms = 0; // over, for this plan and for the way back that it may become
            }
            return Some(doubt.until_ms).filter(|until_ms| now_ms < *until_ms);
        }
        if spoke_at_ms.is_empty() {
            return None;
        }
        let until_ms = now_ms + SPEAKS_WITHIN_MS;
        known.doubts.insert(app.clone(), Doubt { sequence, spoke_at_ms, until_ms });
        Some(until_ms)
    }

    /// What was found of an app's spread a moment ago; `None`: look again.
    pub fn drift(&self, app: &AppName, now_ms: u64) -> Option<bool> {
        self.lock().drifts.get(app).filter(|drift| now_ms < drift.until_ms).map(|drift| drift.found)
    }

    /// Gives whether its machines are all on one host, and were not when that was last looked at.
    pub fn looked_for_drift(&self, app: &AppName, found: bool, crowded: bool, now_ms: u64, rest_ms: u64) -> bool {
        let drifts = &mut self.lock().drifts;
        drifts.retain(|_, drift| now_ms < drift.until_ms + DRIFT_LOOK_MS);
        let before = drifts.insert(app.clone(), Drift { found, crowded, until_ms: now_ms + DRIFT_LOOK_MS.min(rest_ms) });
        crowded && !before.is_some_and(|before| before.crowded)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
