//! A client's connection that speaks HTTP/1: one request after the other.

use crate::access::Record;
use crate::answer::fault;
use crate::buffer::{BUFFER_BYTES, Buffers, Inbox};
use crate::downstream::{BodyFault, Downstream};
use crate::fields::{line, plain_trailers};
use crate::framing::{Decoder, Framing, MAX_CHUNK, Piece, chunk_size};
use crate::io::{ClientIo, has_ended};
use crate::listen::{Client, Worker};
use crate::reply::{Reply, room};
use crate::request::{Message, Origin, Protocol, Request, Sender};
use crate::serve::serve;
use crate::time::{Watchdog, now_ms};
use dunlin_routing::Reject;
use http::StatusCode;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::either::Either;

/// Up to this size an answer's bytes are gathered behind its head, for one write.
const GATHER_BYTES: usize = 16 * 1024;

/// For this long and up to this size a client may go on sending after its connection's last answer.
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 256 * 1024 * 1024;

/// How often a client that waits, and has sent more than is kept for it, is looked at.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// The status for a client that sent nothing more.
const TOO_LATE: u16 = 408;

pub(crate) struct Http1 {
    io: ClientIo,
    inbox: Inbox,
    buffers: Rc<Buffers>,
    /// Written up to `sent`; without memory when all is written.
    out: Vec<u8>,
    sent: usize,
    pub watchdog: Watchdog,
    pub has_moved: bool,
    /// Until a client that has sent too much is looked at again.
    look: Option<Pin<Box<Sleep>>>,
    served: u64,
    /// How much of an incomplete head was looked through for its end.
    scanned: usize,
    now: Exchange,
}

/// What is known of the request that is served.
struct Exchange {
    body: Decoder,
    body_ready: usize,
    expects_continue: bool,
    has_begun: bool,
    /// The answer goes out in chunks.
    in_chunks: bool,
    has_ended: bool,
    /// Another request may follow.
    keep: bool,
    is_tunnel: bool,
    /// The client may not wait for the answer with what it sends.
    may_send_more: bool,
}

impl Exchange {
    fn new(body: Framing) -> Self {
        Self {
            body: Decoder::new(body),
            body_ready: 0,
            expects_continue: false,
            has_begun: false,
            in_chunks: false,
            has_ended: false,
            keep: true,
            is_tunnel: false,
            may_send_more: false,
        }
    }
}

/// Serves a connection until it ends.
pub(crate) async fn run(worker: Rc<Worker>, client: Rc<Client>, io: ClientIo) {
    let mut http1 = Http1 {
        io,
        inbox: Inbox::new(worker.buffers.clone()),
        buffers: worker.buffers.clone(),
        out: Vec::new(),
        sent: 0,
        watchdog: Watchdog::new(client.began + worker.edge.limits.header_timeout),
        has_moved: false,
        look: None,
        served: 0,
        scanned: 0,
        now: Exchange::new(Framing::None),
    };
    let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
    let _listening = worker.bell.listen(&waker);
    while let Some(request) = http1.next_request(&worker, &client).await {
        http1.now = Exchange::new(request.body);
        http1.now.expects_continue = request.expects_continue;
        let is_cut_short = request.fault.as_ref().is_some_and(|fault| fault.status != TOO_LATE);
        http1.now.may_send_more = is_cut_short || request.body != Framing::None;
        // Boxed: between requests a connection is small.
        let record = Record::begin(&worker, &client, request);
        Box::pin(serve(record, &mut Downstream::Http1(&mut http1))).await;
        http1.served += 1;
        if !(http1.now.has_ended && http1.now.keep && http1.throw_away_body(&worker).await) {
            break;
        }
    }
    worker.pool.forget(client.id);
    if http1.served == 0 || http1.now.has_ended {
        http1.end(&worker).await;
    }
}

impl Http1 {
    /// `None` when the connection ends: closed, idle for too long, or because the edge stops.
    async fn next_request(&mut self, worker: &Worker, client: &Client) -> Option<Request> {
        let limits = &worker.edge.limits;
        if self.served > 0 {
            self.watchdog.set(Instant::now() + limits.idle_timeout);
        }
        poll_fn(|cx| {
            loop {
                if !self.inbox.is_empty()
                    && let Some(request) = self.read_head(worker, client)
                {
                    return Poll::Ready(Some(request));
                }
                if self.inbox.is_empty() && worker.bell.has_rung() {
                    let until = client.began + limits.drain_grace;
                    if self.served > 0 || until <= Instant::now() {
                        return Poll::Ready(None);
                    }
                    self.watchdog.set(until);
                }
                let was_empty = self.inbox.is_empty();
                match self.inbox.poll_fill(&mut self.io, cx) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(None),
                    // Of a new connection the head's time runs from the accept on.
                    Poll::Ready(Ok(_)) if was_empty && self.served > 0 => {
                        self.watchdog.set(Instant::now() + limits.header_timeout);
                    }
                    Poll::Ready(Ok(_)) => {}
                    Poll::Pending => {
                        ready!(self.watchdog.poll(cx));
                        let id = worker.random.request_id(now_ms());
                        let late = || Request::unreadable(Protocol::Http11, id, too_late());
                        return Poll::Ready((!self.inbox.is_empty()).then(late));
                    }
                }
            }
        })
        .await
    }

    /// Whether the request's body has come to its end: what of it another edge sends after the answer is nobody's.
    async fn throw_away_body(&mut self, worker: &Worker) -> bool {
        let mut thrown_away = 0;
        self.watchdog.set(Instant::now() + worker.edge.limits.header_timeout);
        poll_fn(|cx| {
            while !self.now.body.is_done() {
                match self.poll_body(cx) {
                    Poll::Ready(Ok(true)) if thrown_away < BUFFER_BYTES => {
                        thrown_away += self.now.body_ready;
                        self.consume(self.now.body_ready);
                    }
                    Poll::Ready(Ok(false)) => {}
                    Poll::Ready(_) => return Poll::Ready(false),
                    Poll::Pending => return self.watchdog.poll(cx).map(|()| false),
                }
            }
            Poll::Ready(true)
        })
        .await
    }

    /// A request, or why what was sent is none; `None` = its head is not complete.
    fn read_head(&mut self, worker: &Worker, client: &Client) -> Option<Request> {
        let bytes = self.inbox.bytes();
        let is_edge = client.sender() == Sender::Edge;
        let max = if is_edge { BUFFER_BYTES } else { worker.edge.limits.max_head_bytes };
        let may_grow = bytes.len() <= max && !self.inbox.is_full();
        if self.scanned > 0 && may_grow && !has_end(bytes, self.scanned) {
            self.scanned = bytes.len();
            return None;
        }
        let id = worker.random.request_id(now_ms());
        let mut space = room();
        let mut parsed = httparse::Request::new(&mut []);
        let config = httparse::ParserConfig::default();
        let (request, size) = match config.parse_request_with_uninit_headers(&mut parsed, bytes, &mut space) {
            Ok(httparse::Status::Complete(size)) if size <= max => {
                let message = Message {
                    protocol: if parsed.version == Some(0) { Protocol::Http10 } else { Protocol::Http11 },
                    method: parsed.method.unwrap_or_default(),
                    target: parsed.path.unwrap_or_default(),
                    authority: None,
                    fields: parsed.headers,
                    may_have_body: true,
                    connect_protocol: None,
                };
                // Over HTTP/1 the client makes the key of a WebSocket itself.
                let origin = Origin { lines: &client.lines, id, websocket_key: &String::new, from: client.sender() };
                (Request::read(&message, &origin, self.buffers.take_head()), size)
            }
            Ok(httparse::Status::Partial) if may_grow => {
                self.scanned = bytes.len();
                return None;
            }
            Ok(_) => (Request::unreadable(Protocol::Http11, id, too_big()), bytes.len()),
            Err(error) => (Request::unreadable(Protocol::Http11, id, unreadable(error)), bytes.len()),
        };
        self.inbox.consume(size);
        self.scanned = 0;
        Some(request)
    }

    /// Ends the connection. A client that still sends is heard out first, within bounds: closed at once, the
    /// socket's reset would overtake the answer that says why.
    async fn end(&mut self, worker: &Worker) {
        let is_heard_out = self.now.may_send_more && !self.now.is_tunnel;
        let (mut is_shut, mut thrown_away) = (false, 0);
        self.watchdog.set(Instant::now() + LINGER);
        poll_fn(|cx| {
            if !is_shut && let Poll::Ready(shut) = Pin::new(&mut self.io).poll_shutdown(cx) {
                is_shut = true;
                if shut.is_err() || !is_heard_out {
                    return Poll::Ready(());
                }
            }
            if !is_shut {
                return self.watchdog.poll(cx);
            }
            loop {
                self.inbox.consume(self.inbox.bytes().len());
                match self.inbox.poll_fill(&mut self.io, cx) {
                    Poll::Ready(Ok(count)) if count > 0 && thrown_away < LINGER_BYTES => thrown_away += count,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending if worker.bell.has_rung() => return Poll::Ready(()),
                    Poll::Pending => return self.watchdog.poll(cx),
                }
            }
        })
        .await;
    }

    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyFault>> {
        loop {
            match self.now.body.next(self.inbox.bytes()).map_err(BodyFault::Malformed)? {
                Piece::Data { skip, len } => {
                    self.inbox.consume(skip);
                    self.now.body_ready = len;
                    return Poll::Ready(Ok(true));
                }
                Piece::End { skip } => {
                    self.inbox.consume(skip);
                    return Poll::Ready(Ok(false));
                }
                Piece::More { skip } => self.inbox.consume(skip),
            }
            if !self.now.has_begun {
                if std::mem::take(&mut self.now.expects_continue) {
                    self.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                }
                ready!(self.poll_flush(cx)).map_err(|_| BodyFault::Gone)?;
            }
            match ready!(self.inbox.poll_fill(&mut self.io, cx)) {
                Ok(0) if self.now.body.may_end() => {
                    self.now.body.end();
                    return Poll::Ready(Ok(false));
                }
                Ok(0) | Err(_) => return Poll::Ready(Err(BodyFault::Gone)),
                Ok(_) => {}
            }
        }
    }

    pub fn body(&self) -> &[u8] {
        &self.inbox.bytes()[..self.now.body_ready]
    }

    pub fn consume(&mut self, count: usize) {
        self.inbox.consume(count);
        self.now.body.took(count);
        self.now.body_ready -= count;
    }

    pub fn trailers(&self) -> &[u8] {
        self.now.body.trailers()
    }

    /// What the client sends meanwhile is kept for later: its end comes behind that. Where no more is kept, the kernel says
    /// whether it has ended; a client could leave with its place held otherwise.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.inbox.is_full() {
            match ready!(self.inbox.poll_fill(&mut self.io, cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        loop {
            if has_ended(&self.io) {
                return Poll::Ready(());
            }
            // Nothing wakes for an end behind bytes that are not read.
            ready!(self.look.get_or_insert_with(|| Box::pin(sleep(LOOK_AFTER))).as_mut().poll(cx));
            self.look = None;
        }
    }

    pub fn begin(&mut self, worker: &Worker, request: &Request, reply: &Reply<'_>) -> io::Result<()> {
        let now = &mut self.now;
        now.has_begun = true;
        if request.sender == Sender::Edge && now.expects_continue {
            // It was not asked for the body, so it sends none.
            now.body = Decoder::new(Framing::None);
        }
        let has_end = match reply.body {
            Framing::Chunked | Framing::ToEnd => {
                now.in_chunks = request.protocol == Protocol::Http11;
                now.in_chunks
            }
            Framing::None | Framing::Length(_) => true,
        };
        // A body that is not read yet might never be: the client is told in time. Another edge knows by itself: it keeps
        // a connection only when all of its request is sent.
        let has_body = now.body.is_done() || request.sender == Sender::Edge;
        now.keep = request.keep_alive && has_end && has_body && !worker.bell.has_rung();
        if self.out.capacity() == 0 {
            self.out = self.buffers.take_head();
        }
        let out = &mut self.out;
        status_line(out, reply);
        worker.clock.with_date(now_ms(), |date| {
            reply.each(date, request, |name, value| line(out, name.as_bytes(), value));
        });
        if now.in_chunks {
            line(out, b"transfer-encoding", b"chunked");
        }
        if let Some(protocol) = reply.upgrade().filter(|_| reply.status == 101) {
            line(out, b"connection", b"upgrade");
            line(out, b"upgrade", protocol);
        } else if !now.keep {
            line(out, b"connection", b"close");
        } else if request.protocol == Protocol::Http10 {
            line(out, b"connection", b"keep-alive");
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }

    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &[u8], _is_last: bool) -> Poll<io::Result<usize>> {
        if self.out.len() > GATHER_BYTES {
            ready!(self.poll_out(cx))?;
        }
        if self.now.in_chunks {
            let data = &data[..data.len().min(MAX_CHUNK)];
            chunk_size(&mut self.out, data.len());
            self.out.extend_from_slice(data);
            self.out.extend_from_slice(b"\r\n");
            return Poll::Ready(Ok(data.len()));
        }
        if data.len() <= GATHER_BYTES {
            self.out.extend_from_slice(data);
            return Poll::Ready(Ok(data.len()));
        }
        loop {
            let head = &self.out[self.sent..];
            let both = [IoSlice::new(head), IoSlice::new(data)];
            let parts = if head.is_empty() { &both[1..] } else { &both[..] };
            let (count, head) = (ready!(Pin::new(&mut self.io).poll_write_vectored(cx, parts))?, head.len());
            self.wrote(count.min(head), count)?;
            if count > head {
                return Poll::Ready(Ok(count - head));
            }
        }
    }

    /// `count` bytes were written, `of_out` of them from `out`.
    fn wrote(&mut self, of_out: usize, count: usize) -> io::Result<()> {
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.has_moved = true;
        self.sent += of_out;
        if self.sent == self.out.len() {
            self.sent = 0;
            self.buffers.give_head_back(std::mem::take(&mut self.out));
        }
        Ok(())
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out[self.sent..]))?;
            self.wrote(count, count)?;
        }
        Poll::Ready(Ok(()))
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        match &mut self.io {
            Either::Left(_) => Poll::Ready(Ok(())),
            Either::Right(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    pub fn poll_finish(&mut self, cx: &mut Context<'_>, trailers: &[u8]) -> Poll<io::Result<()>> {
        if self.now.in_chunks && !self.now.has_ended {
            self.out.extend_from_slice(b"0\r\n");
            plain_trailers(trailers, |name, value| line(&mut self.out, name.as_bytes(), value));
            self.out.extend_from_slice(b"\r\n");
        }
        self.now.has_ended = true;
        ready!(self.poll_flush(cx))?;
        if self.now.is_tunnel {
            return Pin::new(&mut self.io).poll_shutdown(cx);
        }
        Poll::Ready(Ok(()))
    }

    pub fn become_tunnel(&mut self) {
        self.now.is_tunnel = true;
        self.now.keep = false;
        self.now.body = Decoder::new(Framing::ToEnd);
    }

    pub fn fail(&mut self) {
        self.now.keep = false;
        self.now.has_ended = false;
    }
}

fn status_line(out: &mut Vec<u8>, reply: &Reply<'_>) {
    if reply.status == 200 && matches!(reply.reason, "" | "OK") {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.extend_from_slice(b"HTTP/1.1 ");
    crate::log::decimal(out, reply.status.into());
    out.push(b' ');
    let usual = || StatusCode::from_u16(reply.status).ok().and_then(|status| status.canonical_reason());
    let reason = if reply.reason.is_empty() { usual().unwrap_or_default() } else { reply.reason };
    out.extend_from_slice(reason.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Whether a head may end in what came after the first `seen` bytes. Only then it is worth to read it again:
/// otherwise each byte of a slow client would cost as much as all before it.
fn has_end(bytes: &[u8], seen: usize) -> bool {
    let new = &bytes[seen.saturating_sub(3)..];
    new.windows(2).any(|two| two == b"\n\n") || new.windows(3).any(|three| three == b"\n\r\n")
}

fn too_late() -> Reject {
    fault(TOO_LATE, "PC07", "the request's head did not arrive in time", "send it at once; the edge waits for some seconds only")
}

fn too_big() -> Reject {
    fault(431, "PC05", "the request's head is too big", "send less in it: shorter URLs, fewer or smaller cookies")
}

fn unreadable(error: httparse::Error) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => too_big(),
        httparse::Error::Version => fault(
            505,
            "PC01",
            "the edge speaks HTTP/1.0, HTTP/1.1 and, over TLS, HTTP/2",
            "use one of these; HTTP/2 without TLS is not served",
        ),
        error => fault(
            400,
            "PC01",
            format!("the request is not well-formed: {error}"),
            "send one well-formed request: see RFC 9112; for HTTPS use the https:// port",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_head_is_seen_across_reads() {
        for (before, after, expected) in [
            ("GET / HTTP/1.1\r\n", "\r\n", true),
            ("GET / HTTP/1.1\r\n\r", "\n", true),
            ("GET / HTTP/1.1\r", "\n\r\n", true),
            ("GET / HTTP/1.1\n", "\n", true),
            ("GET / HT", "TP/1.1\r\na: b\r\n", false),
        ] {
            assert_eq!(has_end(format!("{before}{after}").as_bytes(), before.len()), expected, "{before:?} {after:?}");
        }
    }
}
