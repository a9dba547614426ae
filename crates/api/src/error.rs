//! The error body of the HTTP API.

use serde::{Deserialize, Serialize};

/// `{"error": ..., "status": ..., "hint": ..., "request_id": ...}`; the first two as Fly's clients know them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What happened and why.
    pub error: String,
    pub status: ErrorCode,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    Unknown,
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    NameTaken,
    Conflict,
    FailedPrecondition,
    VersionMismatch,
    Invalid,
    TooLarge,
    RateLimited,
    DeadlineExceeded,
    InsufficientCapacity,
    DiskFull,
    Unavailable,
    Internal,
    #[serde(other)]
    Other,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::DeadlineExceeded => 408,
            Self::Conflict | Self::NameTaken => 409,
            Self::FailedPrecondition | Self::VersionMismatch => 412,
            Self::TooLarge => 413,
            Self::Invalid => 422,
            Self::RateLimited => 429,
            Self::InsufficientCapacity | Self::Unavailable => 503,
            Self::DiskFull => 507,
            Self::Unknown | Self::Internal | Self::Other => 500,
        }
    }
}

/// Why a call to the API failed, seen from the client.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody answers there.
    #[error("cannot reach the Dunlin server at {address}")]
    Unreachable {
        address: String,
        #[source]
        source: std::io::Error,
    },
    /// The server said no, and why.
    #[error("{}", .body.error)]
    Refused { http_status: u16, body: ErrorBody },
    /// The answer was cut off or is not what the API speaks.
    #[error("the server's answer could not be read: {0}")]
    BadAnswer(String),
    #[error("the connection to the server broke")]
    Broken(#[source] std::io::Error),
}

impl ApiError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Some("the server's own socket is root's: use sudo, or --api and a token (`dunlin tokens create` as root makes one)".into())
            }
            Self::Unreachable { .. } => {
                Some("is the server running? start it with `dunlin server`, or name another with --api".into())
            }
            Self::Refused { body, .. } => body.hint.clone(),
            Self::BadAnswer(_) => Some("is this a Dunlin server, of a similar version? see `dunlin version`".into()),
            Self::Broken(_) => Some("the work goes on at the server: see `dunlin status` and `dunlin releases`".into()),
        }
    }

    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Refused { body, .. } => body.request_id.as_deref(),
            _ => None,
        }
    }
}
