//! Several hosts: machines are driven on whichever they are, and what a dead host ran is brought back elsewhere.

mod world;

use axum::http::Method;
use dunlin_model::desired::ReleaseStatus;
use dunlin_model::{HostId, MachineState};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use world::others::other_row;
use world::{World, host_id};

/// What is to serve elsewhere after a host's loss, serves within this.
const HEALED_WITHIN: Duration = Duration::from_secs(30);

fn h(n: u8) -> HostId {
    format!("h{n}").parse().unwrap()
}

/// Machines of the app by host, those that are healthy.
fn serving(world: &World) -> BTreeMap<HostId, usize> {
    let view = world.view.current();
    let mut found = BTreeMap::new();
    for machine in view.config.machines.values() {
        let fact = view.machines.get(&machine.id);
        let checked = fact.is_some_and(|fact| fact.is_healthy() && fact.version == machine.spec.version && !fact.checks.is_empty());
        *found.entry(machine.host.clone()).or_default() += usize::from(checked);
    }
    found
}

async fn deploy_two(world: &World) {
    let end = world.deploy("web", 'a', "good").await;
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    let scaled = world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    let end = world.follow("web", scaled.json()["version"].as_u64().unwrap() as u32).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
}

async fn machine_on(world: &World, host: &HostId) -> String {
    let config = world.view.current().config.clone();
    config.machines.values().find(|machine| machine.host == *host).unwrap().id.to_string()
}

async fn machines(world: &World) -> Vec<Value> {
    world.get("/v1/apps/web/machines").await.json().as_array().unwrap().clone()
}

/// When, and what: in the order in which they came.
async fn logs(world: &World, query: &str) -> Vec<(u64, String)> {
    let answer = world.get(&format!("/v1/apps/web/logs{query}")).await;
    let lines = answer.text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| (line["at_ms"].as_u64().unwrap(), line["line"].as_str().unwrap().to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_driven_on_the_host_that_it_is_on() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    deploy_two(&world).await;
    assert_eq!(serving(&world), BTreeMap::from([(host_id(), 1), (h(2), 1)]));

    let id = machine_on(&world, &h(2)).await;
    let path = format!("/v1/apps/web/machines/{id}");
    let shown = world.get(&path).await.json();
    assert_eq!((&shown["host_status"], &shown["region"], &shown["state"]), (&json!("ok"), &json!("ams"), &json!("started")));
    let ran = world.post(&format!("{path}/exec"), json!({ "command": ["echo", "x"], "stdin": "typed" })).await.json();
    assert_eq!((&ran["exit_code"], &ran["stdout"]), (&json!(7), &json!("echo|xtyped")), "{ran}");
    assert_eq!(world.get(&format!("{path}/ps")).await.json()[0]["command"], "app");
    assert_eq!(world.get(&format!("{path}/events")).await.json(), json!([]));
    let leased = world.post(&format!("{path}/lease"), json!({ "ttl": 60 })).await.json();
    let nonce = leased["data"]["nonce"].as_str().unwrap().to_owned();
    let refused = world.post(&format!("{path}/stop"), json!({})).await;
    assert_eq!(refused.status, 409, "{}", refused.text);
    let stopped = world.call(Method::POST, &format!("{path}/stop"), &[("fly-machine-lease-nonce", nonce.as_str())], Some(json!({}))).await;
    assert_eq!(stopped.status, 200, "{}", stopped.text);
    let version = shown["instance_id"].as_str().unwrap();
    assert_eq!(world.get(&format!("{path}/wait?state=stopped&instance_id={version}")).await.json()["state"], "stopped");
    assert_eq!(world.others.host(2).commands.lock().unwrap().last().unwrap().machine.as_str(), id);
    let here = world.host.commands.lock().unwrap().iter().any(|command| command.machine.as_str() == id);
    assert!(!here, "its own host has no part in it");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_of_all_hosts_come_in_the_order_of_their_time() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    deploy_two(&world).await;
    let line = |at_ms: u64| (at_ms, format!("line {at_ms}"));
    *world.host.said.lock().unwrap() = [1, 4, 5, 9].map(line).to_vec();
    *world.others.host(2).said.lock().unwrap() = [2, 3, 6, 7, 8].map(line).to_vec();
    assert_eq!(logs(&world, "").await, (1..=9).map(line).collect::<Vec<_>>());
    assert_eq!(logs(&world, "?tail=3").await, (7..=9).map(line).collect::<Vec<_>>());
    let id = machine_on(&world, &h(2)).await;
    assert_eq!(logs(&world, &format!("?machine={id}")).await, [2, 3, 6, 7, 8].map(line));

    world.others.set_dead(2, true);
    let told = logs(&world, "").await;
    assert_eq!(told[..4], [1, 4, 5, 9].map(line));
    assert!(told[4].1.starts_with("lines of its machines are missing here: host h2 cannot be reached"), "{told:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_made_where_they_were_asked_for_and_their_machines_go_there() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    let create = async |body: Value| world.post("/v1/apps/web/volumes", body).await;
    let there = create(json!({ "name": "data", "region": "ams" })).await.json();
    assert_eq!((&there["region"], &there["zone"], &there["host_status"]), (&json!("ams"), &json!("h2"), &json!("ok")));
    let copy = create(json!({ "name": "copy", "source_volume_id": there["id"] })).await.json();
    assert_eq!(copy["zone"], "h2", "a copy is made where what it is of is");
    let apart = create(json!({ "name": "data" })).await.json();
    assert_eq!(apart["zone"], "h1", "volumes of one name are apart");
    let none = create(json!({ "name": "data", "region": "fra" })).await;
    assert!(none.status == 422 && none.text.contains("use ams or local"), "{}", none.text);
    let large = create(json!({ "name": "data", "size_gb": 200 })).await;
    assert!(large.status == 503 && large.text.contains("host h1: 100 GiB are free") && large.text.contains("host h2"), "{}", large.text);
    let image = format!("web@sha256:{}", "a".repeat(64));
    let config = json!({ "image": image, "mounts": [{ "volume": there["id"], "path": "/data" }] });
    let made = world.post("/v1/apps/web/machines", json!({ "config": config })).await.json();
    assert_eq!((&made["region"], &made["state"]), (&json!("ams"), &json!("started")), "{made}");
    world.control.shutdown().await;
}

/// A machine with a volume, and so one of which there must not be two.
async fn exclusive(world: &World) -> String {
    let volume = world.post("/v1/apps/web/volumes", json!({ "name": "data", "region": "ams" })).await.json();
    let image = format!("web@sha256:{}", "b".repeat(64));
    let config = json!({ "image": image, "mounts": [{ "volume": volume["id"], "path": "/data" }] });
    let made = world.post("/v1/apps/web/machines", json!({ "config": config })).await.json();
    made["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_host_ran_comes_back_elsewhere_and_nothing_runs_twice_when_it_returns() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    deploy_two(&world).await;
    let lost = machine_on(&world, &h(2)).await;
    let stays = exclusive(&world).await;
    world.others.set_dead(2, true);
    let began = Instant::now();
    world.eventually("two serve on the host that is left", async || serving(&world).get(&host_id()) == Some(&2)).await;
    assert!(began.elapsed() < HEALED_WITHIN, "{:?}", began.elapsed());
    world.eventually("the old one has its tombstone", async || {
        world.view.current().config.tombstones.keys().any(|id| id.as_str() == lost)
    })
    .await;
    let config = world.view.current().config.clone();
    assert!(config.asked_for.iter().any(|id| id.as_str() == lost), "its host is not to wait for an operator");

    // The other one stays, and people are told what they can do.
    let listed = machines(&world).await;
    assert_eq!(listed.len(), 3);
    let shown = listed.into_iter().find(|machine| machine["id"] == stays.as_str()).unwrap();
    assert_eq!(shown["host_status"], "unreachable");
    let problem = shown["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains("host h2 is down") && problem.contains(&format!("machine destroy {stays} --force")), "{problem}");
    let path = format!("/v1/apps/web/machines/{stays}");
    assert_eq!(world.get(&path).await.json()["problem"], problem.as_str());
    let refused = world.post(&format!("{path}/restart"), json!({})).await;
    assert!(refused.status == 503 && refused.json()["hint"].is_string(), "{}", refused.text);
    assert!(refused.text.contains("host h2 cannot be reached: it is down"), "{}", refused.text);
    let waited = world.get(&format!("{path}/wait?state=started")).await.json();
    assert_eq!((&waited["state"], &waited["host_status"]), (&json!("started"), &json!("unreachable")));
    let version = world.get(&path).await.json()["instance_id"].as_str().unwrap().to_owned();
    assert_eq!(world.get(&format!("{path}/wait?state=stopped&instance_id={version}")).await.status, 503);
    let kept = world.call(Method::DELETE, &path, &[], None).await;
    assert!(kept.status == 503 && kept.text.contains("--force"), "{}", kept.text);
    let kept = world.call(Method::DELETE, "/v1/apps/web", &[], None).await;
    assert!(kept.status == 503 && kept.text.contains("?force=true") && kept.text.contains("app web cannot be destroyed"), "{}", kept.text);

    world.others.set_dead(2, false);
    world.eventually("the old one is destroyed", async || {
        !world.view.current().machines.keys().any(|id| id.as_str() == lost)
    })
    .await;
    world.eventually("the other one is reached", async || world.get(&path).await.json()["host_status"] == "ok").await;
    assert_eq!(world.view.current().machines[&stays.parse::<dunlin_model::MachineId>().unwrap()].state, MachineState::Started);
    assert_eq!(world.get(&path).await.json().get("problem"), None);
    assert_eq!(serving(&world)[&host_id()], 2, "nothing moved back");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_rests_until_the_host_of_what_it_stands_in_for_is_dead() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    let image = format!("web@sha256:{}", "b".repeat(64));
    let make = async |body: Value| world.post("/v1/apps/web/machines", body).await;
    let watched = make(json!({ "region": "ams", "config": { "image": image } })).await.json();
    let id = watched["id"].as_str().unwrap();
    let refused = make(json!({ "region": "ams", "config": { "image": image, "standbys": [id] } })).await;
    assert!(refused.status == 422 && refused.text.contains("would be lost with"), "{}", refused.text);
    let refused = make(json!({ "config": { "image": image, "standbys": ["00000000000000"] } })).await;
    assert!(refused.status == 422 && refused.text.contains("has no machine 00000000000000"), "{}", refused.text);
    let standby = make(json!({ "config": { "image": image, "standbys": [id] } })).await.json();
    assert_eq!(standby["config"]["standbys"], json!([id]));
    let path = format!("/v1/apps/web/machines/{}", standby["id"].as_str().unwrap());
    let is = async |state: &str| world.get(&path).await.json()["state"] == state;
    world.eventually("it rests", async || is("created").await || is("stopped").await).await;

    world.others.set_dead(2, true);
    world.eventually("it stands in", async || is("started").await).await;
    // From then on it is people's to stop.
    assert_eq!(world.post(&format!("{path}/stop"), json!({})).await.status, 200);
    world.eventually("it is stopped", async || is("stopped").await).await;
    assert_eq!(world.post(&format!("{path}/start"), json!({})).await.status, 200);
    world.eventually("it runs again", async || is("started").await).await;

    world.others.set_dead(2, false);
    world.eventually("it rests again", async || is("stopped").await).await;
    world.others.set_dead(2, true);
    world.eventually("it stands in again", async || is("started").await).await;
    // What it stood in for is given up: it is a machine like any other.
    assert_eq!(world.call(Method::DELETE, &format!("/v1/apps/web/machines/{id}?force=true"), &[], None).await.status, 200);
    world.others.set_dead(2, false);
    world.eventually("its host is there again", async || {
        !world.view.current().machines.keys().any(|machine| machine.as_str() == id)
    })
    .await;
    assert!(is("started").await);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_gives_up_what_is_on_a_dead_host() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    let stays = exclusive(&world).await;
    world.others.set_dead(2, true);
    world.eventually("it is said to be down", async || {
        machines(&world).await[0]["problem"].as_str().is_some_and(|problem| problem.contains("is down"))
    })
    .await;
    let path = format!("/v1/apps/web/machines/{stays}");
    assert_eq!(world.call(Method::DELETE, &format!("{path}?force=true"), &[], None).await.status, 200);
    assert_eq!(machines(&world).await, [] as [Value; 0]);
    world.others.set_dead(2, false);
    world.eventually("its host obeys when it returns", async || world.view.current().machines.is_empty()).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_goes_on_without_a_host_that_dies_under_it() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams")]).await;
    deploy_two(&world).await;
    let mut body = world::release_body("web", 'b', "good");
    body["config"]["deploy"] = json!({ "wait_timeout_ms": 60_000 });
    let answer = world.post("/v1/apps/web/releases", body).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    let release = answer.json()["version"].as_u64().unwrap() as u32;
    world.others.set_dead(2, true);
    let end = world.follow("web", release).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    assert_eq!(serving(&world), BTreeMap::from([(host_id(), 2)]));
    world.control.shutdown().await;
}

/// Two of three are gone: it is rather control that is cut off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_that_hears_nobody_moves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams"), other_row(3, "fra")]).await;
    world.deploy("web", 'a', "good").await;
    world.post("/v1/apps/web/scale", json!({ "app": 3 })).await;
    world.eventually("each host has one", async || serving(&world).values().filter(|count| **count == 1).count() == 3).await;
    let before: Vec<_> = world.view.current().config.machines.keys().cloned().collect();
    world.others.set_dead(2, true);
    world.others.set_dead(3, true);
    world.eventually("both are said to be down", async || {
        machines(&world).await.iter().filter(|machine| machine["host_status"] == "unreachable" && machine["problem"].is_string()).count() == 2
    })
    .await;
    // Now one of them is there again, which is more than half, and only the other one is replaced.
    let still: Vec<_> = world.view.current().config.machines.keys().cloned().collect();
    assert_eq!(still, before, "nothing has moved");
    let third = machine_on(&world, &h(3)).await;
    world.others.set_dead(3, false);
    world.eventually("what the dead one ran is replaced", async || {
        let serving = serving(&world);
        !serving.contains_key(&h(2)) && serving.values().sum::<usize>() == 3
    })
    .await;
    assert_eq!(world.view.current().config.machines.values().filter(|machine| machine.id.as_str() == third).count(), 1);
    world.control.shutdown().await;
}
