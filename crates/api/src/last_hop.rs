//! The seam between an edge and the host of the machine: the last hop admits or refuses before any
//! byte is forwarded.

use async_trait::async_trait;
use dunlin_model::{Generation, MachineId, MachineVersion};
use std::net::SocketAddr;

#[async_trait]
pub trait LastHop: Send + Sync {
    /// Asks for one request or connection; answered from the host's own table, never from the view.
    /// Quick and without waiting: it is on every request's path.
    fn admit(&self, request: &AdmitRequest) -> Result<Admission, AdmitRefusal>;

    /// Starts a sleeping machine and waits until it is started and its first checks pass, or until
    /// `deadline_ms`. A thousand callers cause one start.
    async fn wake(&self, machine: &MachineId, deadline_ms: u64) -> Result<(), AdmitRefusal>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmitRequest {
    pub machine: MachineId,
    /// The version that the edge's table knows.
    pub version: MachineVersion,
    pub placement: Generation,
    pub internal_port: u16,
}

/// Permission for one request or connection; dropping it says that it ended.
pub struct Admission {
    pub address: SocketAddr,
    /// Counts the request until it is dropped.
    pub guard: Box<dyn Send + Sync>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitRefusal {
    #[error("the machine is not on this host")]
    NotHere,
    #[error("the machine is in another version than the edge believes")]
    OtherVersion,
    #[error("the machine is asleep")]
    Asleep,
    #[error("the machine is not running")]
    NotRunning,
    #[error("the machine is stopping and takes nothing new")]
    Draining,
    #[error("the machine is cordoned")]
    Cordoned,
    #[error("the machine is at its hard limit")]
    AtLimit,
    #[error("the machine did not come up: {0}")]
    DidNotWake(String),
    #[error("the host has no room: {0}")]
    InsufficientCapacity(String),
}
