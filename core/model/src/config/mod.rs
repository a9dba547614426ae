//! App configuration: `dunlin.toml` and `fly.toml`, one schema.
//!
//! [`parse`] reads either file and answers with a config and a list of [`ConfigProblem`]s: keys that
//! Fly knows and this platform does not honour yet, and keys that nobody knows. A value of the wrong
//! shape is a [`ConfigError`] with line and column. [`render`] writes a file that [`parse`] reads back
//! to the same config. [`AppConfig`] itself holds only what is honoured, in resolved units, and is
//! what a release stores.
//!
//! ```
//! let text = "app = \"hello\"\n[http_service]\ninternal_port = 8000\nforce_http = true\n";
//! let parsed = dunlin_model::config::parse(text, "fly.toml").unwrap();
//! assert_eq!(parsed.config.http_service.unwrap().internal_port, 8000);
//! assert_eq!(
//!     parsed.problems[0].to_string(),
//!     "line 4: http_service.force_http is not a known key; did you mean force_https?"
//! );
//! ```

mod file;
mod parse;
mod problem;
pub mod procfile;
mod region;
mod render;
mod resolve;
mod section;
mod service;
#[cfg(test)]
mod tests;
pub mod units;
mod validate;
pub mod words;

pub use file::FileEntry;
pub use parse::{Parsed, parse, reserved_prefix};
pub use problem::{ConfigError, ConfigProblem, Mistake};
pub use region::{InvalidPrimaryRegion, PrimaryRegion};
pub use render::render;
pub use service::is_path;
pub use units::{GUEST_SIZES, GuestSize};
pub use validate::InvalidConfig;

use crate::machine::{AutoStop, CheckKind, Concurrency, CpuKind, RestartWhen};
use crate::volume::AutoExtend;
use crate::AppName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest file that is read: a real one has a few kilobytes.
pub const MAX_FILE_BYTES: usize = 256 * 1024;
/// Most entries in any list or table of the file (env, args, processes, checks, services, vm).
pub const MAX_ENTRIES: usize = 512;
/// The process group of an app whose configuration names none.
pub const DEFAULT_GROUP: &str = "app";
/// Port of a service that does not name one.
pub const DEFAULT_PORT: u16 = 8080;
/// How long a deploy waits for one machine, unless `deploy.wait_timeout` says otherwise.
pub const DEFAULT_WAIT_TIMEOUT_MS: u64 = 300_000;
/// Longest `kill_timeout`.
pub const MAX_KILL_TIMEOUT_MS: u64 = 300_000;
/// Signals that `kill_signal` may name.
pub const KILL_SIGNALS: &[&str] = &["SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP"];

/// How an app is built, run and reached. Times are milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AppConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<AppName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_region: Option<PrimaryRegion>,
    /// One of [`KILL_SIGNALS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kill_signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kill_timeout_ms: Option<u64>,
    /// Swap of every machine, beside its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_size_mb: Option<u32>,
    /// What `dunlin console` runs, split into words without a shell; `None` = a shell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_command: Option<String>,
    pub build: Build,
    pub deploy: Deploy,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Process group -> command; empty = one group `app` that runs the image's own command.
    /// Commands are split into words without a shell, see [`words::split`].
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub processes: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_service: Option<HttpService>,
    /// `[[services]]` with HTTP on port 80 and TLS + HTTP on port 443; others are not honoured yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<HttpService>,
    /// Top-level checks: they inform and never affect routing.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub checks: BTreeMap<String, NamedCheck>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vm: Vec<Vm>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub restart: Vec<Restart>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountConfig>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileEntry>,
}

impl AppConfig {
    /// What `launch` starts from: one HTTP service on `internal_port`, one small machine of
    /// `memory_mb`, everything else at its default.
    pub fn default_for(app: AppName, internal_port: u16, memory_mb: u32) -> Self {
        Self {
            app: Some(app),
            http_service: Some(HttpService { internal_port, ..HttpService::default() }),
            vm: vec![Vm { size: Some("shared-cpu-1x".into()), memory_mb: Some(memory_mb), ..Vm::default() }],
            ..Self::default()
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Build {
    /// Path relative to the configuration file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerfile: Option<String>,
    /// Deploy this image instead of building one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Used instead of `.dockerignore`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignorefile: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_target: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deploy {
    pub strategy: Strategy,
    /// How long one machine may take to become healthy.
    pub wait_timeout_ms: u64,
}

impl Default for Deploy {
    fn default() -> Self {
        Self { strategy: Strategy::Rolling, wait_timeout_ms: DEFAULT_WAIT_TIMEOUT_MS }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// One machine at a time, each healthy before the next.
    #[default]
    Rolling,
    /// All machines at once, without waiting for health.
    Immediate,
}

/// A port of the app that the edge serves as HTTP and HTTPS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpService {
    pub internal_port: u16,
    pub force_https: bool,
    #[serde(serialize_with = "as_word")]
    pub auto_stop_machines: AutoStop,
    pub auto_start_machines: bool,
    pub min_machines_running: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_machines_running: Option<u32>,
    /// Process groups that it belongs to; empty = the default group.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
    pub concurrency: Concurrency,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<ServiceCheck>,
}

impl Default for HttpService {
    fn default() -> Self {
        Self {
            internal_port: DEFAULT_PORT,
            force_https: false,
            auto_stop_machines: AutoStop::Off,
            auto_start_machines: true,
            min_machines_running: 0,
            max_machines_running: None,
            processes: Vec::new(),
            concurrency: Concurrency::default(),
            checks: Vec::new(),
        }
    }
}

fn as_word<S: serde::Serializer>(auto_stop: &AutoStop, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(auto_stop.as_str())
}

/// A check of a service: routing and deploys wait for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCheck {
    pub kind: CheckKind,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    pub grace_period_ms: u64,
}

/// A check under `[checks.<name>]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedCheck {
    pub port: u16,
    pub check: ServiceCheck,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
}

/// The size of the machines of some process groups (of all, when it names none).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    /// A name in [`GUEST_SIZES`]; the other fields replace its parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_kind: Option<CpuKind>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
}

/// A volume in each machine of some process groups (of the default group, when it names none).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MountConfig {
    /// The name that the volumes have.
    pub source: String,
    pub destination: String,
    /// Of a volume that a deploy makes, because there is no free one of the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_size_gb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_retention: Option<u32>,
    /// A snapshot a day; `None`: yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduled_snapshots: Option<bool>,
    /// Of a volume that a deploy makes; `None`: where its host can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extend: Option<AutoExtend>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
}

/// When the machines of some process groups are started again (of all, when it names none).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    pub policy: RestartWhen,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<String>,
}
