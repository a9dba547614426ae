//! The live cluster: one [`Snapshot`](dunlin_view::Snapshot) that everybody in this process reads, and how hosts fill it for each other.
//!
//! ```text
//! View <-- facts, desired state -- flock (drives gossip) <-- link (QUIC, mutual TLS) --> other hosts
//!                                                            link --> streams: calls, images, joining
//! ```
//!
//! Owns the handle to the current snapshot, the order in which facts are folded into it, subscriptions, a checksummed copy of
//! the config facts on disk, so that a host and an edge start without control; a host's identity and its keys; the connections
//! between hosts. It never decides what a fact means (`dunlin-view` does) and never opens the store. Reading the view takes no
//! lock. Tested by `tests/`, with real files and real sockets on loopback. `docs/decisions/a-fleet.md` has the reasons.
#![forbid(unsafe_code)]

mod authority;
mod cluster;
mod config_rows;
mod dial_back;
mod disk;
mod facts;
mod flock;
#[cfg(fuzzing)]
pub mod fuzzing;
mod join;
mod joining;
mod link;
mod live;
mod member;
mod removal;
mod returning;
mod status;
mod stream;
mod thread;
mod tls;

pub use authority::{Authority, CONFIG_LOG, Issued, PublicKeys, log_name, machines_log_name};
pub use cluster::{Cluster, ClusterConfig, ClusterError, SeeDetail};
pub use dial_back::{Answering, DialedBack, NotReached};
pub use disk::{Loaded, ViewError};
pub use join::{JoinError, MAX_JOIN_ANSWER_BYTES, MAX_JOIN_REQUEST_BYTES, join};
pub use joining::{HostReport, JoinAnswer, JoinRequest, JoinToken, NotAJoinToken, Standing, TokenProof};
pub use link::Handler;
pub use live::{Age, Ages, Changes, View};
pub use member::{ControlHost, Member, MemberError, MemberKeys, Said};
pub use removal::RemovalNotice;
pub use returning::{ReturnChallenge, ReturnProof, ReturnRequest};
pub use status::{ClusterStatus, ComparedStatus, GossipCounts, LogScope, LogStatus, MemberStatus, Silenced, TransportCounts};
pub use stream::{Service, Stream, read_frame, write_frame};
pub use tls::TlsError;
