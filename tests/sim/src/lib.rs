//! A deterministic simulator: hosts with the real `dunlin_machine`, in virtual time, under everything that goes wrong.
//!
//! ```text
//! people, plans, edges --calls: lost, twice, late--> agent (real core) --effects--> journal on a faulty disk
//! control --views: lost, late, stale, empty-------->   | killed after any effect     supervisors that outlive it
//!                                                      +-- answers, facts ---------> promises: what must hold
//! ```
//!
//! One seed is one story: the only chance is [`rng::Rng`], the only clock the world's. `cargo xtask sim --seed N`
//! tells it; `cargo xtask test` runs a fixed number of them and shows that each of [`mutation::Mutation`] is found.
//!
//! Three scenes: this one, of machines under a random control; [`flock`], of hosts that share state under a liar; [`fleet`], of
//! all cores together, with plans and edges.
//!
//! Not modelled here: a supervisor that takes its lock only after the next agent has asked for it, moves between hosts,
//! what the host's own code adds (the guard of tombstones, retries of single acts).
#![forbid(unsafe_code)]

mod disk;
pub mod fleet;
pub mod flock;
mod host;
pub mod mutation;
mod promises;
mod rng;
mod supervisor;
mod world;

pub use mutation::Mutation;
use world::World;

/// Steps of a run; each is one act of somebody.
pub const STEPS: u64 = 150;

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    pub steps: u64,
    pub mutation: Option<Mutation>,
    /// Keep every line of it.
    pub story: bool,
}

impl Options {
    pub fn of(seed: u64) -> Self {
        Self { seed, steps: STEPS, mutation: None, story: false }
    }
}

/// How a run went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub seed: u64,
    /// The promise that was broken, if any.
    pub broken: Option<String>,
    /// When it ended, in virtual time.
    pub at_ms: u64,
    pub happened: u64,
    pub story: Vec<String>,
}

pub fn run(options: Options) -> Outcome {
    let mut world = World::new(&options);
    for _ in 0..options.steps {
        if world.broken() {
            break;
        }
        world.step();
    }
    if !world.broken() {
        world.settle();
    }
    let (broken, at_ms, happened) = (world.ctx.promises.broken.clone(), world.ctx.now_ms, world.ctx.happened);
    Outcome { seed: options.seed, broken, at_ms, happened, story: world.into_story() }
}
