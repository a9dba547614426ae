//! How soon a server that joins has work: from `dunlin host join` until a machine that is asked for in its region has started there.

use super::super::{Figure, Table};
use anyhow::{Context, bail};
use dunlin_e2e::{Api, Fleet};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);
const SLEEP: [&str; 3] = ["/bin/busybox", "sleep", "100000"];

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let mut fleet = Fleet::of_control("w1");
    let control = fleet.control();
    let words: Vec<String> = SLEEP.iter().map(|word| format!("{word:?}")).collect();
    let dockerfile = format!("FROM scratch\nCOPY busybox /bin/busybox\nCMD [{}]\n", words.join(", "));
    let source = control.source("bench", &[("Dockerfile", dockerfile.as_str()), ("dunlin.toml", "app = \"bench\"\n")]);
    fs::copy("/bin/busybox", source.join("busybox"))?;
    control.ok(&["apps", "create", "bench"]);
    control.ok_in(&source, &["deploy"]);
    let api = Api::of(&control.data());
    let first = control.machine_list("bench").pop().context("the app has a machine")?;
    let (_, machine) = api.once("GET", &format!("/v1/apps/bench/machines/{}", first["id"].as_str().context("it has an id")?), &[], "")?;
    let mut config = serde_json::from_str::<serde_json::Value>(&machine)?["config"].take();
    config["metadata"] = serde_json::json!({});
    let began = Instant::now();
    fleet.join("w2");
    let joined = began.elapsed();
    let region = fleet.list().iter().find(|host| host["id"] == "w2").context("it has joined")?["region"].clone();
    let body = serde_json::json!({ "region": region, "config": config }).to_string();
    let created = loop {
        match api.once("POST", "/v1/apps/bench/machines", &[], &body)? {
            (status, created) if status < 300 => break serde_json::from_str::<serde_json::Value>(&created)?,
            (status, said) if began.elapsed() > PATIENCE => bail!("no machine can be placed on the host that has joined: {status} {said}"),
            _ => thread::sleep(PAUSE),
        }
    };
    let id = created["id"].as_str().context("it has an id")?;
    loop {
        let (_, told) = api.once("GET", &format!("/v1/apps/bench/machines/{id}/wait?state=started&timeout=30"), &[], "")?;
        let (_, machine) = api.once("GET", &format!("/v1/apps/bench/machines/{id}"), &[], "")?;
        if serde_json::from_str::<serde_json::Value>(&machine)?["state"] == "started" {
            break;
        }
        if began.elapsed() > PATIENCE {
            bail!("the machine does not start: {told} {machine}");
        }
    }
    let placed = began.elapsed();
    println!("    joined and up after {joined:?}");
    table.add(Figure { what: "host join to the first machine that runs there", ours: placed.as_secs_f64(), unit: "s", peer: None, goal: "<= 5 s" });
    Ok(())
}
