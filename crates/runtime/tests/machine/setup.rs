//! A directory, an image whose program is busybox, and machines that end with their test.

use dunlin_runtime::cgroup::{Cgroups, Limits};
use dunlin_runtime::layer::{WritableLayer, template};
use dunlin_runtime::logs::{LogPosition, read_logs};
use dunlin_runtime::*;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const PATIENCE: Duration = Duration::from_secs(30);
pub const UID_BASE: u32 = 40_000_000;
pub const ROOTFS_BYTES: u64 = 128 << 20;

pub struct World {
    pub dir: TempDir,
    pub exe: SealedExe,
    pub cgroups: Cgroups,
}

pub struct Running<'w> {
    pub world: &'w World,
    pub spec: SupervisorSpec,
}

impl World {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        for sub in ["bin", "etc", "tmp", "home/app"] {
            fs::create_dir_all(layer.join(sub)).unwrap();
        }
        fs::copy("/bin/busybox", layer.join("bin/busybox")).unwrap();
        for name in ["sh", "sleep", "echo", "cat", "id", "mount", "unshare", "kill", "ls", "trap", "dd", "env", "true"] {
            symlink("busybox", layer.join("bin").join(name)).unwrap();
        }
        fs::write(layer.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n").unwrap();
        fs::write(layer.join("etc/group"), "root:x:0:\napp:x:1000:\n").unwrap();
        let name = format!("dunlin-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let exe = SealedExe::of(Path::new(env!("CARGO_BIN_EXE_runtime-probe"))).unwrap();
        Self { dir, exe, cgroups: Cgroups::detect(&name).unwrap() }
    }

    /// An image of one layer, below a writable one that passes.
    pub fn rootfs(&self, layer: PathBuf) -> Rootfs {
        let template = template(&self.dir.path().join("layers"), ROOTFS_BYTES, false).unwrap();
        Rootfs::Layers { image: vec![layer], writable: WritableLayer::Passing { template } }
    }

    pub fn spec(&self, id: &str, script: &str) -> SupervisorSpec {
        SupervisorSpec {
            v: WIRE_VERSION,
            machine_id: id.into(),
            attempt: 1,
            machine_dir: self.dir.path().join("machines").join(id),
            rootfs: self.rootfs(self.dir.path().join("layer")),
            profile: Profile::Tenant,
            process: ProcessSpec {
                command: vec!["sh".into(), "-c".into(), script.into()],
                env: vec![("CANARY".into(), format!("very{}secret", "-"))],
                user: String::new(),
                working_dir: "/".into(),
            },
            beside: vec![],
            own: ContainerRules::default(),
            containers: vec![],
            stop_timeout_ms: 5_000,
            hostname: id.into(),
            uid_base: UID_BASE,
            ids: dunlin_runtime::Ids::Own,
            owner: None,
            cgroups: self.cgroups.clone(),
            limits: Limits { cpu_millis: 1000, memory_bytes: 64 << 20, pids: 64, ..Limits::NONE },
            cpus: None,
            net: None,
            resolv_conf: "nameserver 192.0.2.53\n".into(),
            address: None,
            binds: vec![],
            files: vec![],
            volumes: vec![],
            temp_dirs: vec![],
            log_limits: LogLimits::default(),
            start: true,
            kill_at: None,
        }
    }

    pub fn run(&self, spec: SupervisorSpec) -> Running<'_> {
        spawn(&self.exe, &spec).unwrap();
        Running { world: self, spec }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !thread::panicking() {
            assert_eq!(self.cgroups.list().unwrap(), Vec::<String>::new(), "control groups were left");
        }
        let _ = self.cgroups.remove_root();
    }
}

impl Running<'_> {
    pub fn dir(&self) -> &Path {
        &self.spec.machine_dir
    }

    pub fn client(&self) -> Client {
        Client::connect(self.dir()).unwrap()
    }

    pub fn exit(&self) -> ExitRecord {
        until("an exit record", || {
            let gone = lock_holder(self.dir()).unwrap().is_none();
            read_exit(self.dir(), self.spec.attempt).unwrap().filter(|_| gone)
        })
    }

    pub fn log(&self) -> Vec<String> {
        let (records, _) = read_logs(self.dir(), LogPosition::default(), 10_000).unwrap();
        records.into_iter().filter(|r| r.stream != "system").map(|r| r.line).collect()
    }

    /// Output and exit code of a command beside the machine's program.
    pub fn exec(&self, script: &str) -> (String, i32) {
        self.exec_as(ExecSpec { command: vec!["sh".into(), "-c".into(), script.into()], ..Default::default() })
    }

    pub fn exec_as(&self, exec: ExecSpec) -> (String, i32) {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let both: OwnedFd = writer.try_clone().unwrap().into();
        let [null, ..] = null_streams();
        let session = self.client().exec(exec, [null, writer.into(), both]).unwrap();
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        (output.trim().to_owned(), session.wait(PATIENCE).unwrap().expect("ended"))
    }
}

pub fn null_streams() -> [OwnedFd; 3] {
    std::array::from_fn(|_| fs::File::options().read(true).write(true).open("/dev/null").unwrap().into())
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Ok(client) = Client::connect(self.dir()) {
            let _ = client.kill();
        }
        let deadline = Instant::now() + PATIENCE;
        while lock_holder(self.dir()).unwrap().is_some() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        cleanup(self.dir(), &self.spec.machine_id, &self.world.cgroups, None).unwrap();
    }
}

pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// Runs a supervisor without an agent that would hear it.
pub fn supervise(command: &mut std::process::Command, spec: &SupervisorSpec) {
    for dir in ["exit", "log"] {
        fs::create_dir_all(spec.machine_dir.join(dir)).unwrap();
    }
    let piped = std::process::Stdio::piped;
    let mut supervisor = command.stdin(piped()).stdout(piped()).spawn().unwrap();
    drop(supervisor.stdout.take());
    supervisor.stdin.take().unwrap().write_all(&serde_json::to_vec(spec).unwrap()).unwrap();
    supervisor.wait().unwrap();
}

pub fn assert_no_secret_below(root: &Path) {
    let mut stack: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(dir) = stack.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                stack.push(entry.path());
            } else if let (true, Ok(bytes)) = (kind.is_file(), fs::read(entry.path())) {
                assert!(!contains(&bytes, b"very-secret"), "{}", entry.path().display());
            }
        }
    }
}
