//! Bugs that the simulator turns on, one at a time, to show that its checkers find them. Without the feature `planted`
//! every one of them is the constant `false`.

/// A rule that can be broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Takes rows that are not those that the head signs.
    TrustDigest,
    /// Takes heads that nobody has signed.
    TrustHeads,
    /// Takes certificates that the cluster has not signed.
    TrustCertificates,
    /// Sees no contradiction between two heads of one sequence.
    IgnoreForks,
    /// Goes back to an older sequence.
    GoBack,
    /// Goes back to an older epoch.
    OldEpoch,
    /// Keeps tombstones below the floor.
    KeepTombstones,
    /// Publishes after a start without asking for its own highest head.
    PublishAtOnce,
    /// Goes on exactly at the highest head that it was told.
    NoGap,
    /// Goes on although it was shown that another life of it answers.
    IgnoreDuplicate,
    /// Does not ask the older life whether it still answers.
    NeverProbeLives,
    /// Never compares roots: what push lost stays lost.
    NoAntiEntropy,
    /// Compares buckets never.
    NoBuckets,
    /// Pushes nothing.
    NoPush,
    /// Calls what came from a snapshot confirmed.
    TrustSnapshot,
    /// Counts any receipt as a sign of life.
    AnyReceiptIsFresh,
    /// Asks no saved peer again once it is alone.
    NeverAnnounceAgain,
    /// Never compares its own memory with the digests.
    NoSelfCheck,
    /// Calls what was only fetched a sign of life.
    FetchedIsFresh,
    /// Leaves the beats of config to the process that signed it last.
    LeaveBeats,
    /// Never gives up a subscription.
    SubscribeForEver,
}

#[cfg(feature = "planted")]
mod active {
    use super::Bug;
    use std::cell::Cell;

    thread_local!(static BUG: Cell<Option<Bug>> = const { Cell::new(None) });

    /// Of this thread, until it is called again.
    pub fn plant(bug: Option<Bug>) {
        BUG.set(bug);
    }

    pub fn is(bug: Bug) -> bool {
        BUG.get() == Some(bug)
    }
}

#[cfg(feature = "planted")]
pub use active::{is, plant};

macro_rules! planted {
    ($bug:ident) => {{
        #[cfg(feature = "planted")]
        let planted = $crate::planted::is($crate::planted::Bug::$bug);
        #[cfg(not(feature = "planted"))]
        let planted = false;
        planted
    }};
}
pub(crate) use planted;
