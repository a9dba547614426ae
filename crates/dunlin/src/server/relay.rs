//! HTTP over the cluster: what a member without control is asked of the API or the registry, control answers.
//!
//! One request a stream, HTTP/1.1 as at any door, with whatever follows a change of protocol (`exec`). It reaches control as it would
//! reach the edge there: by token. Root on a member is not root of the cluster. Where control cannot be asked, which is found out
//! before a request is sent, the member answers what it can by itself.

use super::front::Front;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use dunlin_api::{ErrorBody, ErrorCode};
use dunlin_cluster::{Cluster, Service, Stream};
use dunlin_control::Away;
use dunlin_model::HostId;
use http::{Method, StatusCode, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::copy_bidirectional;
use tokio::sync::Mutex;
use tower_service::Service as _;

const HEAD_WITHIN: Duration = Duration::from_secs(10);
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Answered on control's host for whoever wants to know whether control is there; it is no path of the API.
const IS_THERE: &str = "/.control";
/// For that answer. People wait for it.
const THERE_WITHIN: Duration = Duration::from_secs(3);
/// A control that is starting is waited for, but less than its askers wait.
const STARTS_WITHIN: Duration = Duration::from_secs(2);
const MAX_REASON_BYTES: usize = 4096;
/// A request under way is given up when control, which may be busy, does not answer in so long.
const LOST_AFTER: Duration = Duration::from_secs(5);
const LOOK_WHILE_WAITING: Duration = Duration::from_secs(2);
/// An answer is believed for so long: some clients ask for much at once.
const BELIEVED: Duration = Duration::from_millis(200);
/// That it is not there is found out slowly, and not each time anew.
const BELIEVED_AWAY: Duration = Duration::from_secs(4);

/// Which host has control now.
pub type WhoControls = Arc<dyn Fn() -> HostId + Send + Sync>;

/// A member's way to control, and when that was last found open.
pub struct Relay {
    cluster: Cluster,
    control: WhoControls,
    found: Mutex<Option<Found>>,
}

struct Found {
    control: HostId,
    at: Instant,
    away: Option<String>,
}

impl Relay {
    pub fn new(cluster: Cluster, control: WhoControls) -> Arc<Self> {
        Arc::new(Self { cluster, control, found: Mutex::default() })
    }

    /// A member's door to what control serves. `without`: what the member answers itself while control is away.
    pub fn router(self: &Arc<Self>, service: Service, without: Option<Router>) -> Router {
        let relay = self.clone();
        Router::new().fallback(move |request: Request| {
            let (relay, without) = (relay.clone(), without.clone());
            async move { relay.answer(service, without, request).await }
        })
    }

    async fn answer(&self, service: Service, without: Option<Router>, request: Request) -> Response {
        let id = request.headers().get("dunlin-request-id").cloned();
        let control = (self.control)();
        let (why, request) = match self.away(&control).await {
            Some(why) => (why, Some(request)),
            None => {
                let again = repeatable(&request);
                let passed = tokio::select! {
                    passed = pass_on(&self.cluster, &control, service, request) => passed,
                    why = self.lost(&control) => Err(why),
                };
                match passed {
                    Ok(response) => return response,
                    Err(why) => (why, again),
                }
            }
        };
        if let (Some(mut request), Some(mut without)) = (request, without) {
            tracing::debug!(%control, why, "control is away: answered here");
            request.extensions_mut().insert(Away { control, why });
            let Ok(response) = without.call(request).await;
            return response;
        }
        tracing::debug!(%control, why, "a request could not be passed on to control");
        let body = ErrorBody {
            error: format!("control, which runs on host {control}, cannot be asked from here: {why}"),
            status: ErrorCode::Unavailable,
            hint: Some("apps on all hosts go on meanwhile; `dunlin cluster status` on this server shows who is reached".into()),
            request_id: id.and_then(|id| Some(id.to_str().ok()?.to_owned())),
        };
        (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
    }

    /// Once control does not answer any more, while an answer is waited for: why.
    async fn lost(&self, control: &HostId) -> String {
        loop {
            tokio::time::sleep(LOOK_WHILE_WAITING).await;
            if let Err(error) = self.cluster.ping(control, LOST_AFTER).await {
                *self.found.lock().await = None;
                return error.to_string();
            }
        }
    }

    /// Why control cannot be asked now. Whoever asks meanwhile waits for the one answer.
    async fn away(&self, control: &HostId) -> Option<String> {
        let mut found = self.found.lock().await;
        if let Some(found) = &*found {
            let believed = if found.away.is_some() { BELIEVED_AWAY } else { BELIEVED };
            if found.control == *control && found.at.elapsed() < believed {
                return found.away.clone();
            }
        }
        let asked = tokio::time::timeout(THERE_WITHIN, ask_whether_there(&self.cluster, control)).await;
        let away = asked.unwrap_or_else(|_| Some(format!("it has not answered within {} s", THERE_WITHIN.as_secs())));
        *found = Some(Found { control: control.clone(), at: Instant::now(), away: away.clone() });
        away
    }
}

/// The same request once more, if that asks for nothing twice.
fn repeatable(request: &Request) -> Option<Request> {
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD) && !request.headers().contains_key(header::UPGRADE);
    is_read.then(|| {
        let mut again = Request::new(Body::empty());
        (*again.method_mut(), *again.uri_mut()) = (request.method().clone(), request.uri().clone());
        *again.headers_mut() = request.headers().clone();
        again
    })
}

async fn ask_whether_there(cluster: &Cluster, control: &HostId) -> Option<String> {
    let request = http::Request::builder().uri(IS_THERE).header(header::HOST, "control").body(Body::empty()).expect("it is one");
    match pass_on(cluster, control, Service::Api, request).await {
        Ok(answer) if answer.status().is_success() => None,
        Ok(answer) => {
            let said = axum::body::to_bytes(answer.into_body(), MAX_REASON_BYTES).await.unwrap_or_default();
            Some(String::from_utf8_lossy(&said).into_owned())
        }
        Err(why) => Some(why),
    }
}

async fn pass_on(cluster: &Cluster, control: &HostId, service: Service, mut request: Request) -> Result<Response, String> {
    let stream = cluster.open(control, service).await.map_err(|error| error.to_string())?;
    let asked = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = asked.map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a request that was passed on to control broke off");
        }
    });
    // A request of HTTP/2 names its host in its address.
    if let Some(host) = request.uri().authority().map(|authority| authority.to_string())
        && !request.headers().contains_key(header::HOST)
        && let Ok(host) = host.parse()
    {
        request.headers_mut().insert(header::HOST, host);
    }
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() = path.into();
    *request.version_mut() = http::Version::HTTP_11;
    let ours = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>();
    let mut answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(ours) = ours
    {
        let theirs = hyper::upgrade::on(&mut answer);
        tokio::spawn(async move {
            if let (Ok(ours), Ok(theirs)) = tokio::join!(ours, theirs) {
                let _ = copy_bidirectional(&mut TokioIo::new(ours), &mut TokioIo::new(theirs)).await; // either side ends it
            }
        });
    }
    Ok(answer.map(Body::new))
}

/// Control's side: one connection, answered by what stands at the edge's door.
pub async fn answer(front: Arc<Front>, stream: Stream) {
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let front = front.clone();
        async move {
            if request.uri().path() == IS_THERE {
                return Ok::<_, Infallible>(match front.is_away(STARTS_WITHIN).await {
                    None => StatusCode::NO_CONTENT.into_response(),
                    Some(why) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
                });
            }
            Ok(front.answer(request.map(Body::new)).await)
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(MAX_HEAD_BYTES).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        tracing::debug!(%error, "a member's request broke off");
    }
}
