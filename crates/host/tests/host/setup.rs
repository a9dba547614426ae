//! One host over a data directory of its own, and an image whose program is a shell script.

use dunlin_api::{BuilderRequest, Command, CommandAnswer, CommandKind, HostApi, Refusal, Source};
use dunlin_cluster::View;
use dunlin_host::{Host, HostConfig, StartError};
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::seal::OpeningKey;
use dunlin_model::{Generation, MachineId, MachineState, MachineVersion};
use dunlin_registry::{ContentStore, Images};
use dunlin_view::{ConfigState, MachineAssignment, MachineFact};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Nothing here takes longer, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Before any thread: an /etc/resolv.conf that tests may write to.
pub fn own_resolv_conf() {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    mount(Some(file.path()), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).unwrap();
    set_resolvers("nameserver 192.0.2.1\n");
}

pub fn set_resolvers(text: &str) {
    std::fs::write("/etc/resolv.conf", text).unwrap();
}

pub struct World {
    pub dir: TempDir,
    pub runtime: Runtime,
    pub view: View,
    pub config: ConfigState,
    pub host: Option<Arc<Host>>,
    pub ready_machines: usize,
    pub images: Images,
    pub content: ContentStore,
    image: String,
    number: u64,
    commands: AtomicU64,
}

impl World {
    pub fn new() -> Self {
        let mut world = Self::without_host();
        world.start_host();
        world
    }

    pub fn without_host() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let dir = tempfile::tempdir().unwrap();
        let content = ContentStore::open(dir.path().join("registry")).unwrap();
        let images = Images::open(dir.path().join("images"), content.clone()).unwrap();
        Self {
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap(),
            view: View::memory(),
            config: ConfigState { generation: Generation { incarnation: 1, revision: 0 }, ..ConfigState::default() },
            host: None,
            ready_machines: 0,
            image: make_image(&content),
            images,
            content,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            commands: AtomicU64::new(0),
            dir,
        }
    }

    pub fn host_config(&self) -> HostConfig {
        HostConfig {
            id: "h1".parse().unwrap(),
            region: "local".parse().unwrap(),
            data_dir: self.dir.path().to_owned(),
            instance: self.instance(),
            machine_prefix: self.prefix(),
            cpus: 2,
            memory_mb: 1024,
            abilities: dunlin_runtime::features::Abilities::find(&self.instance(), self.dir.path(), vec![]).unwrap(),
            rootfs_gb: 1,
            autostop_after_ms: 300,
            ready_machines: self.ready_machines,
            key: OpeningKey::from_bytes([5; 32]),
            kill_at: None,
        }
    }

    pub fn instance(&self) -> String {
        format!("dunlin-test-{}-{}", std::process::id(), self.number)
    }

    pub fn prefix(&self) -> Ipv4Prefix {
        Ipv4Prefix { network: self.address(0), length: 24 }
    }

    pub fn address(&self, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number as u8, n)
    }

    /// Returns when its facts are of this start, and no longer of the one before.
    pub fn start_host(&mut self) {
        self.host = Some(self.try_host(self.host_config()).unwrap());
        self.block_on(self.host().recovered());
    }

    pub fn try_host(&self, config: HostConfig) -> Result<Arc<Host>, StartError> {
        let (view, images) = (self.view.clone(), self.images.clone());
        self.block_on(async { Host::start(config, view, images) })
    }

    pub fn stop_host(&mut self) {
        if let Some(host) = self.host.take() {
            self.block_on(host.shutdown());
        }
    }

    pub fn host(&self) -> &Host {
        self.host.as_ref().expect("it runs")
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Machine `n` in a version of its own: `sh -c script`, and what `change` makes of its spec.
    pub fn assign(&mut self, n: u8, script: &str, change: impl FnOnce(&mut Value)) -> MachineId {
        self.assign_as(MachineId::from_random([n; 7]), n, script, change)
    }

    pub fn assign_as(&mut self, id: MachineId, n: u8, script: &str, change: impl FnOnce(&mut Value)) -> MachineId {
        let revision = self.config.generation.revision + 1;
        let mut spec = json!({
            "version": MachineVersion::new(revision, [n; 10]), "org": "personal", "app": "web",
            "process_group": "app", "release": revision, "image": {"repository": "web", "digest": self.image},
            "command": ["sh", "-c", script], "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 64},
            "restart": {"policy": "no", "max_retries": 0}, "stop": {"signal": "SIGKILL", "timeout_ms": 5000}
        });
        change(&mut spec);
        let placement = self.config.machines.get(&id).map_or(Generation { incarnation: 1, revision }, |old| old.placement);
        let assignment: MachineAssignment = serde_json::from_value(json!({
            "id": id, "name": "x", "host": "h1", "region": "local", "address": self.address(n),
            "placement": placement, "created_at_ms": 0, "spec": spec
        }))
        .unwrap();
        self.config.machines.insert(id.clone(), assignment);
        self.publish();
        id
    }

    pub fn destroy(&mut self, id: &MachineId) {
        self.config.machines.remove(id);
        self.config.tombstones.insert(id.clone(), "h1".parse().unwrap());
        self.publish();
    }

    pub fn publish(&mut self) {
        self.config.generation.revision += 1;
        self.view.publish_config(self.config.clone(), 0).unwrap();
    }

    /// A machine that has the version of its assignment, not started yet.
    pub fn created(&mut self, n: u8, script: &str, change: impl FnOnce(&mut Value)) -> MachineId {
        let id = self.assign(n, script, change);
        self.wait_for(&id, MachineState::Created);
        id
    }

    pub fn started(&mut self, n: u8, script: &str, change: impl FnOnce(&mut Value)) -> MachineId {
        let id = self.created(n, script, change);
        self.command(&id, CommandKind::Start).unwrap();
        self.wait_for(&id, MachineState::Started);
        id
    }

    /// A machine whose script ends by itself, and has ended: that it was started may never be seen.
    pub fn ended(&mut self, n: u8, script: &str, change: impl FnOnce(&mut Value)) -> MachineId {
        let id = self.created(n, script, change);
        self.command(&id, CommandKind::Start).unwrap();
        self.wait_for(&id, MachineState::Stopped);
        id
    }

    pub fn order(&self, id: &MachineId, kind: CommandKind) -> Command {
        Command {
            id: format!("c{}", self.commands.fetch_add(1, Ordering::Relaxed)).parse().unwrap(),
            machine: id.clone(),
            deadline_ms: u64::MAX,
            generation: None,
            plan: None,
            expected_version: None,
            nonce: None,
            source: Source::User,
            request_id: None,
            kind,
        }
    }

    pub fn command(&self, id: &MachineId, kind: CommandKind) -> Result<CommandAnswer, Refusal> {
        self.block_on(self.host().command(self.order(id, kind)))
    }

    pub fn fact(&self, id: &MachineId) -> Option<MachineFact> {
        self.view.current().machines.get(id).map(|fact| (**fact).clone())
    }

    pub fn wait_for(&self, id: &MachineId, state: MachineState) -> MachineFact {
        self.until(&format!("{id} is {}", state.as_str()), || self.fact(id).filter(|fact| fact.state == state))
    }

    pub fn until<T>(&self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        self.within(PATIENCE, what, &mut condition)
    }

    /// For what takes its time.
    pub fn within<T>(&self, patience: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(value) = condition() {
                return value;
            }
            if Instant::now() >= deadline {
                panic!("not within {patience:?}: {what}; {:?}", self.view.current().machines);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A run of the organization's builder: `sh -c script`.
    pub fn build(&self, script: &str, timeout_ms: u64) -> BuilderRequest {
        let context = self.dir.path().join("context");
        let socket = self.dir.path().join("registry.sock");
        std::fs::create_dir_all(&context).unwrap();
        std::fs::write(&socket, "in place of the registry's").unwrap();
        BuilderRequest {
            org: "personal".parse().unwrap(),
            app: "web".parse().unwrap(),
            context,
            registry_socket: socket,
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![],
            files: vec![],
            timeout_ms,
        }
    }

    pub fn machine_dir(&self, id: &MachineId) -> PathBuf {
        self.dir.path().join("machines").join(id.as_str())
    }

    /// What the machine's programs printed, all attempts.
    pub fn printed(&self, id: &MachineId) -> Vec<String> {
        let (records, _) = dunlin_runtime::logs::read_logs(&self.machine_dir(id), Default::default(), 10_000).unwrap();
        records.into_iter().filter(|record| record.stream != "system").map(|record| record.line).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop_host();
        let cleaned = dunlin_host::clean_up(self.dir.path(), &self.instance(), self.prefix());
        if !std::thread::panicking() {
            cleaned.unwrap();
        }
    }
}

/// Busybox and its links, in one layer.
fn make_image(content: &ContentStore) -> String {
    let repo = "web".parse().unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    tar.append_path_with_name("/bin/busybox", "bin/busybox").unwrap();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    for name in ["sh", "sleep", "echo", "cat", "id", "kill", "ls", "dd", "env", "true", "false", "httpd", "nc", "trap"] {
        tar.append_link(&mut header, format!("bin/{name}"), "busybox").unwrap();
    }
    header.set_entry_type(tar::EntryType::Directory);
    for name in ["tmp", "etc"] {
        tar.append_data(&mut header, name, std::io::empty()).unwrap();
    }
    let layer = tar.into_inner().unwrap();
    let (diff, size) = content.put_blob(&repo, &layer[..], None).unwrap();
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff.to_string()]}
    });
    let (config, config_size) = content.put_blob(&repo, config.to_string().as_bytes(), None).unwrap();
    let kind = |name: &str| format!("application/vnd.oci.image.{name}");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind("manifest.v1+json"),
        "config": {"mediaType": kind("config.v1+json"), "digest": config.to_string(), "size": config_size},
        "layers": [{"mediaType": kind("layer.v1.tar"), "digest": diff.to_string(), "size": size}]
    });
    content.put_manifest(&repo, &kind("manifest.v1+json"), manifest.to_string().as_bytes(), None).unwrap().to_string()
}
