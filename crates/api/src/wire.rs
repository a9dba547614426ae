//! JSON bodies of the HTTP API. Paths under `/v1`, those of the Machines API where it has them.
//!
//! Dunlin's own:
//! - `GET /v1/version` -> [`VersionInfo`]
//! - `POST /v1/apps/{app}/builds?dockerfile=&target=&no_cache=` body: tar of the context (gzip or plain),
//!   header `dunlin-build-args: <base64 JSON object>`, `dunlin-build-secrets: <base64 JSON object>`;
//!   answer: NDJSON of [`BuildEvent`], the last one `Done` or `Failed`.
//! - `POST /v1/apps/{app}/releases` [`CreateRelease`] -> 201 [`Release`]
//! - `GET /v1/apps/{app}/releases` -> `Vec<Release>`; `GET .../releases/{n}` -> [`Release`]
//! - `GET /v1/apps/{app}/releases/{n}/events` -> NDJSON of [`DeployEvent`] until it has ended
//! - `POST /v1/apps/{app}/rollback` `{version?: n}` -> 201 [`Release`]
//! - `POST /v1/apps/{app}/plan` [`PlanRequest`] -> [`PlanShown`]; nothing is written
//! - `GET|POST /v1/apps/{app}/scale` map group -> count; POST answers 201 [`Release`] or 200 when nothing changes
//! - `GET /v1/apps/{app}/logs?follow=&machine=&since_ms=&tail=` -> NDJSON of `LogLine`
//! - `GET /v1/apps/{app}/status` -> [`AppStatus`]
//! - `GET /v1/apps/{app}/machines/{id}/exec/stream` a WebSocket, see [`crate::exec`]
//! - `POST /v1/tokens` [`CreateToken`] -> [`CreatedToken`]

use dunlin_model::config::AppConfig;
use dunlin_model::desired::ReleaseStatus;
use dunlin_model::token::Verb;
use dunlin_model::{AppName, ContainerStatus, ExitInfo, Guest, HostId, MachineId, MachineState, OrgName, Region};
use dunlin_view::CheckState;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    pub version: String,
    pub commit: String,
    pub host: String,
    pub domain: String,
    /// Ports of the edge.
    pub http_port: u16,
    pub https_port: u16,
    /// What its host cannot do for machines.
    #[serde(default)]
    pub costs: Vec<HostCost>,
}

/// Something that a host cannot do for its machines, because of whom or where its server runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCost {
    pub name: String,
    /// Why.
    pub found: String,
    /// What that means for machines.
    pub cost: String,
    /// What to do about it.
    pub fix: String,
}

/// What is not known is refused: a wish that is dropped in silence may be the one that mattered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateApp {
    #[serde(alias = "name")]
    pub app_name: AppName,
    #[serde(default)]
    pub org_slug: Option<OrgName>,
    /// Only none, or `default`: no machine reaches another one, so that there is nothing to keep apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Only `false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_subdomains: Option<bool>,
    /// Fly's Go client sends it always; only none, or the empty one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_role_id: Option<String>,
}

impl CreateApp {
    pub fn named(app_name: AppName) -> Self {
        Self { app_name, org_slug: None, network: None, enable_subdomains: None, app_role_id: None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct App {
    pub id: String,
    pub name: AppName,
    /// `pending` before the first release, then `deployed`.
    pub status: String,
    pub organization: Organization,
    pub machine_count: usize,
    pub current_release: u32,
    pub hostname: String,
    pub created_at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Organization {
    pub name: String,
    pub slug: OrgName,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppList {
    pub total_apps: usize,
    pub apps: Vec<App>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CreateRelease {
    /// `<app>@sha256:...`, `<app>:tag`, or the reference of an image elsewhere, which is then pulled.
    pub image: String,
    #[serde(deserialize_with = "object")]
    pub config: AppConfig,
    #[serde(default)]
    pub reason: String,
}

/// A configuration is an object; left to itself serde would take an array of its fields' values, too.
fn object<'de, T: DeserializeOwned, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    let map = serde_json::Map::deserialize(from)?;
    serde_json::from_value(map.into()).map_err(D::Error::custom)
}

fn optional_object<'de, T: DeserializeOwned, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    let map = Option::<serde_json::Map<String, serde_json::Value>>::deserialize(from)?;
    map.map(|map| serde_json::from_value(map.into()).map_err(D::Error::custom)).transpose()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Release {
    pub app: AppName,
    pub version: u32,
    pub image: String,
    pub status: ReleaseStatus,
    pub reason: String,
    pub created_at: u64,
    /// Only where one release is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<AppConfig>,
}

/// What to plan for; all that is left out is as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// As in [`CreateRelease`]. Left out with a configuration: one that is still to be built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, deserialize_with = "optional_object", skip_serializing_if = "Option::is_none")]
    pub config: Option<AppConfig>,
    /// By process group.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scale: BTreeMap<String, u32>,
}

/// What a deploy would do now. Nothing of it is written down: a deploy looks anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanShown {
    pub app: AppName,
    /// The number that the release would have.
    pub release: u32,
    pub from_release: u32,
    pub summary: String,
    /// What those who deploy would be told beside it.
    pub notes: Vec<String>,
    /// Why there is no plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub impossible: Option<String>,
    /// In their order.
    pub steps: Vec<PlanStep>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanStep {
    /// `reserve`, `assign`, `update`, `start`, `gate`, `cordon`, `uncordon`, `stop` or `destroy`.
    pub step: String,
    /// One that exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// One that would be made, by number: its id is drawn then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<u32>,
    pub group: String,
    pub host: HostId,
    pub region: Region,
    pub why: String,
}

/// One line of a build's output stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum BuildEvent {
    /// A line of the builder's output.
    Output { line: String },
    /// A step of ours began, for example `waiting for another build of this organization`.
    Step { message: String },
    Done { image: String, digest: String, size: u64 },
    /// `step` is the Dockerfile's failing instruction when it is known.
    Failed { error: String, step: Option<String>, hint: Option<String>, last_lines: Vec<String> },
}

/// One line of a deploy's event stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployEvent {
    pub at_ms: u64,
    pub release: u32,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// Set on the last line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<ReleaseStatus>,
    /// On failure: why, for people, with the machine's last lines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollback {
    #[serde(default)]
    pub version: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AppStatus {
    pub app: App,
    pub urls: Vec<String>,
    pub release: Option<Release>,
    pub machines: Vec<Machine>,
    /// What the host of its machines cannot do for them.
    #[serde(default)]
    pub costs: Vec<HostCost>,
}

/// A machine as the Machines API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub id: MachineId,
    pub name: String,
    pub app: AppName,
    pub state: MachineState,
    pub region: Region,
    pub instance_id: String,
    /// The same, as newer clients call it.
    pub version: String,
    pub private_ip: String,
    pub image_ref: ImageRefWire,
    /// As Fly's clients write it.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub config: serde_json::Value,
    pub guest: Guest,
    pub checks: Vec<CheckShown>,
    /// Of a machine with several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerStatus>,
    /// The newest first; only where one machine is shown.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub events: serde_json::Value,
    /// Of the lease that the request took with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonce: Option<String>,
    /// `ok`, `unknown` or `unreachable`.
    pub host_status: String,
    /// When its host last spoke, milliseconds since 1970: the rest is not newer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_seen_at: Option<u64>,
    pub cordoned: bool,
    pub process_group: String,
    pub release: u32,
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitInfo>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// When the clock starts it next; RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_run_at: Option<String>,
    /// RFC 3339, as `updated_at`.
    pub created_at: String,
    pub updated_at: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckShown {
    pub name: String,
    pub status: CheckState,
    pub gates_routing: bool,
    pub output: String,
    /// RFC 3339.
    pub updated_at: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRefWire {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    pub digest: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StopMachine {
    #[serde(default)]
    pub signal: Option<String>,
    /// Seconds, as a number or a duration like `10s`.
    #[serde(default)]
    pub timeout: Option<serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecBody {
    #[serde(default)]
    pub command: Vec<String>,
    /// One string, split like a shell would.
    #[serde(default)]
    pub cmd: Option<String>,
    #[serde(default)]
    pub stdin: Option<String>,
    /// Of a machine with several; none: `app`, or else the first.
    #[serde(default)]
    pub container: Option<String>,
    /// Seconds.
    #[serde(default)]
    pub timeout: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecAnswer {
    pub exit_code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// `None` deletes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetSecrets {
    pub values: BTreeMap<String, Option<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    pub name: String,
    pub digest: String,
    pub created_at: u64,
    pub updated_at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secrets {
    pub secrets: Vec<Secret>,
    #[serde(default)]
    pub version: u64,
    /// The release that brings them to the machines, when one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<u32>,
}

/// One that was set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSet {
    #[serde(flatten)]
    pub secret: Secret,
    /// As in [`Secrets`].
    pub version: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateToken {
    #[serde(default)]
    pub apps: Option<Vec<AppName>>,
    pub verbs: Vec<Verb>,
    pub expires_in_s: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreatedToken {
    pub id: String,
    pub token: String,
}
