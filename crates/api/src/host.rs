//! The seam to the host that owns a machine's run state.

use crate::volumes::rfc3339;
use async_trait::async_trait;
use dunlin_model::transfer::Transfer;
use dunlin_model::{
    AppName, CommandId, Generation, Guest, HostId, Lease, MachineEvent, MachineId, MachineState, MachineVersion, OrgName,
    SnapshotId, VolumeId,
};
pub use dunlin_model::Source;
use dunlin_view::MachineFact;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use tokio::sync::mpsc;

/// Commands to the owner of machines: in the process, or over a stream to another host ([`crate::remote`]).
#[async_trait]
pub trait HostApi: Send + Sync {
    fn host_id(&self) -> &HostId;

    /// Sets capacity aside for a machine that will be assigned soon; expires by itself.
    async fn reserve(&self, reserve: Reserve) -> Result<(), Refusal>;

    /// Checks deadline, generation, lease, legal move and admission in this order; journals, answers,
    /// acts. A repeated id gets the first answer.
    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal>;

    /// The owner's own word on a machine.
    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal>;

    /// Waits until one of the states is reached, or says that it cannot be reached any more.
    async fn wait(&self, id: &MachineId, wait: WaitFor) -> Result<MachineFact, Refusal>;

    /// What happened to it, the newest first; the host keeps the last ones.
    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal>;

    /// The lease that holds now. Who changes or destroys a machine in the store asks for it first.
    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal>;

    async fn exec(&self, request: ExecRequest) -> Result<ExecSession, Refusal>;

    async fn logs(&self, query: LogQuery) -> Result<LogStream, Refusal>;

    /// The machine's processes, as its kernel shows them now.
    async fn processes(&self, id: &MachineId) -> Result<Vec<Process>, Refusal>;

    /// Sockets on which the machine's processes listen.
    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal>;

    /// The start of what a machine last answered to a check, as it is: it stays on its host, no fact has it.
    /// Empty: there was no answer.
    async fn check_answer(&self, machine: &MachineId, check: &str) -> Result<String, Refusal>;

    /// Makes the volume as config facts have it, if it is not there in its size yet, and says how full it is. Facts by
    /// which it is smaller than `size_gb` are waited out.
    async fn volume(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeStatus, Refusal>;

    /// Whether the disk has room for so much more of volumes.
    async fn volume_room(&self, size_gb: u32) -> Result<(), Refusal>;

    /// Whether volumes can be encrypted on this host.
    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal>;

    /// A volume's snapshots, oldest first.
    async fn snapshots(&self, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal>;

    /// Makes a snapshot. A repeated id gets the first one.
    async fn snapshot(&self, id: &VolumeId, snapshot: &SnapshotId) -> Result<VolumeSnapshot, Refusal>;

    /// Starts a builder machine, a profile that no tenant can ask for.
    async fn run_builder(&self, request: BuilderRequest) -> Result<BuilderRun, Refusal>;
}

/// A no, with its reason and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    #[error("the command arrived after its deadline")]
    TooLate,
    #[error("volume {0} is not known on this host")]
    NoSuchVolume(VolumeId),
    #[error("machine {0} is not known on this host")]
    NoSuchMachine(MachineId),
    #[error("machine {machine} is owned by another host since generation {generation}")]
    Moved { machine: MachineId, generation: Generation },
    #[error("the command is older ({offered}) than what the machine has ({held})")]
    OldGeneration { offered: Generation, held: Generation },
    #[error("machine {machine} obeys plan {held}, and this is the command of an older one ({offered})")]
    OldPlan { machine: MachineId, offered: Generation, held: Generation },
    #[error("machine {machine} is in version {found}, not {expected}")]
    VersionMismatch { machine: MachineId, expected: MachineVersion, found: MachineVersion },
    #[error("machine {machine} is leased by {owner}, until {}", rfc3339(*expires_at_ms))]
    Leased { machine: MachineId, owner: String, expires_at_ms: u64 },
    #[error("the lease of machine {machine} with this nonce has ended")]
    NotLeased { machine: MachineId },
    #[error("machine {machine} is {}, from which it cannot {verb}", state.as_str())]
    IllegalMove { machine: MachineId, state: MachineState, verb: String },
    #[error("the run of machine {machine} has ended, and with auto_destroy it is destroyed then")]
    Over { machine: MachineId },
    #[error("host {host} has no room: {why}")]
    InsufficientCapacity { host: HostId, why: String },
    #[error("{0}")]
    Invalid(String),
    #[error("the deadline passed before the machine got there; it is {}", state.as_str())]
    WaitTimeout { state: MachineState },
    #[error("the machine cannot reach that state any more; it is {}", state.as_str())]
    WaitHopeless { state: MachineState },
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// It may be down, or cut off; what was asked may have been done all the same.
    #[error("host {host} cannot be reached: {why}")]
    Unreachable { host: HostId, why: String },
    /// Whoever asks may not ask for it.
    #[error("{0}")]
    Forbidden(String),
    /// There is too much of it already.
    #[error("{0}")]
    Busy(String),
    #[error("{0}")]
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve {
    pub machine: MachineId,
    pub guest: Guest,
    pub ttl_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    pub id: CommandId,
    pub machine: MachineId,
    pub deadline_ms: u64,
    /// Placement generation that the sender knows; `None` for a person's command.
    pub generation: Option<Generation>,
    /// Of the plan that sends it: store incarnation and the plan's sequence. A machine that obeyed a later plan of its
    /// app obeys none before it, so an executor that wakes up late does no harm.
    pub plan: Option<Generation>,
    pub expected_version: Option<MachineVersion>,
    /// Lease nonce.
    pub nonce: Option<String>,
    pub source: Source,
    /// Of the call that caused it; shown in events.
    #[serde(default)]
    pub request_id: Option<String>,
    pub kind: CommandKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CommandKind {
    Start,
    Stop { signal: Option<String>, timeout_ms: Option<u64> },
    Restart { signal: Option<String>, timeout_ms: Option<u64> },
    Signal { signal: String },
    /// Freezes its processes; a start or a request thaws them.
    Suspend,
    Cordon,
    Uncordon,
    /// Takes the lease, or with its nonce makes it last longer from now on. The answer has it.
    Lease { ttl_ms: u64, owner: String, description: String },
    /// Ends the lease of the nonce.
    Release,
}

/// The acknowledgement: journalled, the act follows or has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandAnswer {
    pub previous_state: MachineState,
    /// Sequence of the fact that first shows the command's effect, or later.
    pub sequence: u64,
    /// That was taken or made to last longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// How full a volume is, in blocks of its file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    pub block_size: u64,
    pub blocks: u64,
    pub blocks_free: u64,
    /// Of the free ones those that can be written to.
    pub blocks_avail: u64,
    /// It was extended, and its machine sees that from its next start on.
    pub needs_restart: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeEncryption {
    Offered,
    /// What the host lacks, and what an operator does about it.
    Lacking { what: String, fix: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSnapshot {
    pub id: SnapshotId,
    pub created_at_ms: u64,
    /// Bytes that it takes up on the disk.
    pub size: u64,
    /// Bytes of the volume that it is of.
    pub volume_size: u64,
    /// `sha256:` and hexadecimal, of what the volume had; empty for one of before there were such.
    #[serde(default)]
    pub digest: String,
    /// Made by its host, as one a day.
    #[serde(default)]
    pub scheduled: bool,
    pub retention_days: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitFor {
    pub states: Vec<MachineState>,
    pub version: Option<MachineVersion>,
    /// Only a state that it came to, or came to again, after this event.
    pub after_event: Option<u64>,
    pub timeout_ms: u64,
}

#[derive(Debug, Clone)]
pub struct ExecRequest {
    pub machine: MachineId,
    pub program: ExecProgram,
    /// Added to the machine's own environment.
    pub env: Vec<(String, String)>,
    /// Of the image; empty: the machine's own user.
    pub user: String,
    /// Of a machine with several; empty: `app`, or else the first.
    pub container: String,
    /// On a terminal of the machine's own. Standard error then comes as standard output.
    pub tty: Option<WindowSize>,
    pub stdin: ExecStdin,
    pub timeout_ms: u64,
    /// Longest time without a byte either way.
    pub idle_ms: u64,
}

impl ExecRequest {
    /// A command without input.
    pub fn new(machine: MachineId, command: Vec<String>, timeout_ms: u64) -> Self {
        Self {
            machine,
            program: ExecProgram::Command(command),
            env: vec![],
            user: String::new(),
            container: String::new(),
            tty: None,
            stdin: ExecStdin::Whole(bytes::Bytes::new()),
            timeout_ms,
            idle_ms: timeout_ms,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecProgram {
    Command(Vec<String>),
    /// Copies files between the machine and the session's streams, with no program of the image.
    Transfer(Transfer),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecStdin {
    Whole(bytes::Bytes),
    /// Comes through the session.
    Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

/// Output as it comes; the channel closes after `Exited`. Dropping the output ends the command and all that it
/// started; on a terminal it hears SIGHUP first.
pub struct ExecSession {
    pub output: mpsc::Receiver<ExecOutput>,
    /// Its end is the end of the input; on a terminal, the key that says so. There with [`ExecStdin::Open`].
    pub stdin: Option<mpsc::Sender<bytes::Bytes>>,
    pub control: mpsc::Sender<ExecControl>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecControl {
    Resize(WindowSize),
    /// `SIGTERM`, `TERM` or a number, to the command's process group.
    Signal(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    Stdout(bytes::Bytes),
    Stderr(bytes::Bytes),
    /// Exit code, or 128 + signal.
    Exited(i32),
    /// The session could not run or be followed to its end.
    Failed(String),
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LogQuery {
    pub app: Option<AppName>,
    pub machine: Option<MachineId>,
    pub since_ms: Option<u64>,
    /// At most this many of the newest lines before following.
    pub tail: Option<usize>,
    pub follow: bool,
}

/// Lines in the order of their time, as well as several machines allow.
pub struct LogStream {
    pub lines: mpsc::Receiver<LogLine>,
    /// Set before the lines end, where they end because their host was lost: why.
    pub broken: Arc<OnceLock<Refusal>>,
}

impl LogStream {
    pub fn new(lines: mpsc::Receiver<LogLine>) -> Self {
        Self { lines, broken: Arc::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub at_ms: u64,
    pub app: AppName,
    pub machine: MachineId,
    /// `stdout`, `stderr`, or `system` for what the platform says.
    pub stream: String,
    /// Of several containers or processes, whose line it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program: String,
    pub line: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenSocket {
    pub protocol: String,
    pub address: SocketAddr,
}

/// One process of a machine. Its texts are the tenant's own: one line each, bounded, without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// In the machine's own pid namespace.
    pub pid: i32,
    /// Milliseconds of processor time in the kernel.
    pub stime: u64,
    /// Milliseconds since it was started.
    pub rtime: u64,
    pub command: String,
    pub directory: String,
    /// Percent of one processor over its whole life.
    pub cpu: u64,
    /// Bytes.
    pub rss: u64,
    pub listen_sockets: Vec<ProcessSocket>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSocket {
    /// `tcp`, `tcp6`, `udp` or `udp6`.
    pub proto: String,
    pub address: SocketAddr,
}

/// One run of a builder machine: the host's `/usr` read-only on a tmpfs root, the CA bundle and a
/// resolv.conf, network with masquerade, the organization's cache volume at `/cache` (owned by the
/// machine's root: the uid range is fixed for the organization), and this binary, bound read-only, at
/// `/dunlin` (a copy in the data directory, so that an upgrade does not pull it away).
#[derive(Debug, Clone)]
pub struct BuilderRequest {
    pub org: OrgName,
    pub app: AppName,
    /// Directory that holds `context.tar`, readable by all; bound read-only at `/context`.
    pub context: PathBuf,
    /// Unix socket of the registry; bound at `/run/registry.sock`.
    pub registry_socket: PathBuf,
    /// Run as root of the machine's user namespace.
    pub command: Vec<String>,
    /// In memory only: tokens and build secrets travel here.
    pub env: Vec<(String, String)>,
    /// Files that exist for this run only, in memory: (absolute path in the machine, content).
    pub files: Vec<(String, Vec<u8>)>,
    pub timeout_ms: u64,
}

/// A running builder; dropping it ends the machine.
pub struct BuilderRun {
    pub output: mpsc::Receiver<ExecOutput>,
}
