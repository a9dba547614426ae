//! HTTP/1 byte by byte: framing, order, early and broken answers.

use crate::setup::*;
use dunlin_proxy::Limits;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends, ends its side only if asked to, and reads until the edge closes.
async fn all(edge: &Edge, request: &str) -> String {
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, client.read_to_end(&mut answer)).await.expect("closed in time").unwrap();
    String::from_utf8(answer).unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer}")).1
}

/// An answer that a client does not wait for with sending reached it only by luck: the reset came first.
#[tokio::test]
async fn an_early_answer_to_an_upload_arrives() {
    let edge = Edge::start(&[]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: none.example.test\r\ncontent-length: 33554432\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let part = vec![b'x'; 1024 * 1024];
    for _ in 0..32 {
        client.write_all(&part).await.unwrap();
    }
    let mut answer = String::new();
    tokio::time::timeout(DEADLINE, client.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert_eq!(header(&answer, "connection"), Some("close"));
    let metrics = edge.proxy.metrics();
    drop(client);
    eventually("its place is free", || metrics.open_connections() == 0).await;
}

#[tokio::test]
async fn what_cannot_be_read_is_told_why_and_logged() {
    let limits = Limits { max_head_bytes: 8 * 1024, header_timeout: Duration::from_millis(300), ..Limits::default() };
    let edge = Edge::with(&[], limits, vec![]);
    let long = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nx: {}\r\n\r\n", "a".repeat(10 * 1024));
    let many = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n{}\r\n", "a: b\r\n".repeat(101));
    let requests = [
        ("GET /\r\n\r\n", 400, "PC01"),
        ("\x16\x03\x01\x02", 400, "PC01"),
        ("GET / HTTP/1.1\r\nhost : a\r\n\r\n", 400, "PC01"),
        ("GET / HTTP/1.1\r\nhost: a\r\n folded: b\r\n\r\n", 400, "PC01"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "PC01"),
        ("GET / HTTP/1.1\r\nhost: web.exam", 408, "PC07"),
        (&long, 431, "PC05"),
        (&many, 431, "PC05"),
    ];
    for (n, (request, status, code)) in requests.into_iter().enumerate() {
        let answer = all(&edge, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
        assert_eq!(header(&answer, "dunlin-error"), Some(code));
        assert!(body(&answer).contains("hint: "), "{answer}");
        let line = &edge.log.lines(n + 1).await[n];
        assert_eq!(line["request_id"], header(&answer, "fly-request-id").unwrap());
        assert_eq!((&line["status"], &line["code"]), (&status.into(), &code.into()));
    }
    let mut text = String::new();
    edge.proxy.metrics().render(&mut text);
    assert!(text.contains("dunlin_proxy_requests_total 8\n"), "{text}");
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_order() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    let post = format!("POST /1 HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 3\r\n\r\nabc");
    let get = |n: u32, more: &str| format!("GET /{n} HTTP/1.1\r\nhost: {HOST}\r\n{more}\r\n");
    // Several at once, the last one in two parts.
    let last = get(3, "connection: close\r\n");
    let (begin, end) = last.split_at(20);
    client.write_all(format!("{post}\r\n{}{begin}", get(2, "")).as_bytes()).await.unwrap();
    client.write_all(end.as_bytes()).await.unwrap();
    let mut answers = String::new();
    tokio::time::timeout(DEADLINE, client.read_to_string(&mut answers)).await.unwrap().unwrap();
    let lines: Vec<_> = answers.lines().filter(|line| line.contains(" HTTP/1.1") || line.contains("HTTP/1.1 ")).collect();
    let ok = "HTTP/1.1 200 OK";
    assert_eq!(lines, [ok, "POST /1 HTTP/1.1", "abcHTTP/1.1 200 OK", "GET /2 HTTP/1.1", ok, "GET /3 HTTP/1.1"], "{answers}");
}

#[tokio::test]
async fn bodies_keep_their_framing_and_their_trailers() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let at_machine = seen.clone();
    let address = serves(move |mut stream| {
        let seen = at_machine.clone();
        async move {
            let mut got = Vec::new();
            while !got.ends_with(b"0\r\nx-sum: 5\r\n\r\n") {
                assert!(stream.read_buf(&mut got).await.unwrap() > 0, "{}", String::from_utf8_lossy(&got));
            }
            *seen.lock().unwrap() = String::from_utf8(got).unwrap();
            let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: grpc-status\r\n\r\n\
                          3;ext=1\r\nabc\r\n0\r\ngrpc-status: 0\r\nhost: evil\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let edge = Edge::start(&[machine(address)]);
    let head = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\nte: trailers\r\nconnection: te, close\r\ntrailer: x-sum\r\n");
    let request = format!("{head}transfer-encoding: chunked\r\n\r\n2\r\nab\r\n03\r\ncde\r\n0\r\nx-sum: 5\r\ncontent-length: 9\r\n\r\n");
    let answer = all(&edge, &request).await;
    assert_eq!(body(&answer), "3\r\nabc\r\n0\r\ngrpc-status: 0\r\n\r\n", "{answer}");
    assert_eq!(header(&answer, "trailer"), Some("grpc-status"));
    let seen = seen.lock().unwrap().clone();
    let head = seen.split("\r\n\r\n").next().unwrap();
    for (name, value) in [("te", "trailers"), ("trailer", "x-sum"), ("transfer-encoding", "chunked")] {
        assert_eq!(header(head, name), Some(value), "{name} in {head}");
    }
    let (mut chunks, mut rest) = (String::new(), body(&seen));
    while let Some((size, after)) = rest.split_once("\r\n")
        && size != "0"
    {
        let size = usize::from_str_radix(size, 16).unwrap();
        chunks += &after[..size];
        rest = &after[size + 2..];
    }
    assert_eq!(chunks, "abcde");
}

#[tokio::test]
async fn a_coded_body_is_refused_and_not_passed_on_unmarked() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let request = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n");
    let answer = raw(edge.http, &request).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (501, Some("PC06")));
    assert_eq!(heads.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn names_that_only_look_different_are_taken_away() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let lines = "Fly_Client_IP: 6.6.6.6\r\nX_Forwarded_For: 6.6.6.6\r\nx-forwarded_proto: 6.6.6.6\r\napi_key: mine\r\n";
    let answer = raw(edge.http, &format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n{lines}\r\n")).await;
    assert!(!answer.body.contains("6.6.6.6"), "{}", answer.body);
    assert_eq!(header(&answer.body, "api_key"), Some("mine"));
}

#[tokio::test]
async fn old_clients_get_what_they_understand() {
    let chunked = says("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").await;
    let edge = Edge::start(&[machine(chunked)]);
    let answer = all(&edge, &format!("GET / HTTP/1.0\r\nhost: {HOST}\r\nconnection: keep-alive\r\n\r\n")).await;
    assert_eq!(body(&answer), "abc", "{answer}");
    assert_eq!((header(&answer, "transfer-encoding"), header(&answer, "connection")), (None, Some("close")));
    let counted = says("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc").await;
    edge.set(&[machine(counted)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    for _ in 0..2 {
        let request = format!("GET / HTTP/1.0\r\nhost: {HOST}\r\nconnection: keep-alive\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let answer = read_answer(&mut client).await;
        assert_eq!((header(&answer.head, "connection"), &*answer.body), (Some("keep-alive"), "abc"));
    }
}

#[tokio::test]
async fn an_answer_until_the_end_is_passed_on_in_chunks() {
    let address = says("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc").await;
    let edge = Edge::start(&[machine(address)]);
    let answer = all(&edge, &format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n")).await;
    assert_eq!(header(&answer, "transfer-encoding"), Some("chunked"));
    assert_eq!(body(&answer), "3\r\nabc\r\n0\r\n\r\n");
}

#[tokio::test]
async fn interim_answers_are_left_out() {
    let address = says("HTTP/1.1 103 Early\r\nlink: a\r\n\r\nHTTP/1.1 100 Go\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx").await;
    let edge = Edge::start(&[machine(address)]);
    for _ in 0..2 {
        let answer = get(edge.http, "/").await;
        assert_eq!((answer.status, &*answer.body), (200, "x"));
    }
}

#[tokio::test]
async fn a_body_is_asked_for_when_a_machine_will_take_it() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let head = |host: &str| format!("POST / HTTP/1.1\r\nhost: {host}\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n");
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    client.write_all(head(HOST).as_bytes()).await.unwrap();
    let mut asked = [0; 25];
    client.read_exact(&mut asked).await.unwrap();
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").await.unwrap();
    let answer = read_answer(&mut client).await;
    assert!(answer.body.ends_with("body") && header(&answer.body, "expect").is_none(), "{}", answer.body);
    // Nobody takes it: the answer comes at once, and the body need not be sent.
    client.write_all(head("none.example.test").as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut client).await.status, 404);
}

#[tokio::test]
async fn a_broken_answer_is_seen_as_broken() {
    for (answer, status) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 10\r\nconnection: close\r\n\r\nabc", 200),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nab", 200),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\nxyz\r\n", 200),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 502),
        ("HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", 502),
        ("220 mail.example ESMTP\r\n\r\n", 502),
    ] {
        let edge = Edge::start(&[machine(says(answer).await)]);
        let got = all(&edge, &format!("POST / HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")).await;
        // Of one that broke off at once nothing may have left.
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")) || status == 200 && got.is_empty(), "{answer}: {got}");
        if status == 502 {
            assert_eq!(header(&got, "dunlin-error"), Some("PU02"), "{answer}");
        } else {
            assert!(!got.ends_with("0\r\n\r\n"), "{got}");
            assert_eq!(edge.log.lines(1).await[0]["complete"], false);
        }
        edge.admitted(0).await;
    }
}

/// The rest of a request that a machine did not take would be the beginning of the next one.
#[tokio::test]
async fn a_connection_with_half_a_request_on_it_is_not_used_again() {
    let address = serves(|mut stream| async move {
        // Answers before the body, and reads no more.
        let _ = read_head(&mut stream, Vec::new()).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx").await;
        std::future::pending::<()>().await;
    })
    .await;
    let edge = Edge::start(&[machine(address)]);
    for _ in 0..3 {
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        let head = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 100000000\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&[b'x'; 1000]).await.unwrap();
        let answer = tokio::time::timeout(DEADLINE, read_answer(&mut client)).await.unwrap();
        assert_eq!((answer.status, &*answer.body), (200, "x"));
    }
    let mut text = String::new();
    edge.proxy.metrics().render(&mut text);
    assert!(text.contains("dunlin_proxy_upstream_connects_total 3\n"), "{text}");
}

#[tokio::test]
async fn what_a_machine_says_too_much_is_nobodys_answer() {
    let address = says("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison").await;
    let edge = Edge::start(&[machine(address)]);
    for _ in 0..4 {
        assert_eq!(get(edge.http, "/").await.body, "a");
    }
}

#[tokio::test]
async fn what_a_machine_writes_reaches_the_client_at_once() {
    let address = serves(|mut stream| async move {
        let _ = read_head(&mut stream, Vec::new()).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n").await.unwrap();
        let (mut read, mut write) = stream.into_split();
        // Says one thing at a time, each after the test has seen the one before.
        let mut byte = [0];
        let _ = read.read(&mut byte).await;
        let _ = write.write_all(b"never").await;
    })
    .await;
    let edge = Edge::start(&[machine(address)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    let head = tokio::time::timeout(DEADLINE, read_head(&mut client, Vec::new())).await.unwrap().unwrap().0;
    assert_eq!(header(&head, "content-type"), Some("text/event-stream"));
    // The machine is silent: the client's leaving is noticed all the same.
    edge.admitted(1).await;
    drop(client);
    edge.admitted(0).await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let address = serves(|mut stream| async move {
        let _ = read_head(&mut stream, Vec::new()).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        while stream.write_all(&[b'x'; 64 * 1024]).await.is_ok() {}
    })
    .await;
    let limits = Limits { write_stall_timeout: Duration::from_millis(300), ..Limits::default() };
    let edge = Edge::with(&[machine(address)], limits, vec![]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    edge.admitted(1).await;
    edge.admitted(0).await;
    let metrics = edge.proxy.metrics();
    eventually("its place is free", || metrics.open_connections() == 0).await;
}
