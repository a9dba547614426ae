//! Sockets to clients and to machines.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;
use tokio_rustls::{client, server};
use tokio_util::either::Either;

/// A client's socket that speaks HTTP/1: plain, or below TLS.
pub(crate) type ClientIo = Either<TcpStream, Box<server::TlsStream<TcpStream>>>;

/// A machine's socket, that of a part of this server, or a last hop's.
pub(crate) type UpstreamIo = Either<TcpStream, Either<UnixStream, Box<client::TlsStream<TcpStream>>>>;

/// Whether the client has closed its side, as far as this core was told: also where bytes that it sent before are not read yet.
pub(crate) fn has_ended(io: &ClientIo) -> bool {
    let stream = match io {
        Either::Left(stream) => stream,
        Either::Right(tls) => tls.get_ref().0,
    };
    let mut ready = pin!(stream.ready(Interest::READABLE));
    let found = ready.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    matches!(found, Poll::Ready(Ok(ready)) if ready.is_read_closed())
}

/// Looks without waiting whether the other side closed it, or sent what nobody asked for.
pub(crate) fn is_quiet(io: &mut UpstreamIo) -> bool {
    let mut byte = [0];
    let read = match io {
        Either::Left(stream) => stream.try_read(&mut byte),
        Either::Right(Either::Left(stream)) => stream.try_read(&mut byte),
        // TLS has things of its own to read, such as tickets.
        Either::Right(Either::Right(tls)) => {
            let mut cx = Context::from_waker(Waker::noop());
            return Pin::new(tls).poll_read(&mut cx, &mut ReadBuf::new(&mut byte)).is_pending();
        }
    };
    matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// A socket below HTTP/2 that notices when the client takes no bytes at all. (A single stream that it does
/// not take is noticed where the stream is served.)
pub(crate) struct Watched<T> {
    inner: T,
    stall_after: Duration,
    /// Armed while a write waits; a socket that flows costs no timer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<T> Watched<T> {
    pub fn new(inner: T, stall_after: Duration) -> Self {
        Self { inner, stall_after, stalled: None }
    }

    fn watch<R>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let stall_after = self.stall_after;
        let timer = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(stall_after)));
        timer.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no bytes")))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.watch(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.watch(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
