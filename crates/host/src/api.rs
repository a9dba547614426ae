//! The host's side of [`HostApi`].

use crate::agent::{Input, No};
use crate::{Host, builder, convert, exec, logs, ps, snapshots, volume_keys, volumes};
use async_trait::async_trait;
use dunlin_api::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, ExecRequest, ExecSession, HostApi, ListenSocket, LogQuery,
    LogStream, Process, Refusal, Reserve, VolumeEncryption, VolumeSnapshot, VolumeStatus, WaitFor,
};
use dunlin_machine::{Order, Record, Verb};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{HostId, Lease, MachineEvent, MachineId, MachineState, SnapshotId, VolumeId};
use dunlin_runtime::Client;
use dunlin_runtime::volume::Usage;
use dunlin_view::MachineFact;
use std::time::Duration;
use tokio::sync::oneshot;

/// Longest wait of one call; callers ask again.
const MAX_WAIT_MS: u64 = 60_000;
/// More of a caller's request id is not kept in events.
const MAX_REQUEST_ID: usize = 64;
/// A volume that control has just written is in config facts within this.
const FACTS_WAIT: Duration = Duration::from_secs(10);

fn stopping() -> Refusal {
    Refusal::Failed("the host's agent is stopping; try again in a moment".into())
}

impl Host {
    async fn record(&self, id: &MachineId) -> Result<Record, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Record(id.clone(), reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?.map(|record| *record).ok_or_else(|| Refusal::NoSuchMachine(id.clone()))
    }
}

#[async_trait]
impl HostApi for Host {
    fn host_id(&self) -> &HostId {
        &self.shared.config.id
    }

    async fn reserve(&self, reserve: Reserve) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Reserve(reserve, reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal> {
        let verb = convert::verb(&command.kind)?;
        if let (Verb::Suspend, Err(lack)) = (&verb, &self.shared.config.abilities.limits) {
            return Err(Refusal::Invalid(lack.refusal("suspend machines")));
        }
        let name = verb.name();
        let order = Order {
            id: command.id,
            deadline_ms: command.deadline_ms,
            generation: command.generation,
            plan: command.plan,
            expected_version: command.expected_version,
            nonce: command.nonce,
            source: command.source,
            request_id: command.request_id.map(|id| id.chars().take(MAX_REQUEST_ID).collect()),
            verb,
            room: Ok(()),
        };
        let (reply, answer) = oneshot::channel();
        let machine = command.machine;
        self.inputs
            .send(Input::Command { machine: machine.clone(), order, reply })
            .await
            .map_err(|_| stopping())?;
        match answer.await.map_err(|_| stopping())? {
            Ok(asked) => convert::answer(Ok(asked), &machine, &self.shared.config.id, name),
            Err(No::Denied(deny)) => convert::answer(Err(deny), &machine, &self.shared.config.id, name),
            Err(No::NotKnown) => Err(Refusal::NoSuchMachine(machine)),
            Err(No::DiskFull) => Err(Refusal::DiskFull("the host's journal cannot grow".into())),
        }
    }

    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Fact(id.clone(), reply)).await.map_err(|_| stopping())?;
        let known = answer.await.map_err(|_| stopping())?;
        let (fact, has_containers) = known.ok_or_else(|| Refusal::NoSuchMachine(id.clone()))?;
        if !has_containers || !fact.state.is_running() {
            return Ok(fact);
        }
        let dir = self.shared.machine_dir(id.as_str());
        let asked = tokio::task::spawn_blocking(move || Client::connect(&dir)?.status()).await;
        // A supervisor that does not answer is on its way, or gone: its containers are shown as not running.
        let containers = asked.ok().and_then(Result::ok).map(|status| status.containers);
        Ok(MachineFact { containers: containers.unwrap_or_default(), ..fact })
    }

    async fn wait(&self, id: &MachineId, wait: WaitFor) -> Result<MachineFact, Refusal> {
        let mut changes = self.shared.view.subscribe();
        let timeout = Duration::from_millis(wait.timeout_ms.min(MAX_WAIT_MS));
        let deadline = tokio::time::Instant::now() + timeout;
        let mut snapshot = changes.current();
        let mut seen: Option<std::sync::Arc<MachineFact>> = None;
        loop {
            let fact = match (snapshot.machines.get(id), seen) {
                (Some(fact), _) => fact.clone(),
                // It was there, and now it is not.
                (None, Some(last)) if wait.states.contains(&MachineState::Destroyed) => {
                    return Ok(MachineFact { state: MachineState::Destroyed, ..(*last).clone() });
                }
                (None, _) => std::sync::Arc::new(self.machine(id).await?),
            };
            seen = Some(fact.clone());
            let right_version = wait.version.as_ref().is_none_or(|version| *version == fact.version);
            // The record is newer than the fact, perhaps, and its events and its state are of one moment.
            let (state, is_news) = match wait.after_event {
                None => (fact.state, true),
                Some(after) => match self.record(id).await {
                    Ok(record) => (record.state, record.last_event > after),
                    Err(_) => (fact.state, true), // it is gone in this moment
                },
            };
            if right_version && is_news && wait.states.contains(&state) {
                return Ok(MachineFact { state, ..(*fact).clone() });
            }
            // Versions come in their order: one that was replaced does not come back.
            let replaced = wait.version.as_ref().is_some_and(|version| *version < fact.version);
            let hopeless = match fact.state {
                MachineState::Destroyed | MachineState::Destroying => !wait.states.contains(&MachineState::Destroyed),
                _ if replaced => !wait.states.contains(&MachineState::Destroyed),
                MachineState::Failed => is_news && right_version && !wait.states.contains(&MachineState::Destroyed),
                _ => false,
            };
            if hopeless {
                return Err(Refusal::WaitHopeless { state: fact.state });
            }
            snapshot = match tokio::time::timeout_at(deadline, changes.changed()).await {
                Ok(newer) => newer,
                Err(_) => return Err(Refusal::WaitTimeout { state: fact.state }),
            };
        }
    }

    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal> {
        Ok(self.record(id).await?.events.into_iter().rev().collect())
    }

    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal> {
        Ok(self.record(id).await?.lease(crate::now_ms()).cloned())
    }

    async fn exec(&self, request: ExecRequest) -> Result<ExecSession, Refusal> {
        let app = self.machine(&request.machine).await?.app;
        exec::start(&self.shared, &app, request).await
    }

    async fn logs(&self, query: LogQuery) -> Result<LogStream, Refusal> {
        logs::stream(self.shared.clone(), query)
    }

    async fn processes(&self, id: &MachineId) -> Result<Vec<Process>, Refusal> {
        self.machine(id).await?;
        ps::processes(&self.shared, id).await
    }

    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
        self.machine(id).await?;
        let dir = self.shared.machine_dir(id.as_str());
        let sockets = tokio::task::spawn_blocking(move || {
            let pid = Client::connect(&dir)?.status()?.init_pid;
            dunlin_runtime::net::ports::listen_sockets(pid).map_err(|source| {
                dunlin_runtime::RuntimeError::Io { what: "the machine's sockets cannot be listed".into(), source }
            })
        });
        let sockets = sockets.await.map_err(|e| Refusal::Failed(e.to_string()))?;
        let sockets = sockets.map_err(|e| Refusal::Failed(crate::agent::chain(&e)))?;
        Ok(sockets
            .into_iter()
            .map(|socket| ListenSocket { protocol: socket.proto.name().into(), address: socket.addr })
            .collect())
    }

    async fn check_answer(&self, machine: &MachineId, check: &str) -> Result<String, Refusal> {
        let (reply, answer) = oneshot::channel();
        let input = Input::CheckAnswer { machine: machine.clone(), check: check.to_owned(), reply };
        self.inputs.send(input).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    async fn volume(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeStatus, Refusal> {
        let row = self.volume_row(id, size_gb).await?;
        let state = self.of_volumes(move |shared| volumes::state(shared, &row)).await?;
        let volumes::State { usage, needs_restart } = state;
        let Usage { block_size, blocks, blocks_free, blocks_avail } = usage;
        Ok(VolumeStatus { block_size, blocks, blocks_free, blocks_avail, needs_restart })
    }

    async fn volume_room(&self, size_gb: u32) -> Result<(), Refusal> {
        if let Err(lack) = &self.shared.config.abilities.sizes {
            return Err(Refusal::Invalid(lack.refusal("have volumes")));
        }
        let host = self.shared.config.id.clone();
        volumes::offer(&self.shared, u64::from(size_gb) << 30).map_err(|why| Refusal::InsufficientCapacity { host, why })
    }

    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal> {
        self.of_volumes(|shared| Ok(volume_keys::offer(shared))).await
    }

    async fn snapshots(&self, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal> {
        let row = self.volume_row(id, 0).await?;
        self.of_volumes(move |shared| snapshots::list(shared, &row.id)).await
    }

    async fn snapshot(&self, id: &VolumeId, snapshot: &SnapshotId) -> Result<VolumeSnapshot, Refusal> {
        let (row, snapshot) = (self.volume_row(id, 0).await?, snapshot.clone());
        self.of_volumes(move |shared| {
            volumes::ensure(shared, &row)?;
            Ok(snapshots::make(shared, &row, &snapshot, snapshots::For::Somebody))
        })
        .await?
    }

    async fn run_builder(&self, request: BuilderRequest) -> Result<BuilderRun, Refusal> {
        builder::run(self.shared.clone(), request).await
    }
}

impl Host {
    /// What config facts say of a volume; they may still be on their way.
    async fn volume_row(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeRow, Refusal> {
        let mut changes = self.shared.view.subscribe();
        let deadline = tokio::time::Instant::now() + FACTS_WAIT;
        let mut snapshot = changes.current();
        loop {
            let known = snapshot.config.volumes.get(id);
            let is_asked = |row: &&VolumeRow| row.host == self.shared.config.id && row.size_gb >= size_gb;
            if let Some(row) = known.filter(is_asked) {
                return Ok(row.clone());
            }
            snapshot = match tokio::time::timeout_at(deadline, changes.changed()).await {
                Ok(newer) => newer,
                Err(_) => return Err(Refusal::NoSuchVolume(id.clone())),
            };
        }
    }

    async fn of_volumes<T: Send + 'static>(
        &self,
        act: impl FnOnce(&crate::Shared) -> Result<T, String> + Send + 'static,
    ) -> Result<T, Refusal> {
        let shared = self.shared.clone();
        let done = tokio::task::spawn_blocking(move || act(&shared)).await;
        done.unwrap_or_else(|e| Err(e.to_string())).map_err(Refusal::Failed)
    }
}
