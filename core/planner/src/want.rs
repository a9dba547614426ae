//! Whether an app wants a plan, and what for. Reconcilers compare existence, count and version, never run state.

use crate::{Ended, Plan, Progress, Purpose, is_replaceable};
use dunlin_model::HostId;
use dunlin_model::desired::{MachineRow, ReleaseStatus};
use std::collections::{BTreeMap, BTreeSet};

/// A repair or a move that failed, for lack of room for example, is tried again after this.
pub const REPAIR_RETRY_MS: u64 = 30_000;

/// How an app stands whose last plan has ended.
#[derive(Debug, Clone)]
pub struct Standing<'a> {
    /// Of the release that should run.
    pub status: ReleaseStatus,
    /// Machines in each of its process groups.
    pub wanted: &'a BTreeMap<String, u32>,
    /// The app's machines that releases made.
    pub machines: &'a [&'a MachineRow],
    /// The last plan of the app, as far as it got.
    pub last: Option<(&'a Plan, &'a Progress)>,
    pub dead: &'a BTreeSet<HostId>,
}

impl Standing<'_> {
    /// A way back that was given up half-way, because the world was not what it was made for: until the release that failed
    /// has ended, the way has to be gone to its end. The good release is not `Running`, so nothing else asks. Gives the
    /// failed release and the purpose.
    pub fn broken_return(&self, current_release: u32) -> Option<(u32, Purpose)> {
        let (plan, progress) = self.last?;
        match plan.purpose {
            Purpose::Return { failed_release } if plan.release == current_release && progress.ended == Some(Ended::Superseded) => {
                Some((failed_release, plan.purpose))
            }
            _ => None,
        }
    }

    /// What is to be planned for the release, if its machines are not all there. Whether they stand well is for
    /// [`crate::drift`] to say.
    pub fn purpose(&self, now_ms: u64) -> Option<Purpose> {
        match self.status {
            ReleaseStatus::Running => Some(Purpose::Deploy),
            ReleaseStatus::Succeeded if !self.has_failed_lately(Purpose::Repair, now_ms) && self.wants_repair() => Some(Purpose::Repair),
            _ => None,
        }
    }

    /// The last plan was for this, and did not find what it needed.
    pub fn has_failed_lately(&self, purpose: Purpose, now_ms: u64) -> bool {
        self.last.is_some_and(|(plan, progress)| {
            let failed = matches!(progress.ended, Some(Ended::Failed { .. }));
            plan.purpose == purpose && failed && now_ms < progress.since_ms.saturating_add(REPAIR_RETRY_MS)
        })
    }

    fn wants_repair(&self) -> bool {
        // A move that was given up half-way leaves a machine too many, and so does a lost host that came back meanwhile.
        let moved_half = self.last.is_some_and(|(plan, progress)| {
            let moves = matches!(plan.purpose, Purpose::Rebalance | Purpose::Repair);
            moves && progress.ended.as_ref().is_some_and(|ended| *ended != Ended::Done)
        });
        let has_lost = self.machines.iter().any(|row| self.dead.contains(&row.host) && is_replaceable(&row.spec));
        let has_too_many = || self.wanted.iter().any(|(group, wanted)| self.count(group) > *wanted as usize);
        has_lost || !self.lacking().is_empty() || moved_half && has_too_many()
    }

    /// The process groups that have fewer machines than they should, and how many each should have.
    ///
    /// How many there should be is what `scale` says and nothing else. A machine that a person destroys therefore comes
    /// back: reconcilers compare existence and count, an app does not end because its only machine was destroyed to be rid
    /// of its state, and to want fewer machines is said with `scale count`. The answer to the destroy says so.
    pub fn lacking(&self) -> BTreeMap<String, u32> {
        let lacking = self.wanted.iter().filter(|(group, wanted)| self.count(group) < **wanted as usize);
        lacking.map(|(group, wanted)| (group.clone(), *wanted)).collect()
    }

    fn count(&self, group: &str) -> usize {
        self.machines.iter().filter(|row| row.spec.process_group == group).count()
    }
}
