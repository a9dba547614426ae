//! Header fields by name: which the edge reads, which end here, which only the edge may say.

/// Longest name that means something to the edge.
const LONGEST: usize = 32;
/// More fields than this is no browser.
pub(crate) const MAX_FIELDS: usize = 100;
/// With those that an edge adds for the last hop.
pub(crate) const MAX_FIELDS_HOP: usize = MAX_FIELDS + 20;

/// A request's field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Goes on as it is.
    Plain,
    /// Goes on, and is read on the way.
    Accept,
    ForceInstance,
    PreferInstance,
    ForceRegion,
    PreferRegion,
    /// Joined into one: HTTP/2 clients may split them, HTTP/1 servers expect one (RFC 9113, 8.2.3).
    Cookie,
    /// Written anew.
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Upgrade,
    Te,
    /// Answered by the edge.
    Expect,
    /// For one connection only (RFC 9110, 7.6.1).
    OneHop,
    /// Apps trust it because the edge says it; a client may not.
    OnlyTheEdge,
    /// From an edge to a last hop. Ends here, whoever says it.
    Hop,
}

impl Asked {
    pub fn of(name: &str) -> Self {
        if name.len() > LONGEST {
            return Self::Plain;
        }
        let mut plain = [0; LONGEST];
        let mut has_underscore = false;
        for (to, from) in plain.iter_mut().zip(name.bytes()) {
            has_underscore |= from == b'_';
            *to = if from == b'_' { b'-' } else { from.to_ascii_lowercase() };
        }
        let asked = Self::of_plain(&plain[..name.len()]);
        // CGI and WSGI know `X_Forwarded_For` and `X-Forwarded-For` by one name. Other names with an underscore
        // go on: clients do use them, and they stand for nothing that is trusted.
        if has_underscore && !matches!(asked, Self::OnlyTheEdge | Self::Hop) { Self::Plain } else { asked }
    }

    fn of_plain(name: &[u8]) -> Self {
        match name {
            b"host" => Self::Host,
            b"accept" => Self::Accept,
            b"cookie" => Self::Cookie,
            b"content-length" => Self::ContentLength,
            b"transfer-encoding" => Self::TransferEncoding,
            b"connection" => Self::Connection,
            b"upgrade" => Self::Upgrade,
            b"te" => Self::Te,
            b"expect" => Self::Expect,
            b"fly-force-instance-id" => Self::ForceInstance,
            b"fly-prefer-instance-id" => Self::PreferInstance,
            b"fly-force-region" => Self::ForceRegion,
            b"fly-prefer-region" => Self::PreferRegion,
            b"keep-alive" | b"proxy-connection" | b"proxy-authorization" | b"http2-settings" => Self::OneHop,
            b"x-forwarded-for" | b"x-forwarded-proto" | b"x-forwarded-port" | b"x-forwarded-ssl" | b"x-forwarded-host"
            | b"x-forwarded-server" | b"x-forwarded-prefix" | b"forwarded" | b"x-real-ip" | b"fly-client-ip"
            | b"fly-forwarded-port" | b"fly-forwarded-proto" | b"fly-forwarded-ssl" | b"fly-region"
            | b"fly-request-id" | b"dunlin-request-id" | b"fly-replay-src" | b"fly-replay-failed" => Self::OnlyTheEdge,
            name if name.starts_with(b"dunlin-hop") => Self::Hop,
            _ => Self::Plain,
        }
    }
}

/// An answer's field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answered {
    /// Goes on as it is.
    Plain,
    Server,
    Date,
    ContentLength,
    TransferEncoding,
    Connection,
    Upgrade,
    /// For one connection only.
    OneHop,
    /// Said by the edge alone.
    OnlyTheEdge,
}

impl Answered {
    pub fn of(name: &str) -> Self {
        if name.len() > LONGEST {
            return Self::Plain;
        }
        let mut lower = [0; LONGEST];
        for (to, from) in lower.iter_mut().zip(name.bytes()) {
            *to = from.to_ascii_lowercase();
        }
        match &lower[..name.len()] {
            b"server" => Self::Server,
            b"date" => Self::Date,
            b"content-length" => Self::ContentLength,
            b"transfer-encoding" => Self::TransferEncoding,
            b"connection" => Self::Connection,
            b"upgrade" => Self::Upgrade,
            b"keep-alive" | b"proxy-connection" | b"te" | b"http2-settings" => Self::OneHop,
            b"fly-request-id" | b"dunlin-request-id" | b"dunlin-stale" => Self::OnlyTheEdge,
            name if name.starts_with(b"dunlin-hop") => Self::OnlyTheEdge,
            _ => Self::Plain,
        }
    }
}

/// What the Connection fields of a message say.
#[derive(Debug, Default)]
pub(crate) struct ConnectionOptions<'a> {
    pub close: bool,
    pub keep_alive: bool,
    pub upgrade: bool,
    /// Fields that are for this connection only.
    named: Vec<&'a str>,
}

impl<'a> ConnectionOptions<'a> {
    pub fn read(&mut self, value: &'a [u8]) {
        let Ok(value) = std::str::from_utf8(value) else { return };
        for token in value.split(',').map(str::trim) {
            if token.eq_ignore_ascii_case("close") {
                self.close = true;
            } else if token.eq_ignore_ascii_case("keep-alive") {
                self.keep_alive = true;
            } else if token.eq_ignore_ascii_case("upgrade") {
                self.upgrade = true;
            } else if !token.is_empty() && self.named.len() < MAX_FIELDS {
                self.named.push(token);
            }
        }
    }

    pub fn names(&self, field: &str) -> bool {
        self.named.iter().any(|named| named.eq_ignore_ascii_case(field))
    }
}

/// Whether a list such as `a, b;q=1` has the token.
pub(crate) fn has_token(value: &[u8], wanted: &str) -> bool {
    let tokens = value.split(|byte| matches!(byte, b',' | b';'));
    tokens.into_iter().any(|token| token.trim_ascii().eq_ignore_ascii_case(wanted.as_bytes()))
}

/// Appends `name: value` as a line.
pub(crate) fn line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Trailer lines of which only those are left that may stand there: nothing that frames, addresses or
/// vouches for the message (RFC 9110, 6.5.1).
pub(crate) fn plain_trailers(lines: &[u8], mut each: impl FnMut(&str, &[u8])) {
    if lines.is_empty() {
        return;
    }
    let mut with_end = lines.to_vec();
    with_end.extend_from_slice(b"\r\n");
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    // What cannot be read is left out: the body before it is complete in any case.
    if let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(&with_end, &mut fields) {
        for field in fields.iter().filter(|field| Asked::of(field.name) == Asked::Plain) {
            each(field.name, field.value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trusted_name_is_known_in_every_spelling() {
        for (name, expected) in [
            ("X-Forwarded-For", Asked::OnlyTheEdge),
            ("x_forwarded_for", Asked::OnlyTheEdge),
            ("Fly_Client-IP", Asked::OnlyTheEdge),
            ("api_key", Asked::Plain),
            ("content_length", Asked::Plain),
            ("Content-Length", Asked::ContentLength),
            ("X-Forwarded-Fo", Asked::Plain),
            ("x-forwarded-for-a-name-that-is-longer-than-any", Asked::Plain),
            ("", Asked::Plain),
        ] {
            assert_eq!(Asked::of(name), expected, "{name}");
        }
    }

    #[test]
    fn trailers_cannot_say_what_a_head_may_not() {
        let mut left = Vec::new();
        let lines = b"grpc-status: 0\r\ncontent-length: 5\r\nX-Forwarded-For: 6.6.6.6\r\nHost: a\r\nx: y\r\n";
        plain_trailers(lines, |name, value| left.push((name.to_owned(), value.to_vec())));
        assert_eq!(left, [("grpc-status".to_owned(), b"0".to_vec()), ("x".to_owned(), b"y".to_vec())]);
    }
}
