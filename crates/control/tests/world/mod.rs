//! A control role over a real store and view, and a small host that lives in memory. What an app does is
//! said by `BEHAVE` in its environment: `good`, `sick`, `crashes`, `missing`, `elsewhere`, `fades` (it crashes a moment
//! after it became healthy), `withers` (the same, a while after), `ends` (with exit code 0).
#![allow(dead_code)] // each test binary uses a part

mod bodies;
mod images;
mod machine;
pub mod others;
mod session;
pub mod upgrades;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use base64::Engine;
use dunlin_api::wire::{BuildEvent, DeployEvent};
use dunlin_api::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, CommandKind, ExecOutput, ExecRequest, ExecSession, HostApi,
    ListenSocket, LogLine, LogQuery, LogStream, Refusal, Reserve, VolumeEncryption, VolumeSnapshot, VolumeStatus, WaitFor,
};
use dunlin_builder::{JOB_VARIABLE, Job};
use dunlin_cluster::View;
use dunlin_control::operate::Operate;
use dunlin_control::{BaseImages, BuilderSettings, Control, ControlConfig, Parts, StartError, Wanted};
use dunlin_model::desired::{HostRow, Ipv4Prefix};
use dunlin_model::seal::OpeningKey;
use dunlin_model::{
    CommandId, ContainerState, ContainerStatus, HostId, ImageRef, Lease, MachineEvent, MachineId, MachineState, Region, SnapshotId,
    VolumeId,
};
use dunlin_registry::ContentStore;
use dunlin_view::{ConfigState, HostFact, MachineFact};
pub use bodies::{Answer, release_body};
pub use images::push_image;
use machine::{created, exit, live, told};
pub use others::Others;
use others::all_played_by;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tower_service::Service;

/// Nothing here takes longer, unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

const SPEAKS_EVERY_MS: u64 = 200;
/// Of each machine, whatever it does.
const SAYS: &str = "Traceback: no module named flask";

pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

pub fn host_id() -> HostId {
    "h1".parse().unwrap()
}

pub fn host_key() -> OpeningKey {
    OpeningKey::from_bytes([5; 32])
}

/// The host. Its journal is a file, so that it survives a kill of the process as a real one does.
pub struct SmallHost {
    id: HostId,
    region: Region,
    view: View,
    file: PathBuf,
    journal: Mutex<Journal>,
    pub full: AtomicBool,
    /// It does not speak of itself.
    pub silent: AtomicBool,
    spoke_at_ms: AtomicU64,
    /// Nothing happens on it: no machine moves on.
    pub frozen: AtomicBool,
    /// Right after somebody was told that nobody has a machine's lease, somebody else takes it.
    pub leased_after_look: AtomicBool,
    pub lowest_healthy: AtomicUsize,
    pub commands: Mutex<Vec<Command>>,
    /// Builds that were begun, in their order, and whether they are kept from ending.
    pub builds: Mutex<Vec<Job>>,
    pub builds_held: AtomicBool,
    /// Volumes can be encrypted.
    pub encrypts: AtomicBool,
    snapshots: Mutex<BTreeMap<VolumeId, Vec<VolumeSnapshot>>>,
    pub sessions_ended: Arc<AtomicUsize>,
    /// When a machine was seen to go over to a version that was not its first.
    taken_up: Mutex<BTreeMap<MachineId, u64>>,
    /// When, and what: its machines' log.
    pub said: Mutex<Vec<(u64, String)>>,
    content: ContentStore,
}

#[derive(Default, Serialize, Deserialize)]
struct Journal {
    machines: BTreeMap<MachineId, MachineFact>,
    answers: BTreeMap<CommandId, CommandAnswer>,
    #[serde(default)]
    leases: BTreeMap<MachineId, Lease>,
}

impl SmallHost {
    fn start(row: &HostRow, view: View, data: &Path, content: ContentStore) -> Arc<Self> {
        let file = data.join(format!("small-host-{}.json", row.id));
        let journal: Journal =
            std::fs::read(&file).map_or_else(|_| Journal::default(), |json| serde_json::from_slice(&json).unwrap());
        for fact in journal.machines.values() {
            view.publish_machine(fact.clone()).unwrap();
        }
        let host = Arc::new(Self {
            id: row.id.clone(),
            region: row.region.clone(),
            view,
            file,
            journal: Mutex::new(journal),
            full: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            spoke_at_ms: AtomicU64::new(0),
            frozen: AtomicBool::new(false),
            leased_after_look: AtomicBool::new(false),
            lowest_healthy: AtomicUsize::new(usize::MAX),
            commands: Mutex::default(),
            builds: Mutex::default(),
            builds_held: AtomicBool::new(false),
            encrypts: AtomicBool::new(false),
            snapshots: Mutex::default(),
            sessions_ended: Arc::default(),
            taken_up: Mutex::default(),
            said: Mutex::new(vec![(1, SAYS.into())]),
            content,
        });
        let weak = Arc::downgrade(&host);
        tokio::spawn(async move {
            while let Some(host) = weak.upgrade() {
                host.turn();
                drop(host);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        host
    }

    fn save(&self, journal: &Journal) {
        let partial = self.file.with_extension("partial");
        std::fs::write(&partial, serde_json::to_vec(journal).unwrap()).unwrap();
        std::fs::rename(&partial, &self.file).unwrap();
    }

    pub fn healthy(&self) -> usize {
        self.journal.lock().unwrap().machines.values().filter(|fact| fact.is_healthy() && !fact.checks.is_empty()).count()
    }

    /// The run of a machine that destroys itself then ends.
    pub fn end(&self, id: &MachineId) {
        let mut journal = self.journal.lock().unwrap();
        let fact = journal.machines.get_mut(id).unwrap();
        (fact.state, fact.exit, fact.over) = (MachineState::Stopped, Some(Box::new(exit(fact.attempt, 0))), true);
        fact.sequence += 1;
        self.save(&journal);
    }

    /// Of itself, every now and then.
    fn speak(&self) {
        let now_ms = now_ms();
        let is_due = now_ms >= self.spoke_at_ms.load(Ordering::SeqCst) + SPEAKS_EVERY_MS;
        if !is_due || self.silent.load(Ordering::SeqCst) {
            return;
        }
        self.spoke_at_ms.store(now_ms, Ordering::SeqCst);
        let view = self.view.current();
        let running = view.machines.values().filter(|fact| fact.host == self.id && fact.state.is_running());
        let specs = running.filter_map(|fact| view.config.machines.get(&fact.id)).map(|machine| &machine.spec);
        self.view.publish_host(HostFact {
            id: self.id.clone(),
            region: self.region.clone(),
            cpus: 2,
            memory_mb: 4096,
            memory_reserved_mb: specs.map(|spec| spec.guest.memory_mb).sum(),
            room: None,
            updated_at_ms: now_ms,
        });
    }

    fn turn(&self) {
        if self.frozen.load(Ordering::SeqCst) {
            return;
        }
        self.speak();
        let config = self.view.current().config.clone();
        let mut journal = self.journal.lock().unwrap();
        let mut published = Vec::new();
        let machines = &mut journal.machines;
        let mut changed = false;
        for id in config.tombstones.keys() {
            if machines.remove(id).is_some() {
                self.view.remove_machine(id);
                changed = true;
            }
        }
        for (id, assignment) in config.machines.iter().filter(|(_, assignment)| assignment.host == self.id) {
            let fact = machines.entry(id.clone()).or_insert_with(|| created(assignment));
            let before = fact.clone();
            live(fact, assignment);
            if fact.version != before.version {
                self.taken_up.lock().unwrap().insert(id.clone(), now_ms());
                self.said.lock().unwrap().push((now_ms(), SAYS.into()));
            }
            if *fact != before || fact.sequence == 1 {
                fact.sequence += 1;
                if fact.state != before.state {
                    fact.updated_at_ms = now_ms();
                }
                published.push(fact.clone());
            }
        }
        if changed || !published.is_empty() {
            self.save(&journal);
        }
        drop(journal);
        for fact in published {
            // A command may have published a newer one.
            let _ = self.view.publish_machine(fact);
        }
        self.lowest_healthy.fetch_min(self.healthy(), Ordering::SeqCst);
    }
}

#[async_trait]
impl HostApi for SmallHost {
    fn host_id(&self) -> &HostId {
        &self.id
    }

    async fn reserve(&self, _: Reserve) -> Result<(), Refusal> {
        if self.full.load(Ordering::SeqCst) {
            return Err(Refusal::InsufficientCapacity { host: self.id.clone(), why: "256 MB wanted, 3 MB free".into() });
        }
        Ok(())
    }

    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal> {
        let mut journal = self.journal.lock().unwrap();
        if let Some(answer) = journal.answers.get(&command.id) {
            return Ok(answer.clone());
        }
        let no_such = Refusal::NoSuchMachine(command.machine.clone());
        let fact = journal.machines.get_mut(&command.machine).ok_or(no_such)?;
        if let Some(expected) = command.expected_version.clone().filter(|expected| *expected != fact.version) {
            let (machine, found) = (command.machine, fact.version.clone());
            return Err(Refusal::VersionMismatch { machine, expected, found });
        }
        let leased = journal.leases.get(&command.machine);
        if let Some(lease) = leased.filter(|lease| command.nonce.as_ref() != Some(&lease.nonce)) {
            let (owner, expires_at_ms) = (lease.owner.clone(), lease.expires_at_ms);
            return Err(Refusal::Leased { machine: command.machine, owner, expires_at_ms });
        }
        let lease = match &command.kind {
            CommandKind::Lease { ttl_ms, owner, description } => Some(Lease {
                nonce: command.nonce.clone().unwrap_or_else(|| format!("nonce-of-{}", command.id)),
                owner: owner.clone(),
                description: description.clone(),
                expires_at_ms: now_ms() + ttl_ms,
            }),
            _ => None,
        };
        match (&lease, &command.kind) {
            (Some(lease), _) => drop(journal.leases.insert(command.machine.clone(), lease.clone())),
            (None, CommandKind::Release) => drop(journal.leases.remove(&command.machine)),
            _ => {}
        }
        let no_such = Refusal::NoSuchMachine(command.machine.clone());
        let fact = journal.machines.get_mut(&command.machine).ok_or(no_such)?;
        let previous_state = fact.state;
        match command.kind {
            CommandKind::Start | CommandKind::Restart { .. } => {
                fact.state = MachineState::Starting;
                fact.attempt += 1;
                (fact.restarts, fact.exit, fact.checks) = (0, None, vec![]);
            }
            CommandKind::Stop { .. } => fact.state = MachineState::Stopping,
            CommandKind::Cordon => fact.cordoned = true,
            CommandKind::Uncordon => fact.cordoned = false,
            CommandKind::Suspend => fact.state = MachineState::Suspended,
            CommandKind::Signal { .. } | CommandKind::Lease { .. } | CommandKind::Release => {}
        }
        fact.sequence += 1;
        let answer = CommandAnswer { previous_state, sequence: fact.sequence, lease };
        let fact = fact.clone();
        journal.answers.insert(command.id.clone(), answer.clone());
        self.save(&journal);
        self.view.publish_machine(fact).unwrap();
        self.commands.lock().unwrap().push(command);
        Ok(answer)
    }

    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal> {
        let fact = self.journal.lock().unwrap().machines.get(id).cloned().ok_or_else(|| Refusal::NoSuchMachine(id.clone()))?;
        // Facts that are published have none.
        let spec = self.view.current().config.machines.get(id).map(|machine| machine.spec.clone());
        let runs = |name: String| ContainerStatus { name, state: ContainerState::Running };
        let containers = spec.into_iter().flat_map(|spec| spec.containers).map(|container| runs(container.name)).collect();
        Ok(MachineFact { containers, ..fact })
    }

    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal> {
        let taken_up = self.taken_up.lock().unwrap().get(id).copied();
        Ok(told(self.machine(id).await?.exit, taken_up))
    }

    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal> {
        self.machine(id).await?;
        let mut journal = self.journal.lock().unwrap();
        let found = journal.leases.get(id).cloned();
        if self.leased_after_look.swap(false, Ordering::SeqCst) {
            let lease = Lease { nonce: "quick".into(), owner: "the quick one".into(), description: String::new(), expires_at_ms: u64::MAX };
            journal.leases.insert(id.clone(), lease);
        }
        Ok(found)
    }

    async fn wait(&self, id: &MachineId, wait: WaitFor) -> Result<MachineFact, Refusal> {
        let end = Instant::now() + Duration::from_millis(wait.timeout_ms);
        loop {
            let fact = self.machine(id).await?;
            if wait.states.contains(&fact.state) {
                return Ok(fact);
            }
            if Instant::now() >= end {
                return Err(Refusal::WaitTimeout { state: fact.state });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn exec(&self, request: ExecRequest) -> Result<ExecSession, Refusal> {
        session::begin(&request, self.sessions_ended.clone()).await
    }

    async fn logs(&self, query: LogQuery) -> Result<LogStream, Refusal> {
        let (sender, lines) = mpsc::channel(4);
        let machine = query.machine.unwrap_or_else(|| MachineId::from_random([0; 7]));
        let app = query.app.unwrap_or_else(|| "web".parse().unwrap());
        let mut said = self.said.lock().unwrap().clone();
        said.retain(|(at_ms, _)| query.since_ms.is_none_or(|since_ms| *at_ms >= since_ms));
        tokio::spawn(async move {
            for (at_ms, line) in said {
                let (app, machine, stream) = (app.clone(), machine.clone(), "stderr".into());
                let _ = sender.send(LogLine { at_ms, app, machine, stream, program: String::new(), line }).await;
            }
            if query.follow {
                sender.closed().await;
            }
        });
        Ok(LogStream::new(lines))
    }

    async fn processes(&self, id: &MachineId) -> Result<Vec<dunlin_api::Process>, Refusal> {
        let fact = self.machine(id).await?;
        Ok(vec![dunlin_api::Process {
            pid: 1,
            stime: 10,
            rtime: 2000,
            command: fact.process_group.to_string(),
            directory: "/".into(),
            cpu: 1,
            rss: 4096,
            listen_sockets: vec![],
        }])
    }

    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
        let elsewhere = self.view.current().config.machines.get(id).and_then(|m| m.spec.env.get("BEHAVE").cloned());
        let address = if elsewhere.as_deref() == Some("elsewhere") { "127.0.0.1:5000" } else { "0.0.0.0:8080" };
        Ok(vec![ListenSocket { protocol: "tcp".into(), address: address.parse().unwrap() }])
    }

    async fn check_answer(&self, _: &MachineId, _: &str) -> Result<String, Refusal> {
        Ok("out of order".into())
    }

    async fn volume(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeStatus, Refusal> {
        let mut changes = self.view.subscribe();
        let mut view = changes.current();
        while view.config.volumes.get(id).is_none_or(|row| row.size_gb < size_gb) {
            view = changes.changed().await;
        }
        let row = &view.config.volumes[id];
        let blocks = u64::from(row.size_gb) << 18;
        let free = if row.name == "full" { blocks / 20 } else { blocks };
        Ok(VolumeStatus { block_size: 4096, blocks, blocks_free: free, blocks_avail: free, needs_restart: false })
    }

    async fn volume_room(&self, size_gb: u32) -> Result<(), Refusal> {
        if size_gb > 100 {
            return Err(Refusal::InsufficientCapacity { host: self.id.clone(), why: "100 GiB are free".into() });
        }
        Ok(())
    }

    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal> {
        let lacking = VolumeEncryption::Lacking { what: "cryptsetup is not installed".into(), fix: "install it".into() };
        Ok(if self.encrypts.load(Ordering::SeqCst) { VolumeEncryption::Offered } else { lacking })
    }

    async fn snapshots(&self, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal> {
        Ok(self.snapshots.lock().unwrap().get(id).cloned().unwrap_or_default())
    }

    async fn snapshot(&self, id: &VolumeId, snapshot: &SnapshotId) -> Result<VolumeSnapshot, Refusal> {
        let made =
            VolumeSnapshot { id: snapshot.clone(), created_at_ms: 0, size: 1, volume_size: 2 << 30, digest: "sha256:0".into(), scheduled: false, retention_days: 5 };
        self.snapshots.lock().unwrap().entry(id.clone()).or_default().push(made.clone());
        Ok(made)
    }

    async fn run_builder(&self, request: BuilderRequest) -> Result<BuilderRun, Refusal> {
        let job = request.env.iter().find(|(name, _)| name == JOB_VARIABLE).map(|(_, json)| json).unwrap();
        let job: Job = serde_json::from_str(job).unwrap();
        self.builds.lock().unwrap().push(job.clone());
        while self.builds_held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let done = BuildEvent::Done { image: job.app.clone(), digest: push_image(&self.content, &job.app, &job.tag), size: 1 };
        let (sender, output) = mpsc::channel(4);
        let line = |text: &str| ExecOutput::Stdout(format!("{text}\n").into());
        sender.send(line("STEP 1/2: FROM docker.io/library/python:3.11 AS build")).await.unwrap();
        sender.send(line(&serde_json::to_string(&done).unwrap())).await.unwrap();
        sender.send(ExecOutput::Exited(0)).await.unwrap();
        Ok(BuilderRun { output })
    }
}

pub struct World {
    pub control: Control,
    pub content: ContentStore,
    pub host: Arc<SmallHost>,
    pub view: View,
    pub others: Others,
}

impl World {
    /// A control role over `data`; called again on the same directory it resumes.
    pub async fn start(data: &Path) -> Self {
        Self::start_until(data, None).await
    }

    /// The same, but the process ends at a kill point.
    pub async fn start_until(data: &Path, kill_at: Option<String>) -> Self {
        Self::try_start(data, kill_at).await.unwrap()
    }

    pub async fn try_start(data: &Path, kill_at: Option<String>) -> Result<Self, StartError> {
        Self::start_with(data, kill_at, &[], false, ConfigState::default()).await
    }

    /// On a host that has heard this from an earlier control.
    pub async fn start_having_heard(data: &Path, seen: ConfigState) -> Self {
        Self::start_with(data, None, &[], false, seen).await.unwrap()
    }

    /// The small host plays all others, too.
    pub async fn start_for_all_hosts(data: &Path) -> Self {
        Self::start_with(data, None, &[], true, ConfigState::default()).await.unwrap()
    }

    /// Beside this host others, each reached over a pipe.
    pub async fn start_fleet(data: &Path, others: &[HostRow]) -> Self {
        for row in others {
            join(data, row).await;
        }
        let world = Self::start_with(data, None, others, false, ConfigState::default()).await.unwrap();
        world.create_app("web").await;
        world
    }

    async fn start_with(data: &Path, kill_at: Option<String>, others: &[HostRow], plays_all: bool, seen: ConfigState) -> Result<Self, StartError> {
        Self::start_all(data, kill_at, others, plays_all, (seen, others::no_servers())).await
    }

    async fn start_all(
        data: &Path,
        kill_at: Option<String>,
        others: &[HostRow],
        plays_all: bool,
        (seen, operate): (ConfigState, Operate),
    ) -> Result<Self, StartError> {
        let view = View::memory();
        view.publish_config(seen, now_ms()).unwrap();
        let content = ContentStore::open(data.join("registry")).unwrap();
        let host = SmallHost::start(&host_row(), view.clone(), data, content.clone());
        let others = Others::start(others, &view, data, &content);
        let config = ControlConfig {
            data_dir: data.to_owned(),
            domain: "localhost".into(),
            http_port: 8080,
            https_port: 443,
            host: host_row(),
            org: "personal".parse().unwrap(),
            version: "0.1.0".into(),
            commit: "unknown".into(),
            costs: vec![],
            builder: Some(BuilderSettings { registry_socket: data.join("registry.sock") }),
            base_images: BaseImages::Bootstrapped, rebalance_after_ms: 600_000,
            kill_at,
            metrics: vec![Box::new(|text| text.push_str("dunlin_test_total 1\n"))],
            ready: vec![],
            fleet: Some(others.fleet()),
        };
        let parts = Parts {
            store: open_store(data).await,
            view: view.clone(),
            host: host.clone(),
            reach: if plays_all { Some(all_played_by(&host)) } else { others.reach() },
            probe: others.probe(), operate,
            content: content.clone(),
            images: Box::new(|app, wanted| {
                Box::pin(async move {
                    let digest = match wanted {
                        Wanted::Digest(digest) => digest,
                        Wanted::Tag(_) | Wanted::Elsewhere(_) => {
                            return Err(dunlin_control::Failure::not_found("there is no such image"));
                        }
                    };
                    Ok(ImageRef { repository: app.to_string(), digest, tag: None })
                })
            }),
        };
        let store = parts.store.clone();
        match Control::start(config, parts).await {
            Ok(control) => Ok(Self { control, content, host, view, others }),
            Err(error) => {
                store.close().await;
                Err(error)
            }
        }
    }

    /// As root, over the server's own socket.
    pub async fn call(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<Value>) -> Answer {
        self.call_at(self.control.root_router(), method, path, headers, body).await
    }

    /// As anybody, through the edge.
    pub async fn call_over_edge(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<Value>) -> Answer {
        self.call_at(self.control.edge_router(), method, path, headers, body).await
    }

    async fn call_at(
        &self,
        router: axum::Router,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Value>,
    ) -> Answer {
        let request = Request::builder().method(method).uri(path);
        let request = match body {
            Some(json) => request.header("content-type", "application/json").body(Body::from(json.to_string())),
            None => request.body(Body::empty()),
        };
        let mut request = request.unwrap();
        for (name, value) in headers {
            let name: axum::http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        Self::answer(router, request).await
    }

    /// Uploads a context; all events of its build.
    pub async fn build(&self, app: &str, query: &str, context: &'static [u8]) -> Vec<BuildEvent> {
        self.build_with(app, query, &BTreeMap::new(), context).await
    }

    pub async fn build_with(
        &self,
        app: &str,
        query: &str,
        secrets: &BTreeMap<&str, &str>,
        context: &'static [u8],
    ) -> Vec<BuildEvent> {
        let secrets = base64::engine::general_purpose::STANDARD.encode(serde_json::to_vec(secrets).unwrap());
        let request = Request::builder().method(Method::POST).uri(format!("/v1/apps/{app}/builds{query}"));
        let request = request.header("dunlin-build-secrets", secrets);
        let answer = Self::answer(self.control.root_router(), request.body(Body::from(context)).unwrap()).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn answer(mut router: axum::Router, request: Request<Body>) -> Answer {
        let response = router.call(request).await.unwrap();
        let status = response.status();
        let headers = response.headers().clone();
        let body = tokio::time::timeout(DEADLINE, axum::body::to_bytes(response.into_body(), 64 << 20));
        let text = String::from_utf8(body.await.expect("an answer in time").unwrap().to_vec()).unwrap();
        Answer { status, headers, text }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, &[], None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, &[], Some(body)).await
    }

    pub async fn create_app(&self, name: &str) {
        let answer = self.post("/v1/apps", serde_json::json!({ "app_name": name })).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
    }

    /// Writes a release that behaves as told; its number.
    pub async fn release(&self, app: &str, image: char, behave: &str) -> u32 {
        let answer = self.post(&format!("/v1/apps/{app}/releases"), release_body(app, image, behave)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
        answer.json()["version"].as_u64().unwrap() as u32
    }

    /// Follows a release to its end; all its events.
    pub async fn follow(&self, app: &str, release: u32) -> Vec<DeployEvent> {
        let answer = self.get(&format!("/v1/apps/{app}/releases/{release}/events")).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub async fn deploy(&self, app: &str, image: char, behave: &str) -> DeployEvent {
        let release = self.release(app, image, behave).await;
        self.follow(app, release).await.pop().expect("an end")
    }

    /// The secrets of a version, as the host would find and open them.
    pub fn secrets(&self, app: &str, version: u64) -> Option<Value> {
        let config = self.view.current().config.clone();
        let facts = config.secrets.get(&app.parse::<dunlin_model::AppName>().unwrap())?;
        let fact = facts.iter().find(|fact| fact.version == version && fact.host == host_id())?;
        let plain = host_key().open(&format!("env/{app}/{version}"), &fact.sealed).unwrap();
        serde_json::from_slice(&plain).ok()
    }

    /// Two machines become one, and two again while the one is on its way out; the last release.
    pub async fn scale_down_and_back(&self, app: &str) -> u32 {
        self.host.frozen.store(true, Ordering::SeqCst);
        self.post(&format!("/v1/apps/{app}/scale"), serde_json::json!({ "app": 1 })).await;
        self.eventually("one is on its way out", async || {
            self.view.current().machines.values().any(|fact| fact.state == MachineState::Stopping)
        })
        .await;
        let back = self.post(&format!("/v1/apps/{app}/scale"), serde_json::json!({ "app": 2 })).await;
        self.host.frozen.store(false, Ordering::SeqCst);
        back.json()["version"].as_u64().unwrap() as u32
    }

    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let end = Instant::now() + DEADLINE;
        while !holds().await {
            assert!(Instant::now() < end, "it never happened: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// This host.
pub fn host_row() -> HostRow {
    HostRow {
        id: host_id(),
        region: "local".parse().unwrap(),
        prefix: Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 24 },
        public_key: host_key().sealing_key().to_base64(),
        cpus: 2,
        memory_mb: 4096,
        zone: None,
        labels: BTreeMap::new(),
        cordoned: false,
        draining: false,
        joined_at_ms: 0,
    }
}

/// A host that joined before control starts.
pub async fn join(data: &Path, row: &HostRow) {
    let store = open_store(data).await;
    let put = dunlin_store::Op::Put(format!("hosts/{}", row.id), serde_json::to_vec(row).unwrap());
    store.txn(vec![], vec![put]).await.unwrap();
    store.close().await;
}

async fn open_store(data: &Path) -> dunlin_store::Store {
    std::fs::create_dir_all(data.join("control")).unwrap();
    dunlin_store::Store::open(&data.join("control/store.db")).unwrap()
}
