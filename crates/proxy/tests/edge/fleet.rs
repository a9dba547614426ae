//! Several hosts, each with an edge: requests come in anywhere.

mod regions;

use crate::setup::*;
use dunlin_api::AdmitRefusal;
use dunlin_cluster::{Authority, MemberKeys};
use dunlin_model::{AppName, ConcurrencyKind, HostId, MachineState, Region};
use dunlin_proxy::{CertStore, Elsewhere, Fleet, Limits, Routes};
use dunlin_view::Freshness;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_rustls::client::TlsStream;

const POST: &str = "POST / HTTP/1.1\r\nhost: web.example.test\r\ncontent-length: 4\r\n\r\nbody";

/// An authority and its members' certificates.
struct Members {
    authority: Authority,
    addresses: Arc<Mutex<HashMap<HostId, SocketAddr>>>,
    /// By certificate.
    known: Arc<Mutex<HashMap<Vec<u8>, HostId>>>,
    /// Of which apps the edges want to know more, and where.
    asked: Arc<Mutex<Vec<String>>>,
}

/// What a member shows.
#[derive(Clone)]
struct Shown {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl Members {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(dir.path(), now_ms()).unwrap();
        Self { authority, addresses: Arc::default(), known: Arc::default(), asked: Arc::default() }
    }

    fn issue(&self, host: &str) -> Shown {
        let (keys, host): (_, HostId) = (MemberKeys::generate().unwrap(), host.parse().unwrap());
        let issued = self.authority.issue(&host, &"local".parse().unwrap(), 1, &keys.public().unwrap(), now_ms()).unwrap();
        let certificate = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        self.known.lock().unwrap().insert(certificate.to_vec(), host);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(issued.ca_pem.as_bytes()).unwrap()).unwrap();
        let private = serde_json::to_value(&keys).unwrap();
        let key = PrivateKeyDer::from_pem_slice(private["tls"].as_str().unwrap().as_bytes()).unwrap();
        Shown { roots: Arc::new(roots), chain: vec![certificate], key: Arc::new(key) }
    }

    /// A host with an edge.
    fn edge(&self, name: &'static str, region: &str, limits: Limits) -> Edge {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        self.addresses.lock().unwrap().insert(name.parse().unwrap(), listener.local_addr().unwrap());
        let (shown, addresses, known) = (self.issue(name), self.addresses.clone(), self.known.clone());
        let (server, client) = (shown.server(), shown.client());
        let fleet = Fleet {
            host: name.parse().unwrap(),
            listeners: vec![listener],
            tls_server: Box::new(move || server.clone()),
            tls_client: Box::new(move || client.clone()),
            address: Box::new(move |host| addresses.lock().unwrap().get(host).copied()),
            server_name,
            peer_host: Box::new(move |chain| known.lock().unwrap().get(&chain[0].to_vec()).cloned()),
        };
        let asked = self.asked.clone();
        let see_detail = Box::new(move |region: &Region, app: &AppName| {
            asked.lock().unwrap().push(format!("{app} in {region}"));
            true
        });
        let elsewhere = Elsewhere { host: name.parse().unwrap(), rtt: Box::new(|_| None), see_detail };
        let routes = Routes::in_fleet(region.parse().unwrap(), elsewhere);
        Edge::start_with(name, routes, limits, vec![], Some(fleet))
    }

    fn address(&self, host: &str) -> SocketAddr {
        self.addresses.lock().unwrap()[&host.parse().unwrap()]
    }
}

impl Shown {
    fn server(&self) -> Arc<ServerConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone()).build().unwrap();
        let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
        let config = config.with_client_cert_verifier(verifier).with_single_cert(self.chain.clone(), self.key.clone_key());
        Arc::new(config.unwrap())
    }

    fn client(&self) -> Arc<ClientConfig> {
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
        let config = config.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_root_certificates(self.roots.clone());
        Arc::new(config.with_client_auth_cert(self.chain.clone(), self.key.clone_key()).unwrap())
    }
}

fn server_name(host: &HostId) -> ServerName<'static> {
    ServerName::try_from(format!("{host}.hosts.dunlin.internal")).unwrap()
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Two hosts in one region, which know these machines.
fn two(machines: &[Machine]) -> (Members, Edge, Edge) {
    let members = Members::new();
    let (one, other) = (members.edge("h1", "local", Limits::default()), members.edge("h2", "local", Limits::default()));
    one.set(machines);
    other.set(machines);
    (members, one, other)
}

fn on_h2(address: SocketAddr) -> Machine {
    Machine { host: "h2", ..machine(address) }
}

fn metric(edge: &Edge, name: &str) -> u64 {
    let mut text = String::new();
    edge.proxy.metrics().render(&mut text);
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("dunlin_proxy_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[tokio::test]
async fn any_edge_reaches_the_machine_and_the_head_is_the_same() {
    let (address, heads) = upstream(Does::Echo).await;
    let (_members, one, other) = two(&[on_h2(address)]);
    let request = "GET /a?b=c HTTP/1.1\r\nhost: WEB.example.test\r\nx-forwarded-for: 6.6.6.6\r\nvia: 1.1 theirs\r\n\
        cookie: a=1\r\nfly-region: mars\r\ndunlin-hop: v1 x y 0.0 80 0 go\r\nDunlin_Hop: 1\r\ndunlin-hop-refused: not-here\r\n\r\n";
    let through = raw(one.http, request).await;
    assert_eq!(through.status, 200, "{}", through.body);
    let direct = raw(other.http, request).await;
    assert_eq!((direct.status, heads.load(SeqCst)), (200, 2));
    // But for the id and the port, it makes no difference where the request comes in.
    let plain = |answer: &Answer, text: &str, edge: &Edge| {
        let id = header(&answer.head, "fly-request-id").unwrap();
        let text = text.replace(id, "ID").replace(&format!("forwarded-port: {}", edge.http.port()), "forwarded-port: PORT");
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(plain(&through, &through.body, &one), plain(&direct, &direct.body, &other));
    assert!(!through.body.to_lowercase().contains("dunlin-hop") && !through.body.to_lowercase().contains("dunlin_hop"), "{}", through.body);
    assert_eq!(header(&through.body, "x-forwarded-for"), Some("127.0.0.1"));
    let head_names = |answer: &Answer| {
        let names = answer.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        names.map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(head_names(&through), head_names(&direct));
    assert_eq!(header(&through.head, "via"), Some("1.1 dunlin"));
    one.admitted(0).await;
    other.admitted(0).await;
    assert_eq!((metric(&one, "hop_sent_total"), metric(&other, "hop_served_total")), (1, 1));
    assert_eq!(one.log.lines(1).await[0]["machine"], id(0).as_str());
    assert_eq!(other.log.lines(1).await.len(), 1, "logged where it came in");
}

/// Clients of an edge at its limit must not close the way to the machines beside it.
#[tokio::test]
async fn a_full_edge_is_a_last_hop_still() {
    let (address, _) = upstream(Does::Echo).await;
    let members = Members::new();
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let (one, other) = (members.edge("h1", "local", Limits::default()), members.edge("h2", "local", limits));
    one.set(&[on_h2(address)]);
    other.set(&[on_h2(address)]);
    let _client = TcpStream::connect(other.http).await.unwrap();
    eventually("it is full", || other.proxy.metrics().open_connections() == 1).await;
    assert_eq!(get(other.http, "/").await.status, 503);
    let answer = get(one.http, "/").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[tokio::test]
async fn connections_to_a_host_carry_requests_for_all_its_machines() {
    let (first, first_heads) = upstream(Does::Echo).await;
    let (second, second_heads) = upstream(Does::Echo).await;
    let (_members, one, other) = two(&[on_h2(first), on_h2(second)]);
    let mut client = TcpStream::connect(one.http).await.unwrap();
    for n in 0..20 {
        let body = "x".repeat(n);
        let wanted = id(n % 2);
        let request = format!("POST /{n} HTTP/1.1\r\nhost: {HOST}\r\nfly-force-instance-id: {wanted}\r\ncontent-length: {n}\r\n\r\n{body}");
        client.write_all(request.as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(DEADLINE, read_answer(&mut client)).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with(&format!("\r\n\r\n{body}")), "{}", answer.body);
    }
    assert_eq!((first_heads.load(SeqCst), second_heads.load(SeqCst)), (10, 10));
    assert_eq!(metric(&one, "upstream_connects_total"), 1, "one connection to the host");
    assert_eq!(metric(&other, "connections_total"), 1);
    other.admitted(0).await;
}

#[tokio::test]
async fn a_refusal_is_answered_before_the_body_and_another_machine_gets_it_once() {
    let (refused, refused_heads) = upstream(Does::Echo).await;
    let (taking, heads) = upstream(Does::Echo).await;
    let (_members, one, other) = two(&[on_h2(refused), on_h2(taking)]);
    let mut expected = 0;
    for refusal in [
        AdmitRefusal::NotHere,
        AdmitRefusal::OtherVersion,
        AdmitRefusal::NotRunning,
        AdmitRefusal::Draining,
        AdmitRefusal::Cordoned,
        AdmitRefusal::AtLimit,
        AdmitRefusal::DidNotWake("no".into()),
        AdmitRefusal::InsufficientCapacity("no".into()),
    ] {
        other.host.refusals.lock().unwrap().insert(id(0), refusal);
        for _ in 0..4 {
            let answer = raw(one.http, POST).await;
            assert_eq!(answer.status, 200, "{}", answer.body);
            assert!(answer.body.ends_with("\r\n\r\nbody"), "{}", answer.body);
            expected += 1;
        }
    }
    assert_eq!((refused_heads.load(SeqCst), heads.load(SeqCst)), (0, expected));
    assert!(metric(&one, "upstream_connects_total") <= 2, "a refusal costs no connection: at most one a core");
    assert!(metric(&other, "hop_denied_total") > 0, "it was asked");
    other.admitted(0).await;

    // With nobody else to take it the client is told what a local refusal says.
    one.set(&[on_h2(refused)]);
    other.host.refusals.lock().unwrap().insert(id(0), AdmitRefusal::InsufficientCapacity("its memory is full".into()));
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PM02")), "{}", answer.body);
    assert!(answer.body.contains("its memory is full"), "{}", answer.body);
    assert_eq!(header(&answer.head, "dunlin-hop-refused"), None);
}

#[tokio::test]
async fn a_machine_that_takes_no_connection_is_passed_over_with_the_body_whole() {
    let (taking, heads) = upstream(Does::Echo).await;
    let (_members, one, _other) = two(&[on_h2(nowhere()), on_h2(taking), on_h2(nowhere())]);
    for _ in 0..8 {
        let answer = raw(one.http, POST).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with("\r\n\r\nbody"));
    }
    assert_eq!(heads.load(SeqCst), 8);
    one.set(&[on_h2(nowhere())]);
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU01")), "{}", answer.body);
}

#[tokio::test]
async fn what_breaks_behind_the_last_hop_is_told_and_repeated_as_at_home() {
    let (dying, dying_heads) = upstream(Does::Die).await;
    let (_members, one, other) = two(&[on_h2(dying), on_h2(dying)]);
    let answer = get(one.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU02")), "{}", answer.body);
    assert_eq!(dying_heads.load(SeqCst), 2, "once more, and never again");
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU02")), "{}", answer.body);
    assert_eq!(dying_heads.load(SeqCst), 3, "the POST was sent once");
    other.admitted(0).await;
}

#[tokio::test]
async fn a_machines_own_answer_is_never_taken_for_a_refusal() {
    let liar = says("HTTP/1.1 421 Misdirected Request\r\ndunlin-hop-refused: not-here\r\ndunlin-hop-failed: broken\r\ncontent-length: 4\r\n\r\nmine").await;
    let (_members, one, _other) = two(&[on_h2(liar)]);
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, answer.body.as_str()), (421, "mine"));
    assert_eq!(header(&answer.head, "dunlin-hop-refused"), None);
}

#[tokio::test]
async fn a_sleeping_machine_on_another_host_is_woken_once_for_many() {
    let (address, heads) = upstream(Does::Echo).await;
    let asleep = Machine { state: MachineState::Stopped, ..on_h2(address) };
    let (_members, one, other) = two(&[asleep]);
    other.host.refusals.lock().unwrap().insert(id(0), AdmitRefusal::Asleep);
    other.host.wake_ms.store(100, SeqCst);
    let waiting: Vec<_> = (0..8).map(|_| tokio::spawn(raw(one.http, POST))).collect();
    for answer in waiting {
        let answer = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.body.ends_with("\r\n\r\nbody"));
    }
    assert_eq!((heads.load(SeqCst), other.host.starts.load(SeqCst)), (8, 1));
    assert_eq!(one.host.wakes.load(SeqCst), 0, "its own host has nothing to do with it");
    // The table says that it runs, its host knows better.
    one.set(&[on_h2(address)]);
    other.host.refusals.lock().unwrap().insert(id(0), AdmitRefusal::Asleep);
    assert_eq!(raw(one.http, POST).await.status, 200);
    assert_eq!(other.host.starts.load(SeqCst), 2);
    // One that does not wake says why.
    other.host.refusals.lock().unwrap().insert(id(0), AdmitRefusal::DidNotWake("its image is gone".into()));
    one.set(&[Machine { state: MachineState::Stopped, ..on_h2(address) }]);
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PM01")), "{}", answer.body);
    assert!(answer.body.contains("its image is gone"), "{}", answer.body);
}

#[tokio::test]
async fn above_the_soft_limit_one_more_is_woken_on_its_host() {
    let (address, _) = upstream(Does::Echo).await;
    let asleep = Machine { state: MachineState::Stopped, ..on_h2(address) };
    let (_members, one, other) = two(&[Machine { soft: 0, ..machine(address) }, asleep]);
    assert_eq!(get(one.http, "/").await.status, 200);
    eventually("it is woken", || other.host.wakes.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn an_upgraded_connection_goes_through_until_one_side_ends_it() {
    let (address, _) = upstream(Does::Upgrade).await;
    let (_members, one, other) = two(&[on_h2(address)]);
    let mut client = TcpStream::connect(one.http).await.unwrap();
    let request = format!("GET /ws HTTP/1.1\r\nhost: {HOST}\r\nconnection: keep-alive, Upgrade\r\nupgrade: echo\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let answer = read_answer(&mut client).await;
    assert_eq!((answer.status, header(&answer.head, "upgrade")), (101, Some("echo")));
    for text in ["first", "second"] {
        client.write_all(text.as_bytes()).await.unwrap();
        let mut back = vec![0; text.len()];
        tokio::time::timeout(DEADLINE, client.read_exact(&mut back)).await.unwrap().unwrap();
        assert_eq!(back, text.as_bytes());
    }
    other.admitted(1).await;
    client.shutdown().await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(DEADLINE, client.read_to_end(&mut rest)).await.expect("the other side ends too").unwrap();
    other.admitted(0).await;
}

#[tokio::test]
async fn big_bodies_stream_both_ways() {
    let (address, _) = upstream(Does::Echo).await;
    let (_members, one, _other) = two(&[on_h2(address)]);
    let body = "0123456789abcdef".repeat(512 * 1024);
    let request = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let answer = raw(one.http, &request).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.ends_with(&body), "8 MiB came back as they went");
}

/// What comes in chunks of unknown number arrives piece by piece, not when all is there.
#[tokio::test]
async fn chunks_pass_as_they_come() {
    let address = serves(|mut stream| async move {
        let Some((_, mut got)) = read_head(&mut stream, Vec::new()).await else { return };
        stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut buffer = [0; 1024];
        loop {
            if !got.is_empty() {
                let chunk = [format!("{:x}\r\n", got.len()).as_bytes(), &got, b"\r\n"].concat();
                stream.write_all(&chunk).await.unwrap();
            }
            match stream.read(&mut buffer).await {
                Ok(n) if n > 0 => got = buffer[..n].to_vec(),
                _ => return,
            }
        }
    })
    .await;
    let (_members, one, _other) = two(&[on_h2(address)]);
    let mut client = TcpStream::connect(one.http).await.unwrap();
    let mut seen = String::new();
    client.write_all(format!("POST / HTTP/1.1\r\nhost: {HOST}\r\ntransfer-encoding: chunked\r\n\r\n").as_bytes()).await.unwrap();
    for piece in ["ping-one", "ping-two", "ping-three"] {
        client.write_all(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes()).await.unwrap();
        let until = async {
            while !seen.contains(piece) {
                let mut buffer = [0; 1024];
                let n = client.read(&mut buffer).await.unwrap();
                assert!(n > 0, "cut after {seen}");
                seen += std::str::from_utf8(&buffer[..n]).unwrap();
            }
        };
        tokio::time::timeout(DEADLINE, until).await.unwrap_or_else(|_| panic!("{piece} did not come back"));
    }
}

async fn dial(address: SocketAddr, config: Arc<ClientConfig>, host: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(server_name(&host.parse().unwrap()), stream).await
}

/// What comes back for a request; empty when the connection ends without a word.
async fn told(connected: std::io::Result<TlsStream<TcpStream>>) -> String {
    let Ok(mut tls) = connected else { return String::new() };
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n");
    let _ = tls.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, tls.read_to_end(&mut answer)).await.expect("an end");
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn nobody_but_a_member_is_heard() {
    let (address, heads) = upstream(Does::Echo).await;
    let (members, _one, other) = two(&[on_h2(address)]);
    let at = members.address("h2");
    let (member, stranger) = (members.issue("h9"), Members::new().issue("h1"));
    let nobody = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(member.roots.clone())
        .with_no_client_auth();
    assert_eq!(told(dial(at, Arc::new(nobody), "h2").await).await, "", "without a certificate");
    let foreign = Shown { roots: member.roots.clone(), ..stranger };
    assert_eq!(told(dial(at, foreign.client(), "h2").await).await, "", "of another authority");
    let answer = told(dial(at, member.client(), "h2").await).await;
    assert!(answer.starts_with("HTTP/1.1 421 ") && answer.contains("dunlin-hop-refused"), "a member without the line: {answer}");
    members.known.lock().unwrap().retain(|_, host| host.as_str() != "h9");
    assert_eq!(told(dial(at, member.client(), "h2").await).await, "", "one that was removed");
    assert!(dial(at, member.client(), "h1").await.is_err(), "h2 cannot say that it is h1");
    assert_eq!((heads.load(SeqCst), other.host.admitted.load(SeqCst)), (0, 0));
}

/// An address that leads to another host reaches nobody.
#[tokio::test]
async fn an_edge_takes_no_other_host_for_the_one_that_it_dials() {
    let (address, heads) = upstream(Does::Echo).await;
    let (members, one, _other) = two(&[on_h2(address)]);
    let third = members.edge("h3", "local", Limits::default());
    let h3 = members.address("h3");
    members.addresses.lock().unwrap().insert("h2".parse().unwrap(), h3);
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (502, Some("PU05")), "{}", answer.body);
    assert_eq!((heads.load(SeqCst), metric(&third, "hop_served_total")), (0, 0));
}

#[tokio::test]
async fn a_dead_host_is_passed_over_and_then_avoided() {
    let (address, heads) = upstream(Does::Echo).await;
    let on_h3 = Machine { host: "h3", ..machine(address) };
    let (members, one, _other) = two(&[on_h3.clone(), on_h2(address), on_h3]);
    members.addresses.lock().unwrap().insert("h3".parse().unwrap(), nowhere());
    for _ in 0..12 {
        let answer = raw(one.http, POST).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    assert_eq!(heads.load(SeqCst), 12);
    assert!(metric(&one, "retries_total") <= 1, "asked once at most, for all of its machines");
}

#[tokio::test]
async fn a_host_that_is_not_heard_of_is_the_last_resort_and_said_so() {
    let (address, _) = upstream(Does::Echo).await;
    let (_members, one, _other) = two(&[]);
    let both = [on_h2(address), machine(address)];
    one.set_heard(&both, &[("h2", Freshness::Old)]);
    for _ in 0..6 {
        let answer = get(one.http, "/").await;
        assert_eq!((answer.status, header(&answer.head, "dunlin-stale")), (200, None));
    }
    let answer = raw(one.http, &format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nfly-force-instance-id: {}\r\n\r\n", id(0))).await;
    assert_eq!(answer.status, 503, "h2 knows no such machine yet: {}", answer.body);
    _other.set(&both);
    one.set_heard(&both[..1], &[("h2", Freshness::Old)]);
    let answer = get(one.http, "/").await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-stale")), (200, Some("old")));
    assert_eq!(metric(&one, "stale_total"), 1);
    one.set_heard(&both[..1], &[("h2", Freshness::Aging)]);
    assert_eq!(header(&get(one.http, "/").await.head, "dunlin-stale"), None);
}

/// Whoever stops says farewell first: a request that crosses with it goes to the next connection, whatever it is.
#[tokio::test]
async fn a_last_hop_that_restarts_loses_no_request() {
    let (address, heads) = upstream(Does::Echo).await;
    let (members, one, other) = two(&[on_h2(address)]);
    assert_eq!(raw(one.http, POST).await.status, 200);
    other.proxy.drain(Duration::from_secs(5)).await;
    let again = members.edge("h2", "local", Limits::default());
    again.set(&[on_h2(address)]);
    for _ in 0..4 {
        let answer = raw(one.http, POST).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    assert_eq!(heads.load(SeqCst), 5);
}

/// A last hop that answers the first request of a connection, and ends at the second one: with TLS's farewell, which says
/// that it did not look at it, or without.
async fn fake_hop(shown: &Shown, says_farewell: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let (acceptor, connections) = (TlsAcceptor::from(shown.server()), Arc::new(AtomicUsize::new(0)));
    let counted = connections.clone();
    let address = serves(move |stream| {
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        async move {
            let Ok(mut tls) = acceptor.accept(stream).await else { return };
            connections.fetch_add(1, SeqCst);
            let mut buffer = [0; 4096];
            let Ok(n) = tls.read(&mut buffer).await else { return };
            if String::from_utf8_lossy(&buffer[..n]).contains(" hold\r\n") {
                tls.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
                tls.read_exact(&mut buffer[..4]).await.unwrap();
            }
            tls.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            let _ = tls.read(&mut buffer).await;
            if says_farewell {
                let _ = tls.shutdown().await;
                let _ = tls.read(&mut buffer).await;
            }
        }
    })
    .await;
    (address, counted)
}

#[tokio::test]
async fn a_request_that_crosses_with_a_farewell_is_sent_again_and_one_that_was_cut_is_not() {
    let bare = "POST / HTTP/1.1\r\nhost: web.example.test\r\ncontent-length: 0\r\n\r\n";
    for request in [POST, bare] {
        for (says_farewell, status) in [(true, 200), (false, 502)] {
            let (members, one, _other) = two(&[on_h2(nowhere())]);
            let (address, connections) = fake_hop(&members.issue("h2"), says_farewell).await;
            members.addresses.lock().unwrap().insert("h2".parse().unwrap(), address);
            let mut client = TcpStream::connect(one.http).await.unwrap();
            for expected in [200, status] {
                client.write_all(request.as_bytes()).await.unwrap();
                let answer = tokio::time::timeout(DEADLINE, read_answer(&mut client)).await.unwrap();
                assert_eq!(answer.status, expected, "farewell: {says_farewell}, {}", answer.body);
            }
            assert_eq!(connections.load(SeqCst), if says_farewell { 2 } else { 1 });
        }
    }
}

#[tokio::test]
async fn who_waits_for_a_machine_that_is_full_elsewhere_asks_its_host_now_and_then() {
    let (address, _) = upstream(Does::Hang).await;
    let members = Members::new();
    let limits = Limits { wait_timeout: Duration::from_millis(600), ..Limits::default() };
    let (one, other) = (members.edge("h1", "local", limits), members.edge("h2", "local", Limits::default()));
    one.set(&[on_h2(address)]);
    other.set(&[on_h2(address)]);
    other.host.hard_limit.store(1, SeqCst);
    let held = tokio::spawn(raw(one.http, POST));
    other.admitted(1).await;
    let answer = raw(one.http, POST).await;
    assert_eq!((answer.status, header(&answer.head, "dunlin-error")), (503, Some("PR08")), "{}", answer.body);
    let asked = other.host.full.load(SeqCst);
    assert!((2..12).contains(&asked), "asked {asked} times");
    held.abort();
    other.admitted(0).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_cut_for_the_client_too() {
    let breaking = serves(|mut stream| async move {
        let _ = read_head(&mut stream, Vec::new()).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    })
    .await;
    let (_members, one, other) = two(&[on_h2(breaking)]);
    let mut client = TcpStream::connect(one.http).await.unwrap();
    client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, client.read_to_end(&mut all)).await.expect("an end");
    let text = String::from_utf8(all).unwrap();
    assert!(text.contains("half") && !text.ends_with("0\r\n\r\n"), "{text}");
    assert_eq!(one.log.lines(1).await[0]["complete"], false);
    other.admitted(0).await;
}

#[tokio::test]
async fn where_connections_count_the_last_hop_keeps_none() {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    let address = serves(move |mut stream| {
        counted.fetch_add(1, SeqCst);
        async move {
            let mut rest = Vec::new();
            while let Some((_, after)) = read_head(&mut stream, std::mem::take(&mut rest)).await {
                rest = after;
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
        }
    })
    .await;
    for (kind, expected) in [(ConcurrencyKind::Requests, 1), (ConcurrencyKind::Connections, 4)] {
        connections.store(0, SeqCst);
        let (_members, one, other) = two(&[Machine { kind, ..on_h2(address) }]);
        let mut client = TcpStream::connect(one.http).await.unwrap();
        for _ in 0..4 {
            client.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client).await.status, 200);
        }
        assert_eq!(connections.load(SeqCst), expected);
        other.admitted(0).await;
    }
}

/// It answers before it has the body, which the edge holds until then.
#[tokio::test]
async fn an_early_answer_costs_no_connection_between_hosts() {
    let address = serves(|mut stream| async move {
        while read_head(&mut stream, Vec::new()).await.is_some() {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        }
    })
    .await;
    let (_members, one, other) = two(&[on_h2(address)]);
    let mut client = TcpStream::connect(one.http).await.unwrap();
    for _ in 0..6 {
        client.write_all(POST.as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(DEADLINE, read_answer(&mut client)).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        if header(&answer.head, "connection") == Some("close") {
            client = TcpStream::connect(one.http).await.unwrap();
        }
    }
    assert!(metric(&other, "connections_total") <= 2, "at most one a core");
    other.admitted(0).await;
}

/// Whatever an edge takes, the last hop takes with all that the edge adds.
#[tokio::test]
async fn the_biggest_head_goes_through() {
    let (address, _) = upstream(Does::Echo).await;
    let (_members, one, _other) = two(&[on_h2(address)]);
    let fields: String = (0..98).map(|n| format!("x-{n}: {}\r\n", "y".repeat(600))).collect();
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n{fields}\r\n");
    assert!(request.len() > 58 * 1024 && request.len() < 60 * 1024, "{}", request.len());
    let answer = raw(one.http, &request).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.body.contains("x-97: yyy") && header(&answer.body, "x-forwarded-for").is_some());
}

#[tokio::test]
async fn http2_goes_through_and_cannot_say_what_only_edges_say() {
    let (address, heads) = upstream(Does::Echo).await;
    let (_members, one, _other) = two(&[on_h2(address)]);
    let certificate = certificate(&["*.example.test"]);
    one.certs.store(Arc::new(CertStore::build(std::slice::from_ref(&certificate)).unwrap()));
    let tls = crate::tls::connect(one.https, HOST, &certificate, b"h2").await.unwrap();
    let (sender, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let request = http::Request::post(format!("https://{HOST}/"))
        .header("content-length", "4")
        .header("dunlin-hop", "v1 00000000000009 00000000000000000000000000 0.0 80 0 go")
        .body(())
        .unwrap();
    let (answer, mut body) = sender.send_request(request, false).unwrap();
    body.send_data(bytes::Bytes::from_static(b"body"), true).unwrap();
    let answer = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap();
    assert_eq!((answer.status().as_u16(), heads.load(SeqCst)), (200, 1));
    let mut echoed = answer.into_body();
    let mut text = Vec::new();
    while let Some(chunk) = echoed.data().await {
        text.extend_from_slice(&chunk.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("POST / HTTP/1.1\r\n") && text.ends_with("\r\n\r\nbody") && !text.contains("dunlin-hop"), "{text}");
    assert_eq!((header(&text, "via"), header(&text, "x-forwarded-proto")), (Some("2 dunlin"), Some("https")));
}

/// One that was let in and is removed then is not heard any more, connected or not.
#[tokio::test]
async fn a_member_that_is_removed_is_cut_off() {
    let (address, heads) = upstream(Does::Echo).await;
    let (members, one, _other) = two(&[on_h2(address)]);
    assert_eq!(get(one.http, "/").await.status, 200);
    members.known.lock().unwrap().retain(|_, host| host.as_str() != "h1");
    let answer = get(one.http, "/").await;
    assert_eq!((answer.status, heads.load(SeqCst)), (502, 1), "{}", answer.body);
}
