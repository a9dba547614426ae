//! What goes through, and what is added and taken away.

use crate::setup::*;
use dunlin_proxy::{InternalHost, Limits};
use dunlin_model::MachineState;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn a_request_goes_through_and_says_where_it_came_from() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let request = "GET /a?b=c HTTP/1.1\r\nhost: WEB.example.test\r\nx-forwarded-for: 6.6.6.6\r\nfly-client-ip: 6.6.6.6\r\n\
        forwarded: for=6.6.6.6\r\nfly-request-id: mine\r\nkeep-alive: 5\r\nx-hop: 1\r\nte: gzip\r\n\
        connection: x-hop, keep-alive\r\n\r\n";
    let answer = raw(edge.http, request).await;
    assert_eq!(answer.status, 200);
    let seen = &answer.body;
    assert!(seen.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{seen}");
    assert!(!seen.contains("6.6.6.6") && !seen.contains("mine"), "{seen}");
    for gone in ["forwarded", "keep-alive", "x-hop", "te", "connection"] {
        assert_eq!(header(seen, gone), None, "{gone} in {seen}");
    }
    for (name, value) in [
        ("host", "WEB.example.test"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-ssl", "off"),
        ("fly-client-ip", "127.0.0.1"),
        ("fly-region", "local"),
        ("via", "1.1 dunlin"),
    ] {
        assert_eq!(header(seen, name), Some(value), "{name} in {seen}");
    }
    assert_eq!(header(seen, "fly-forwarded-port"), Some(edge.http.port().to_string().as_str()));
    assert_eq!(header(seen, "fly-request-id"), header(&answer.head, "fly-request-id"));
    assert_eq!(header(&answer.head, "fly-request-id").unwrap().len(), 26);
    assert_eq!(header(&answer.head, "x-secret-hop"), None, "named by the machine's Connection header");
    assert_eq!(header(&answer.head, "server"), Some("dunlin"));
    edge.admitted(0).await;
    let line = &edge.log.lines(1).await[0];
    for (name, value) in [
        ("app", "web"),
        ("machine", id(0).as_str()),
        ("client", "127.0.0.1"),
        ("protocol", "HTTP/1.1"),
        ("method", "GET"),
        ("host", HOST),
        ("path", "/a"),
        ("request_id", header(&answer.head, "fly-request-id").unwrap()),
    ] {
        assert_eq!(line[name], value, "{name} in {line}");
    }
    for (name, value) in [("status", 200), ("bytes_out", answer.body.len()), ("attempts", 1)] {
        assert_eq!(line[name], value, "{name} in {line}");
    }
    assert_eq!(line["complete"], true);
    let mut text = String::new();
    edge.proxy.metrics().render(&mut text);
    assert!(text.contains("dunlin_proxy_answers_total{app=\"web\",status=\"2xx\"} 1"), "{text}");
}

#[tokio::test]
async fn an_unknown_host_is_told_what_to_do_in_the_form_that_it_reads() {
    let edge = Edge::start(&[]);
    for (accept, kind) in [("application/json", "application/json"), ("text/html", "text/html; charset=utf-8"), ("*/*", "text/plain; charset=utf-8")] {
        let answer = raw(edge.http, &format!("GET / HTTP/1.1\r\nhost: no.localhost\r\naccept: {accept}\r\n\r\n")).await;
        assert_eq!(answer.status, 404);
        assert_eq!(header(&answer.head, "content-type"), Some(kind));
        assert_eq!(header(&answer.head, "dunlin-error"), Some("PR01"));
        assert!(answer.body.contains("no app is served as no.localhost"), "{}", answer.body);
        assert!(answer.body.contains(header(&answer.head, "dunlin-request-id").unwrap()));
    }
}

#[tokio::test]
async fn connections_are_kept_on_both_sides() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    for n in 0..5 {
        client.write_all(format!("GET /{n} HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut client).await.status, 200);
    }
    assert_eq!(heads.load(SeqCst), 5);
    let mut text = String::new();
    edge.proxy.metrics().render(&mut text);
    assert!(text.contains("dunlin_proxy_upstream_connects_total 1\n"), "{text}");
    assert!(text.contains("dunlin_proxy_upstream_reused_total 4\n"), "{text}");
}

#[tokio::test]
async fn a_big_body_goes_both_ways() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let body = "0123456789abcdef".repeat(512 * 1024);
    let request = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let answer = raw(edge.http, &request).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.ends_with(&body), "8 MiB came back as they went");
}

#[tokio::test]
async fn plain_http_is_redirected_with_path_and_port() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[Machine { force_https: true, ..machine(address) }]);
    let answer = get(edge.http, "/a?b=c").await;
    assert_eq!(answer.status, 308);
    let expected = format!("https://{HOST}:{}/a?b=c", edge.https.port());
    assert_eq!(header(&answer.head, "location"), Some(expected.as_str()));
    assert_eq!(heads.load(SeqCst), 0);
}

#[tokio::test]
async fn an_upgraded_connection_is_a_tunnel_until_one_side_ends_it() {
    let (address, _) = upstream(Does::Upgrade).await;
    let edge = Edge::start(&[machine(address)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    let request = format!("GET /ws HTTP/1.1\r\nhost: {HOST}\r\nconnection: keep-alive, Upgrade\r\nupgrade: echo\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let answer = read_answer(&mut client).await;
    assert_eq!(answer.status, 101);
    assert_eq!(header(&answer.head, "upgrade"), Some("echo"));
    for text in ["first", "second"] {
        client.write_all(text.as_bytes()).await.unwrap();
        let mut back = vec![0; text.len()];
        client.read_exact(&mut back).await.unwrap();
        assert_eq!(back, text.as_bytes());
    }
    edge.admitted(1).await;
    drop(client);
    edge.admitted(0).await;
}

#[tokio::test]
async fn smuggled_requests_never_reach_a_machine() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: web.example.test\r\n\r\n";
    for (what, head, status) in [
        ("two lengths", "content-length: 6\r\ncontent-length: 0\r\n", 400),
        ("unknown coding", "transfer-encoding: xchunked\r\n", 501),
        ("signed length", "content-length: +6\r\n", 400),
        ("space before colon", "content-length : 6\r\n", 400),
        ("second host", "host: other.localhost\r\n", 400),
    ] {
        let request = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\n{head}\r\n0\r\n\r\n{smuggled}");
        let answer = raw(edge.http, &request).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.head);
        assert_eq!(heads.load(SeqCst), 0, "{what}");
    }
    for (what, request, status) in [
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("user in host", format!("GET / HTTP/1.1\r\nhost: a@{HOST}\r\n\r\n"), 400),
        ("connect", "CONNECT web.example.test:80 HTTP/1.1\r\nhost: web.example.test\r\n\r\n".to_owned(), 405),
        ("trace", format!("TRACE / HTTP/1.1\r\nhost: {HOST}\r\n\r\n"), 405),
    ] {
        let answer = raw(edge.http, &request).await;
        assert_eq!(answer.status, status, "{what}");
        let says_what_is_allowed = header(&answer.head, "allow").is_some_and(|methods| methods.contains("GET"));
        assert_eq!(says_what_is_allowed, status == 405, "{what}: {}", answer.head);
    }
    assert_eq!(heads.load(SeqCst), 0);
    // The machine's absolute-form host wins over the Host header, and is what the machine sees.
    let answer = raw(edge.http, &format!("GET http://{HOST}/x HTTP/1.1\r\nhost: other\r\n\r\n")).await;
    assert_eq!(header(&answer.body, "host"), Some(HOST));
}

/// RFC 9112, 6.3: the length is taken away, the chunks count, and nothing after them is read.
#[tokio::test]
async fn length_and_chunks_together_cannot_hide_a_second_request() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    for head in ["content-length: 6\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 6"] {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        let hidden = format!("GET /hidden HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
        let request = format!("POST /open HTTP/1.1\r\nhost: {HOST}\r\n{head}\r\n\r\n0\r\n\r\n{hidden}");
        client.write_all(request.as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(DEADLINE, read_answer(&mut client)).await.unwrap();
        if answer.status != 400 {
            assert!(answer.body.starts_with("POST /open "), "{}", answer.body);
            assert_eq!(header(&answer.body, "content-length"), None, "the machine sees chunks only");
            assert_eq!(header(&answer.body, "transfer-encoding"), Some("chunked"));
        }
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(DEADLINE, client.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection ends");
        assert_eq!(String::from_utf8_lossy(&rest), "", "nothing answers the hidden request");
    }
}

#[tokio::test]
async fn an_internal_host_is_reached_over_its_socket_and_marked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = vec![0; 4096];
            let n = stream.read(&mut got).await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {n}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&got[..n]).await.unwrap();
        }
    });
    let known = InternalHost { hostname: "api.localhost".into(), unix_socket: path };
    let gone = InternalHost { hostname: "registry.localhost".into(), unix_socket: dir.path().join("none.sock") };
    let edge = Edge::with(&[], Limits::default(), vec![known, gone]);
    let answer = raw(edge.http, "GET /v1/apps HTTP/1.1\r\nhost: api.localhost:1\r\n\r\n").await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.starts_with("GET /v1/apps HTTP/1.1\r\n"), "{}", answer.body);
    let answer = raw(edge.http, "GET /v2/ HTTP/1.1\r\nhost: registry.localhost\r\n\r\n").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PI01")));
}

#[tokio::test]
async fn a_sleeping_machine_is_woken_and_then_answers() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[Machine { state: MachineState::Stopped, ..machine(address) }]);
    edge.host.wake_ms.store(50, SeqCst);
    assert_eq!(get(edge.http, "/").await.status, 200);
    assert_eq!(edge.host.wakes.load(SeqCst), 1);
    // The table says that it runs, the host knows better.
    edge.set(&[machine(address)]);
    edge.host.refusals.lock().unwrap().insert(id(0), dunlin_api::AdmitRefusal::Asleep);
    assert_eq!(get(edge.http, "/").await.status, 200);
    assert_eq!(edge.host.wakes.load(SeqCst), 2);
}

/// Above the soft limit every request asks for one more machine; a start that just failed is not repeated for each.
#[tokio::test]
async fn an_extra_machine_that_cannot_start_is_left_alone_for_a_while() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[
        Machine { soft: 0, ..machine(address) },
        Machine { state: MachineState::Stopped, ..machine(nowhere()) },
    ]);
    edge.host.refusals.lock().unwrap().insert(id(1), dunlin_api::AdmitRefusal::DidNotWake("no".into()));
    for _ in 0..20 {
        assert_eq!(get(edge.http, "/").await.status, 200);
    }
    assert_eq!(edge.host.wakes.load(SeqCst), 1);
}

#[tokio::test]
async fn a_request_waits_for_its_single_machine() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[Machine { state: MachineState::Restarting, ..machine(address) }]);
    let waiting = tokio::spawn(get(edge.http, "/"));
    let metrics = edge.proxy.metrics();
    eventually("the request waits", || {
        let mut text = String::new();
        metrics.render(&mut text);
        text.contains("dunlin_proxy_waiting 1\n")
    })
    .await;
    edge.set(&[machine(address)]);
    assert_eq!(waiting.await.unwrap().status, 200);
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_cuts_what_hangs() {
    let (address, _) = upstream(Does::Hang).await;
    let edge = Edge::start(&[machine(address)]);
    let mut idle = TcpStream::connect(edge.http).await.unwrap();
    idle.write_all(b"GET / HTTP/1.1\r\nhost: none.example.test\r\n\r\n").await.unwrap();
    assert_eq!(read_answer(&mut idle).await.status, 404);
    let mut hanging = TcpStream::connect(edge.http).await.unwrap();
    hanging.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    edge.admitted(1).await;
    let host = edge.host.clone();
    let drained = edge.proxy.drain(Duration::from_millis(200)).await;
    assert_eq!(drained.cut, 1, "the idle connection was closed at once");
    eventually("the cut request is given back", || host.admitted.load(SeqCst) == 0).await;
    drop(idle);
}

#[tokio::test]
async fn a_new_connection_has_one_request_though_the_edge_stops() {
    let (address, _) = upstream(Does::Echo).await;
    let limits = Limits { drain_grace: DEADLINE, ..Limits::default() };
    let (edge, certificate) = crate::tls::with_certificate(&[machine(address)], limits);
    let mut plain = TcpStream::connect(edge.http).await.unwrap();
    let tls = crate::tls::connect(edge.https, HOST, &certificate, b"h2").await.unwrap();
    let (sender, connection) = h2::client::handshake(tls).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let metrics = edge.proxy.metrics();
    eventually("both are accepted", || metrics.open_connections() == 2).await;
    let draining = tokio::spawn(edge.proxy.drain(DEADLINE));
    eventually("the edge takes nothing new", || std::net::TcpStream::connect(edge.http).is_err()).await;
    plain.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    let answer = read_answer(&mut plain).await;
    assert_eq!((answer.status, header(&answer.head, "connection")), (200, Some("close")));
    let (answer, _) = sender.send_request(http::Request::get(format!("https://{HOST}/")).body(()).unwrap(), true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);
    drop(sender);
    // The edge closes after its answer: the client's own farewell may come too late for it, which is no fault.
    let _ = connection.await.unwrap();
    assert_eq!(draining.await.unwrap().cut, 0);
}
