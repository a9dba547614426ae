//! The control role: the HTTP API, and the reconcilers that make hosts do what desired state says.
//!
//! Owns desired state: it alone opens the store. Never starts a process, never routes a request; it
//! meets hosts through [`HostApi`] and everybody else through the view. What it promises over the API
//! is durable before it answers, and what it began goes on after a `kill -9` at any moment: see
//! [`kill_points`].
//!
//! IO enters through the store, the key and certificate files under the data directory, and the router
//! that the binary serves. Tested with a real store and view, and a small host that lives in memory
//! (`tests/`).
#![forbid(unsafe_code)]

mod adopt;
mod api;
mod backup;
mod certificates;
mod dial_back;
mod ended;
mod destroyed;
mod events;
mod failure;
mod fly;
mod foresee;
mod forget;
mod grow;
mod hosts;
mod images;
pub mod issue;
mod keys;
mod kill;
mod launch;
mod logs;
mod machine_rows;
mod members;
pub mod operate;
mod owners;
mod project;
mod reconcile;
mod registry;
mod releases;
mod removal;
mod returning;
mod rows;
mod secret_sets;
mod secrets;
mod spec;
mod standbys;
mod start;
mod tokens;
pub mod upgrade;
mod volumes;
pub mod wall;
mod watch_hosts;
mod without;

pub use adopt::RESTORED;
pub use backup::{BackupError, Restored, restore, write as write_backup};
pub use certificates::CertificateError;
pub use failure::Failure;
pub use images::{BaseImages, ResolveImage, Wanted};
pub use keys::KeyError;
pub use kill::kill_points;
pub use dial_back::DialBack;
pub use registry::resolver;
pub use start::{
    BuilderSettings, Control, ControlConfig, Enrolment, Fleet, FleetQuestion, Metrics, Parts, Probe, Reach, Ready, StartError,
};
pub use without::{Away, ReachFor, WithoutControl, token_key};

use dunlin_api::HostApi;
use dunlin_api::wire::HostCost;
use dunlin_cluster::View;
use dunlin_model::OrgName;
use dunlin_model::desired::HostRow;
use dunlin_registry::ContentStore;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio_util::sync::CancellationToken;

/// What every part of control works with.
pub(crate) struct Ctx {
    pub state: rows::State,
    pub view: View,
    /// The one where control is: builds run there. Others are reached by [`hosts::reach`].
    pub host: Arc<dyn HostApi>,
    pub reach: Option<Reach>,
    /// Which of the others are dead.
    pub watched: watch_hosts::Watched,
    pub images: images::Images,
    /// The registry's: control removes from it what no app needs.
    pub content: ContentStore,
    pub keys: keys::Keys,
    pub tokens: tokens::Tokens,
    pub authority: certificates::Authority,
    /// Certifies hosts.
    pub cluster: dunlin_cluster::Authority,
    /// `None`: this server is alone.
    pub fleet: Option<Fleet>,
    pub events: events::Events,
    pub room: reconcile::Room,
    pub kill: kill::KillPoints,
    pub org: OrgName,
    pub domain: String,
    pub http_port: u16,
    pub https_port: u16,
    pub host_row: HostRow,
    pub version: String,
    pub commit: String,
    pub costs: Vec<HostCost>,
    pub data_dir: PathBuf,
    pub builder: Option<BuilderSettings>,
    pub base_images: BaseImages,
    pub rebalance_after_ms: u64,
    pub metrics: Vec<Metrics>,
    pub ready: Vec<Ready>,
    pub requests: api::Requests,
    /// Rings when there is work for the reconciler.
    pub work: Notify,
    /// Rings when a machine made by hand is to be started.
    pub launches: Notify,
    /// Rings when the upgrade of the fleet is to be looked at.
    pub upgrades: Notify,
    /// Asks a host's server itself.
    pub operate: operate::Operate,
    /// Machines are made by hand one at a time: names and addresses are looked for before they are taken.
    pub machines_writer: Mutex<()>,
    /// Hosts join and are removed one at a time: blocks of addresses are looked for before they are taken.
    pub hosts_writer: Mutex<()>,
    /// Hosts that join are dialed back, some at a time.
    pub dial_backs: dial_back::DialBacks,
    /// For hosts whose certificates have ended.
    pub challenges: returning::Challenges,
    /// Secrets are read, changed and written by one request at a time.
    pub secrets_writer: Mutex<()>,
    /// One build at a time.
    pub build_slot: Arc<Semaphore>,
    pub published: AtomicBool,
    /// When this process began to look after desired state.
    pub started_ms: u64,
    pub stop: CancellationToken,
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
