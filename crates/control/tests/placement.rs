//! Where machines go when there are several hosts, and what a deploy would do.

mod world;

use dunlin_model::HostId;
use dunlin_model::desired::{HostRow, ReleaseStatus};
use dunlin_view::MachineAssignment;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::Ordering;
use world::World;
use world::others::other_row;

const MACHINES: &str = "/v1/apps/web/machines";
const PLAN: &str = "/v1/apps/web/plan";

fn config() -> Value {
    json!({ "image": format!("web@sha256:{}", "a".repeat(64)), "guest": { "memory_mb": 256 } })
}

/// Beside this host a larger one in ams that nothing answers for.
async fn with_a_deaf_host(data: &Path) -> World {
    let deaf = HostRow {
        id: "a2".parse().unwrap(),
        region: "ams".parse().unwrap(),
        prefix: dunlin_model::desired::Ipv4Prefix { network: "10.202.0.0".parse().unwrap(), length: 24 },
        memory_mb: 65_536,
        cpus: 32,
        ..world::host_row()
    };
    world::join(data, &deaf).await;
    let world = World::start(data).await;
    world.create_app("web").await;
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_best_host_is_asked_when_one_refuses() {
    let data = tempfile::tempdir().unwrap();
    let world = with_a_deaf_host(data.path()).await;
    for (region, expected) in [
        (json!("ams,local"), Ok("local")),
        (json!("eu,any"), Ok("local")),
        (json!(null), Ok("local")),
        (json!("ams"), Err((503, "no host in ams has room for a machine with 256 MB: host a2: host a2 cannot be reached: no address of it is known here; region local has room"))),
        (json!("fra,us"), Err((422, "there is no host in region fra,us"))),
        (json!("Fra"), Err((422, "region cannot be used: region \"Fra\" is not valid"))),
    ] {
        let answer = world.post(MACHINES, json!({ "config": config(), "region": region, "skip_launch": true })).await;
        let body = answer.json();
        match expected {
            Ok(code) => assert_eq!((answer.status.as_u16(), &body["region"]), (200, &json!(code)), "{region}: {body}"),
            Err((status, says)) => {
                assert_eq!(answer.status.as_u16(), status, "{region}: {body}");
                assert!(body["error"].as_str().unwrap().starts_with(says), "{region}: {body}");
                assert!(body["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{body}");
            }
        }
    }
    let end = world.deploy("web", 'b', "good").await;
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    let config = world.view.current().config.clone();
    assert!(config.machines.values().all(|machine| machine.host == world::host_id()));
    let regions = world.get("/v1/platform/regions").await.json();
    assert_eq!((&regions["Regions"][0]["name"], &regions["Regions"][1]["code"]), (&json!("Amsterdam, Netherlands"), &json!("local")));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_falls_back_along_its_order_of_regions_and_no_further() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start_fleet(data.path(), &[other_row(2, "ams"), other_row(3, "iad")]).await;
    let body = |image: char, regions: &str| {
        let mut body = world::release_body("web", image, "good");
        body["config"]["primary_region"] = json!(regions);
        // One fits on a host of 4,096 MB beside what is kept for restarts.
        body["config"]["vm"] = json!([{ "memory_mb": 2048 }]);
        body
    };
    let release = async |image: char| {
        let answer = world.post("/v1/apps/web/releases", body(image, "ams, local")).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        world.follow("web", answer.json()["version"].as_u64().unwrap() as u32).await.pop().unwrap()
    };
    let scale = async |count: u32| {
        let answer = world.post("/v1/apps/web/scale", json!({ "app": count })).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        world.follow("web", answer.json()["version"].as_u64().unwrap() as u32).await.pop().unwrap()
    };
    let places = || {
        let config = world.view.current().config.clone();
        let told = |machine: &MachineAssignment| (machine.host.to_string(), machine.spec.env["PRIMARY_REGION"].clone());
        config.machines.values().map(|machine| (machine.id.to_string(), told(machine))).collect::<BTreeMap<_, _>>()
    };
    let spoke = async |hosts: &[&str]| {
        world.eventually("those hosts say that they are half full", async || {
            let view = world.view.current();
            hosts.iter().all(|id| view.hosts.get(&id.parse::<HostId>().unwrap()).is_some_and(|fact| fact.memory_reserved_mb == 2048))
        })
        .await;
    };
    let refused = world.post("/v1/apps/web/releases", body('a', "ams,,local")).await;
    assert_eq!(refused.status, 422, "{}", refused.text);
    assert!(refused.text.contains("primary_region: \\\"ams,,local\\\" has a comma with no region before or after it; name regions"), "{}", refused.text);

    assert_eq!(release('a').await.ended, Some(ReleaseStatus::Succeeded));
    let told = |host: &str| (host.to_owned(), "ams".to_owned());
    assert_eq!(places().into_values().collect::<Vec<_>>(), [told("h2")]);
    spoke(&["h2"]).await;
    assert_eq!(scale(2).await.ended, Some(ReleaseStatus::Succeeded));
    let both = places();
    assert_eq!(both.values().collect::<BTreeSet<_>>(), [&told("h1"), &told("h2")].into());
    spoke(&["h1", "h2"]).await;
    assert_eq!(release('b').await.ended, Some(ReleaseStatus::Succeeded));
    assert_eq!(places(), both, "they are updated where they are");

    world.host.full.store(true, Ordering::SeqCst);
    world.others.host(2).full.store(true, Ordering::SeqCst);
    spoke(&["h1", "h2"]).await;
    let end = scale(3).await;
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    let lacks = |host: &str| format!("host {host} has 1639 MB free beside 409 that are kept for restarts, 409 MB are missing");
    let why = format!("no host in ams,local has room for a machine with 2048 MB: {}; {}", lacks("h1 (local)"), lacks("h2 (ams)"));
    assert!(end.message.contains(&why) && end.message.contains("; the nearest region with room is iad, "), "{end:?}");
    assert!(end.hint.as_ref().is_some_and(|hint| hint.contains("primary_region = \"ams,local,iad\"")), "{end:?}");
    assert_eq!(places(), both);

    let volume = world.post("/v1/apps/web/volumes", json!({ "name": "data" })).await.json();
    assert_eq!(volume["zone"], "h2", "where the app's machines may be: {volume}");
    let shown = world.post(PLAN, json!({ "config": body('b', "fra,syd")["config"] })).await.json();
    let note = "no host is in primary_region fra,syd: machines that run stay in ams, iad, local, and new ones have no place; PRIMARY_REGION says fra";
    assert!(shown["notes"].as_array().unwrap().contains(&json!(note)), "{shown}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordon_outlives_a_restart_and_keeps_new_machines_away() {
    let data = tempfile::tempdir().unwrap();
    world::join(data.path(), &HostRow { cordoned: true, memory_mb: 64, ..world::host_row() }).await;
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let answer = world.post(MACHINES, json!({ "config": config() })).await.json();
    assert_eq!(answer["status"], "insufficient_capacity", "{answer}");
    assert_eq!(answer["error"], "no host has room for a machine with 256 MB: host h1 (local) is cordoned");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_shows_what_a_deploy_would_do_and_writes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let plan = async |body: Value| {
        let answer = world.post(PLAN, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let shown = answer.json();
        let steps = shown["steps"].as_array().unwrap().iter();
        (steps.map(|step| step["step"].as_str().unwrap().to_owned()).collect::<Vec<_>>(), shown)
    };
    let refused = world.post(PLAN, json!({})).await;
    assert_eq!((refused.status.as_u16(), refused.json()["status"].as_str()), (412, Some("failed_precondition")));
    let body = world::release_body("web", 'a', "good");
    let (image, config) = (&body["image"], &body["config"]);
    let (steps, shown) = plan(json!({ "image": image, "config": config })).await;
    assert_eq!(steps, ["reserve", "assign", "start", "gate"]);
    assert_eq!((&shown["release"], &shown["summary"]), (&json!(1), &json!("release v1: machines 1 to create")));
    let first = &shown["steps"][0];
    assert_eq!((&first["new"], &first["host"], &first["machine"]), (&json!(1), &json!("h1"), &Value::Null));
    assert_eq!(first["why"], "app needs 1 more; then it has 1 on host h1, 1 in local");
    assert_eq!(world.get("/v1/apps/web/releases").await.json(), json!([]), "nothing was written");

    assert!(world.deploy("web", 'a', "good").await.ended.is_some());
    // The end of a release is told before the last of it is written.
    let mut generation = world.view.current().config.generation;
    loop {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let now = world.view.current().config.generation;
        if std::mem::replace(&mut generation, now) == now {
            break;
        }
    }
    let (steps, shown) = plan(json!({})).await;
    assert_eq!((steps.len(), &shown["summary"]), (0, &json!("release v2 changes nothing: its machines are as it wants them")));
    let (steps, _) = plan(json!({ "scale": { "app": 3 } })).await;
    assert_eq!(steps.iter().filter(|step| *step == "assign").count(), 2);
    let (steps, shown) = plan(json!({ "config": config })).await;
    assert_eq!(steps, ["update", "start", "gate"]);
    assert!(shown["notes"][0].as_str().unwrap().starts_with("the image is still to be built"), "{shown}");
    assert_eq!(shown["steps"][0]["machine"].as_str().map(str::len), Some(14));
    let (_, shown) = plan(json!({ "image": "docker.io/library/nginx:1", "config": config })).await;
    assert!(shown["notes"][0].as_str().unwrap().contains("is looked up when it is deployed"), "{shown}");
    let (steps, shown) = plan(json!({ "scale": { "app": 40 } })).await;
    assert!(steps.is_empty() && shown["impossible"].as_str().unwrap().contains("no host has room"), "{shown}");
    for wrong in [json!({ "config": [null, null] }), json!({ "scale": { "none": 1 } }), json!({ "scale": { "app": 1000 } }), json!({ "size": 1 })] {
        assert_eq!(world.post(PLAN, wrong.clone()).await.status, 422, "{wrong}");
    }
    assert_eq!(world.get("/v1/apps/web/releases").await.json().as_array().map(Vec::len), Some(1));
    assert_eq!(world.get("/v1/apps/web/scale").await.json(), json!({ "app": 1 }));
    assert_eq!(world.view.current().config.generation, generation, "nothing was written");
    world.control.shutdown().await;
}
