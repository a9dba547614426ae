//! How a command ended, for scripts and for people.

use dunlin_api::ApiError;
use std::process::ExitCode;

/// Exit codes. A deploy's code says what runs now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done. After a deploy: the new release runs.
    Ok = 0,
    /// It failed and changed nothing, for example a build that did not come through.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// The new release failed, the last good one runs again.
    RolledBack = 3,
    /// The new release failed and there was nothing to return to.
    ReleaseFailed = 4,
    /// A newer release took over.
    Superseded = 5,
    /// The connection broke; the server goes on with the work.
    Unknown = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What happened and why, what to do next, and the request id under which the story can be read.
#[derive(Debug)]
pub struct CliError {
    pub message: String,
    pub causes: Vec<String>,
    pub hint: Option<String>,
    pub request_id: Option<String>,
    pub exit: Exit,
}

impl CliError {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { message: message.into(), causes: vec![], hint: None, request_id: None, exit }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn causes(mut self, causes: Vec<String>) -> Self {
        self.causes = causes;
        self
    }
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        let mut causes = Vec::new();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        Self {
            message: error.to_string(),
            causes,
            hint: error.hint(),
            request_id: error.request_id().map(str::to_owned),
            exit: if matches!(error, ApiError::Broken(_)) { Exit::Unknown } else { Exit::Failed },
        }
    }
}
