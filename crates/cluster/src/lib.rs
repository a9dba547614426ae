//! The live view: one [`Snapshot`](dunlin_view::Snapshot) that everybody in this process reads.
//!
//! Owns the handle to the current snapshot, the order in which facts are folded into it, subscriptions,
//! and a checksummed copy of the config facts on disk, so that a host and an edge start without control.
//! It never decides what a fact means (`dunlin-view` does) and never opens the store. Reading takes no
//! lock. Tested by `tests/view.rs` and `tests/disk.rs`, with real files.
#![forbid(unsafe_code)]

mod authority;
mod disk;
mod joining;
mod live;
mod member;

pub use authority::{Authority, CONFIG_LOG, Issued, PublicKeys, log_name};
pub use disk::{Loaded, ViewError};
pub use joining::{HostReport, JoinAnswer, JoinRequest, JoinToken, MAX_JOIN_BYTES, NotAJoinToken, TokenProof};
pub use live::{Age, Ages, Changes, View};
pub use member::{ControlHost, Member, MemberError, MemberKeys, Said};
