//! Machines made and changed by hand, as Fly's clients do it.

mod world;

use axum::http::Method;
use dunlin_model::{MachineId, MachineState};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use world::{Answer, World};

const MACHINES: &str = "/v1/apps/web/machines";

fn config() -> Value {
    json!({
        "image": format!("web@sha256:{}", "a".repeat(64)),
        "env": { "A": "1" },
        "init": {},
        "guest": { "cpu_kind": "shared", "cpus": 1, "memory_mb": 256 },
        "metadata": { "mine": "yes" },
    })
}

async fn make(world: &World, body: Value) -> Value {
    let answer = world.post(MACHINES, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

async fn state(world: &World, id: &str, state: MachineState) {
    let id: MachineId = id.parse().unwrap();
    world
        .eventually("the machine is in the state", async || {
            world.view.current().machines.get(&id).is_some_and(|fact| fact.state == state)
        })
        .await;
}

fn refused(answer: &Answer, status: u16, code: &str, says: &str) {
    let body = answer.json();
    assert_eq!(answer.status, status, "{body}");
    assert_eq!(body["status"], code, "{body}");
    assert!(body["error"].as_str().unwrap().contains(says), "{body}");
}

/// A list asks as well, and both say the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_are_shown_in_lists_too() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    make(&world, json!({ "config": config() })).await;
    let mut several = config();
    several["containers"] = json!([{ "name": "app" }, { "name": "side" }]);
    several.as_object_mut().unwrap().remove("init");
    let made = make(&world, json!({ "config": several })).await;
    let id = made["id"].as_str().unwrap();
    state(&world, id, MachineState::Started).await;
    let one = world.get(&format!("{MACHINES}/{id}")).await.json();
    assert_eq!(one["containers"], json!([{ "name": "app", "state": "running" }, { "name": "side", "state": "running" }]));
    let list = world.get(MACHINES).await.json();
    let list = list.as_array().unwrap();
    let shown = list.iter().find(|machine| machine["id"] == one["id"]).unwrap();
    assert_eq!(shown["containers"], one["containers"]);
    let other = list.iter().find(|machine| machine["id"] != one["id"]).unwrap();
    assert!(other["containers"].as_array().is_none_or(Vec::is_empty), "{other}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_made_and_starts_and_no_release_touches_it() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "name": "one", "region": "local", "config": config() })).await;
    let id = made["id"].as_str().unwrap();
    assert_eq!((&made["name"], &made["region"], &made["release"]), (&json!("one"), &json!("local"), &json!(0)));
    assert_eq!(made["config"], config(), "as it was given");
    assert_eq!(made["instance_id"], made["version"]);
    assert!(made["created_at"].as_str().unwrap().ends_with('Z'), "{made}");
    state(&world, id, MachineState::Started).await;
    // A release makes its own, twice, and leaves this one alone.
    assert!(world.deploy("web", 'b', "good").await.ended.is_some());
    assert!(world.deploy("web", 'c', "good").await.ended.is_some());
    let release = world.get("/v1/apps/web/releases/2").await.json();
    assert_eq!(release["config"]["env"]["BEHAVE"], "good", "what a console has its environment from: {release}");
    let now = world.get(&format!("{MACHINES}/{id}")).await.json();
    assert_eq!((&now["state"], &now["instance_id"]), (&json!("started"), &made["instance_id"]));
    let list = world.get(MACHINES).await.json();
    assert_eq!(list.as_array().unwrap().len(), 2);
    let of_release = list.as_array().unwrap().iter().find(|machine| machine["release"] == 2).unwrap();
    assert_eq!(of_release["config"]["metadata"]["fly_release_version"], "2");
    assert_eq!(of_release["config"]["services"][0]["internal_port"], 8080);
    for (query, count) in [
        ("?metadata.mine=yes", 1), ("?metadata.mine=no", 0), ("?state=started", 2), ("?state=stopped,suspended", 0),
        ("?region=local&summary=true", 2), ("?region=ams", 0), ("?metadata.fly_process_group=app", 2),
        ("?include_deleted=false", 2),
    ] {
        let found = world.get(&format!("{MACHINES}{query}")).await.json();
        assert_eq!(found.as_array().map(Vec::len), Some(count), "{query}: {found}");
    }
    let mistyped = world.get(&format!("{MACHINES}?state=started,stoped")).await;
    assert!(mistyped.status == 400 && mistyped.text.contains("stoped"), "{}", mistyped.text);
    refused(&world.get(&format!("{MACHINES}?colour=red")).await, 400, "bad_request", "no filter");
    refused(&world.get(&format!("{MACHINES}?include_deleted=maybe")).await, 400, "bad_request", "true or false");
    // One that is destroyed is shown for a while to those who ask for it, and not to a later app of the name.
    assert_eq!(world.call(Method::DELETE, &format!("{MACHINES}/{id}?force=true"), &[], None).await.status, 200);
    let shown = async |query: &str| {
        let found = world.get(&format!("{MACHINES}{query}")).await.json();
        found.as_array().unwrap().iter().map(|machine| machine["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(shown("").await, ["started"]);
    world.eventually("it is gone", async || shown("?include_deleted=true").await == ["started", "destroyed"]).await;
    let gone = world.get(&format!("{MACHINES}?include_deleted=true&state=destroyed")).await.json();
    assert_eq!((&gone[0]["id"], &gone[0]["name"], &gone[0]["config"]["env"]), (&json!(id), &json!("one"), &json!({ "A": "1" })));
    assert_eq!(world.call(Method::DELETE, "/v1/apps/web", &[], None).await.status, 202);
    world.create_app("web").await;
    assert!(shown("?include_deleted=true").await.is_empty());
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_another_one_overtook_says_so() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config() })).await;
    let id = made["id"].as_str().unwrap();
    let path = format!("{MACHINES}/{id}");
    world.host.frozen.store(true, Ordering::SeqCst); // no version comes up
    let second = async {
        world.eventually("the first is written", async || {
            let config = world.view.current().config.clone();
            config.machines[&id.parse::<MachineId>().unwrap()].spec.version.to_string() != made["version"]
        }).await;
        world.post(&path, json!({ "config": config() })).await
    };
    let first = async {
        let within = std::time::Duration::from_secs(15);
        let first = tokio::time::timeout(within, world.post(&path, json!({ "config": config() }))).await;
        world.host.frozen.store(false, Ordering::SeqCst);
        first.expect("it is answered although its version never comes")
    };
    let (first, second) = tokio::join!(first, second);
    refused(&first, 409, "conflict", "was changed meanwhile");
    assert_eq!(second.status, 200, "{}", second.text);
    assert_ne!(second.json()["version"], made["version"]);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_refused_by_name() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    refused(&world.post(MACHINES, json!({ "config": config() })).await, 404, "not_found", "no app web");
    world.create_app("web").await;
    let check = async |body: Value, status, code, says| refused(&world.post(MACHINES, body).await, status, code, says);
    check(json!({}), 422, "invalid", "config is missing").await;
    check(json!([]), 422, "invalid", "must be a JSON object").await;
    check(json!({ "config": config(), "size": 1 }), 422, "invalid", "size is not known here").await;
    check(json!({ "config": config(), "region": "ams" }), 422, "invalid", "no host in region ams").await;
    check(json!({ "config": config(), "name": "a b" }), 422, "invalid", "not a name").await;
    check(json!({ "config": { "image": "web@sha256:short" } }), 422, "invalid", "not a digest").await;
    check(json!({ "config": { "image": "web:none" } }), 404, "not_found", "no such image").await;
    check(json!({ "config": config(), "min_secrets_version": 4 }), 412, "failed_precondition", "in version 0").await;
    let mut scheduled = config();
    scheduled["standbys"] = json!(["x"]);
    check(json!({ "config": scheduled }), 422, "invalid", "\"x\" is no machine's id").await;
    scheduled["auto_destroy"] = json!(true);
    check(json!({ "config": scheduled }), 422, "invalid", "which does not go with config.auto_destroy").await;
    make(&world, json!({ "name": "one", "config": config(), "skip_launch": true })).await;
    check(json!({ "name": "one", "config": config() }), 409, "name_taken", "has the name one").await;
    world.host.full.store(true, Ordering::SeqCst);
    check(json!({ "config": config() }), 503, "insufficient_capacity", "no room").await;
    assert_eq!(world.get(MACHINES).await.json().as_array().unwrap().len(), 1, "nothing is half there");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skip_launch_cordons_and_repeats_are_obeyed() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config(), "skip_launch": true })).await;
    assert_eq!(made["state"], "created");
    let cordoned = make(&world, json!({ "config": config(), "skip_service_registration": true })).await;
    assert_eq!(cordoned["cordoned"], true);
    state(&world, cordoned["id"].as_str().unwrap(), MachineState::Started).await;
    let body = json!({ "config": config() });
    let again = async || {
        let header = [("dunlin-command-id", "mine-1")];
        world.call(Method::POST, MACHINES, &header, Some(body.clone())).await
    };
    let first = again().await.json();
    assert_eq!(again().await.json()["id"], first["id"]);
    assert_eq!(world.get(MACHINES).await.json().as_array().unwrap().len(), 3);
    let path = format!("{MACHINES}/{}?force=true", first["id"].as_str().unwrap());
    assert_eq!(world.call(Method::DELETE, &path, &[], None).await.status, 200);
    refused(&again().await, 409, "conflict", "was destroyed");
    let wait = format!("{MACHINES}/{}/wait?state=destroyed", first["id"].as_str().unwrap());
    assert_eq!(world.get(&wait).await.json()["state"], "destroyed");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_was_promised_survives_the_end_of_control() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.host.frozen.store(true, Ordering::SeqCst);
    let request = world.post(MACHINES, json!({ "config": config() }));
    let written = world.eventually("the machine is written", async || !world.view.current().config.machines.is_empty());
    tokio::select! {
        _ = request => panic!("the host does not know the machine"),
        () = written => {}
    }
    let id = world.view.current().config.machines.keys().next().unwrap().clone();
    world.control.shutdown().await;
    let world = World::start(data.path()).await;
    state(&world, id.as_str(), MachineState::Started).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_is_a_new_version_of_the_same_machine() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config() })).await;
    let id = made["id"].as_str().unwrap();
    let path = format!("{MACHINES}/{id}");
    state(&world, id, MachineState::Started).await;
    let mut second = config();
    second["env"]["A"] = json!("2");
    let body = json!({ "id": id, "config": second, "current_version": made["instance_id"] });
    let updated = world.post(&path, body.clone()).await;
    assert_eq!(updated.status, 200, "{}", updated.text);
    let updated = updated.json();
    assert_eq!((&updated["id"], &updated["private_ip"]), (&made["id"], &made["private_ip"]));
    assert_ne!(updated["instance_id"], made["instance_id"]);
    refused(&world.post(&path, body).await, 412, "version_mismatch", "is in version");
    state(&world, id, MachineState::Started).await;
    // Stopped and not launched, it stays stopped.
    assert_eq!(world.post(&format!("{path}/stop"), json!({})).await.status, 200);
    state(&world, id, MachineState::Stopped).await;
    let third = world.post(&path, json!({ "config": config(), "skip_launch": true })).await.json();
    assert_eq!(third["state"], "stopped");
    let versions = world.get(&format!("{path}/versions")).await.json();
    let versions = versions.as_array().unwrap();
    assert_eq!(versions.iter().map(|v| &v["version"]).collect::<Vec<_>>(), [
        &third["instance_id"], &updated["instance_id"], &made["instance_id"],
    ]);
    assert_eq!(versions[1]["user_config"]["env"]["A"], "2");
    // Running and not launched, it is stopped, and the next update does not say so.
    assert_eq!(world.post(&format!("{path}/start"), json!({})).await.status, 200);
    state(&world, id, MachineState::Started).await;
    let fourth = world.post(&path, json!({ "config": config(), "skip_launch": true })).await.json();
    let stopped = format!("{path}/wait?state=stopped&instance_id={}", fourth["instance_id"].as_str().unwrap());
    assert_eq!(world.get(&stopped).await.json()["version"], fourth["instance_id"]);
    assert_eq!(fourth["config"], config(), "how it is taken up is no part of it");
    assert_eq!(world.post(&path, json!({ "config": config() })).await.status, 200);
    state(&world, id, MachineState::Started).await;
    for _ in 0..10 {
        assert_eq!(world.post(&path, json!({ "config": config(), "skip_launch": true })).await.status, 200);
    }
    assert_eq!(world.get(&format!("{path}/versions")).await.json().as_array().unwrap().len(), 10, "no more are kept");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_changes_without_a_new_version() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config(), "skip_launch": true })).await;
    let path = format!("{MACHINES}/{}", made["id"].as_str().unwrap());
    assert_eq!(world.post(&format!("{path}/metadata/role"), json!({ "value": "primary" })).await.status, 204);
    assert_eq!(world.get(&format!("{path}/metadata")).await.json(), json!({ "mine": "yes", "role": "primary" }));
    assert_eq!(world.get(&format!("{path}/metadata/role")).await.json(), json!({ "value": "primary" }));
    assert_eq!(world.call(Method::DELETE, &format!("{path}/metadata/mine"), &[], None).await.status, 204);
    refused(&world.call(Method::DELETE, &format!("{path}/metadata/mine"), &[], None).await, 404, "not_found", "no such");
    refused(&world.post(&format!("{path}/metadata/role"), json!({ "value": "x".repeat(5000) })).await, 422, "invalid", "longer");
    let group = world.post(&format!("{path}/metadata/fly_process_group"), json!({ "value": "other" })).await;
    refused(&group, 422, "invalid", "without a new version");
    let now = world.get(&path).await.json();
    assert_eq!(now["config"]["metadata"], json!({ "role": "primary" }));
    assert_eq!(now["instance_id"], made["instance_id"]);
    let found = world.get(&format!("{MACHINES}?metadata.role=primary")).await.json();
    assert_eq!(found.as_array().unwrap().len(), 1);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_keeps_others_out() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config(), "skip_launch": true, "lease_ttl": 60 })).await;
    let path = format!("{MACHINES}/{}", made["id"].as_str().unwrap());
    let nonce = made["nonce"].as_str().unwrap().to_owned();
    let with_nonce = [("fly-machine-lease-nonce", nonce.as_str())];
    let lease = world.get(&format!("{path}/lease")).await.json();
    assert_eq!((&lease["status"], &lease["data"]["owner"]), (&json!("success"), &json!("root")));
    assert_eq!(lease["data"]["nonce"], "", "it is nobody else's");
    let long = "x".repeat(129);
    for (method, path) in [(Method::POST, format!("{path}/stop")), (Method::DELETE, path.clone()), (Method::GET, format!("{path}/lease"))] {
        let answer = world.call(method, &path, &[("fly-machine-lease-nonce", &long)], None).await;
        refused(&answer, 400, "bad_request", "at most 128 characters");
    }
    let other = world.post(&format!("{path}/lease?ttl=30"), json!({})).await;
    refused(&other, 409, "error", "is leased by root");
    assert!(other.json()["message"].as_str().unwrap().contains("is leased by root"));
    for (method, path, body) in [
        (Method::POST, path.clone(), Some(json!({ "config": config() }))),
        (Method::POST, format!("{path}/metadata/a"), Some(json!({ "value": "b" }))),
        (Method::POST, format!("{path}/start"), None),
        (Method::DELETE, format!("{path}?force=true"), None),
    ] {
        refused(&world.call(method, &path, &[], body).await, 409, "conflict", "is leased by root");
    }
    let update = world.call(Method::POST, &path, &with_nonce, Some(json!({ "config": config(), "skip_launch": true }))).await;
    assert_eq!(update.status, 200, "{}", update.text);
    let longer = world.call(Method::POST, &format!("{path}/lease"), &with_nonce, Some(json!({ "ttl": 90 }))).await;
    assert_eq!((longer.status.as_u16(), &longer.json()["data"]["nonce"]), (201, &json!(nonce)));
    refused(&world.call(Method::DELETE, &format!("{path}/lease"), &[], None).await, 400, "bad_request", "no nonce");
    assert_eq!(world.call(Method::DELETE, &format!("{path}/lease"), &with_nonce, None).await.status, 200);
    refused(&world.get(&format!("{path}/lease")).await, 404, "not_found", "nobody has a lease");
    let ps = world.get(&format!("{path}/ps?sort_by=rss&order=desc")).await.json();
    assert_eq!(ps[0]["pid"], 1);
    refused(&world.get(&format!("{path}/ps?sort_by=age")).await, 400, "bad_request", "cannot be sorted");
    assert_eq!(world.call(Method::DELETE, &format!("{path}?kill=true"), &[], None).await.status, 200);
    world.control.shutdown().await;
}

/// Between the first look at the lease and the write lies whatever the images and other writers take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_taken_while_an_update_is_made_holds() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let made = make(&world, json!({ "config": config() })).await;
    let path = format!("{MACHINES}/{}", made["id"].as_str().unwrap());
    state(&world, made["id"].as_str().unwrap(), MachineState::Started).await;
    let quick = [("fly-machine-lease-nonce", "quick")];
    world.host.leased_after_look.store(true, Ordering::SeqCst);
    refused(&world.post(&path, json!({ "config": config() })).await, 409, "conflict", "is leased by the quick one");
    assert_eq!(world.get(&path).await.json()["instance_id"], made["instance_id"], "nothing was written");
    let update = world.call(Method::POST, &path, &quick, Some(json!({ "config": config() }))).await;
    assert_eq!(update.status, 200, "{}", update.text);
    // A release waits for it.
    assert!(world.deploy("web", 'a', "good").await.ended.is_some());
    let of_release = world.view.current().config.machines.values().find(|row| row.spec.release == 1).unwrap().id.clone();
    let release = || world.view.current().config.machines[&of_release].spec.release;
    world.host.leased_after_look.store(true, Ordering::SeqCst);
    let second = world.release("web", 'b', "good").await;
    let lease = format!("{MACHINES}/{of_release}/lease");
    world.eventually("somebody was quicker", async || world.get(&lease).await.status == 200).await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(release(), 1);
    assert_eq!(world.call(Method::DELETE, &lease, &quick, None).await.status, 200);
    assert!(world.follow("web", second).await.pop().unwrap().message.contains("is live"));
    assert_eq!(release(), 2);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_with_a_leased_machine_is_destroyed_by_its_holder_or_by_force() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let destroy = async |query: &str, nonce: &str| world.call(Method::DELETE, &format!("/v1/apps/web{query}"), &[("fly-machine-lease-nonce", nonce)], None).await;
    for by_force in [false, true] {
        world.create_app("web").await;
        make(&world, json!({ "config": config(), "skip_launch": true })).await;
        let made = make(&world, json!({ "config": config(), "skip_launch": true, "lease_ttl": 60 })).await;
        let (id, nonce) = (made["id"].as_str().unwrap(), made["nonce"].as_str().unwrap());
        for (query, nonce) in [("", ""), ("?force=false", "another")] {
            let answer = destroy(query, nonce).await;
            refused(&answer, 409, "conflict", &format!("app web cannot be destroyed: machine {id} is leased by root"));
            assert!(!answer.text.contains("of its other machines"), "{}", answer.text);
        }
        assert_eq!(world.get(MACHINES).await.json().as_array().unwrap().len(), 2, "nothing was destroyed");
        let gone = if by_force { destroy("?force=true", "").await } else { destroy("", nonce).await };
        assert_eq!(gone.status, 202, "{}", gone.text);
        world.eventually("it is gone", async || world.get("/v1/apps/web").await.status == 404).await;
    }
    world.control.shutdown().await;
}

/// A machine whose program ends, as soon as the host lets anything happen.
async fn ends(world: &World, auto_destroy: bool) -> Value {
    let mut ends = config();
    ends["env"]["BEHAVE"] = json!("ends");
    ends["auto_destroy"] = json!(auto_destroy);
    make(world, json!({ "config": ends })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_destroys_itself_when_its_run_has_ended() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let (goes, stays) = (ends(&world, true).await, ends(&world, false).await);
    assert_eq!(goes["config"]["auto_destroy"], true);
    let path = format!("{MACHINES}/{}", goes["id"].as_str().unwrap());
    assert_eq!(world.get(&format!("{path}/wait?state=destroyed&timeout=60")).await.json()["state"], "destroyed");
    // What it did is known for a while, and nothing more is done to it.
    let gone = world.get(&path).await.json();
    assert_eq!((&gone["state"], &gone["exit"]["exit_code"]), (&json!("destroyed"), &json!(0)), "{gone}");
    assert_eq!((&gone["instance_id"], &gone["config"]["auto_destroy"]), (&goes["instance_id"], &json!(true)));
    assert_eq!((&gone["events"][0]["type"], &gone["events"][0]["request"]["exit_event"]["exit_code"]), (&json!("exit"), &json!(0)));
    assert_eq!(world.get(&format!("{path}/events")).await.json(), gone["events"]);
    assert_eq!(world.get(&format!("{path}/events?limit=0")).await.json(), json!([]));
    let listed = world.get(&format!("{MACHINES}?include_deleted=true&state=destroyed")).await.json();
    assert_eq!((&listed[0]["id"], &listed[0]["exit"]), (&goes["id"], &gone["exit"]));
    for (method, path) in [(Method::POST, format!("{path}/start")), (Method::DELETE, path.clone()), (Method::GET, format!("{path}/lease"))] {
        assert_eq!(world.call(method, &path, &[], None).await.status, 404, "{path}");
    }
    state(&world, stays["id"].as_str().unwrap(), MachineState::Stopped).await;
    assert_eq!(world.get(MACHINES).await.json().as_array().unwrap().len(), 1, "only who asked for it");
    // Its address rests, as those of all destroyed machines do.
    assert_ne!(ends(&world, false).await["private_ip"], goes["private_ip"]);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_ended_while_control_was_away_is_destroyed_when_it_is_back() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let mut config = config();
    config["auto_destroy"] = json!(true);
    let made = make(&world, json!({ "config": config })).await;
    let id: MachineId = made["id"].as_str().unwrap().parse().unwrap();
    state(&world, id.as_str(), MachineState::Started).await;
    let World { control, host, .. } = world;
    control.shutdown().await;
    host.end(&id);
    drop(host); // it does nothing more
    let world = World::start(data.path()).await;
    world.eventually("it is gone", async || !world.view.current().machines.contains_key(&id)).await;
    assert!(world.view.current().config.tombstones.contains_key(&id));
    world.control.shutdown().await;
}
