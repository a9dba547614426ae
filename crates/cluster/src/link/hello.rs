//! The first exchange on a connection between two hosts: which process this is, and where it says that it is.

use quinn::{RecvStream, SendStream};
use std::io;
use std::net::SocketAddr;

/// The first byte of a stream, where others have a service's.
pub(super) const HELLO: u8 = 0;
const VERSION: u8 = 1;
/// Version, process, length, an IPv6 socket address as text.
const MAX_BYTES: usize = 1 + 8 + 1 + 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Random, one a process.
    pub process: u64,
    pub addr: SocketAddr,
}

impl Hello {
    /// By whoever has dialed.
    pub async fn exchange_first(&self, mut send: SendStream, mut recv: RecvStream) -> io::Result<Self> {
        send.write_all(&[HELLO]).await?;
        self.tell(&mut send).await?;
        Self::hear(&mut recv).await
    }

    /// By whoever has accepted, and has read the first byte.
    pub async fn exchange_second(&self, mut send: SendStream, mut recv: RecvStream) -> io::Result<Self> {
        let theirs = Self::hear(&mut recv).await?;
        self.tell(&mut send).await?;
        Ok(theirs)
    }

    async fn tell(&self, send: &mut SendStream) -> io::Result<()> {
        let addr = self.addr.to_string();
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.process.to_le_bytes());
        bytes.push(addr.len() as u8);
        bytes.extend_from_slice(addr.as_bytes());
        send.write_all(&bytes).await?;
        send.finish().map_err(io::Error::other)
    }

    /// What a later version tells beyond this is left alone.
    async fn hear(recv: &mut RecvStream) -> io::Result<Self> {
        let mut bytes = [0; MAX_BYTES];
        recv.read_exact(&mut bytes[..10]).await.map_err(io::Error::other)?;
        let length = usize::from(bytes[9]);
        let addr = bytes.get_mut(10..10 + length).ok_or_else(malformed)?;
        recv.read_exact(addr).await.map_err(io::Error::other)?;
        let addr = std::str::from_utf8(addr).ok().and_then(|text| text.parse().ok()).ok_or_else(malformed)?;
        Ok(Self { process: u64::from_le_bytes(bytes[1..9].try_into().expect("eight bytes")), addr })
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a host says where it is in a way that cannot be read")
}
