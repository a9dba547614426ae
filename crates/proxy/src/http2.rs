//! A client's connection that speaks HTTP/2: every stream is served by a task of its own.

use crate::access::Record;
use crate::answer::fault;
use crate::downstream::{BodyFault, Downstream};
use crate::fields::{MAX_FIELDS, line, plain_trailers};
use crate::framing::Framing;
use crate::io::Watched;
use crate::listen::{Client, Worker};
use crate::reply::Reply;
use crate::request::{Message, Origin, Protocol, Request, Sender};
use crate::serve::serve;
use crate::time::{Watchdog, now_ms};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use httparse::Header;
use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

/// Unread bytes of request bodies that a connection may have: a share of the whole budget, so that many
/// connections together cannot hold more than a few times of it, and few are not slow.
const UNREAD_BUDGET: usize = 1024 * 1024 * 1024;
const LEAST_WINDOW: u32 = 64 * 1024;
const MOST_WINDOW: u32 = 1024 * 1024;
/// Bytes of an answer that wait for the socket, of one stream.
const SEND_BUFFER: usize = 256 * 1024;

/// What the streams of a connection tell it.
struct Streams {
    active: Cell<u32>,
    last_active: Cell<Instant>,
}

/// Says that a connection has a request.
struct Active(Rc<Streams>);

impl Active {
    fn begin(streams: &Rc<Streams>) -> Self {
        streams.active.set(streams.active.get() + 1);
        Self(streams.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        self.0.last_active.set(Instant::now());
    }
}

/// The windows of a stream and of its connection, with this many connections open.
fn windows(connections: usize) -> (u32, u32) {
    let share = u32::try_from(UNREAD_BUDGET / connections.max(1)).unwrap_or(u32::MAX);
    let connection = share.clamp(LEAST_WINDOW, MOST_WINDOW);
    // A stream that waits for its machine leaves room for the others.
    ((connection / 4).max(LEAST_WINDOW), connection)
}

/// Serves a connection until it ends.
pub(crate) async fn run(worker: Rc<Worker>, client: Rc<Client>, io: Box<TlsStream<TcpStream>>) {
    let limits = &worker.edge.limits;
    let (stream_window, connection_window) = windows(worker.edge.metrics.connections.load(Relaxed));
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(limits.h2_max_streams)
        // Of an upload that was answered early more may arrive: as long as its stream is remembered it is no error.
        .max_concurrent_reset_streams(2 * limits.h2_max_streams as usize)
        .max_header_list_size(limits.h2_max_header_list)
        .initial_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_connect_protocol();
    let handshake = builder.handshake::<_, Bytes>(Watched::new(io, limits.write_stall_timeout));
    let mut connection = match tokio::time::timeout_at(client.began + limits.header_timeout, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(client = %client.address, %error, "HTTP/2 did not begin"),
        Err(_) => return tracing::debug!(client = %client.address, "HTTP/2 did not begin in time"),
    };
    let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
    let _listening = worker.bell.listen(&waker);
    let streams = Rc::new(Streams { active: Cell::new(0), last_active: Cell::new(Instant::now()) });
    let mut watchdog = Watchdog::new(Instant::now() + limits.idle_timeout);
    let (mut is_closing, mut is_fresh) = (false, true);
    poll_fn(|cx| {
        loop {
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    is_fresh = false;
                    let serving = stream(&worker, &client, Active::begin(&streams), request, respond);
                    tokio::task::spawn_local(serving);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(client = %client.address, %error, "connection ended");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => {}
            }
            if worker.bell.has_rung() && !is_closing {
                let until = client.began + limits.drain_grace;
                if !is_fresh || until <= Instant::now() {
                    is_closing = true;
                    connection.graceful_shutdown();
                    continue;
                }
                watchdog.set(until);
                ready!(watchdog.poll(cx));
                continue;
            }
            ready!(watchdog.poll(cx));
            let due = streams.last_active.get() + limits.idle_timeout;
            if streams.active.get() > 0 || due > Instant::now() {
                watchdog.set(due.max(Instant::now() + limits.idle_timeout / 2));
            } else if is_closing {
                // Whoever does not even take part in the end.
                return Poll::Ready(());
            } else {
                is_closing = true;
                connection.graceful_shutdown();
                watchdog.set(Instant::now() + limits.idle_timeout / 2);
            }
        }
    })
    .await;
    worker.pool.forget(client.id);
}

/// Not an `async fn`: what it is made from would lie in the task beside what it is made into.
fn stream(
    worker: &Rc<Worker>,
    client: &Rc<Client>,
    active: Active,
    request: http::Request<RecvStream>,
    respond: SendResponse<Bytes>,
) -> impl Future<Output = ()> + use<> {
    let (parts, body) = request.into_parts();
    let record = Record::begin(worker, client, read(worker, client, &parts, &body));
    let mut http2 = Http2 {
        respond,
        body,
        is_body_done: false,
        chunk: Bytes::new(),
        trailers: Vec::new(),
        send: None,
        has_ended: false,
        is_tunnel: false,
        has_moved: false,
        watchdog: Watchdog::new(Instant::now() + worker.edge.limits.response_timeout),
    };
    async move {
        serve(record, &mut Downstream::Http2(&mut http2)).await;
        drop(active);
    }
}

fn read(worker: &Worker, client: &Client, parts: &http::request::Parts, body: &RecvStream) -> Request {
    let id = worker.random.request_id(now_ms());
    if parts.headers.len() > MAX_FIELDS {
        let too_many = fault(431, "PC05", "the request has too many header fields", "send fewer, or fewer cookies");
        return Request::unreadable(Protocol::Http2, id, too_many);
    }
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    for (to, (name, value)) in fields.iter_mut().zip(&parts.headers) {
        *to = Header { name: name.as_str(), value: value.as_bytes() };
    }
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str);
    let message = Message {
        protocol: Protocol::Http2,
        method: parts.method.as_str(),
        target: parts.uri.path_and_query().map_or("/", |path| path.as_str()),
        authority: parts.uri.authority().map(|authority| authority.as_str()),
        fields: &fields[..parts.headers.len()],
        may_have_body: !body.is_end_stream(),
        connect_protocol: protocol.filter(|protocol| *protocol == "websocket"),
    };
    let websocket_key = || {
        let random = [worker.random.next().to_le_bytes(), worker.random.next().to_le_bytes()].concat();
        STANDARD.encode(random)
    };
    let origin = Origin { lines: &client.lines, id, websocket_key: &websocket_key, from: Sender::Client };
    Request::read(&message, &origin, worker.buffers.take_head())
}

/// One stream.
pub(crate) struct Http2 {
    respond: SendResponse<Bytes>,
    body: RecvStream,
    is_body_done: bool,
    chunk: Bytes,
    /// Of the request, as lines.
    trailers: Vec<u8>,
    /// There once the answer has begun.
    send: Option<SendStream<Bytes>>,
    has_ended: bool,
    is_tunnel: bool,
    pub has_moved: bool,
    pub watchdog: Watchdog,
}

impl Http2 {
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyFault>> {
        loop {
            if !self.chunk.is_empty() {
                return Poll::Ready(Ok(true));
            }
            if self.is_body_done {
                return Poll::Ready(Ok(false));
            }
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(_)) => return Poll::Ready(Err(BodyFault::Gone)),
                None => {
                    let trailers = ready!(self.body.poll_trailers(cx)).map_err(|_| BodyFault::Gone)?;
                    for (name, value) in trailers.iter().flatten() {
                        line(&mut self.trailers, name.as_str().as_bytes(), value.as_bytes());
                    }
                    self.is_body_done = true;
                }
            }
        }
    }

    pub fn body(&self) -> &[u8] {
        &self.chunk
    }

    pub fn consume(&mut self, count: usize) {
        self.chunk.advance(count);
        // It fails for a stream that is gone, which is seen elsewhere.
        let _ = self.body.flow_control().release_capacity(count);
    }

    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let reset = match &mut self.send {
            Some(send) => send.poll_reset(cx),
            None => self.respond.poll_reset(cx),
        };
        reset.map(|_| ())
    }

    pub fn begin(&mut self, worker: &Worker, request: &Request, reply: &Reply<'_>) -> io::Result<()> {
        // What HTTP/1 calls 101 is 200 here (RFC 8441).
        let is_tunnel = reply.status == 101;
        let mut response = Response::new(());
        let status = if is_tunnel { 200 } else { reply.status };
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        let headers = response.headers_mut();
        headers.reserve(reply.fields.len() + 6);
        worker.clock.with_date(now_ms(), |date| {
            reply.each(date, request, |name, value| {
                let is_for_client = !(is_tunnel && name.eq_ignore_ascii_case("sec-websocket-accept"));
                if is_for_client && let Some((name, value)) = field(name, value) {
                    headers.append(name, value);
                }
            });
        });
        let ends = matches!(reply.body, Framing::None | Framing::Length(0)) && !is_tunnel;
        self.send = Some(self.respond.send_response(response, ends).map_err(io::Error::other)?);
        self.has_ended = ends;
        Ok(())
    }

    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &[u8], is_last: bool) -> Poll<io::Result<usize>> {
        let Some(send) = &mut self.send else { return Poll::Ready(Err(gone())) };
        send.reserve_capacity(data.len());
        let mut room = send.capacity();
        if room == 0 {
            room = ready!(send.poll_capacity(cx)).ok_or_else(gone)?.map_err(io::Error::other)?;
        }
        let count = room.min(data.len());
        let ends = is_last && count == data.len();
        send.send_data(Bytes::copy_from_slice(&data[..count]), ends).map_err(io::Error::other)?;
        self.has_ended |= ends;
        self.has_moved = true;
        Poll::Ready(Ok(count))
    }

    /// The connection's task writes what streams have given it.
    pub fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    pub fn poll_finish(&mut self, _cx: &mut Context<'_>, trailers: &[u8]) -> Poll<io::Result<()>> {
        let Some(send) = &mut self.send else { return Poll::Ready(Err(gone())) };
        if std::mem::replace(&mut self.has_ended, true) {
            return Poll::Ready(Ok(()));
        }
        let mut map = HeaderMap::new();
        plain_trailers(trailers, |name, value| {
            if let Some((name, value)) = field(name, value) {
                map.append(name, value);
            }
        });
        let sent = if map.is_empty() { send.send_data(Bytes::new(), true) } else { send.send_trailers(map) };
        Poll::Ready(sent.map_err(io::Error::other))
    }

    pub fn become_tunnel(&mut self) {
        self.is_tunnel = true;
    }

    pub fn fail(&mut self) {
        match &mut self.send {
            Some(send) => send.send_reset(Reason::INTERNAL_ERROR),
            None => self.respond.send_reset(Reason::INTERNAL_ERROR),
        }
    }
}

fn field(name: &str, value: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    Some((HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_bytes(value).ok()?))
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the client gave the stream up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_bodies_stay_within_a_budget() {
        const KIB: u32 = 1024;
        assert_eq!(windows(1), (256 * KIB, 1024 * KIB));
        assert_eq!(windows(1_024), (256 * KIB, 1024 * KIB));
        assert_eq!(windows(4_096), (64 * KIB, 256 * KIB));
        assert_eq!(windows(16_384), (64 * KIB, 64 * KIB));
        let all: u64 = (1..=16_384).map(|open| u64::from(windows(open).1)).sum();
        assert!(all < 4 * UNREAD_BUDGET as u64, "{all}");
    }
}
