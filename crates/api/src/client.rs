//! The HTTP client of the API: over the server's unix socket, or over TLS with a token.
//!
//! One connection a request: a command makes a handful, and a fresh connection never inherits the
//! fate of an old one. Streams (builds, logs, deploy events) are read line by line.

use crate::error::{ApiError, ErrorBody, ErrorCode};
use crate::exec::{self, ExecEvents, ExecInput};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake;

/// Answers that are read whole are refused above this size.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// A longer line in a stream is refused.
const MAX_LINE_BYTES: usize = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Body = BoxBody<Bytes, io::Error>;

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The socket in the data directory; its 0600 mode is the authorization.
    Unix(PathBuf),
    /// `https://host[:port]`, or `http://` on a loopback address only.
    Http { tls: bool, host: String, port: u16 },
}

impl Target {
    /// From what a person gives: a URL, or the path of a socket.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        let uri: http::Uri = text.parse().map_err(|_| format!("{text:?} is neither a URL nor a socket's path"))?;
        let host = uri.host().ok_or_else(|| format!("{text:?} names no host"))?.to_owned();
        match uri.scheme_str() {
            Some("https") => Ok(Self::Http { tls: true, port: uri.port_u16().unwrap_or(443), host }),
            Some("http") if is_loopback(&host) => {
                Ok(Self::Http { tls: false, port: uri.port_u16().unwrap_or(80), host })
            }
            Some("http") => Err(format!("{text:?} would send the token in clear; use https://")),
            _ => Err(format!("{text:?} must begin with https:// or be a socket's path")),
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|addr| addr.is_loopback())
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Http { tls, host, port } => {
                write!(f, "{}://{host}:{port}", if *tls { "https" } else { "http" })
            }
        }
    }
}

/// A client of one server. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    target: Target,
    token: Option<Arc<str>>,
    /// Nonce of the lease that its caller holds.
    lease: Option<Arc<str>>,
    tls: Option<Arc<rustls::ClientConfig>>,
}

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    pub target: Target,
    pub token: Option<String>,
    /// PEM of certificate authorities to trust besides the system's: the server's own CA.
    pub extra_roots_pem: Option<Vec<u8>>,
}

impl Client {
    pub fn new(config: ClientConfig) -> Result<Self, ApiError> {
        let tls = match config.target {
            Target::Http { tls: true, .. } => Some(Arc::new(tls_config(config.extra_roots_pem.as_deref())?)),
            _ => None,
        };
        Ok(Self { target: config.target, token: config.token.map(Into::into), lease: None, tls })
    }

    /// The same, for whoever holds the lease of a machine.
    pub fn holding(&self, nonce: &str) -> Self {
        Self { lease: Some(nonce.into()), ..self.clone() }
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(Method::GET, path, empty()).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(Method::DELETE, path, empty()).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        let bytes = serde_json::to_vec(body).map_err(|e| ApiError::BadAnswer(e.to_string()))?;
        self.json(Method::POST, path, full(bytes)).await
    }

    /// Reads an answer of one JSON value a line.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        let bytes = serde_json::to_vec(body).map_err(|e| ApiError::BadAnswer(e.to_string()))?;
        self.json(Method::PUT, path, full(bytes)).await
    }

    /// An answer that is no JSON.
    pub async fn bytes(&self, path: &str) -> Result<Bytes, ApiError> {
        let response = self.send(Method::GET, path, &[], empty()).await?;
        read_bounded(response.into_body()).await
    }

    pub async fn lines(&self, path: &str) -> Result<Lines, ApiError> {
        let response = self.send(Method::GET, path, &[], empty()).await?;
        Ok(Lines::new(response.into_body()))
    }

    /// Uploads a stream (a build context) and reads an answer of one JSON value a line.
    pub async fn upload(
        &self,
        path: &str,
        headers: &[(&str, String)],
        body: impl futures_util::Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    ) -> Result<Lines, ApiError> {
        let body = BodyExt::boxed(StreamBody::new(body.map(|chunk| chunk.map(Frame::data))));
        let response = self.send(Method::POST, path, headers, body).await?;
        Ok(Lines::new(response.into_body()))
    }

    /// Sends a stream (a file) and reads an answer that is JSON.
    pub async fn send_stream<T: DeserializeOwned>(
        &self,
        path: &str,
        body: impl futures_util::Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
    ) -> Result<T, ApiError> {
        let body = BodyExt::boxed(StreamBody::new(body.map(|chunk| chunk.map(Frame::data))));
        self.json(Method::POST, path, body).await
    }

    /// Opens the WebSocket of a command in a machine.
    pub async fn exec(&self, path: &str) -> Result<(ExecInput, ExecEvents), ApiError> {
        let key = handshake::client::generate_key();
        let headers = [
            ("connection", "upgrade".to_owned()),
            ("upgrade", "websocket".to_owned()),
            ("sec-websocket-version", "13".to_owned()),
            ("sec-websocket-key", key.clone()),
        ];
        let response = self.send(Method::GET, path, &headers, empty()).await?;
        let accepted = response.headers().get("sec-websocket-accept").map(|value| value.as_bytes().to_owned());
        if response.status() != StatusCode::SWITCHING_PROTOCOLS
            || accepted.as_deref() != Some(handshake::derive_accept_key(key.as_bytes()).as_bytes())
        {
            return Err(ApiError::BadAnswer("it is no WebSocket".into()));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| ApiError::Broken(io::Error::other(e)))?;
        Ok(exec::open(upgraded).await)
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Body) -> Result<T, ApiError> {
        let response = self.send(method, path, &[], body).await?;
        let bytes = read_bounded(response.into_body()).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes).map_err(|e| ApiError::BadAnswer(e.to_string()))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, String)],
        body: Body,
    ) -> Result<Response<Incoming>, ApiError> {
        let host = match &self.target {
            Target::Unix(_) => "dunlin".to_owned(),
            Target::Http { host, port, .. } => format!("{host}:{port}"),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", host)
            .header("user-agent", concat!("dunlin/", env!("CARGO_PKG_VERSION")))
            .header("content-type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(nonce) = &self.lease {
            request = request.header("fly-machine-lease-nonce", &**nonce);
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(body).map_err(|e| ApiError::BadAnswer(e.to_string()))?;
        let response = match &self.target {
            Target::Unix(path) => self.exchange(connect_unix(path).await?, request).await?,
            Target::Http { host, port, .. } => {
                let stream = timeout(connect_tcp(host, *port)).await;
                let stream = stream.map_err(|source| self.unreachable(source))?;
                match &self.tls {
                    None => self.exchange(stream, request).await?,
                    Some(tls) => {
                        let name = ServerName::try_from(host.clone())
                            .map_err(|e| ApiError::BadAnswer(e.to_string()))?;
                        let connector = tokio_rustls::TlsConnector::from(tls.clone());
                        let stream = timeout(connector.connect(name, stream)).await;
                        self.exchange(stream.map_err(|source| self.unreachable(source))?, request).await?
                    }
                }
            }
        };
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        Err(refused(response).await)
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, ApiError> {
        let broken = |e: hyper::Error| ApiError::Broken(io::Error::other(e));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // The connection ends when the response body is read or dropped; it needs no owner beyond that.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(broken)
    }

    fn unreachable(&self, source: io::Error) -> ApiError {
        ApiError::Unreachable { address: self.target.to_string(), source }
    }
}

/// `<name>.localhost` is this computer, as RFC 6761 has it; resolvers of most systems do not know that.
async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    if host.ends_with(".localhost") {
        let here = [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))];
        return TcpStream::connect(&here[..]).await;
    }
    TcpStream::connect((host, port)).await
}

#[cfg(unix)]
async fn connect_unix(path: &std::path::Path) -> Result<tokio::net::UnixStream, ApiError> {
    timeout(tokio::net::UnixStream::connect(path))
        .await
        .map_err(|source| ApiError::Unreachable { address: path.display().to_string(), source })
}

#[cfg(not(unix))]
async fn connect_unix(path: &std::path::Path) -> Result<TcpStream, ApiError> {
    let source = io::Error::other("this system has no unix sockets; name a server with --api https://...");
    Err(ApiError::Unreachable { address: path.display().to_string(), source })
}

async fn timeout<T>(connecting: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within 10 s")),
    }
}

fn tls_config(extra_roots_pem: Option<&[u8]>) -> Result<rustls::ClientConfig, ApiError> {
    let mut roots = rustls::RootCertStore::empty();
    // Damaged certificates of the system are skipped: the server's own decides whether it is trusted.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(pem) = extra_roots_pem {
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|e| ApiError::BadAnswer(format!("CA file: {e}")))?;
            roots.add(certificate).map_err(|e| ApiError::BadAnswer(format!("CA file: {e}")))?;
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ApiError::BadAnswer(e.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn empty() -> Body {
    full(Vec::new())
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

async fn read_bounded(body: Incoming) -> Result<Bytes, ApiError> {
    let limited = http_body_util::Limited::new(body, MAX_ANSWER_BYTES);
    match limited.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) => Err(ApiError::Broken(io::Error::other(e))),
    }
}

async fn refused(response: Response<Incoming>) -> ApiError {
    let status: StatusCode = response.status();
    let request_id = response.headers().get("fly-request-id").and_then(|v| v.to_str().ok()).map(str::to_owned);
    let body = match read_bounded(response.into_body()).await {
        Ok(bytes) => bytes,
        Err(error) => return error,
    };
    let mut body: ErrorBody = serde_json::from_slice(&body).unwrap_or_else(|_| ErrorBody {
        error: format!("the server answered {status}: {}", String::from_utf8_lossy(&body[..body.len().min(200)])),
        status: ErrorCode::Unknown,
        hint: None,
        request_id: None,
    });
    body.request_id = body.request_id.or(request_id);
    ApiError::Refused { http_status: status.as_u16(), body }
}

/// One JSON value a line, as they come.
pub struct Lines {
    body: Incoming,
    pending: BytesMut,
}

impl Lines {
    fn new(body: Incoming) -> Self {
        Self { body, pending: BytesMut::new() }
    }

    /// The next value; `None` at the end of a complete answer.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ApiError> {
        loop {
            if let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line = self.pending.split_to(end);
                self.pending.advance(1);
                if line.is_empty() {
                    continue; // keep-alive
                }
                return serde_json::from_slice(&line).map(Some).map_err(|e| ApiError::BadAnswer(e.to_string()));
            }
            if self.pending.len() > MAX_LINE_BYTES {
                return Err(ApiError::BadAnswer("a line of the stream is too long".into()));
            }
            match self.body.frame().await {
                None if self.pending.is_empty() => return Ok(None),
                None => return Err(ApiError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Some(Err(e)) => return Err(ApiError::Broken(io::Error::other(e))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.pending.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_sent_in_clear_to_another_computer() {
        assert!(Target::parse("http://example.org").is_err());
        assert!(Target::parse("http://127.0.0.1:8080").is_ok());
        assert!(Target::parse("http://api.localhost:8080").is_ok());
        let https = Target::Http { tls: true, host: "api.example.org".into(), port: 443 };
        assert_eq!(Target::parse("https://api.example.org"), Ok(https));
        assert_eq!(Target::parse("/run/x.sock"), Ok(Target::Unix("/run/x.sock".into())));
        assert!(Target::parse("example.org").is_err());
    }
}
