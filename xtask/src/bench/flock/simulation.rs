//! More hosts than there are computers: the simulator's figures, which time does not touch.

use super::super::{Figure, Table};
use crate::sh;
use anyhow::Context;

const HOSTS: &str = "10000";

/// Takes minutes and some 5 GB.
pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let args = ["run", "--quiet", "--release", "--package", "dunlin-sim", "--", "--flock", "--hosts", HOSTS, "--regions", "30"];
    let text = sh::output(sh::cargo().args(args))?;
    print!("{text}");
    let row = |table: &mut Table, what: &str, ours: f64, unit: &str, goal: &str| {
        let what = format!("{HOSTS} simulated hosts in 30 regions: {what}");
        table.add(Figure { what: &what, ours, unit, peer: None, goal });
    };
    row(table, "a summary is at all, p50", behind(&text, "a summary, to all hosts: p50 ")?, "ms", "<= 100 ms");
    row(table, "a summary is at all, p99", between(&text, "a summary, to all hosts:", "p99 ")?, "ms", "<= 200 ms");
    row(table, "detail is in its region, p99", between(&text, "detail, to its region:", "p99 ")?, "ms", "<= 200 ms");
    row(table, "an exchange, idle", behind(&text, "exchanges, idle: ")? / 1e3, "kB", "<= 10 kB");
    row(table, "an exchange, with changes", behind(&text, "exchanges, with changes: ")? / 1e3, "kB", "<= 10 kB");
    row(table, "an idle host of 333 in its region sends", behind(&text, "idle: ")?, "kB/s", "<= 20 kB/s");
    row(table, "memory of gossip a host", behind(&text, "memory: ")?, "kB", "-");
    Ok(())
}

/// The number behind these words at the beginning of a line.
fn behind(text: &str, words: &str) -> anyhow::Result<f64> {
    between(text, words, "")
}

fn between(text: &str, line: &str, words: &str) -> anyhow::Result<f64> {
    let rest = text.lines().find_map(|told| told.strip_prefix(line)).with_context(|| format!("the simulator says nothing of {line:?}"))?;
    let rest = rest.split_once(words).map_or(rest, |(_, rest)| rest);
    let number: String = rest.chars().take_while(|char| char.is_ascii_digit() || *char == '.').collect();
    number.parse().with_context(|| format!("{rest:?} is no figure"))
}
