//! Why a request to the control API fails: code, message, and what to do next.

use axum::response::{IntoResponse, Response};
use dunlin_api::{ErrorBody, ErrorCode, Refusal};
use http::StatusCode;

/// One refusal. `Display` is the message for people; the source is logged where it is made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: ErrorCode,
    pub message: String,
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    pub fn body(self) -> ErrorBody {
        ErrorBody { error: self.message, status: self.code, hint: self.hint, request_id: crate::api::request_id() }
    }

    /// Something of ours broke; the chain goes to the log, where a request's lines carry its id.
    pub fn internal(what: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = %chain(error), "{what}");
        Self::new(ErrorCode::Internal, format!("{what}: {error}"))
            .hint("the server's log has the whole story under this request id")
    }
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::TooLate | Refusal::WaitTimeout { .. } => ErrorCode::DeadlineExceeded,
            Refusal::NoSuchMachine(_) | Refusal::NoSuchVolume(_) => ErrorCode::NotFound,
            Refusal::Moved { .. } | Refusal::OldGeneration { .. } | Refusal::OldPlan { .. }
            | Refusal::Leased { .. } | Refusal::NotLeased { .. } => {
                ErrorCode::Conflict
            }
            Refusal::VersionMismatch { .. } => ErrorCode::VersionMismatch,
            Refusal::IllegalMove { .. } | Refusal::Over { .. } => ErrorCode::FailedPrecondition,
            Refusal::InsufficientCapacity { .. } => ErrorCode::InsufficientCapacity,
            Refusal::Invalid(_) => ErrorCode::Invalid,
            Refusal::WaitHopeless { .. } => ErrorCode::BadRequest,
            Refusal::DiskFull(_) => ErrorCode::DiskFull,
            Refusal::Unreachable { .. } => ErrorCode::Unavailable,
            Refusal::Forbidden(_) => ErrorCode::Forbidden,
            Refusal::Busy(_) => ErrorCode::RateLimited,
            Refusal::Failed(_) => ErrorCode::Internal,
        };
        let hint = match &refusal {
            Refusal::TooLate => Some("the server is slow or its clock jumped: try again"),
            Refusal::NoSuchMachine(_) => Some("its host may still be preparing it: try again in a moment"),
            Refusal::Moved { .. } | Refusal::OldGeneration { .. } => Some("try again: the server has newer facts by now"),
            Refusal::Leased { .. } => Some("wait until the lease ends, or send its nonce"),
            Refusal::NotLeased { .. } => Some("take a new lease, and look at the machine again: others may have changed it"),
            Refusal::IllegalMove { .. } => Some("`dunlin machine list` shows its state; wait for another, or ask for what fits it"),
            Refusal::Over { .. } => Some("make another machine; an update of this one that comes before its end is a new run"),
            Refusal::InsufficientCapacity { .. } => Some("stop machines that you do not need, or choose a smaller size"),
            Refusal::DiskFull(_) => Some("free some space in the data directory, then try again"),
            Refusal::WaitTimeout { .. } => Some("ask again to wait longer; `dunlin logs` shows what the machine does"),
            Refusal::Unreachable { .. } => Some(
                "try again in a moment; what it runs goes on without us, and machines that may run elsewhere are replaced if it is lost",
            ),
            Refusal::Forbidden(_) => Some("send a token that allows it: `dunlin tokens create` makes one where control is"),
            Refusal::Busy(_) => Some("end what you do not need any more, or try again in a moment"),
            Refusal::WaitHopeless { .. } => Some("`dunlin logs` shows why the machine ended"),
            _ => None,
        };
        let failure = Self::new(code, refusal.to_string());
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(self.body())).into_response()
    }
}
