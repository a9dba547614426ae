//! Worker threads: accept, TLS, and the life of a connection.

use crate::buffer::Buffers;
use crate::doors::{Door, Handshake, Handshakes, Slot};
use crate::hop::Fleet;
use crate::limits::Limits;
use crate::log::{self, AccessLog, Lines, LogHandle};
use crate::metrics::{Counters, ProxyMetrics, count};
use crate::queue::Queues;
use crate::random::Random;
use crate::request::Sender;
use crate::routes::Routes;
use crate::time::{Bell, Clock};
use crate::tls::{self, CertError, CertStore};
use crate::upstream::Pool;
use crate::{http1, http2};
use arc_swap::ArcSwap;
use dunlin_api::LastHop;
use dunlin_model::MachineId;
use dunlin_routing::Candidate;
use rustix::net::sockopt;
use rustix::process::{Resource, getrlimit};
use rustls_pki_types::CertificateDer;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::LocalOptions;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;

/// After a failed accept (out of descriptors, mostly): not a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often idle connections to machines are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// Silence of a client's socket before the kernel asks; after as long without an answer the client is gone.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// A host of the fleet that acknowledges nothing for so long is gone: three questions in a row, of which one may get lost.
pub(crate) const HOST_GONE_AFTER: Duration = Duration::from_secs(8);
/// How often a drain looks whether it is done.
const DRAIN_LOOK: Duration = Duration::from_millis(10);
/// After the cut, connections are dropped at their next poll.
const CUT_GRACE: Duration = Duration::from_secs(2);
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ndunlin-error: PC04\r\nretry-after: 2\r\n\
content-type: text/plain\r\ncontent-length: 62\r\nconnection: close\r\n\r\nthe edge is at its limit of connections, try again in a moment";

/// A host name that a part of this server answers, at a unix socket.
#[derive(Debug, Clone)]
pub struct InternalHost {
    pub hostname: String,
    pub unix_socket: PathBuf,
}

pub struct ProxyConfig {
    /// Bound and listening. As many as threads, with SO_REUSEPORT, are best: one for each.
    pub http: Vec<TcpListener>,
    pub https: Vec<TcpListener>,
    /// The ports as clients see them, for redirects and forwarded headers.
    pub http_port: u16,
    pub https_port: u16,
    /// 0 = one per core.
    pub threads: usize,
    pub limits: Limits,
    pub internal_hosts: Vec<InternalHost>,
    /// `None` = no access log.
    pub access_log: Option<AccessLog>,
    /// `None`: every machine is on this host.
    pub fleet: Option<Fleet>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Tls(#[from] CertError),
    #[error("a listening socket cannot be used by the proxy's workers")]
    Listener(#[source] io::Error),
    #[error("a worker thread of the proxy cannot be started")]
    Thread(#[source] io::Error),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// What all cores share.
pub(crate) struct Edge {
    pub routes: Arc<Routes>,
    pub last_hop: Arc<dyn LastHop>,
    pub limits: Limits,
    pub metrics: Arc<ProxyMetrics>,
    pub internal: HashMap<String, Arc<Path>>,
    pub http_port: u16,
    pub https_port: u16,
    waking: Mutex<HashSet<MachineId>>,
    pub queues: Queues,
    pub fleet: Option<Arc<Fleet>>,
    handshakes: Arc<Handshakes>,
    tls: Arc<rustls::ServerConfig>,
    drain: CancellationToken,
    /// Ends what is still open.
    cut: CancellationToken,
}

impl Edge {
    /// The machine is on another host of the fleet.
    pub fn is_elsewhere(&self, target: &Candidate) -> bool {
        self.fleet.as_ref().is_some_and(|fleet| fleet.host != target.host)
    }

    /// Machines being started beside running ones.
    pub fn waking(&self) -> MutexGuard<'_, HashSet<MachineId>> {
        self.waking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one core has for itself.
pub(crate) struct Worker {
    pub edge: Arc<Edge>,
    pub counters: Arc<Counters>,
    pub pool: Pool,
    pub buffers: Rc<Buffers>,
    pub random: Random,
    pub clock: Clock,
    pub lines: Lines,
    /// Rings when the edge drains.
    pub bell: Bell,
    /// Connections that it has had.
    clients: Cell<u64>,
    /// When a lack of sockets was last told of.
    pub complained: Cell<Option<std::time::Instant>>,
}

impl Worker {
    fn new(edge: Arc<Edge>, core: usize, random: Random, log: Option<LogHandle>) -> Self {
        let (buffers, counters) = (Rc::<Buffers>::default(), edge.metrics.core(core));
        let pool = Pool::new(&edge.limits, buffers.clone(), counters.clone(), edge.fleet.clone());
        Self {
            edge,
            counters,
            pool,
            buffers,
            random,
            clock: Clock::default(),
            lines: Lines::new(log),
            bell: Bell::default(),
            clients: Cell::default(),
            complained: Cell::default(),
        }
    }
}

/// One client connection.
pub(crate) struct Client {
    /// Of this core's.
    pub id: u64,
    pub address: SocketAddr,
    /// The address as apps and logs get it.
    pub ip: String,
    pub is_tls: bool,
    /// When HTTP began on it: accepted, and TLS agreed on.
    pub began: Instant,
    /// What machines are told of where each of its requests came from.
    pub lines: Vec<u8>,
    over: Over,
    /// What another edge has shown.
    shown: Vec<CertificateDer<'static>>,
    _slot: Slot,
}

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Plain,
    /// HTTP/1 as well.
    Tls,
    Http2,
    /// Another edge, to which this one is the last hop.
    Hop,
}

impl Client {
    fn new(worker: &Worker, address: SocketAddr, over: Over, slot: Slot) -> Rc<Self> {
        let is_tls = over != Over::Plain;
        let via = if over == Over::Http2 { "2" } else { "1.1" };
        let edge = &worker.edge;
        // A socket for both IP versions shows IPv4 addresses as IPv6 ones.
        let ip = address.ip().to_canonical().to_string();
        let (scheme, ssl, port) = if is_tls { ("https", "on", edge.https_port) } else { ("http", "off", edge.http_port) };
        let region = &edge.routes.region;
        let id = worker.clients.get();
        worker.clients.set(id + 1);
        let lines = format!(
            "x-forwarded-for: {ip}\r\nfly-client-ip: {ip}\r\nx-forwarded-proto: {scheme}\r\nx-forwarded-ssl: {ssl}\r\n\
             x-forwarded-port: {port}\r\nfly-forwarded-port: {port}\r\nfly-region: {region}\r\nvia: {via} dunlin\r\n"
        );
        Rc::new(Self { id, address, ip, is_tls, began: Instant::now(), lines: lines.into_bytes(), over, shown: Vec::new(), _slot: slot })
    }

    /// Another edge. What its clients are to be told apart by, it says with each request.
    fn edge(worker: &Worker, address: SocketAddr, shown: Vec<CertificateDer<'static>>, slot: Slot) -> Rc<Self> {
        let id = worker.clients.get();
        worker.clients.set(id + 1);
        let ip = address.ip().to_canonical().to_string();
        Rc::new(Self { id, address, ip, is_tls: true, began: Instant::now(), lines: Vec::new(), over: Over::Hop, shown, _slot: slot })
    }

    /// It is a member's connection still: one that is removed goes on no longer.
    pub fn is_member(&self, edge: &Edge) -> bool {
        edge.fleet.as_ref().is_some_and(|fleet| (fleet.peer_host)(&self.shown).is_some())
    }

    pub fn sender(&self) -> Sender {
        if self.over == Over::Hop { Sender::Edge } else { Sender::Client }
    }
}

/// The running edge. Dropping it without [`Proxy::drain`] cuts every connection.
pub struct Proxy {
    edge: Arc<Edge>,
    threads: Vec<JoinHandle<()>>,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were still open at the deadline.
    pub cut: usize,
}

impl Proxy {
    pub fn start(
        config: ProxyConfig,
        routes: Arc<Routes>,
        last_hop: Arc<dyn LastHop>,
        certs: Arc<ArcSwap<CertStore>>,
    ) -> Result<Self, StartError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if config.threads == 0 { cores } else { config.threads };
        let internal = config.internal_hosts.into_iter();
        let fleet = config.fleet.map(Arc::new);
        let limits = config.limits.within_descriptors(getrlimit(Resource::Nofile).current, fleet.is_some());
        let edge = Arc::new(Edge {
            metrics: Arc::new(ProxyMetrics::new(routes.clone(), count)),
            routes,
            last_hop,
            handshakes: Handshakes::new(limits.max_hop_handshakes),
            limits,
            internal: internal.map(|host| (host.hostname.to_ascii_lowercase(), host.unix_socket.into())).collect(),
            http_port: config.http_port,
            https_port: config.https_port,
            waking: Mutex::default(),
            queues: Queues::default(),
            fleet: fleet.clone(),
            tls: tls::server_config(certs)?,
            drain: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        let mut proxy = Self { edge: edge.clone(), threads: Vec::with_capacity(count + 1) };
        let mut log = None;
        if let Some(access_log) = config.access_log {
            let started = log::start(access_log, edge.metrics.log_lines_lost.clone());
            let (handle, thread) = started.map_err(StartError::Thread)?;
            log = Some(handle);
            proxy.threads.push(thread);
        }
        for n in 0..count {
            let mut listeners = Vec::new();
            let mut all = vec![(&config.http, Door::Http), (&config.https, Door::Https)];
            all.extend(fleet.iter().map(|fleet| (&fleet.listeners, Door::Hop)));
            let mine = all.into_iter().flat_map(|(all, door)| of_worker(all, n, count).map(move |one| (one, door)));
            for (listener, door) in mine {
                let copy = listener.try_clone().map_err(StartError::Listener)?;
                copy.set_nonblocking(true).map_err(StartError::Listener)?;
                // Accepted sockets inherit it: a client that is gone without a word is noticed, and no small write waits.
                keep_alive(&copy, door).map_err(StartError::Listener)?;
                sockopt::set_tcp_nodelay(&copy, true).map_err(|error| StartError::Listener(error.into()))?;
                listeners.push((copy, door));
            }
            let random = Random::seeded().map_err(StartError::Random)?;
            let (edge, log) = (edge.clone(), log.clone());
            let (ready, started) = std::sync::mpsc::sync_channel(1);
            let body = move || {
                let worker = Rc::new(Worker::new(edge, n, random, log));
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
                // Whoever started this thread waits for the answer.
                match runtime {
                    Ok(runtime) => {
                        let _ = ready.send(Ok(()));
                        runtime.block_on(work(worker, listeners));
                    }
                    Err(error) => _ = ready.send(Err(error)),
                }
            };
            let thread = std::thread::Builder::new().name(format!("proxy-{n}")).spawn(body);
            proxy.threads.push(thread.map_err(StartError::Thread)?);
            started.recv().unwrap_or_else(|gone| Err(io::Error::other(gone))).map_err(StartError::Thread)?;
        }
        Ok(proxy)
    }

    pub fn metrics(&self) -> Arc<ProxyMetrics> {
        self.edge.metrics.clone()
    }

    /// Takes nothing new, lets what runs end, and cuts what is left after `within`. The listening sockets
    /// themselves stay open with whoever else holds them.
    pub async fn drain(mut self, within: Duration) -> Drained {
        self.edge.drain.cancel();
        let deadline = Instant::now() + within;
        while self.edge.metrics.open_connections() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
        let cut = self.edge.metrics.open_connections();
        self.edge.cut.cancel();
        let gone = Instant::now() + CUT_GRACE;
        while self.threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < gone {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
        self.threads.retain(|thread| !thread.is_finished());
        if !self.threads.is_empty() {
            tracing::warn!(threads = self.threads.len(), "workers of the proxy did not end");
        }
        Drained { cut }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.edge.drain.cancel();
        self.edge.cut.cancel();
    }
}

/// The sockets that a worker accepts from. Where there are as many as workers, each has its own (the kernel
/// spreads connections over sockets with SO_REUSEPORT); fewer are shared, and a connection wakes all workers.
fn of_worker(all: &[TcpListener], worker: usize, workers: usize) -> impl Iterator<Item = &TcpListener> {
    let is_shared = all.len() < workers;
    all.iter().enumerate().filter(move |(n, _)| is_shared || n % workers == worker).map(|(_, listener)| listener)
}

/// The kernel asks a silent client whether it is still there.
fn keep_alive(listener: &TcpListener, door: Door) -> io::Result<()> {
    if door == Door::Hop {
        return watch_host(listener);
    }
    sockopt::set_socket_keepalive(listener, true)?;
    sockopt::set_tcp_keepidle(listener, KEEPALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(listener, KEEPALIVE_AFTER / 4)?;
    Ok(sockopt::set_tcp_keepcnt(listener, 4)?)
}

/// A host that is gone is noticed soon: requests wait for its answers, and places are held for its requests.
pub(crate) fn watch_host(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, HOST_GONE_AFTER / 4)?;
    sockopt::set_tcp_keepintvl(socket, HOST_GONE_AFTER / 4)?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    Ok(sockopt::set_tcp_user_timeout(socket, HOST_GONE_AFTER.as_millis() as u32)?)
}

async fn work(worker: Rc<Worker>, listeners: Vec<(TcpListener, Door)>) {
    let edge = worker.edge.clone();
    for (listener, door) in listeners {
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => drop(tokio::task::spawn_local(accept(worker.clone(), listener, door))),
            Err(error) => tracing::error!(%error, "a worker cannot listen"),
        }
    }
    let mut sweep = tokio::time::interval(SWEEP);
    let mut flush = pin!(worker.lines.flush_regularly());
    loop {
        tokio::select! {
            () = flush.as_mut() => {}
            _ = sweep.tick() => worker.pool.sweep(),
            () = edge.drain.cancelled(), if !worker.bell.has_rung() => worker.bell.ring(),
            () = edge.cut.cancelled() => return,
        }
    }
}

async fn accept(worker: Rc<Worker>, listener: tokio::net::TcpListener, door: Door) {
    let edge = worker.edge.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            () = edge.drain.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        count(&worker.counters.accepted);
        let begun = if door == Door::Hop { edge.handshakes.take(address.ip()).map(Some) } else { Some(None) };
        let taken = begun.and_then(|begun| Some((begun, Slot::take(&edge.metrics, &edge.limits, door)?)));
        let Some((begun, slot)) = taken else {
            count(&worker.counters.refused);
            if door == Door::Http {
                // A fresh socket takes these few bytes at once, or the client does without.
                let _ = stream.try_write(TOO_MANY);
            }
            continue;
        };
        tokio::task::spawn_local(connection(worker.clone(), (slot, begun), address, door, stream));
    }
}

async fn connection(worker: Rc<Worker>, (slot, begun): (Slot, Option<Handshake>), address: SocketAddr, door: Door, stream: TcpStream) {
    if door == Door::Http {
        let client = Client::new(&worker, address, Over::Plain, slot);
        return http1::run(worker, client, Either::Left(stream)).await;
    }
    let tls = match Box::pin(handshake(&worker.edge, door, stream)).await {
        Ok(tls) => tls,
        Err(error) => {
            count(&worker.counters.handshake_failures);
            return tracing::debug!(client = %address, %error, "TLS handshake failed");
        }
    };
    drop(begun);
    if door == Door::Hop {
        // Whatever TLS was set up to ask for, `is_member` decides about each request.
        let shown = tls.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        let client = Client::edge(&worker, address, shown, slot);
        http1::run(worker, client, Either::Right(tls)).await;
    } else if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
        let client = Client::new(&worker, address, Over::Http2, slot);
        Box::pin(http2::run(worker, client, tls)).await;
    } else {
        let client = Client::new(&worker, address, Over::Tls, slot);
        http1::run(worker, client, Either::Right(tls)).await;
    }
}

/// Boxed, as what it comes to: a connection's task is as big as the biggest thing in it.
async fn handshake(edge: &Edge, door: Door, stream: TcpStream) -> io::Result<Box<TlsStream<TcpStream>>> {
    let fleet = edge.fleet.as_ref().filter(|_| door == Door::Hop);
    let config = fleet.map_or_else(|| edge.tls.clone(), |fleet| (fleet.tls_server)());
    let handshake = TlsAcceptor::from(config).accept(stream);
    match tokio::time::timeout(edge.limits.handshake_timeout, handshake).await {
        Ok(accepted) => accepted.map(Box::new),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_has_a_worker_and_every_worker_a_socket() {
        let all: Vec<TcpListener> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        for (sockets, workers, shared) in [(1, 1, false), (1, 2, true), (2, 2, false), (4, 2, false), (3, 4, true)] {
            let all = &all[..sockets];
            let of = |n| of_worker(all, n, workers).map(port).collect::<Vec<_>>();
            let mut served: Vec<u16> = (0..workers).flat_map(of).collect();
            assert!((0..workers).all(|n| !of(n).is_empty()));
            served.sort_unstable();
            let mut expected: Vec<u16> = all.iter().map(port).collect();
            expected.sort_unstable();
            if shared {
                served.dedup();
            }
            assert_eq!(served, expected, "{sockets} sockets, {workers} workers");
        }
    }
}
