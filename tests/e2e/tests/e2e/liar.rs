//! A member that lies of its room. It has a host's own keys and address, and speaks for it while the host's server is stopped;
//! what control asks of the host it answers otherwise than it says.

use async_trait::async_trait;
use dunlin_api::remote::{self, Asker};
use dunlin_api::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, ExecRequest, ExecSession, HostApi, ListenSocket, LogQuery, LogStream, Process,
    Refusal, Reserve, VolumeEncryption, VolumeSnapshot, VolumeStatus, WaitFor,
};
use dunlin_cluster::{Cluster, ClusterConfig, Handler, Member, Service, View};
use dunlin_e2e::Fleet;
use dunlin_model::{HostId, Lease, MachineEvent, MachineId, SnapshotId, VolumeId};
use dunlin_view::{HostFact, MachineFact};
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// More often than a host does, so that nobody waits for a newer word.
const SPEAKS_EVERY: Duration = Duration::from_secs(1);
/// By this one knows that it is the liar who says that there is room.
pub const TAKEN_MB: u32 = 77;

/// What it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// That it has room; it refuses every machine.
    Room,
    /// That it is full; it takes every machine.
    Full,
}

/// Speaks until it is dropped; then it says good-bye, and the host's own server may start.
pub struct Liar {
    lie: Arc<Mutex<Lie>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    // What the host knows of its cluster, in a copy: its own is as it left it.
    _copy: TempDir,
}

impl Liar {
    /// In place of a host of so much memory, whose server is stopped.
    pub fn start(fleet: &Fleet, id: &str, memory_mb: u32, lie: Lie) -> Self {
        let copy = tempfile::tempdir().unwrap();
        let own = fleet.host(id).data().join("cluster");
        let copied = std::process::Command::new("cp").arg("-a").arg(own).arg(copy.path()).status().unwrap();
        assert!(copied.success());
        let (dir, at) = (copy.path().join("cluster"), fleet.member(id));
        let (lie, over) = (Arc::new(Mutex::new(lie)), Arc::new(AtomicBool::new(false)));
        let (says, ends) = (lie.clone(), over.clone());
        let thread = fleet.spawn_on(id, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(speak(dir, at, memory_mb, says, ends));
        });
        Self { lie, over, thread: Some(thread), _copy: copy }
    }

    pub fn says(&self, lie: Lie) {
        *self.lie.lock().unwrap() = lie;
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it was printed
        }
    }
}

async fn speak(dir: PathBuf, at: SocketAddr, memory_mb: u32, lie: Arc<Mutex<Lie>>, over: Arc<AtomicBool>) {
    let member = Member::load(&dir).unwrap().expect("it has joined");
    let (id, region) = (member.host.clone(), member.region.clone());
    let view = View::memory();
    let config = ClusterConfig { member, socket: UdpSocket::bind(at).unwrap(), advertise: at, dir };
    let cluster = Cluster::start(config, view.clone()).await.unwrap();
    let host: Arc<dyn HostApi> = Arc::new(Host { id: id.clone(), lie: lie.clone() });
    let serve: Handler = Arc::new(move |_, stream| Box::pin(remote::serve(stream, host.clone(), Asker::Control)));
    cluster.serve(Service::Host, serve);
    while !over.load(Ordering::Relaxed) {
        let lie = *lie.lock().unwrap();
        view.publish_host(HostFact {
            id: id.clone(),
            region: region.clone(),
            cpus: 2,
            memory_mb,
            memory_reserved_mb: if lie == Lie::Full { memory_mb } else { TAKEN_MB },
            room: None,
            updated_at_ms: SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64,
        });
        tokio::time::sleep(SPEAKS_EVERY).await;
    }
    cluster.shutdown().await;
}

/// What control asks it.
struct Host {
    id: HostId,
    lie: Arc<Mutex<Lie>>,
}

fn no<T>() -> Result<T, Refusal> {
    Err(Refusal::Failed("it speaks of its room alone".into()))
}

#[async_trait]
impl HostApi for Host {
    fn host_id(&self) -> &HostId {
        &self.id
    }

    async fn reserve(&self, _: Reserve) -> Result<(), Refusal> {
        let lie = *self.lie.lock().unwrap();
        match lie {
            Lie::Room => Err(Refusal::InsufficientCapacity { host: self.id.clone(), why: "there is none in truth".into() }),
            Lie::Full => Ok(()),
        }
    }

    /// It makes no machine: the host's own server does, once it is there.
    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal> {
        Err(Refusal::NoSuchMachine(command.machine))
    }

    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn wait(&self, id: &MachineId, _: WaitFor) -> Result<MachineFact, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn exec(&self, _: ExecRequest) -> Result<ExecSession, Refusal> {
        no()
    }

    async fn logs(&self, _: LogQuery) -> Result<LogStream, Refusal> {
        no()
    }

    async fn processes(&self, id: &MachineId) -> Result<Vec<Process>, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
        Err(Refusal::NoSuchMachine(id.clone()))
    }

    async fn check_answer(&self, machine: &MachineId, _: &str) -> Result<String, Refusal> {
        Err(Refusal::NoSuchMachine(machine.clone()))
    }

    async fn volume(&self, _: &VolumeId, _: u32) -> Result<VolumeStatus, Refusal> {
        no()
    }

    async fn volume_room(&self, _: u32) -> Result<(), Refusal> {
        no()
    }

    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal> {
        no()
    }

    async fn snapshots(&self, _: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal> {
        no()
    }

    async fn snapshot(&self, _: &VolumeId, _: &SnapshotId) -> Result<VolumeSnapshot, Refusal> {
        no()
    }

    async fn run_builder(&self, _: BuilderRequest) -> Result<BuilderRun, Refusal> {
        no()
    }
}
