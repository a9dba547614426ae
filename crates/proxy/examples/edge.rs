//! An edge with a fixed machine: what `cargo xtask bench` measures beside other proxies.
//!
//! ```text
//! edge --http 127.0.0.1:8080 --https 127.0.0.1:8443 --upstream 127.0.0.1:9000 \
//!      --cert cert.pem --key key.pem --log access.log [--threads 2] [--sockets 2] [--host web.example.test]
//!      [--hop yes]
//! ```
//! With `--hop` the machine is on another host, which runs in this process too: each request goes through two edges.
//! Everything that a server has is on: limits, timeouts, counters, the last hop's admission, the access log.

use arc_swap::ArcSwap;
use async_trait::async_trait;
use dunlin_api::{Admission, AdmitRefusal, AdmitRequest, LastHop};
use dunlin_cluster::{Authority, MemberKeys};
use dunlin_model::{
    Concurrency, ConcurrencyKind, Generation, HostId, ImageRef, MachineId, MachineSpec, MachineState, MachineVersion, Service,
};
use dunlin_proxy::{AccessLog, CertSource, CertStore, Elsewhere, Fleet, Limits, LogFormat, Proxy, ProxyConfig, Routes};
use dunlin_view::{AppFact, ConfigState, MachineAssignment, MachineFact, Snapshot};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::HashMap;
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const BACKLOG: i32 = 4096;
const HARD_LIMIT: u32 = 1_000;

/// The host's side of every request: it counts, and refuses above the limit.
struct Host {
    address: SocketAddr,
    in_flight: Arc<AtomicU32>,
}

struct InFlight(Arc<AtomicU32>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[async_trait]
impl LastHop for Host {
    fn admit(&self, _request: &AdmitRequest) -> Result<Admission, AdmitRefusal> {
        let guard = InFlight(self.in_flight.clone());
        if self.in_flight.fetch_add(1, Ordering::AcqRel) >= HARD_LIMIT {
            return Err(AdmitRefusal::AtLimit);
        }
        Ok(Admission { address: self.address, guard: Box::new(guard) })
    }

    async fn wake(&self, _machine: &MachineId, _deadline_ms: u64) -> Result<(), AdmitRefusal> {
        Ok(())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: HashMap<&str, &str> =
        args.chunks_exact(2).map(|pair| (pair[0].trim_start_matches('-'), pair[1].as_str())).collect();
    let arg = |name: &str| args.get(name).copied().ok_or_else(|| format!("--{name} is missing"));
    let host_name = args.get("host").copied().unwrap_or("web.example.test");
    let log = std::fs::File::options().create(true).append(true).open(arg("log")?)?;
    let (http, https): (SocketAddr, SocketAddr) = (arg("http")?.parse()?, arg("https")?.parse()?);
    let upstream: SocketAddr = arg("upstream")?.parse()?;
    let cert = CertSource {
        chain_pem: std::fs::read_to_string(arg("cert")?)?,
        key_pem: std::fs::read_to_string(arg("key")?)?,
        names: vec![host_name.into()],
    };
    let sockets = args.get("sockets").map_or(Ok(1), |n| n.parse())?;
    let last_hop = Arc::new(Host { address: upstream, in_flight: Arc::default() });
    let is_hop = args.contains_key("hop");
    let machine_host = if is_hop { "h2" } else { "h1" };
    let snapshot = snapshot(host_name, upstream.port(), machine_host)?;
    let [fleet, other] = if is_hop { fleets(sockets)?.map(Some) } else { [None, None] };
    let routes = match &fleet {
        Some(fleet) => {
            let host = fleet.host.clone();
            Routes::in_fleet("local".parse()?, Elsewhere { host, rtt: Box::new(|_| None), see_detail: Box::new(|_, _| true) })
        }
        None => Routes::new("local".parse()?),
    };
    routes.update(&snapshot);
    let threads = args.get("threads").map_or(Ok(0), |n| n.parse())?;
    let _other = other.map(|other| -> Result<Proxy, Box<dyn Error>> {
        let config = ProxyConfig {
            http: Vec::new(),
            https: Vec::new(),
            http_port: 0,
            https_port: 0,
            threads,
            limits: Limits::default(),
            internal_hosts: Vec::new(),
            access_log: None,
            fleet: Some(other),
        };
        let certs = Arc::new(ArcSwap::from_pointee(CertStore::empty()));
        Ok(Proxy::start(config, Routes::new("local".parse()?), last_hop.clone(), certs)?)
    });
    let _other = _other.transpose()?;
    let config = ProxyConfig {
        http: bind(http, sockets)?,
        https: bind(https, sockets)?,
        http_port: http.port(),
        https_port: https.port(),
        threads,
        limits: Limits::default(),
        internal_hosts: Vec::new(),
        access_log: Some(AccessLog { format: LogFormat::Text, sink: Box::new(log) }),
        fleet,
    };
    let certs = Arc::new(ArcSwap::from_pointee(CertStore::build(&[cert])?));
    let proxy = Proxy::start(config, routes, last_hop, certs)?;
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?.recv().await;
    let mut text = String::new();
    proxy.metrics().render(&mut text);
    print!("{text}");
    Ok(())
}

/// So many sockets at one address, as the keeper of a server binds them.
fn bind(address: SocketAddr, sockets: usize) -> rustix::io::Result<Vec<TcpListener>> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let bind_one = || {
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(socket.into())
    };
    (0..sockets).map(|_| bind_one()).collect()
}

/// Hosts `h1` and `h2`, which know each other.
fn fleets(sockets: usize) -> Result<[Fleet; 2], Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    let authority = Authority::load_or_create(dir.path(), now_ms)?;
    let listen = || {
        let first = bind("127.0.0.1:0".parse().expect("an address"), 1)?;
        let address = first[0].local_addr()?;
        let more = bind(address, sockets - 1)?;
        Ok::<_, std::io::Error>((address, first.into_iter().chain(more).collect::<Vec<_>>()))
    };
    let (one, other) = (listen()?, listen()?);
    let addresses = [one.0, other.0];
    let make = |name: &str, listeners| -> Result<Fleet, Box<dyn Error>> {
        let (keys, host): (_, HostId) = (MemberKeys::generate()?, name.parse()?);
        let issued = authority.issue(&host, &"local".parse()?, 1, &keys.public()?, now_ms)?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(issued.ca_pem.as_bytes())?)?;
        let (roots, chain) = (Arc::new(roots), vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes())?]);
        let private = serde_json::to_value(&keys)?;
        let key = PrivateKeyDer::from_pem_slice(private["tls"].as_str().ok_or("no key")?.as_bytes())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let server = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let server = server.with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key.clone_key())?;
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let client = client.with_root_certificates(roots).with_client_auth_cert(chain, key)?;
        let (server, client) = (Arc::new(server), Arc::new(client));
        Ok(Fleet {
            host,
            listeners,
            tls_server: Box::new(move || server.clone()),
            tls_client: Box::new(move || client.clone()),
            address: Box::new(move |host| Some(addresses[usize::from(host.as_str() == "h2")])),
            server_name: dunlin_cluster::Cluster::server_name,
            peer_host: Box::new(dunlin_cluster::Cluster::peer_host),
        })
    };
    Ok([make("h1", one.1)?, make("h2", other.1)?])
}

fn snapshot(host_name: &str, port: u16, host: &str) -> Result<Snapshot, Box<dyn Error>> {
    let (id, version) = (MachineId::from_random([0; 7]), MachineVersion::new(1, [0; 10]));
    let app = AppFact { org: "personal".parse()?, hostnames: vec![host_name.into()], current_release: 1, created_at_ms: 0 };
    let concurrency =
        Concurrency { kind: ConcurrencyKind::Requests, soft_limit: HARD_LIMIT / 2, hard_limit: Some(HARD_LIMIT) };
    let service = Service {
        internal_port: port,
        force_https: false,
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
        ..MachineSpec::of(version.clone(), "personal".parse()?, "web".parse()?, image)
    };
    let assignment = MachineAssignment {
        id: id.clone(),
        name: "m0".into(),
        host: host.parse()?,
        region: "local".parse()?,
        address: Ipv4Addr::LOCALHOST,
        placement: Generation::default(),
        created_at_ms: 0,
        spec,
    };
    let fact = MachineFact {
        id: id.clone(),
        host: host.parse()?,
        app: "web".parse()?,
        sequence: 1,
        placement: Generation::default(),
        state: MachineState::Started,
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
    let mut config = ConfigState::default();
    config.apps.insert("web".parse()?, app);
    config.machines.insert(id, assignment);
    Ok(Snapshot::default().with_machine(Arc::new(fact))?.with_config(Arc::new(config), 1)?)
}
