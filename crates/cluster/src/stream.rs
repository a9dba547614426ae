//! One exchange between two hosts: a bidirectional stream, whose first byte says what it is for.

use quinn::{RecvStream, SendStream, VarInt};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// Whoever gives a stream up tells the other side with this.
pub(crate) const CANCELLED: VarInt = VarInt::from_u32(1);
/// Nobody serves what the stream is for.
pub(crate) const NOT_SERVED: VarInt = VarInt::from_u32(2);

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    Join = 1,
    Host = 2,
    Api = 3,
    Registry = 4,
    Blob = 5,
    Ping = 6,
    /// What control asks a host's server itself.
    Operate = 7,
}

impl Service {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        [Self::Join, Self::Host, Self::Api, Self::Registry, Self::Blob, Self::Ping, Self::Operate].into_iter().find(|service| *service as u8 == byte)
    }
}

/// Bytes both ways. `shutdown` ends what this side says, and the other side reads an end; dropping it before that resets, and
/// the other side reads and writes errors. Nothing here has a deadline: a host that is gone is noticed after some seconds.
pub struct Stream {
    send: SendStream,
    recv: RecvStream,
    ended: bool,
}

impl Stream {
    pub(crate) fn new(send: SendStream, recv: RecvStream) -> Self {
        Self { send, recv, ended: false }
    }

    pub(crate) fn refuse(mut self, code: VarInt) {
        self.ended = true;
        // It may be gone already, which is what is wanted.
        let _ = self.send.reset(code);
        let _ = self.recv.stop(code);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.send.reset(CANCELLED); // it may be gone already
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, ctx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.get_mut().recv), ctx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, ctx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.get_mut().send), ctx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.get_mut().send), ctx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.ended = true;
        AsyncWrite::poll_shutdown(Pin::new(&mut this.send), ctx)
    }
}

/// A length (u32, little endian) and so many bytes; longer than `max` is an error, and nothing of it is read.
pub async fn read_frame(from: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Vec<u8>> {
    let length = from.read_u32_le().await? as usize;
    if length > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes, where {max} may be")));
    }
    let mut bytes = Vec::new();
    if from.take(length as u64).read_to_end(&mut bytes).await? < length {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended within a frame"));
    }
    Ok(bytes)
}

/// The counterpart of [`read_frame`].
pub async fn write_frame(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a frame of 4 GiB"))?;
    to.write_u32_le(length).await?;
    to.write_all(bytes).await
}
