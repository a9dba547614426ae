//! Who commands a machine, who may alone, and what its host remembers of it.

use crate::{ExitInfo, MachineState};
use serde::{Deserialize, Serialize};

/// Who caused a command or an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    User,
    Plan,
    Proxy,
    Host,
}

/// One caller's word that nobody else moves a machine for a while. Its host holds it and asks every command for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whoever knows it holds the lease.
    pub nonce: String,
    /// For people who are refused because of it.
    pub owner: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    pub expires_at_ms: u64,
}

impl Lease {
    pub fn is_live(&self, now_ms: u64) -> bool {
        now_ms < self.expires_at_ms
    }
}

/// One thing that happened to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEvent {
    /// Counts up within a machine.
    pub id: u64,
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The state that it led to.
    pub status: MachineState,
    pub source: Source,
    pub at_ms: u64,
    /// Of an `exit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitInfo>,
    /// Failed tries in a row, with this one.
    #[serde(default)]
    pub restarts: u32,
    /// Of the call that caused it, if its sender gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// It came to this host.
    Launch,
    Start,
    Exit,
    Stop,
    Restart,
    /// It has another version.
    Update,
    Suspend,
    Resume,
    Signal,
    Cordon,
    Uncordon,
    Destroy,
}

impl EventKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::Start => "start",
            Self::Exit => "exit",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Update => "update",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Signal => "signal",
            Self::Cordon => "cordon",
            Self::Uncordon => "uncordon",
            Self::Destroy => "destroy",
        }
    }
}
