//! `cargo xtask sim`: tells one story, or looks through as many as a time allows.

use anyhow::{Context, bail};
use dunlin_sim::{Mutation, Options, run};
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: cargo xtask sim --seed N [--steps N] [--mutation NAME]
       cargo xtask sim --minutes N [--from SEED] [--steps N] [--mutation NAME]";

pub fn command(args: &[&str]) -> anyhow::Result<()> {
    let (mut options, mut seed, mut minutes, mut from) = (Options::of(0), None, None, 0);
    let mut rest = args.iter();
    while let Some(flag) = rest.next() {
        let value = rest.next().with_context(|| format!("{flag} wants a value\n{USAGE}"))?;
        let number = || value.parse::<u64>().with_context(|| format!("{flag} wants a number, not {value:?}"));
        match *flag {
            "--seed" => seed = Some(number()?),
            "--steps" => options.steps = number()?,
            "--minutes" => minutes = Some(number()?),
            "--from" => from = number()?,
            "--mutation" => options.mutation = Some(mutation(value)?),
            _ => bail!("{flag} is unknown\n{USAGE}"),
        }
    }
    match (seed, minutes) {
        (Some(seed), None) => tell(Options { seed, ..options }),
        (None, Some(minutes)) => look(from, Duration::from_secs(minutes * 60), options),
        _ => bail!("{USAGE}"),
    }
}

fn mutation(name: &str) -> anyhow::Result<Mutation> {
    let names = || Mutation::ALL.iter().map(|mutation| mutation.name()).collect::<Vec<_>>().join(", ");
    let known = Mutation::ALL.iter().find(|mutation| mutation.name() == name);
    known.copied().with_context(|| format!("there is no mutation {name:?}; there are {}", names()))
}

fn tell(options: Options) -> anyhow::Result<()> {
    let outcome = run(Options { story: true, ..options });
    for line in &outcome.story {
        println!("{line}");
    }
    match outcome.broken {
        Some(broken) => bail!("seed {}: {broken}", outcome.seed),
        None => println!("seed {}: every promise was kept, over {} inputs", outcome.seed, outcome.happened),
    }
    Ok(())
}

fn look(from: u64, time: Duration, options: Options) -> anyhow::Result<()> {
    let began = Instant::now();
    let (mut seeds, mut happened, mut virtual_ms) = (0, 0, 0);
    while began.elapsed() < time {
        let outcome = run(Options { seed: from + seeds, ..options });
        if let Some(broken) = outcome.broken {
            bail!("seed {}: {broken}\nhint: tell it with: cargo xtask sim --seed {}", outcome.seed, outcome.seed);
        }
        (seeds, happened, virtual_ms) = (seeds + 1, happened + outcome.happened, virtual_ms + outcome.at_ms);
    }
    println!("seeds {from}..{}: every promise was kept, over {happened} inputs and {} virtual hours", from + seeds, virtual_ms / 3_600_000);
    Ok(())
}
