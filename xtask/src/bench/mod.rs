//! `cargo xtask bench`: each figure beside its peer's, both run on this machine in turn, as a ratio.
//!
//! Nothing here is a test: a figure that misses its goal is printed as such and fails nothing.

mod create;
mod deploy;
mod flock;
mod idle;
mod machines;
mod neighbours;
mod placement;
mod proxy;
mod scale;

use crate::{packages, sh};
use anyhow::{Context, bail};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

type Bench = (&'static str, fn(&mut Table) -> anyhow::Result<()>);

/// These look at no server.
const WITHOUT_SERVER: [&str; 6] = ["placement", "flock-near", "flock-far", "flock-rows", "flock-desired", SIMULATED];
/// Comes with `flock`, unless it is left out: it wants 5 GB and some minutes.
const SIMULATED: &str = "flock-simulated";
const WITHOUT_SIMULATED: &str = "--without-simulated";

const BENCHES: &[Bench] = &[
    ("deploy", deploy::run),
    ("create", create::run),
    ("machines", machines::run),
    ("neighbours", neighbours::run),
    ("proxy", proxy::run),
    ("idle", idle::run),
    ("scale", scale::run),
    ("placement", placement::run),
    ("flock-near", flock::near),
    ("flock-far", flock::far),
    ("flock-rows", flock::many_rows),
    ("flock-desired", flock::desired),
    ("flock-join", flock::join),
    (SIMULATED, flock::simulated),
];

pub fn run(args: &[&str]) -> anyhow::Result<()> {
    let (flags, names): (Vec<&str>, Vec<&str>) = args.iter().partition(|arg| arg.starts_with("--"));
    if let Some(unknown) = flags.iter().find(|flag| **flag != WITHOUT_SIMULATED) {
        bail!("{unknown} is unknown; there is {WITHOUT_SIMULATED}");
    }
    if let Some(unknown) = names.iter().find(|name| !BENCHES.iter().any(|(known, _)| is_of(known, name))) {
        let known: Vec<&str> = BENCHES.iter().map(|(name, _)| *name).collect();
        bail!("there is no bench {unknown:?}; there are {}", known.join(", "));
    }
    let is_asked = |known: &str| names.is_empty() || names.iter().any(|name| is_of(known, name));
    let wanted: Vec<&Bench> = BENCHES.iter().filter(|(known, _)| is_asked(known) && (*known != SIMULATED || flags.is_empty())).collect();
    if wanted.iter().all(|(name, _)| WITHOUT_SERVER.contains(name)) {
        packages::ensure(packages::For::Flock)?;
    } else {
        packages::ensure(packages::For::Bench)?;
        println!("building dunlin for release");
        sh::run(sh::cargo().args(["build", "--release", "--package", "dunlin"]))?;
        dunlin_e2e::use_binary(sh::target_dir().join("release/dunlin"));
    }
    let mut table = Table::default();
    for (name, bench) in wanted {
        println!("==> {name}");
        bench(&mut table)?;
    }
    table.print();
    Ok(())
}

/// `flock` asks for all whose names begin with it.
fn is_of(known: &str, asked: &str) -> bool {
    known.strip_prefix(asked).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Rows of the summary.
#[derive(Default)]
pub struct Table {
    rows: Vec<[String; 5]>,
}

/// One figure; `peer` is `(name, value)`.
pub struct Figure<'a> {
    pub what: &'a str,
    pub ours: f64,
    pub unit: &'a str,
    pub peer: Option<(&'a str, f64)>,
    pub goal: &'a str,
}

impl Table {
    pub fn add(&mut self, figure: Figure<'_>) {
        let Figure { what, ours, unit, peer, goal } = figure;
        let (peer_text, ratio) = match peer {
            Some((name, value)) => (format!("{name} {} {unit}", round(value)), format!("{:.2}x", ours / value)),
            None => ("-".into(), "-".into()),
        };
        let row = [what.to_owned(), format!("{} {unit}", round(ours)), peer_text, ratio, goal.to_owned()];
        println!("    {}", row.join(" | "));
        self.rows.push(row);
    }

    fn print(&self) {
        let heading = ["figure", "dunlin", "peer", "ratio", "goal"].map(str::to_owned);
        let rows: Vec<&[String; 5]> = std::iter::once(&heading).chain(&self.rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        println!();
        for row in rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            println!("{}", cells.join("  ").trim_end());
        }
    }
}

fn round(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Times of all rounds of something.
pub struct Times(Vec<Duration>);

impl Times {
    /// `round` gives the time that counts, which may be less than it took.
    pub fn of(rounds: usize, mut round: impl FnMut(usize) -> anyhow::Result<Duration>) -> anyhow::Result<Self> {
        let mut times = (0..rounds).map(&mut round).collect::<anyhow::Result<Vec<_>>>()?;
        times.sort();
        Ok(Self(times))
    }

    pub fn p50(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    pub fn p99(&self) -> Duration {
        self.0[(self.0.len() * 99 / 100).min(self.0.len() - 1)]
    }

    pub fn spread(&self) -> String {
        let ms = |time: &Duration| round(time.as_secs_f64() * 1e3);
        format!("{}..{} ms over {} rounds", ms(&self.0[0]), ms(&self.0[self.0.len() - 1]), self.0.len())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A line of `/proc/<pid>/status`, in MB.
fn memory_mb(pid: u32, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("the kernel tells a process's memory")?;
    let kb: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kb * 1024.0 / 1e6)
}

/// User and system time of a process, in hundredths of a second.
fn cpu_ticks(pid: u32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(") ").context("a line of /proc/<pid>/stat")?.1.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// `podman run -d` as it works on every machine: crun refuses hybrid control groups, and podman's usual limits are
/// above what may be had in a container.
const PODMAN_RUN: [&str; 5] =
    ["--runtime=runc", "run", "-d", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"];

/// podman and buildah leave their storage mounted. Lazily: what they started may be about to end.
fn unmount_storage(dir: &Path) {
    let _ = Command::new("umount").arg("-lq").arg(dir.join("storage/overlay")).status(); // it may not be mounted
}

/// How long something takes.
pub fn time<T>(act: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    act()?;
    Ok(began.elapsed())
}
