//! What happens when the process runs out of descriptors. In a process of its own, for it takes all of them.

#[allow(dead_code, reason = "another test uses the rest")]
#[path = "edge/setup.rs"]
mod setup;

use rustix::process::{Resource, getrlimit, setrlimit};
use setup::*;
use std::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn an_edge_without_descriptors_blames_no_machine() {
    let (address, heads) = upstream(Does::Echo).await;
    let edge = Edge::start(&[machine(address), machine(address)]);
    let mut client = TcpStream::connect(edge.http).await.unwrap();
    let metrics = edge.proxy.metrics();
    eventually("the client is served", || metrics.open_connections() == 1).await;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(256);
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut all = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        all.push(file);
    }
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let answer = read_answer(&mut client).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PI05")), "{}", answer.body);
    assert_eq!(edge.log.lines(1).await[0]["attempts"], 1, "no other machine is better off");
    drop(all);
    client.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut client).await.status, 200);
    assert_eq!(heads.load(std::sync::atomic::Ordering::SeqCst), 1);
}
