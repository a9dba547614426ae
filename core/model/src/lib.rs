//! The platform's nouns: ids, names, machine specs and states, app configuration, desired-state rows,
//! capability tokens, and the sealing of secrets.
//!
//! Owns the vocabulary that every other crate speaks. Never does IO and never reads a clock or a
//! random source: callers pass `now_ms` and random bytes. Tested by unit and property tests.
//!
//! ```
//! use dunlin_model::AppName;
//! assert!("hello-web".parse::<AppName>().is_ok());
//! assert!("Hello".parse::<AppName>().is_err());
//! ```
#![forbid(unsafe_code)]

pub mod calendar;
pub mod config;
pub mod containers;
pub mod desired;
pub mod disk;
pub mod events;
pub mod files;
pub mod hash;
pub mod ids;
pub mod machine;
pub mod proof;
pub mod region;
pub mod schedule;
pub mod seal;
pub mod token;
pub mod transfer;
pub mod volume;

pub use containers::{
    Condition, Container, ContainerMount, ContainerState, ContainerStatus, Dependency, Healthcheck, MachineField, Probe, ProbeTls, Program,
};
pub use events::{EventKind, Lease, MachineEvent, Source};
pub use files::MachineFile;
pub use ids::{
    AppName, CommandId, Generation, HostId, InvalidName, MachineId, MachineVersion, OrgName, Region, SnapshotId, VolumeId, Zone,
};
pub use machine::{
    AutoStop, Check, CheckKind, Concurrency, ConcurrencyKind, CpuKind, ExitInfo, Guest, ImageRef, MachineSpec, MachineState,
    RestartPolicy, RestartWhen, Service, StopConfig,
};
pub use region::RegionExpr;
pub use schedule::Schedule;
pub use volume::{Mount, VolumeSource};
