//! A request's head: checked, and rewritten for the machine into one buffer.
//!
//! Both protocols end up here. Whatever several servers could read in different ways is refused; what goes on
//! is written anew from what was understood, so a machine never sees a byte of framing that the edge did not.

use crate::answer::{Form, fault};
use crate::fields::{Asked, ConnectionOptions, MAX_FIELDS, MAX_FIELDS_HOP, has_token, line};
use crate::framing::Framing;
use crate::hop::{self, Ask, What};
use crate::log::decimal;
use crate::random::RequestId;
use dunlin_routing::{Reject, host_name};
use httparse::Header;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http10,
    Http11,
    Http2,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2.0",
        }
    }
}

/// A head as its protocol's parser read it.
pub(crate) struct Message<'a> {
    pub protocol: Protocol,
    pub method: &'a str,
    /// With its query; over HTTP/1 it may be a whole URL.
    pub target: &'a str,
    /// `:authority` of HTTP/2.
    pub authority: Option<&'a str>,
    pub fields: &'a [Header<'a>],
    /// HTTP/2 says whether a body follows; HTTP/1 says it in fields.
    pub may_have_body: bool,
    /// The protocol that an extended CONNECT asks for (RFC 8441).
    pub connect_protocol: Option<&'a str>,
}

/// What the edge adds.
pub(crate) struct Origin<'a> {
    /// Lines that are the same for all requests of a connection.
    pub lines: &'a [u8],
    pub id: RequestId,
    /// For a WebSocket over HTTP/2, whose opening is translated.
    pub websocket_key: &'a dyn Fn() -> String,
    pub from: Sender,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    Client,
    /// Another edge, which has said already what only edges may say.
    Edge,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    pub protocol: Protocol,
    /// Lower case, without port.
    pub host: Box<str>,
    /// As the machine gets it, with the empty line.
    pub head: Vec<u8>,
    method_len: usize,
    target_len: usize,
    pub body: Framing,
    /// It asks to change the protocol, in a way that goes on.
    pub is_upgrade: bool,
    pub takes_trailers: bool,
    pub expects_continue: bool,
    /// The client would send another on this connection.
    pub keep_alive: bool,
    pub form: Form,
    pub force_instance: Option<Box<str>>,
    pub prefer_instance: Option<Box<str>>,
    pub force_region: Option<Box<str>>,
    pub prefer_region: Option<Box<str>>,
    pub sender: Sender,
    /// What another edge wants; `None` from it = what it said is not understood.
    pub hop: Option<Box<Ask>>,
    /// Why it goes nowhere.
    pub fault: Option<Box<Reject>>,
}

impl Request {
    /// One whose head could not be read.
    pub fn unreadable(protocol: Protocol, id: RequestId, fault: Reject) -> Self {
        Self { fault: Some(Box::new(fault)), ..Self::blank(protocol, id, ("-", "-"), Vec::new()) }
    }

    fn blank(protocol: Protocol, id: RequestId, (method, target): (&str, &str), mut head: Vec<u8>) -> Self {
        head.extend_from_slice(method.as_bytes());
        head.push(b' ');
        head.extend_from_slice(target.as_bytes());
        Self {
            id,
            protocol,
            host: Box::default(),
            head,
            method_len: method.len(),
            target_len: target.len(),
            body: Framing::None,
            is_upgrade: false,
            takes_trailers: false,
            expects_continue: false,
            keep_alive: false,
            form: Form::Text,
            force_instance: None,
            prefer_instance: None,
            force_region: None,
            prefer_region: None,
            sender: Sender::Client,
            hop: None,
            fault: None,
        }
    }

    /// Reads a message and makes the machine's head of it, in `head`.
    pub fn read(message: &Message<'_>, origin: &Origin<'_>, head: Vec<u8>) -> Self {
        let (authority, target) = split_target(message);
        let method = if message.connect_protocol.is_some() { "GET" } else { message.method };
        let mut request = Self::blank(message.protocol, origin.id, (method, target), head);
        request.sender = origin.from;
        if let Err(fault) = request.fill(message, authority, origin) {
            // Where it ends is not known for sure: nothing more is read of this connection.
            request.keep_alive = false;
            request.fault = Some(Box::new(fault));
        }
        request
    }

    pub fn method(&self) -> &str {
        std::str::from_utf8(&self.head[..self.method_len]).unwrap_or_default()
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        let start = self.method_len + 1;
        std::str::from_utf8(&self.head[start..start + self.target_len]).unwrap_or_default()
    }

    pub fn path(&self) -> &str {
        let target = self.target();
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    pub fn is_head(&self) -> bool {
        self.method() == "HEAD"
    }

    /// It changes nothing and has no body: it may be sent again although it may have arrived.
    pub fn may_repeat(&self) -> bool {
        self.body == Framing::None && matches!(self.method(), "GET" | "HEAD" | "OPTIONS")
    }

    fn fill(&mut self, message: &Message<'_>, authority: Option<&str>, origin: &Origin<'_>) -> Result<(), Reject> {
        let most = if origin.from == Sender::Edge { MAX_FIELDS_HOP } else { MAX_FIELDS };
        if message.fields.len() > most {
            return Err(fault(431, "PC05", "the request has too many header fields", "send fewer, or fewer cookies"));
        }
        let mut kinds = [Asked::Plain; MAX_FIELDS_HOP];
        let seen = Seen::look(message.fields, &mut kinds)?;
        self.form = Form::wanted(seen.accept);
        self.keep_alive = match message.protocol {
            Protocol::Http10 => seen.options.keep_alive && !seen.options.close,
            _ => !seen.options.close,
        };
        if matches!(message.method, "CONNECT" | "TRACE") && message.connect_protocol.is_none() {
            let reason = format!("the edge does not serve {}", message.method);
            return Err(fault(405, "PC03", reason, "use another method"));
        }
        check_target(self.target(), self.method())?;
        let host = seen.authority(message.protocol, authority)?;
        let Some(name) = host_name(host) else {
            return Err(fault(400, "PC01", "the Host header is not a host name", "send the name of an app's URL"));
        };
        self.host = name.into();
        // What follows an extended CONNECT is no body, but the other protocol.
        self.body = if message.connect_protocol.is_some() { Framing::None } else { seen.framing(message)? };
        let id = |value: Option<&[u8]>| value.and_then(|value| std::str::from_utf8(value).ok()).map(Into::into);
        (self.force_instance, self.prefer_instance) = (id(seen.force_instance), id(seen.prefer_instance));
        (self.force_region, self.prefer_region) = (id(seen.force_region), id(seen.prefer_region));
        self.takes_trailers = seen.takes_trailers && message.protocol != Protocol::Http10;
        self.expects_continue = seen.expects_continue && message.protocol == Protocol::Http11;
        if origin.from == Sender::Edge {
            self.id = seen.id.and_then(RequestId::read).unwrap_or(self.id);
            self.hop = seen.hop.and_then(Ask::read).map(Box::new);
            self.expects_continue = matches!(self.hop.as_deref(), Some(Ask { what: What::Forward { holds: true, .. }, .. }));
        }
        let upgrade = match message.connect_protocol {
            Some(protocol) => Some(protocol.as_bytes()),
            None => seen.upgrade.filter(|_| self.body == Framing::None && message.protocol == Protocol::Http11),
        };
        self.is_upgrade = upgrade.is_some();
        self.write(message, &kinds, &seen, host, upgrade, origin);
        Ok(())
    }

    fn write(
        &mut self,
        message: &Message<'_>,
        kinds: &[Asked],
        seen: &Seen<'_>,
        host: &str,
        upgrade: Option<&[u8]>,
        origin: &Origin<'_>,
    ) {
        let method_wants_body = matches!(self.method(), "POST" | "PUT" | "PATCH");
        let out = &mut self.head;
        out.extend_from_slice(b" HTTP/1.1\r\n");
        line(out, b"host", host.as_bytes());
        let mut cookies = 0;
        for (field, kind) in message.fields.iter().zip(kinds) {
            let goes_on = match kind {
                Asked::Plain | Asked::Accept | Asked::ForceInstance | Asked::PreferInstance => true,
                Asked::ForceRegion | Asked::PreferRegion => true,
                Asked::OnlyTheEdge => origin.from == Sender::Edge,
                _ => false,
            };
            if goes_on && !seen.options.names(field.name) {
                line(out, field.name.as_bytes(), field.value);
            }
            cookies += usize::from(*kind == Asked::Cookie);
        }
        if cookies > 0 && !seen.options.names("cookie") {
            out.extend_from_slice(b"cookie: ");
            let all = message.fields.iter().zip(kinds).filter(|(_, kind)| **kind == Asked::Cookie);
            for (n, (field, _)) in all.enumerate() {
                out.extend_from_slice(if n == 0 { b"" } else { b"; " });
                out.extend_from_slice(field.value);
            }
            out.extend_from_slice(b"\r\n");
        }
        match self.body {
            Framing::Chunked => line(out, b"transfer-encoding", b"chunked"),
            Framing::Length(length) => content_length(out, length),
            // A method that usually has a body says that it has none; over HTTP/2 nobody had to say so.
            Framing::None if message.protocol == Protocol::Http2 && method_wants_body => content_length(out, 0),
            Framing::None | Framing::ToEnd => {}
        }
        if let Some(protocol) = upgrade {
            line(out, b"connection", b"upgrade");
            line(out, b"upgrade", protocol);
            if message.connect_protocol.is_some() {
                line(out, b"sec-websocket-key", (origin.websocket_key)().as_bytes());
            }
        } else if self.takes_trailers {
            out.extend_from_slice(b"te: trailers\r\nconnection: te\r\n");
        }
        if origin.from == Sender::Client {
            out.extend_from_slice(origin.lines);
            line(out, b"fly-request-id", origin.id.as_str().as_bytes());
            line(out, b"dunlin-request-id", origin.id.as_str().as_bytes());
        }
        out.extend_from_slice(b"\r\n");
    }
}

pub(crate) fn content_length(out: &mut Vec<u8>, length: u64) {
    out.extend_from_slice(b"content-length: ");
    decimal(out, length);
    out.extend_from_slice(b"\r\n");
}

fn bad(reason: &str) -> Reject {
    fault(400, "PC01", reason, "send one well-formed request: see RFC 9112")
}

/// A whole URL as target names the host itself (RFC 9112, 3.2.2).
fn split_target<'a>(message: &Message<'a>) -> (Option<&'a str>, &'a str) {
    let target = message.target;
    let scheme_len = ["http://", "https://"].into_iter().find_map(|scheme| {
        target.get(..scheme.len()).filter(|start| start.eq_ignore_ascii_case(scheme)).map(str::len)
    });
    let Some(scheme_len) = scheme_len.filter(|_| message.protocol != Protocol::Http2) else {
        return (message.authority, target);
    };
    let rest = &target[scheme_len..];
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match &rest[end..] {
        "" => (Some(&rest[..end]), "/"),
        path => (Some(&rest[..end]), path),
    }
}

fn check_target(target: &str, method: &str) -> Result<(), Reject> {
    let is_path = target.starts_with('/') || target == "*" && method == "OPTIONS";
    if !is_path {
        return Err(bad("the request's target is no path"));
    }
    if !target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#' || byte >= 0x80) {
        return Err(bad("the request's target has a character that no URL may have"));
    }
    Ok(())
}

/// What the fields say that matters to the edge.
#[derive(Default)]
struct Seen<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    coding: Option<&'a [u8]>,
    options: ConnectionOptions<'a>,
    upgrade: Option<&'a [u8]>,
    accept: &'a [u8],
    expects_continue: bool,
    takes_trailers: bool,
    force_instance: Option<&'a [u8]>,
    prefer_instance: Option<&'a [u8]>,
    force_region: Option<&'a [u8]>,
    prefer_region: Option<&'a [u8]>,
    hop: Option<&'a [u8]>,
    id: Option<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn look(fields: &'a [Header<'a>], kinds: &mut [Asked]) -> Result<Self, Reject> {
        let mut seen = Self::default();
        for (field, kind) in fields.iter().zip(kinds) {
            *kind = Asked::of(field.name);
            let value = field.value;
            match *kind {
                Asked::Host if seen.host.is_some() => return Err(bad("the request has more than one Host header")),
                Asked::Host => seen.host = Some(value),
                Asked::ContentLength if seen.length.is_some() => {
                    return Err(bad("the request has more than one Content-Length"));
                }
                Asked::ContentLength => {
                    seen.length = Some(length(value).ok_or_else(|| bad("the Content-Length is not a number"))?);
                }
                Asked::TransferEncoding if seen.coding.is_some() => {
                    return Err(bad("the request has more than one Transfer-Encoding"));
                }
                Asked::TransferEncoding => seen.coding = Some(value),
                Asked::Connection => seen.options.read(value),
                Asked::Upgrade => seen.upgrade = Some(value),
                Asked::Accept => seen.accept = value,
                Asked::Te => seen.takes_trailers |= has_token(value, "trailers"),
                Asked::Expect => seen.expects_continue |= value.eq_ignore_ascii_case(b"100-continue"),
                Asked::ForceInstance => seen.force_instance = Some(value),
                Asked::PreferInstance => seen.prefer_instance = Some(value),
                Asked::ForceRegion => seen.force_region = Some(value),
                Asked::PreferRegion => seen.prefer_region = Some(value),
                Asked::Hop if field.name.eq_ignore_ascii_case(hop::FIELD) => seen.hop = Some(value),
                Asked::OnlyTheEdge if field.name.eq_ignore_ascii_case("dunlin-request-id") => seen.id = Some(value),
                Asked::Plain | Asked::Cookie | Asked::OneHop | Asked::OnlyTheEdge | Asked::Hop => {}
            }
        }
        // HTTP/2 over plain text is spoken with nobody behind the edge.
        let may_upgrade = seen.options.upgrade && !seen.upgrade.is_some_and(|to| has_token(to, "h2c"));
        seen.upgrade = seen.upgrade.filter(|_| may_upgrade);
        Ok(seen)
    }

    /// The host and port that the request is for.
    fn authority(&self, protocol: Protocol, named: Option<&'a str>) -> Result<&'a str, Reject> {
        let host = self.host.map(std::str::from_utf8).transpose().map_err(|_| bad("the Host header is not text"))?;
        match (named, host) {
            (Some(named), Some(host)) if protocol == Protocol::Http2 && !named.eq_ignore_ascii_case(host) => {
                Err(bad("the Host header and :authority differ"))
            }
            (Some(named), _) => Ok(named),
            (None, Some(host)) => Ok(host),
            (None, None) => Err(bad("the request names no host")),
        }
    }

    fn framing(&self, message: &Message<'_>) -> Result<Framing, Reject> {
        match (self.coding, self.length) {
            (Some(_), Some(_)) => Err(bad("the request has both Content-Length and Transfer-Encoding")),
            (Some(_), None) if message.protocol == Protocol::Http10 => {
                Err(bad("the request has Transfer-Encoding, which HTTP/1.0 does not know"))
            }
            (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            // The app would get the coded bytes and nobody would tell it.
            (Some(_), None) => Err(fault(
                501,
                "PC06",
                "the request's Transfer-Encoding is not just chunked",
                "send the body as it is, or compressed with Content-Encoding",
            )),
            (None, length) if !message.may_have_body => Ok(length.map_or(Framing::None, |_| Framing::Length(0))),
            (None, Some(length)) => Ok(Framing::Length(length)),
            (None, None) if message.protocol == Protocol::Http2 => Ok(Framing::Chunked),
            (None, None) => Ok(Framing::None),
        }
    }
}

/// Digits only: no sign, no list.
pub(crate) fn length(value: &[u8]) -> Option<u64> {
    let is_number = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| is_number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Message<'_> = Message {
        protocol: Protocol::Http11,
        method: "GET",
        target: "/a?b",
        authority: None,
        fields: &[],
        may_have_body: true,
        connect_protocol: None,
    };

    fn id() -> RequestId {
        crate::random::Random::seeded().unwrap().request_id(0)
    }

    fn read(message: &Message<'_>) -> Request {
        let websocket_key = || "the-key".to_owned();
        let origin = Origin { lines: b"x-forwarded-for: 1.2.3.4\r\n", id: id(), websocket_key: &websocket_key, from: Sender::Client };
        Request::read(message, &origin, Vec::new())
    }

    fn with(message: Message<'_>, lines: &[(&str, &str)], check: impl FnOnce(Request)) {
        let fields: Vec<Header<'_>> =
            lines.iter().map(|(name, value)| Header { name, value: value.as_bytes() }).collect();
        check(read(&Message { fields: &fields, ..message }));
    }

    /// What the edge adds at the end.
    fn added(request: &Request) -> String {
        let id = request.id.as_str();
        format!("x-forwarded-for: 1.2.3.4\r\nfly-request-id: {id}\r\ndunlin-request-id: {id}\r\n\r\n")
    }

    #[test]
    fn the_machine_gets_what_was_understood() {
        let lines = [
            ("Host", "A.example:1"), ("X-A", "1"), ("Connection", "close, x-b"), ("X-B", "2"), ("TE", "trailers"),
            ("Cookie", "a=1"), ("cookie", "b=2"), ("X_Forwarded_For", "6.6.6.6"), ("Expect", "100-continue"),
            ("Keep-Alive", "5"), ("Trailer", "x"), ("content-length", "007"),
        ];
        with(GET, &lines, |request| {
            let head = "GET /a?b HTTP/1.1\r\nhost: A.example:1\r\nX-A: 1\r\nTrailer: x\r\ncookie: a=1; b=2\r\n\
                        content-length: 7\r\nte: trailers\r\nconnection: te\r\n";
            assert_eq!(String::from_utf8_lossy(&request.head), format!("{head}{}", added(&request)));
            assert_eq!((&*request.host, request.body), ("a.example", Framing::Length(7)));
            assert_eq!((request.method(), request.target(), request.path()), ("GET", "/a?b", "/a"));
            assert!(!request.keep_alive && request.expects_continue && request.takes_trailers);
            assert!(request.fault.is_none());
        });
    }

    #[test]
    fn http2_is_translated() {
        let message = Message { protocol: Protocol::Http2, method: "POST", authority: Some("a.example"), ..GET };
        with(Message { may_have_body: false, ..message }, &[], |request| {
            assert!(String::from_utf8_lossy(&request.head).contains("\r\ncontent-length: 0\r\n"));
        });
        with(message, &[], |request| assert_eq!(request.body, Framing::Chunked));
        let message = Message { protocol: Protocol::Http2, method: "CONNECT", authority: Some("a.example"), ..GET };
        with(Message { connect_protocol: Some("websocket"), may_have_body: true, ..message }, &[], |request| {
            let head = "GET /a?b HTTP/1.1\r\nhost: a.example\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                        sec-websocket-key: the-key\r\n";
            assert_eq!(String::from_utf8_lossy(&request.head), format!("{head}{}", added(&request)));
            assert!(request.is_upgrade);
        });
    }

    #[test]
    fn what_is_not_clear_is_refused() {
        let host = ("host", "a.example");
        for (message, lines, status) in [
            (GET, &[][..], 400),
            (GET, &[host, ("Host", "b.example")], 400),
            (GET, &[("host", "a@b")], 400),
            (GET, &[("host", "a\u{e9}")], 400),
            (GET, &[host, ("content-length", "1"), ("Content-Length", "1")], 400),
            (GET, &[host, ("content-length", "+1")], 400),
            (GET, &[host, ("content-length", "1, 1")], 400),
            (GET, &[host, ("content-length", "")], 400),
            (GET, &[host, ("content-length", "99999999999999999999")], 400),
            (GET, &[host, ("content-length", "1"), ("transfer-encoding", "chunked")], 400),
            (GET, &[host, ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], 400),
            (GET, &[host, ("transfer-encoding", "gzip, chunked")], 501),
            (GET, &[host, ("transfer-encoding", "xchunked")], 501),
            (GET, &[host, ("transfer-encoding", "")], 501),
            (Message { protocol: Protocol::Http10, ..GET }, &[host, ("transfer-encoding", "chunked")], 400),
            (Message { target: "a", ..GET }, &[host], 400),
            (Message { target: "*", ..GET }, &[host], 400),
            (Message { target: "/a#b", ..GET }, &[host], 400),
            (Message { target: "http://", ..GET }, &[host], 400),
            (Message { target: "http://u@a.example/", ..GET }, &[host], 400),
            (Message { method: "CONNECT", target: "a.example:443", ..GET }, &[host], 405),
            (Message { method: "TRACE", ..GET }, &[host], 405),
            (Message { protocol: Protocol::Http2, authority: Some("b.example"), ..GET }, &[host], 400),
        ] {
            with(message, lines, |request| {
                let fault = request.fault.unwrap_or_else(|| panic!("{lines:?}"));
                assert_eq!((fault.status, request.keep_alive), (status, false), "{lines:?}");
            });
        }
    }

    #[test]
    fn a_whole_url_names_the_host() {
        for (target, host, path) in [
            ("http://b.example/x?y", "b.example", "/x?y"),
            ("HTTP://B.example:80", "b.example", "/"),
            ("https://b.example/", "b.example", "/"),
        ] {
            with(Message { target, ..GET }, &[("host", "a.example")], |request| {
                assert!(request.fault.is_none(), "{target}");
                assert_eq!((&*request.host, request.target()), (host, path));
            });
        }
    }

    #[test]
    fn only_a_bodyless_upgrade_goes_on() {
        let asks = [("host", "a.example"), ("connection", "Upgrade"), ("upgrade", "websocket")];
        with(GET, &asks, |request| assert!(request.is_upgrade));
        with(GET, &[&asks[..], &[("content-length", "3")]].concat(), |request| assert!(!request.is_upgrade));
        with(GET, &[&asks[..2], &[("upgrade", "h2c")]].concat(), |request| assert!(!request.is_upgrade));
        with(GET, &[asks[0], asks[2]], |request| assert!(!request.is_upgrade));
    }
}
