//! The fleet: hosts with the real `dunlin_gossip`, `dunlin_machine`, `dunlin_view` and `dunlin_routing`, and a model of control
//! that has the real `dunlin_planner` decide, in virtual time.
//!
//! ```text
//! people --releases, scale, drains--> store --projection--> config/0 --gossip--> views --assignments, tombstones--> agents
//!                                       ^ plan, check, advance <--facts-- views <--gossip-- host/<id> <--facts-- agents
//!                                     control --probes, reservations, orders--> hosts      supervisors outlive agents
//! requests --> edge: Table::route(its view) --hop--> the agent's own table: admits, refuses
//! ```
//!
//! Trouble: links that lose, repeat, delay, reorder, corrupt, are cut, or are cut one way; clocks that jump; agents, hosts and
//! control that are killed between any two effects; disks that are wiped, or put back to what they were; a relay that lies; a
//! copy of a host that starts beside it; control that publishes half of what it should, or is put back to a backup of its store; a
//! host that speaks for others.
//! What must hold is in `checks.rs`, a sentence above each check, and in `settle.rs` for the time after the last trouble.
//!
//! `cargo xtask sim --fleet --seed N` tells a story. A model is only what does IO in production: the store's transactions,
//! the executor of steps, calls, rows. Not modelled: leases, secrets, checks of machines, the other members' summaries.

mod adopt;
mod checks;
mod control;
mod edge;
mod member;
mod rows;
mod settle;
mod steps;
mod store;
mod trouble;
mod wires;
mod world;

use crate::{Mutation, Outcome};
use dunlin_gossip::planted;
use world::World;

/// Acts of trouble in a run; about a second passes between two.
pub const STEPS: u64 = 60;
/// Before them everything comes up.
const BEGIN_MS: u64 = 12_000;

/// A rule that is broken on purpose, in what goes into a core or comes out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    Gossip(planted::Bug),
    Machine(Mutation),
    /// Control that was restored goes on from its backup, whatever the fleet knows.
    AdoptNothing,
    /// Control asks no host whether it answers: silence in gossip is enough.
    SilenceAlone,
    /// A host is dead when its probe fails, whoever else hears of it.
    ProbeAlone,
    /// One probe that fails is enough.
    OneProbe,
    /// Control never thinks that it is itself what is cut off.
    NeverCutOff,
    /// The planner takes machines that may run once for such that may run twice.
    ReplaceExclusive,
    /// What is replaced is given up before its successor is there.
    DestroyFirst,
    /// What is planned differs from what was planned before, each time.
    NeverSettles,
    /// A host that returns does not obey tombstones.
    IgnoreTombstones,
    /// A host takes desired state that is older than what it has.
    OldConfig,
    /// A reader takes what a host says of another's machines.
    ForeignFacts,
    /// An edge sends a request again to a machine that has refused it.
    IgnoreRefusal,
    /// An edge goes on with the table that it has.
    StaleTable,
    /// The last hop does not look which version is meant.
    AdmitAnyVersion,
}

impl Bug {
    fn of_machines(self) -> Option<Mutation> {
        if let Self::Machine(mutation) = self { Some(mutation) } else { None }
    }
}

/// The bugs that are planted one at a time, by name.
pub const BUGS: &[(&str, Bug)] = &[
    ("adopt-nothing", Bug::AdoptNothing),
    ("silence-alone", Bug::SilenceAlone),
    ("probe-alone", Bug::ProbeAlone),
    ("one-probe", Bug::OneProbe),
    ("never-cut-off", Bug::NeverCutOff),
    ("replace-exclusive", Bug::ReplaceExclusive),
    ("destroy-first", Bug::DestroyFirst),
    ("never-settles", Bug::NeverSettles),
    ("ignore-tombstones", Bug::IgnoreTombstones),
    ("old-config", Bug::OldConfig),
    ("foreign-facts", Bug::ForeignFacts),
    ("ignore-refusal", Bug::IgnoreRefusal),
    ("stale-table", Bug::StaleTable),
    ("admit-any-version", Bug::AdmitAnyVersion),
    ("absence-destroys", Bug::Machine(Mutation::AbsenceDestroys)),
    ("spawn-again", Bug::Machine(Mutation::SpawnAgain)),
    ("believe-nobody", Bug::Machine(Mutation::BelieveNobody)),
    ("publish-at-once", Bug::Gossip(planted::Bug::PublishAtOnce)),
    ("trust-digest", Bug::Gossip(planted::Bug::TrustDigest)),
    ("trust-heads", Bug::Gossip(planted::Bug::TrustHeads)),
    ("ignore-duplicate", Bug::Gossip(planted::Bug::IgnoreDuplicate)),
    ("old-epoch", Bug::Gossip(planted::Bug::OldEpoch)),
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
    planted::plant(if let Some(Bug::Gossip(bug)) = options.bug { Some(bug) } else { None });
    let mut world = World::new(&options);
    world.pass(BEGIN_MS);
    for _ in 0..options.steps {
        if world.broken().is_some() {
            break;
        }
        world.step();
        if options.story {
            let living = world.summary();
            world.ctx.tell(|| format!("living: {living}"));
        }
    }
    if world.broken().is_none() {
        world.settle();
    }
    planted::plant(None);
    let broken = world.broken().cloned();
    Outcome { seed: options.seed, broken, at_ms: world.ctx.now_ms, happened: world.ctx.happened, story: world.ctx.story.unwrap_or_default() }
}
