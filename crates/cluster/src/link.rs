//! Connections to the other hosts: one QUIC endpoint, mutual TLS, one connection a peer that both sides use.
//!
//! ```text
//! send, open --> a link? use it
//!                no: dial (once for all who want it), wait; after a failure rest, longer each time
//! accepted   --> certificate? hello both ways --> a link
//!                none: one stream, to join
//! ```
//!
//! A peer is found by its address, and believed by its certificate: the address says where, the certificate who. In the hello
//! each tells where it says that it is, so that a message's sender has one address however its packets came.

mod accept;
mod dial;
mod hello;
mod reset;
mod shares;

use crate::authority::log_name;
use crate::stream::{CANCELLED, Service, Stream};
use crate::tls::Tls;
use dial::Dial;
use dunlin_gossip::{MAX_CHUNK_BYTES, OriginId};
use dunlin_model::HostId;
use futures_util::future::BoxFuture;
use hello::Hello;
use shares::Shares;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AckFrequencyConfig, ClientConfig, Connection, Endpoint, IdleTimeout, TransportConfig, VarInt};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What this host does for the others. Without a host: for a joiner, which has no certificate, and only [`Service::Join`].
pub type Handler = Arc<dyn Fn(Option<HostId>, Stream) -> BoxFuture<'static, ()> + Send + Sync>;

/// A message of gossip is as long as a chunk and a little.
const MAX_MESSAGE_BYTES: usize = MAX_CHUNK_BYTES + (32 << 10);
/// On their way to one peer; further ones are dropped, which anti-entropy repairs. A whole log of gossip's largest fits.
const MAX_WAITING_MESSAGES: usize = 320;
/// Messages that one peer may have on their way at once; they are taken one after the other.
const MAX_MESSAGE_STREAMS: VarInt = VarInt::from_u32(8);
/// Exchanges that one peer may have open.
const MAX_STREAMS: VarInt = VarInt::from_u32(2_048);
/// A longer one would hold up those behind it.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(10);
const OPEN_DEADLINE: Duration = Duration::from_secs(5);
/// Unread bytes of one peer, all its streams together.
const RECEIVE_WINDOW: VarInt = VarInt::from_u32(32 << 20);
/// Of somebody who has shown no certificate (yet).
const STRANGERS_WINDOW: VarInt = VarInt::from_u32(64 << 10);
const DATAGRAM_BUFFER_BYTES: usize = 1 << 20;
/// A gossip's datagram fits from the first packet on.
const INITIAL_MTU: u16 = 1_280;
/// Packets that are acknowledged together, within QUIC's 25 ms: an acknowledgement costs as much as a datagram of gossip, and most go
/// along with the next one.
const ACK_EVERY: VarInt = VarInt::from_u32(16);
const KEEP_ALIVE: Duration = Duration::from_secs(4);
const IDLE: Duration = Duration::from_secs(12);
/// How long one of two connections that were dialed at once stays for what is on its way.
const SPARE: Duration = Duration::from_secs(5);
/// Of one host, at all addresses: more is a host that lies about them.
const MAX_LINKS_OF_HOST: usize = 8;

const LEAVING: VarInt = VarInt::from_u32(0);
const REMOVED: VarInt = VarInt::from_u32(3);
const REPLACED: VarInt = VarInt::from_u32(4);

/// Who is wanted at an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Expect {
    Host(HostId),
    /// Whoever writes this log.
    Writer(OriginId),
    AnyHost,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Target {
    pub addr: SocketAddr,
    pub expect: Expect,
}

/// What another host has sent to gossip.
pub(crate) struct Arrival {
    pub from: SocketAddr,
    pub bytes: Vec<u8>,
}

pub(crate) enum Packet {
    Datagram(Vec<u8>),
    Message(Vec<u8>),
}

/// Where arrivals go. Datagrams are dropped when it is full; messages wait, and with them their sender.
#[derive(Clone)]
pub(crate) struct Inbox {
    pub datagrams: mpsc::Sender<Arrival>,
    pub messages: mpsc::Sender<Arrival>,
}

/// What an operator sees of the transport. Counts since the start.
#[derive(Default)]
pub(crate) struct LinkCounters {
    pub dials: AtomicU64,
    pub dials_failed: AtomicU64,
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub joiners: AtomicU64,
    pub dropped_out: AtomicU64,
    pub dropped_in: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(crate) struct Link {
    pub host: HostId,
    pub origin: OriginId,
    /// Where it says that it is.
    pub addr: SocketAddr,
    /// Random, one a process.
    process: u64,
    dialed_here: bool,
    pub connection: Connection,
    messages: mpsc::Sender<Vec<u8>>,
    /// Another connection is used from now on.
    spare: CancellationToken,
}

/// A clone is the same.
#[derive(Clone)]
pub(crate) struct Links {
    inner: Arc<Inner>,
}

struct Inner {
    host: HostId,
    hello: Hello,
    /// Until it is closed: then the port is free again.
    endpoint: Mutex<Option<Endpoint>>,
    tls: Arc<Tls>,
    dial_named: ClientConfig,
    dial_any: ClientConfig,
    table: Mutex<Table>,
    handlers: Mutex<BTreeMap<Service, Handler>>,
    inbox: Inbox,
    tasks: TaskTracker,
    at: Runs,
    stop: CancellationToken,
    counters: LinkCounters,
    /// Handshakes, with and without proof of where the other is.
    proven: Arc<Shares>,
    unproven: Arc<Shares>,
    joiners: Arc<Shares>,
}

/// Where tasks run.
pub(crate) struct Runs {
    pub own: Handle,
    /// The runtime of whoever started the cluster.
    pub callers: Handle,
}

#[derive(Default)]
struct Table {
    links: BTreeMap<SocketAddr, Vec<Arc<Link>>>,
    dials: HashMap<Target, Dial>,
}

impl Links {
    /// Serves at a bound socket. `advertise` with port 0 means the port that was bound.
    pub fn start(host: &HostId, tls: Arc<Tls>, (socket, reset_key): (UdpSocket, [u8; 32]), advertise: SocketAddr, inbox: Inbox, at: Runs) -> io::Result<Self> {
        let bound = socket.local_addr()?;
        let _here = at.own.enter(); // QUIC's own tasks are where its endpoint is made
        let port = if advertise.port() == 0 { bound.port() } else { advertise.port() };
        let hello = Hello { process: u64::from_le_bytes(crate::member::random()), addr: SocketAddr::new(advertise.ip(), port) };
        let server = QuicServerConfig::try_from(tls.quic_server.clone()).map_err(io::Error::other)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(Arc::new(transport(Side::Accepts)));
        let runtime = quinn::default_runtime().ok_or_else(|| io::Error::other("there is no async runtime"))?;
        let endpoint = Endpoint::new(reset::endpoint_config(reset_key), Some(server), socket, runtime)?;
        let dials = Arc::new(transport(Side::Dials));
        let client = |config: &Arc<rustls::ClientConfig>| -> io::Result<ClientConfig> {
            let crypto = QuicClientConfig::try_from(config.clone()).map_err(io::Error::other)?;
            let mut client = ClientConfig::new(Arc::new(crypto));
            client.transport_config(dials.clone());
            Ok(client)
        };
        let inner = Inner {
            host: host.clone(),
            hello,
            dial_named: client(&tls.quic_client)?,
            dial_any: client(&tls.quic_client_of_any)?,
            endpoint: Mutex::new(Some(endpoint)),
            tls,
            table: Mutex::default(),
            handlers: Mutex::default(),
            inbox,
            tasks: TaskTracker::new(),
            at,
            stop: CancellationToken::new(),
            counters: LinkCounters::default(),
            proven: Shares::new(accept::MAX_PROVEN, accept::MAX_PROVEN_EACH),
            unproven: Shares::new(accept::MAX_UNPROVEN, accept::MAX_UNPROVEN),
            joiners: Shares::new(accept::MAX_JOINERS, accept::MAX_JOINERS_EACH),
        };
        let links = Self { inner: Arc::new(inner) };
        links.spawn(links.clone().accept());
        Ok(links)
    }

    /// Where this process says that it is.
    pub fn advertised(&self) -> SocketAddr {
        self.inner.hello.addr
    }

    pub fn counters(&self) -> &LinkCounters {
        &self.inner.counters
    }

    pub fn serve(&self, service: Service, handler: Handler) {
        self.inner.handlers.lock().unwrap_or_else(PoisonError::into_inner).insert(service, handler);
    }

    /// Sends, or drops it and counts that; never waits.
    pub fn send(&self, target: Target, packet: Packet) {
        let mut table = self.table();
        let sent = match table.find(&target) {
            Some(link) => {
                drop(table);
                link.send(packet)
            }
            None => self.send_when_dialed(&mut table, target, packet),
        };
        if !sent {
            count(&self.inner.counters.dropped_out);
        }
    }

    /// Opens a stream. That the host is gone may show only later, on the stream.
    pub async fn open(&self, target: Target, service: Service) -> io::Result<Stream> {
        let open = async {
            let link = self.link(&target).await?;
            let (send, recv) = link.connection.open_bi().await?;
            let mut stream = Stream::new(send, recv);
            stream.write_u8(service as u8).await?;
            Ok(stream)
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("{} cannot be reached within {OPEN_DEADLINE:?}", target.addr));
        tokio::time::timeout(OPEN_DEADLINE, open).await.map_err(late)?
    }

    pub fn rtt(&self, host: &HostId) -> Option<Duration> {
        let table = self.table();
        let mut links = table.links.values().flatten();
        links.find(|link| link.host == *host && link.is_open()).map(|link| link.connection.rtt())
    }

    /// Each once.
    pub fn connected(&self) -> Vec<Arc<Link>> {
        let table = self.table();
        let mut links: Vec<Arc<Link>> = table.links.values().flatten().filter(|link| link.is_open()).cloned().collect();
        links.sort_by_key(|link| link.connection.stable_id());
        links.dedup_by_key(|link| link.connection.stable_id());
        links
    }

    /// Closes what there is with hosts that are refused from now on.
    pub fn cut_off_removed(&self) {
        for link in self.connected().into_iter().filter(|link| self.inner.tls.is_removed(&link.host)) {
            link.connection.close(REMOVED, b"this host was removed from the cluster");
        }
    }

    /// Waits until what was sent has left, but not for long; then closes everything.
    pub async fn close(&self) {
        let left = async {
            for link in self.connected() {
                while link.is_open() && link.connection.datagram_send_buffer_space() < DATAGRAM_BUFFER_BYTES {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(200), left).await; // what has not left by then is lost
        self.inner.stop.cancel();
        let endpoint = self.inner.endpoint.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(endpoint) = endpoint else { return };
        endpoint.close(LEAVING, b"leaving");
        self.inner.tasks.close();
        let ended = async {
            self.inner.tasks.wait().await;
            endpoint.wait_idle().await;
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), ended).await; // the peers notice by themselves then
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.tasks.spawn_on(work, &self.inner.at.own);
    }

    /// What others want of this host is not done where datagrams wait for it.
    fn spawn_service(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.tasks.spawn_on(work, &self.inner.at.callers);
    }

    fn endpoint(&self) -> io::Result<Endpoint> {
        let endpoint = self.inner.endpoint.lock().unwrap_or_else(PoisonError::into_inner).clone();
        endpoint.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "this host has left the cluster"))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change leaves the table whole: a panic elsewhere broke nothing.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection whose other side has shown who it is becomes the one that is used, or a spare one.
    fn add(&self, connection: Connection, host: HostId, theirs: Hello, dialed: Option<SocketAddr>) -> Arc<Link> {
        let (messages, waiting) = mpsc::channel(MAX_WAITING_MESSAGES);
        connection.set_max_concurrent_bi_streams(MAX_STREAMS);
        connection.set_max_concurrent_uni_streams(MAX_MESSAGE_STREAMS);
        connection.set_receive_window(RECEIVE_WINDOW);
        let origin = OriginId::of(&log_name(&host));
        let (addr, process, dialed_here) = (theirs.addr, theirs.process, dialed.is_some());
        let link = Arc::new(Link { host, origin, addr, process, dialed_here, connection, messages, spare: CancellationToken::new() });
        let mut table = self.table();
        table.insert(&self.inner.host, addr, &link);
        if let Some(dialed) = dialed.filter(|dialed| *dialed != addr) {
            table.insert(&self.inner.host, dialed, &link);
        }
        table.bound(&link.host);
        drop(table);
        self.spawn(self.clone().run(link.clone(), waiting));
        link
    }

    /// Until the connection ends or is not needed any more.
    async fn run(self, link: Arc<Link>, waiting: mpsc::Receiver<Vec<u8>>) {
        let spare = async {
            link.spare.cancelled().await;
            tokio::time::sleep(SPARE).await;
        };
        tokio::select! {
            () = self.receive_datagrams(&link) => {}
            () = self.receive_messages(&link) => {}
            () = self.receive_streams(&link) => {}
            () = self.send_messages(&link, waiting) => {}
            () = spare => {}
            () = self.inner.stop.cancelled() => {}
        }
        self.table().forget(&link);
    }

    async fn receive_datagrams(&self, link: &Link) {
        while let Ok(bytes) = link.connection.read_datagram().await {
            let arrival = Arrival { from: link.addr, bytes: bytes.into() };
            if self.inner.inbox.datagrams.try_send(arrival).is_err() {
                count(&self.inner.counters.dropped_in);
            }
        }
    }

    /// One after the other, as they were begun: parts of a log have an order.
    async fn receive_messages(&self, link: &Link) {
        while let Ok(mut stream) = link.connection.accept_uni().await {
            match tokio::time::timeout(MESSAGE_DEADLINE, stream.read_to_end(MAX_MESSAGE_BYTES)).await {
                Ok(Ok(bytes)) => {
                    if self.inner.inbox.messages.send(Arrival { from: link.addr, bytes }).await.is_err() {
                        return;
                    }
                }
                Ok(Err(_)) | Err(_) => count(&self.inner.counters.dropped_in),
            }
        }
    }

    async fn send_messages(&self, link: &Link, mut waiting: mpsc::Receiver<Vec<u8>>) {
        while let Some(bytes) = waiting.recv().await {
            let send = async {
                let mut stream = link.connection.open_uni().await?;
                stream.set_priority(1).map_err(io::Error::other)?; // before what fills the link, such as images
                stream.write_all(&bytes).await.map_err(io::Error::other)?;
                stream.finish().map_err(io::Error::other)
            };
            if !matches!(tokio::time::timeout(MESSAGE_DEADLINE, send).await, Ok(Ok(()))) {
                count(&self.inner.counters.dropped_out);
            }
            if !link.is_open() {
                return;
            }
        }
    }
}

impl Link {
    pub fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Whether it is on its way.
    fn send(&self, packet: Packet) -> bool {
        match packet {
            Packet::Datagram(bytes) if self.connection.max_datagram_size().is_some_and(|most| bytes.len() <= most) => {
                self.connection.send_datagram(bytes.into()).is_ok()
            }
            // On a path with small packets a stream carries it.
            Packet::Datagram(bytes) | Packet::Message(bytes) => self.messages.try_send(bytes).is_ok(),
        }
    }

    fn dialer<'a>(&'a self, here: &'a HostId) -> &'a HostId {
        if self.dialed_here { here } else { &self.host }
    }
}

impl Expect {
    fn admits(&self, host: &HostId, origin: OriginId) -> bool {
        match self {
            Self::Host(expected) => expected == host,
            Self::Writer(expected) => *expected == origin,
            Self::AnyHost => true,
        }
    }
}

impl Table {
    fn find(&self, target: &Target) -> Option<Arc<Link>> {
        let mut there = self.links.get(&target.addr)?.iter();
        there.find(|link| target.expect.admits(&link.host, link.origin) && link.is_open()).cloned()
    }

    /// Where both sides have dialed at once, both keep the connection that the lower host has dialed. A new process of a host
    /// replaces the old one, whose end may not have been noticed.
    fn insert(&mut self, here: &HostId, addr: SocketAddr, link: &Arc<Link>) {
        let there = self.links.entry(addr).or_default();
        if let Some(at) = there.iter().position(|old| old.host == link.host) {
            let old = &there[at];
            let keeps_old = old.is_open() && old.process == link.process && old.dialer(here) < link.dialer(here);
            if keeps_old {
                link.become_spare();
                return;
            }
            let old = there.swap_remove(at);
            if old.process == link.process { old.become_spare() } else { old.connection.close(REPLACED, b"a newer process") }
        }
        there.push(link.clone());
    }

    /// Whether another host answers at `addr`, as this one has seen by dialing it.
    fn is_anothers(&self, addr: SocketAddr, host: &HostId) -> bool {
        let mut there = self.links.get(&addr).into_iter().flatten();
        there.any(|link| link.host != *host && link.dialed_here && link.is_open())
    }

    fn bound(&mut self, host: &HostId) {
        let of_host = self.links.values().flatten().filter(|link| link.host == *host);
        let oldest = of_host.clone().min_by_key(|link| link.connection.stable_id()).cloned();
        if let Some(oldest) = oldest.filter(|_| of_host.count() > MAX_LINKS_OF_HOST) {
            oldest.connection.close(CANCELLED, b"too many connections");
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, link: &Link) {
        let id = link.connection.stable_id();
        self.links.retain(|_, there| {
            there.retain(|link| link.connection.stable_id() != id);
            !there.is_empty()
        });
    }
}

impl Link {
    /// Who has dialed it gives it up; the other side sees it end.
    fn become_spare(&self) {
        if self.dialed_here {
            self.spare.cancel();
        }
    }
}

enum Side {
    Dials,
    Accepts,
}

/// Whoever accepts does not know yet with whom it speaks: what is allowed is raised once it does.
fn transport(side: Side) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(IDLE).expect("a few seconds are no overflow");
    config.max_idle_timeout(Some(idle)).keep_alive_interval(Some(KEEP_ALIVE));
    config.initial_mtu(INITIAL_MTU).datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES)).datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY);
    config.ack_frequency_config(Some(acks));
    config.max_concurrent_uni_streams(VarInt::from_u32(0)).receive_window(STRANGERS_WINDOW);
    config.max_concurrent_bidi_streams(match side {
        Side::Dials => VarInt::from_u32(0),
        Side::Accepts => VarInt::from_u32(1),
    });
    config
}

/// Of a host that joins, and with one: the other side opens nothing.
pub(crate) fn transport_to_join() -> TransportConfig {
    transport(Side::Dials)
}
