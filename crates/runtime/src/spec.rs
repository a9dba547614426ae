//! What a supervisor is asked to run. Travels as JSON over its standard input and is kept in memory
//! only: the environment may hold secrets.

use crate::cgroup::{Cgroups, CpuSet, Limits};
use crate::layer::WritableLayer;
use crate::net::NetSpec;
use dunlin_model::{Dependency, Healthcheck, RestartPolicy, RestartWhen};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use zeroize::Zeroizing;

/// Version of the wire between agent and supervisor; frozen once released.
pub const WIRE_VERSION: u32 = 1;
/// The text of a spec is rarely longer: a buffer of this size leaves no copies of secrets behind as it grows.
const USUAL_SPEC_BYTES: usize = 256 * 1024;
/// How many user ids a machine owns.
pub const UID_RANGE: u32 = 65_536;

#[derive(Clone, Serialize, Deserialize)]
pub struct SupervisorSpec {
    pub v: u32,
    pub machine_id: String,
    pub attempt: u64,
    /// Holds `lock`, `sock`, `exit/`, `log/`, `mnt/`, `kept/`, `containers/`; 0700, root's.
    pub machine_dir: PathBuf,
    pub rootfs: Rootfs,
    pub profile: Profile,
    pub process: ProcessSpec,
    /// Programs beside it in the same root file system: when one of them ends, all end.
    #[serde(default)]
    pub beside: Vec<ProcessSpec>,
    /// What holds for the machine's own root as one container of several.
    #[serde(default)]
    pub own: ContainerRules,
    /// Containers beside it: they share its user, network, ipc and uts namespaces and its control group.
    #[serde(default)]
    pub containers: Vec<ContainerSpec>,
    /// How long what still runs may take to end, once a program has ended for good.
    #[serde(default = "usual_stop_timeout_ms")]
    pub stop_timeout_ms: u64,
    pub hostname: String,
    /// First of the 65,536 host user ids that the machine owns.
    pub uid_base: u32,
    #[serde(default)]
    pub ids: Ids,
    /// Whose its user namespace is, if not the range's first id's. The kernel counts what is used inside for the owner too, so no
    /// two machines have the same.
    #[serde(default)]
    pub owner: Option<u32>,
    pub cgroups: Cgroups,
    pub limits: Limits,
    /// The only processors that it runs on; `None` = any.
    #[serde(default)]
    pub cpus: Option<CpuSet>,
    pub net: Option<NetSpec>,
    pub resolv_conf: String,
    /// Name in the machine's /etc/hosts.
    pub address: Option<Ipv4Addr>,
    #[serde(default)]
    pub binds: Vec<Bind>,
    /// Mounted file systems of the host whose files belong to the machine's own users, whichever range it has.
    #[serde(default)]
    pub volumes: Vec<Bind>,
    #[serde(default)]
    pub temp_dirs: Vec<TempDir>,
    #[serde(default)]
    pub files: Vec<GuestFile>,
    pub log_limits: LogLimits,
    /// `false` prepares everything and waits for [`Client::start`](crate::Client::start).
    pub start: bool,
    /// One of [`KILL_POINTS`](crate::KILL_POINTS): a test's supervisor ends itself there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kill_at: Option<String>,
}

/// Whose the files of machines are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ids {
    /// Each machine has a range of its own. Layers and volumes have the ids that machines see; each machine gets a view of them
    /// that is mapped to its range.
    #[default]
    Own,
    /// The kernel maps no files for this server: all machines have the range from here on, and so have layers.
    Shared { first: u32 },
}

impl Ids {
    /// What to add to the ids of an image's files when they are unpacked.
    pub fn of_layers(self) -> u32 {
        match self {
            Self::Own => 0,
            Self::Shared { first } => first,
        }
    }

    /// Whose the user namespace of a machine with this number is, if its range's first id is no other machine's.
    pub fn owner(self, number: u32) -> Option<u32> {
        match self {
            Self::Own => None,
            Self::Shared { first } => Some(first + number % UID_RANGE),
        }
    }

    /// The first id of a machine that would have this range of its own.
    pub fn base(self, own: u32) -> u32 {
        match self {
            Self::Own => own,
            Self::Shared { first } => first,
        }
    }
}

/// A root file system of its own, with one program.
#[derive(Clone, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub rules: ContainerRules,
    pub rootfs: Rootfs,
    pub process: ProcessSpec,
    #[serde(default)]
    pub volumes: Vec<Bind>,
    #[serde(default)]
    pub temp_dirs: Vec<TempDir>,
    #[serde(default)]
    pub files: Vec<GuestFile>,
}

/// When a container starts, starts again and counts as healthy, and how it is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRules {
    /// Empty where there is but one.
    pub name: String,
    #[serde(default)]
    pub depends_on: Vec<Dependency>,
    #[serde(default)]
    pub healthchecks: Vec<Healthcheck>,
    pub restart: RestartPolicy,
    /// `None`: the machine's.
    #[serde(default)]
    pub stop_signal: Option<i32>,
    /// `None`: as long as the machine's stop takes.
    #[serde(default)]
    pub stop_timeout_ms: Option<u64>,
}

impl Default for ContainerRules {
    /// The one container of a machine ends with its machine, whose host starts it again.
    fn default() -> Self {
        Self {
            name: String::new(),
            depends_on: vec![],
            healthchecks: vec![],
            restart: RestartPolicy { policy: RestartWhen::No, max_retries: 0 },
            stop_signal: None,
            stop_timeout_ms: None,
        }
    }
}

/// The machine's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rootfs {
    /// Unpacked image layers, lowest first, under a writable layer of its own.
    Layers { image: Vec<PathBuf>, writable: WritableLayer },
    /// A small tmpfs with the host's `/usr` read-only: for builders.
    HostUsr,
}

/// What its processes may ask of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    Tenant,
    /// Nested mounts and a few more capabilities; no tenant can ask for it.
    Builder,
}

#[derive(Clone, Serialize, Deserialize)]
pub struct ProcessSpec {
    pub command: Vec<String>,
    pub env: Vec<(String, String)>,
    /// `user`, `uid`, `user:group`, `uid:gid` or empty, resolved in the image's /etc/passwd.
    pub user: String,
    pub working_dir: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub source: PathBuf,
    pub target: PathBuf,
    pub readonly: bool,
}

/// An empty directory, for everybody in its root file system, that ends with that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TempDir {
    pub target: PathBuf,
    pub storage: TempStorage,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TempStorage {
    /// Counts as the machine's memory.
    Memory { size_bytes: u64 },
    Disk(WritableLayer),
}

/// A file that the machine finds when it starts.
#[derive(Clone, Serialize, Deserialize)]
pub struct GuestFile {
    pub path: PathBuf,
    pub content: Vec<u8>,
    #[serde(default = "for_all")]
    pub mode: u32,
    /// In the machine's writable layer, its own from then on. Otherwise it is read-only and in memory: it may be secret.
    #[serde(default)]
    pub on_disk: bool,
}

impl GuestFile {
    /// Read-only, in memory, readable by whichever user the program runs as: the machine has one tenant.
    pub fn in_memory(path: PathBuf, content: Vec<u8>) -> Self {
        Self { path, content, mode: for_all(), on_disk: false }
    }
}

fn for_all() -> u32 {
    0o444
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// A file is closed and the next begun at this size.
    pub file_bytes: u64,
    /// Oldest files are removed above this number.
    pub files: u32,
    /// Written in the long run; a burst may be as large as all files together. Lines beyond it are lost, and counted.
    #[serde(default = "usual_rate")]
    pub bytes_per_second: u64,
}

fn usual_stop_timeout_ms() -> u64 {
    5_000
}

/// Some 10,000 lines. The disk and the page cache are everybody's.
fn usual_rate() -> u64 {
    1 << 20
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { file_bytes: 4 << 20, files: 5, bytes_per_second: usual_rate() }
    }
}

/// For the text of a spec, which holds secrets: it is overwritten when it is dropped.
pub(crate) fn text_buffer() -> Zeroizing<Vec<u8>> {
    Zeroizing::new(Vec::with_capacity(USUAL_SPEC_BYTES))
}

impl SupervisorSpec {
    /// As its supervisor is given it.
    pub fn to_json(&self) -> Zeroizing<Vec<u8>> {
        let mut json = text_buffer();
        serde_json::to_writer(&mut *json, self).expect("a spec is JSON");
        json
    }

    /// Below the machine's directory: one for each container beside its own root, with what that one writes.
    pub(crate) const CONTAINERS: &str = "containers";

    /// Each container as if it were the machine's only one, with its rules; the machine's own root is the first.
    pub(crate) fn members(&self) -> impl Iterator<Item = (Cow<'_, Self>, &ContainerRules)> {
        let further = self.containers.iter().enumerate().map(|(nth, container)| {
            let spec = Self {
                machine_dir: self.machine_dir.join(Self::CONTAINERS).join(nth.to_string()),
                rootfs: container.rootfs.clone(),
                process: container.process.clone(),
                beside: vec![],
                volumes: container.volumes.clone(),
                temp_dirs: container.temp_dirs.clone(),
                files: container.files.clone(),
                containers: vec![],
                ..self.clone()
            };
            (Cow::Owned(spec), &container.rules)
        });
        std::iter::once((Cow::Borrowed(self), &self.own)).chain(further)
    }

    /// All programs of its root file system.
    pub(crate) fn programs(&self) -> impl Iterator<Item = &ProcessSpec> {
        std::iter::once(&self.process).chain(&self.beside)
    }

    /// Name of the machine's control group.
    pub fn machine_cgroup(machine_id: &str) -> String {
        format!("m-{machine_id}")
    }

    /// Name of its supervisor's.
    pub fn supervisor_cgroup(machine_id: &str) -> String {
        format!("s-{machine_id}")
    }
}
