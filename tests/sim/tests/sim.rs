//! A bounded number of stories, and the proof that they find what they are for.

use dunlin_sim::{Mutation, Options, Outcome, run};

const SEEDS: u64 = 300;
/// Within this many seeds each broken rule is found.
const SEEDS_FOR_A_MUTATION: u64 = 1_000;

#[test]
fn no_story_breaks_a_promise() {
    for seed in 0..SEEDS {
        let outcome = run(Options::of(seed));
        assert_eq!(outcome.broken, None, "tell it with: cargo xtask sim --seed {seed}");
    }
}

#[test]
fn every_broken_rule_is_found() {
    let found = |mutation| {
        let of = |seed| run(Options { mutation: Some(mutation), ..Options::of(seed) });
        (0..SEEDS_FOR_A_MUTATION).map(of).find(|outcome: &Outcome| outcome.broken.is_some())
    };
    let mut missed = vec![];
    for &mutation in Mutation::ALL {
        match found(mutation) {
            Some(outcome) => println!("{:22} seed {:3}: {}", mutation.name(), outcome.seed, outcome.broken.unwrap_or_default()),
            None => missed.push(mutation.name()),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_FOR_A_MUTATION} seeds: {missed:?}");
}

#[test]
fn one_seed_is_one_story() {
    for seed in 0..5 {
        let told = || run(Options { story: true, ..Options::of(seed) });
        assert_eq!(told(), told());
        assert!(told().story.len() > 100);
    }
}
