//! When a request is sent again, and when not.

use crate::setup::*;
use dunlin_api::AdmitRefusal;
use std::sync::atomic::Ordering::SeqCst;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const POST: &str = "POST / HTTP/1.1\r\nhost: web.example.test\r\ncontent-length: 4\r\n\r\nbody";

#[tokio::test]
async fn whoever_cannot_be_reached_is_passed_over() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(nowhere()), machine(address), machine(nowhere())]);
    for _ in 0..8 {
        let answer = raw(edge.http, POST).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with("body"));
    }
    assert_eq!(heads.load(SeqCst), 8);
    edge.admitted(0).await;
}

#[tokio::test]
async fn a_machine_that_its_host_refuses_gets_nothing() {
    let (refused, refused_heads) = upstream(Does::Echo).await;
    let (other, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(refused), machine(other)]);
    for refusal in [
        AdmitRefusal::NotHere,
        AdmitRefusal::OtherVersion,
        AdmitRefusal::NotRunning,
        AdmitRefusal::Draining,
        AdmitRefusal::Cordoned,
        AdmitRefusal::AtLimit,
    ] {
        edge.host.refusals.lock().unwrap().insert(id(0), refusal);
        for _ in 0..4 {
            assert_eq!(raw(edge.http, POST).await.status, 200);
        }
    }
    assert_eq!((refused_heads.load(SeqCst), heads.load(SeqCst)), (0, 24));
}

#[tokio::test]
async fn a_get_without_an_answer_is_sent_once_more_and_a_post_is_not() {
    let (dying, dying_heads) = upstream(Does::Die).await;
    let edge = Edge::start(&[machine(dying), machine(dying)]);
    let answer = get(edge.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU02")));
    assert_eq!(dying_heads.load(SeqCst), 2, "once more, and never again");
    let answer = raw(edge.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU02")));
    assert_eq!(dying_heads.load(SeqCst), 3, "the POST was sent once");

    let (living, _) = upstream(Does::Echo).await;
    edge.set(&[machine(dying), machine(living)]);
    assert_eq!(get(edge.http, "/").await.status, 200);
}

#[tokio::test]
async fn a_kept_connection_that_breaks_fails_a_post_and_not_a_get() {
    for (second, status) in [("GET / HTTP/1.1\r\nhost: web.example.test\r\n\r\n", 200), (POST, 502)] {
        let (address, heads) = upstream(Does::DieAtSecond).await;
        let edge = Edge::start(&[machine(address)]);
        let mut client = TcpStream::connect(edge.http).await.unwrap();
        for (request, expected) in [(POST, 200), (second, status)] {
            client.write_all(request.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client).await.status, expected);
        }
        assert_eq!(heads.load(SeqCst), if status == 200 { 3 } else { 2 });
    }
}

#[tokio::test]
async fn nobody_listening_says_on_which_port() {
    let address = nowhere();
    let edge = Edge::start(&[machine(address)]);
    let answer = get(edge.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU01")));
    assert!(answer.body.contains(&format!("0.0.0.0:{}", address.port())), "{}", answer.body);
}
