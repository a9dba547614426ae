//! What a machine is asked to be (its spec) and what it may be found in (its state).

use crate::containers::{Container, Program, default_container};
use crate::disk::{MachineRootfs, TempDir};
use crate::{AppName, MachineFile, MachineId, MachineVersion, OrgName, Schedule};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The process group of machines that live for the sessions in them, as Fly's clients call it.
pub const CONSOLE_GROUP: &str = "fly_app_console";

/// One immutable version of a machine: everything a host needs to run it, except its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    pub version: MachineVersion,
    pub org: OrgName,
    pub app: AppName,
    /// `app` unless the app's configuration names `processes`.
    pub process_group: String,
    /// The release that made this version, 0 for a machine made by hand.
    pub release: u32,
    pub image: ImageRef,
    /// Replaces the image's ENTRYPOINT when set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's CMD when set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub guest: Guest,
    /// Swap beside the guest's memory; 0 = none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub swap_mb: u32,
    /// Written before each start; see [`crate::files::check_files`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<MachineFile>,
    #[serde(default)]
    pub services: Vec<Service>,
    #[serde(default)]
    pub checks: Vec<Check>,
    #[serde(default)]
    pub restart: RestartPolicy,
    #[serde(default)]
    pub stop: StopConfig,
    /// The version of the secrets that are in the environment: exactly this one, 0 = none.
    #[serde(default)]
    pub secrets_version: u64,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Volumes in it. They tie the machine to their host, and no other machine has them meanwhile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<crate::Mount>,
    /// It is destroyed once its run has ended: it stopped, or failed, and the restart policy starts it no more.
    #[serde(default, skip_serializing_if = "is_false")]
    pub auto_destroy: bool,
    /// When the clock starts it, whoever has stopped it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Machines of the app that it stands in for: it rests, and runs while the host of one of them is dead.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub standbys: Vec<MachineId>,
    /// Programs in its one root file system; none = the image's one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<Program>,
    /// Instead of the one root file system; `image` then is that of the default one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<Container>,
    #[serde(default, skip_serializing_if = "MachineRootfs::is_usual")]
    pub rootfs: MachineRootfs,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub temp_dirs: Vec<TempDir>,
    /// It rests in this version until somebody starts it, also if it ran in the one before. Its host looks at that once, when it
    /// takes the version up.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rests: bool,
}

impl MachineSpec {
    /// The image's own program in a machine of the usual size: no release's, in the group `app`, and nothing else in it.
    pub fn of(version: MachineVersion, org: OrgName, app: AppName, image: ImageRef) -> Self {
        Self {
            version,
            org,
            app,
            process_group: "app".to_owned(),
            release: 0,
            image,
            entrypoint: None,
            command: None,
            env: BTreeMap::new(),
            guest: Guest::default(),
            swap_mb: 0,
            files: vec![],
            services: vec![],
            checks: vec![],
            restart: RestartPolicy::default(),
            stop: StopConfig::default(),
            secrets_version: 0,
            metadata: BTreeMap::new(),
            mounts: vec![],
            auto_destroy: false,
            schedule: None,
            standbys: vec![],
            processes: vec![],
            containers: vec![],
            rootfs: MachineRootfs::default(),
            temp_dirs: vec![],
            rests: false,
        }
    }
}

/// An image by content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageRef {
    /// Repository in the platform's registry: the app's name, or `library/...` for base images.
    pub repository: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The tag that was resolved, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// The size of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub cpu_kind: CpuKind,
    pub cpus: u32,
    pub memory_mb: u32,
}

impl Default for Guest {
    fn default() -> Self {
        Self { cpu_kind: CpuKind::Shared, cpus: 1, memory_mb: 256 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuKind {
    Shared,
    Performance,
}

/// A port of the machine that the edge serves over HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub internal_port: u16,
    #[serde(default)]
    pub force_https: bool,
    /// A request may start a sleeping machine.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// What the host does with an idle machine.
    #[serde(default)]
    pub autostop: AutoStop,
    /// So many are not put to sleep for being idle.
    #[serde(default)]
    pub min_machines_running: u32,
    /// So many of the process group run at most because of requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_machines_running: Option<u32>,
    #[serde(default)]
    pub concurrency: Concurrency,
}

/// Written as Fly's clients write it: `false`, `true` for stop, `"suspend"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AutoStop {
    #[default]
    Off,
    Stop,
    /// Its processes are frozen and stay in memory.
    Suspend,
}

impl AutoStop {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Stop => "stop",
            Self::Suspend => "suspend",
        }
    }
}

impl Serialize for AutoStop {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::Stop => serializer.serialize_bool(true),
            Self::Suspend => serializer.serialize_str("suspend"),
        }
    }
}

impl<'de> Deserialize<'de> for AutoStop {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Truth(bool),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Truth(false) => Ok(Self::Off),
            Written::Truth(true) => Ok(Self::Stop),
            Written::Word(word) => match word.as_str() {
                "off" => Ok(Self::Off),
                "stop" => Ok(Self::Stop),
                "suspend" => Ok(Self::Suspend),
                _ => Err(serde::de::Error::custom("autostop is \"off\", \"stop\", \"suspend\", true or false")),
            },
        }
    }
}

impl MachineSpec {
    /// A service without files of its own, and without a time of its own: it may run twice for a moment.
    pub fn is_replaceable(&self) -> bool {
        !self.services.is_empty() && self.mounts.is_empty() && self.schedule.is_none() && !self.auto_destroy
    }

    /// At no time may there be two of it: after a boot its host starts it once it knows that it is still placed there.
    pub fn is_exclusive(&self) -> bool {
        !self.is_replaceable() || !self.standbys.is_empty()
    }

    /// An idle machine sleeps only if all of its services allow it, and is suspended only if all say so.
    pub fn autostop(&self) -> AutoStop {
        let of = |wanted| self.services.iter().any(|service| service.autostop == wanted);
        match () {
            () if self.services.is_empty() || of(AutoStop::Off) => AutoStop::Off,
            () if of(AutoStop::Stop) => AutoStop::Stop,
            () => AutoStop::Suspend,
        }
    }

    /// Of all of its containers.
    pub fn images(&self) -> impl Iterator<Item = &ImageRef> {
        std::iter::once(&self.image).chain(self.containers.iter().map(|container| &container.image))
    }

    /// Which container is meant where none is named.
    pub fn default_container(&self) -> Option<&Container> {
        self.containers.get(default_container(self.containers.iter().map(|container| container.name.as_str())))
    }

    pub fn min_machines_running(&self) -> u32 {
        self.services.iter().map(|service| service.min_machines_running).max().unwrap_or(0)
    }

    pub fn max_machines_running(&self) -> Option<u32> {
        self.services.iter().filter_map(|service| service.max_machines_running).min()
    }
}

fn yes() -> bool {
    true
}

fn is_false(truth: &bool) -> bool {
    !truth
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Concurrency {
    #[serde(rename = "type")]
    pub kind: ConcurrencyKind,
    /// Above it, other machines are preferred.
    pub soft_limit: u32,
    /// At it, nothing more is sent; `None` = no limit.
    pub hard_limit: Option<u32>,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { kind: ConcurrencyKind::Connections, soft_limit: 20, hard_limit: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConcurrencyKind {
    Connections,
    Requests,
}

/// An active health check, made by the machine's host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub port: u16,
    #[serde(flatten)]
    pub kind: CheckKind,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    /// Failures during this time after a start do not count.
    pub grace_period_ms: u64,
    /// Whether the edge and deploys wait for it (service checks), or it only informs.
    pub gates_routing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "type")]
pub enum CheckKind {
    Tcp,
    /// 2xx passes; a redirect is a failure.
    Http {
        method: String,
        path: String,
        #[serde(default)]
        headers: BTreeMap<String, String>,
        /// Speak TLS to the machine.
        #[serde(default)]
        https: bool,
        /// Whom the certificate has to name; without it, the machine's address.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls_server_name: Option<String>,
        /// Take any certificate; otherwise one that the host's authorities vouch for.
        #[serde(default)]
        tls_skip_verify: bool,
    },
    /// A command in the machine: exit code 0 passes. It has no port; `Check::port` is 0.
    Script { command: Vec<String> },
}

/// Script checks of one machine: each is a process in it.
pub const MAX_SCRIPT_CHECKS: usize = 8;
const MAX_SCRIPT_WORDS: usize = 64;
const MAX_SCRIPT_BYTES: usize = 4096;
const MAX_SERVER_NAME_BYTES: usize = 253;

impl CheckKind {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http { .. } => "http",
            Self::Script { .. } => "script",
        }
    }
}

/// Whether a check may run it.
pub fn is_script(command: &[String]) -> bool {
    let bytes: usize = command.iter().map(String::len).sum();
    let is_named = command.first().is_some_and(|program| !program.is_empty());
    is_named && command.len() <= MAX_SCRIPT_WORDS && bytes <= MAX_SCRIPT_BYTES && !command.iter().any(|word| word.contains('\0'))
}

/// Whether a certificate may be for it: a DNS name or an address.
pub fn is_server_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_name = name.len() <= MAX_SERVER_NAME_BYTES && name.split('.').all(is_label);
    is_name || name.parse::<std::net::IpAddr>().is_ok()
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    pub policy: RestartWhen,
    /// Tries in a row before the machine is failed (`on-failure` only).
    pub max_retries: u32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self { policy: RestartWhen::OnFailure, max_retries: 10 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartWhen {
    No,
    Always,
    OnFailure,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopConfig {
    /// Signal name with `SIG`; `None` = the image's STOPSIGNAL, then SIGINT as on Fly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    pub timeout_ms: u64,
}

impl Default for StopConfig {
    fn default() -> Self {
        Self { signal: None, timeout_ms: 5_000 }
    }
}

/// Where a machine is in its life. The host that runs it is the only writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Image is being fetched and unpacked.
    Creating,
    /// Prepared, never started in this version, or kept in the pool.
    Created,
    Starting,
    Started,
    Stopping,
    Stopped,
    /// Its processes are being frozen.
    Suspending,
    /// Its processes stand still in memory.
    Suspended,
    /// It exited and waits for its next attempt.
    Restarting,
    /// Its version is being exchanged.
    Updating,
    /// The restart policy gave up, or it could not be created.
    Failed,
    Destroying,
    Destroyed,
}

impl MachineState {
    /// Whether a process of the machine may be alive.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Starting | Self::Started | Self::Stopping | Self::Suspending)
    }

    /// Whether a request may wake it (with autostart).
    pub fn is_asleep(self) -> bool {
        matches!(self, Self::Created | Self::Stopped | Self::Suspending | Self::Suspended)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Restarting => "restarting",
            Self::Updating => "updating",
            Self::Failed => "failed",
            Self::Destroying => "destroying",
            Self::Destroyed => "destroyed",
        }
    }
}

/// How one attempt ended, as the kernel said it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitInfo {
    pub attempt: u64,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    #[serde(default)]
    pub oom_killed: bool,
    #[serde(default)]
    pub requested_stop: bool,
    pub at_ms: u64,
    /// Why the process could not be started at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
