//! What roles say to each other and to clients: the two seams [`HostApi`] and [`LastHop`], the wire
//! types of the HTTP API, and its client.
//!
//! Roles never import each other; they meet here and in the view. The wire types are those of the
//! Machines API where it has them. Tested by round trips and by the end-to-end suite.
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod exec;
pub mod fleet;
pub mod host;
pub mod last_hop;
pub mod remote;
pub mod shares;
pub mod tail;
pub mod volumes;
pub mod wire;

pub use error::{ApiError, ErrorBody, ErrorCode};
pub use host::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, CommandKind, ExecControl, ExecOutput, ExecProgram, ExecRequest,
    ExecSession, ExecStdin, HostApi, ListenSocket, LogLine, LogQuery, LogStream, Process, ProcessSocket, Refusal,
    Reserve, Source, VolumeEncryption, VolumeSnapshot, VolumeStatus, WaitFor, WindowSize,
};
pub use last_hop::{Admission, AdmitRefusal, AdmitRequest, LastHop};
