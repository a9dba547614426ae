//! Whether others reach a host that joins: while it asks to be let in it listens where its server will, and it is dialed back
//! there, over UDP and over TCP, as members will dial it.
//!
//! ```text
//! joining host -- token, public keys, address --> member --> control
//! joining host <-- QUIC and TLS over TCP, to the address -- control
//! ```
//!
//! It has no certificate yet and shows its bare key in TLS (RFC 7250): the one that it asks to be certified. Who else answers at
//! that address has another key.

use crate::authority::{HOSTS_DOMAIN, PublicKeys};
use crate::link::{Links, transport_to_join};
use crate::member::{MemberKeys, from_base64};
use crate::tls;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, EndpointConfig, Incoming, VarInt};
use rustls_pki_types::ServerName;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// First packets that are lost are sent again after one second and after three.
const DIAL_DEADLINE: Duration = Duration::from_secs(4);
/// Longer than whoever dials waits.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// One dials; the others are the internet's.
const MAX_AT_ONCE: usize = 64;
/// After the kernel has no descriptor for a connection.
const REST: Duration = Duration::from_millis(100);
const DONE: VarInt = VarInt::from_u32(0);

/// How far a joining host was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialedBack {
    pub udp: Result<(), NotReached>,
    pub tcp: Result<(), NotReached>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReached {
    /// As where a firewall is, or no way.
    #[error("{0}")]
    Unanswered(String),
    #[error("something else than this host answers")]
    ByAnother,
}

/// A host that joins, at the sockets of the server that is to come.
pub struct Answering {
    endpoint: Endpoint,
    tcp: tokio::net::TcpListener,
    tls: TlsAcceptor,
}

impl Answering {
    pub fn start(keys: &MemberKeys, (udp, tcp): (UdpSocket, TcpListener)) -> io::Result<Self> {
        let tls = Arc::new(tls::of_joining(keys).map_err(io::Error::other)?);
        let crypto = QuicServerConfig::try_from(tls.clone()).map_err(io::Error::other)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(Arc::new(transport_to_join())).max_incoming(MAX_AT_ONCE);
        let runtime = quinn::default_runtime().ok_or_else(|| io::Error::other("there is no async runtime"))?;
        let endpoint = Endpoint::new(EndpointConfig::default(), Some(server), udp, runtime)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { endpoint, tcp: tokio::net::TcpListener::from_std(tcp)?, tls: TlsAcceptor::from(tls) })
    }

    /// Answers until `work` is done, and no longer.
    pub async fn during<T>(self, work: impl Future<Output = T>) -> T {
        let done = tokio::select! {
            done = work => done,
            never = self.answer() => match never {},
        };
        self.endpoint.close(DONE, b"done");
        done
    }

    async fn answer(&self) -> Infallible {
        let mut answers = JoinSet::new();
        loop {
            tokio::select! {
                Some(incoming) = self.endpoint.accept() => match answers.len() < MAX_AT_ONCE {
                    true => drop(answers.spawn(over_quic(incoming))),
                    false => incoming.ignore(),
                },
                accepted = self.tcp.accept() => match accepted {
                    Ok((stream, _)) if answers.len() < MAX_AT_ONCE => drop(answers.spawn(over_tls(self.tls.clone(), stream))),
                    Ok(_) => {} // it is closed
                    Err(error) => {
                        tracing::debug!(%error, "a connection cannot be taken");
                        tokio::time::sleep(REST).await;
                    }
                },
                Some(_) = answers.join_next() => {}
            }
        }
    }
}

/// Whoever dials sees by the handshake who answers, and closes.
async fn over_quic(incoming: Incoming) {
    let answer = async {
        if let Ok(connecting) = incoming.accept()
            && let Ok(connection) = connecting.await
        {
            connection.closed().await;
        }
    };
    let _ = tokio::time::timeout(ANSWER_DEADLINE, answer).await; // then it is closed from here
}

/// The same. Whoever closes first keeps the port for a while, which the server that is to come needs.
async fn over_tls(tls: TlsAcceptor, stream: TcpStream) {
    let answer = async {
        let mut stream = tls.accept(stream).await?;
        stream.read(&mut [0]).await
    };
    let _ = tokio::time::timeout(ANSWER_DEADLINE, answer).await; // then it is closed from here
}

/// Dials a joining host at `addr` and nothing else; both ways at once.
pub(crate) async fn dial_back(links: &Links, addr: SocketAddr, keys: &PublicKeys) -> DialedBack {
    let config = from_base64(&keys.tls).ok_or("its key for TLS is not base64".to_owned());
    let config = config.and_then(|key| tls::to_joining(key).map_err(|error| error.to_string()));
    let config = match config.map_err(NotReached::Unanswered) {
        Ok(config) => config,
        Err(why) => return DialedBack { udp: Err(why.clone()), tcp: Err(why) },
    };
    let (udp, tcp) = tokio::join!(in_time(links.reach_joining(addr, config.clone())), in_time(reach_over_tcp(addr, config)));
    DialedBack { udp, tcp }
}

async fn in_time(reach: impl Future<Output = Result<(), NotReached>>) -> Result<(), NotReached> {
    let late = |_| Err(NotReached::Unanswered(format!("no answer within {} s", DIAL_DEADLINE.as_secs())));
    tokio::time::timeout(DIAL_DEADLINE, reach).await.unwrap_or_else(late)
}

async fn reach_over_tcp(addr: SocketAddr, config: rustls::ClientConfig) -> Result<(), NotReached> {
    let stream = TcpStream::connect(addr).await.map_err(|error| NotReached::Unanswered(error.kind().to_string()))?;
    let name = ServerName::try_from(HOSTS_DOMAIN).expect("it is a DNS name");
    let shown = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    let mut stream = shown.map_err(|error| {
        tracing::debug!(%addr, %error, "what answers over TCP is not the host that joins");
        NotReached::ByAnother
    })?;
    let _ = stream.shutdown().await; // it has shown what it had to
    Ok(())
}
