//! A host that joins is dialed back: who is reached, who is not, and who is taken for another.

use crate::world::{Host, World, free_addr, until};
use dunlin_cluster::{Answering, DialedBack, MemberKeys, NotReached, Service, join, read_frame, write_frame};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;

/// Of a dial, with room for a slow computer: nobody waits for longer than this.
const BOUND: Duration = Duration::from_secs(10);

/// Both of one port.
fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()) {
            return (udp, tcp);
        }
    }
}

async fn member(world: &World) -> Host {
    world.start(world.member("h1", &[]), free_addr()).await
}

async fn dialed(host: &Host, addr: SocketAddr, keys: &MemberKeys) -> DialedBack {
    let began = Instant::now();
    let dialed = host.cluster.dial_back(addr, &keys.public().unwrap()).await;
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    dialed
}

fn silent() -> Result<(), NotReached> {
    Err(NotReached::Unanswered("no answer within 4 s".into()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_is_reached_while_it_joins_and_only_then() {
    let world = World::new();
    let host = member(&world).await;
    let at = host.cluster.advertised();
    let keys = MemberKeys::generate().unwrap();
    let (udp, tcp) = sockets();
    let addr = udp.local_addr().unwrap();
    let (dialing, public) = (host.cluster.clone(), keys.public().unwrap());
    host.cluster.serve(
        Service::Join,
        Arc::new(move |_, mut stream| {
            let (dialing, public) = (dialing.clone(), public.clone());
            Box::pin(async move {
                let asked = String::from_utf8(read_frame(&mut stream, 100).await.unwrap()).unwrap();
                let dialed = dialing.dial_back(asked.parse().unwrap(), &public).await;
                write_frame(&mut stream, format!("{dialed:?}").as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            })
        }),
    );
    // Whoever comes by, says nothing and does not go keeps nobody from being reached.
    let loiterers: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(addr).unwrap()).collect();
    let answering = Answering::start(&keys, (udp, tcp)).unwrap();
    let asked = addr.to_string();
    let answer = answering.during(join(at, world.authority.ca_sha256().unwrap(), asked.as_bytes())).await.unwrap();
    let reached = DialedBack { udp: Ok(()), tcp: Ok(()) };
    assert_eq!(String::from_utf8(answer).unwrap(), format!("{reached:?}"));
    drop(loiterers);
    // The ports are free for its server.
    until("UDP is free", || UdpSocket::bind(addr).is_ok()).await;
    drop(TcpListener::bind(addr).unwrap());
    let after = dialed(&host, addr, &keys).await;
    assert_eq!(after, DialedBack { udp: silent(), tcp: Err(NotReached::Unanswered("connection refused".into())) });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_answers_is_the_host_with_the_key_or_another() {
    let world = World::new();
    let host = member(&world).await;
    let (keys, others) = (MemberKeys::generate().unwrap(), MemberKeys::generate().unwrap());
    let another = DialedBack { udp: Err(NotReached::ByAnother), tcp: Err(NotReached::ByAnother) };
    let (udp, tcp) = sockets();
    let addr = udp.local_addr().unwrap();
    let answering = Answering::start(&others, (udp, tcp)).unwrap();
    let (wrong, right) = answering.during(async { (dialed(&host, addr, &keys).await, dialed(&host, addr, &others).await) }).await;
    assert_eq!(wrong, another);
    assert_eq!(right, DialedBack { udp: Ok(()), tcp: Ok(()) });

    // A member's server, at both.
    let (udp, tcp) = sockets();
    let addr = udp.local_addr().unwrap();
    drop(udp);
    let member = world.start(world.member("h2", &[]), addr).await;
    let tls = tokio_rustls::TlsAcceptor::from(member.cluster.tls_server());
    tcp.set_nonblocking(true).unwrap();
    let tcp = tokio::net::TcpListener::from_std(tcp).unwrap();
    let serve = async {
        loop {
            let (stream, _) = tcp.accept().await.unwrap();
            assert!(tls.accept(stream).await.is_err());
        }
    };
    let found = tokio::select! {
        found = dialed(&host, addr, &keys) => found,
        () = serve => unreachable!(),
    };
    assert_eq!(found, another);
    // And this host itself.
    assert_eq!(dialed(&host, host.cluster.advertised(), &keys).await.udp, Err(NotReached::ByAnother));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_protocol_is_judged_by_itself_and_in_time() {
    let world = World::new();
    let host = member(&world).await;
    let keys = MemberKeys::generate().unwrap();
    // UDP goes to a socket that nobody reads.
    let (udp, tcp) = sockets();
    let (addr, elsewhere) = (udp.local_addr().unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let answering = Answering::start(&keys, (elsewhere, tcp)).unwrap();
    assert_eq!(answering.during(dialed(&host, addr, &keys)).await, DialedBack { udp: silent(), tcp: Ok(()) });
    drop(udp);
    // TCP is taken by the kernel, and nobody says a word.
    let (udp, tcp) = sockets();
    let (addr, elsewhere) = (udp.local_addr().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let answering = Answering::start(&keys, (udp, elsewhere)).unwrap();
    assert_eq!(answering.during(dialed(&host, addr, &keys)).await, DialedBack { udp: Ok(()), tcp: silent() });
    drop(tcp);
    // No way leads there from a socket of the other family.
    let v6 = dialed(&host, "[::1]:9".parse().unwrap(), &keys).await;
    assert!(matches!(&v6.udp, Err(NotReached::Unanswered(why)) if why.contains("[::1]:9")), "{v6:?}");
    let mut broken = keys.public().unwrap();
    broken.tls = "no base64!".into();
    let none = host.cluster.dial_back(addr, &broken).await;
    assert!(none.udp == none.tcp && none.udp.unwrap_err().to_string().contains("not base64"));
}
