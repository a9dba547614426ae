//! Volumes, from the API and from releases.

mod world;

use axum::http::Method;
use dunlin_model::desired::ReleaseStatus;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use world::{Answer, World};

fn check_error(answer: &Answer, status: u16, says: &str) {
    assert_eq!(answer.status, status, "{}", answer.text);
    assert!(answer.json()["error"].as_str().unwrap().contains(says), "{}", answer.text);
}

/// Release `nth` of the app, with a volume in each machine.
async fn deploy(world: &World, nth: u32, image: char, mounts: Value) {
    let mut body = world::release_body("web", image, "good");
    body["config"]["mounts"] = mounts;
    let answer = world.post("/v1/apps/web/releases", body).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    let end = world.follow("web", nth).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
}

fn data() -> Value {
    json!([{ "source": "data", "destination": "/data", "initial_size_gb": 2 }])
}

async fn volumes(world: &World) -> Vec<Value> {
    world.get("/v1/apps/web/volumes").await.json().as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_made_shown_extended_and_destroyed() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path()).await;
    world.create_app("web").await;
    world.create_app("other").await;
    let made = world.post("/v1/apps/web/volumes", json!({ "name": "data", "size_gb": 2, "encrypted": false })).await;
    assert_eq!(made.status, 200, "{}", made.text);
    let made = made.json();
    assert_eq!((made["state"].as_str(), made["region"].as_str(), made["size_gb"].as_u64()), (Some("created"), Some("local"), Some(2)));
    assert_eq!((made["encrypted"].as_bool(), &made["attached_machine_id"]), (Some(false), &Value::Null));
    let path = format!("/v1/apps/web/volumes/{}", made["id"].as_str().unwrap());
    assert_eq!(world.get(&path).await.json(), made);
    for (body, status, says) in [
        (json!({ "name": "Data" }), 422, "lower-case"),
        (json!({ "name": "data", "encrypted": true }), 422, "cannot encrypt volumes: cryptsetup is not installed"),
        (json!({ "name": "data", "fstype": "xfs" }), 422, "ext4"),
        (json!({ "name": "data", "iops": 9 }), 422, "iops"),
        (json!({ "name": "data", "region": "fra" }), 422, "no host in region fra"),
        (json!({ "name": "data", "size_gb": 0 }), 422, "size_gb is 0"),
        (json!({ "name": "data", "size_gb": 200 }), 503, "100 GiB are free"),
        (json!({ "name": "data", "snapshot_id": "vs_0000000000000000" }), 404, "has a snapshot"),
    ] {
        check_error(&world.post("/v1/apps/web/volumes", body).await, status, says);
    }
    // An id of another app's volume is no permission.
    let theirs = json!({ "name": "mine", "source_volume_id": made["id"] });
    check_error(&world.post("/v1/apps/other/volumes", theirs.clone()).await, 404, "has no volume");
    check_error(&world.get(&path.replace("/web/", "/other/")).await, 404, "has no volume");

    let put = async |path: &str, body: Value| world.call(Method::PUT, path, &[], Some(body)).await;
    let extended = put(&format!("{path}/extend"), json!({ "size_gb": 4 })).await.json();
    assert_eq!((extended["volume"]["size_gb"].as_u64(), extended["needs_restart"].as_bool()), (Some(4), Some(false)));
    check_error(&put(&format!("{path}/extend"), json!({ "size_gb": 3 })).await, 422, "never shrinks");
    check_error(&put(&format!("{path}/extend"), json!({ "size_gb": 400 })).await, 503, "100 GiB are free");
    assert_eq!(put(&path, json!({ "snapshot_retention": 9 })).await.json()["snapshot_retention"], 9);
    check_error(&put(&path, json!({ "snapshot_retention": 90 })).await, 422, "60 days");
    assert_eq!(made["auto_backup_enabled"], true, "as on Fly");
    assert_eq!(put(&path, json!({ "auto_backup_enabled": false })).await.json()["auto_backup_enabled"], false);
    assert_eq!(put(&path, json!({ "snapshot_retention": 9 })).await.json()["auto_backup_enabled"], false, "what is not said stays");

    let snapshot = world.post(&format!("{path}/snapshots"), json!({})).await.json();
    assert_eq!(world.get(&format!("{path}/snapshots")).await.json(), json!([snapshot]));
    assert!(snapshot["digest"].as_str().unwrap().starts_with("sha256:"), "{snapshot}");
    let restored = world.post("/v1/apps/web/volumes", json!({ "name": "old", "snapshot_id": snapshot["id"] })).await;
    assert_eq!(restored.json()["size_gb"], 2, "as large as what it is of: {}", restored.text);
    let config = world.view.current().config.clone();
    let row = config.volumes.values().find(|row| row.name == "old").unwrap();
    assert_eq!(row.source.as_ref().unwrap().volume.as_str(), made["id"].as_str().unwrap());
    check_error(&world.post("/v1/apps/other/volumes", json!({ "name": "old", "snapshot_id": snapshot["id"] })).await, 404, "has a snapshot");

    assert_eq!(world.call(Method::DELETE, &path, &[], None).await.status, 200);
    check_error(&world.get(&path).await, 404, "has no volume");
    world.eventually("its host hears of it", async || world.view.current().config.volume_tombstones.len() == 1).await;
    world.call(Method::DELETE, "/v1/apps/web?force=true", &[], None).await;
    world.eventually("an app's volumes go with it", async || world.view.current().config.volumes.is_empty()).await;
    assert_eq!(world.view.current().config.volume_tombstones.len(), 2);
    world.control.shutdown().await;
}

/// As asked for; otherwise where the host can, and a copy as what it is of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_encrypted_where_that_is_possible() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path()).await;
    world.create_app("web").await;
    let create = async |body: Value| world.post("/v1/apps/web/volumes", body).await;
    let encrypted = async |body: Value| {
        let made = create(body).await;
        assert_eq!(made.status, 200, "{}", made.text);
        made.json()
    };
    let plain = encrypted(json!({ "name": "data" })).await;
    assert_eq!(plain["encrypted"], false, "who does not ask is not refused");
    let answer = create(json!({ "name": "data", "encrypted": true })).await;
    assert!(answer.json()["hint"].as_str().unwrap().contains("install it"), "{}", answer.text);
    let mut body = world::release_body("web", 'a', "good");
    body["config"]["mounts"] = json!([{ "source": "db", "destination": "/data", "encrypted": true }]);
    check_error(&world.post("/v1/apps/web/releases", body.clone()).await, 422, "cannot encrypt volumes");

    world.host.encrypts.store(true, std::sync::atomic::Ordering::SeqCst);
    let made = encrypted(json!({ "name": "data" })).await;
    assert_eq!(made["encrypted"], true);
    assert_eq!(encrypted(json!({ "name": "data", "encrypted": false })).await["encrypted"], false);
    for (of, is, not) in [(&plain, false, true), (&made, true, false)] {
        let fork = json!({ "name": "copy", "source_volume_id": of["id"] });
        assert_eq!(encrypted(fork.clone()).await["encrypted"], is);
        let mut other = fork;
        other["encrypted"] = json!(not);
        check_error(&create(other).await, 422, "a copy is as what it is of");
    }
    assert_eq!(world.post("/v1/apps/web/releases", body).await.status, 201);
    world.follow("web", 1).await;
    let of_release = volumes(&world).await.into_iter().find(|volume| volume["name"] == "db").unwrap();
    assert_eq!(of_release["encrypted"], true);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_releases_machines_have_a_volume_each_and_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path()).await;
    world.create_app("web").await;
    let free = world.post("/v1/apps/web/volumes", json!({ "name": "data" })).await.json();
    deploy(&world, 1, 'a', data()).await;
    let first = volumes(&world).await;
    assert_eq!(first.len(), 1, "the free one is taken: {first:?}");
    let machine = first[0]["attached_machine_id"].as_str().unwrap().to_owned();
    let path = format!("/v1/apps/web/volumes/{}", free["id"].as_str().unwrap());
    let refused = world.call(Method::DELETE, &path, &[], None).await;
    check_error(&refused, 412, &format!("machine {machine} has volume"));

    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    let two = volumes(&world).await;
    let holders: BTreeSet<_> = two.iter().map(|volume| volume["attached_machine_id"].as_str().unwrap().to_owned()).collect();
    assert!(two.len() == 2 && holders.len() == 2, "{two:?}");
    assert!(two.iter().any(|volume| volume["size_gb"] == 2), "the new one has the release's size");

    deploy(&world, 3, 'b', data()).await;
    assert_eq!(volumes(&world).await, two, "machines and volumes stay together");

    // A machine that a person destroys leaves its volume to the one that takes its place.
    world.call(Method::DELETE, &format!("/v1/apps/web/machines/{machine}?force=true"), &[], None).await;
    world.eventually("another has it", async || {
        let holder = volumes(&world).await.into_iter().find(|volume| volume["id"] == free["id"]);
        holder.is_some_and(|volume| volume["attached_machine_id"].as_str().is_some_and(|id| id != machine))
    })
    .await;
    assert_eq!(volumes(&world).await.len(), 2);

    world.eventually("it is whole again", async || world.host.healthy() == 2).await;
    deploy(&world, 4, 'b', json!([])).await;
    let free = volumes(&world).await;
    assert!(free.len() == 2 && free.iter().all(|volume| volume["attached_machine_id"].is_null()), "{free:?}");
    world.control.shutdown().await;
}

/// The volume "full" of the test's host always is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_volume_grows_by_itself_up_to_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path()).await;
    world.create_app("web").await;
    let extend = json!({ "extend_threshold_percent": 90, "add_size_gb": 2, "size_gb_limit": 5 });
    let mounts = |extend: Value| json!([{ "source": "full", "destination": "/data", "initial_size_gb": 2, "extend": extend }]);
    deploy(&world, 1, 'a', mounts(extend.clone())).await;
    world.eventually("it has the size of its limit", async || volumes(&world).await[0]["size_gb"] == 5).await;
    let machine = volumes(&world).await[0]["attached_machine_id"].as_str().unwrap().to_owned();
    let shown = world.get(&format!("/v1/apps/web/machines/{machine}")).await.json();
    for (name, value) in extend.as_object().unwrap() {
        assert_eq!(&shown["config"]["mounts"][0][name], value, "{shown}");
    }
    // Without a word on it none grows.
    let row = world.view.current().config.volumes.values().next().unwrap().clone();
    assert_eq!((row.size_gb, row.auto_backup), (5, true));
    deploy(&world, 2, 'b', mounts(Value::Null)).await;
    let spec = world.view.current().config.machines.values().next().unwrap().spec.clone();
    assert_eq!(spec.mounts[0].extend, None);
    world.control.shutdown().await;
}
