//! One registry, spoken to over HTTP: connection, redirects, tokens.

use super::{Login, PullError};
use base64::Engine;
use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// From storage to storage; more is a loop.
const MAX_REDIRECTS: u32 = 5;
/// Connecting and the head of the answer.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// A token with much in it.
const MAX_TOKEN_ANSWER_BYTES: usize = 256 << 10;

pub(super) struct Client {
    registry: String,
    name: String,
    login: Option<Login>,
    /// The `Authorization` that worked last.
    authorization: Mutex<Option<String>>,
    tls: Arc<rustls::ClientConfig>,
}

pub(super) struct Question {
    pub path: String,
    pub accept: Option<String>,
    /// First byte wanted.
    pub from: u64,
}

impl Client {
    pub fn new(registry: String, name: String, login: Option<Login>) -> Result<Self, PullError> {
        let tls = tls().map_err(|why| PullError::Unreachable { registry: registry.clone(), why })?;
        Ok(Self { registry, name, login, authorization: Mutex::new(None), tls })
    }

    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn protocol(&self, why: impl Into<String>) -> PullError {
        PullError::Protocol { registry: self.registry.clone(), why: why.into() }
    }

    pub fn unreachable(&self, why: impl Into<String>) -> PullError {
        PullError::Unreachable { registry: self.registry.clone(), why: why.into() }
    }

    /// Asks, logs in once if it must, follows redirects.
    pub async fn get(&self, question: &Question) -> Result<Response<Incoming>, PullError> {
        let scheme = if is_loopback(&self.registry) { "http" } else { "https" };
        let uri = self.uri(&format!("{scheme}://{}{}", self.registry, question.path))?;
        let own = self.authorization.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let answer = self.follow(uri.clone(), question, own).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return self.check(answer);
        }
        let challenge = answer.headers().get(header::WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
        let authorization = self.answer_challenge(challenge.unwrap_or_default()).await?;
        *self.authorization.lock().unwrap_or_else(|e| e.into_inner()) = Some(authorization.clone());
        let answer = self.follow(uri, question, Some(authorization)).await?;
        self.check(answer)
    }

    fn check(&self, answer: Response<Incoming>) -> Result<Response<Incoming>, PullError> {
        let status = answer.status();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.denied(status.to_string())),
            StatusCode::TOO_MANY_REQUESTS => Err(self.unreachable("it was asked too often (429); log in or wait")),
            _ if status.is_server_error() => Err(self.unreachable(format!("it answered {status}"))),
            _ => Ok(answer),
        }
    }

    fn denied(&self, why: String) -> PullError {
        PullError::Denied { registry: self.registry.clone(), why }
    }

    fn uri(&self, text: &str) -> Result<Uri, PullError> {
        text.parse().map_err(|_| self.protocol(format!("the address {text:?}")))
    }

    async fn follow(&self, mut uri: Uri, question: &Question, mut authorization: Option<String>) -> Result<Response<Incoming>, PullError> {
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(&uri, question, authorization.as_deref()).await?;
            let Some(location) = answer.headers().get(header::LOCATION).filter(|_| answer.status().is_redirection()) else {
                return Ok(answer);
            };
            let location = location.to_str().map_err(|_| self.protocol("a redirect to nowhere"))?;
            let next = if location.starts_with('/') {
                let scheme = uri.scheme_str().unwrap_or("https");
                self.uri(&format!("{scheme}://{}{location}", authority(&uri)))?
            } else {
                self.uri(location)?
            };
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(self.protocol("a redirect from https to http"));
            }
            if next.authority() != uri.authority() {
                authorization = None; // what is for the registry is not for its storage
            }
            uri = next;
        }
        Err(self.protocol("one redirect after the other"))
    }

    /// `Basic` or `Bearer`: what to send from now on.
    async fn answer_challenge(&self, challenge: &str) -> Result<String, PullError> {
        let basic = self.login.as_ref().map(|login| {
            let text = format!("{}:{}", login.user, login.password);
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text))
        });
        let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return basic.ok_or_else(|| self.denied("it wants a login".into()));
        }
        let value = |name: &str| parameter(rest, name);
        let Some(realm) = value("realm").filter(|_| scheme.eq_ignore_ascii_case("bearer")) else {
            return Err(self.denied("it wants a login of a kind that is not known here".into()));
        };
        let scope = value("scope").unwrap_or_else(|| format!("repository:{}:pull", self.name));
        let mut address = format!("{realm}{}scope={}", if realm.contains('?') { '&' } else { '?' }, encode(&scope));
        if let Some(service) = value("service") {
            address.push_str(&format!("&service={}", encode(&service)));
        }
        let uri = self.uri(&address)?;
        if uri.scheme_str() != Some("https") && !is_loopback(authority(&uri)) {
            return Err(self.protocol("a token service without TLS; the login was not sent there"));
        }
        let question = Question { path: String::new(), accept: None, from: 0 };
        let answer = self.send(&uri, &question, basic.as_deref()).await?;
        if !answer.status().is_success() {
            return Err(self.denied(format!("its token service answered {}", answer.status())));
        }
        let bytes = collect(answer.into_body(), MAX_TOKEN_ANSWER_BYTES).await;
        let bytes = bytes.map_err(|why| self.protocol(format!("a token that {why}")))?;
        let body: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| self.protocol("a token that is none"))?;
        let token = ["token", "access_token"].iter().find_map(|name| body.get(name)?.as_str());
        Ok(format!("Bearer {}", token.ok_or_else(|| self.protocol("an answer without a token"))?))
    }

    async fn send(&self, uri: &Uri, question: &Question, authorization: Option<&str>) -> Result<Response<Incoming>, PullError> {
        let mut request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()));
        request = request.header(header::HOST, authority(uri));
        request = request.header(header::USER_AGENT, concat!("dunlin/", env!("CARGO_PKG_VERSION")));
        if let Some(accept) = &question.accept {
            request = request.header(header::ACCEPT, accept);
        }
        if question.from > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", question.from));
        }
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| self.protocol(e.to_string()))?;
        let exchange = async {
            let io = self.connect(uri).await?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|e| e.to_string())?;
            // Ends with the body of the answer, or with our interest in it.
            tokio::spawn(async move {
                if let Err(e) = connection.await {
                    tracing::debug!("a connection to a registry ended: {e}");
                }
            });
            sender.send_request(request).await.map_err(|e| e.to_string())
        };
        let answer = tokio::time::timeout(MAX_WAIT, exchange).await;
        let answer = answer.map_err(|_| self.unreachable("no answer within 30 seconds"))?;
        answer.map_err(|why: String| self.unreachable(why))
    }

    fn connect<'a>(&'a self, uri: &'a Uri) -> Connecting<'a> {
        Box::pin(async move {
            let host = uri.host().ok_or("an address without a host")?;
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            let is_tls = uri.scheme_str() != Some("http");
            let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
            let tcp = TcpStream::connect((bare, port)).await.map_err(|e| e.to_string())?;
            if !is_tls {
                return Ok(Box::new(tcp) as Box<dyn Stream>);
            }
            let name = ServerName::try_from(bare.to_owned()).map_err(|e| e.to_string())?;
            let tls = TlsConnector::from(self.tls.clone()).connect(name, tcp).await.map_err(|e| e.to_string())?;
            Ok(Box::new(tls) as Box<dyn Stream>)
        })
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

type Connecting<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Stream>, String>> + Send + 'a>>;
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A body of at most `max_bytes`; the error completes "a manifest that ...".
pub(super) async fn collect(body: Incoming, max_bytes: usize) -> Result<Bytes, String> {
    let whole = Limited::new(body, max_bytes).collect();
    match tokio::time::timeout(MAX_WAIT, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(format!("has more than {max_bytes} bytes")),
        Ok(Err(_)) => Err("broke off".into()),
        Err(_) => Err("did not arrive in 30 seconds".into()),
    }
}

/// The system's roots, read once.
fn tls() -> Result<Arc<rustls::ClientConfig>, String> {
    static CONFIG: OnceLock<Result<Arc<rustls::ClientConfig>, String>> = OnceLock::new();
    let make = || {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = rustls::RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            tracing::warn!("this host has no root certificates; install ca-certificates to pull over TLS");
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|e| e.to_string())?;
        Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
    };
    CONFIG.get_or_init(make).clone()
}

/// Plain HTTP only ever goes to this computer itself.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}

/// `name="value"` of a challenge.
fn parameter(text: &str, name: &str) -> Option<String> {
    let mut rest = text;
    loop {
        let (key, after) = rest.split_once('=')?;
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        if key.trim_matches([' ', ',']).eq_ignore_ascii_case(name) {
            return Some(value.to_owned());
        }
        rest = next;
    }
}

fn encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/,".contains(&b);
    text.bytes().map(|b| if plain(b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
}
