//! Asking a cluster to be let in, by a host that has no certificate yet.

use crate::link::transport_to_join;
use crate::stream::{Service, Stream, read_frame, write_frame};
use crate::tls;
use crate::authority::HOSTS_DOMAIN;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, VarInt};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// Anybody may send it.
pub const MAX_JOIN_REQUEST_BYTES: usize = 16 << 10;
/// What a new member is told, addresses of others included.
pub const MAX_JOIN_ANSWER_BYTES: usize = 256 << 10;
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A member asks control, which writes the store.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("{addr} cannot be reached: check the address, that the server there runs with --cluster, and that UDP passes")]
    Unreachable { addr: SocketAddr, source: std::io::Error },
    #[error("{addr} is not a member of the cluster that the token is for: check the address, or make a new token with `dunlin host token`")]
    OtherCluster { addr: SocketAddr, source: ConnectionError },
    #[error("a request to join has {0} bytes, at most {MAX_JOIN_REQUEST_BYTES} are taken: give fewer labels")]
    TooLong(usize),
    #[error("{addr} gave no answer: look into its log, and try again")]
    NoAnswer { addr: SocketAddr, source: std::io::Error },
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
}

/// For a host that has no certificate yet: checks the chain that it is shown against the fingerprint of the authority, sends the
/// request, returns the answer.
pub async fn join(addr: SocketAddr, ca_sha256: [u8; 32], request: &[u8]) -> Result<Vec<u8>, JoinError> {
    if request.len() > MAX_JOIN_REQUEST_BYTES {
        return Err(JoinError::TooLong(request.len()));
    }
    let unreachable = |source| JoinError::Unreachable { addr, source };
    let crypto = QuicClientConfig::try_from(tls::to_join(ca_sha256)?).map_err(|error| unreachable(std::io::Error::other(error)))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport_to_join()));
    let any = if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let endpoint = Endpoint::client(SocketAddr::new(any, 0)).map_err(unreachable)?;
    let connecting = endpoint.connect_with(config, addr, HOSTS_DOMAIN).map_err(|error| unreachable(std::io::Error::other(error)))?;
    let connection = match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(source @ ConnectionError::TransportError(_))) => return Err(JoinError::OtherCluster { addr, source }),
        Ok(Err(error)) => return Err(unreachable(error.into())),
        Err(late) => return Err(unreachable(late.into())),
    };
    let ask = async {
        let (send, recv) = connection.open_bi().await?;
        let mut stream = Stream::new(send, recv);
        stream.write_u8(Service::Join as u8).await?;
        write_frame(&mut stream, request).await?;
        stream.shutdown().await?;
        read_frame(&mut stream, MAX_JOIN_ANSWER_BYTES).await
    };
    let answer = tokio::time::timeout(ANSWER_DEADLINE, ask).await;
    connection.close(VarInt::from_u32(0), b"done");
    endpoint.wait_idle().await;
    answer.map_err(std::io::Error::from).flatten().map_err(|source| JoinError::NoAnswer { addr, source })
}
