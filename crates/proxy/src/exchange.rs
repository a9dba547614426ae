//! One request on its way to a machine and the answer on its way back, over one connection to the machine.
//!
//! Polled inside the request's own future: no task, no channel between the two sockets. Uploads go on beside
//! answers.

use crate::access::Traffic;
use crate::downstream::{BodyFault, Downstream};
use crate::fields::{line, plain_trailers};
use crate::framing::{Decoder, Framing, MAX_CHUNK, Piece, chunk_size};
use crate::hop::{self, Ask, Denial, What};
use crate::listen::Worker;
use crate::reply::{Notes, Reply, room};
use crate::request::Request;
use crate::upstream::{Conn, HEAD_TAKEN_WITHIN, Upstream};
use dunlin_api::{Admission, AdmitRefusal, AdmitRequest};
use dunlin_model::ConcurrencyKind;
use dunlin_routing::Candidate;
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
    /// The connection broke after the request was (partly) sent, or what came is no answer. `was_kept`: it had carried a
    /// request before, and may have been closed for that.
    Broken { error: io::Error, was_kept: bool },
    /// The machine was silent for too long.
    TooSlow,
    /// The machine's host, which is another one, does not admit it.
    Refused(AdmitRefusal),
    /// The machine takes no connection from its host, which is another one.
    Unreached(io::Error),
    Client(ClientFault),
}

impl From<Denial> for Fault {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::Refused(refusal) => Self::Refused(refusal),
            Denial::Unreached(why) => Self::Unreached(io::Error::other(why)),
            Denial::Broken { why, kept } => Self::Broken { error: io::Error::other(why), was_kept: kept },
            Denial::TooSlow => Self::TooSlow,
        }
    }
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
    /// The body waits until the last hop asks for it.
    Held,
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
    /// The head for a last hop; empty = the machine's.
    hop_head: Vec<u8>,
    stage: Stage,
    /// What was written may lie in TLS's buffer.
    is_unflushed: bool,
    /// The last hop has asked for the body.
    was_asked: bool,
    /// What of the body is to be written before more is read, up to `sent`: chunks.
    chunk: Vec<u8>,
    sent: usize,
    is_last_chunk: bool,
    is_tunnel: bool,
    answer: Decoder,
    traffic: &'a Traffic,
    /// The machine's place, given back when its answer is complete.
    pub admission: Option<Admission>,
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
        let hop_head = match &conn.to {
            Upstream::Hop { target, is_doubtful } => hop_head(worker, request, target, *is_doubtful),
            _ => Vec::new(),
        };
        Self {
            worker,
            request,
            down,
            conn,
            hop_head,
            is_unflushed: false,
            was_asked: false,
            admission: None,
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
    pub async fn head(&mut self, timeout: Duration, notes: Notes<'_>) -> Result<u16, Fault> {
        let mut is_quick = !self.hop_head.is_empty();
        if is_quick {
            self.conn.be_quick();
        }
        let status = poll_fn(|cx| {
            let upload = match self.poll_upload(cx) {
                Poll::Ready(Err(fault)) => return Poll::Ready(Err(fault)),
                Poll::Ready(Ok(())) => Awaits::Machine,
                Poll::Pending => self.awaits,
            };
            if let Poll::Ready(status) = self.poll_head(cx, notes) {
                return Poll::Ready(status);
            }
            if (self.is_uploaded() || matches!(self.stage, Stage::Held)) && self.down.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(Fault::Client(ClientFault::Gone)));
            }
            if is_quick {
                ready!(self.poll_limit(cx, HEAD_TAKEN_WITHIN + HEAD_TAKEN_WITHIN / 4));
                self.conn.be_patient(); // the head has arrived, or the connection would be gone
                is_quick = false;
            }
            let silence = self.worker.edge.limits.body_idle_timeout;
            let limit = if upload == Awaits::Client { silence } else { timeout };
            ready!(self.poll_limit(cx, limit));
            Poll::Ready(Err(match upload {
                Awaits::Client => Fault::Client(ClientFault::Silent),
                Awaits::Machine => Fault::TooSlow,
            }))
        })
        .await?;
        if is_quick {
            self.conn.be_patient();
        }
        Ok(status)
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
                Stage::Done | Stage::Refused => {
                    if ready!(self.poll_push(cx)).is_err() {
                        self.stage = Stage::Refused;
                    }
                    return Poll::Ready(Ok(()));
                }
                Stage::Held => {
                    if ready!(self.poll_push(cx)).is_ok() {
                        return Poll::Pending; // the last hop's word wakes it
                    }
                    self.stage = Stage::Refused;
                }
                Stage::Head(sent) => {
                    let is_hop = !self.hop_head.is_empty();
                    let (head, sent) = (if is_hop { &self.hop_head } else { &self.request.head }, *sent);
                    let written = ready!(Pin::new(&mut self.conn.io).poll_write(cx, &head[sent..]));
                    self.is_unflushed = is_hop;
                    match written {
                        Ok(count) if sent + count < head.len() && count > 0 => self.stage = Stage::Head(sent + count),
                        Ok(count) if count > 0 && !has_body(self.request) => self.stage = Stage::Done,
                        Ok(count) if count > 0 && is_hop => self.stage = Stage::Held,
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

    /// TLS lets go of what was written.
    fn poll_push(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_unflushed {
            ready!(Pin::new(&mut self.conn.io).poll_flush(cx))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends some of the body, and sets the stage when it has ended. The inner error is the machine's.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<io::Result<()>, Fault>> {
        let is_hop = !self.hop_head.is_empty();
        while self.sent < self.chunk.len() {
            self.is_unflushed = is_hop;
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
        if let Err(error) = ready!(self.poll_push(cx)) {
            return Poll::Ready(Ok(Err(error)));
        }
        self.awaits = Awaits::Client;
        let has_data = ready!(self.down.poll_body(cx)).map_err(|fault| Fault::Client(fault.into()))?;
        self.awaits = Awaits::Machine;
        let in_chunks = self.request.body == Framing::Chunked && !self.is_tunnel;
        match (has_data, in_chunks) {
            (true, false) => {
                self.is_unflushed = is_hop;
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

    fn poll_head(&mut self, cx: &mut Context<'_>, notes: Notes<'_>) -> Poll<Result<u16, Fault>> {
        let is_hop = !self.hop_head.is_empty();
        let Self { worker, request, conn, down, .. } = self;
        let was_kept = conn.is_reused;
        let broken = |error| Poll::Ready(Err(Fault::Broken { error, was_kept }));
        loop {
            if !conn.inbox.is_empty() {
                let mut space = room();
                match Reply::read(conn.inbox.bytes(), &mut space, request.method()) {
                    Ok(Some((reply, size))) if reply.is_interim() => {
                        conn.inbox.consume(size);
                        if matches!(self.stage, Stage::Held) {
                            (self.stage, self.was_asked) = (Stage::Body, true);
                            conn.be_patient();
                            cx.waker().wake_by_ref();
                        }
                        continue;
                    }
                    Ok(Some((reply, size))) if is_hop && let Some(denial) = Denial::read(reply.fields) => {
                        self.may_keep = reply.may_keep && reply.length == Some(0);
                        conn.inbox.consume(size);
                        if matches!(self.stage, Stage::Held) {
                            self.stage = Stage::Done;
                        }
                        return Poll::Ready(Err(denial.into()));
                    }
                    Ok(Some((reply, _))) if reply.status == 101 && !request.is_upgrade => {
                        return broken(io::Error::other("it changed the protocol, which nobody asked for"));
                    }
                    Ok(Some((mut reply, size))) => {
                        if matches!(self.stage, Stage::Held) {
                            self.stage = Stage::Refused;
                        }
                        reply.notes = notes;
                        let begun = down.begin(worker, request, &reply);
                        (self.answer, self.may_keep) = (Decoder::new(reply.body), reply.may_keep);
                        let status = reply.status;
                        conn.inbox.consume(size);
                        self.has_moved = true;
                        return Poll::Ready(begun.map(|()| status).map_err(|_| Fault::Client(ClientFault::Gone)));
                    }
                    Ok(None) if conn.inbox.is_full() => {
                        return broken(io::Error::other("the head of its answer is too big"));
                    }
                    Ok(None) => {}
                    Err(error) => return broken(io::Error::other(error)),
                }
            }
            let filled = conn.inbox.poll_fill(&mut conn.io, cx);
            if filled.is_pending() && !conn.inbox.is_empty() {
                conn.acknowledge();
            }
            match ready!(filled) {
                // TLS says that this end was meant: the last hop closed the connection before it looked at the request.
                Ok(0) if is_hop && conn.inbox.is_empty() && !self.was_asked => {
                    return Poll::Ready(Err(Fault::Unsent(io::ErrorKind::ConnectionAborted.into())));
                }
                Ok(0) => return broken(io::Error::other("no answer came")),
                Ok(_) => {}
                Err(error) => return broken(error),
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
                    if is_last {
                        self.admission = None;
                    }
                    let count = ready!(down.poll_send(cx, &conn.inbox.bytes()[..len], is_last))?;
                    conn.inbox.consume(count);
                    answer.took(count);
                    self.traffic.bytes_out.update(|bytes| bytes + count as u64);
                    self.has_moved = true;
                }
                Piece::End { skip } => {
                    self.admission = None;
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

impl Drop for Exchange<'_, '_> {
    fn drop(&mut self) {
        self.worker.buffers.give_head_back(std::mem::take(&mut self.hop_head));
    }
}

fn has_body(request: &Request) -> bool {
    !matches!(request.body, Framing::None | Framing::Length(0))
}

/// The machine's head with a line for its host in front of the end.
fn hop_head(worker: &Worker, request: &Request, target: &Candidate, is_doubtful: bool) -> Vec<u8> {
    let what = What::Forward {
        holds: has_body(request),
        once: target.service.concurrency.kind == ConcurrencyKind::Connections,
        or_another: is_doubtful,
    };
    let ask = Ask { admit: admit_request(target), wait: Duration::ZERO, what };
    let mut head = worker.buffers.take_head();
    head.extend_from_slice(&request.head[..request.head.len() - 2]);
    line(&mut head, hop::FIELD.as_bytes(), ask.value().as_bytes());
    head.extend_from_slice(b"\r\n");
    head
}

/// What the edge knows of a machine, for its host to compare.
pub(crate) fn admit_request(target: &Candidate) -> AdmitRequest {
    AdmitRequest {
        machine: target.machine.clone(),
        version: target.version.clone(),
        placement: target.placement,
        internal_port: target.service.internal_port,
    }
}
