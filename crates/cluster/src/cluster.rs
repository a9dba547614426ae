//! The handle: what the rest of a process does with the cluster.

use crate::authority::{Issued, PublicKeys, log_name};
use crate::dial_back::{self, DialedBack};
use crate::flock::{self, Command, Driver, HOLD_MS, Inlets, Keep, Seen};
use crate::link::{Expect, Handler, Inbox, Links, Runs, Target};
use crate::live::View;
use crate::member::{self, Member, MemberError, now_ms};
use crate::removal::{self, RemovalNotice};
use crate::status::{self, ClusterStatus, MemberStatus, TransportCounts};
use crate::stream::{Service, Stream};
use crate::thread::Thread;
use crate::tls::{self, Tls, TlsError};
use arc_swap::ArcSwap;
use dunlin_gossip::{Certificate, Config, Identity, Node, Now, OriginId, Peer};
use dunlin_model::{AppName, HostId, Region};
use dunlin_view::{ConfigState, Freshness};
use ed25519_dalek::SigningKey;
use rustls_pki_types::{CertificateDer, ServerName};
use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What has come and was not given to gossip yet. Datagrams have at most 1,200 bytes, messages 288 KiB.
const DAY_MS: u64 = 24 * 3600 * 1000;
const MAX_DATAGRAMS: usize = 4_096;
const MAX_MESSAGES: usize = 32;
const MAX_COMMANDS: usize = 256;

/// Says that what runs of an app in another region is needed here; whether that was taken. It comes by the view, and goes
/// again some time after this was last said.
pub type SeeDetail = Box<dyn Fn(&Region, &AppName) -> bool + Send + Sync>;

pub struct ClusterConfig {
    pub member: Member,
    /// Bound; it may have been there before this process, so that what comes meanwhile waits in it.
    pub socket: UdpSocket,
    /// Where the others reach it. Port 0 means the one that was bound.
    pub advertise: SocketAddr,
    /// `<data>/cluster`.
    pub dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("the cluster's UDP socket cannot be used")]
    Socket(#[source] io::Error),
    #[error("no thread can be started for the cluster")]
    Thread(#[source] io::Error),
    #[error("others cannot reach a host at {0}: give an address of this host's, such as its public one")]
    Advertise(SocketAddr),
    #[error("what this host knows of its cluster cannot be read from {}: check the folder's permissions", .dir.display())]
    Disk { dir: PathBuf, source: io::Error },
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// This host's part in the cluster. A clone is the same.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    links: Links,
    tls: Arc<Tls>,
    view: View,
    dir: PathBuf,
    commands: mpsc::Sender<Command>,
    certificate_ends_ms: AtomicU64,
    is_removed: AtomicBool,
    stop: CancellationToken,
    driver: Mutex<Option<JoinHandle<()>>>,
    /// It outlives all that runs on it.
    _thread: Thread,
}

/// What the driver and the handle share.
pub(crate) struct Shared {
    pub member: Member,
    pub seen: ArcSwap<Seen>,
}

impl Cluster {
    /// Binds, begins from what the last process has left, and finds the others.
    pub async fn start(config: ClusterConfig, view: View) -> Result<Self, ClusterError> {
        let ClusterConfig { member, socket, advertise, dir } = config;
        if advertise.ip().is_unspecified() {
            return Err(ClusterError::Advertise(advertise));
        }
        let tls = Arc::new(Tls::new(&member.host, &member.keys, &member.issued)?);
        let removed: BTreeSet<HostId> = view.current().config.removed_hosts.iter().filter(|host| **host != member.host).cloned().collect();
        tls.refuse(removed);
        let (datagrams, datagrams_in) = mpsc::channel(MAX_DATAGRAMS);
        let (messages, messages_in) = mpsc::channel(MAX_MESSAGES);
        let (commands, commands_in) = mpsc::channel(MAX_COMMANDS);
        let inbox = Inbox { datagrams, messages };
        let thread = Thread::start().map_err(ClusterError::Thread)?;
        let at = Runs { own: thread.handle().clone(), callers: Handle::current() };
        let links = Links::start(&member.host, tls.clone(), (socket, member.keys.reset_key()?), advertise, inbox, at).map_err(ClusterError::Socket)?;
        let node = node(&member, links.advertised(), &dir)?;
        let shared = Arc::new(Shared { member, seen: ArcSwap::default() });
        let stop = CancellationToken::new();
        let inlets = Inlets { datagrams: datagrams_in, messages: messages_in, commands: commands_in, stop: stop.clone() };
        let is_removed = RemovalNotice::load(&dir, &shared.member)?.is_some();
        if is_removed {
            // Before anybody acts on what was desired until then. A generation is not older than itself.
            let known = view.current();
            let _ = view.publish_config(removal::without(ConfigState::clone(&known.config), &shared.member.host, &known), now_ms());
        }
        let machines = (shared.member.machines_log_certificate()?, shared.member.keys.gossip()?);
        let mut driver = Driver::new(node, links.clone(), view.clone(), tls.clone(), shared.clone(), Keep::new(&dir));
        driver.is_removed = is_removed;
        let driver = Mutex::new(Some(thread.handle().spawn(driver.run(machines, inlets))));
        let certificate_ends_ms = AtomicU64::new(shared.member.issued.not_after_ms);
        let is_removed = AtomicBool::new(is_removed);
        let inner = Inner { shared, links, tls, view, dir, commands, certificate_ends_ms, is_removed, stop, driver, _thread: thread };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where the others reach this host.
    pub fn advertised(&self) -> SocketAddr {
        self.inner.links.advertised()
    }

    pub fn host(&self) -> &HostId {
        &self.inner.shared.member.host
    }

    /// Streams for `service` that others open are given to the handler. A later one replaces it.
    pub fn serve(&self, service: Service, handler: Handler) {
        self.inner.links.serve(service, handler);
    }

    /// Opens a stream; dials if need be, for some seconds at most. A host that has just died may be noticed only on the stream.
    pub async fn open(&self, host: &HostId, service: Service) -> io::Result<Stream> {
        let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("it is not known where host {host} is"));
        let addr = self.address(host).ok_or_else(unknown)?;
        self.inner.links.open(Target { addr, expect: Expect::Host(host.clone()) }, service).await
    }

    /// A byte there and back.
    pub async fn ping(&self, host: &HostId, deadline: Duration) -> io::Result<Duration> {
        let ping = async {
            let mut stream = self.open(host, Service::Ping).await?;
            let began = Instant::now();
            stream.write_u8(0).await?;
            stream.shutdown().await?;
            stream.read_u8().await?;
            Ok(began.elapsed())
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("host {host} does not answer within {deadline:?}"));
        tokio::time::timeout(deadline, ping).await.map_err(late)?
    }

    /// Whether a host that joins is reached at the address that it says it has, and is the one with these keys. A few seconds at most.
    pub async fn dial_back(&self, addr: SocketAddr, keys: &PublicKeys) -> DialedBack {
        dial_back::dial_back(&self.inner.links, addr, keys).await
    }

    /// Where a host is, by membership, or as it was when this one joined. The port is that of TCP, too.
    pub fn address(&self, host: &HostId) -> Option<SocketAddr> {
        if *host == self.inner.shared.member.host {
            return Some(self.advertised());
        }
        if self.inner.tls.is_removed(host) {
            return None;
        }
        let seat = self.inner.shared.seen.load().members.get(&origin(host)).map(|seat| seat.addr);
        let seed = || self.inner.shared.member.peers.iter().find(|(peer, _)| peer == host).map(|(_, addr)| *addr);
        seat.or_else(seed)
    }

    /// All hosts that are known, without this one.
    pub fn members(&self) -> Vec<MemberStatus> {
        let (seen, view) = (self.inner.shared.seen.load_full(), self.inner.view.current());
        let others = seen.names.iter().filter(|(_, host)| **host != self.inner.shared.member.host && !self.inner.tls.is_removed(host));
        let status = |(origin, host): (&OriginId, &HostId)| {
            let seat = seen.members.get(origin);
            MemberStatus {
                id: host.clone(),
                region: seat.and_then(|seat| seat.region.clone()).or_else(|| seen.regions.get(origin).cloned()),
                address: self.address(host),
                alive: seat.is_some(),
                freshness: view.heard.get(host).copied().unwrap_or(Freshness::Old),
                age_ms: seen.ages_ms.get(origin).copied().flatten(),
                rtt_us: self.rtt(host).map(|rtt| rtt.as_micros() as u64),
            }
        };
        others.map(status).collect()
    }

    /// Membership's word: the host answers. Of this one it is true.
    pub fn is_up(&self, host: &HostId) -> bool {
        *host == self.inner.shared.member.host || self.inner.shared.seen.load().members.contains_key(&origin(host))
    }

    /// Of the connection with it, if there is one.
    pub fn rtt(&self, host: &HostId) -> Option<Duration> {
        self.inner.links.rtt(host)
    }

    /// For the last hop over TCP: whoever dials must show a host's certificate; [`Self::peer_host`] says whose.
    pub fn tls_server(&self) -> Arc<rustls::ServerConfig> {
        self.inner.tls.server.clone()
    }

    /// Its counterpart; ask for [`Self::server_name`].
    pub fn tls_client(&self) -> Arc<rustls::ClientConfig> {
        self.inner.tls.client.clone()
    }

    pub fn server_name(host: &HostId) -> ServerName<'static> {
        tls::server_name(host)
    }

    /// Who is on the other side of a TLS connection.
    pub fn peer_host(certificates: &[CertificateDer<'_>]) -> Option<HostId> {
        tls::peer_host(certificates)
    }

    /// From now on this process says what desired state is: the view's, whenever it changes. See
    /// [`Authority::config_log`](crate::Authority::config_log).
    pub fn publish_config_of(&self, certificate: Certificate, key: SigningKey) {
        let command = Command::PublishConfig { certificate: Box::new(certificate), key: Box::new(key) };
        if self.inner.commands.try_send(command).is_err() && !self.inner.stop.is_cancelled() {
            tracing::error!("desired state is not published: the cluster's driver does not answer");
        }
    }

    /// See [`SeeDetail`]; it stays for ten minutes.
    pub fn see_detail(&self, region: &Region, app: &AppName) -> bool {
        self.inner.commands.try_send(Command::SeeDetail { region: region.clone(), app: app.clone() }).is_ok()
    }

    #[cfg(test)]
    pub(crate) async fn pass(&self, time: Duration) {
        self.inner.commands.send(Command::Pass(time)).await.unwrap();
    }

    /// Control's word that this host was removed for good, from whomever it came; whether it was to be believed. Then what this host
    /// has for the cluster is destroyed, as by tombstones of all its machines, now and after each start.
    pub async fn removed(&self, notice: &RemovalNotice) -> Result<bool, MemberError> {
        if !notice.is_for(&self.inner.shared.member) {
            return Ok(false);
        }
        notice.save(&self.inner.dir)?;
        self.inner.is_removed.store(true, Ordering::Relaxed);
        let _ = self.inner.commands.send(Command::Removed).await; // without a driver the process is about to end
        Ok(true)
    }

    /// Whether it has heard so, lately or long ago.
    pub fn is_removed(&self) -> bool {
        self.inner.is_removed.load(Ordering::Relaxed)
    }

    /// Whether another process has this host's identity, so that this one says nothing; [`Self::status`] says which.
    pub fn is_silenced(&self) -> bool {
        self.inner.shared.seen.load().silenced.is_some()
    }

    pub fn status(&self) -> ClusterStatus {
        let seen = self.inner.shared.seen.load_full();
        let counters = self.inner.links.counters();
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        ClusterStatus {
            speaks: seen.speaks,
            silenced: seen.silenced.clone(),
            removed: self.is_removed(),
            cut_off: self.inner.view.current().is_cut_off(),
            certificate_days_left: self.inner.certificate_ends_ms.load(Ordering::Relaxed).saturating_sub(now_ms()) / DAY_MS,
            members: seen.members.len(),
            logs: seen.logs.clone(),
            compared: seen.compared.clone(),
            gossip: seen.gossip,
            transport: TransportCounts {
                links: self.inner.links.connected().len() as u64,
                dials: read(&counters.dials),
                dials_failed: read(&counters.dials_failed),
                accepted: read(&counters.accepted),
                refused: read(&counters.refused),
                joiners: read(&counters.joiners),
                dropped_out: read(&counters.dropped_out),
                dropped_in: read(&counters.dropped_in),
            },
        }
    }

    /// Compares all that is held with what its writers signed; gives the names of logs that are not sound. `None`: the
    /// driver has ended, and nobody can tell.
    pub async fn verify(&self) -> Option<Vec<String>> {
        let (reply, answer) = oneshot::channel();
        self.inner.commands.send(Command::Verify(reply)).await.ok()?;
        answer.await.ok()
    }

    pub fn render_metrics(&self, out: &mut String) {
        status::render(&self.status(), out);
    }

    /// Shows a new certificate from now on. It is not kept: whether the others take it is to be seen first.
    pub fn show(&self, issued: &Issued) -> Result<(), ClusterError> {
        Ok(self.inner.tls.renew(&self.inner.shared.member.keys, issued)?)
    }

    /// Shows a new certificate from now on, and keeps it.
    pub fn renew(&self, issued: Issued) -> Result<(), ClusterError> {
        let member = &self.inner.shared.member;
        self.inner.tls.renew(&member.keys, &issued)?;
        let ends_ms = issued.not_after_ms;
        // What else is on disk may have changed since the start: where control is.
        let kept = Member::load(&self.inner.dir)?.unwrap_or_else(|| member.clone());
        Member { issued, ..kept }.save(&self.inner.dir)?;
        self.inner.certificate_ends_ms.store(ends_ms, Ordering::Relaxed);
        Ok(())
    }

    /// Says good-bye, saves, closes.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        let driver = self.inner.driver.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(driver) = driver
            && driver.await.is_err()
        {
            tracing::error!("the cluster's driver has panicked");
        }
        self.inner.links.close().await;
    }
}

fn origin(host: &HostId) -> OriginId {
    OriginId::of(&log_name(host))
}

/// A new life of this host in gossip.
fn node(member: &Member, advertised: SocketAddr, dir: &std::path::Path) -> Result<Node, ClusterError> {
    let cluster = member.cluster_key()?;
    let snapshot = flock::load(dir, cluster).map_err(|source| ClusterError::Disk { dir: dir.to_owned(), source })?;
    let region = crate::authority::region_of(&member.region);
    // Of peers from before only the address matters; their regions are heard from themselves.
    let peer = |(host, at): &(HostId, SocketAddr)| Peer {
        id: origin(host),
        region: region.clone(),
        addr: flock::addr(*at),
        life: 0,
        started_ms: 0,
        renewed: 0,
    };
    let peers = member.peers.iter().filter(|(host, _)| *host != member.host).map(peer).collect();
    let config = Config { cluster, seed: u64::from_le_bytes(member::random()), peers, membership: true, hold_ms: HOLD_MS };
    let identity = Identity {
        certificate: member.log_certificate()?,
        key: member.keys.gossip()?,
        addr: flock::addr(advertised),
        life: u64::from_le_bytes(member::random()),
    };
    // Control plans over all regions, those that are away as it starts included.
    let begin = if member.control == member.host { Node::keeping_far } else { Node::new };
    Ok(begin(config, identity, snapshot, Now { ms: 0, wall_ms: now_ms() }))
}
