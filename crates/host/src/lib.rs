//! The host agent: drives [`dunlin_machine`] over [`dunlin_runtime`], the only writer of run state.
//!
//! One thread owns all machines and the journal and hears one closed enum of inputs (`agent`). Slow acts
//! (unpacking, spawning) run beside it and come back as inputs. Facts go to the view; requests are
//! admitted from a table of the agent's own (`last_hop`), never from the view. Desired state comes from
//! the view only: the agent does not know that there is a store.
//!
//! A restart replays the journal, asks the living supervisors, and goes on; it stops no machine.
//! Tested with real machines in `tests/`, and end to end under kills.
#![forbid(unsafe_code)]

mod act;
mod admission;
mod agent;
mod api;
mod builder;
mod checks;
mod clock;
mod convert;
mod cpus;
mod digest;
mod exec;
mod firewall;
mod images;
mod journal;
mod kill;
mod last_hop;
mod layers;
mod logs;
mod metrics;
mod promises;
mod ps;
mod ready;
mod sleep;
mod snapshots;
mod spec;
mod tombstones;
mod volume_keys;
mod volumes;

pub use journal::JournalError;
pub use dunlin_runtime::KILL_POINTS as SUPERVISOR_KILL_POINTS;
pub use kill::{KILL_POINTS, VOLUME_KILL_POINTS};

use crate::agent::Input;
use crate::firewall::KeptFirewall;
use crate::journal::Replayed;
use crate::last_hop::Table;
use dunlin_api::shares::Shares;
use dunlin_cluster::View;
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::seal::OpeningKey;
use dunlin_model::{HostId, MachineId, Region};
use dunlin_registry::Images;
use dunlin_runtime::SealedExe;
use dunlin_runtime::cgroup::{Cgroups, ProcessRoom, raise_pid_max};
use dunlin_runtime::features::Abilities;
use dunlin_runtime::net::{self, firewall::Firewall};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use tokio::sync::mpsc;

/// Inputs that wait for the agent; senders wait beyond it.
const QUEUE: usize = 4096;

pub struct HostConfig {
    pub id: HostId,
    pub region: Region,
    pub data_dir: PathBuf,
    /// Names this server's control groups and firewall table, so that several can share a computer.
    pub instance: String,
    pub machine_prefix: Ipv4Prefix,
    pub cpus: u32,
    /// What it can do for them.
    pub abilities: Abilities,
    /// What machines may reserve in all.
    pub memory_mb: u32,
    /// Of the writable layer of a machine that does not say.
    pub rootfs_gb: u32,
    /// So long a machine is looked at before it is put to sleep for being idle.
    pub autostop_after_ms: u64,
    /// So many stopped machines stand ready for requests.
    pub ready_machines: usize,
    /// Opens the secrets that control sealed to this host.
    pub key: OpeningKey,
    /// See [`KILL_POINTS`] and [`VOLUME_KILL_POINTS`].
    pub kill_at: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Runtime(#[from] dunlin_runtime::RuntimeError),
    #[error(transparent)]
    Cgroup(#[from] dunlin_runtime::cgroup::CgroupError),
    #[error("the machines' network cannot be set up")]
    Net(#[from] dunlin_runtime::net::NetError),
    #[error(
        "machines' addresses would be given out twice: {addr} of {prefix} belongs to interface {ifname} of another \
         server on this computer; start this one with another --machine-prefix"
    )]
    PrefixTaken { prefix: String, addr: Ipv4Addr, ifname: String },
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// The directory that every machine has at `/.fly`, and what is in it: a socket which the server's process makes anew
/// whenever it starts. So it is the directory that is mounted, and not the socket.
fn machine_api_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("run/machines")
}

/// Where machines find the API.
pub fn machine_api_socket(data_dir: &Path) -> PathBuf {
    machine_api_dir(data_dir).join("api")
}

/// Whose a user id is: a number that no two machines on this host share. `None`: no machine's.
pub fn machine_number(uid: u32) -> Option<u32> {
    uid.checked_sub(agent::FIRST_UID).map(|uid| uid / dunlin_runtime::UID_RANGE)
}

/// A running agent. Dropping it does not stop machines.
pub struct Host {
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
    agent: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What the agent's thread, its helpers and callers all read.
struct Shared {
    config: HostConfig,
    view: View,
    images: Images,
    exe: SealedExe,
    cgroups: Cgroups,
    firewall: KeptFirewall,
    mtu: Option<u32>,
    table: Table,
    journal_writes: AtomicU64,
    /// Microseconds that they took in all.
    journal_us: AtomicU64,
    /// That an operator has to look at.
    tombstones_waiting: AtomicUsize,
    followers: Arc<Shares>,
    /// Memory for lines that wait for those who asked for them.
    tails: Arc<Shares>,
    sessions: Arc<Shares>,
    attached: clock::Attached,
    looks: Arc<tokio::sync::Semaphore>,
    builders: builder::Slots,
    volumes: volumes::Volumes,
    ready: ready::Ready,
    cpus: cpus::Cpus,
    /// Whether every living supervisor was asked since the start.
    recovered: tokio::sync::watch::Sender<bool>,
    /// For the next supervisor, and that one only: a test's kill point.
    supervisor_kill_at: Mutex<Option<String>>,
}

impl Host {
    /// Replays the journal, adopts every living machine, then follows the view.
    pub fn start(config: HostConfig, view: View, images: Images) -> Result<Arc<Self>, StartError> {
        // This process opens secrets: no core file may hold them.
        nix::sys::prctl::set_dumpable(false)
            .map_err(|e| StartError::Io { what: "core files cannot be forbidden", source: e.into() })?;
        std::fs::create_dir_all(machine_api_dir(&config.data_dir))
            .map_err(|source| StartError::Io { what: "the directory of the machines' API cannot be made", source })?;
        let boot_id = journal::boot_id()
            .map_err(|source| StartError::Io { what: "the kernel's boot id cannot be read", source })?;
        let (journal, replayed) = journal::Journal::open(&config.data_dir.join("host/journal"), &boot_id)?;
        let shared = Arc::new(Shared::set_up(config, view, images, &replayed)?);
        let (inputs, receiver) = mpsc::channel(QUEUE);
        let agent = agent::Agent::new(shared.clone(), journal, inputs.clone());
        builder::end_all(&shared.config.data_dir, &shared.config.instance, &shared.cgroups);
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new()
            .name("host-agent".into())
            .spawn(move || {
                let _context = runtime.enter();
                agent.run(replayed, receiver);
            })
            .map_err(|source| StartError::Io { what: "the agent's thread cannot be started", source })?;
        agent::follow_view(shared.view.clone(), inputs.clone());
        let agent = inputs.clone();
        tokio::spawn(firewall::keep(shared.clone(), move || !agent.is_closed()));
        let agent = inputs.clone();
        tokio::spawn(firewall::watch_connections(shared.clone(), move || !agent.is_closed()));
        let agent = inputs.clone();
        tokio::spawn(volumes::follow(shared.clone(), move || !agent.is_closed()));
        let agent = inputs.clone();
        tokio::spawn(snapshots::follow(shared.clone(), move || !agent.is_closed()));
        Ok(Arc::new(Self { shared, inputs, agent: Mutex::new(Some(thread)) }))
    }

    /// Until the agent knows its machines again. What is decided before would be about machines that nobody
    /// has said anything of yet.
    pub async fn recovered(&self) {
        let _ = self.shared.recovered.subscribe().wait_for(|is_so| *is_so).await; // the sender is ours
    }

    /// Ends the agent; machines live on under their supervisors.
    pub async fn shutdown(&self) {
        let _ = self.inputs.send(Input::Quit).await; // it has ended already
        let thread = self.agent.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await; // a panic was logged by itself
        }
    }
}

impl Shared {
    fn set_up(config: HostConfig, view: View, images: Images, replayed: &Replayed) -> Result<Self, StartError> {
        let cgroups = config.abilities.cgroups().clone();
        tracing::info!(host = %config.id, cgroups = %cgroups.describe(), "control groups");
        bound_processes(&cgroups)?;
        let prefix = convert::prefix(config.machine_prefix);
        let firewall = Firewall::new(&convert::table_name(&config.instance), prefix, vec![])?;
        let firewall = firewall.close(config.abilities.outside.clone());
        if let Some((addr, ifname)) = net::taken_by_another(prefix, firewall.group())? {
            return Err(StartError::PrefixTaken { prefix: prefix.to_string(), addr, ifname });
        }
        let mtu = net::uplink_mtu()?;
        let interfaces = net::list(net::IFNAME_PREFIX)?;
        let rules = replayed.machines.values().map(|record| act::rule_of_before(record, &interfaces));
        let firewall = KeptFirewall::apply(firewall, rules);
        Ok(Self {
            exe: SealedExe::new()?,
            view,
            images,
            cgroups,
            firewall,
            mtu,
            table: Table::default(),
            journal_writes: AtomicU64::new(0),
            journal_us: AtomicU64::new(0),
            tombstones_waiting: AtomicUsize::new(0),
            followers: Shares::halves(logs::MAX_STREAMS),
            tails: Shares::halves(logs::TAILS_BYTES),
            sessions: Shares::halves(exec::MAX_SESSIONS),
            attached: clock::Attached::default(),
            looks: Arc::new(tokio::sync::Semaphore::new(ps::MAX_LOOKS)),
            builders: builder::Slots::default(),
            volumes: volumes::Volumes::open(&config.data_dir),
            ready: ready::Ready::default(),
            cpus: cpus::Cpus::default(),
            recovered: tokio::sync::watch::Sender::new(false),
            supervisor_kill_at: Mutex::new(config.kill_at.clone().filter(|point| SUPERVISOR_KILL_POINTS.contains(&point.as_str()))),
            config,
        })
    }

    fn machine_dir(&self, id: &str) -> PathBuf {
        self.config.data_dir.join("machines").join(id)
    }
}

/// However many machines there are, the host keeps processes for itself.
fn bound_processes(cgroups: &Cgroups) -> Result<(), StartError> {
    if let Err(error) = raise_pid_max() {
        tracing::warn!(%error, "kernel.pid_max stays as it is; `dunlin doctor` says what that means");
    }
    let room = ProcessRoom::look().map_err(|source| StartError::Io { what: "the kernel does not say how many processes there may be", source })?;
    if cgroups.bound_processes(room.machines)? {
        tracing::info!(computer = room.computer, machines = room.machines, "processes and threads that there may be");
    }
    Ok(())
}

/// Gives this process more weight than all machines together, where processors are scarce: each request passes it.
pub fn favour_server(abilities: &Abilities) -> Result<(), StartError> {
    Ok(abilities.cgroups().favour_server()?)
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Ends every machine of a data directory whose server is stopped, and removes what it left in the
/// kernel. Files stay.
pub fn clean_up(data_dir: &Path, instance: &str, machine_prefix: Ipv4Prefix) -> Result<(), StartError> {
    let abilities = Abilities::find(instance, data_dir, vec![])?;
    let cgroups = abilities.cgroups();
    for entry in std::fs::read_dir(data_dir.join("machines")).into_iter().flatten().flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse::<MachineId>() else { continue };
        if let Ok(client) = dunlin_runtime::Client::connect(&entry.path()) {
            let _ = client.kill(); // the control group is ended below in any case
        }
        dunlin_runtime::cleanup(&entry.path(), id.as_str(), cgroups, Some(&id.interface_name()))?;
    }
    builder::end_all(data_dir, instance, cgroups);
    volumes::unmount_all(data_dir);
    let firewall = Firewall::new(&convert::table_name(instance), convert::prefix(machine_prefix), vec![])?;
    firewall.remove()?;
    cgroups.remove_root()?;
    Ok(())
}
