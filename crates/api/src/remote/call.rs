//! What is asked and answered, as it is on the wire.

use super::{MAX_CALL_BYTES, VERSION};
use crate::host::{Command, ExecControl, ExecProgram, ExecRequest, ExecStdin, LogQuery, Refusal, Reserve, WaitFor, WindowSize};
use dunlin_model::proof::Proof;
use dunlin_model::{MachineId, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The first frame of a stream.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    pub v: u32,
    #[serde(flatten)]
    pub call: serde_json::Value,
}

impl Head {
    pub fn of(call: &Call) -> serde_json::Result<Self> {
        Ok(Self { v: VERSION, call: serde_json::to_value(call)? })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call", content = "args")]
pub(super) enum Call {
    Reserve(Reserve),
    Command(Command),
    Machine(MachineId),
    Wait { machine: MachineId, wait: WaitFor },
    Events(MachineId),
    Lease(MachineId),
    Exec(ExecOpen),
    Logs(LogQuery),
    Processes(MachineId),
    ListenSockets(MachineId),
    CheckAnswer { machine: MachineId, check: String },
    Volume { volume: VolumeId, size_gb: u32 },
    VolumeRoom { size_gb: u32 },
    VolumeEncryption,
    Snapshots(VolumeId),
    Snapshot { volume: VolumeId, snapshot: SnapshotId },
    /// Another of these, for the bearer of a token; never this one again. `asked` is a [`Proven`](super::right::Proven) as text,
    /// which is what was signed.
    Proven { proof: Proof, asked: String },
}

/// Hosts wait no longer in one call.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// What a host answers from memory or from a supervisor.
const QUICK: Duration = Duration::from_secs(5);
/// What may have to wait for a disk, or for config facts to arrive.
const SLOW: Duration = Duration::from_secs(120);
/// A snapshot reads all that is in the volume.
const SNAPSHOT: Duration = Duration::from_secs(3600);
/// The longest that an answer to a command is waited for, whatever its deadline.
const COMMAND: Duration = Duration::from_secs(30);

impl Call {
    /// How long an answer is waited for, connecting included. A host that is lost meanwhile is noticed before.
    pub fn patience(&self, now_ms: u64) -> Duration {
        match self {
            Self::Command(command) => Duration::from_millis(command.deadline_ms.saturating_sub(now_ms)).clamp(QUICK, COMMAND),
            Self::Wait { wait, .. } => Duration::from_millis(wait.timeout_ms).min(MAX_WAIT) + QUICK,
            Self::Volume { .. } => SLOW,
            Self::Snapshot { .. } => SNAPSHOT,
            Self::Exec(_) | Self::Logs(_) | Self::Snapshots(_) | Self::VolumeRoom { .. } | Self::VolumeEncryption => QUICK * 2,
            _ => QUICK,
        }
    }

    /// Whether a host may be told it twice. A command has an id for that; what runs is not run again.
    pub fn may_repeat(&self) -> bool {
        !matches!(self, Self::Exec(_))
    }
}

/// An exec without its input, which comes in frames.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct ExecOpen {
    pub machine: MachineId,
    program: ExecProgram,
    env: Vec<(String, String)>,
    user: String,
    container: String,
    tty: Option<WindowSize>,
    timeout_ms: u64,
    idle_ms: u64,
}

/// Its environment and its command may hold secrets.
impl std::fmt::Debug for ExecOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecOpen").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl ExecOpen {
    /// And the input: all of it, or `None` where it is still to come.
    pub fn of(request: ExecRequest) -> (Self, Option<bytes::Bytes>) {
        let ExecRequest { machine, program, env, user, container, tty, stdin, timeout_ms, idle_ms } = request;
        let whole = match stdin {
            ExecStdin::Whole(bytes) => Some(bytes),
            ExecStdin::Open => None,
        };
        (Self { machine, program, env, user, container, tty, timeout_ms, idle_ms }, whole)
    }

    pub fn request(self) -> ExecRequest {
        let Self { machine, program, env, user, container, tty, timeout_ms, idle_ms } = self;
        ExecRequest { machine, program, env, user, container, tty, stdin: ExecStdin::Open, timeout_ms, idle_ms }
    }
}

/// The first frame back. A refusal that an older control does not know is told by its text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Ok(serde_json::Value),
    Refused { refusal: serde_json::Value, said: String },
}

impl Answer {
    pub fn of(result: Result<serde_json::Value, Refusal>) -> Self {
        match result {
            Ok(value) => Self::Ok(value),
            Err(refusal) => {
                let said = refusal.to_string();
                Self::Refused { refusal: serde_json::to_value(refusal).unwrap_or_default(), said }
            }
        }
    }

    pub fn result(self) -> Result<serde_json::Value, Refusal> {
        match self {
            Self::Ok(value) => Ok(value),
            Self::Refused { refusal, said } => Err(serde_json::from_value(refusal).unwrap_or(Refusal::Failed(said))),
        }
    }
}

/// What a session's sides say to each other beside bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Tell {
    /// To the command.
    Control(ExecControl),
    /// The input is over.
    StdinEnd,
    Exited(i32),
    Failed(String),
    Line(crate::host::LogLine),
    /// No more lines; without it, the stream broke.
    LinesEnd,
}

/// What does not fit into a frame is refused by the side that has it.
pub(super) fn fits(json: &[u8]) -> bool {
    json.len() < MAX_CALL_BYTES
}
