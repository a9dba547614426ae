//! The HTTP API: routes, request ids, errors that are always JSON.

mod apps;
mod authorize;
mod builds;
mod built;
mod by_hand;
mod exec;
mod exec_stream;
mod given;
mod gone;
mod hosts;
mod leases;
mod machines;
mod openapi;
mod releases;
mod status;
mod debug;
mod upgrades;
pub(crate) mod volumes;

pub(crate) use authorize::{Caller, Entrance, authorize, bearer};
pub(crate) use builds::remove_leftovers;
pub(crate) use built::forget as forget_builds;
pub(crate) use status::Requests;

use crate::failure::Failure;
use crate::owners::Owners;
use crate::{Ctx, now_ms};
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use dunlin_api::{ErrorBody, ErrorCode};
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri};
use std::sync::Arc;
use std::time::Instant;
use tracing::Instrument;

/// JSON bodies: a configuration, or 64 secrets.
pub(crate) const MAX_BODY_BYTES: usize = 8 * 1024 * 1024;
/// Of an error that a library wrote and that becomes JSON here.
const MAX_ERROR_BYTES: usize = 16 * 1024;
const MAX_REQUEST_ID_BYTES: usize = 64;
const REQUEST_ID: HeaderName = HeaderName::from_static("dunlin-request-id");
const FLY_REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");
/// A request that takes longer is told of; streams and waits are not counted.
const SLOW_MS: u128 = 2_000;

tokio::task_local! {
    static CURRENT: String;
}

/// The id of the request that is being answered.
pub(crate) fn request_id() -> Option<String> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Every path and what answers there; `docs/openapi.json` describes those under `/v1`.
fn routes() -> Vec<(&'static str, MethodRouter<Arc<Ctx>>)> {
    let of_control = vec![
        ("/readyz", get(status::readyz)),
        ("/metrics", get(status::metrics)),
        ("/v1/openapi.json", get(openapi::document)),
        ("/v1/ca", get(status::ca)),
        ("/v1/tokens", post(status::create_token)),
        ("/v1/tokens/revoke", post(status::revoke_token)),
        ("/v1/platform/regions", get(status::regions)),
        ("/v1/hosts", get(hosts::list)),
        ("/v1/hosts/tokens", post(hosts::create_token)),
        ("/v1/hosts/{id}", get(hosts::get).delete(hosts::remove)),
        ("/v1/hosts/{id}/cordon", post(hosts::cordon)),
        ("/v1/hosts/{id}/uncordon", post(hosts::uncordon)),
        ("/v1/hosts/{id}/drain", post(hosts::drain)),
        ("/v1/hosts/{id}/debug", get(debug::bundle)),
        ("/v1/cluster/status", get(hosts::cluster_status)),
        ("/v1/cluster/verify", get(hosts::cluster_verify)),
        ("/v1/cluster/upgrade", get(upgrades::get).post(upgrades::start).layer(DefaultBodyLimit::disable())),
        ("/v1/cluster/upgrade/resume", post(upgrades::resume)),
        ("/v1/cluster/upgrade/abort", post(upgrades::abort)),
        ("/v1/apps", post(apps::create)),
        ("/v1/apps/{app}", delete(apps::destroy)),
        ("/v1/apps/{app}/scale", get(apps::scale).post(apps::set_scale)),
        ("/v1/apps/{app}/secrets", get(apps::secrets).post(apps::set_secrets)),
        ("/v1/apps/{app}/secrets/{name}", get(apps::secret).post(apps::set_secret).delete(apps::unset_secret)),
        ("/v1/apps/{app}/builds", post(builds::build).layer(DefaultBodyLimit::disable())),
        ("/v1/apps/{app}/plan", post(releases::plan)),
        ("/v1/apps/{app}/releases", get(releases::list).post(releases::create)),
        ("/v1/apps/{app}/releases/{number}", get(releases::get)),
        ("/v1/apps/{app}/releases/{number}/events", get(releases::events)),
        ("/v1/apps/{app}/rollback", post(releases::rollback)),
        ("/v1/apps/{app}/machines", post(by_hand::create)),
        ("/v1/apps/{app}/machines/{id}", post(by_hand::update).delete(machines::destroy)),
        ("/v1/apps/{app}/volumes", get(volumes::list).post(volumes::create)),
        ("/v1/apps/{app}/volumes/{id}", get(volumes::get).put(volumes::update).delete(volumes::destroy)),
        ("/v1/apps/{app}/volumes/{id}/extend", put(volumes::extend)),
        ("/v1/apps/{app}/volumes/{id}/snapshots", get(volumes::snapshots).post(volumes::snapshot)),
        ("/v1/apps/{app}/machines/{id}/versions", get(by_hand::versions)),
        ("/v1/apps/{app}/machines/{id}/metadata/{key}", post(by_hand::set_metadata).delete(by_hand::remove_metadata)),
    ];
    of_control.into_iter().chain(of_owners()).collect()
}

/// Those that need no desired state to be written: hosts have what they tell, and obey what they ask. So a member serves
/// them, too, while control cannot be asked.
pub(crate) fn of_owners<S: Clone + Send + Sync + 'static>() -> Vec<(&'static str, MethodRouter<S>)> {
    vec![
        ("/healthz", get(status::healthz)),
        ("/v1/version", get(status::version)),
        ("/v1/apps", get(apps::list)),
        ("/v1/apps/{app}", get(apps::get)),
        ("/v1/apps/{app}/status", get(apps::status)),
        ("/v1/apps/{app}/logs", get(apps::logs)),
        ("/v1/apps/{app}/machines", get(machines::list)),
        ("/v1/apps/{app}/machines/{id}", get(machines::get)),
        ("/v1/apps/{app}/machines/{id}/start", post(machines::start)),
        ("/v1/apps/{app}/machines/{id}/stop", post(machines::stop)),
        ("/v1/apps/{app}/machines/{id}/suspend", post(machines::suspend)),
        ("/v1/apps/{app}/machines/{id}/restart", post(machines::restart)),
        ("/v1/apps/{app}/machines/{id}/signal", post(machines::signal)),
        ("/v1/apps/{app}/machines/{id}/cordon", post(machines::cordon)),
        ("/v1/apps/{app}/machines/{id}/uncordon", post(machines::uncordon)),
        ("/v1/apps/{app}/machines/{id}/wait", get(machines::wait)),
        ("/v1/apps/{app}/machines/{id}/events", get(machines::events)),
        ("/v1/apps/{app}/machines/{id}/exec", post(exec::exec)),
        ("/v1/apps/{app}/machines/{id}/exec/stream", get(exec_stream::stream)),
        ("/v1/apps/{app}/machines/{id}/ps", get(by_hand::processes)),
        ("/v1/apps/{app}/machines/{id}/lease", get(leases::get).post(leases::acquire).delete(leases::release)),
        ("/v1/apps/{app}/machines/{id}/metadata", get(by_hand::metadata)),
        ("/v1/apps/{app}/machines/{id}/metadata/{key}", get(by_hand::metadata_value)),
    ]
}

pub(crate) fn router(ctx: Arc<Ctx>, entrance: Entrance) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods));
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state((Arc::clone(&ctx), entrance), outermost))
        .with_state(ctx)
}

async fn outermost(State((ctx, entrance)): State<(Arc<Ctx>, Entrance)>, request: Request, next: Next) -> Response {
    let verify = |token: &str| ctx.tokens.verify(token, now_ms());
    let caller = authorize(&ctx.org, entrance, &request, verify).map(|caller| (caller, Owners::Control(Arc::clone(&ctx))));
    answered(caller, request, next, &ctx.requests).await
}

/// What every request goes through: an id, authorization, the answer as JSON, one log line.
pub(crate) async fn answered(caller: Result<(Caller, Owners), Failure>, mut request: Request, next: Next, requests: &Requests) -> Response {
    let began = Instant::now();
    let id = take_request_id(&request);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = CURRENT.scope(id.clone(), async {
        let response = match caller {
            Ok((caller, owners)) => {
                request.extensions_mut().insert(caller);
                request.extensions_mut().insert(owners);
                as_json(next.run(request).await).await
            }
            Err(failure) => failure.into_response(),
        };
        let status = response.status();
        let ms = began.elapsed().as_millis();
        requests.count(status);
        // What only control can do is no fault of a member that says so.
        if status.is_server_error() && response.extensions().get::<NoFault>().is_none() {
            tracing::warn!(%method, %path, status = status.as_u16(), ms, "request failed");
        } else if ms > SLOW_MS {
            tracing::info!(%method, %path, status = status.as_u16(), ms, "slow request");
        } else {
            tracing::debug!(%method, %path, status = status.as_u16(), ms, "request");
        }
        response
    });
    // Every line that is logged on the way carries the id which the answer names.
    let mut response = answer.instrument(tracing::info_span!("request", request_id = %id)).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value.clone());
        response.headers_mut().insert(FLY_REQUEST_ID, value);
    }
    response
}

/// Of an answer that says what cannot be now, and is as it should be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NoFault;

/// The edge's id goes on, so that one id tells the whole story; otherwise a new one.
fn take_request_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_fine = |id: &&str| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match given.filter(is_fine) {
        Some(id) => id.to_owned(),
        None => crate::keys::random::<10>().iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

/// Libraries refuse in plain text (a bad path, query or body); clients parse JSON.
async fn as_json(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if !is_error || content_type.is_some_and(|kind| kind.starts_with("application/json")) {
        return response;
    }
    let text = match axum::body::to_bytes(response.into_body(), MAX_ERROR_BYTES).await {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    };
    let (code, hint) = match status {
        StatusCode::PAYLOAD_TOO_LARGE => {
            (ErrorCode::TooLarge, Some(format!("a body may have {} MiB", MAX_BODY_BYTES / (1024 * 1024))))
        }
        StatusCode::UNPROCESSABLE_ENTITY => (ErrorCode::Invalid, None),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            (ErrorCode::BadRequest, Some("send `content-type: application/json`".to_owned()))
        }
        StatusCode::NOT_FOUND => (ErrorCode::NotFound, None),
        status if status.is_server_error() => (ErrorCode::Internal, None),
        _ => (ErrorCode::BadRequest, None),
    };
    let error = if text.is_empty() { status.to_string() } else { text };
    let body = ErrorBody { error, status: code, hint, request_id: request_id() };
    (status, axum::Json(body)).into_response()
}

async fn no_such_path(uri: Uri) -> Failure {
    Failure::not_found(format!("there is nothing at {}", uri.path()))
        .hint("is the client of a newer version than the server? see `dunlin version`")
}

async fn no_such_method(method: Method, uri: Uri) -> Response {
    let failure = Failure::bad_request(format!("{} does not take {method}", uri.path()));
    let mut response = failure.into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// A stream of JSON lines.
pub(crate) fn ndjson<T, S>(lines: S) -> Response
where
    T: serde::Serialize,
    S: futures_util::Stream<Item = T> + Send + 'static,
{
    use futures_util::StreamExt;
    let bytes = lines.map(|line| {
        let mut json = serde_json::to_vec(&line).map_err(std::io::Error::other)?;
        json.push(b'\n');
        Ok::<_, std::io::Error>(bytes::Bytes::from(json))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(bytes)).into_response()
}
