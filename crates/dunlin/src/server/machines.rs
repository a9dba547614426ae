//! The API inside machines: a socket in a directory that every machine has, where Fly has it too. What comes over it
//! comes from anybody, as at the edge: it is answered with a token, and only what is under `/v1`.
//!
//! One machine is known from another by the user or the network that the kernel names, so that none takes what is there
//! for all.

use super::front::Front;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use dunlin_api::{ErrorBody, ErrorCode};
use http::{Request, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

const MAX_CONNECTIONS_OF_A_MACHINE: usize = 16;
const MAX_CONNECTIONS: usize = 1024;
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// What is under way when the server stops.
const DRAIN: Duration = Duration::from_secs(3);
/// After an accept that failed: of the reasons, most pass by.
const PAUSE: Duration = Duration::from_millis(100);
/// A request's id is given at the door; one from inside would stand in the log as somebody else's.
const REQUEST_ID: &str = "dunlin-request-id";

/// Open connections of each machine.
type Open = Arc<Mutex<BTreeMap<Option<u64>, usize>>>;

pub fn serve(api: Arc<Front>, listener: UnixListener, stop: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let open = Open::default();
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::debug!(%error, "a machine's connection was not accepted");
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                },
            };
            // One too many is closed: its client sees that, and comes again.
            if connections.len() < MAX_CONNECTIONS
                && let Some(turn) = Turn::take(&open, &stream)
            {
                connections.spawn(connection(api.clone(), stream, turn, stop.clone()));
            }
        }
        let drained = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(DRAIN, drained).await; // the rest is cut
    })
}

/// A connection of a machine that counts until it is dropped.
struct Turn {
    open: Open,
    machine: Option<u64>,
}

impl Turn {
    fn take(open: &Open, stream: &UnixStream) -> Option<Self> {
        let machine = machine_of(&stream.peer_cred().ok()?);
        let mut counts = open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(machine).or_default();
        if *count >= MAX_CONNECTIONS_OF_A_MACHINE {
            return None;
        }
        *count += 1;
        Some(Self { open: open.clone(), machine })
    }
}

/// By its user, or where machines share their users by its network.
fn machine_of(peer: &tokio::net::unix::UCred) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let network = || std::fs::metadata(format!("/proc/{}/ns/net", peer.pid()?)).ok().map(|meta| meta.ino());
    dunlin_host::machine_number(peer.uid()).map(u64::from).or_else(network)
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut counts = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.machine) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.machine);
            }
        }
    }
}

async fn connection(api: Arc<Front>, stream: UnixStream, _turn: Turn, stop: CancellationToken) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(answer(&api, request.map(Body::new)).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(MAX_HEAD_BYTES);
    let connection = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a machine's connection broke");
    }
}

async fn answer(api: &Front, mut request: Request<Body>) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/v1/") {
        let body = ErrorBody {
            error: format!("there is nothing at {path}"),
            status: ErrorCode::NotFound,
            hint: Some("the API is at /v1".into()),
            request_id: None,
        };
        return (StatusCode::NOT_FOUND, axum::Json(body)).into_response();
    }
    request.headers_mut().remove(REQUEST_ID);
    api.answer(request).await
}
