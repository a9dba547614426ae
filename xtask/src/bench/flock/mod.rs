//! What it costs to share state. Eight hosts, each a process in a network namespace, and what all of them see of each other; the
//! same on a long line; a host whose disk is wiped; very many hosts, simulated; and how soon a server that joins has work.
//!
//! Processor time is that of the hosts' processes, and bytes are what their interfaces sent: each byte counts once.

mod hosts;
mod joining;
mod simulation;

use super::{Figure, Table};
use crate::sh;
pub use joining::run as join;
pub use simulation::run as simulated;
use hosts::{Hosts, Kind, Line};
use std::thread;
use std::time::{Duration, Instant};

const HOSTS: usize = 8;
const MACHINES_A_HOST: usize = 20;
/// Changes a second, of all hosts together.
const RATES: [u64; 3] = [200, 1_000, 4_000];
/// The one that peers are run at.
const COMPARED_RATE: u64 = 1_000;
const MEASURED: Duration = Duration::from_secs(5);
const ROWS: usize = 100_000;
const DESIRED_MACHINES: usize = 10_000;
const ENTRIES: usize = 20;
/// One way; there and back it is twice that.
const FAR: Duration = Duration::from_millis(40);
/// Until what was published last is on its way everywhere, and nobody is busy with it.
const SETTLE: Duration = Duration::from_secs(2);
/// Figures that were published of Corrosion, in ms, changes a second, and s. It cannot be had as a crate or package: it was not run here.
const CORROSION_FAR_MS: (f64, f64) = (102.0, 107.0);
const CORROSION_RATE: f64 = 345.0;
const CORROSION_BACK_S: f64 = 40.6;
const CORROSION: &str = "Corrosion, published:";

fn build() -> anyhow::Result<()> {
    sh::run(sh::cargo().args(["build", "--quiet", "--release", "--package", "dunlin-cluster", "--example", "flock"]))?;
    let peers = sh::root().join("peers/chitchat/Cargo.toml");
    sh::run(sh::cargo().args(["build", "--quiet", "--release", "--manifest-path"]).arg(peers).arg("--target-dir").arg(sh::target_dir()))?;
    Ok(())
}

pub fn near(table: &mut Table) -> anyhow::Result<()> {
    changes(table, Line::Short)
}

pub fn far(table: &mut Table) -> anyhow::Result<()> {
    changes(table, Line::Long(FAR))
}

fn changes(table: &mut Table, line: Line) -> anyhow::Result<()> {
    build()?;
    let mut hosts = talking(Kind::Dunlin, line)?;
    let (near, goals) = match line {
        Line::Short => (true, ("<= 5 ms", "<= 10 ms")),
        Line::Long(_) => (false, ("<= 60 ms", "<= 90 ms")),
    };
    let on = if near { "a short line" } else { "80 ms there and back" };
    let chitchat = if near { Some(Measured::of(&mut talking(Kind::Chitchat, line)?, COMPARED_RATE)?) } else { None };
    for rate in RATES.into_iter().filter(|rate| near || *rate == COMPARED_RATE) {
        let ours = Measured::of(&mut hosts, rate)?;
        let of = format!("at {rate} changes/s on {on}");
        let compared = chitchat.as_ref().filter(|_| rate == COMPARED_RATE);
        let peer = |figure: fn(&Measured) -> f64, published: Option<f64>| {
            let ran = compared.map(|chitchat| ("chitchat", figure(chitchat)));
            ran.or(published.filter(|_| !near).map(|figure| (CORROSION, figure)))
        };
        let visible = |name: &str| format!("visible everywhere {of}, {name}");
        table.add(Figure { what: &visible("p50"), ours: ours.p50_ms(), unit: "ms", peer: peer(Measured::p50_ms, Some(CORROSION_FAR_MS.0)), goal: goals.0 });
        table.add(Figure { what: &visible("p99"), ours: ours.p99_ms(), unit: "ms", peer: peer(Measured::p99_ms, Some(CORROSION_FAR_MS.1)), goal: goals.1 });
        table.add(Figure { what: &format!("reached {of}"), ours: ours.reached, unit: "/s", peer: Some((CORROSION, CORROSION_RATE)), goal: ">= 1,000 /s" });
        table.add(Figure { what: &format!("cpu a change and host {of}"), ours: ours.cpu_us, unit: "us", peer: peer(|it| it.cpu_us, None), goal: "<= 50 us" });
        table.add(Figure { what: &format!("sent a change and host {of}"), ours: ours.sent_kb, unit: "kB", peer: peer(|it| it.sent_kb, None), goal: "<= 1.5 kB" });
        println!("    {}", ours.story);
    }
    Ok(())
}

/// All know each other, and each has something to change.
fn talking(kind: Kind, line: Line) -> anyhow::Result<Hosts> {
    let mut hosts = Hosts::start(kind, HOSTS, line)?;
    hosts.all(&format!("say {MACHINES_A_HOST}"))?;
    hosts.until_all_have(HOSTS * MACHINES_A_HOST)?;
    Ok(hosts)
}

struct Measured {
    /// From a change to its being seen at another host, each, in order.
    times_us: Vec<u64>,
    reached: f64,
    cpu_us: f64,
    sent_kb: f64,
    story: String,
}

impl Measured {
    fn of(hosts: &mut Hosts, rate: u64) -> anyhow::Result<Self> {
        thread::sleep(SETTLE);
        hosts.all("facts")?;
        let before = hosts.costs()?;
        let count = rate * MEASURED.as_secs() / HOSTS as u64;
        let began = Instant::now();
        hosts.all(&format!("change {} {count}", rate as f64 / HOSTS as f64))?;
        let reached = (count * HOSTS as u64) as f64 / began.elapsed().as_secs_f64();
        thread::sleep(SETTLE);
        let cost = hosts.costs()?.since(&before);
        let mut times_us = hosts.times("facts")?;
        times_us.sort_unstable();
        let each = count as usize * HOSTS * HOSTS;
        let slowest = times_us.last().copied().unwrap_or_default() as f64 / 1e3;
        Ok(Self {
            reached,
            cpu_us: cost.cpu.as_secs_f64() * 1e6 / each as f64,
            sent_kb: cost.bytes as f64 / each as f64 / 1e3,
            story: format!("{} of {} changes were seen, the others were overtaken; the slowest took {slowest:.1} ms", times_us.len(), each * (HOSTS - 1) / HOSTS),
            times_us,
        })
    }

    fn p50_ms(&self) -> f64 {
        at(&self.times_us, 0.5)
    }

    fn p99_ms(&self) -> f64 {
        at(&self.times_us, 0.99)
    }
}

/// In milliseconds.
fn at(times_us: &[u64], share: f64) -> f64 {
    times_us.get((times_us.len().saturating_sub(1) as f64 * share) as usize).map_or(f64::NAN, |time| *time as f64 / 1e3)
}

/// 100,000 facts of machines; of chitchat, as many values of the same length.
pub fn many_rows(table: &mut Table) -> anyhow::Result<()> {
    build()?;
    let ((loaded, back, memory_mb), chitchat) = (loaded_and_back(Kind::Dunlin)?, loaded_and_back(Kind::Chitchat)?);
    let seconds = |time: Duration| time.as_secs_f64();
    let peer = |figure| Some(("chitchat", figure));
    table.add(Figure { what: "100,000 rows loaded, visible everywhere", ours: seconds(loaded), unit: "s", peer: peer(seconds(chitchat.0)), goal: "<= 3 s" });
    table.add(Figure { what: "a wiped host has 100,000 rows again", ours: seconds(back), unit: "s", peer: peer(seconds(chitchat.1)), goal: "<= 3 s" });
    table.add(Figure { what: "a wiped host has 100,000 rows again", ours: seconds(back), unit: "s", peer: Some((CORROSION, CORROSION_BACK_S)), goal: "<= 3 s" });
    table.add(Figure { what: "its memory, at most", ours: memory_mb, unit: "MB", peer: peer(chitchat.2), goal: "<= 100 MB" });
    Ok(())
}

fn loaded_and_back(kind: Kind) -> anyhow::Result<(Duration, Duration, f64)> {
    let mut hosts = Hosts::start(kind, HOSTS, Line::Short)?;
    hosts.all("say 1")?;
    hosts.until_all_have(HOSTS)?;
    let before = hosts.costs()?;
    let loaded = hosts.together(&format!("say {}", ROWS / HOSTS), ROWS)?;
    let cost = hosts.costs()?.since(&before);
    println!("    {kind:?}: loading took {:.1?} of processor time and {} MB sent, of all hosts together", cost.cpu, cost.bytes / 1_000_000);
    thread::sleep(SETTLE);
    let (back, memory_mb) = hosts.wipe_last(ROWS)?;
    println!("    {kind:?}: loaded after {loaded:.1?}, back after {back:.1?} with {memory_mb:.0} MB");
    Ok((loaded, back, memory_mb))
}

/// One entry of a large desired state.
pub fn desired(table: &mut Table) -> anyhow::Result<()> {
    build()?;
    let mut hosts = Hosts::start(Kind::Dunlin, HOSTS, Line::Short)?;
    hosts.all("say 1")?;
    hosts.until_all_have(HOSTS)?;
    hosts.first(&format!("config {DESIRED_MACHINES}"))?;
    for at in 0..=ENTRIES {
        hosts.first("make")?;
        if at > 0 {
            hosts.begin_costs()?;
        }
        hosts.first("entry")?;
        hosts.until_all_say("revision", (at + 1) as u64)?;
        if at > 0 {
            hosts.end_costs()?;
        } else {
            hosts.all("configs")?;
        }
    }
    let mut times = hosts.times("configs")?;
    times.sort_unstable();
    let what = format!("one entry of {DESIRED_MACHINES} machines visible everywhere");
    table.add(Figure { what: &format!("{what}, p50"), ours: at(&times, 0.5), unit: "ms", peer: None, goal: "< 20 ms" });
    table.add(Figure { what: &format!("{what}, p99"), ours: at(&times, 0.99), unit: "ms", peer: None, goal: "< 20 ms" });
    let cpu_ms = hosts.spent().cpu.as_secs_f64() * 1e3 / (ENTRIES * HOSTS) as f64;
    table.add(Figure { what: "cpu of such a change and host", ours: cpu_ms, unit: "ms", peer: None, goal: "< 2 ms" });
    Ok(())
}
