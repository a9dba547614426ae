//! The HTTP API: who may do what, what errors look like, and that secrets stay secret.

mod world;

use axum::http::Method;
use dunlin_model::desired::ReleaseStatus;
use dunlin_model::token::{Capability, Verb};
use ed25519_dalek::SigningKey;
use serde_json::json;
use std::sync::{Arc, Mutex};
use world::{Answer, World};

const CANARY: &str = "canary-5e1f7a";

fn check_error(answer: &Answer, status: u16, code: &str, says: &str) {
    let body = answer.json();
    assert_eq!(answer.status, status, "{body}");
    assert_eq!(body["status"], code, "{body}");
    assert!(body["error"].as_str().unwrap().contains(says), "{body}");
    let id = answer.headers["fly-request-id"].to_str().unwrap();
    assert_eq!(body["request_id"], id);
    assert_eq!(answer.headers["dunlin-request-id"], id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_error_is_json_with_a_request_id() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    check_error(&world.get("/v1/nothing").await, 404, "not_found", "nothing at /v1/nothing");
    check_error(&world.get("/v1/apps/web").await, 404, "not_found", "there is no app web");
    check_error(&world.get("/v1/apps/Bad_Name").await, 400, "bad_request", "is not valid");
    let method = world.call(Method::PUT, "/v1/apps", &[], None).await;
    check_error(&method, 405, "bad_request", "/v1/apps does not take PUT");
    for method in [Method::PUT, Method::TRACE, Method::CONNECT] {
        let answer = world.call(method.clone(), "/v1/apps", &[], None).await;
        let allowed = answer.headers.get("allow").map(|methods| methods.to_str().unwrap());
        assert!(answer.status == 405 && allowed.is_some_and(|methods| methods.contains("POST")), "{method}: {allowed:?}");
    }
    check_error(&world.post("/v1/apps", json!({})).await, 422, "invalid", "app_name");
    check_error(&world.get("/v1/apps/web/machines/xyz").await, 400, "bad_request", "machine id");
    let too_large = json!({ "app_name": "x".repeat(9 << 20) });
    check_error(&world.post("/v1/apps", too_large).await, 413, "too_large", "");
    world.create_app("web").await;
    check_error(&world.post("/v1/apps", json!({ "name": "web" })).await, 409, "name_taken", "the name web is taken");
    check_error(&world.post("/v1/apps", json!({ "name": "api" })).await, 422, "invalid", "platform's own");
    for (wish, says) in [
        (json!({ "name": "b", "colour": "red" }), "colour"),
        (json!({ "name": "b", "network": "mine" }), "network"),
        (json!({ "name": "b", "enable_subdomains": true }), "enable_subdomains"),
    ] {
        check_error(&world.post("/v1/apps", wish).await, 422, "invalid", says);
    }
    let wish = json!({ "name": "b", "network": "default", "enable_subdomains": false });
    assert_eq!(world.post("/v1/apps", wish).await.status, 201);
    let body = json!({ "image": "web:none", "config": {} });
    check_error(&world.post("/v1/apps/web/releases", body).await, 404, "not_found", "no such image");
    let mut foreign = world::release_body("web", 'a', "good");
    foreign["config"]["app"] = json!("other");
    check_error(&world.post("/v1/apps/web/releases", foreign).await, 422, "invalid", "is of app other");
    let mut unusable = world::release_body("web", 'a', "good");
    unusable["config"]["processes"] = json!({ "app": "run 'it" });
    unusable["config"]["deploy"]["wait_timeout_ms"] = json!(0);
    let refused = world.post("/v1/apps/web/releases", unusable).await;
    check_error(&refused, 422, "invalid", "processes.app: not a command: a quote is not closed");
    check_error(&refused, 422, "invalid", "deploy.wait_timeout must be between 1");
    check_error(&world.post("/v1/apps/web/scale", json!({ "app": 2 })).await, 412, "failed_precondition", "no release");
    let given = world.call(Method::GET, "/v1/nothing", &[("dunlin-request-id", "from-the-edge")], None).await;
    assert_eq!(given.json()["request_id"], "from-the-edge");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_needed_through_the_edge_and_does_no_more_than_it_says() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.create_app("api2").await;
    let edge = async |method: Method, path: &str, token: &str| {
        let bearer = format!("Bearer {token}");
        let body = (method == Method::POST).then(|| json!({}));
        world.call_over_edge(method, path, &[("authorization", &bearer)], body).await
    };
    check_error(&world.call_over_edge(Method::GET, "/v1/apps", &[], None).await, 401, "unauthorized", "has no token");
    assert_eq!(world.call_over_edge(Method::GET, "/healthz", &[], None).await.status, 200);
    let body = json!({ "apps": ["web"], "verbs": ["read", "deploy"], "expires_in_s": 60 });
    let created = world.post("/v1/tokens", body).await.json();
    let token = created["token"].as_str().unwrap();
    let list = edge(Method::GET, "/v1/apps", token).await.json();
    assert_eq!(list["total_apps"], 1, "it sees its own apps only: {list}");
    let fly = format!("FlyV1 {token}");
    let with_fly = world.call_over_edge(Method::GET, "/v1/apps/web", &[("authorization", &fly)], None).await;
    assert_eq!(with_fly.status, 200, "{}", with_fly.text);
    check_error(&edge(Method::GET, "/v1/apps/api2", token).await, 403, "forbidden", "does not allow read on app api2");
    check_error(&edge(Method::DELETE, "/v1/apps/web", token).await, 403, "forbidden", "does not allow admin");
    let exec = "/v1/apps/web/machines/0123456789abcd/exec";
    check_error(&edge(Method::POST, exec, token).await, 403, "forbidden", "does not allow exec");
    check_error(&edge(Method::POST, "/v1/tokens", token).await, 403, "forbidden", "on the organization");

    let expired = Capability {
        id: "old".into(),
        org: "personal".parse().unwrap(),
        apps: None,
        verbs: vec![Verb::Read],
        expires_at_ms: 1,
    };
    let key: [u8; 32] = std::fs::read(data.path().join("control/token.key")).unwrap().try_into().unwrap();
    let old = expired.sign(&SigningKey::from_bytes(&key));
    check_error(&edge(Method::GET, "/v1/apps", &old).await, 401, "unauthorized", "has expired");
    let foreign = expired.sign(&SigningKey::from_bytes(&[1; 32]));
    check_error(&edge(Method::GET, "/v1/apps", &foreign).await, 401, "unauthorized", "not signed by this cluster");

    world.post("/v1/tokens/revoke", json!({ "id": created["id"] })).await;
    check_error(&edge(Method::GET, "/v1/apps/web", token).await, 401, "unauthorized", "was revoked");
    world
        .eventually("the revocation is published", async || {
            world.view.current().config.revoked_tokens.iter().eq([created["id"].as_str().unwrap()])
        })
        .await;
    world.control.shutdown().await;
    // Nor does it work for a moment after the next start.
    let world = World::start(data.path()).await;
    let bearer = format!("Bearer {token}");
    let again = world.call_over_edge(Method::GET, "/v1/apps/web", &[("authorization", &bearer)], None).await;
    check_error(&again, 401, "unauthorized", "was revoked");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_makes_none_that_outlives_it() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let body = json!({ "verbs": ["admin", "read"], "expires_in_s": 60 });
    let own = world.post("/v1/tokens", body).await.json()["token"].as_str().unwrap().to_owned();
    let bearer = format!("Bearer {own}");
    let body = json!({ "verbs": ["read"], "expires_in_s": 1_000_000 });
    let made = world.call_over_edge(Method::POST, "/v1/tokens", &[("authorization", &bearer)], Some(body)).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let key: [u8; 32] = std::fs::read(data.path().join("control/token.key")).unwrap().try_into().unwrap();
    let key = SigningKey::from_bytes(&key).verifying_key();
    let ends = |token: &str| Capability::verify(token, &key, 0).unwrap().expires_at_ms;
    assert_eq!(ends(made.json()["token"].as_str().unwrap()), ends(&own));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_is_its_apps_alone() {
    use dunlin_registry::{Access, Credentials, Denied};
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.create_app("api2").await;
    let body = json!({ "apps": ["web"], "verbs": ["pull", "push"], "expires_in_s": 60 });
    let token = world.post("/v1/tokens", body).await.json()["token"].as_str().unwrap().to_owned();
    let authorize = world.control.registry_authorizer();
    let basic = Credentials::Basic { user: "any".into(), password: token.clone() };
    let bearer = Credentials::Bearer(token);
    world.eventually("the app is published", async || authorize(&bearer, "web", Access::Push).is_ok()).await;
    assert!(authorize(&basic, "", Access::Login).is_ok());
    assert!(authorize(&basic, "web", Access::Pull).is_ok());
    assert!(authorize(&basic, "library/python", Access::Pull).is_ok());
    let refused = |repo: &str, access| matches!(authorize(&basic, repo, access), Err(Denied::Forbidden(_)));
    assert!(refused("library/python", Access::Push));
    assert!(refused("api2", Access::Pull));
    assert!(refused("web/../api2", Access::Pull));
    let anonymous = authorize(&Credentials::Anonymous, "web", Access::Pull);
    assert!(matches!(anonymous, Err(Denied::Unauthenticated(_))));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_reach_the_host_and_nobody_else() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let staged = world.post("/v1/apps/web/secrets", json!({ "values": { "KEY": CANARY } })).await.json();
    assert_eq!((&staged["version"], staged.get("release")), (&json!(1), None), "no release to bring them yet");
    world.deploy("web", 'a', "good").await;
    let listed = world.get("/v1/apps/web/secrets?show_secrets=true").await;
    assert_eq!(listed.json()["secrets"][0]["name"], "KEY");
    assert!(!listed.text.contains(CANARY), "write-only");
    world.eventually("sealed to the host", async || world.secrets("web", 1) == Some(json!({ "KEY": CANARY }))).await;
    let machines = |version: u64| world.view.current().config.machines.values().all(|m| m.spec.secrets_version == version);
    assert!(machines(1));
    // Changed secrets come with a release of their own; unchanged ones do not.
    let set = world.post("/v1/apps/web/secrets", json!({ "values": { "OTHER": "x" } })).await.json();
    assert_eq!(set["release"], 2);
    assert_eq!(world.follow("web", 2).await.last().unwrap().message, "release v2 is live on 1 machine");
    assert!(machines(2));
    let same = world.post("/v1/apps/web/secrets", json!({ "values": { "OTHER": "x" } })).await.json();
    assert_eq!((&same["version"], same.get("release")), (&json!(2), None));
    let staged = world.post("/v1/apps/web/secrets?stage=true", json!({ "values": { "OTHER": null } })).await.json();
    assert_eq!((&staged["version"], staged.get("release")), (&json!(3), None));
    // What waits for a release and is then set to the same without waiting is brought now.
    let now = world.post("/v1/apps/web/secrets", json!({ "values": { "OTHER": null } })).await.json();
    assert_eq!((&now["version"], &now["release"]), (&json!(3), &json!(3)));
    world.follow("web", 3).await;
    assert!(machines(3));
    let again = world.post("/v1/apps/web/secrets", json!({ "values": { "OTHER": null } })).await.json();
    assert_eq!(again.get("release"), None);
    let kept = world.post("/v1/apps/web/secrets", json!({ "values": { "FLY_MACHINE_ID": "x" } })).await;
    check_error(&kept, 422, "invalid", "set by the platform");
    let bad = world.post("/v1/apps/web/secrets", json!({ "values": { "1X": "x" } })).await;
    check_error(&bad, 422, "invalid", "cannot be the name of a secret");

    let facts = serde_json::to_string(&*world.view.current().config).unwrap();
    assert!(!facts.contains(CANARY));
    world.control.shutdown().await;
    for entry in walk(data.path()) {
        let bytes = std::fs::read(&entry).unwrap();
        let found = bytes.windows(CANARY.len()).any(|window| window == CANARY.as_bytes());
        assert!(!found, "{} holds the secret in clear", entry.display());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_master_key_is_not_replaced_in_silence() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let key = data.path().join("control/master.key");
    world.control.shutdown().await;
    std::fs::remove_file(&key).unwrap();
    let world = World::start(data.path()).await; // nothing was sealed to it
    world.create_app("web").await;
    for name in ["A", "B"] {
        world.post("/v1/apps/web/secrets", json!({ "values": { (name): "old" } })).await;
    }
    world.control.shutdown().await;
    std::fs::remove_file(&key).unwrap();
    let refused = World::try_start(data.path(), None).await.err().expect("it must not start");
    let said = std::error::Error::source(&refused).unwrap().to_string();
    assert!(said.contains("master.key is missing") && said.contains("restore it from a backup"), "{said}");
    assert!(!key.exists());
    // Whoever has lost it for good makes another one, and sets the secrets again.
    std::fs::write(&key, [7; 32]).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let world = World::start(data.path()).await;
    let some = world.post("/v1/apps/web/secrets", json!({ "values": { "A": "new" } })).await;
    check_error(&some, 500, "internal", "the secret B of web cannot be opened");
    let all = world.post("/v1/apps/web/secrets", json!({ "values": { "A": "new", "B": null } })).await;
    assert_eq!(all.status, 200, "{}", all.text);
    let version = all.json()["version"].as_u64().unwrap();
    let is_told = || world.view.current().config.secrets.contains_key(&"web".parse::<dunlin_model::AppName>().unwrap());
    assert!(!is_told(), "no host has a machine of it, and so none has its secrets");
    world.release("web", 'a', "good").await;
    world.eventually("published", async || world.secrets("web", version) == Some(json!({ "A": "new" }))).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_has_the_secrets_that_it_was_made_with() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let stage = async |value: &str| {
        let body = json!({ "values": { "KEY": value } });
        world.post("/v1/apps/web/secrets?stage=true", body).await.json()["version"].as_u64().unwrap()
    };
    // What the machines' environment would hold; all of them are in one version.
    let has = async |value: &str| {
        let what = format!("the machines have {value}");
        let holds = async || {
            let config = world.view.current().config.clone();
            let mut machines = config.machines.values();
            machines.all(|m| world.secrets("web", m.spec.secrets_version) == Some(json!({ "KEY": value })))
        };
        world.eventually(&what, holds).await;
    };
    stage("one").await;
    world.deploy("web", 'a', "good").await;
    has("one").await;
    let two = stage("two").await;
    world.eventually("the next one waits", async || world.secrets("web", two).is_some()).await;
    has("one").await;
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    has("one").await;
    assert_eq!(world.deploy("web", 'b', "sick").await.ended, Some(ReleaseStatus::RolledBack));
    has("one").await;
    assert_eq!(world.deploy("web", 'b', "good").await.ended, Some(ReleaseStatus::Succeeded));
    has("two").await;
    let back = world.post("/v1/apps/web/rollback", json!({ "version": 1 })).await.json();
    world.follow("web", back["version"].as_u64().unwrap() as u32).await;
    has("one").await;
    // What waits and is overtaken is dropped; what a release names is not.
    for value in ["three", "four", "five"] {
        stage(value).await;
    }
    world.eventually("only what may be needed is kept", async || {
        let config = world.view.current().config.clone();
        config.secrets[&"web".parse::<dunlin_model::AppName>().unwrap()].iter().map(|fact| fact.version).eq([1, 2, 5])
    }).await;
    world.call(Method::DELETE, "/v1/apps/web", &[], None).await;
    world.create_app("web").await;
    world.eventually("nothing is left of them", async || world.view.current().config.secrets.is_empty()).await;
    assert_eq!(stage("new").await, 6, "a version never means two things");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_is_destroyed_leaves_no_secrets_to_its_names_next_owner() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    for _ in 0..10 {
        world.create_app("web").await;
        let set = async |name: String| {
            world.post("/v1/apps/web/secrets?stage=true", json!({ "values": { (name): CANARY } })).await;
        };
        let sets = futures_util::future::join_all((0..8).map(|nth| set(format!("KEY_{nth}"))));
        let destroy = async {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            world.call(Method::DELETE, "/v1/apps/web", &[], None).await
        };
        let (_, gone) = tokio::join!(sets, destroy);
        assert_eq!(gone.status, 202, "{}", gone.text);
        world.create_app("web").await;
        let left = world.get("/v1/apps/web/secrets").await.json();
        assert_eq!(left["secrets"], json!([]), "{left}");
        world.call(Method::DELETE, "/v1/apps/web", &[], None).await;
    }
    world.control.shutdown().await;
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_go_to_the_machine() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let machines = world.get("/v1/apps/web/machines").await.json();
    let path = format!("/v1/apps/web/machines/{}", machines[0]["id"].as_str().unwrap());
    assert_eq!(world.get(&path).await.json()["host_status"], "ok");
    let stopped = world.call(Method::POST, &format!("{path}/stop"), &[], None).await;
    assert_eq!(stopped.json()["previous_state"], "started", "{}", stopped.text);
    let version = machines[0]["instance_id"].as_str().unwrap();
    check_error(&world.get(&format!("{path}/wait?state=stopped&timeout=5")).await, 400, "bad_request", "of which version");
    assert_eq!(world.get(&format!("{path}/wait?state=stopped&instance_id={version}&timeout=5")).await.json()["state"], "stopped");
    world.post(&format!("{path}/start"), json!({})).await;
    assert_eq!(world.get(&format!("{path}/wait?state=started&timeout=5")).await.status, 200);
    check_error(&world.get(&format!("{path}/wait?state=suspended&timeout=1")).await, 408, "deadline_exceeded", "is started");
    let exec = world.post(&format!("{path}/exec"), json!({ "cmd": "echo 'a b'" })).await.json();
    assert_eq!(exec, json!({ "exit_code": 7, "stdout": "echo|a b", "stderr": "warned" }));
    let running = world.call(Method::DELETE, &path, &[], None).await;
    check_error(&running, 412, "failed_precondition", "is started");
    let other = path.replace("/web/", "/other/");
    check_error(&world.get(&other).await, 404, "not_found", "there is no app other");
    let logs = world.get("/v1/apps/web/logs").await;
    assert!(logs.text.contains("no module named flask"), "{}", logs.text);
    let forced = world.call(Method::DELETE, &format!("{path}?force=true"), &[], None).await;
    assert_eq!(forced.status, 200, "{}", forced.text);
    let id: dunlin_model::MachineId = machines[0]["id"].as_str().unwrap().parse().unwrap();
    world.eventually("it is gone", async || !world.view.current().machines.contains_key(&id)).await;
    let metrics = world.get("/metrics").await.text;
    assert!(metrics.contains("dunlin_apps 1") && metrics.contains("dunlin_test_total 1"), "{metrics}");
    world.eventually("ready", async || world.get("/readyz").await.status == 200).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_shown_of_machines_says_how_old_it_is() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let listed = async || world.get("/v1/apps/web/machines").await.json()[0].clone();
    assert_eq!(listed().await["host_status"], "ok");
    world.host.silent.store(true, std::sync::atomic::Ordering::SeqCst);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await; // it may be speaking
    let long_ago = world::now_ms() - 60_000;
    let host = dunlin_view::HostFact::clone(&world.view.current().hosts[&world::host_id()]);
    world.view.publish_host(dunlin_view::HostFact { updated_at_ms: long_ago, ..host });
    let silent = listed().await;
    assert_eq!((&silent["host_status"], &silent["host_seen_at"]), (&json!("unreachable"), &json!(long_ago)));
    assert_eq!(silent["state"], "started", "the last that was heard");
    // One that is asked and answers is there.
    let asked = world.get(&format!("/v1/apps/web/machines/{}", silent["id"].as_str().unwrap())).await.json();
    assert_eq!(asked["host_status"], "ok");
    assert!(asked["host_seen_at"].as_u64().unwrap() > long_ago);
    world.control.shutdown().await;
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// One thread, as the log is that of a thread.
#[tokio::test(flavor = "current_thread")]
async fn what_is_logged_of_a_request_carries_its_id() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    // While there is one subscriber only, the thread that first comes to a line decides for all whether anybody listens.
    let _second = tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(std::io::sink).finish());
    let _guard = tracing::subscriber::set_default(subscriber);
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let machines = world.get("/v1/apps/web/machines").await.json();
    let path = format!("/v1/apps/web/machines/{}/exec", machines[0]["id"].as_str().unwrap());
    let body = json!({ "verbs": ["exec"], "expires_in_s": 60 });
    let token = world.post("/v1/tokens", body).await.json();
    let bearer = format!("Bearer {}", token["token"].as_str().unwrap());
    let headers = [("authorization", bearer.as_str()), ("dunlin-request-id", "id-of-exec")];
    let body = json!({ "cmd": "echo hello" });
    assert_eq!(world.call_over_edge(Method::POST, &path, &headers, Some(body)).await.status, 200);
    // Something of ours breaks: the disk under the contexts of builds.
    std::fs::write(data.path().join("builder"), "in the way").unwrap();
    let headers = [("dunlin-request-id", "id-of-build")];
    let broken = world.call(Method::POST, "/v1/apps/web/builds", &headers, None).await;
    check_error(&broken, 500, "internal", "the build's context cannot be stored");
    world.control.shutdown().await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines = |id: &str| log.lines().filter(|line| line.contains(&format!("request_id={id}"))).collect::<Vec<_>>().join("\n");
    let exec = lines("id-of-exec");
    let by = format!("by=\"{}\"", token["id"].as_str().unwrap());
    for said in ["exec begins", "exec ended", by.as_str(), "program=\"echo\"", "outcome=\"exit code 7\""] {
        assert!(exec.contains(said), "{said}: {exec}");
    }
    assert!(lines("id-of-build").contains("Not a directory"), "the cause is under the id that the answer names: {log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_certificate_is_published_sealed_to_the_host() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.eventually("published", async || !world.view.current().config.certificates.is_empty()).await;
    let certificate = world.view.current().config.certificates[0].clone();
    // No client takes a wildcard directly below a top-level name: the platform's own names are spelled out.
    assert_eq!(certificate.names, ["localhost", "*.localhost", "api.localhost", "registry.localhost"]);
    let key = world::host_key().open("certificate/localhost", &certificate.sealed_key).unwrap();
    assert!(String::from_utf8_lossy(&key).contains("PRIVATE KEY"));
    let pem = std::fs::read_to_string(world.control.ca_certificate_path()).unwrap();
    assert_eq!(world.get("/v1/ca").await.text, pem);
    world.control.shutdown().await;
}
