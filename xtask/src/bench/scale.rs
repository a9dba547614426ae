//! One host with 500 machines that are stopped and 100 that run: what the agent needs for them while nothing happens,
//! how long it takes to know them all again, and how long a list of them takes.

use super::create::Api;
use super::{Figure, Table, Times, cpu_ticks, memory_mb, time};
use anyhow::{Context, bail};
use dunlin_e2e::{Server, image_of, kill, sleepers};
use std::thread;
use std::time::{Duration, Instant};

const STOPPED: usize = 500;
const RUNNING: usize = 100;
/// More than 600 addresses; no other server of a test or a bench is there.
const PREFIX: &str = "10.239.0.0/16";
/// They sleep: what they may reserve in all is more than this computer has.
const MEMORY_MB: &str = "1000000";
const LISTS: usize = 50;
const RESTARTS: usize = 3;
/// Until what a start needed is given back, and a server is no longer taken for one that dies again and again.
const SETTLE: Duration = Duration::from_secs(12);
const WATCH: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
/// The most of one app.
const APP: usize = 100;

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let mut server = Server::prepare();
    server.machine_prefix = Some(PREFIX.into());
    server.flags = vec!["--memory-mb".into(), MEMORY_MB.into()];
    server.boot();
    let mut api = Api::connect(&server.data().join("run/api.sock"))?;
    let began = Instant::now();
    for app in 0..(RUNNING + STOPPED) / APP {
        fill(&server, &mut api, app)?;
    }
    println!("    {} machines made in {} s", RUNNING + STOPPED, began.elapsed().as_secs());
    thread::sleep(SETTLE);

    let list = Times::of(LISTS, |_| time(|| api.call("GET", &path_of(0), "")))?;
    row(table, "list of 100 of 600 machines, p50", list.p50().as_secs_f64() * 1e3, "ms", "<= 20 ms");
    row(table, "list of 100 of 600 machines, p99", list.p99().as_secs_f64() * 1e3, "ms", "-");
    let all = Times::of(LISTS, |_| time(|| (0..(RUNNING + STOPPED) / APP).try_for_each(|app| api.call("GET", &path_of(app), "").map(drop))))?;
    row(table, "lists of all 600 machines, app by app, p50", all.p50().as_secs_f64() * 1e3, "ms", "-");

    let serving = server.server_pid().context("the server runs")?;
    row(table, "server of 600 machines, RSS", memory_mb(serving, "VmRSS:")?, "MB", "<= 150 MB");
    let before = cpu_ticks(serving)?;
    thread::sleep(WATCH);
    let percent = (cpu_ticks(serving)? - before) as f64 / WATCH.as_secs_f64();
    row(table, "server of 600 machines that do nothing: CPU of one core", percent, "%", "< 1 %");

    let adopted = Times::of(RESTARTS, |_| adopted(&server))?;
    println!("    from the kill to all adopted: {}", adopted.spread());
    row(table, "kill of the agent until all 100 are adopted, p50", adopted.p50().as_secs_f64(), "s", "<= 2 s");
    server.wait_ready();
    let answers = Times::of(RESTARTS, |_| {
        let pid = server.server_pid().context("the server runs")?;
        thread::sleep(SETTLE);
        time(|| {
            kill(pid, "KILL");
            Api::connect(&server.data().join("run/api.sock"))?.call("GET", &path_of(0), "")
        })
    })?;
    row(table, "kill of the agent until the list is answered, p50", answers.p50().as_secs_f64(), "s", "-");
    let serving = server.server_pid().context("the server runs")?;
    thread::sleep(SETTLE);
    row(table, "server of 600 machines after its restart, RSS", memory_mb(serving, "VmRSS:")?, "MB", "<= 150 MB");
    Ok(())
}

/// The machines of the first app run, all others have run.
fn fill(server: &Server, api: &mut Api, app: usize) -> anyhow::Result<()> {
    let (mut ids, _) = sleepers(server, &name_of(app), 1);
    let body = serde_json::json!({ "config": { "image": image_of(&server.machine_list(&name_of(app))[0]) } }).to_string();
    for _ in 1..APP {
        let made: serde_json::Value = serde_json::from_str(&api.call("POST", &path_of(app), &body)?)?;
        ids.push(made["id"].as_str().context("a machine has an id")?.to_owned());
    }
    for id in ids {
        let path = format!("{}/{id}", path_of(app));
        api.call("GET", &format!("{path}/wait?state=started&timeout=60"), "")?;
        if app * APP >= RUNNING {
            api.call("POST", &format!("{path}/stop"), "{\"timeout\":0}")?;
            api.call("GET", &format!("{path}/wait?state=stopped&timeout=60"), "")?;
        }
    }
    Ok(())
}

fn name_of(app: usize) -> String {
    format!("sleep-{app}")
}

fn path_of(app: usize) -> String {
    format!("/v1/apps/{}/machines", name_of(app))
}

fn row(table: &mut Table, what: &str, ours: f64, unit: &str, goal: &str) {
    table.add(Figure { what, ours, unit, peer: None, goal });
}

/// From the kill on, what the keeper needs to notice it included.
fn adopted(server: &Server) -> anyhow::Result<Duration> {
    // One that lived shorter is restarted later.
    thread::sleep(SETTLE);
    server.expect_log("the server died; restarting it");
    let all = format!("adopted={RUNNING}");
    let seen = || server.log().lines().filter(|line| line.contains("recovered") && line.contains(&all)).count();
    let before = seen();
    let pid = server.server_pid().context("the server runs")?;
    let began = Instant::now();
    kill(pid, "KILL");
    while seen() == before {
        if began.elapsed() > PATIENCE {
            bail!("the agent has not adopted {RUNNING} machines: {}", server.log().lines().last().unwrap_or_default());
        }
        thread::sleep(LOOK);
    }
    Ok(began.elapsed())
}
