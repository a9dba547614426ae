//! The client's side of one exchange, over either protocol.

use crate::framing::Malformed;
use crate::http1::Http1;
use crate::http2::Http2;
use crate::listen::Worker;
use crate::reply::Reply;
use crate::request::Request;
use crate::time::Watchdog;
use std::io;
use std::task::{Context, Poll};

pub(crate) enum Downstream<'a> {
    Http1(&'a mut Http1),
    Http2(&'a mut Http2),
}

/// Why no more of a request's body comes.
#[derive(Debug)]
pub(crate) enum BodyFault {
    /// The client left, or broke off the request.
    Gone,
    Malformed(Malformed),
}

macro_rules! either {
    ($self:ident, $io:ident => $does:expr) => {
        match $self {
            Self::Http1($io) => $does,
            Self::Http2($io) => $does,
        }
    };
}

impl Downstream<'_> {
    /// Ready with `true` when [`Downstream::body`] has bytes of the request's body, with `false` at its end.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyFault>> {
        either!(self, io => io.poll_body(cx))
    }

    pub fn body(&self) -> &[u8] {
        either!(self, io => io.body())
    }

    pub fn consume(&mut self, count: usize) {
        either!(self, io => io.consume(count));
    }

    /// The lines behind the request's body, once it has ended.
    pub fn trailers(&self) -> &[u8] {
        either!(self, io => io.trailers())
    }

    /// Ready when the client has left. Asked while nothing else is expected of it.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        either!(self, io => io.poll_gone(cx))
    }

    /// Begins the answer. From then on there is no way back to another one.
    pub fn begin(&mut self, worker: &Worker, request: &Request, reply: &Reply<'_>) -> io::Result<()> {
        either!(self, io => io.begin(worker, request, reply))
    }

    /// Takes some bytes of the answer's body. `is_last` says that no others follow these.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, data: &[u8], is_last: bool) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_send(cx, data, is_last))
    }

    /// Lets go of what was gathered.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_flush(cx))
    }

    /// Ends the answer, and sees it off.
    pub fn poll_finish(&mut self, cx: &mut Context<'_>, trailers: &[u8]) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_finish(cx, trailers))
    }

    /// From now on bytes go both ways until either side ends.
    pub fn become_tunnel(&mut self) {
        either!(self, io => io.become_tunnel());
    }

    /// Breaks off, so that the client sees an incomplete answer as that.
    pub fn fail(&mut self) {
        either!(self, io => io.fail());
    }

    /// Whether the client took bytes since the last question.
    pub fn has_moved(&mut self) -> bool {
        either!(self, io => std::mem::take(&mut io.has_moved))
    }

    pub fn watchdog(&mut self) -> &mut Watchdog {
        either!(self, io => &mut io.watchdog)
    }
}
