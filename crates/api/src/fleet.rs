//! Bodies of the API for hosts.
//!
//! - `POST /v1/hosts/tokens` [`CreateHostToken`] -> 201 [`HostToken`]
//! - `GET /v1/hosts` -> `Vec<HostShown>`; `GET /v1/hosts/{id}` -> [`HostDetail`]
//! - `POST /v1/hosts/{id}/cordon`, `.../uncordon`, `.../drain` -> [`HostDetail`]
//! - `DELETE /v1/hosts/{id}?force=` -> [`HostRemoved`]
//! - `GET /v1/hosts/{id}/debug` -> a tar.gz for people
//! - `POST /v1/cluster/upgrade` (the binary) -> 202 [`UpgradeShown`]; `GET /v1/cluster/upgrade`, `POST .../resume`, `.../abort` -> the same
//! - `GET /v1/cluster/status`, `GET /v1/cluster/verify`: what the host that control runs on knows of the cluster

use dunlin_model::{AppName, HostId, MachineId, MachineState, Region, VolumeId, Zone};
use dunlin_view::HostRoom;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateHostToken {
    /// How long it may be used [default: an hour].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

/// Shown once. No `Debug`: whoever has the token lets a host in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostToken {
    pub id: String,
    pub token: String,
    pub expires_at_ms: u64,
    /// Where the new host finds the cluster.
    pub join_address: SocketAddr,
}

/// How a host does; of several that are true, the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// Control hears nothing of it. Its machines may run.
    Unreachable,
    /// Its machines move to other hosts.
    Draining,
    /// It gets no new machine.
    Cordoned,
    Up,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostShown {
    pub id: HostId,
    pub region: Region,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    pub state: HostState,
    pub cordoned: bool,
    pub draining: bool,
    /// Control runs on it.
    pub is_control: bool,
    /// 0: before this was kept.
    pub joined_at_ms: u64,
    /// Where other hosts reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<SocketAddr>,
    /// As it said when it last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// When the other hosts begin to refuse it, unless it is certified anew before, as it is each month; within a day. Control's own
    /// host certifies itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_ends_at_ms: Option<u64>,
    pub machine_prefix: String,
    pub cpus: u32,
    pub memory_mb: u32,
    /// What it last said of itself; nothing, if it said nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_reserved_mb: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<HostRoom>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said_at_ms: Option<u64>,
    /// Machines that are assigned to it.
    pub machines: u32,
    pub volumes: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDetail {
    pub host: HostShown,
    pub machines: Vec<HostMachine>,
    /// Those that no machine has.
    pub free_volumes: Vec<HostVolume>,
    /// Machines that a drain is still going to move.
    pub moving: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMachine {
    pub id: MachineId,
    pub app: AppName,
    pub process_group: String,
    /// Nothing, if nobody said anything of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<MachineState>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeId>,
    /// Why a drain leaves it where it is, and what can be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stays: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVolume {
    pub id: VolumeId,
    pub app: AppName,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRemoved {
    pub id: HostId,
    /// That were assigned to it, and are destroyed.
    pub machines: u32,
    /// Their files are on the host's disk, and nowhere else.
    pub volumes: u32,
    /// Of its machines, those that it was not heard to have ended when it was removed. It ends them when it hears that it was, from
    /// control or through any member.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_heard_of: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// The last upgrade of the fleet, or the one that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeShown {
    pub id: String,
    /// What the new binary says of itself.
    pub version: String,
    pub sha256: String,
    pub state: UpgradeState,
    /// Why it stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    pub bake_s: u64,
    pub parallel: u32,
    pub started_at_ms: u64,
    /// In the order of their turns.
    pub hosts: Vec<UpgradeTurn>,
    /// What happened, the oldest first; `story_dropped` older lines are not kept.
    pub story: Vec<UpgradeLine>,
    pub story_dropped: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeState {
    Running,
    Stopped,
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeTurn {
    pub host: HostId,
    /// `waiting`, `installing`, `baking`, `keeping`, `going_back`, `kept`, `failed` or `skipped`.
    pub phase: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Of one that failed: whether the binary from before runs there again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_back: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeLine {
    pub at_ms: u64,
    pub text: String,
}
