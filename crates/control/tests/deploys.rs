//! Deploys, from the API to machines on a small host and back to the view.

mod world;

use dunlin_api::{Command, CommandKind, HostApi, Source};
use dunlin_model::MachineState;
use dunlin_model::desired::ReleaseStatus;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::Duration;
use world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_is_planned_carried_out_and_published() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let end = world.deploy("web", 'a', "good").await;
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    assert_eq!(end.message, "release v1 is live on 1 machine");
    let view = world.view.current();
    let (id, machine) = view.config.machines.get_min().unwrap();
    assert_eq!(machine.spec.image.digest, format!("sha256:{}", "a".repeat(64)));
    assert_ne!(machine.placement.revision, 0, "readers get the revision of the assignment");
    assert!(view.machines[id].is_healthy());
    let status = world.get("/v1/apps/web/status").await.json();
    assert_eq!(status["urls"], json!(["http://web.localhost:8080", "https://web.localhost"]));
    assert_eq!(status["release"]["status"], "succeeded");
    assert_eq!(status["machines"][0]["state"], "started");
    assert_eq!(world.follow("web", 1).await.last(), Some(&end), "a client that comes back sees the same end");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_region_without_a_host_is_said_and_goes_to_the_app() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    for (nth, region, is_told) in [(1, "fra", true), (2, "local", false)] {
        let mut body = world::release_body("web", 'a', "good");
        body["config"]["primary_region"] = json!(region);
        assert_eq!(world.post("/v1/apps/web/releases", body).await.status, 201);
        let events = world.follow("web", nth).await;
        assert_eq!(events.last().unwrap().ended, Some(ReleaseStatus::Succeeded));
        let told = "no host is in primary_region fra: machines run in local; PRIMARY_REGION says fra";
        assert_eq!(events.iter().any(|event| event.message == told), is_told, "{events:?}");
        let config = world.view.current().config.clone();
        assert!(config.machines.values().all(|machine| machine.spec.env["PRIMARY_REGION"] == region));
    }
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_release_rolls_one_machine_at_a_time() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let scaled = world.post("/v1/apps/web/scale", json!({ "app": 3 })).await;
    assert_eq!(scaled.status, 201, "{}", scaled.text);
    assert_eq!(scaled.json()["reason"], "scale app to 3");
    world.follow("web", 2).await;
    assert_eq!(world.host.healthy(), 3);
    let again = world.post("/v1/apps/web/scale", json!({ "app": 3 })).await;
    assert_eq!((again.status.as_u16(), again.text.as_str()), (200, "null"));
    world.host.lowest_healthy.store(usize::MAX, Ordering::SeqCst);
    let end = world.deploy("web", 'b', "good").await;
    assert_eq!(end.message, "release v3 is live on 3 machines");
    assert!(world.host.lowest_healthy.load(Ordering::SeqCst) >= 2);
    let unchanged = world.deploy("web", 'b', "good").await;
    assert_eq!(unchanged.message, "release v4 is live on 3 machines");
    let down = world.post("/v1/apps/web/scale", json!({ "app": 1 })).await.json();
    world.follow("web", down["version"].as_u64().unwrap() as u32).await;
    world.eventually("two machines are gone", async || world.view.current().machines.len() == 1).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_host_could_ever_hold_makes_no_release() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    for (vm, says) in [
        (json!({ "memory_mb": 921_600 }), "it is to have 921600 MB, and the largest host, h1, has 4096 MB and 2 cpus"),
        (json!({ "cpu_kind": "performance", "cpus": 16, "memory_mb": 4096 }), "4096 MB and 16 performance cpus, and the largest host"),
    ] {
        let mut body = world::release_body("web", 'a', "good");
        body["config"]["vm"] = json!([vm]);
        let answer = world.post("/v1/apps/web/releases", body).await;
        assert_eq!(answer.status, 422, "{}", answer.text);
        assert!(answer.json()["error"].as_str().unwrap().contains(says), "{}", answer.text);
    }
    assert_eq!(world.get("/v1/apps/web/releases").await.json(), json!([]));
    world.control.shutdown().await;
}

/// Deploys what behaves badly over what is good; the closing event.
async fn check_return(behave: &str) -> dunlin_api::wire::DeployEvent {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let end = world.deploy("web", 'b', behave).await;
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    assert!(end.hint.is_some(), "{end:?}");
    let releases = world.get("/v1/apps/web/releases").await.json();
    assert_eq!(releases[0]["status"], "rolled_back");
    let app = world.get("/v1/apps/web").await.json();
    assert_eq!(app["current_release"], 1);
    let good = format!("sha256:{}", "a".repeat(64));
    assert!(world.view.current().config.machines.values().all(|machine| machine.spec.image.digest == good));
    assert_eq!(world.host.healthy(), 1);
    // The next one is not confused by what came before.
    assert_eq!(world.deploy("web", 'c', "good").await.message, "release v3 is live on 1 machine");
    world.control.shutdown().await;
    end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_check_returns_and_shows_the_last_answer() {
    let end = check_return("sick").await;
    assert!(end.message.starts_with("release v2 failed, v1 runs again: machine "), "{}", end.message);
    assert!(end.message.contains("HTTP 500, 12 bytes"), "{}", end.message);
    let answered = |line: &String| line.starts_with("the app answered to check ") && line.ends_with(": out of order");
    assert!(end.details.iter().any(answered), "{:?}", end.details);
    assert!(end.details.iter().any(|line| line.contains("no module named flask")), "{:?}", end.details);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_exits_at_once_shows_its_last_lines() {
    let end = check_return("crashes").await;
    assert!(end.message.contains("exited with code 3"), "{}", end.message);
    let lines = end.details.iter().filter(|line| line.contains("no module named flask")).count();
    assert_eq!(lines, 1, "the release before said it as well: {:?}", end.details);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_comes_up_and_does_not_stay_is_no_success() {
    let end = check_return("fades").await;
    assert!(end.message.contains("exited with code 3"), "{}", end.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_ends_after_its_gate_is_not_brought_to_the_last_machine() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    world.post("/v1/apps/web/scale", json!({ "app": 3 })).await;
    world.follow("web", 2).await;
    let first: Vec<_> = world.view.current().config.machines.values().map(|machine| machine.spec.version.clone()).collect();
    let end = world.deploy("web", 'b', "withers").await;
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    assert!(end.message.contains("exited with code 3 after it had been healthy"), "{}", end.message);
    let machines = world.view.current();
    assert!(machines.config.machines.values().any(|machine| first.contains(&machine.spec.version)), "one was left alone");
    assert_eq!(world.host.healthy(), 3);
    world.control.shutdown().await;
}

/// A good release whose machine is stopped by hand, then one that crashes; the end of that.
async fn deploy_to_a_sleeper(world: &World, auto_stop: &str) -> dunlin_api::wire::DeployEvent {
    world.create_app("web").await;
    for (nth, image, behave) in [(1, 'a', "good"), (2, 'b', "crashes")] {
        let mut body = world::release_body("web", image, behave);
        body["config"]["http_service"]["auto_stop_machines"] = json!(auto_stop);
        assert_eq!(world.post("/v1/apps/web/releases", body).await.status, 201);
        let end = world.follow("web", nth).await.pop().unwrap();
        if nth == 2 {
            return end;
        }
        let id = world.view.current().machines.keys().next().unwrap().clone();
        assert_eq!(world.post(&format!("/v1/apps/web/machines/{id}/stop"), json!({})).await.status, 200);
        world.eventually("it is stopped", async || world.view.current().machines[&id].state == MachineState::Stopped).await;
    }
    unreachable!("there are two releases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_whose_machines_all_sleep_is_tested_in_one_that_a_request_may_wake() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let end = deploy_to_a_sleeper(&world, "stop").await;
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    assert!(end.message.contains("v1 runs again") && end.message.contains("exited with code 3"), "{}", end.message);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_returns_to_a_release_that_never_ran() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let end = deploy_to_a_sleeper(&world, "off").await;
    assert_eq!(end.message, "release v2 is live on 1 machine, asleep, not tested");
    let mut same = world::release_body("web", 'b', "crashes");
    same["config"]["http_service"]["auto_stop_machines"] = json!("off");
    assert_eq!(world.post("/v1/apps/web/releases", same).await.status, 201);
    assert_eq!(world.follow("web", 3).await.last().unwrap().message, "release v3 is live on 1 machine, not tested");
    let id = world.view.current().machines.keys().next().unwrap().clone();
    assert_eq!(world.post(&format!("/v1/apps/web/machines/{id}/start"), json!({})).await.status, 200);
    world.eventually("it runs", async || !world.view.current().machines[&id].state.is_asleep()).await;
    let end = world.deploy("web", 'c', "sick").await;
    assert!(end.message.starts_with("release v4 failed, v1 runs again: "), "{}", end.message);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_listens_elsewhere_is_told_where() {
    let end = check_return("elsewhere").await;
    let told = "it listens on 127.0.0.1:5000, but must listen on 0.0.0.0:8080";
    assert!(end.details.iter().any(|line| line == told), "{end:?}");
    assert!(end.hint.as_deref().unwrap().contains("internal_port"), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_release_that_fails_has_nothing_to_return_to() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let end = world.deploy("web", 'a', "missing").await;
    assert_eq!(end.ended, Some(ReleaseStatus::Failed), "{end:?}");
    assert!(end.message.contains("image not found"), "{}", end.message);
    let end = world.deploy("web", 'b', "good").await;
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_is_said_and_the_old_scale_comes_back() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    world.host.full.store(true, Ordering::SeqCst);
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    let end = world.follow("web", 2).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    assert!(end.message.contains("256 MB wanted, 3 MB free"), "{}", end.message);
    assert_eq!(world.get("/v1/apps/web/scale").await.json(), json!({ "app": 1 }));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_is_believed_once_the_host_has_spoken_again() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let speak = |memory_reserved_mb: u32, updated_at_ms: u64| {
        let (id, region) = (world::host_id(), "local".parse().unwrap());
        let fact = dunlin_view::HostFact { id, region, cpus: 2, memory_mb: 4096, memory_reserved_mb, room: None, updated_at_ms };
        world.view.publish_host(fact);
    };
    world.host.silent.store(true, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(50)).await; // it may be speaking
    // Its last word is from before something was stopped.
    speak(4000, 1);
    let release = world.release("web", 'a', "good").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    speak(1000, 2);
    let end = world.follow("web", release).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::Succeeded), "{end:?}");
    speak(4000, 3);
    world.host.full.store(true, Ordering::SeqCst);
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    speak(4000, 4);
    let end = world.follow("web", release + 1).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    assert!(end.message.contains("host h1 has 96 MB free"), "{}", end.message);
    // The same word, and this time it is wrong: the host is asked before anybody is told so.
    world.host.full.store(false, Ordering::SeqCst);
    let asked = world.post("/v1/apps/web/scale", json!({ "app": 2 })).await.json();
    tokio::time::sleep(Duration::from_millis(300)).await;
    speak(4000, 5);
    let end = world.follow("web", asked["version"].as_u64().unwrap() as u32).await.pop().unwrap();
    assert_eq!((end.ended, world.host.healthy()), (Some(ReleaseStatus::Succeeded), 2), "{end:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_cannot_be_written_down_has_failed() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    // The release fits into a row of the store, its plan, with the environment once for each process group, does not.
    let mut large = world::release_body("web", 'a', "good");
    for nth in 0..8 {
        large["config"]["env"][format!("LARGE_{nth}")] = json!("x".repeat(20_000));
    }
    large["config"]["processes"] = json!({ "app": "serve", "worker": "work" });
    for (nth, status) in [(1, ReleaseStatus::Failed), (3, ReleaseStatus::RolledBack)] {
        let made = world.post("/v1/apps/web/releases", large.clone()).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let end = world.follow("web", nth).await.pop().unwrap();
        assert_eq!(end.ended, Some(status), "{end:?}");
        assert!(end.message.contains("cannot be written down: the store refuses the request: the value of plans/web has"), "{}", end.message);
        assert_eq!(world.deploy("web", 'b', "good").await.ended, Some(ReleaseStatus::Succeeded));
    }
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_release_takes_over() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let first = world.release("web", 'a', "sick").await;
    let second = world.release("web", 'b', "good").await;
    let (first, second) = (world.follow("web", first).await, world.follow("web", second).await);
    assert_eq!(first.last().unwrap().ended, Some(ReleaseStatus::Superseded));
    assert_eq!(second.last().unwrap().ended, Some(ReleaseStatus::Succeeded), "{second:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_is_gone_to_its_end_whatever_happens_on_it() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    let failing = world.release("web", 'b', "sick").await;
    let is_sick = |fact: &dunlin_view::MachineFact| !fact.is_healthy() && !fact.checks.is_empty();
    world.eventually("the new version is sick", async || {
        world.view.current().machines.values().any(|fact| fact.release == failing && is_sick(fact))
    }).await;
    // The host stands still, so that the way back has begun and waits in its middle.
    world.host.frozen.store(true, Ordering::SeqCst);
    world.eventually("it returns", async || world.get("/v1/apps/web").await.json()["current_release"] == 2).await;
    let digest = format!("sha256:{}", "a".repeat(64));
    world.eventually("the sick one is to be as before", async || {
        world.view.current().config.machines.values().all(|machine| machine.spec.image.digest == digest)
    }).await;
    let sick = world.view.current().machines.values().find(|fact| is_sick(fact)).unwrap().id.clone();
    let gone = world.call(axum::http::Method::DELETE, &format!("/v1/apps/web/machines/{sick}?force=true"), &[], None).await;
    assert_eq!(gone.status, 200, "{}", gone.text);
    world.host.frozen.store(false, Ordering::SeqCst);
    let end = world.follow("web", failing).await.pop().unwrap();
    assert_eq!(end.ended, Some(ReleaseStatus::RolledBack), "{end:?}");
    let view = world.view.current();
    assert_eq!(view.config.machines.len(), 2);
    assert!(!view.config.machines.contains_key(&sick));
    assert_eq!(world.host.healthy(), 2);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scale_down_that_is_taken_back_leaves_all_machines_in_service() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    let back = world.scale_down_and_back("web").await;
    let end = world.follow("web", back).await.pop().unwrap();
    assert_eq!(end.message, "release v4 is live on 2 machines");
    assert!(world.view.current().machines.values().all(|fact| !fact.cordoned));
    assert_eq!(world.host.healthy(), 2);
    // Each command names its plan, by which a host knows one that is late.
    let plans: Vec<_> = world.host.commands.lock().unwrap().iter().map(|command| command.plan.unwrap()).collect();
    assert!(plans.is_sorted() && plans[0].incarnation > 0, "{plans:?}");
    assert_eq!((plans[0].revision, plans.last().unwrap().revision), (1, 4));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_destroyed_by_hand_is_replaced() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let destroy_all = async || {
        for machine in world.get("/v1/apps/web/machines").await.json().as_array().unwrap() {
            let path = format!("/v1/apps/web/machines/{}?force=true", machine["id"].as_str().unwrap());
            let gone = world.call(axum::http::Method::DELETE, &path, &[], None).await.json();
            assert!(gone["note"].as_str().unwrap().contains("`dunlin scale count`"), "{gone}");
        }
    };
    let first: Vec<_> = world.view.current().config.machines.keys().cloned().collect();
    destroy_all().await;
    world.eventually("another one serves", async || {
        let view = world.view.current();
        let ids: Vec<_> = view.config.machines.keys().cloned().collect();
        ids.len() == 1 && ids != first && world.host.healthy() == 1
    }).await;
    let releases = world.get("/v1/apps/web/releases").await.json();
    assert_eq!((releases.as_array().unwrap().len(), &releases[0]["status"]), (1, &json!("succeeded")));
    // Where it cannot be replaced, asking for it again tells why, and then brings it.
    world.host.full.store(true, Ordering::SeqCst);
    destroy_all().await;
    world.eventually("none is left", async || world.view.current().config.machines.is_empty()).await;
    let asked = world.post("/v1/apps/web/scale", json!({ "app": 1 })).await.json();
    let end = world.follow("web", asked["version"].as_u64().unwrap() as u32).await.pop().unwrap();
    assert!(end.message.contains("256 MB wanted, 3 MB free"), "{end:?}");
    world.host.full.store(false, Ordering::SeqCst);
    let end = world.deploy("web", 'a', "good").await;
    assert_eq!((end.ended, world.host.healthy()), (Some(ReleaseStatus::Succeeded), 1), "{end:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rollback_deploys_an_earlier_release_again() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let none = world.post("/v1/apps/web/rollback", json!({})).await;
    assert_eq!(none.status, 412, "{}", none.text);
    world.deploy("web", 'a', "good").await;
    world.deploy("web", 'b', "good").await;
    let back = world.post("/v1/apps/web/rollback", json!({})).await;
    assert_eq!(back.json()["reason"], "rollback to v1", "{}", back.text);
    world.follow("web", 3).await;
    // Scaling changes nothing that one could go back from.
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 4).await;
    let back = world.post("/v1/apps/web/rollback", json!({})).await;
    assert_eq!(back.json()["reason"], "rollback to v2", "{}", back.text);
    world.follow("web", 5).await;
    world.post("/v1/apps/web/rollback", json!({})).await;
    world.follow("web", 6).await;
    let digest = format!("sha256:{}", "a".repeat(64));
    assert!(world.view.current().config.machines.values().all(|machine| machine.spec.image.digest == digest));
    let unknown = world.post("/v1/apps/web/rollback", json!({ "version": 77 })).await;
    assert_eq!(unknown.status, 404);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_returns_to_a_release_that_waited_for_nobodys_health() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let mut immediate = world::release_body("web", 'b', "sick");
    immediate["config"]["deploy"]["strategy"] = json!("immediate");
    world.post("/v1/apps/web/releases", immediate).await;
    assert_eq!(world.follow("web", 2).await.last().unwrap().ended, Some(ReleaseStatus::Succeeded));
    let end = world.deploy("web", 'c', "sick").await;
    assert!(end.message.starts_with("release v3 failed, v1 runs again"), "{end:?}");
    assert_eq!(world.host.healthy(), 1);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_no_way_back_to_the_same() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    world.post("/v1/apps/web/scale", json!({ "app": 2 })).await;
    world.follow("web", 2).await;
    let refused = world.post("/v1/apps/web/rollback", json!({})).await;
    assert_eq!(refused.status, 412, "{}", refused.text);
    assert!(refused.text.contains("have the image, the configuration and the secrets of v2"), "{}", refused.text);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destroying_an_app_leaves_tombstones_and_frees_the_name() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let gone = world.call(axum::http::Method::DELETE, "/v1/apps/web", &[], None).await;
    assert_eq!(gone.status, 202, "{}", gone.text);
    assert_eq!(world.get("/v1/apps/web").await.status, 404);
    world.eventually("the machine is gone", async || world.view.current().machines.is_empty()).await;
    assert_eq!(world.view.current().config.tombstones.len(), 1);
    world.create_app("web").await;
    assert_eq!(world.deploy("web", 'a', "good").await.message, "release v1 is live on 1 machine");
    let addresses: Vec<_> = world.view.current().config.machines.values().map(|m| m.address).collect();
    assert_ne!(addresses, ["10.201.0.1".parse::<std::net::Ipv4Addr>().unwrap()], "a freed address rests");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_waits_for_whoever_leased_a_machine() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let row = || world.view.current().config.machines.values().next().cloned().unwrap();
    let before = row();
    let order = |id: &str, nonce: Option<String>, kind| Command {
        id: id.parse().unwrap(),
        machine: before.id.clone(),
        deadline_ms: u64::MAX,
        generation: None,
        plan: None,
        expected_version: None,
        nonce,
        source: Source::User,
        request_id: None,
        kind,
    };
    let lease = CommandKind::Lease { ttl_ms: 600_000, owner: "ann".into(), description: String::new() };
    let nonce = world.host.command(order("take", None, lease)).await.unwrap().lease.unwrap().nonce;
    let release = world.release("web", 'b', "good").await;
    tokio::time::sleep(Duration::from_millis(500)).await; // so long it would have taken
    assert_eq!(row().spec.version, before.spec.version, "what is leased was changed");
    world.host.command(order("give", Some(nonce), CommandKind::Release)).await.unwrap();
    assert_eq!(world.follow("web", release).await.last().unwrap().ended, Some(ReleaseStatus::Succeeded));
    assert_ne!(row().spec.version, before.spec.version);
    world.control.shutdown().await;
}
