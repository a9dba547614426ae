//! What control asks a host's server itself, beside its machines: how it does, to take a new binary, to tell all that a person
//! needs who looks for a fault. Only control is answered, over the cluster, or in the process on its own host.

mod redact;

pub use redact::redacted;

use dunlin_model::HostId;
use dunlin_planner::upgrade::Look;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio_util::sync::CancellationToken;

/// A larger file is no binary of ours.
pub const MAX_BINARY_BYTES: u64 = 1 << 30;

/// Hosts of other versions know the same words, or say that they do not know one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    Look,
    /// What a binary that lies on control's host says of itself; asked there alone.
    Version { path: PathBuf },
    /// The binary's bytes follow.
    Install(Install),
    Keep { upgrade: String },
    GoBack { upgrade: String, why: String },
    Collect,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    pub upgrade: String,
    pub sha256: String,
    pub bytes: u64,
    /// Of a new server that is ready: without a word within this it is taken back.
    pub word_within_s: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", content = "with", rename_all = "snake_case")]
pub enum Answer {
    Look(Box<Look>),
    Version(String),
    Done,
    /// (name, content) of texts without secrets.
    Collected(Vec<(String, String)>),
}

/// A file on its way to a host. A clone is the same.
#[derive(Debug, Clone)]
pub struct Sending {
    pub path: PathBuf,
    sent: Arc<AtomicU64>,
    /// The host is not to have it any more.
    pub stop: CancellationToken,
}

impl Sending {
    pub fn new(path: PathBuf) -> Self {
        Self { path, sent: Arc::default(), stop: CancellationToken::new() }
    }

    /// So many bytes more have been taken from here.
    pub fn note(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// Asks a host. With [`Ask::Install`] goes the file whose bytes follow. `Err`: its no, or why it cannot be asked.
pub type Operate = Arc<dyn Fn(HostId, Ask, Option<Sending>) -> BoxFuture<'static, Result<Answer, NoAnswer>> + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum NoAnswer {
    /// The host has changed nothing.
    #[error("{0}")]
    Refused(String),
    #[error("the host cannot be asked: {0}")]
    Silent(String),
}
