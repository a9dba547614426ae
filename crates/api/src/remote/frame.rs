//! Frames: a length of four bytes, little-endian, of what follows: a byte that says what it is, and its content.

use super::{ALIVE_EVERY, SILENT};
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    Json(Bytes),
    Stdin(Bytes),
    Stdout(Bytes),
    Stderr(Bytes),
    /// One frame of input or output was handed on, and there is room for another.
    Taken,
    /// Nothing to say, but still there.
    Alive,
}

impl Frame {
    pub fn json(value: &impl Serialize) -> io::Result<Self> {
        Ok(Self::Json(serde_json::to_vec(value)?.into()))
    }

    fn parts(&self) -> (u8, &[u8]) {
        match self {
            Self::Json(bytes) => (0, bytes),
            Self::Stdin(bytes) => (1, bytes),
            Self::Stdout(bytes) => (2, bytes),
            Self::Stderr(bytes) => (3, bytes),
            Self::Taken => (4, &[]),
            Self::Alive => (5, &[]),
        }
    }

    fn of(kind: u8, content: Bytes) -> io::Result<Self> {
        match kind {
            0 => Ok(Self::Json(content)),
            1 => Ok(Self::Stdin(content)),
            2 => Ok(Self::Stdout(content)),
            3 => Ok(Self::Stderr(content)),
            4 => Ok(Self::Taken),
            5 => Ok(Self::Alive),
            other => Err(garbage(format!("a frame of kind {other}, which there is not"))),
        }
    }
}

pub(super) fn garbage(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

pub(super) fn parse<T: DeserializeOwned>(json: &[u8]) -> io::Result<T> {
    serde_json::from_slice(json).map_err(|e| garbage(format!("what was sent cannot be read: {e}")))
}

/// The next frame, of at most `max` bytes. Memory grows with what has come, not with what was announced.
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Frame> {
    let length = from.read_u32_le().await? as usize;
    if length == 0 || length > max {
        return Err(garbage(format!("a frame of {length} bytes; they have 1 to {max}")));
    }
    let mut content = Vec::new();
    from.take(length as u64).read_to_end(&mut content).await?;
    if content.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut content = Bytes::from(content);
    let kind = content.split_to(1)[0];
    Frame::of(kind, content)
}

/// The next frame that says something, from somebody who is not silent for too long.
pub(super) async fn next(from: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Frame> {
    loop {
        let frame = timeout(SILENT, read(from, max)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("nothing was heard of it for {} s", SILENT.as_secs()))
        })?;
        match frame? {
            Frame::Alive => {}
            frame => return Ok(frame),
        }
    }
}

pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let (kind, content) = frame.parts();
    let length = u32::try_from(content.len() + 1).map_err(|_| garbage("a frame that is too long"))?;
    // In one piece, so that no transport waits with the second one for an acknowledgement of the first.
    let mut whole = Vec::with_capacity(content.len() + 5);
    whole.extend(length.to_le_bytes());
    whole.push(kind);
    whole.extend(content);
    to.write_all(&whole).await?;
    to.flush().await
}

/// Writes what comes, and in between that this side is there; when nothing more comes, the end.
pub(super) async fn write_all(to: &mut (impl AsyncWrite + Unpin), mut frames: mpsc::Receiver<Frame>) -> io::Result<()> {
    loop {
        match timeout(ALIVE_EVERY, frames.recv()).await {
            Ok(Some(frame)) => write(to, &frame).await?,
            Ok(None) => return to.shutdown().await,
            Err(_) => write(to, &Frame::Alive).await?,
        }
    }
}
