//! HTTP/2: streams that stall, early answers, trailers, WebSockets.

use crate::setup::*;
use crate::tls::{connect, with_certificate};
use bytes::Bytes;
use dunlin_proxy::Limits;
use h2::client::{Builder, SendRequest};
use http::{Method, Request};
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt;

async fn client(edge: &Edge, certificate: &dunlin_proxy::CertSource, builder: &Builder) -> SendRequest<Bytes> {
    let tls = connect(edge.https, HOST, certificate, b"h2").await.unwrap();
    let (sender, connection) = builder.handshake(tls).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("https://{HOST}{path}")).body(()).unwrap()
}

async fn text(body: &mut h2::RecvStream) -> String {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    String::from_utf8(all).unwrap()
}

/// It answered pings and took nothing: machine, ticket and admission were its for ever.
#[tokio::test]
async fn a_stream_that_takes_nothing_is_given_up_and_its_connection_lives() {
    let address = says("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
    let limits = Limits { write_stall_timeout: Duration::from_millis(300), ..Limits::default() };
    let (edge, certificate) = with_certificate(&[machine(address)], limits);
    let mut builder = Builder::new();
    let mut sender = client(&edge, &certificate, builder.initial_window_size(0)).await;
    let (answer, _) = sender.send_request(get("/"), true).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), 200);
    edge.admitted(1).await;
    edge.admitted(0).await;
    let mut body = answer.into_body();
    assert!(body.data().await.is_some_and(|data| data.is_err()), "the stream was reset");
    let (head, _) = sender.send_request(Request::head(format!("https://{HOST}/")).body(()).unwrap(), true).unwrap();
    assert_eq!(head.await.unwrap().status(), 200, "another stream is served");
    assert_eq!(edge.log.lines(1).await[0]["complete"], false);
}

#[tokio::test]
async fn an_early_answer_to_an_upload_arrives() {
    let (edge, certificate) = with_certificate(&[], Limits::default());
    let mut sender = client(&edge, &certificate, &Builder::new()).await;
    let request = Request::post("https://none.example.test/").body(()).unwrap();
    let (answer, mut upload) = sender.send_request(request, false).unwrap();
    upload.send_data(Bytes::from(vec![b'x'; 8 * 1024 * 1024]), true).unwrap();
    let answer = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap();
    assert_eq!(answer.status(), 404);
    assert!(text(&mut answer.into_body()).await.contains("no app is served as"));
}

#[tokio::test]
async fn trailers_go_both_ways() {
    let seen = Arc::new(Mutex::new(String::new()));
    let at_machine = seen.clone();
    let address = serves(move |mut stream| {
        let seen = at_machine.clone();
        async move {
            let (head, mut got) = read_head(&mut stream, Vec::new()).await.unwrap();
            while !got.ends_with(b"x-sum: 5\r\n\r\n") {
                assert!(tokio::io::AsyncReadExt::read_buf(&mut stream, &mut got).await.unwrap() > 0);
            }
            *seen.lock().unwrap() = head + &String::from_utf8(got).unwrap();
            let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\ngrpc-status: 0\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await;
    let (edge, certificate) = with_certificate(&[machine(address)], Limits::default());
    let mut sender = client(&edge, &certificate, &Builder::new()).await;
    let request = Request::post(format!("https://{HOST}/")).header("te", "trailers").body(()).unwrap();
    let (answer, mut upload) = sender.send_request(request, false).unwrap();
    upload.send_data(Bytes::from_static(b"hello"), false).unwrap();
    upload.send_trailers([("x-sum".parse().unwrap(), "5".parse().unwrap())].into_iter().collect()).unwrap();
    let mut body = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap().into_body();
    assert_eq!(text(&mut body).await, "abc");
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    let seen = seen.lock().unwrap();
    assert!(seen.contains("te: trailers\r\n") && seen.ends_with("\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 5\r\n\r\n"), "{seen}");
}

/// RFC 8441: the opening is translated, then bytes go both ways on one stream of many.
#[tokio::test]
async fn a_websocket_is_a_stream() {
    let seen = Arc::new(Mutex::new(String::new()));
    let at_machine = seen.clone();
    let address = serves(move |mut stream| {
        let seen = at_machine.clone();
        async move {
            *seen.lock().unwrap() = read_head(&mut stream, Vec::new()).await.unwrap().0;
            let reply = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                         sec-websocket-accept: x\r\nsec-websocket-protocol: chat\r\n\r\n";
            stream.write_all(reply.as_bytes()).await.unwrap();
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    })
    .await;
    let (edge, certificate) = with_certificate(&[machine(address)], Limits::default());
    let mut sender = client(&edge, &certificate, &Builder::new()).await;
    let allowed = async { while !sender.is_extended_connect_protocol_enabled() { tokio::task::yield_now().await } };
    tokio::time::timeout(DEADLINE, allowed).await.expect("the edge offers it");
    let mut request = Request::builder().method(Method::CONNECT).uri(format!("https://{HOST}/chat")).body(()).unwrap();
    request.headers_mut().insert("sec-websocket-version", "13".parse().unwrap());
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (answer, mut up) = sender.send_request(request, false).unwrap();
    let answer = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers().get("sec-websocket-accept")), (200, None));
    assert_eq!(answer.headers()["sec-websocket-protocol"], "chat");
    let mut down = answer.into_body();
    for word in ["first", "second"] {
        up.send_data(Bytes::from_static(word.as_bytes()), false).unwrap();
        let back = tokio::time::timeout(DEADLINE, down.data()).await.unwrap().unwrap().unwrap();
        assert_eq!(back, word);
    }
    edge.admitted(1).await;
    up.send_data(Bytes::new(), true).unwrap();
    assert_eq!(tokio::time::timeout(DEADLINE, text(&mut down)).await.expect("both sides end"), "");
    edge.admitted(0).await;
    let seen = seen.lock().unwrap();
    assert!(seen.starts_with("GET /chat HTTP/1.1\r\n"), "{seen}");
    for (name, value) in [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")] {
        assert_eq!(header(&seen, name), Some(value), "{name} in {seen}");
    }
    assert_eq!(header(&seen, "sec-websocket-key").map(str::len), Some(24));
    assert_eq!(header(&seen, "transfer-encoding"), None);
}

#[tokio::test]
async fn a_stream_that_is_reset_frees_its_place_on_the_machine() {
    let (address, _) = upstream(Does::Hang).await;
    let (edge, certificate) = with_certificate(&[Machine { hard: Some(1), ..machine(address) }], Limits::default());
    let mut sender = client(&edge, &certificate, &Builder::new()).await;
    for _ in 0..3 {
        let (answer, mut upload) = sender.send_request(get("/"), false).unwrap();
        edge.admitted(1).await;
        upload.send_reset(h2::Reason::CANCEL);
        edge.admitted(0).await;
        drop(answer);
    }
    let alive = poll_fn(|cx| sender.poll_ready(cx)).await;
    assert!(alive.is_ok(), "the connection lives");
}
