//! What stands at a unix socket before, while and after control is there: requests that come while control
//! starts wait for it a little; where it cannot start they are told why.

use super::SharedMetrics;
use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use dunlin_api::{ErrorBody, ErrorCode};
use http::StatusCode;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower_service::Service;

/// Control starts in well under a second; a client that waits for it sees no restart at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// A service at a socket whose inside comes later.
pub struct Front {
    what: &'static str,
    inside: watch::Sender<Inside>,
    metrics: OnceLock<SharedMetrics>,
}

#[derive(Clone)]
enum Inside {
    Starting,
    Open(Router),
    /// Nothing answers, and why.
    Closed(String),
}

impl Front {
    pub fn new(what: &'static str) -> Arc<Self> {
        Arc::new(Self { what, inside: watch::Sender::new(Inside::Starting), metrics: OnceLock::new() })
    }

    /// What `/metrics` says while control is not there.
    pub fn set_metrics(&self, metrics: SharedMetrics) {
        let _ = self.metrics.set(metrics); // set once, at the start
    }

    pub fn open(&self, inside: Router) {
        self.inside.send_replace(Inside::Open(inside));
    }

    pub fn close(&self, why: &str) {
        self.inside.send_replace(Inside::Closed(why.to_owned()));
    }

    /// Answers until `stop`; what is under way then is finished.
    pub fn serve(self: &Arc<Self>, listener: UnixListener, stop: CancellationToken) -> JoinHandle<()> {
        let front = self.clone();
        let what = self.what;
        let router = Router::new().fallback(move |request: Request| {
            let front = front.clone();
            async move { front.answer(request).await }
        });
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await {
                tracing::error!(%error, "{what} stopped answering");
            }
        })
    }

    pub async fn answer(&self, request: Request<Body>) -> Response {
        match (self.look(), request.uri().path()) {
            (Inside::Open(inside), _) => return call(inside, request).await,
            (_, "/healthz") => return "ok\n".into_response(),
            (_, "/metrics") => return self.own_metrics(),
            (_, "/readyz") => return self.unavailable("control has not started yet"),
            _ => {}
        }
        let mut changes = self.inside.subscribe();
        let settled = changes.wait_for(|inside| !matches!(inside, Inside::Starting));
        let settled = tokio::time::timeout(PATIENCE, settled).await.map(|settled| settled.map(|inside| inside.clone()));
        match settled {
            Ok(Ok(Inside::Open(inside))) => call(inside, request).await,
            Ok(Ok(Inside::Closed(why))) => self.unavailable(&why),
            _ => self.unavailable("control is still starting"),
        }
    }

    /// Why nothing answers here, if nothing does before `patience` is over.
    pub async fn is_away(&self, patience: Duration) -> Option<String> {
        let mut changes = self.inside.subscribe();
        let settled = changes.wait_for(|inside| !matches!(inside, Inside::Starting));
        match tokio::time::timeout(patience, settled).await {
            Ok(Ok(inside)) => match &*inside {
                Inside::Closed(why) => Some(why.clone()),
                _ => None,
            },
            _ => Some("it is still starting".into()),
        }
    }

    fn look(&self) -> Inside {
        self.inside.borrow().clone()
    }

    fn own_metrics(&self) -> Response {
        let mut text = String::new();
        match self.metrics.get() {
            Some(metrics) => metrics(&mut text),
            None => return StatusCode::NOT_FOUND.into_response(),
        }
        text.into_response()
    }

    fn unavailable(&self, why: &str) -> Response {
        let body = ErrorBody {
            error: format!("{} cannot answer: {why}", self.what),
            status: ErrorCode::Unavailable,
            hint: Some("apps go on meanwhile; try again in a moment, the server's log says more".into()),
            request_id: None,
        };
        (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
    }
}

async fn call(mut inside: Router, request: Request<Body>) -> Response {
    let Ok(response) = inside.call(request).await;
    response
}

pub fn listener(socket: std::os::unix::net::UnixListener) -> anyhow::Result<UnixListener> {
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket).context("the API's socket cannot be used")
}

/// Who may connect to a socket. Its directory keeps everybody but root out in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    Root,
    /// Also the machines that the socket is bound into, whose root is nobody on the host.
    Machines,
}

/// A socket in the place of an earlier one.
pub fn bind(path: &Path, who: For) -> anyhow::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("{} is in the way", path.display()));
        }
        _ => {}
    }
    let socket = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let mode = if who == For::Root { 0o600 } else { 0o666 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(socket)
}

/// Prometheus's usual metrics of a process, from /proc.
pub fn process_metrics(out: &mut String) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rss_kb = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let open_fds = std::fs::read_dir("/proc/self/fd").map(|fds| fds.count() as u64).ok();
    let mut gauge = |name: &str, help: &str, value: Option<u64>| {
        if let Some(value) = value {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        }
    };
    gauge("process_resident_memory_bytes", "Resident memory of the server.", rss_kb.map(|kb| kb * 1024));
    gauge("process_open_fds", "Open file descriptors of the server.", open_fds);
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn check(front: &Arc<Front>, path: &str, expected: StatusCode) {
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        assert_eq!(front.answer(request).await.status(), expected, "{path}");
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_for_control_and_are_told_why_it_does_not_come() {
        let front = Front::new("the API");
        check(&front, "/healthz", StatusCode::OK).await;
        check(&front, "/readyz", StatusCode::SERVICE_UNAVAILABLE).await;
        check(&front, "/v1/apps", StatusCode::SERVICE_UNAVAILABLE).await; // after its patience
        let waiting = tokio::spawn({
            let front = front.clone();
            async move { check(&front, "/v1/apps", StatusCode::OK).await }
        });
        tokio::task::yield_now().await;
        front.open(Router::new().route("/v1/apps", axum::routing::get(|| async { "[]" })));
        waiting.await.unwrap();
        front.close("the disk is full");
        check(&front, "/v1/apps", StatusCode::SERVICE_UNAVAILABLE).await;
    }
}
