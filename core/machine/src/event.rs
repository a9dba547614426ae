//! What a machine hears and what it asks its host to do.

use crate::command::{Asked, Deny, Order};
use dunlin_model::{CommandId, ExitInfo, MachineSpec, MachineVersion};
use dunlin_view::MachineAssignment;

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Control's projection names this host for it, in this version.
    Assigned(Box<MachineAssignment>),
    /// The only thing that destroys.
    Tombstone,
    Ordered(Order),
    /// The image of a version is unpacked, or cannot be. `room` is the host's answer whether the version fits
    /// beside the others; only one that is to be exchanged for a smaller one while that runs asks.
    Prepared { version: MachineVersion, result: Result<(), String>, room: Result<(), String> },
    /// The supervisor of an attempt is up and its program started, or it could not be started.
    Spawned { attempt: u64, result: Result<(), String> },
    /// The processes of an attempt stand still, or cannot be made to.
    Frozen { attempt: u64, result: Result<(), String> },
    /// An attempt ended.
    Exited(ExitInfo),
    /// A moment that [`Effect::WakeAt`] asked for has come.
    Tick,
    /// A time of its schedule may have come. `room` is the host's answer to "is there room for it?".
    Due { room: Result<(), String> },
    /// Files and processes are gone. Said again if the record could not be dropped.
    Destroyed,
    /// Desired state that is not only this disk's memory places it here.
    PlacementConfirmed,
    /// After a start of the agent: what is really there.
    Recovered(Alive),
}

/// What the supervisor and the kernel say of a machine after a start of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alive {
    /// The attempt whose supervisor lives.
    pub attempt: Option<u64>,
    /// Whether that supervisor was told to stop it.
    pub stopping: bool,
    /// Whether its processes stand still.
    pub frozen: bool,
    /// The recorded end of the newest attempt.
    pub exit: Option<ExitInfo>,
    /// Whether the host was booted since the record was written.
    pub rebooted: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write the record durably; nothing after it in the list may happen before.
    Journal,
    /// Tell the sender of a command.
    Answer { id: CommandId, answer: Result<Asked, Deny> },
    Prepare(Box<MachineSpec>),
    /// Start a supervisor for the current spec.
    Spawn { attempt: u64 },
    /// `None`: as the spec or the image says.
    Stop { signal: Option<i32>, timeout_ms: u64 },
    Signal { signal: i32 },
    /// Make the processes of an attempt stand still, then say `Frozen`.
    Freeze { attempt: u64 },
    /// Let them go on. An attempt that cannot be thawed is ended.
    Thaw { attempt: u64 },
    /// End what is left of an attempt and acknowledge its exit record.
    CleanUp { attempt: u64 },
    /// Drop the exit record of an attempt that is over; touch no process: a later one may run.
    Acknowledge { attempt: u64 },
    WakeAt { ms: u64 },
    /// Make the record's fact known.
    Publish,
    /// Remove processes, files, network and ids, then say `Destroyed`.
    Destroy,
    /// The machine is no more: drop its record.
    Forget,
}
