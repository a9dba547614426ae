//! The flock: processes with the real `dunlin_gossip`, in virtual time, on a network and on disks that fail.
//!
//! ```text
//! owners: facts that survive --publish--> node --datagrams, streams: lost, twice, late, out of order, corrupted--> node
//! control: a store's revisions ---------> two of them      one of them lies about what it relays
//! trouble: partitions, one-way links, kills, wiped and rolled-back disks, clocks, a clone, two heads of one sequence
//! every `Changed` ---------------------> checks: what was really written, and nothing else
//! ```
//!
//! `cargo xtask sim --flock --seed N` tells a story. What a partition permits is the sentence above each check.

mod checks;
pub(crate) mod liar;
pub(crate) mod network;
mod process;
pub mod scale;
mod world;

use crate::Outcome;
pub use dunlin_gossip::planted::Bug;
use world::World;

/// Acts of trouble in a run; some hundred milliseconds pass between two.
pub const STEPS: u64 = 150;

/// The bugs that are planted one at a time, by name.
pub const BUGS: &[(&str, Bug)] = &[
    ("trust-digest", Bug::TrustDigest),
    ("trust-heads", Bug::TrustHeads),
    ("trust-certificates", Bug::TrustCertificates),
    ("ignore-forks", Bug::IgnoreForks),
    ("go-back", Bug::GoBack),
    ("old-epoch", Bug::OldEpoch),
    ("keep-tombstones", Bug::KeepTombstones),
    ("publish-at-once", Bug::PublishAtOnce),
    ("no-gap", Bug::NoGap),
    ("ignore-duplicate", Bug::IgnoreDuplicate),
    ("never-probe-lives", Bug::NeverProbeLives),
    ("no-anti-entropy", Bug::NoAntiEntropy),
    ("no-buckets", Bug::NoBuckets),
    ("no-push", Bug::NoPush),
    ("trust-snapshot", Bug::TrustSnapshot),
    ("any-receipt-is-fresh", Bug::AnyReceiptIsFresh),
    ("never-announce-again", Bug::NeverAnnounceAgain),
    ("no-self-check", Bug::NoSelfCheck),
    ("fetched-is-fresh", Bug::FetchedIsFresh),
    ("leave-beats", Bug::LeaveBeats),
    ("subscribe-for-ever", Bug::SubscribeForEver),
];

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    pub steps: u64,
    pub bug: Option<Bug>,
    /// Keep every line of it.
    pub story: bool,
}

impl Options {
    pub fn of(seed: u64) -> Self {
        Self { seed, steps: STEPS, bug: None, story: false }
    }
}

pub fn run(options: Options) -> Outcome {
    dunlin_gossip::planted::plant(options.bug);
    let mut world = World::new(&options);
    for _ in 0..options.steps {
        if world.checks.broken.is_some() {
            break;
        }
        world.step();
    }
    if world.checks.broken.is_none() {
        world.settle();
    }
    dunlin_gossip::planted::plant(None);
    let World { checks, now_ms, handled, story, .. } = world;
    Outcome { seed: options.seed, broken: checks.broken, at_ms: now_ms, happened: handled, story }
}
