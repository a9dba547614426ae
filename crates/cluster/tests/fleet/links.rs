//! Who gets in, who does not, and what a stream carries.

use crate::world::{World, all_see_each_other, config, free_addr, id, machine, machine_id, now_ms, until};
use dunlin_cluster::{Authority, Cluster, JoinError, Service, join, read_frame, write_frame};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

fn fingerprint(authority: &Authority) -> [u8; 32] {
    Sha256::digest(CertificateDer::from_pem_slice(authority.ca_pem().as_bytes()).unwrap()).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_carry_bytes_both_ways_and_end_when_they_are_dropped() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2"]).await;
    let (told, mut ended) = tokio::sync::mpsc::channel(1);
    hosts[0].cluster.serve(
        Service::Blob,
        Arc::new(move |from, mut stream| {
            let told = told.clone();
            Box::pin(async move {
                assert_eq!(from, Some(id("h2")));
                let mut buffer = [0; 4096];
                let whole = loop {
                    match stream.read(&mut buffer).await {
                        Ok(0) => break stream.shutdown().await.is_ok(),
                        Ok(count) if stream.write_all(&buffer[..count]).await.is_ok() => {}
                        _ => break false,
                    }
                };
                told.send(whole).await.unwrap();
            })
        }),
    );
    let mut stream = hosts[1].cluster.open(&id("h1"), Service::Blob).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|at| at as u8).collect();
    let expected = sent.clone();
    let (mut from, mut to) = tokio::io::split(stream);
    let send = tokio::spawn(async move {
        to.write_all(&sent).await.unwrap();
        to.shutdown().await.unwrap();
        to
    });
    let mut got = vec![];
    from.read_to_end(&mut got).await.unwrap();
    assert!(got == expected, "{} bytes", got.len());
    stream = from.unsplit(send.await.unwrap());
    assert_eq!(ended.recv().await, Some(true));
    drop(stream);

    let mut stream = hosts[1].cluster.open(&id("h1"), Service::Blob).await.unwrap();
    stream.write_all(b"half of it").await.unwrap();
    let mut back = [0; 10];
    stream.read_exact(&mut back).await.unwrap();
    drop(stream);
    assert_eq!(ended.recv().await, Some(false), "who serves it notices that it was given up");

    let mut nobody = hosts[1].cluster.open(&id("h1"), Service::Registry).await.unwrap();
    assert!(nobody.read_u8().await.is_err(), "nobody serves it");
    assert!(hosts[1].cluster.ping(&id("h1"), Duration::from_secs(20)).await.is_ok());
    assert!(hosts[1].cluster.rtt(&id("h1")).is_some());
    let error = hosts[1].cluster.open(&id("h9"), Service::Host).await.err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}

/// Packets from addresses that are not their sender's held every handshake there may be: whoever came back with proof of its
/// address found none left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_addresses_do_not_keep_a_member_out() {
    const FORGED: usize = 320;
    let world = World::new();
    let first = world.start(world.member("h1", &[]), free_addr()).await;
    let addr = first.cluster.advertised();
    // What those say first that never hear an answer: as if their addresses were not theirs.
    let (heard, forger) = (UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let deaf = heard.local_addr().unwrap();
    let mut asking = tokio::task::JoinSet::new();
    (0..FORGED).for_each(|_| drop(asking.spawn(async move { join(deaf, [0; 32], b"").await.is_ok() })));
    let mut packets = std::collections::BTreeMap::<Vec<u8>, Vec<Vec<u8>>>::new();
    let mut buffer = [0; 2048];
    while packets.len() < FORGED {
        let size = tokio::time::timeout(Duration::from_secs(60), heard.recv(&mut buffer)).await.unwrap().unwrap();
        let packet = buffer[..size].to_vec();
        let to = packet[6..6 + usize::from(packet[5])].to_vec();
        packets.entry(to).or_default().push(packet);
    }
    drop(asking);
    let flood = async {
        loop {
            for packet in packets.values().flatten() {
                forger.send_to(packet, addr).await.unwrap();
                tokio::task::yield_now().await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let enter = async {
        until("all handshakes that anybody may have are begun", || first.cluster.status().transport.refused > 0).await;
        let second = world.start(world.member("h2", &[("h1", addr)]), "127.0.0.1:0".parse().unwrap()).await;
        all_see_each_other(&[first, second]).await;
    };
    tokio::select! {
        () = flood => {}
        () = enter => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_certificate_can_join_and_nothing_else() {
    let world = World::new();
    let host = world.start(world.member("h1", &[]), free_addr()).await;
    let addr = host.cluster.advertised();
    host.cluster.serve(
        Service::Join,
        Arc::new(|from, mut stream| {
            Box::pin(async move {
                assert_eq!(from, None);
                let request = read_frame(&mut stream, 16 << 10).await.unwrap();
                write_frame(&mut stream, &[b"hello ", request.as_slice()].concat()).await.unwrap();
                stream.shutdown().await.unwrap();
            })
        }),
    );
    let served = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = served.clone();
    let handler = move |_, _| {
        seen.store(true, std::sync::atomic::Ordering::SeqCst);
        Box::pin(async {}) as futures_util::future::BoxFuture<'static, ()>
    };
    host.cluster.serve(Service::Host, Arc::new(handler));
    assert_eq!(join(addr, fingerprint(&world.authority), b"h7").await.unwrap(), b"hello h7");
    let error = join(addr, [7; 32], b"h7").await.unwrap_err();
    assert!(matches!(error, JoinError::OtherCluster { .. }), "{error:?}");
    assert!(matches!(join(addr, [7; 32], &vec![0; 20 << 10]).await, Err(JoinError::TooLong(_))));

    let stranger = stranger(&world);
    let connection = stranger.connect(addr, "h1.hosts.dunlin.internal").unwrap().await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[Service::Host as u8]).await.unwrap();
    assert!(recv.read_to_end(10).await.is_err(), "a call is not served");
    // No second stream, and no message of gossip.
    let second = async { connection.open_bi().await.is_ok() };
    let message = async { connection.open_uni().await.is_ok() };
    tokio::select! {
        opened = second => assert!(!opened),
        opened = message => assert!(!opened),
        _ = connection.closed() => {}
    }
    assert!(!served.load(std::sync::atomic::Ordering::SeqCst));
}

/// A QUIC client without a certificate that believes the authority.
fn stranger(world: &World) -> quinn::Endpoint {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(world.authority.ca_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"dunlin/1".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_authority_is_refused() {
    let (world, other) = (World::new(), World::new());
    let host = world.start(world.member("h1", &[]), free_addr()).await;
    let addr = host.cluster.advertised();
    let foreign = other.start(other.member("h2", &[("h1", addr)]), free_addr()).await;
    let error = foreign.cluster.open(&id("h1"), Service::Ping).await.err().unwrap();
    assert!(error.to_string().contains("UnknownIssuer") || error.to_string().contains("invalid peer certificate"), "{error}");
    // One that believes whoever answers is not believed itself: it trusts the first authority, and is of the other.
    let mut mixed = other.member("h3", &[("h1", addr)]);
    mixed.issued.ca_pem = world.authority.ca_pem().to_owned();
    let mixed = other.start(mixed, free_addr()).await;
    assert!(mixed.cluster.open(&id("h1"), Service::Ping).await.is_err());
    assert!(!host.cluster.is_up(&id("h2")) && !host.cluster.is_up(&id("h3")));
    assert!(host.cluster.status().transport.refused > 0);
    assert_eq!(host.cluster.status().transport.accepted, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_answers_under_another_name_is_not_spoken_to() {
    let world = World::new();
    let host = world.start(world.member("h1", &[]), free_addr()).await;
    let lied_to = world.start(world.member("h2", &[("h5", host.cluster.advertised())]), free_addr()).await;
    let error = lied_to.cluster.open(&id("h5"), Service::Host).await.err().unwrap();
    assert!(error.to_string().contains("NotValidForName") || error.to_string().contains("not valid for name"), "{error}");
    assert!(!lied_to.cluster.is_up(&id("h5")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_host_is_cut_off() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2", "h3"]).await;
    all_see_each_other(&hosts).await;
    let [h1, h2, h3] = hosts.as_slice() else { unreachable!() };
    h3.says(&[machine(3, "h3", 1)]);
    until("h3 is heard", || [h1, h2].iter().all(|host| host.sees(&machine_id(3)).is_some())).await;
    let (certificate, key) = world.authority.config_log(&"fra".parse().unwrap(), 1);
    h1.cluster.publish_config_of(certificate, key);
    let mut desired = config(1);
    desired.removed_hosts.insert(id("h3"));
    h1.view.publish_config(desired, now_ms()).unwrap();
    until("the others have it no more", || [h1, h2].iter().all(|host| !host.cluster.is_up(&id("h3")) && host.sees(&machine_id(3)).is_none())).await;
    until("nobody is connected to it", || [h1, h2].iter().all(|host| host.cluster.rtt(&id("h3")).is_none())).await;
    let refused = h3.cluster.ping(&id("h1"), Duration::from_secs(20)).await;
    assert!(refused.is_err());
    assert!(h1.cluster.open(&id("h3"), Service::Host).await.is_err());
    let status: Vec<_> = h2.cluster.members().into_iter().map(|member| member.id).collect();
    assert_eq!(status, [id("h1")]);
    // Over TCP as well.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = tls_over_tcp(&listener, &h1.cluster, &h3.cluster);
    assert!(connect.await.is_none());
}

/// The host that the server sees, if both sides take each other.
async fn tls_over_tcp(listener: &TcpListener, server: &Cluster, client: &Cluster) -> Option<dunlin_model::HostId> {
    let addr = listener.local_addr().unwrap();
    let dial = async {
        let tcp = TcpStream::connect(addr).await.unwrap();
        let name = Cluster::server_name(server.host());
        let mut tls = tokio_rustls::TlsConnector::from(client.tls_client()).connect(name, tcp).await.ok()?;
        tls.write_all(b"x").await.ok()?;
        tls.read_u8().await.ok()
    };
    let accept = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = tokio_rustls::TlsAcceptor::from(server.tls_server()).accept(tcp).await.ok()?;
        let byte = tls.read_u8().await.ok()?;
        tls.write_u8(byte).await.ok()?;
        tls.flush().await.ok()?;
        Cluster::peer_host(tls.get_ref().1.peer_certificates()?)
    };
    let (dialed, accepted) = tokio::join!(dial, accept);
    dialed.and(accepted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_hop_knows_who_dials_and_a_renewed_certificate_is_shown() {
    let world = World::new();
    let hosts = world.fleet(&["h1", "h2"]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (server, client) = (&hosts[0].cluster, &hosts[1].cluster);
    assert_eq!(tls_over_tcp(&listener, server, client).await, Some(id("h2")));
    let saved = dunlin_cluster::Member::load(&world.dir.path().join("h2")).unwrap().unwrap();
    let issued = world.authority.issue(&id("h2"), &saved.region, 1, &saved.keys.public().unwrap(), now_ms() + 1_000).unwrap();
    client.renew(issued.clone()).unwrap();
    let kept = dunlin_cluster::Member::load(&world.dir.path().join("h2")).unwrap().unwrap();
    assert_eq!(kept.issued, issued);
    assert_eq!(tls_over_tcp(&listener, server, client).await, Some(id("h2")));
    let of_another = world.member("h3", &[]).issued;
    assert!(client.renew(of_another).is_err());
}

#[test]
fn a_process_that_is_started_again_ends_what_its_predecessor_left() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let world = World::new();
    let (stays, dies, comes) = (runtime(), runtime(), runtime());
    let addr = free_addr();
    let member = world.member("h2", &[]);
    // Neither says anything by itself: h2 knows nobody, and is known only to whoever opens a stream.
    let _h2 = dies.block_on(world.start(member.clone(), addr));
    let h1 = stays.block_on(world.start(world.member("h1", &[("h2", addr)]), free_addr()));
    stays.block_on(h1.cluster.ping(&id("h2"), Duration::from_secs(20))).unwrap();
    stays.block_on(until("both are members", || h1.cluster.is_up(&id("h2"))));
    let opened = stays.block_on(h1.cluster.open(&id("h2"), Service::Ping)).unwrap();
    dies.shutdown_background(); // as a crash: nothing is closed
    std::fs::remove_file(world.dir.path().join("h2/flock.snapshot")).ok();
    drop(_h2);
    let _h2 = comes.block_on(world.start(member, addr));
    let mut opened = opened;
    let error = stays.block_on(async {
        // What is sent on it is answered with a reset, long before the connection would time out.
        loop {
            if let Err(error) = opened.write_u8(0).await {
                return error;
            }
            tokio::task::yield_now().await;
        }
    });
    assert!(format!("{error:?}").contains("Reset"), "not merely timed out: {error:?}");
    stays.block_on(until("a new connection is used", || h1.cluster.rtt(&id("h2")).is_some()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_dial_each_other_at_once_keep_one_connection() {
    let world = World::new();
    let (first, second) = (free_addr(), free_addr());
    let (h1, h2) = tokio::join!(world.start(world.member("h1", &[("h2", second)]), first), world.start(world.member("h2", &[("h1", first)]), second));
    let (to, from) = (id("h2"), id("h1"));
    let (there, back) = tokio::join!(h1.cluster.ping(&to, Duration::from_secs(20)), h2.cluster.ping(&from, Duration::from_secs(20)));
    assert!(there.is_ok() && back.is_ok(), "{there:?} {back:?}");
    until("one is left", || [&h1, &h2].iter().all(|host| host.cluster.status().transport.links == 1)).await;
    assert!(h1.cluster.ping(&id("h2"), Duration::from_secs(20)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_takes_the_address_of_another() {
    let world = World::new();
    let (first, second) = (free_addr(), free_addr());
    let _h2 = world.start(world.member("h2", &[]), second).await;
    let h1 = world.start(world.member("h1", &[("h2", second)]), first).await;
    h1.cluster.ping(&id("h2"), Duration::from_secs(20)).await.unwrap();
    let h3 = world.start_at("h3", world.member("h3", &[("h1", first)]), (free_addr(), second)).await;
    assert!(h3.cluster.open(&id("h1"), Service::Ping).await.is_err(), "it says that it is where h2 is");
    h1.cluster.ping(&id("h2"), Duration::from_secs(20)).await.unwrap();
}
