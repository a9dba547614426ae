//! Commands in machines, over a WebSocket.

mod world;

use dunlin_api::client::{Client, ClientConfig, Target};
use dunlin_api::exec::{ExecAsk, ExecEvent, ExecSay, ExecStart};
use dunlin_api::{ApiError, WindowSize};
use serde_json::json;
use std::sync::atomic::Ordering;
use world::World;

/// A client of a router that listens on loopback.
async fn client(router: axum::Router, token: Option<String>) -> Client {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let target = Target::Http { tls: false, host: "127.0.0.1".into(), port };
    Client::new(ClientConfig { target, token, extra_roots_pem: None }).unwrap()
}

async fn deployed(world: &World) -> String {
    world.create_app("web").await;
    world.deploy("web", 'a', "good").await;
    let machines = world.get("/v1/apps/web/machines").await.json();
    format!("/v1/apps/web/machines/{}/exec/stream", machines[0]["id"].as_str().unwrap())
}

fn start(command: &[&str]) -> ExecStart {
    ExecStart { command: command.iter().map(|word| (*word).to_owned()).collect(), ..ExecStart::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ways_and_the_exit_code() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let path = deployed(&world).await;
    let client = client(world.control.root_router(), None).await;
    let (mut input, mut events) = client.exec(&path).await.unwrap();
    let tty = Some(WindowSize { rows: 5, columns: 6 });
    input.ask(&ExecAsk::Start(ExecStart { tty, ..start(&["echo", "a b"]) })).await.unwrap();
    let mut said = async |wanted: ExecEvent| assert_eq!(events.next().await.unwrap(), Some(wanted));
    said(ExecEvent::Say(ExecSay::Started { stdin_window: 512 * 1024 })).await;
    said(ExecEvent::Stdout("echo|a b".into())).await;
    said(ExecEvent::Stderr("WindowSize { rows: 5, columns: 6 }".into())).await;
    input.ask(&ExecAsk::Resize(WindowSize { rows: u16::MAX, columns: 9 })).await.unwrap();
    said(ExecEvent::Stderr("Resize(WindowSize { rows: 4096, columns: 9 })".into())).await;
    input.ask(&ExecAsk::Signal { signal: "SIGINT".into() }).await.unwrap();
    said(ExecEvent::Stderr("Signal(\"SIGINT\")".into())).await;
    input.stdin(&[0, 255, 13, 10]).await.unwrap();
    said(ExecEvent::Stdout(vec![0, 255, 13, 10].into())).await;
    input.ask(&ExecAsk::StdinEnd).await.unwrap();
    said(ExecEvent::Say(ExecSay::Exit { exit_code: 7 })).await;
    assert_eq!(events.next().await.unwrap(), None, "the server hangs up");
    world.control.shutdown().await;
}

/// A command that reads nothing hears signals and sizes all the same, whatever was typed at it before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_does_not_read_hears_what_it_is_told() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let path = deployed(&world).await;
    let client = client(world.control.root_router(), None).await;
    let within = std::time::Duration::from_secs(20);
    let (mut input, mut events) = client.exec(&path).await.unwrap();
    input.ask(&ExecAsk::Start(start(&["deaf"]))).await.unwrap();
    assert!(matches!(events.next().await.unwrap(), Some(ExecEvent::Say(ExecSay::Started { .. }))));
    input.keep_to_window().await.unwrap();
    let (heard, mut told) = tokio::sync::mpsc::unbounded_channel();
    let listener = tokio::spawn(async move {
        while let Ok(Some(event)) = events.next().await {
            heard.send(event).unwrap();
        }
    });
    let mut sent = 0;
    while tokio::time::timeout(std::time::Duration::from_millis(500), input.room()).await.is_ok() {
        tokio::time::timeout(within, input.stdin(&[b'x'; 16 * 1024])).await.expect("the server takes in what it has a window for").unwrap();
        sent += 16;
    }
    assert!((512..2048).contains(&sent), "{sent} KiB");
    input.ask(&ExecAsk::Resize(WindowSize { rows: 8, columns: 9 })).await.unwrap();
    input.ask(&ExecAsk::Signal { signal: "SIGINT".into() }).await.unwrap();
    let mut said = String::new();
    while !said.contains("SIGINT") {
        let event = tokio::time::timeout(within, told.recv()).await.expect("it is told").expect("it has not ended");
        if let ExecEvent::Stderr(bytes) = event {
            said += &String::from_utf8_lossy(&bytes);
        }
    }
    assert!(said.contains("Resize(WindowSize { rows: 8, columns: 9 })"), "{said}");
    drop(input);
    listener.abort();
    world.eventually("it has ended", async || world.host.sessions_ended.load(Ordering::Relaxed) == 1).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_ends_its_command() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let path = deployed(&world).await;
    let client = client(world.control.root_router(), None).await;
    let (mut input, mut events) = client.exec(&path).await.unwrap();
    input.ask(&ExecAsk::Start(start(&["sleep"]))).await.unwrap();
    assert!(matches!(events.next().await.unwrap(), Some(ExecEvent::Say(ExecSay::Started { .. }))));
    assert_eq!(world.host.sessions_ended.load(Ordering::Relaxed), 0);
    drop((input, events));
    world.eventually("it has ended", async || world.host.sessions_ended.load(Ordering::Relaxed) == 1).await;
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_say_why() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let path = deployed(&world).await;
    let refused = |error: ApiError| match error {
        ApiError::Refused { http_status, body } => (http_status, body.error),
        other => panic!("{other}"),
    };
    // Before there is a WebSocket: what every request hears.
    let nobody = client(world.control.edge_router(), None).await;
    assert_eq!(refused(nobody.exec(&path).await.err().unwrap()).0, 401);
    let token = world.post("/v1/tokens", json!({ "verbs": ["read", "deploy"], "expires_in_s": 60 })).await.json();
    let reader = client(world.control.edge_router(), token["token"].as_str().map(str::to_owned)).await;
    let (status, why) = refused(reader.exec(&path).await.err().unwrap());
    assert!(status == 403 && why.contains("does not allow exec"), "{status} {why}");
    let token = world.post("/v1/tokens", json!({ "verbs": ["exec"], "expires_in_s": 60 })).await.json();
    let caller = client(world.control.edge_router(), token["token"].as_str().map(str::to_owned)).await;
    let nowhere = path.replace("/web/", "/other/");
    assert_eq!(refused(caller.exec(&nowhere).await.err().unwrap()).0, 404);
    // And inside of it.
    let cases = [
        (ExecAsk::Start(start(&["missing"])), "not found"),
        (ExecAsk::Start(start(&[])), "either a command or a transfer"),
        (ExecAsk::StdinEnd, "must be `start`"),
    ];
    for (first, says) in cases {
        let (mut input, mut events) = caller.exec(&path).await.unwrap();
        input.ask(&first).await.unwrap();
        match events.next().await.unwrap() {
            Some(ExecEvent::Say(ExecSay::Failed(body))) => {
                assert!(body.error.contains(says) && body.request_id.is_some(), "{body:?}");
            }
            other => panic!("{first:?}: {other:?}"),
        }
    }
    world.control.shutdown().await;
}
