//! The caller's side: a host elsewhere, used like one in the process.

use super::call::{Answer, Call, ExecOpen, Head, fits};
use super::{Bearer, CALL_WRITTEN, CONNECT, Dial, Duplex, MAX_CALL_BYTES, frame, right, session};
use crate::host::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, ExecRequest, ExecSession, HostApi, ListenSocket, LogQuery,
    LogStream, Process, Refusal, Reserve, VolumeEncryption, VolumeSnapshot, VolumeStatus, WaitFor,
};
use async_trait::async_trait;
use dunlin_model::{HostId, Lease, MachineEvent, MachineId, SnapshotId, VolumeId};
use dunlin_view::MachineFact;
use frame::Frame;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

/// A host that is reached over the network. It keeps no connection: `dial` does, where the transport has some.
pub struct RemoteHost {
    id: HostId,
    dial: Dial,
    /// Who is spoken for; `None`: control itself.
    bearer: Option<Bearer>,
}

/// Why there is no answer.
enum Trouble {
    Refused(Refusal),
    /// Nothing was sent.
    NoStream(io::Error),
    /// It was sent, and may have been done.
    Broken(io::Error),
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl RemoteHost {
    /// The host `id`; whoever answers `dial` has proved to be it.
    pub fn new(id: HostId, dial: Dial) -> Self {
        Self { id, dial, bearer: None }
    }

    /// The same, asked by a member for somebody.
    pub fn asked_for(bearer: Bearer, id: HostId, dial: Dial) -> Self {
        Self { id, dial, bearer: Some(bearer) }
    }

    async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<T, Refusal> {
        let (_, value) = self.answered(call).await?;
        serde_json::from_value(value).map_err(|e| self.unreachable(format!("its answer cannot be read: {e}")))
    }

    /// The stream after its answer, in the time that the call has. What broke after it was sent is sent once more: the
    /// host knows a command by its id.
    async fn answered(&self, call: Call) -> Result<(Box<dyn Duplex>, Value), Refusal> {
        let patience = call.patience(now_ms());
        let tried = timeout(patience, async {
            match self.attempt(&call).await {
                Err(Trouble::Broken(_)) if call.may_repeat() => self.attempt(&call).await,
                tried => tried,
            }
        });
        match tried.await {
            Ok(Ok(answered)) => Ok(answered),
            Ok(Err(Trouble::Refused(refusal))) => Err(refusal),
            Ok(Err(Trouble::NoStream(error))) => Err(self.unreachable(error.to_string())),
            Ok(Err(Trouble::Broken(error))) => Err(self.unreachable(format!("the connection broke: {error}"))),
            Err(_) => Err(self.unreachable(format!("no answer within {} s", patience.as_secs()))),
        }
    }

    async fn attempt(&self, call: &Call) -> Result<(Box<dyn Duplex>, Value), Trouble> {
        let unreadable = |e: serde_json::Error| Refusal::Invalid(format!("the call cannot be written down: {e}"));
        let proven = self.bearer.as_ref().map(|bearer| right::proven(call, &self.id, bearer, now_ms())).transpose()?;
        let call = proven.as_ref().unwrap_or(call);
        let head = Head::of(call).and_then(|head| serde_json::to_vec(&head)).map_err(unreadable)?;
        if !fits(&head) {
            let (has, max) = (head.len(), MAX_CALL_BYTES);
            return Err(Refusal::Invalid(format!("the call has {has} bytes, and a host elsewhere takes {max}")).into());
        }
        let mut stream = match timeout(CONNECT, (self.dial)()).await {
            Ok(dialled) => dialled.map_err(Trouble::NoStream)?,
            Err(_) => {
                let why = format!("no connection within {} s", CONNECT.as_secs());
                return Err(Trouble::NoStream(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
        };
        let written = timeout(CALL_WRITTEN, frame::write(&mut stream, &Frame::Json(head.into()))).await;
        written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(Trouble::Broken)?;
        let Frame::Json(json) = frame::next(&mut stream, MAX_CALL_BYTES).await.map_err(Trouble::Broken)? else {
            return Err(Trouble::Broken(frame::garbage("the answer is no answer")));
        };
        let answer: Answer = frame::parse(&json).map_err(Trouble::Broken)?;
        Ok((stream, answer.result()?))
    }

    fn unreachable(&self, why: String) -> Refusal {
        Refusal::Unreachable { host: self.id.clone(), why }
    }
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[async_trait]
impl HostApi for RemoteHost {
    fn host_id(&self) -> &HostId {
        &self.id
    }

    async fn reserve(&self, reserve: Reserve) -> Result<(), Refusal> {
        self.ask(Call::Reserve(reserve)).await
    }

    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal> {
        self.ask(Call::Command(command)).await
    }

    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal> {
        self.ask(Call::Machine(id.clone())).await
    }

    async fn wait(&self, id: &MachineId, wait: WaitFor) -> Result<MachineFact, Refusal> {
        self.ask(Call::Wait { machine: id.clone(), wait }).await
    }

    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal> {
        self.ask(Call::Events(id.clone())).await
    }

    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal> {
        self.ask(Call::Lease(id.clone())).await
    }

    async fn exec(&self, request: ExecRequest) -> Result<ExecSession, Refusal> {
        let (open, whole) = ExecOpen::of(request);
        let (stream, _) = self.answered(Call::Exec(open)).await?;
        Ok(session::exec(self.id.clone(), stream, whole))
    }

    async fn logs(&self, query: LogQuery) -> Result<LogStream, Refusal> {
        let (stream, _) = self.answered(Call::Logs(query)).await?;
        Ok(session::logs(self.id.clone(), stream))
    }

    async fn processes(&self, id: &MachineId) -> Result<Vec<Process>, Refusal> {
        self.ask(Call::Processes(id.clone())).await
    }

    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
        self.ask(Call::ListenSockets(id.clone())).await
    }

    async fn check_answer(&self, machine: &MachineId, check: &str) -> Result<String, Refusal> {
        self.ask(Call::CheckAnswer { machine: machine.clone(), check: check.to_owned() }).await
    }

    async fn volume(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeStatus, Refusal> {
        self.ask(Call::Volume { volume: id.clone(), size_gb }).await
    }

    async fn volume_room(&self, size_gb: u32) -> Result<(), Refusal> {
        self.ask(Call::VolumeRoom { size_gb }).await
    }

    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal> {
        self.ask(Call::VolumeEncryption).await
    }

    async fn snapshots(&self, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal> {
        self.ask(Call::Snapshots(id.clone())).await
    }

    async fn snapshot(&self, id: &VolumeId, snapshot: &SnapshotId) -> Result<VolumeSnapshot, Refusal> {
        self.ask(Call::Snapshot { volume: id.clone(), snapshot: snapshot.clone() }).await
    }

    /// What a builder needs is files and sockets of the host that asks.
    async fn run_builder(&self, _: BuilderRequest) -> Result<BuilderRun, Refusal> {
        Err(Refusal::Invalid(format!("host {} builds nothing for others: builds run on the host where control is", self.id)))
    }
}
