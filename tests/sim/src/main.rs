//! `cargo xtask sim`, a program of its own so that the house work is built without the cores: tells one story, or looks
//! through as many as a time allows; of machines, of the flock, or of the fleet.
#![forbid(unsafe_code)]

use anyhow::{Context, bail};
use dunlin_sim::{Mutation, Options, Outcome, fleet, flock};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: cargo xtask sim [--flock|--fleet] --seed N [--steps N] [--mutation NAME]
       cargo xtask sim [--flock|--fleet] --minutes N [--from SEED] [--steps N] [--mutation NAME]
       cargo xtask sim --flock --hosts N [--regions N]";

/// What a run is of.
#[derive(Clone, Copy)]
enum Scene {
    Machines(Options),
    Flock(flock::Options),
    Fleet(fleet::Options),
}

impl Scene {
    fn run(self, seed: u64, story: bool) -> Outcome {
        match self {
            Self::Machines(options) => dunlin_sim::run(Options { seed, story, ..options }),
            Self::Flock(options) => flock::run(flock::Options { seed, story, ..options }),
            Self::Fleet(options) => fleet::run(fleet::Options { seed, story, ..options }),
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Self::Machines(_) => "",
            Self::Flock(_) => "--flock ",
            Self::Fleet(_) => "--fleet ",
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match command(&args.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(args: &[&str]) -> anyhow::Result<()> {
    let (mut of_flock, mut of_fleet) = (false, false);
    let (mut steps, mut broken, mut seed, mut minutes, mut from) = (None, None, None, None, 0);
    let (mut hosts, mut regions) = (None, 30);
    let mut rest = args.iter();
    while let Some(flag) = rest.next() {
        if let "--flock" | "--fleet" = *flag {
            (of_flock, of_fleet) = (*flag == "--flock", *flag == "--fleet");
            continue;
        }
        let value = rest.next().with_context(|| format!("{flag} wants a value\n{USAGE}"))?;
        let number = || value.parse::<u64>().with_context(|| format!("{flag} wants a number, not {value:?}"));
        match *flag {
            "--seed" => seed = Some(number()?),
            "--steps" => steps = Some(number()?),
            "--minutes" => minutes = Some(number()?),
            "--from" => from = number()?,
            "--mutation" => broken = Some(*value),
            "--hosts" => hosts = Some(number()?),
            "--regions" => regions = number()?,
            _ => bail!("{flag} is unknown\n{USAGE}"),
        }
    }
    if let Some(hosts) = hosts.filter(|_| of_flock) {
        let scale = flock::scale::Scale { hosts: hosts as usize, regions: regions as usize };
        print!("{}", flock::scale::measure(scale));
        return Ok(());
    }
    let scene = if of_flock {
        let bug = broken.map(|name| named(name, flock::BUGS.iter().copied())).transpose()?;
        Scene::Flock(flock::Options { steps: steps.unwrap_or(flock::STEPS), bug, ..flock::Options::of(0) })
    } else if of_fleet {
        let bug = broken.map(|name| named(name, fleet::BUGS.iter().copied())).transpose()?;
        Scene::Fleet(fleet::Options { steps: steps.unwrap_or(fleet::STEPS), bug, ..fleet::Options::of(0) })
    } else {
        let mutations = Mutation::ALL.iter().map(|mutation| (mutation.name(), *mutation));
        let mutation = broken.map(|name| named(name, mutations)).transpose()?;
        Scene::Machines(Options { steps: steps.unwrap_or(dunlin_sim::STEPS), mutation, ..Options::of(0) })
    };
    match (seed, minutes) {
        (Some(seed), None) => tell(scene, seed),
        (None, Some(minutes)) => look(scene, from, Duration::from_secs(minutes * 60)),
        _ => bail!("{USAGE}"),
    }
}

fn named<T>(name: &str, known: impl Iterator<Item = (&'static str, T)> + Clone) -> anyhow::Result<T> {
    let names = known.clone().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    let mut known = known;
    known.find(|(of, _)| *of == name).map(|(_, it)| it).with_context(|| format!("there is no mutation {name:?}; there are {names}"))
}

fn tell(scene: Scene, seed: u64) -> anyhow::Result<()> {
    let outcome = scene.run(seed, true);
    for line in &outcome.story {
        println!("{line}");
    }
    match outcome.broken {
        Some(broken) => bail!("seed {seed}: {broken}"),
        None => println!("seed {seed}: every promise was kept, over {} inputs", outcome.happened),
    }
    Ok(())
}

fn look(scene: Scene, from: u64, time: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    let (mut seeds, mut happened, mut virtual_ms) = (0, 0, 0);
    while began.elapsed() < time {
        let outcome = scene.run(from + seeds, false);
        if let Some(broken) = outcome.broken {
            bail!("seed {}: {broken}\nhint: tell it with: cargo xtask sim {}--seed {}", outcome.seed, scene.flag(), outcome.seed);
        }
        (seeds, happened, virtual_ms) = (seeds + 1, happened + outcome.happened, virtual_ms + outcome.at_ms);
    }
    println!("seeds {from}..{}: every promise was kept, over {happened} inputs and {} virtual hours", from + seeds, virtual_ms / 3_600_000);
    Ok(())
}
