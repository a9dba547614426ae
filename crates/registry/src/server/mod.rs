//! The `/v2/` API: distribution specification 1.1, push and pull. A catalog of all repositories does not exist.

mod answer;
mod auth;
mod blobs;
mod manifests;
mod uploads;

pub use auth::{Access, Authorizer, Credentials, Denied};

use crate::digest::{Digest, Repo};
use crate::manifest::Reference;
use crate::store::ContentStore;
use answer::Refusal;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use http::{Method, StatusCode};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use tokio::net::UnixListener;

/// What the server needs to know.
pub struct RegistryState {
    pub store: ContentStore,
    pub authorize: Authorizer,
    /// Names this registry in challenges.
    pub service: String,
}

pub(crate) struct Server {
    store: ContentStore,
    authorize: Authorizer,
    service: String,
}

/// Serves `/v2/` and everything below it.
pub fn router(state: RegistryState) -> Router {
    let RegistryState { store, authorize, service } = state;
    let server = Arc::new(Server { store, authorize, service });
    Router::new()
        .route("/v2", any(handle))
        .route("/v2/", any(handle))
        .route("/v2/{*rest}", any(handle))
        .with_state(server)
}

/// Serves a router on a unix socket until `stop`; what is in flight then is finished.
pub async fn serve_unix(listener: UnixListener, router: Router, stop: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

async fn handle(State(server): State<Arc<Server>>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match route(&server, request).await {
        Ok(response) => response,
        Err(refusal) => {
            if refusal.status.is_server_error() {
                tracing::error!(%method, path, "{}", refusal.message);
            } else {
                tracing::debug!(%method, path, status = refusal.status.as_u16(), "{}", refusal.message);
            }
            refusal.into_response()
        }
    }
}

/// What a path names.
enum Target {
    Root,
    Token,
    Tags(Repo),
    Manifest(Repo, Reference),
    Referrers(Repo, Digest),
    Blob(Repo, Digest),
    NewUpload(Repo),
    Upload(Repo, String),
}

async fn route(server: &Arc<Server>, request: Request) -> Result<Response, Refusal> {
    let target = parse_path(request.uri().path())?;
    let query = parse_query(request.uri().query().unwrap_or_default())?;
    let method = request.method().clone();
    if let Target::Token = target {
        return auth::token(server, request.headers(), &method);
    }
    let caller = auth::Caller::of(server, request.headers());
    match (&method, target) {
        (&Method::GET | &Method::HEAD, Target::Root) => {
            caller.may("", Access::Login)?;
            Ok(answer::empty(StatusCode::OK))
        }
        (&Method::GET, Target::Tags(repo)) => {
            caller.may(repo.as_str(), Access::Pull)?;
            manifests::tags(server, repo, query).await
        }
        (&Method::GET, Target::Referrers(repo, subject)) => {
            caller.may(repo.as_str(), Access::Pull)?;
            manifests::referrers(server, repo, subject, query).await
        }
        (&Method::GET | &Method::HEAD, Target::Manifest(repo, reference)) => {
            caller.may(repo.as_str(), Access::Pull)?;
            manifests::get(server, repo, reference, method).await
        }
        (&Method::PUT, Target::Manifest(repo, reference)) => {
            caller.may(repo.as_str(), Access::Push)?;
            manifests::put(server, repo, reference, request).await
        }
        (&Method::DELETE, Target::Manifest(repo, reference)) => {
            caller.may(repo.as_str(), Access::Delete)?;
            manifests::delete(server, repo, reference).await
        }
        (&Method::GET | &Method::HEAD, Target::Blob(repo, digest)) => {
            caller.may(repo.as_str(), Access::Pull)?;
            blobs::get(server, repo, digest, &method, request.headers()).await
        }
        (&Method::POST, Target::NewUpload(repo)) => {
            caller.may(repo.as_str(), Access::Push)?;
            // A mount needs the right to pull from where the blob is; without it the client just uploads.
            let from = query.get("from").filter(|from| caller.may(from, Access::Pull).is_ok()).cloned();
            uploads::begin(server, repo, query, from, request).await
        }
        (&Method::GET, Target::Upload(repo, id)) => {
            caller.may(repo.as_str(), Access::Push)?;
            uploads::progress(server, repo, id).await
        }
        (&Method::PATCH, Target::Upload(repo, id)) => {
            caller.may(repo.as_str(), Access::Push)?;
            uploads::append(server, repo, id, request).await
        }
        (&Method::PUT, Target::Upload(repo, id)) => {
            caller.may(repo.as_str(), Access::Push)?;
            uploads::finish(server, repo, id, query, request).await
        }
        (&Method::DELETE, Target::Upload(repo, id)) => {
            caller.may(repo.as_str(), Access::Push)?;
            uploads::cancel(server, repo, id).await
        }
        _ => Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry does not do that")),
    }
}

fn parse_path(path: &str) -> Result<Target, Refusal> {
    let unknown = || Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "there is nothing at this path");
    let repo = |name: &str| name.parse::<Repo>().map_err(|e| Refusal::bad("NAME_INVALID", e.to_string()));
    let digest = |text: &str| text.parse::<Digest>().map_err(|e| Refusal::bad("DIGEST_INVALID", e.to_string()));
    let rest = path.strip_prefix("/v2").ok_or_else(unknown)?.trim_start_matches('/');
    if rest.is_empty() {
        return Ok(Target::Root);
    }
    if rest == "token" {
        return Ok(Target::Token);
    }
    if let Some(name) = rest.strip_suffix("/tags/list") {
        return Ok(Target::Tags(repo(name)?));
    }
    if let Some(name) = rest.strip_suffix("/blobs/uploads/").or_else(|| rest.strip_suffix("/blobs/uploads")) {
        return Ok(Target::NewUpload(repo(name)?));
    }
    let (head, last) = rest.rsplit_once('/').ok_or_else(unknown)?;
    if let Some(name) = head.strip_suffix("/blobs/uploads") {
        return Ok(Target::Upload(repo(name)?, last.to_owned()));
    }
    if let Some(name) = head.strip_suffix("/blobs") {
        return Ok(Target::Blob(repo(name)?, digest(last)?));
    }
    if let Some(name) = head.strip_suffix("/referrers") {
        return Ok(Target::Referrers(repo(name)?, digest(last)?));
    }
    if let Some(name) = head.strip_suffix("/manifests") {
        let reference = Reference::parse(last);
        let reference = reference.ok_or_else(|| Refusal::bad("TAG_INVALID", "that is neither a tag nor a digest"))?;
        return Ok(Target::Manifest(repo(name)?, reference));
    }
    Err(unknown())
}

/// The last value of a name wins. Nothing in this API is long.
fn parse_query(text: &str) -> Result<BTreeMap<String, String>, Refusal> {
    const MAX_QUERY_BYTES: usize = 4096;
    if text.len() > MAX_QUERY_BYTES {
        return Err(Refusal::bad("UNSUPPORTED", "the query is too long"));
    }
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    Ok(pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decode(k), decode(v))).collect())
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(b) = rest.next() {
        match b {
            b'+' => bytes.push(b' '),
            b'%' => {
                let hex: Vec<u8> = rest.by_ref().take(2).collect();
                let byte = std::str::from_utf8(&hex).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                bytes.push(byte.unwrap_or(b'?')); // no name of this API has it: refused where it is used
            }
            b => bytes.push(b),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
