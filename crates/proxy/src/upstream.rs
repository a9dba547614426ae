//! Connections to machines: one pool a core, last in first out, each connection in the hands of the request
//! that uses it.
//!
//! A service that counts requests shares the pool among all clients. One that counts connections has each kept
//! connection counted until it is closed, so it is kept for a shorter time, and for the client's connection that
//! it was made for; when that has ended, for whoever is next sent to the same machine.
//!
//! Whoever closes a connection first keeps its port for a minute (TIME_WAIT), and a machine can be reached from
//! some 28,000 ports: closing one after each request, the edge would run out of them at 470 requests a second.
//! So connections are handed on where they can be, and where the machine is about to close, it closes first.

use crate::buffer::{Buffers, Inbox};
use crate::choose::Held;
use crate::hop::Fleet;
use crate::io::{UpstreamIo, is_quiet};
use crate::limits::Limits;
use crate::listen::{HOST_GONE_AFTER, watch_host};
use crate::metrics::{Counters, count};
use dunlin_model::{AppName, ConcurrencyKind, HostId, MachineVersion};
use dunlin_routing::Candidate;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;

/// Servers close idle connections, some after five seconds: before that, we do.
const KEEP_IDLE: Duration = Duration::from_secs(4);
/// Last hops keep connections for longer than this: here the edge is the one that knows when to close.
const KEEP_IDLE_HOP: Duration = Duration::from_secs(60);
/// A host that acknowledges nothing of a request for so long is not reached; what may be sent again goes elsewhere. As long
/// as a connection may take to be made.
pub(crate) const HEAD_TAKEN_WITHIN: Duration = Duration::from_secs(3);
/// Idle connections kept to one machine, on one core. As many as a burst over HTTP/2 uses: with fewer every
/// second request of such load made a connection. There are no more than requests within `KEEP_IDLE` anyway.
const MAX_IDLE: usize = 512;
/// How long a machine may take to close what it said it would, and how many such are waited for on one core.
const PART_WITHIN: Duration = Duration::from_secs(1);
const MAX_PARTING: usize = 1024;

/// Where a request goes.
#[derive(Clone)]
pub(crate) enum Upstream {
    Machine { target: Arc<Candidate>, address: SocketAddr },
    /// A machine on another host, by way of that host. Where this edge doubts what it knows, that host's edge may choose another.
    Hop { target: Arc<Candidate>, is_doubtful: bool },
    /// A machine that another edge asked for. `once` = the connection is for one request.
    Admitted { version: MachineVersion, address: SocketAddr, once: bool },
    Internal(Arc<Path>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Address {
    Socket(SocketAddr),
    /// Verified to be it, whatever its address.
    Host(HostId),
    Path(Arc<Path>),
}

impl Upstream {
    /// What its limits count are connections, not requests.
    pub fn counts_connections(&self) -> bool {
        match self {
            Self::Machine { target, .. } => target.service.concurrency.kind == ConcurrencyKind::Connections,
            Self::Hop { .. } | Self::Admitted { .. } | Self::Internal(_) => false,
        }
    }

    /// A connection may carry several requests.
    fn is_kept(&self) -> bool {
        !matches!(self, Self::Admitted { once: true, .. })
    }

    fn keep_idle(&self) -> Duration {
        if matches!(self, Self::Hop { .. }) { KEEP_IDLE_HOP } else { KEEP_IDLE }
    }

    fn address(&self) -> Address {
        match self {
            Self::Machine { address, .. } | Self::Admitted { address, .. } => Address::Socket(*address),
            Self::Hop { target, .. } => Address::Host(target.host.clone()),
            Self::Internal(path) => Address::Path(path.clone()),
        }
    }

    /// The successor of a machine's version may listen at the same address.
    fn is_same_version(&self, other: &Self) -> bool {
        self.version() == other.version()
    }

    /// Hosts and parts of this server have none.
    fn version(&self) -> Option<&MachineVersion> {
        match self {
            Self::Machine { target, .. } => Some(&target.version),
            Self::Admitted { version, .. } => Some(version),
            Self::Hop { .. } | Self::Internal(_) => None,
        }
    }
}

/// This server has run out of something: it says nothing of the machine, and no other machine is better off.
pub(crate) fn is_own_fault(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::ADDRNOTAVAIL)
    )
}

/// A connection in use by one request.
pub(crate) struct Conn {
    pub io: UpstreamIo,
    pub inbox: Inbox,
    /// It carried a request before; the other side may just have closed it.
    pub is_reused: bool,
    pub to: Upstream,
}

impl Conn {
    /// A machine that writes its answer in pieces may hold the next one back until the first is acknowledged (Nagle's
    /// algorithm), and on a connection that was used before the kernel here would take 40 ms for that.
    pub fn acknowledge(&self) {
        let stream = match &self.io {
            Either::Left(stream) => Some(stream),
            Either::Right(Either::Right(tls)) => Some(tls.get_ref().0),
            Either::Right(Either::Left(_)) => None,
        };
        if let Some(stream) = stream {
            let _ = sockopt::set_tcp_quickack(stream, true); // the answer comes without it too
        }
    }

    /// A request is about to be sent to another host: its client waits, and others may answer.
    pub fn be_quick(&self) {
        self.give_up_after(HEAD_TAKEN_WITHIN);
    }

    /// What follows cannot be sent anywhere else.
    pub fn be_patient(&self) {
        self.give_up_after(HOST_GONE_AFTER);
    }

    fn give_up_after(&self, silence: Duration) {
        if let Either::Right(Either::Right(tls)) = &self.io {
            let _ = sockopt::set_tcp_user_timeout(tls.get_ref().0, silence.as_millis() as u32); // else it takes longer
        }
    }
}

struct Idle {
    conn: Conn,
    since: Instant,
}

/// A kept connection that counts, with the place that it has.
struct Own {
    conn: Conn,
    since: Instant,
    held: Held,
}

pub(crate) struct Pool {
    idle: RefCell<HashMap<Address, Vec<Idle>>>,
    /// By client connection.
    own: RefCell<HashMap<u64, Vec<Own>>>,
    /// Those whose client's connection has ended.
    left: RefCell<HashMap<Address, Vec<Own>>>,
    parting: Rc<Cell<usize>>,
    buffers: Rc<Buffers>,
    connect_timeout: Duration,
    keep_counted: Duration,
    counters: Arc<Counters>,
    fleet: Option<Arc<Fleet>>,
}

impl Pool {
    pub fn new(limits: &Limits, buffers: Rc<Buffers>, counters: Arc<Counters>, fleet: Option<Arc<Fleet>>) -> Self {
        let Limits { connect_timeout, keep_counted, .. } = *limits;
        Self { idle: RefCell::default(), own: RefCell::default(), left: RefCell::default(), parting: Rc::default(), buffers, connect_timeout, keep_counted, counters, fleet }
    }

    /// The most recently used kept connection that is still good.
    pub fn take(&self, to: &Upstream) -> Option<Conn> {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.get_mut(&to.address())?;
        let now = Instant::now();
        while let Some(Idle { mut conn, since }) = kept.pop() {
            if now.duration_since(since) > to.keep_idle() {
                kept.clear();
                return None;
            }
            if conn.to.is_same_version(to) && is_quiet(&mut conn.io) {
                count(&self.counters.upstream_reused);
                conn.is_reused = true;
                conn.to = to.clone(); // on a connection to a host, each request is for a machine of its own
                return Some(conn);
            }
        }
        None
    }

    pub async fn connect(&self, to: &Upstream) -> io::Result<Conn> {
        count(&self.counters.upstream_connects);
        let connecting = async {
            match to {
                Upstream::Machine { address, .. } | Upstream::Admitted { address, .. } => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Ok(Either::Left(stream))
                }
                Upstream::Hop { target, .. } => {
                    let fleet = self.fleet.as_ref().ok_or_else(|| io::Error::other("this edge knows no other host"))?;
                    let address = (fleet.address)(&target.host).ok_or_else(|| io::Error::other("its address is not known"))?;
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    watch_host(&stream)?;
                    let tls = TlsConnector::from((fleet.tls_client)()).connect((fleet.server_name)(&target.host), stream);
                    Ok(Either::Right(Either::Right(Box::new(Box::pin(tls).await?))))
                }
                Upstream::Internal(path) => UnixStream::connect(path).await.map(|stream| Either::Right(Either::Left(stream))),
            }
        };
        let io = tokio::time::timeout(self.connect_timeout, connecting)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection attempt")))?;
        Ok(Conn { io, inbox: Inbox::new(self.buffers.clone()), is_reused: false, to: to.clone() })
    }

    /// The host acknowledges nothing: what is kept to it is as dead as the connection that told so.
    pub fn drop_host(&self, host: &HostId) {
        self.idle.borrow_mut().remove(&Address::Host(host.clone()));
    }

    /// Keeps a connection whose last answer was read to its end.
    pub fn keep(&self, conn: Conn) {
        if !conn.to.is_kept() {
            return;
        }
        if !conn.inbox.is_empty() {
            return; // it says more than it was asked: not to be trusted with another request
        }
        let mut idle = self.idle.borrow_mut();
        let kept = idle.entry(conn.to.address()).or_default();
        if kept.len() < MAX_IDLE {
            kept.push(Idle { conn, since: Instant::now() });
        }
    }

    /// A connection kept for this client's connection, to a machine that still `suits`.
    pub fn take_own(&self, client: u64, suits: impl Fn(&Candidate) -> bool) -> Option<(Conn, Held)> {
        let mut own = self.own.borrow_mut();
        let kept = own.get_mut(&client)?;
        while let Some(Own { mut conn, held, .. }) = kept.pop() {
            let still_suits = matches!(&conn.to, Upstream::Machine { target, .. } if suits(target));
            if still_suits && is_quiet(&mut conn.io) {
                count(&self.counters.upstream_reused);
                conn.is_reused = true;
                return Some((conn, held));
            }
        }
        None
    }

    pub fn keep_own(&self, client: u64, conn: Conn, held: Held) {
        if conn.inbox.is_empty() {
            self.own.borrow_mut().entry(client).or_default().push(Own { conn, held, since: Instant::now() });
        }
    }

    /// The client's connection has ended. What was kept for it is anybody's.
    pub fn forget(&self, client: u64) {
        let Some(kept) = self.own.borrow_mut().remove(&client) else { return };
        let mut left = self.left.borrow_mut();
        for own in kept {
            left.entry(own.conn.to.address()).or_default().push(own);
        }
    }

    /// A counted connection that its client has left. Its place becomes free: whoever takes it has one.
    pub fn take_left(&self, to: &Upstream) -> Option<Conn> {
        let mut left = self.left.borrow_mut();
        let kept = left.get_mut(&to.address())?;
        while let Some(Own { mut conn, .. }) = kept.pop() {
            if conn.to.is_same_version(to) && is_quiet(&mut conn.io) {
                count(&self.counters.upstream_reused);
                conn.is_reused = true;
                return Some(conn);
            }
        }
        None
    }

    /// Somebody waits for a place in this app: those that are only kept are given back.
    pub fn give_up_kept(&self, app: &AppName) {
        let is_of_app = |own: &Own| matches!(&own.conn.to, Upstream::Machine { target, .. } if target.app == *app);
        for kept in self.own.borrow_mut().values_mut() {
            kept.retain(|own| !is_of_app(own));
        }
        for kept in self.left.borrow_mut().values_mut() {
            kept.retain(|own| !is_of_app(own));
        }
    }

    /// The machine has answered in full and closes the connection: it goes first, if it does so soon.
    pub fn part(&self, mut conn: Conn) {
        if self.parting.get() >= MAX_PARTING {
            return;
        }
        let parting = self.parting.clone();
        parting.set(parting.get() + 1);
        tokio::task::spawn_local(async move {
            let mut byte = [0];
            let _ = tokio::time::timeout(PART_WITHIN, conn.io.read(&mut byte)).await; // closed in any case
            parting.set(parting.get() - 1);
        });
    }

    /// Closes what was idle for too long. Called from time to time.
    pub fn sweep(&self) {
        let now = Instant::now();
        let retain_own = |kept: &mut Vec<Own>| {
            kept.retain(|own| now.duration_since(own.since) <= self.keep_counted);
            !kept.is_empty()
        };
        self.own.borrow_mut().retain(|_, kept| retain_own(kept));
        self.left.borrow_mut().retain(|_, kept| retain_own(kept));
        self.idle.borrow_mut().retain(|_, kept| {
            kept.retain(|idle| now.duration_since(idle.since) <= idle.conn.to.keep_idle());
            !kept.is_empty()
        });
    }
}
