//! An answer's head: read from the machine, and what of it the client gets.

use crate::fields::{Answered, ConnectionOptions, MAX_FIELDS_HOP};
use crate::framing::Framing;
use crate::log::decimal;
use crate::request::{Request, Sender, length};
use httparse::Header;
use std::mem::MaybeUninit;

/// The machine's answer is none that HTTP/1.1 knows.
#[derive(Debug, thiserror::Error)]
#[error("its answer cannot be read: {0}")]
pub(crate) struct Unreadable(&'static str);

/// Room for the fields of one head.
pub(crate) type Room<'b> = [MaybeUninit<Header<'b>>; MAX_FIELDS_HOP];

pub(crate) fn room<'b>() -> Room<'b> {
    [const { MaybeUninit::uninit() }; MAX_FIELDS_HOP]
}

/// A head on its way from a machine, or from the edge itself, to the client.
pub(crate) struct Reply<'a> {
    pub status: u16,
    /// Empty = the usual one.
    pub reason: &'a str,
    pub fields: &'a [Header<'a>],
    options: ConnectionOptions<'a>,
    /// What follows the head.
    pub body: Framing,
    /// What the head says of the body's length, HEAD's answer included.
    pub length: Option<u64>,
    /// The machine's connection can carry another request afterwards.
    pub may_keep: bool,
    pub notes: Notes<'a>,
    is_own: bool,
}

/// What an edge adds to a machine's answer, about the choice of that machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Notes<'a> {
    /// `fly-preferred-instance-unavailable`.
    pub preferred_unavailable: Option<&'a str>,
    /// `dunlin-stale`: `old`, nothing was heard of the machine's host for long; `cut-off`, nor of most hosts for a while.
    pub stale: Option<&'static str>,
}

impl<'a> Reply<'a> {
    /// The edge's own, with a body of this length.
    pub fn own(status: u16, fields: &'a [Header<'a>], length: usize, is_head: bool) -> Self {
        let length = length as u64;
        Self {
            status,
            reason: "",
            fields,
            options: ConnectionOptions::default(),
            body: if is_head { Framing::None } else { Framing::Length(length) },
            length: Some(length),
            may_keep: true,
            notes: Notes::default(),
            is_own: true,
        }
    }

    /// The next head in `bytes` and how long it is; `None` = it is not complete yet.
    pub fn read(
        bytes: &'a [u8],
        room: &'a mut Room<'a>,
        method: &str,
    ) -> Result<Option<(Self, usize)>, Unreadable> {
        let mut parsed = httparse::Response::new(&mut []);
        let config = httparse::ParserConfig::default();
        let size = match config.parse_response_with_uninit_headers(&mut parsed, bytes, room) {
            Ok(httparse::Status::Complete(size)) => size,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Unreadable("it has too many header fields")),
            Err(_) => return Err(Unreadable("it is no HTTP/1.1")),
        };
        let (Some(status), Some(version)) = (parsed.code, parsed.version) else {
            return Err(Unreadable("it has no status"));
        };
        let fields: &'a [Header<'a>] = parsed.headers;
        let (mut said, mut coding) = (None, None);
        let mut options = ConnectionOptions::default();
        for field in fields {
            match Answered::of(field.name) {
                Answered::ContentLength => {
                    let value = length(field.value).ok_or(Unreadable("its Content-Length is not a number"))?;
                    if said.is_some_and(|before| before != value) {
                        return Err(Unreadable("it has two lengths"));
                    }
                    said = Some(value);
                }
                Answered::TransferEncoding if coding.is_some() => return Err(Unreadable("it is coded twice")),
                Answered::TransferEncoding => coding = Some(field.value),
                Answered::Connection => options.read(field.value),
                _ => {}
            }
        }
        let has_both = said.is_some() && coding.is_some();
        let body = match (status, coding, said) {
            (100..=199 | 204 | 304, ..) => Framing::None,
            _ if method == "HEAD" => Framing::None,
            (_, Some(coding), _) if version == 1 && coding.eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
            (_, Some(_), _) => return Err(Unreadable("its Transfer-Encoding is not just chunked")),
            (_, None, Some(length)) => Framing::Length(length),
            (_, None, None) => Framing::ToEnd,
        };
        let reply = Self {
            status,
            reason: parsed.reason.unwrap_or_default(),
            fields,
            may_keep: version == 1 && !options.close && body != Framing::ToEnd && !has_both,
            options,
            body,
            length: said.filter(|_| coding.is_none() && status >= 200 && status != 204),
            notes: Notes::default(),
            is_own: false,
        };
        Ok(Some((reply, size)))
    }

    /// More of the same answer follows: `100 Continue`, `103 Early Hints`.
    pub fn is_interim(&self) -> bool {
        (100..=199).contains(&self.status) && self.status != 101
    }

    /// The protocol that a 101 changes to.
    pub fn upgrade(&self) -> Option<&'a [u8]> {
        self.fields.iter().find(|field| Answered::of(field.name) == Answered::Upgrade).map(|field| field.value)
    }

    /// The fields that the client gets, those that say how the connection goes on excepted. Another edge gets what the
    /// machine said, and says the rest itself.
    pub fn each(&self, date: &str, request: &Request, mut to: impl FnMut(&str, &[u8])) {
        let (mut has_server, mut has_date) = (false, false);
        for field in self.fields {
            match Answered::of(field.name) {
                Answered::Server => has_server = true,
                Answered::Date => has_date = true,
                Answered::Plain => {}
                Answered::OnlyTheEdge if self.is_own => {}
                _ => continue,
            }
            if !self.options.names(field.name) {
                to(field.name, field.value);
            }
        }
        if let Some(length) = self.length {
            let mut text = Vec::with_capacity(20);
            decimal(&mut text, length);
            to("content-length", &text);
        }
        if request.sender == Sender::Edge {
            return;
        }
        if let Some(id) = self.notes.preferred_unavailable {
            to("fly-preferred-instance-unavailable", id.as_bytes());
        }
        if let Some(age) = self.notes.stale {
            to("dunlin-stale", age.as_bytes());
        }
        to("via", b"1.1 dunlin");
        if !has_server {
            to("server", b"dunlin");
        }
        if !has_date {
            to("date", date.as_bytes());
        }
        let id = request.id.as_str().as_bytes();
        to("fly-request-id", id);
        to("dunlin-request-id", id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Message, Origin, Protocol};

    fn request(from: Sender) -> Request {
        let message = Message {
            protocol: Protocol::Http11,
            method: "GET",
            target: "/",
            authority: Some("a.example"),
            fields: &[],
            may_have_body: true,
            connect_protocol: None,
        };
        let id = crate::random::Random::seeded().unwrap().request_id(0);
        let origin = Origin { lines: b"", id, websocket_key: &String::new, from };
        Request::read(&message, &origin, Vec::new())
    }

    fn check(method: &str, head: &str, expected: Option<(Framing, bool)>) {
        let mut space = room();
        let read = Reply::read(head.as_bytes(), &mut space, method);
        match (read, expected) {
            (Ok(Some((reply, size))), Some(expected)) => {
                assert_eq!((reply.body, reply.may_keep), expected, "{head}");
                assert_eq!(size, head.len());
            }
            (Err(_), None) => {}
            (read, _) => panic!("{head}: {:?}", read.map(|read| read.map(|(reply, _)| reply.body))),
        }
    }

    #[test]
    fn answers_end_where_they_say() {
        for (method, head, expected) in [
            ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", Some((Framing::Length(3), true))),
            ("GET", "HTTP/1.1 200\r\nContent-Length: 3\r\ncontent-length: 3\r\n\r\n", Some((Framing::Length(3), true))),
            ("GET", "HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", Some((Framing::Chunked, true))),
            ("GET", "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", Some((Framing::Length(0), false))),
            ("GET", "HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\n", Some((Framing::Length(3), false))),
            ("GET", "HTTP/1.1 200 OK\r\n\r\n", Some((Framing::ToEnd, false))),
            ("GET", "HTTP/1.1 204 No\r\n\r\n", Some((Framing::None, true))),
            ("GET", "HTTP/1.1 304 No\r\ncontent-length: 3\r\n\r\n", Some((Framing::None, true))),
            ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", Some((Framing::None, true))),
            ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", Some((Framing::None, true))),
            // Chunks count, and the connection ends with them: somebody did not know what he did.
            ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", Some((Framing::Chunked, false))),
            ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", None),
            ("GET", "HTTP/1.1 200 OK\r\ncontent-length: -3\r\n\r\n", None),
            ("GET", "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", None),
            ("GET", "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
            ("GET", "SSH-2.0-OpenSSH\r\n\r\n", None),
        ] {
            check(method, head, expected);
        }
    }

    #[test]
    fn the_client_gets_what_is_for_it() {
        let head = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nconnection: x-b\r\nX-B: 2\r\nkeep-alive: 5\r\nServer: app\r\n\
            trailer: grpc-status\r\nfly-request-id: mine\r\ndunlin-stale: mine\r\nDunlin-Hop-Refused: not-here\r\n\
            transfer-encoding: chunked\r\nvia: 1.1 other\r\n\r\n";
        let from_machine = "X-A: 1\nServer: app\ntrailer: grpc-status\nvia: 1.1 other\n";
        for (from, added) in [
            (Sender::Client, "dunlin-stale: old\nvia: 1.1 dunlin\ndate: now\nfly-request-id: ID\ndunlin-request-id: ID\n"),
            (Sender::Edge, ""),
        ] {
            let mut space = room();
            let request = request(from);
            let (mut reply, _) = Reply::read(head, &mut space, "GET").unwrap().unwrap();
            reply.notes.stale = Some("old");
            let mut text = String::new();
            reply.each("now", &request, |name, value| text += &format!("{name}: {}\n", String::from_utf8_lossy(value)));
            assert_eq!(text.replace(request.id.as_str(), "ID"), format!("{from_machine}{added}"));
        }
    }
}
