//! TLS: names, protocols, and certificates exchanged under living connections.

use crate::setup::*;
use bytes::Bytes;
use dunlin_proxy::{CertSource, CertStore, Limits};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub async fn connect(address: SocketAddr, name: &str, root: &CertSource, alpn: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.chain_pem.as_bytes()).unwrap()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await
}

#[tokio::test]
async fn certificates_are_chosen_by_name_and_exchanged_at_once() {
    let (address, _) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address)]);
    let (first, wild, second) = (certificate(&["example.test"]), certificate(&["*.example.test"]), certificate(&["*.example.test"]));
    assert!(connect(edge.https, HOST, &wild, b"http/1.1").await.is_err(), "there is no certificate yet");
    edge.certs.store(Arc::new(CertStore::build(&[first.clone(), wild.clone()]).unwrap()));
    let tls = connect(edge.https, HOST, &wild, b"http/1.1").await.unwrap();
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    connect(edge.https, "example.test", &first, b"http/1.1").await.unwrap();
    let (mut sender, conn) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.unwrap();
    tokio::spawn(conn);
    let mut ask = async || {
        let request = http::Request::get("/").header("host", HOST).body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    };
    let seen = ask().await;
    assert_eq!(header(&seen, "x-forwarded-proto"), Some("https"));
    assert_eq!(header(&seen, "x-forwarded-ssl"), Some("on"));
    edge.certs.store(Arc::new(CertStore::build(&[first, second.clone()]).unwrap()));
    assert!(ask().await.starts_with("GET / "), "the living connection goes on");
    assert!(connect(edge.https, HOST, &wild, b"http/1.1").await.is_err());
    connect(edge.https, HOST, &second, b"http/1.1").await.unwrap();
}

/// An edge that serves its certificate, and that certificate.
pub fn with_certificate(machines: &[Machine], limits: Limits) -> (Edge, CertSource) {
    let edge = Edge::with(machines, limits, vec![]);
    let certificate = certificate(&["*.example.test"]);
    edge.certs.store(Arc::new(CertStore::build(std::slice::from_ref(&certificate)).unwrap()));
    (edge, certificate)
}

#[tokio::test]
async fn whoever_agrees_on_http2_and_stays_silent_is_ended() {
    let short = Duration::from_millis(200);
    let limits = Limits { idle_timeout: short, header_timeout: short, ..Limits::default() };
    let (edge, certificate) = with_certificate(&[], limits);
    let metrics = edge.proxy.metrics();
    let mut silent = connect(edge.https, HOST, &certificate, b"h2").await.unwrap();
    let mut deaf = connect(edge.https, HOST, &certificate, b"h2").await.unwrap();
    // Preface and an empty SETTINGS frame; the edge's frames and its goodbye stay unanswered.
    deaf.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    eventually("their places are free", || metrics.open_connections() == 0).await;
    for client in [&mut silent, &mut deaf] {
        let ended = tokio::time::timeout(DEADLINE, client.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "the connection was closed");
    }
}

#[tokio::test]
async fn a_head_over_http2_gets_no_body_whoever_answers() {
    let (edge, certificate) = with_certificate(&[], Limits::default());
    let tls = connect(edge.https, HOST, &certificate, b"h2").await.unwrap();
    let (mut sender, conn) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await.unwrap();
    tokio::spawn(conn);
    let request = http::Request::head("https://none.example.test/").body(Empty::<Bytes>::new()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 404);
    let length: usize = answer.headers()["content-length"].to_str().unwrap().parse().unwrap();
    assert!(length > 0, "as long as GET would be");
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "");
}

#[tokio::test]
async fn http2_streams_share_a_connection_and_reach_the_machine_as_http1() {
    let (address, _) = upstream(Does::Echo).await;
    let (edge, certificate) = with_certificate(&[machine(address)], Limits::default());
    let tls = connect(edge.https, HOST, &certificate, b"h2").await.unwrap();
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (sender, conn) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await.unwrap();
    tokio::spawn(conn);
    let mut running = Vec::new();
    for n in 0..32 {
        let mut sender = sender.clone();
        running.push(tokio::spawn(async move {
            let request = http::Request::post(format!("https://{HOST}/{n}"))
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .body(Full::new(Bytes::from(vec![b'x'; 100_000])))
                .unwrap();
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(answer.status(), 200);
            String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
        }));
    }
    for (n, task) in running.into_iter().enumerate() {
        let seen = tokio::time::timeout(DEADLINE, task).await.unwrap().unwrap();
        assert!(seen.starts_with(&format!("POST /{n} HTTP/1.1\r\n")), "{}", &seen[..200]);
        let head = &seen[..seen.len() - 100_000];
        assert_eq!(header(head, "host"), Some(HOST));
        assert_eq!(header(head, "cookie"), Some("a=1; b=2"));
        assert_eq!(header(head, "content-length"), Some("100000"));
        assert_eq!(header(head, "via"), Some("2 dunlin"));
    }
    edge.admitted(0).await;
}
