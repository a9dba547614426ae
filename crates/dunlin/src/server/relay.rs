//! HTTP over the cluster: what a member without control is asked of the API or the registry, control answers.
//!
//! One request a stream, HTTP/1.1 as at any door, with whatever follows a change of protocol (`exec`). It reaches control as it would
//! reach the edge there: by token. Root on a member is not root of the cluster.

use super::front::Front;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use dunlin_api::{ErrorBody, ErrorCode};
use dunlin_cluster::{Cluster, Service, Stream};
use dunlin_model::HostId;
use http::{StatusCode, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::copy_bidirectional;

const HEAD_WITHIN: Duration = Duration::from_secs(10);
const MAX_HEAD_BYTES: usize = 64 * 1024;

/// A member's door to what control serves.
pub fn router(cluster: Cluster, control: HostId, service: Service) -> Router {
    Router::new().fallback(move |request: Request| {
        let (cluster, control) = (cluster.clone(), control.clone());
        async move {
            let id = request.headers().get("dunlin-request-id").cloned();
            pass_on(&cluster, &control, service, request).await.unwrap_or_else(|why| {
                tracing::debug!(%control, why, "a request could not be passed on to control");
                let body = ErrorBody {
                    error: format!("control, which runs on host {control}, cannot be asked from here: {why}"),
                    status: ErrorCode::Unavailable,
                    hint: Some("apps on all hosts go on meanwhile; `dunlin cluster status` on this server shows who is reached".into()),
                    request_id: id.and_then(|id| Some(id.to_str().ok()?.to_owned())),
                };
                (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
            })
        }
    })
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
        async move { Ok::<_, Infallible>(front.answer(request.map(Body::new)).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(MAX_HEAD_BYTES).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        tracing::debug!(%error, "a member's request broke off");
    }
}
