//! The two kinds of facts.

use dunlin_model::volume::VolumeRow;
use dunlin_model::{
    ContainerStatus,
    AppName, ExitInfo, Generation, HostId, MachineId, MachineSpec, MachineState, MachineVersion, OrgName, Region, VolumeId,
};
use serde::{Deserialize, Serialize};
use imbl::{OrdMap, OrdSet, Vector};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// All config facts of one store revision. A copy shares what it does not change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigState {
    pub generation: Generation,
    pub apps: OrdMap<AppName, AppFact>,
    pub machines: OrdMap<MachineId, MachineAssignment>,
    /// Only a tombstone lets a host destroy a machine; absence never does.
    pub tombstones: OrdMap<MachineId, HostId>,
    /// Those of them that a person asked for, by the machine or by its app.
    #[serde(default)]
    pub asked_for: OrdSet<MachineId>,
    #[serde(default)]
    pub volumes: OrdMap<VolumeId, VolumeRow>,
    /// Only they let a host remove a volume's files.
    #[serde(default)]
    pub volume_tombstones: OrdMap<VolumeId, HostId>,
    pub secrets: OrdMap<AppName, Vec<SecretsFact>>,
    pub certificates: Vector<CertificateFact>,
    /// Ids of revoked tokens.
    pub revoked_tokens: Vector<String>,
    /// Hosts that were removed for good: nobody talks to them any more, and their names are never used again.
    #[serde(default)]
    pub removed_hosts: OrdSet<HostId>,
    /// `None`: control is of before there was such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformFact>,
}

/// What members need to know of control, to follow it and to do without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformFact {
    /// The host that control runs on. Nobody else commands machines by a word of its own.
    pub control: HostId,
    /// The public key of tokens ([`dunlin_model::token::key_text`]): by it tokens are checked, and none can be made.
    pub token_key: String,
}

/// How lately anything was heard of a host, as readers judge its facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freshness {
    /// Within 6 s.
    Fresh,
    /// Within 30 s: others are preferred.
    Aging,
    /// Longer ago, or never in this process: the last resort, and said so.
    Old,
}

/// How requests find an app.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AppFact {
    pub org: OrgName,
    /// Host names that the edge serves for it, lower case, without port.
    pub hostnames: Vec<String>,
    pub current_release: u32,
    #[serde(default)]
    pub created_at_ms: u64,
}

/// A machine, its owner, and the version that it should be in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineAssignment {
    pub id: MachineId,
    pub name: String,
    pub host: HostId,
    pub region: Region,
    pub address: Ipv4Addr,
    /// Placement generation: a host obeys only what is not older than what it has.
    pub placement: Generation,
    pub created_at_ms: u64,
    pub spec: MachineSpec,
}

/// An app's secrets in one version, sealed to one host. There is one for each version that may have to run, and a
/// machine takes the one that its spec names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretsFact {
    pub host: HostId,
    pub version: u64,
    /// JSON object name -> value, sealed with context `env/<app>/<version>`, base64.
    pub sealed: String,
}

/// A certificate with its key sealed to the edges that need it (context `certificate/<first name>`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateFact {
    pub names: Vec<String>,
    pub chain_pem: String,
    /// To the host that control runs on.
    pub sealed_key: String,
    /// To each host.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sealed: BTreeMap<HostId, String>,
    pub not_after_ms: u64,
}

/// What a host says of one of its machines. `sequence` grows with every fact of this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineFact {
    pub id: MachineId,
    pub host: HostId,
    pub app: AppName,
    pub sequence: u64,
    pub placement: Generation,
    pub state: MachineState,
    /// The machine version that runs, or would run when started.
    pub version: MachineVersion,
    pub release: u32,
    pub process_group: Arc<str>,
    pub attempt: u64,
    pub address: Ipv4Addr,
    pub cordoned: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckStatus>,
    /// The last exit of this version, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Box<ExitInfo>>,
    /// Tries since it last ran well.
    pub restarts: u32,
    /// Why it cannot run, for people (`image not found`, `insufficient memory`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Its run has ended and it is to be destroyed then: nothing starts it, and control destroys it.
    #[serde(default)]
    pub over: bool,
    /// It would run, and waits for control's word that it is still placed here: its host was booted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unconfirmed: bool,
    /// When the clock starts it next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_ms: Option<u64>,
    /// Of a machine with several, while it runs; only in the answer of its own host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerStatus>,
    pub updated_at_ms: u64,
}

impl MachineFact {
    /// Started, and every check that gates routing passes.
    pub fn is_healthy(&self) -> bool {
        self.state == MachineState::Started
            && self.checks.iter().all(|c| !c.gates_routing || c.status == CheckState::Passing)
    }
}

/// The newest result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    pub name: String,
    pub status: CheckState,
    pub gates_routing: bool,
    /// Why it has this status, in the host's words, bounded to 1 KiB. What the app itself answered stays on
    /// its host: no tenant's text is in a fact.
    pub output: String,
    pub updated_at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    Passing,
    Warning,
    Critical,
}

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFact {
    pub id: HostId,
    pub region: Region,
    pub cpus: u32,
    pub memory_mb: u32,
    pub memory_reserved_mb: u32,
    /// Hosts of before there was such say nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<HostRoom>,
    pub updated_at_ms: u64,
}

/// What a host has beside memory, and how much of it is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRoom {
    /// Of the reserved memory, what suspended machines hold: the longest suspended make room.
    pub memory_yielding_mb: u32,
    /// Performance cpus that machines have for themselves, but for those that would make room.
    pub cores_reserved: u32,
    /// Shared cpus of the machines that run.
    pub shared_cpus: u32,
    /// Machines that it carries, those that do not run included, and the most that it does.
    pub machines: u32,
    pub machines_max: u32,
    /// The disk of its data directory, and what new volumes may have of it.
    pub disk_gb: u32,
    pub disk_free_gb: u32,
}
