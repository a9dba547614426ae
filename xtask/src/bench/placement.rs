//! How fast machines are placed over a large fleet. Of the planner alone: no store, no host.

use super::{Figure, Table};
use crate::sh;
use anyhow::Context;

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let text = sh::output(sh::cargo().args(["run", "--quiet", "--release", "--package", "dunlin-sim", "--example", "placements"]))?;
    for line in text.lines() {
        let (what, rate) = line.split_once('\t').with_context(|| format!("{line:?} is no figure"))?;
        table.add(Figure { what, ours: rate.parse()?, unit: "/s", peer: None, goal: ">= 10,000 /s" });
    }
    Ok(())
}
