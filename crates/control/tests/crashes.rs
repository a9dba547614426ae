//! Every kill point is visited: the process ends there, as with `kill -9`, another one starts on the same
//! data, and the app is wholly in the new or wholly in the old release.

mod world;

use dunlin_control::kill_points;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use world::{DEADLINE, World};

const DATA: &str = "DUNLIN_TEST_DATA";
const POINT: &str = "DUNLIN_TEST_POINT";
/// They mostly wait for machines to stay healthy; more children would slow each other down.
const AT_ONCE: usize = 6;

/// What makes a deploy pass the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scenario {
    Deploy,
    DeploySick,
    ScaleUp,
    ScaleDown,
    /// And up again before it is done.
    ScaleDownAndBack,
    Secrets,
    Destroy,
}

fn scenario(point: &str) -> Scenario {
    let step = point.trim_end_matches("-before").trim_end_matches("-after");
    match step {
        "reserve" | "assign" | "start" => Scenario::ScaleUp,
        "cordon" | "stop" | "destroy" => Scenario::ScaleDown,
        "uncordon" => Scenario::ScaleDownAndBack,
        "failed" => Scenario::DeploySick,
        "secrets" => Scenario::Secrets,
        "app-destroy" => Scenario::Destroy,
        _ => Scenario::Deploy,
    }
}

/// Not a test of its own: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the other test, as a process of its own"]
async fn child() {
    let (Some(data), Ok(point)) = (std::env::var_os(DATA), std::env::var(POINT)) else { return };
    let world = World::start_until(Path::new(&data), Some(point.clone())).await;
    let follow = match scenario(&point) {
        Scenario::Deploy => world.release("web", 'b', "good").await,
        Scenario::DeploySick => world.release("web", 'b', "sick").await,
        Scenario::ScaleUp => number(&world.post("/v1/apps/web/scale", json!({ "app": 3 })).await),
        Scenario::ScaleDown => number(&world.post("/v1/apps/web/scale", json!({ "app": 1 })).await),
        Scenario::ScaleDownAndBack => world.scale_down_and_back("web").await,
        Scenario::Secrets => {
            world.post("/v1/apps/web/secrets", json!({ "values": { "KEY": "value" } })).await;
            3
        }
        Scenario::Destroy => {
            world.call(axum::http::Method::DELETE, "/v1/apps/web", &[], None).await;
            return;
        }
    };
    world.follow("web", follow).await;
    // `done-after` and the like come a moment after the end is told.
    tokio::time::sleep(Duration::from_secs(2)).await;
}

fn number(answer: &world::Answer) -> u32 {
    answer.json()["version"].as_u64().unwrap() as u32
}

#[test]
fn after_a_kill_at_any_point_the_app_is_wholly_in_one_release() {
    let base = tempfile::tempdir().unwrap();
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime().block_on(async {
        let world = World::start(base.path()).await;
        world.create_app("web").await;
        world.deploy("web", 'a', "good").await;
        world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
        world.follow("web", 2).await;
        world.control.shutdown().await;
    });
    for points in kill_points().chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            for point in points {
                let base = base.path();
                scope.spawn(move || {
                    let data = tempfile::tempdir().unwrap();
                    copy(base, data.path());
                    kill_at(point, data.path());
                    runtime().block_on(check(point, data.path()));
                });
            }
        });
    }
}

/// Runs the child until it dies at the point.
fn kill_at(point: &str, data: &Path) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored"])
        .env(DATA, data)
        .env(POINT, point)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{point}: the child neither died nor ended");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(6), "{point}: the child did not pass it: {status}");
}

async fn check(point: &str, data: &Path) {
    let world = World::start(data).await;
    if scenario(point) == Scenario::Destroy {
        world.eventually("the app is destroyed", async || world.get("/v1/apps/web").await.status == 404).await;
        world.eventually("and its machines", async || world.view.current().machines.is_empty()).await;
        return world.control.shutdown().await;
    }
    let releases = async || -> Vec<(u64, String)> {
        let all = world.get("/v1/apps/web/releases").await.json();
        let one = |r: &serde_json::Value| (r["version"].as_u64().unwrap(), r["status"].as_str().unwrap().to_owned());
        all.as_array().unwrap().iter().map(one).collect()
    };
    world
        .eventually("nothing is under way", async || !releases().await.iter().any(|(_, status)| status == "running"))
        .await;
    let all = releases().await;
    let newest = all[0].clone();
    let number = if scenario(point) == Scenario::ScaleDownAndBack { 4 } else { 3 };
    let was_written = newest.0 == number;
    assert!(was_written || ["release-before", "secrets-before", "publish-before", "publish-after"].contains(&point), "{point}: {all:?}");
    let expected = if scenario(point) == Scenario::DeploySick { "rolled_back" } else { "succeeded" };
    assert!(!was_written || newest.1 == expected, "{point}: {all:?}");
    if was_written {
        let end = world.follow("web", number as u32).await.pop().unwrap();
        assert!(end.ended.is_some(), "{point}: a client that comes back sees the end");
    }
    world
        .eventually("one release, healthy", async || {
            let view = world.view.current();
            let digests: BTreeSet<_> = view.config.machines.values().map(|m| m.spec.image.digest.clone()).collect();
            digests.len() == 1 && world.host.healthy() == view.config.machines.len()
        })
        .await;
    let count = world.view.current().config.machines.len();
    let wanted = match scenario(point) {
        Scenario::ScaleUp if was_written => 3,
        Scenario::ScaleDown if was_written => 1,
        _ => 2,
    };
    assert_eq!(count, wanted, "{point}");
    let next = world.deploy("web", 'c', "good").await;
    assert!(next.message.ends_with(&format!("is live on {count} machine{}", if count == 1 { "" } else { "s" })), "{point}: {next:?}");
    world.control.shutdown().await;
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
