//! An edge, its machines, and a small client.

use arc_swap::ArcSwap;
use async_trait::async_trait;
use dunlin_api::{Admission, AdmitRefusal, AdmitRequest, LastHop};
use dunlin_model::{
    Concurrency, ConcurrencyKind, Generation, ImageRef, MachineId, MachineSpec, MachineState, MachineVersion, Service,
};
use dunlin_proxy::{AccessLog, CertSource, CertStore, Fleet, InternalHost, Limits, LogFormat, Proxy, ProxyConfig, Routes};
use dunlin_view::{AppFact, ConfigState, Freshness, MachineAssignment, MachineFact, Snapshot};
use std::collections::HashMap;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// With three labels: clients take no wildcard directly below a top-level name.
pub const HOST: &str = "web.example.test";
/// Nothing here takes longer than this, unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct Machine {
    pub state: MachineState,
    pub force_https: bool,
    pub kind: ConcurrencyKind,
    pub soft: u32,
    pub hard: Option<u32>,
    pub address: SocketAddr,
    pub host: &'static str,
    pub region: &'static str,
}

pub fn machine(address: SocketAddr) -> Machine {
    let (state, kind) = (MachineState::Started, ConcurrencyKind::Requests);
    Machine { state, force_https: false, kind, soft: 20, hard: None, address, host: "h1", region: "local" }
}

pub fn id(n: usize) -> MachineId {
    MachineId::from_random([0, 0, 0, 0, 0, 0, n as u8])
}

/// Admits from its own list, as a host does.
#[derive(Default)]
pub struct Host {
    pub addresses: Mutex<HashMap<MachineId, SocketAddr>>,
    pub refusals: Mutex<HashMap<MachineId, AdmitRefusal>>,
    pub admitted: Arc<AtomicUsize>,
    /// 0 = none.
    pub hard_limit: AtomicUsize,
    pub full: AtomicUsize,
    pub wakes: AtomicU32,
    /// Of those, machines that slept until then.
    pub starts: AtomicU32,
    /// A wake waits for this many milliseconds.
    pub wake_ms: AtomicU32,
}

struct Guard(Arc<AtomicUsize>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[async_trait]
impl LastHop for Host {
    fn admit(&self, request: &AdmitRequest) -> Result<Admission, AdmitRefusal> {
        if let Some(refusal) = self.refusals.lock().unwrap().get(&request.machine) {
            return Err(refusal.clone());
        }
        let address = *self.addresses.lock().unwrap().get(&request.machine).ok_or(AdmitRefusal::NotHere)?;
        let guard = Box::new(Guard(self.admitted.clone()));
        let limit = self.hard_limit.load(SeqCst);
        if self.admitted.fetch_add(1, SeqCst) >= limit && limit > 0 {
            self.full.fetch_add(1, SeqCst);
            return Err(AdmitRefusal::AtLimit);
        }
        Ok(Admission { address, guard })
    }

    async fn wake(&self, machine: &MachineId, _deadline_ms: u64) -> Result<(), AdmitRefusal> {
        self.wakes.fetch_add(1, SeqCst);
        tokio::time::sleep(Duration::from_millis(u64::from(self.wake_ms.load(SeqCst)))).await;
        match self.refusals.lock().unwrap().get_mut(machine) {
            Some(AdmitRefusal::DidNotWake(why)) => return Err(AdmitRefusal::DidNotWake(why.clone())),
            Some(AdmitRefusal::Asleep) => {}
            _ => return Ok(()),
        }
        self.starts.fetch_add(u32::from(self.refusals.lock().unwrap().remove(machine).is_some()), SeqCst);
        Ok(())
    }
}

/// The access log, kept.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The fields of the first `count` lines, once they are written.
    pub async fn lines(&self, count: usize) -> Vec<serde_json::Value> {
        let text = || String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        eventually(&format!("{count} lines in the access log"), || text().lines().count() >= count).await;
        let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["fields"].clone();
        text().lines().map(parse).collect()
    }
}

pub struct Edge {
    pub name: &'static str,
    pub proxy: Proxy,
    pub routes: Arc<Routes>,
    pub host: Arc<Host>,
    pub certs: Arc<ArcSwap<CertStore>>,
    pub log: Log,
    pub http: SocketAddr,
    pub https: SocketAddr,
}

impl Edge {
    pub fn start(machines: &[Machine]) -> Self {
        Self::with(machines, Limits::default(), Vec::new())
    }

    pub fn with(machines: &[Machine], limits: Limits, internal_hosts: Vec<InternalHost>) -> Self {
        let edge = Self::start_with("h1", Routes::new("local".parse().unwrap()), limits, internal_hosts, None);
        edge.set(machines);
        edge
    }

    pub fn start_with(
        name: &'static str,
        routes: Arc<Routes>,
        limits: Limits,
        internal_hosts: Vec<InternalHost>,
        fleet: Option<Fleet>,
    ) -> Self {
        let bind = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (http, https) = (bind(), bind());
        let (http_addr, https_addr) = (http.local_addr().unwrap(), https.local_addr().unwrap());
        let host = Arc::new(Host::default());
        let certs = Arc::new(ArcSwap::from_pointee(CertStore::empty()));
        let log = Log::default();
        let config = ProxyConfig {
            http: vec![http],
            https: vec![https],
            http_port: http_addr.port(),
            https_port: https_addr.port(),
            threads: 2,
            limits,
            internal_hosts,
            access_log: Some(AccessLog { format: LogFormat::Json, sink: Box::new(log.clone()) }),
            fleet,
        };
        let proxy = Proxy::start(config, routes.clone(), host.clone(), certs.clone()).unwrap();
        Self { name, proxy, routes, host, certs, log, http: http_addr, https: https_addr }
    }

    /// The host and the view know these machines from now on.
    pub fn set(&self, machines: &[Machine]) {
        self.set_heard(machines, &[]);
    }

    /// The view knows that they are, and their hosts tell no more.
    pub fn set_unseen(&self, machines: &[Machine]) {
        let hosts = machines.iter().map(|m| m.host.parse().unwrap()).collect();
        self.routes.update(&snapshot(machines).without_detail_of(&hosts));
    }

    /// As [`Self::set`], with what is heard of other hosts.
    pub fn set_heard(&self, machines: &[Machine], heard: &[(&str, Freshness)]) {
        let own = machines.iter().enumerate().filter(|(_, m)| m.host == self.name);
        let addresses = own.map(|(n, m)| (id(n), m.address)).collect();
        *self.host.addresses.lock().unwrap() = addresses;
        let mut snapshot = snapshot(machines);
        snapshot.heard = Arc::new(heard.iter().map(|(host, freshness)| (host.parse().unwrap(), *freshness)).collect());
        self.routes.update(&snapshot);
    }

    /// Waits until the host counts this many requests.
    pub async fn admitted(&self, expected: usize) {
        eventually(&format!("{expected} admitted"), || self.host.admitted.load(SeqCst) == expected).await;
    }
}

pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn snapshot(machines: &[Machine]) -> Snapshot {
    let mut config = ConfigState::default();
    let app = AppFact { org: "personal".parse().unwrap(), hostnames: vec![HOST.into()], current_release: 1, created_at_ms: 0 };
    config.apps.insert("web".parse().unwrap(), app);
    let mut view = Snapshot::default();
    for (n, m) in machines.iter().enumerate() {
        let (id, version) = (id(n), MachineVersion::new(1, [n as u8; 10]));
        let concurrency = Concurrency { kind: m.kind, soft_limit: m.soft, hard_limit: m.hard };
        let service = Service {
            internal_port: m.address.port(),
            force_https: m.force_https,
            autostart: true,
            autostop: Default::default(),
            min_machines_running: 0,
            max_machines_running: None,
            concurrency,
        };
        let image = ImageRef { repository: "web".into(), digest: format!("sha256:{}", "0".repeat(64)), tag: None };
        let spec = MachineSpec {
            release: 1,
            services: vec![service],
            ..MachineSpec::of(version.clone(), "personal".parse().unwrap(), "web".parse().unwrap(), image)
        };
        let assignment = MachineAssignment {
            id: id.clone(),
            name: format!("m{n}"),
            host: m.host.parse().unwrap(),
            region: m.region.parse().unwrap(),
            address: Ipv4Addr::LOCALHOST,
            placement: Generation::default(),
            created_at_ms: 0,
            spec,
        };
        config.machines.insert(id.clone(), assignment);
        let fact = MachineFact {
            id,
            host: m.host.parse().unwrap(),
            app: "web".parse().unwrap(),
            sequence: 1,
            placement: Generation::default(),
            state: m.state,
            version,
            release: 1,
            process_group: "app".into(),
            attempt: 1,
            address: Ipv4Addr::LOCALHOST,
            cordoned: false,
            checks: vec![],
            exit: None,
            restarts: 0,
            problem: None,
            over: false,
            unconfirmed: false,
            due_ms: None,
            containers: vec![],
            updated_at_ms: 0,
        };
        view = view.with_machine(Arc::new(fact)).unwrap();
    }
    view.with_config(Arc::new(config), 1).unwrap()
}

/// A server of which each connection does as told.
pub async fn serves<F, Fut>(each: F) -> SocketAddr
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(each(stream));
        }
    });
    address
}

/// Answers each head with these bytes, and closes after the last answer that says so.
pub async fn says(answer: &'static str) -> SocketAddr {
    serves(move |mut stream| async move {
        let mut rest = Vec::new();
        while let Some((_, after)) = read_head(&mut stream, std::mem::take(&mut rest)).await {
            rest = after;
            if stream.write_all(answer.as_bytes()).await.is_err() || answer.contains("connection: close") {
                return;
            }
        }
    })
    .await
}

/// What a raw upstream does with a connection once it has read one head.
#[derive(Clone, Copy, PartialEq)]
pub enum Does {
    /// Answers with the head and body that it got as its body, and keeps the connection.
    Echo,
    /// Reads the head, then closes without an answer.
    Die,
    /// Reads the head and keeps silent.
    Hang,
    /// 101, then sends every byte back.
    Upgrade,
    /// Keeps the connection's promise of more requests, then closes at the second one.
    DieAtSecond,
}

/// A server below HTTP libraries: it sees exactly what was sent. Counts heads.
pub async fn upstream(does: Does) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, heads) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let seen = heads.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, does, seen.clone()));
        }
    });
    (address, heads)
}

async fn answer(mut stream: TcpStream, does: Does, heads: Arc<AtomicUsize>) {
    let mut served = 0;
    let mut rest = Vec::new();
    while let Some((head, after)) = read_head(&mut stream, std::mem::take(&mut rest)).await {
        heads.fetch_add(1, SeqCst);
        served += 1;
        match does {
            Does::Die => return,
            Does::DieAtSecond if served == 2 => return,
            Does::Hang => {
                let _ = stream.read_to_end(&mut Vec::new()).await;
                return;
            }
            Does::Upgrade => {
                let reply = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
                stream.write_all(reply).await.unwrap();
                stream.write_all(&after).await.unwrap();
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                return;
            }
            Does::Echo | Does::DieAtSecond => {}
        }
        let length = header(&head, "content-length").map_or(0, |value| value.parse::<usize>().unwrap());
        let mut body = after;
        while body.len() < length {
            let mut chunk = vec![0; 64 * 1024];
            match stream.read(&mut chunk).await {
                Ok(n) if n > 0 => body.extend_from_slice(&chunk[..n]),
                _ => return,
            }
        }
        rest = body.split_off(length);
        let reply = format!("HTTP/1.1 200 OK\r\nx-secret-hop: 1\r\nconnection: x-secret-hop\r\ncontent-length: {}\r\n\r\n", head.len() + body.len());
        let reply = [reply.as_bytes(), head.as_bytes(), &body].concat();
        if stream.write_all(&reply).await.is_err() {
            return;
        }
    }
}

pub async fn read_head(stream: &mut TcpStream, mut got: Vec<u8>) -> Option<(String, Vec<u8>)> {
    loop {
        if let Some(end) = got.windows(4).position(|w| w == b"\r\n\r\n") {
            let after = got.split_off(end + 4);
            return Some((String::from_utf8(got).unwrap(), after));
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await {
            Ok(n) if n > 0 => got.extend_from_slice(&chunk[..n]),
            _ => return None,
        }
    }
}

/// The value of a header in a raw head, if it is there once.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut found = head.lines().filter_map(|line| line.split_once(':')).filter(|(n, _)| n.eq_ignore_ascii_case(name));
    let value = found.next()?.1.trim();
    assert!(found.next().is_none(), "{name} twice in {head}");
    Some(value)
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Sends raw bytes and reads one answer with a content length.
pub async fn raw(address: SocketAddr, request: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    tokio::time::timeout(DEADLINE, read_answer(&mut stream)).await.expect("an answer in time")
}

pub async fn read_answer(stream: &mut TcpStream) -> Answer {
    let (head, after) = read_head(stream, Vec::new()).await.expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = header(&head, "content-length").map_or(0, |value| value.parse::<usize>().unwrap());
    let mut body = after;
    while body.len() < length {
        let mut chunk = [0; 64 * 1024];
        let n = stream.read(&mut chunk).await.unwrap();
        assert!(n > 0, "the body was cut");
        body.extend_from_slice(&chunk[..n]);
    }
    Answer { status, head, body: String::from_utf8(body).unwrap() }
}

pub async fn get(address: SocketAddr, path: &str) -> Answer {
    raw(address, &format!("GET {path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n")).await
}

/// A certificate of its own authority: it is its own root.
pub fn certificate(names: &[&str]) -> CertSource {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names.clone()).unwrap();
    CertSource { chain_pem: made.cert.pem(), key_pem: made.signing_key.serialize_pem(), names }
}

/// An address where nobody listens.
pub fn nowhere() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
