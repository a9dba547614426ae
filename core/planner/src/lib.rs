//! From what should exist and what is observed to an explicit [`Plan`], its check, and its execution.
//!
//! ```text
//! plan(&Desired, &Observed, Pool) -> Plan      names every machine, address, version and command beforehand
//! check(&Plan, &Desired, &Observed)            finds what a plan must never do
//! advance(&Plan, &Progress, &Observed, now)    the next step, a wait, or the end
//! Standing::purpose(now)                       whether an app wants a plan, and what for
//! Watch::hear(probes, silent, now)             which hosts are dead
//! ```
//!
//! Owns the deploy strategy (rolling, one machine at a time, those that do not serve first, gated by health that
//! lasts), placement, rebalancing and the reasons for all of it. A plan is immutable; how far it got is its [`Progress`], which the
//! executor makes durable around each act. Every step may be done twice. What a plan leaves half done, [`Left`],
//! goes to the next one. No IO, no clock, no randomness: ids and addresses come
//! in a [`Pool`]. Tested by unit tests and by properties over a small simulated world
//! (`tests/world.rs`), with a crash at every boundary between a durable write and an act.
#![forbid(unsafe_code)]

mod advance;
mod check;
mod health;
mod placement;
mod plan;
mod rebalance;
mod types;
pub mod upgrade;
mod want;
mod watch;

pub use advance::{STEADY_MS, advance};
pub use check::{Problem, check};
pub use health::MAX_EXITS_BEFORE_HEALTHY;
pub use placement::{Ask, Capacity, Cost, Demand, For, KEPT_FOR_RESTARTS_PERCENT, Nearest, NoCapacity, Spread};
pub use plan::{PlanError, is_replaceable, plan};
pub use rebalance::{MAX_MOVES, Move, Stays, drift, stays};
pub use types::{
    Desired, Ended, GroupTarget, Healthy, Left, Mark, MountTarget, Next, Observed, Plan, Pool, Progress, Purpose, Step,
    StepKind, Tested, VolumeTaken, command_id,
};
use types::kept_mounts;
pub use want::{REPAIR_RETRY_MS, Standing};
pub use watch::{FAILS_FOR_MS, Watch, Watched};

/// Machines of one app; keeps a plan within the store's limits of one value.
pub const MAX_MACHINES_PER_APP: u32 = 100;
