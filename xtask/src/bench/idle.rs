//! What a server costs that does nothing, with ten machines that do nothing either.

use super::{Figure, Table, cpu_ticks, memory_mb};
use anyhow::Context;
use dunlin_e2e::Server;
use std::fs;
use std::thread;
use std::time::Duration;

const MACHINES: usize = 10;
/// Until what a start needed is given back.
const SETTLE: Duration = Duration::from_secs(10);
const WATCH: Duration = Duration::from_secs(20);

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let server = Server::start();
    let source = server.source("web", dunlin_e2e::PYTHON);
    fs::write(source.join("dunlin.toml"), "app = \"web\"\n[http_service]\ninternal_port = 8080\n")?;
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&source, &["deploy"]);
    server.ok(&["scale", "count", &MACHINES.to_string(), "--app", "web"]);
    thread::sleep(SETTLE);
    let serving = server.server_pid().context("the server runs")?;
    let keeper = server.keeper_pid();
    let own = memory_mb(serving, "VmRSS:")? + memory_mb(keeper, "VmRSS:")?;
    let supervisors: Vec<u32> = server.machines("web").iter().filter_map(|id| server.supervisor_pid(id)).collect();
    let each = supervisors.iter().map(|pid| memory_mb(*pid, "VmRSS:")).sum::<anyhow::Result<f64>>()? / MACHINES as f64;
    let before = cpu_ticks(serving)?;
    thread::sleep(WATCH);
    let ticks = cpu_ticks(serving)? - before;
    table.add(Figure { what: "idle server, 10 machines: keeper and server, RSS", ours: own, unit: "MB", peer: None, goal: "< 100 MB" });
    table.add(Figure { what: "idle server, 10 machines: a supervisor, RSS", ours: each, unit: "MB", peer: None, goal: "<= 6 MB" });
    let percent = ticks as f64 / 100.0 / WATCH.as_secs_f64() * 100.0;
    table.add(Figure { what: "idle server, 10 machines with checks: CPU of one core", ours: percent, unit: "%", peer: None, goal: "-" });
    Ok(())
}
