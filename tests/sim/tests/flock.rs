//! A bounded number of stories of the flock, and the proof that they find what they are for.

use dunlin_sim::flock::{BUGS, Options, run};

const SEEDS: u64 = 40;
/// Within this many seeds each planted bug is found.
const SEEDS_FOR_A_BUG: u64 = 500;

#[test]
fn no_story_of_the_flock_breaks_a_promise() {
    for seed in 0..SEEDS {
        let outcome = run(Options::of(seed));
        assert_eq!(outcome.broken, None, "tell it with: cargo xtask sim --flock --seed {seed}");
    }
}

#[test]
fn every_planted_bug_is_found() {
    let mut missed = vec![];
    for (name, bug) in BUGS {
        let of = |seed| run(Options { bug: Some(*bug), ..Options::of(seed) });
        match (0..SEEDS_FOR_A_BUG).map(of).find(|outcome| outcome.broken.is_some()) {
            Some(outcome) => println!("{name:22} seed {:3}: {}", outcome.seed, outcome.broken.unwrap_or_default()),
            None => missed.push(name),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_FOR_A_BUG} seeds: {missed:?}");
}

#[test]
fn one_seed_is_one_story_of_the_flock() {
    for seed in 0..3 {
        let told = || run(Options { story: true, ..Options::of(seed) });
        assert_eq!(told(), told());
    }
}
