//! Bounds hold, and what is held is given back.

use crate::setup::*;
use dunlin_api::AdmitRefusal;
use dunlin_model::{ConcurrencyKind, MachineState};
use dunlin_proxy::Limits;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn a_slow_head_is_ended() {
    let limits = Limits { header_timeout: Duration::from_millis(200), ..Limits::default() };
    let edge = Edge::with(&[], limits, vec![]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: web").await.unwrap();
    let ended = tokio::time::timeout(DEADLINE, client.read_to_end(&mut Vec::new())).await;
    assert!(ended.is_ok(), "the connection was closed");
    let metrics = edge.proxy.metrics();
    eventually("its place is free", || metrics.open_connections() == 0).await;
}

#[tokio::test]
async fn a_slow_body_is_ended_and_blamed_on_the_client() {
    let (address, _) = upstream(Does::Echo).await;
    let limits = Limits { body_idle_timeout: Duration::from_millis(200), ..Limits::default() };
    let edge = Edge::with(&[machine(address)], limits, vec![]);
    let answer = raw(edge.http, &format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 9\r\n\r\nabc")).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (408, Some("PC02")));
    edge.admitted(0).await;
}

#[tokio::test]
async fn a_silent_machine_is_a_504() {
    let (address, _) = upstream(Does::Hang).await;
    let limits = Limits { response_timeout: Duration::from_millis(200), ..Limits::default() };
    let edge = Edge::with(&[machine(address)], limits, vec![]);
    let answer = get(edge.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (504, Some("PU03")));
    edge.admitted(0).await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place_on_the_machine() {
    let (address, _) = upstream(Does::Hang).await;
    let edge = Edge::start(&[Machine { hard: Some(1), ..machine(address) }]);
    for _ in 0..3 {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
        edge.admitted(1).await;
        drop(client);
        edge.admitted(0).await;
    }
}

/// Bytes behind its request hid that it had gone: some hundred such clients filled an app's queue.
#[tokio::test]
async fn a_client_that_leaves_behind_other_bytes_leaves_the_queue() {
    let (address, _) = upstream(Does::Hang).await;
    let edge = Edge::start(&[Machine { hard: Some(1), ..machine(address) }]);
    let held = tokio::spawn(get(edge.http, "/"));
    edge.admitted(1).await;
    let waiting = || {
        let mut text = String::new();
        edge.proxy.metrics().render(&mut text);
        let line = text.lines().find_map(|line| line.strip_prefix("dunlin_proxy_waiting ")).unwrap();
        line.parse::<u32>().unwrap()
    };
    // The last is more than the edge keeps.
    for more in [1, 40_000, 90_000] {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
        eventually("it waits", || waiting() == 1).await;
        let _ = tokio::time::timeout(Duration::from_millis(500), client.write_all(&vec![b'G'; more])).await;
        client.shutdown().await.unwrap();
        eventually("its place is free", || waiting() == 0).await;
    }
    held.abort();
    edge.admitted(0).await;
}

#[tokio::test]
async fn connections_above_the_limit_are_told_so() {
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let edge = Edge::with(&[], limits, vec![]);
    let first = TcpStream::connect(edge.http).await.unwrap();
    let metrics = edge.proxy.metrics();
    eventually("the first is served", || metrics.open_connections() == 1).await;
    let mut second = TcpStream::connect(edge.http).await.unwrap();
    let answer = tokio::time::timeout(DEADLINE, read_answer(&mut second)).await.unwrap();
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PC04")));
    drop(first);
    eventually("its place is free", || metrics.open_connections() == 0).await;
}

#[tokio::test]
async fn the_queue_is_bounded_and_ends() {
    let limits = Limits { max_waiting_per_app: 1, wait_timeout: Duration::from_millis(300), ..Limits::default() };
    let (address, _) = upstream(Does::Hang).await;
    let busy = Machine { hard: Some(1), ..machine(address) };
    let edge = Edge::with(&[busy], limits, vec![]);
    let held = tokio::spawn(get(edge.http, "/"));
    edge.admitted(1).await;
    let (one, other) = tokio::join!(get(edge.http, "/"), get(edge.http, "/"));
    let mut codes = [header(&one.head, "dunlin-error"), header(&other.head, "dunlin-error")];
    codes.sort();
    assert_eq!(codes, [Some("PR08"), Some("PR12")], "one waited in vain, the other could not wait");
    held.abort();
    edge.admitted(0).await;
}

/// Each had its own 45 seconds: with nine of them the client waited for seven minutes.
#[tokio::test]
async fn machines_that_do_not_wake_take_no_longer_than_one() {
    let limits = Limits { wait_timeout: Duration::from_millis(300), ..Limits::default() };
    let asleep = Machine { state: MachineState::Stopped, ..machine(nowhere()) };
    let edge = Edge::with(&vec![asleep; 5], limits, vec![]);
    edge.host.wake_ms.store(60_000, SeqCst);
    let answer = get(edge.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PM01")), "{}", answer.body);
    assert_eq!(edge.host.wakes.load(SeqCst), 1, "the others were not begun");
}

/// The edge's count and the host's never cross: what one core gives back, another finds free at the host.
#[tokio::test]
async fn a_free_place_at_the_edge_is_a_free_place_at_the_host() {
    const CLIENTS: usize = 8;
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[Machine { hard: Some(2), ..machine(address) }]);
    edge.host.hard_limit.store(2, SeqCst);
    let ask = |n: usize| {
        let http = edge.http;
        async move {
            let mut client = TcpStream::connect(http).await.unwrap();
            for _ in 0..100 {
                client.write_all(format!("GET /{n} HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
                let answer = read_answer(&mut client).await;
                assert_eq!(answer.status, 200, "{}", answer.body);
            }
        }
    };
    futures_util::future::join_all((0..CLIENTS).map(ask)).await;
    assert_eq!(edge.host.full.load(SeqCst), 0, "refusals of the host");
}

/// `type = "connections"`: a kept connection to the machine counts until it is closed. It is its client's alone, and
/// then the next one's: made anew for each short connection, they would use up the ports.
#[tokio::test]
async fn where_connections_count_a_kept_one_has_its_place() {
    let (address, _) = upstream(Does::Echo).await;
    let counted = Machine { kind: ConcurrencyKind::Connections, ..machine(address) };
    let limits = Limits { keep_counted: Duration::from_secs(600), ..Limits::default() };
    let edge = Edge::with(&[counted], limits, vec![]);
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
    let metrics = edge.proxy.metrics();
    let connects = || {
        let mut text = String::new();
        metrics.render(&mut text);
        let line = text.lines().find_map(|line| line.strip_prefix("dunlin_proxy_upstream_connects_total ")).unwrap();
        line.parse::<u32>().unwrap()
    };
    let mut clients = Vec::new();
    for n in 1..=2 {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        for _ in 0..3 {
            client.write_all(request.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client).await.status, 200);
        }
        assert_eq!(connects(), n, "its own, and one only");
        edge.log.lines(3 * n as usize).await;
        edge.admitted(n as usize).await;
        clients.push(client);
    }
    clients.pop();
    for _ in 0..20 {
        eventually("the one before has left", || metrics.open_connections() == 1).await;
        assert_eq!(get(edge.http, "/").await.status, 200);
    }
    // Each core of the edge may have made one.
    assert!(connects() <= 4, "{} connections: they were not handed on", connects());
    assert!(edge.host.admitted.load(SeqCst) <= 4, "a place for each");
}

/// Whoever closes first keeps the port for a minute, and the edge needs its ports.
#[tokio::test]
async fn a_machine_that_is_about_to_close_closes_first() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let edge = Edge::start(&[machine(listener.local_addr().unwrap())]);
    let asking = tokio::spawn(get(edge.http, "/"));
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut buffer = [0; 4096];
    assert!(stream.read(&mut buffer).await.unwrap() > 0);
    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    assert_eq!(asking.await.unwrap().status, 200);
    let closed = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut buffer)).await;
    assert!(closed.is_err(), "the edge closed first: {closed:?}");
    // One that does not keep its word is not waited for in vain.
    assert_eq!(tokio::time::timeout(DEADLINE, stream.read(&mut buffer)).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_place_that_is_only_kept_is_given_to_whoever_waits() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[Machine { kind: ConcurrencyKind::Connections, hard: Some(1), ..machine(address) }]);
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut client).await.status, 200);
        clients.push(client);
    }
    // Nobody waits: after a while it is closed, though its client stays.
    edge.admitted(0).await;
    drop(clients);
}

#[tokio::test]
async fn a_machine_that_is_full_for_its_host_is_waited_for() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    edge.host.refusals.lock().unwrap().insert(id(0), AdmitRefusal::AtLimit);
    let waiting = tokio::spawn(get(edge.http, "/"));
    let metrics = edge.proxy.metrics();
    eventually("the request waits", || {
        let mut text = String::new();
        metrics.render(&mut text);
        text.contains("dunlin_proxy_waiting 1\n")
    })
    .await;
    edge.host.refusals.lock().unwrap().clear();
    assert_eq!(waiting.await.unwrap().status, 200);
}

#[tokio::test]
async fn too_big_a_head_is_refused() {
    let limits = Limits { max_head_bytes: 8 * 1024, ..Limits::default() };
    let edge = Edge::with(&[], limits, vec![]);
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nx: {}\r\n\r\n", "a".repeat(10 * 1024));
    assert_eq!(raw(edge.http, &request).await.status, 431);
}
