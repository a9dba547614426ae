//! One request on its way to a machine and the answer on its way back, over one connection to the machine.
//!
//! Polled inside the request's own future: no task, no channel between the two sockets. Uploads go on beside
//! answers.

use crate::access::Traffic;
use crate::downstream::{BodyFault, Downstream};
use crate::fields::{line, plain_trailers};
use crate::framing::{Decoder, Framing, MAX_CHUNK, Piece, chunk_size};
use crate::listen::Worker;
use crate::reply::{Reply, room};
use crate::request::Request;
use crate::upstream::Conn;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::Instant;

/// Why there is no answer. The client has seen nothing of one yet.
#[derive(Debug)]
pub(crate) enum Fault {
    /// Not a byte of the request left: it may go anywhere else.
    Unsent(io::Error),
    /// The connection broke after the request was (partly) sent, or what came is no answer.
    Broken(io::Error),
    /// The machine was silent for too long.
    TooSlow,
    Client(ClientFault),
}

#[derive(Debug)]
pub(crate) enum ClientFault {
    Gone,
    /// It sends no more of the body.
    Silent,
    Malformed(String),
}

impl From<BodyFault> for ClientFault {
    fn from(fault: BodyFault) -> Self {
        match fault {
            BodyFault::Gone => Self::Gone,
            BodyFault::Malformed(malformed) => Self::Malformed(malformed.to_string()),
        }
    }
}

/// Who has to do something next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaits {
    Client,
    Machine,
}

/// How far the request is.
enum Stage {
    /// So many bytes of its head are sent.
    Head(usize),
    Body,
    /// In a tunnel: the client has ended its side.
    Shutdown,
    Done,
    /// The machine takes no more of it. An answer may be there nevertheless.
    Refused,
}

pub(crate) struct Exchange<'a, 'd> {
    worker: &'a Worker,
    request: &'a Request,
    down: &'a mut Downstream<'d>,
    conn: &'a mut Conn,
    stage: Stage,
    /// What of the body is to be written before more is read, up to `sent`: chunks.
    chunk: Vec<u8>,
    sent: usize,
    is_last_chunk: bool,
    is_tunnel: bool,
    answer: Decoder,
    traffic: &'a Traffic,
    may_keep: bool,
    awaits: Awaits,
    has_moved: bool,
    last_moved: Instant,
}

impl<'a, 'd> Exchange<'a, 'd> {
    pub fn new(
        worker: &'a Worker,
        request: &'a Request,
        traffic: &'a Traffic,
        down: &'a mut Downstream<'d>,
        conn: &'a mut Conn,
    ) -> Self {
        Self {
            worker,
            request,
            down,
            conn,
            stage: Stage::Head(0),
            chunk: Vec::new(),
            sent: 0,
            is_last_chunk: false,
            is_tunnel: false,
            answer: Decoder::new(Framing::None),
            traffic,
            may_keep: false,
            awaits: Awaits::Machine,
            has_moved: true,
            last_moved: Instant::now(),
        }
    }

    /// Sends the request until the answer's head is there and passed on; its status.
    pub async fn head(&mut self, timeout: Duration, preferred_unavailable: Option<&str>) -> Result<u16, Fault> {
        poll_fn(|cx| {
            let upload = match self.poll_upload(cx) {
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Ready(Ok(())) => Awaits::Machine,
                Poll::Pending => self.awaits,
            };
            if let Poll::Ready(status) = self.poll_head(cx, preferred_unavailable) {
                return Poll::Ready(status);
            }
            if self.is_uploaded() && self.down.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Fault::Client(ClientFault::Gone)));
            }
            let silence = self.worker.edge.limits.body_idle_timeout;
            let limit = if upload == Awaits::Client { silence } else { timeout };
            ready!(self.poll_limit(cx, limit));
            Poll::Ready(Err(match upload {
                Awaits::Client => Fault::Client(ClientFault::Silent),
                Awaits::Machine => Fault::TooSlow,
            }))
        })
        .await
    }

    /// Passes the answer's body on, to its end.
    pub async fn body(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            let upload = self.poll_upload(cx);
            let uploads_from = upload.is_pending().then_some(self.awaits);
            if let Poll::Ready(done) = self.poll_answer(cx) {
                return Poll::Ready(done);
            }
            let is_gone = match upload {
                Poll::Ready(Err(_)) => true,
                Poll::Ready(Ok(())) => self.down.poll_gone(cx).is_ready(),
                Poll::Pending => false,
            };
            if is_gone {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, "the client left")));
            }
            let limits = &self.worker.edge.limits;
            let (limit, why) = match (self.awaits, uploads_from) {
                (Awaits::Client, _) => (limits.write_stall_timeout, "the client takes no bytes"),
                (Awaits::Machine, Some(Awaits::Client)) => (limits.body_idle_timeout, "nothing moves either way"),
                (Awaits::Machine, _) => (limits.response_idle_timeout, "the machine sends no more of its answer"),
            };
            ready!(self.poll_limit(cx, limit));
            Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)))
        })
        .await
    }

    /// After a change of protocol: bytes both ways until both sides have ended theirs.
    pub async fn tunnel(&mut self) -> io::Result<()> {
        self.down.become_tunnel();
        self.is_tunnel = true;
        self.stage = Stage::Body;
        self.answer = Decoder::new(Framing::ToEnd);
        let (mut is_up_done, mut is_down_done) = (false, false);
        let limit = self.worker.edge.limits.tunnel_idle_timeout;
        poll_fn(|cx| {
            if !is_up_done && let Poll::Ready(done) = self.poll_upload(cx) {
                done.map_err(|_| io::Error::new(io::ErrorKind::ConnectionReset, "the client left"))?;
                is_up_done = true;
            }
            if !is_down_done && let Poll::Ready(done) = self.poll_answer(cx) {
                done?;
                is_down_done = true;
            }
            // A machine that takes no more bytes has left.
            if is_up_done && (is_down_done || matches!(self.stage, Stage::Refused)) {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_limit(cx, limit));
            Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no byte either way for too long")))
        })
        .await
    }

    /// The connection may carry another request.
    pub fn may_keep(&self) -> bool {
        self.may_keep && self.is_whole()
    }

    /// Both messages went through to their ends.
    pub fn is_whole(&self) -> bool {
        matches!(self.stage, Stage::Done) && self.answer.is_done()
    }

    fn is_uploaded(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Refused)
    }

    fn poll_limit(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        if std::mem::take(&mut self.has_moved) | self.down.has_moved() {
            self.last_moved = Instant::now();
        }
        let watchdog = self.down.watchdog();
        watchdog.set(self.last_moved + limit);
        watchdog.poll(cx)
    }

    /// Ready when no more of the request is to be sent.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        loop {
            self.awaits = Awaits::Machine;
            match &self.stage {
                Stage::Done | Stage::Refused => return Poll::Ready(Ok(())),
                Stage::Head(sent) => {
                    let (head, sent) = (&self.request.head, *sent);
                    match ready!(Pin::new(&mut self.conn.io).poll_write(cx, &head[sent..])) {
                        Ok(count) if sent + count < head.len() && count > 0 => self.stage = Stage::Head(sent + count),
                        Ok(count) if count > 0 && self.request.body == Framing::None => self.stage = Stage::Done,
                        Ok(count) if count > 0 => self.stage = Stage::Body,
                        Ok(_) if sent == 0 => return Poll::Ready(Err(Fault::Unsent(io::ErrorKind::WriteZero.into()))),
                        Err(error) if sent == 0 => return Poll::Ready(Err(Fault::Unsent(error))),
                        Ok(_) | Err(_) => self.stage = Stage::Refused,
                    }
                }
                Stage::Body => {
                    if ready!(self.poll_body(cx))?.is_err() {
                        self.stage = Stage::Refused;
                    }
                }
                Stage::Shutdown => {
                    let shut = ready!(Pin::new(&mut self.conn.io).poll_shutdown(cx));
                    self.stage = if shut.is_ok() { Stage::Done } else { Stage::Refused };
                }
            }
            self.has_moved = true;
        }
    }

    /// Sends some of the body, and sets the stage when it has ended. The inner error is the machine's.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<io::Result<()>, Fault>> {
        while self.sent < self.chunk.len() {
            match ready!(Pin::new(&mut self.conn.io).poll_write(cx, &self.chunk[self.sent..])) {
                Ok(0) => return Poll::Ready(Ok(Err(io::ErrorKind::WriteZero.into()))),
                Ok(count) => self.sent += count,
                Err(error) => return Poll::Ready(Ok(Err(error))),
            }
        }
        (self.sent, self.chunk) = (0, Vec::new());
        if self.is_last_chunk {
            self.stage = Stage::Done;
            return Poll::Ready(Ok(Ok(())));
        }
        self.awaits = Awaits::Client;
        let has_data = ready!(self.down.poll_body(cx)).map_err(|fault| Fault::Client(fault.into()))?;
        self.awaits = Awaits::Machine;
        let in_chunks = self.request.body == Framing::Chunked && !self.is_tunnel;
        match (has_data, in_chunks) {
            (true, false) => {
                match ready!(Pin::new(&mut self.conn.io).poll_write(cx, self.down.body())) {
                    Ok(0) => return Poll::Ready(Ok(Err(io::ErrorKind::WriteZero.into()))),
                    Ok(count) => self.took(count),
                    Err(error) => return Poll::Ready(Ok(Err(error))),
                }
            }
            (true, true) => {
                let data = self.down.body();
                let data = &data[..data.len().min(MAX_CHUNK)];
                chunk_size(&mut self.chunk, data.len());
                self.chunk.extend_from_slice(data);
                self.chunk.extend_from_slice(b"\r\n");
                let count = data.len();
                self.took(count);
            }
            (false, true) => {
                self.chunk.extend_from_slice(b"0\r\n");
                plain_trailers(self.down.trailers(), |name, value| line(&mut self.chunk, name.as_bytes(), value));
                self.chunk.extend_from_slice(b"\r\n");
                self.is_last_chunk = true;
            }
            (false, false) => self.stage = if self.is_tunnel { Stage::Shutdown } else { Stage::Done },
        }
        Poll::Ready(Ok(Ok(())))
    }

    fn took(&mut self, count: usize) {
        self.down.consume(count);
        self.traffic.bytes_in.update(|bytes| bytes + count as u64);
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, preferred_unavailable: Option<&str>) -> Poll<Result<u16, Fault>> {
        let Self { worker, request, conn, down, .. } = self;
        loop {
            if !conn.inbox.is_empty() {
                let mut space = room();
                match Reply::read(conn.inbox.bytes(), &mut space, request) {
                    Ok(Some((reply, size))) if reply.is_interim() => {
                        conn.inbox.consume(size);
                        continue;
                    }
                    Ok(Some((reply, _))) if reply.status == 101 && !request.is_upgrade => {
                        return Poll::Ready(Err(broken("it changed the protocol, which nobody asked for")));
                    }
                    Ok(Some((mut reply, size))) => {
                        reply.preferred_unavailable = preferred_unavailable;
                        let begun = down.begin(worker, request, &reply);
                        (self.answer, self.may_keep) = (Decoder::new(reply.body), reply.may_keep);
                        let status = reply.status;
                        conn.inbox.consume(size);
                        self.has_moved = true;
                        return Poll::Ready(begun.map(|()| status).map_err(|_| Fault::Client(ClientFault::Gone)));
                    }
                    Ok(None) if conn.inbox.is_full() => {
                        return Poll::Ready(Err(broken("the head of its answer is too big")));
                    }
                    Ok(None) => {}
                    Err(error) => return Poll::Ready(Err(Fault::Broken(io::Error::other(error)))),
                }
            }
            let filled = conn.inbox.poll_fill(&mut conn.io, cx);
            if filled.is_pending() && !conn.inbox.is_empty() {
                conn.acknowledge();
            }
            match ready!(filled) {
                Ok(0) => return Poll::Ready(Err(broken("no answer came"))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Fault::Broken(error))),
            }
        }
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { conn, down, answer, .. } = self;
        loop {
            match answer.next(conn.inbox.bytes()).map_err(io::Error::other)? {
                Piece::Data { skip, len } => {
                    conn.inbox.consume(skip);
                    self.awaits = Awaits::Client;
                    let is_last = answer.completes_with(len);
                    let count = ready!(down.poll_send(cx, &conn.inbox.bytes()[..len], is_last))?;
                    conn.inbox.consume(count);
                    answer.took(count);
                    self.traffic.bytes_out.update(|bytes| bytes + count as u64);
                    self.has_moved = true;
                }
                Piece::End { skip } => {
                    conn.inbox.consume(skip);
                    self.awaits = Awaits::Client;
                    let trailers = if self.request.takes_trailers { answer.trailers() } else { &[] };
                    return down.poll_finish(cx, trailers);
                }
                Piece::More { skip } => {
                    conn.inbox.consume(skip);
                    // What was gathered goes out before more is waited for.
                    self.awaits = if down.poll_flush(cx)?.is_ready() { Awaits::Machine } else { Awaits::Client };
                    let filled = conn.inbox.poll_fill(&mut conn.io, cx);
                    if filled.is_pending() {
                        conn.acknowledge();
                    }
                    match ready!(filled)? {
                        0 if answer.may_end() => answer.end(),
                        0 => return Poll::Ready(Err(io::Error::other("the machine broke off its answer"))),
                        _ => self.has_moved = true,
                    }
                }
            }
        }
    }
}

fn broken(why: &'static str) -> Fault {
    Fault::Broken(io::Error::other(why))
}
