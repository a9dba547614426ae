//! Control from a backup: what was made and destroyed since is as the cluster knows it.

mod world;

use dunlin_control::{restore, write_backup};
use dunlin_model::desired::ReleaseStatus;
use dunlin_view::ConfigState;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use world::upgrades::servers_on_dead_lines;
use world::{World, host_id};

struct Backup {
    dir: tempfile::TempDir,
}

impl Backup {
    fn of(data: &Path) -> Self {
        let backup = Self { dir: tempfile::tempdir().unwrap() };
        write_backup(data, &host_id(), &backup.file("key"), &backup.file("backup")).unwrap();
        backup
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn restore(&self, data: &Path) {
        restore(data, &self.file("key"), &self.file("backup"), false).await.unwrap();
    }
}

fn config(world: &World) -> ConfigState {
    ConfigState::clone(&world.view.current().config)
}

async fn machines(world: &World) -> Vec<Value> {
    world.get("/v1/apps/web/machines").await.json().as_array().unwrap().clone()
}

async fn deployed(world: &World, image: char) -> u32 {
    let release = world.release("web", image, "good").await;
    let end = world.follow("web", release).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    release
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_made_since_goes_on_and_what_was_destroyed_stays_so() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let world = World::start(data).await;
    for app in ["web", "gone"] {
        world.create_app(app).await;
    }
    world.post("/v1/apps/web/secrets?stage=true", json!({ "values": { "KEY": "of the backup" } })).await;
    deployed(&world, 'a').await;
    world.deploy("gone", 'a', "good").await;
    let backup = Backup::of(data);
    world.post("/v1/apps/web/secrets?stage=true", json!({ "values": { "KEY": "of later" } })).await;
    deployed(&world, 'b').await;
    assert_eq!(deployed(&world, 'c').await, 3);
    world.create_app("new").await;
    world.deploy("new", 'a', "good").await;
    assert_eq!(world.call(axum::http::Method::DELETE, "/v1/apps/gone", &[], None).await.status, 202);
    world.eventually("it is destroyed", async || world.get("/v1/apps/gone").await.status == 404).await;
    let token = world.post("/v1/tokens", json!({ "verbs": ["read"], "expires_in_s": 60 })).await.json();
    world.post("/v1/tokens/revoke", json!({ "id": token["id"] })).await;
    world.eventually("all of it is told", async || {
        let config = config(&world);
        config.revoked_tokens.len() == 1 && config.machines.len() == 2 && config.apps.len() == 2
    })
    .await;
    let (before, commands) = (config(&world), world.host.commands.lock().unwrap().len());
    world.control.shutdown().await;

    backup.restore(data).await;
    let world = World::start_having_heard(data, before.clone()).await;
    world.eventually("it is told anew", async || config(&world).generation.incarnation > before.generation.incarnation).await;
    let after = config(&world);
    assert_eq!(after.machines, before.machines);
    assert!(before.tombstones.iter().all(|(id, host)| after.tombstones.get(id) == Some(host) || !after.machines.contains_key(id)));
    assert_eq!(after.revoked_tokens, before.revoked_tokens);
    let web: dunlin_model::AppName = "web".parse().unwrap();
    assert_eq!(after.apps[&web], before.apps[&web]);
    assert!(after.machines.values().all(|machine| machine.spec.app.as_str() != "gone"), "nothing of it comes back");
    // The set that no backup has stays as it was sealed to the host.
    let version = after.machines.values().find(|machine| machine.spec.app.as_str() == "web").unwrap().spec.secrets_version;
    assert_eq!(world.secrets("web", version), Some(json!({ "KEY": "of later" })));
    assert_eq!(machines(&world).await[0]["release"], 3);
    assert_eq!(world.host.commands.lock().unwrap().len(), 0, "of {commands} before: nothing is started or stopped");

    // The next deploy is above all numbers, in the secrets of the backup.
    assert_eq!(deployed(&world, 'd').await, 4);
    let last = machines(&world).await;
    assert_eq!((last.len(), &last[0]["release"]), (1, &json!(4)), "{last:?}");
    let version = config(&world).machines.values().find(|machine| machine.spec.app.as_str() == "web").unwrap().spec.secrets_version;
    assert_eq!(world.secrets("web", version), Some(json!({ "KEY": "of the backup" })));
    world.control.shutdown().await;
    // Once is enough.
    let world = World::start_having_heard(data, before).await;
    let known = |machines: &[Value]| machines.iter().map(|machine| (machine["id"].clone(), machine["instance_id"].clone())).collect::<Vec<_>>();
    assert_eq!(known(&machines(&world).await), known(&last));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_restored_where_nobody_knows_more() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let world = World::start(data).await;
    world.create_app("web").await;
    deployed(&world, 'a').await;
    let (backup, before) = (Backup::of(data), machines(&world).await);
    world.control.shutdown().await;
    backup.restore(data).await;
    let world = World::start(data).await;
    assert_eq!(machines(&world).await[0]["id"], before[0]["id"]);
    assert_eq!(deployed(&world, 'b').await, 2);
    world.control.shutdown().await;
}

/// Nobody here knows how far it came, and its binary is in no backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_of_the_backup_is_halted_and_says_so() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let (operate, sends) = servers_on_dead_lines();
    let world = World::start_operated(data, operate).await;
    assert_eq!(world.upgrade(b"a binary").await.status, 202);
    world.eventually("it is on its way", async || !sends.lock().unwrap().is_empty()).await;
    let backup = Backup::of(data);
    world.control.shutdown().await;
    backup.restore(data).await;
    std::fs::remove_dir_all(data.join("control/upgrades")).unwrap();

    let (operate, sends) = servers_on_dead_lines();
    let world = World::start_operated(data, operate).await;
    let shown = async || world.get("/v1/cluster/upgrade").await.json();
    let halted = shown().await;
    assert_eq!((&halted["state"], &halted["hosts"][0]["phase"], &halted["hosts"][0]["is_back"]), (&json!("stopped"), &json!("failed"), &json!(false)), "{halted}");
    let why = halted["why"].as_str().unwrap();
    assert!(why.contains("restored from a backup") && why.contains("Start it again: `dunlin cluster upgrade --binary FILE`"), "{why}");
    let refused = world.post("/v1/cluster/upgrade/resume", json!({})).await;
    assert!(refused.status == 412 && refused.text.contains("start it again"), "{} {}", refused.status, refused.text);
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert!(sends.lock().unwrap().is_empty(), "no host is told anything");

    let again = world.upgrade(b"a binary").await;
    assert_eq!(again.status, 202, "{}", again.text);
    world.eventually("it is sent", async || sends.lock().unwrap().len() == 1).await;
    assert!(shown().await["id"] != halted["id"] && shown().await["state"] == "running");
    world.control.shutdown().await;
    // Only a restore halts it: the next start goes on.
    let (operate, sends) = servers_on_dead_lines();
    let world = World::start_operated(data, operate).await;
    world.eventually("it is sent again", async || sends.lock().unwrap().len() == 1).await;
    world.control.shutdown().await;
}
