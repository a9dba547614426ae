//! The upgrade of the fleet as control drives it. How it goes on is the planner's, whose tests are beside it.

mod world;

use serde_json::json;
use world::World;
use world::upgrades::servers_on_dead_lines;

/// The half that came is not followed by the rest, and the host is as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_binary_that_nobody_wants_any_more_is_not_sent_on() {
    let data = tempfile::tempdir().unwrap();
    let (operate, sends) = servers_on_dead_lines();
    let world = World::start_operated(data.path(), operate).await;
    assert_eq!(world.upgrade(b"a binary").await.status, 202);
    let shown = async || world.get("/v1/cluster/upgrade").await.json();
    world.eventually("it is on its way", async || !sends.lock().unwrap().is_empty()).await;
    assert_eq!(shown().await["hosts"], json!([{ "host": "h1", "phase": "installing" }]));
    tokio::time::sleep(std::time::Duration::from_millis(2_500)).await;
    assert_eq!(sends.lock().unwrap().len(), 1, "it is sent once, however often it is looked at");
    assert!(!sends.lock().unwrap()[0].stop.is_cancelled());

    assert_eq!(world.post("/v1/cluster/upgrade/abort", json!({})).await.status, 200);
    world.eventually("it is sent no further", async || sends.lock().unwrap()[0].stop.is_cancelled()).await;
    world.eventually("it has stopped", async || shown().await["state"] == "stopped").await;
    let shown = shown().await;
    assert_eq!((&shown["hosts"][0]["phase"], &shown["hosts"][0]["is_back"]), (&json!("failed"), &json!(true)), "{shown}");
    assert_eq!(sends.lock().unwrap().len(), 1);

    // Another turn is another try.
    assert_eq!(world.post("/v1/cluster/upgrade/resume", json!({})).await.status, 200);
    world.eventually("it is sent again", async || sends.lock().unwrap().len() == 2).await;
    world.control.shutdown().await;
}
