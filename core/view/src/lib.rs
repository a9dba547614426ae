//! Facts: what every reader knows, and how old it is.
//!
//! *Config facts* are control's projection of desired state, a pure function of the store's revision
//! ([`project`]). *Host facts* are written by the host that runs a machine. A [`Snapshot`] folds both
//! into what a reader sees; it is immutable and swapped whole. Of other regions that is a [`Summary`] for each app, unless
//! their detail was asked for. No IO and no clock; `dunlin-cluster` carries snapshots around. Tested by unit tests.
#![forbid(unsafe_code)]

mod facts;
mod project;
mod snapshot;
mod summary;

pub use facts::{
    AppFact, CertificateFact, CheckState, CheckStatus, ConfigState, Freshness, HostFact, HostRoom, MachineAssignment, MachineFact,
    PlatformFact, SecretsFact,
};
pub use project::{Desired, project};
pub use snapshot::{HostFacts, Refused, Snapshot};
pub use summary::{Report, ReportNews, Summary};
