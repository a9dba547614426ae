//! Answers and refusals, in the specification's shape.

use crate::digest::Digest;
use crate::store::StoreError;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

pub(super) struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    /// `WWW-Authenticate` of a 401.
    pub challenge: Option<String>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), challenge: None }
    }

    pub fn bad(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// `unknown` is the code for something that is not here.
    pub fn of(error: StoreError, unknown: &'static str) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Full { .. } => Self::new(StatusCode::INSUFFICIENT_STORAGE, "DENIED", message),
            StoreError::NotFound(_) | StoreError::Damaged(_) => Self::new(StatusCode::NOT_FOUND, unknown, message),
            StoreError::Digest { .. } => Self::bad("DIGEST_INVALID", message),
            StoreError::TooLarge(_) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message),
            StoreError::Invalid(_) => Self::bad("MANIFEST_INVALID", message),
            StoreError::Io { source, .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", format!("{message}: {source}"))
            }
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = serde_json::json!({"errors": [{"code": self.code, "message": self.message}]}).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        let challenge = self.challenge.and_then(|text| HeaderValue::from_str(&text).ok());
        if let Some(value) = challenge {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        with(response, "docker-distribution-api-version", "registry/2.0")
    }
}

pub(super) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    with(response, "docker-distribution-api-version", "registry/2.0")
}

pub(super) fn with(mut response: Response, name: &'static str, value: &str) -> Response {
    match HeaderValue::from_str(value) {
        Ok(value) => {
            response.headers_mut().insert(name, value);
        }
        Err(_) => tracing::warn!(name, "a header's value was not one"),
    }
    response
}

pub(super) fn created(location: &str, digest: &Digest) -> Response {
    let response = with(empty(StatusCode::CREATED), "location", location);
    with(response, "docker-content-digest", digest.as_str())
}

/// Runs what touches the disk away from the async threads.
pub(super) async fn on_disk<T: Send + 'static>(
    unknown: &'static str,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|e| Refusal::of(e, unknown)),
        Err(e) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", format!("the work died: {e}"))),
    }
}
