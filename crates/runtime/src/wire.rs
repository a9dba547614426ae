//! The wire between agent and supervisor: SEQPACKET messages of JSON, file descriptors beside them.
//! Frozen per version: today's agent must drive every released supervisor.

use dunlin_model::{ContainerStatus, Probe};
use dunlin_model::transfer::Transfer;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A message is smaller, or it is refused.
pub(crate) const MAX_MESSAGE: usize = 128 * 1024;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    pub v: u32,
    #[serde(flatten)]
    pub ask: Ask,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub(crate) enum Ask {
    Status,
    /// Starts the program of a created machine.
    Start,
    Signal {
        signal: i32,
    },
    /// Signal, then kill after the time-out. The exit is then a requested one.
    Stop {
        signal: i32,
        timeout_ms: u64,
    },
    Kill,
    /// Comes with three descriptors: standard input, output and error of the command. With a terminal
    /// it comes with none, and the answer brings the terminal's master.
    Exec(Box<ExecSpec>),
    /// To the command of this connection and those of its process group. Not answered: the next word on
    /// the connection is how the command ended. A supervisor that does not know it ends the session.
    SignalExec {
        signal: i32,
    },
}

/// A command to run beside the machine's program, in all its namespaces and limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    pub command: Vec<String>,
    /// Added to the machine's own environment.
    pub env: Vec<(String, String)>,
    /// Empty = the machine's user.
    pub user: String,
    /// Empty = the machine's working directory.
    pub working_dir: String,
    /// Empty = the default one. A supervisor that does not know it has but one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Set by [`Client::exec_tty`](crate::Client::exec_tty), ignored without it.
    #[serde(default)]
    pub terminal: Option<WindowSize>,
    /// Instead of a command, which then is empty: copies files between the machine and the descriptors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Instead of a command too: the supervisor's own question, which nobody else can put.
    #[serde(skip)]
    pub probe: Option<Probe>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub(crate) enum Say {
    Status(Status),
    Done,
    Refused {
        error: String,
    },
    /// An exec ended; comes on its own connection.
    ExecExited {
        exit_code: Option<i32>,
        signal: Option<i32>,
    },
}

/// What a supervisor says of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub attempt: u64,
    pub phase: Phase,
    /// The machine's first process, as the host numbers it; of several containers that of the default one, or of
    /// another that runs.
    pub init_pid: i32,
    pub started_at_ms: Option<u64>,
    /// Empty where there is but one, which has no name.
    #[serde(default)]
    pub containers: Vec<ContainerStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Everything is ready, the program is not started.
    Created,
    Started,
    /// A stop was asked for; the program may still run.
    Stopping,
}

/// Sends one message.
pub(crate) fn send(socket: RawFd, message: &impl Serialize, fds: &[RawFd]) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::other("the message is too long for the supervisor"));
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket, &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message; `None` at the end of the connection.
pub(crate) fn receive<T: for<'de> Deserialize<'de>>(socket: RawFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut fds = Vec::new();
    let length = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel just installed these descriptors for us; nobody else owns them.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..length])?, fds)))
}

/// A SEQPACKET socket.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The address of a machine's socket. Its directory may be deeper than the 108 bytes that an address
/// holds, so it is named through the open directory.
pub(crate) fn address(machine_dir: &std::fs::File) -> io::Result<nix::sys::socket::UnixAddr> {
    Ok(nix::sys::socket::UnixAddr::new(format!("/proc/self/fd/{}/sock", machine_dir.as_raw_fd()).as_str())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::WIRE_VERSION;
    use serde_json::Value;

    /// What an agent sends and a supervisor says in version 1, a line each. A supervisor of a release lives on under every
    /// later agent: lines may be added, none may change.
    const VERSION_1: &str = include_str!("../golden/wire-1.jsonl");

    fn read<T: for<'de> Deserialize<'de>>(key: &str) -> Vec<(Value, T)> {
        let lines = VERSION_1.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line.get(key).is_some()).map(|line| (line.clone(), serde_json::from_value(line).unwrap())).collect()
    }

    #[test]
    fn an_agent_asks_and_understands_as_in_the_first_version() {
        assert_eq!(WIRE_VERSION, 1, "another version has a file of its own beside this one, and both are tried");
        let asked = read::<Request>("ask");
        for (line, request) in &asked {
            assert_eq!(serde_json::to_value(request).unwrap(), *line);
        }
        let kinds: Vec<u8> = asked.iter().map(|(_, request)| match request.ask {
            Ask::Status => 0,
            Ask::Start => 1,
            Ask::Signal { .. } => 2,
            Ask::Stop { .. } => 3,
            Ask::Kill => 4,
            Ask::Exec(_) => 5,
            Ask::SignalExec { .. } => 6,
        }).collect();
        assert!((0..7).all(|kind| kinds.contains(&kind)), "{kinds:?}");
        let said = read::<Say>("say");
        assert_eq!(asked.len() + said.len(), VERSION_1.lines().count());
        for (line, say) in &said {
            let again = serde_json::to_value(say).unwrap();
            // An answer of an older supervisor has fewer fields than ours.
            assert!(line.as_object().unwrap().iter().all(|(key, value)| again[key] == *value), "{line} became {again}");
        }
    }
}
