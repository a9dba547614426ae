//! End-to-end support: starts the real binary in a scratch directory, speaks to it as a person would
//! (the CLI and curl), and takes everything away again.
//!
//! The binary must have been built: `cargo xtask test` does that first.
#![forbid(unsafe_code)]

mod api;
mod app;
mod census;
mod docker;
mod endure;
mod fleet;
mod netns;
mod probe;
mod pulse;
mod random;
mod user;
mod websocket;

pub use api::Api;
pub use app::{APP_PY, DOCKERFILE, PYTHON};
pub use census::{Census, Place, interface};
pub use docker::Docker;
pub use endure::{Endurance, Endured, endure, image_of, sleepers};
pub use fleet::Fleet;
pub use netns::{Namespace, link};
pub use pulse::{Heard, Pulse};
pub use probe::{Probe, Seen};
pub use random::Random;
pub use user::User;
pub use websocket::websocket_echo;

use serde_json::Value;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a condition may take on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Another binary than the one that tests run, for benchmarks. To be called before anything else.
pub fn use_binary(path: PathBuf) {
    assert!(BINARY.set(path).is_ok(), "the binary is chosen once, and first");
}

static BINARY: OnceLock<PathBuf> = OnceLock::new();

/// Where cargo put the binary.
pub fn binary() -> PathBuf {
    let path = BINARY.get_or_init(|| target().join("debug/dunlin")).clone();
    assert!(path.exists(), "{} is not built; run `cargo build --package dunlin` first", path.display());
    path
}

/// Where cargo puts what it makes, and tests what is expensive to make.
pub fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// Base images are made once and shared by hard links: blobs never change.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let data = target().join("e2e-images");
        fs::create_dir_all(&data).unwrap();
        for kind in ["debian", "python", "node"] {
            let made = Command::new(binary()).args(["image", "bootstrap", kind, "--data-dir"]).arg(&data).status();
            assert!(made.unwrap().success(), "dunlin image bootstrap {kind}");
        }
        data
    })
}

/// The numbers of test servers differ, so that their address blocks do.
fn next_number() -> usize {
    static NEXT: Mutex<usize> = Mutex::new(0);
    let mut next: MutexGuard<'_, usize> = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    *next += 1;
    *next
}

/// What a sound server may say at WARN on a machine like CI's; anything else that a test did not announce
/// with [`Server::expect_log`] fails it.
const USUAL_WARNINGS: &[&str] = &[
    // Containers and CI machines often withhold CAP_SYS_RESOURCE.
    "oom priority",
    // Many kernels of containers and CI have no dm-crypt; the tests of encryption run where there is one.
    "volumes are not encrypted on the disk",
    // Seen where a disk of the host itself is small.
    "free disk",
];

const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// One server with a data directory of its own.
pub struct Server {
    dir: TempDir,
    data: PathBuf,
    keeper: Option<Child>,
    pub http: u16,
    pub https: u16,
    /// Where it listens for requests.
    bind: &'static str,
    number: usize,
    /// Further flags of `dunlin server`.
    pub flags: Vec<String>,
    /// For more machines than one of the usual blocks has addresses.
    pub machine_prefix: Option<String>,
    expected: Mutex<Vec<String>>,
    /// What the server is started from, where it is not what cargo built.
    binary: Option<PathBuf>,
    /// Whose it is, and whoever speaks to it, if not root.
    pub user: Option<Arc<User>>,
    /// Where it is a host of a network of its own.
    netns: Option<Arc<Namespace>>,
    /// Where its programs read how far their clock is from the computer's.
    clock: Option<PathBuf>,
}

impl Server {
    /// Starts a server that has the base images, and waits until it answers.
    pub fn start() -> Self {
        let mut server = Self::prepare();
        server.boot();
        server
    }

    /// A data directory and ports, no process yet.
    pub fn prepare() -> Self {
        let dir = tempfile::Builder::new().prefix("dunlin-e2e-").tempdir().unwrap();
        let data = dir.path().join("data");
        Self::prepare_in(dir, data, &["-al"])
    }

    /// As [`Server::prepare`], with the data on another file system, which `copy` (flags of cp) must suit.
    pub fn prepare_in(dir: TempDir, data: PathBuf, copy: &[&str]) -> Self {
        fs::create_dir_all(&data).unwrap();
        let copied = Command::new("cp").args(copy).arg(template().join("registry")).arg(&data).status().unwrap();
        assert!(copied.success());
        Self::without_images(dir, data)
    }

    fn without_images(dir: TempDir, data: PathBuf) -> Self {
        let (http, https) = (free_port(), free_port());
        Self {
            dir,
            data,
            keeper: None,
            http,
            https,
            bind: "127.0.0.1",
            number: next_number(),
            flags: vec![],
            machine_prefix: None,
            expected: Mutex::default(),
            binary: None,
            user: None,
            netns: None,
            clock: None,
        }
    }

    /// An ordinary user's, with a data directory and a binary that are theirs; no process yet.
    pub fn of(user: Arc<User>) -> Self {
        let dir = tempfile::Builder::new().prefix("dunlin-e2e-").tempdir().unwrap();
        let data = dir.path().join("data");
        // Copies, since links would make the images of all tests this user's.
        let mut server = Self::prepare_in(dir, data, &["-a"]);
        server.with_own_binary();
        fs::set_permissions(server.dir(), PermissionsExt::from_mode(0o755)).unwrap();
        let owned = Command::new("chown").arg("-R").arg(format!("{}:{}", user.uid, user.gid)).arg(&server.data).status().unwrap();
        assert!(owned.success());
        server.user = Some(user);
        server
    }

    /// As its user, and where it is. A namespace is entered without a mount namespace, as `ip netns exec` makes one: that
    /// would hide the control groups.
    fn program(&self) -> Command {
        let program = self.binary.clone().unwrap_or_else(binary);
        let mut command = match &self.netns {
            Some(netns) => netns.command(&program),
            None => Command::new(program),
        };
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        if let Some(clock) = &self.clock {
            // Time that merely passes stays what it is, and so does what the file system says.
            command.env("LD_PRELOAD", FAKETIME).env("FAKETIME_TIMESTAMP_FILE", clock).env("FAKETIME_CACHE_DURATION", "1");
            command.envs([("FAKETIME_DONT_FAKE_MONOTONIC", "1"), ("NO_FAKE_STAT", "1")]);
        }
        command
    }

    /// What people type is what cargo built, whatever the server is started from.
    fn cli_program(&self) -> Command {
        if self.user.is_some() || self.netns.is_some() { self.program() } else { Command::new(binary()) }
    }

    /// The server runs from a binary of its own, which a test may exchange.
    pub fn with_own_binary(&mut self) -> PathBuf {
        let own = self.dir.path().join("dunlin");
        fs::copy(binary(), &own).unwrap();
        self.binary = Some(own.clone());
        own
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    /// What the addresses of its machines begin with.
    pub fn address_prefix(&self) -> String {
        format!("10.{}.{}.", 210 + self.number / 250, self.number % 250)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    /// Announces that the log will have WARN or ERROR lines with this text.
    pub fn expect_log(&self, text: &str) {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
    }

    /// The command that starts the keeper.
    pub fn command(&self) -> Command {
        let mut command = self.program();
        command
            .args(["server", "--base-images", "bootstrapped", "--data-dir"])
            .arg(self.data())
            .args(["--http", &format!("{}:{}", self.bind, self.http)])
            .args(["--https", &format!("{}:{}", self.bind, self.https)])
            .args(&self.flags)
            .stdin(Stdio::null());
        if self.netns.is_none() {
            command.args(["--cluster", "off"]);
            command.args(["--machine-prefix", &self.machine_prefix.clone().unwrap_or_else(|| format!("{}0/24", self.address_prefix()))]);
        }
        command
    }

    /// Starts the keeper and waits for the API.
    pub fn boot(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.path().join("server.log")).unwrap();
        let keeper = self.command().stdout(log.try_clone().unwrap()).stderr(log).process_group(0).spawn().unwrap();
        self.keeper = Some(keeper);
    }

    pub fn wait_ready(&self) {
        self.until("the server answers", || self.dunlin(&["apps", "list", "--json"]).status.success());
    }

    /// Runs the CLI against this server.
    pub fn dunlin(&self, args: &[&str]) -> Output {
        self.dunlin_in(self.dir.path(), args)
    }

    pub fn dunlin_in(&self, dir: &Path, args: &[&str]) -> Output {
        self.cli(dir, args).output().unwrap()
    }

    /// The CLI, to be started with whatever else a test wants of it.
    pub fn cli(&self, dir: &Path, args: &[&str]) -> Command {
        let mut command = self.cli_program();
        command.arg("--data-dir").arg(self.data()).args(args).current_dir(dir).stdin(Stdio::null());
        command
    }

    /// Runs the CLI and expects success; returns standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        self.ok_in(self.dir.path(), args)
    }

    pub fn ok_in(&self, dir: &Path, args: &[&str]) -> String {
        let output = self.dunlin_in(dir, args);
        assert!(output.status.success(), "{}", self.story(args, &output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs the CLI and expects this exit code and these texts in what it says; returns all of it.
    pub fn fails_in(&self, dir: &Path, args: &[&str], code: i32, says: &[&str]) -> String {
        let output = self.dunlin_in(dir, args);
        assert_eq!(output.status.code(), Some(code), "{}", self.story(args, &output));
        let text = text(&output);
        for wanted in says {
            assert!(text.contains(wanted), "no {wanted:?} in: {}", self.story(args, &output));
        }
        assert!(text.contains("error:") && text.contains("hint:"), "{}", self.story(args, &output));
        text
    }

    pub fn fails(&self, args: &[&str], code: i32, says: &[&str]) -> String {
        self.fails_in(self.dir.path(), args, code, says)
    }

    fn story(&self, args: &[&str], output: &Output) -> String {
        format!("dunlin {} ended with {}\n{}\n--- server log\n{}", args.join(" "), output.status, text(output), tail(&self.log()))
    }

    /// Standard output of a successful command, as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        serde_json::from_str(&self.ok(&args)).unwrap()
    }

    /// An app's machines as the API shows them.
    pub fn machine_list(&self, app: &str) -> Vec<Value> {
        self.json(&["machine", "list", "--app", app]).as_array().unwrap().clone()
    }

    /// Ids of an app's machines.
    pub fn machines(&self, app: &str) -> Vec<String> {
        self.machine_list(app).iter().map(|m| m["id"].as_str().unwrap().to_owned()).collect()
    }

    /// The process id of a machine's supervisor.
    pub fn supervisor_pid(&self, machine: &str) -> Option<u32> {
        processes().into_iter().find(|(_, line)| line.contains("__supervisor") && line.ends_with(machine)).map(|(pid, _)| pid)
    }

    /// (status, body) of a GET through the edge.
    pub fn get(&self, app: &str, path: &str) -> (u16, String) {
        let url = format!("http://{app}.localhost:{}{path}", self.http);
        self.curl(&["--resolve", &format!("{app}.localhost:{}:127.0.0.1", self.http), &url])
    }

    pub fn get_tls(&self, app: &str, path: &str) -> (u16, String) {
        let url = format!("https://{app}.localhost:{}{path}", self.https);
        let ca = self.data().join("ca/ca.pem");
        let resolve = format!("{app}.localhost:{}:127.0.0.1", self.https);
        self.curl(&["--cacert", ca.to_str().unwrap(), "--resolve", &resolve, &url])
    }

    fn curl(&self, args: &[&str]) -> (u16, String) {
        let command = self.netns.as_ref().map_or_else(|| Command::new("curl"), |netns| netns.command("curl"));
        curl(command, args)
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().id()
    }

    /// The server's process id: the keeper's child.
    pub fn server_pid(&self) -> Option<u32> {
        let keeper = self.keeper_pid();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
        let line = |pid: &str| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_server = |pid: &&str| line(pid).split(|b| *b == 0).nth(1) == Some(b"__serve");
        children.split_whitespace().find(is_server)?.parse().ok()
    }

    /// `kill -9` of the keeper; its server ends by itself.
    pub fn kill_keeper(&mut self) {
        self.expect_log("the keeper is gone");
        if let Some(mut keeper) = self.keeper.take() {
            keeper.kill().unwrap();
            keeper.wait().unwrap();
        }
    }

    /// Everything of it was killed from outside.
    fn forget_keeper(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            keeper.wait().unwrap();
        }
    }

    /// Removes what a stopped server left in the kernel.
    pub fn cleanup(&self) -> Output {
        let mut command = self.cli_program();
        command.args(["cleanup", "--data-dir"]).arg(self.data()).output().unwrap()
    }

    /// `kill -9` of the server; the keeper starts another.
    pub fn kill_server(&self) {
        self.expect_log("the server died; restarting it");
        if let Some(pid) = self.server_pid() {
            kill(pid, "KILL");
            self.until("another server runs", || self.server_pid().is_some_and(|new| new != pid));
        }
    }

    /// Graceful stop of keeper and server; machines live on.
    pub fn stop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            kill(keeper.id(), "TERM");
            keeper.wait().unwrap();
        }
    }

    /// Waits until `condition` holds.
    pub fn until(&self, what: &str, condition: impl FnMut() -> bool) {
        assert!(until(condition), "not within {PATIENCE:?}: {what}\n--- server log\n{}", tail(&self.log()));
    }

    /// Writes an app's source; returns its directory.
    pub fn source(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir = self.dir.path().join("src").join(name);
        for (path, content) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    fn check_log(&self) {
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        let log = self.log();
        let unexpected: Vec<&str> = log
            .lines()
            .filter(|line| line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked"))
            .filter(|line| !USUAL_WARNINGS.iter().any(|usual| line.contains(usual)))
            .filter(|line| !expected.iter().any(|text| line.contains(text.as_str())))
            .collect();
        assert!(unexpected.is_empty(), "the server's log has lines that nobody announced:\n{}", unexpected.join("\n"));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        let cleaned = self.cleanup();
        if thread::panicking() {
            return;
        }
        assert!(cleaned.status.success(), "cleanup: {}", text(&cleaned));
        self.check_log();
        // Another server's machine that begins just then has a copy of this one's mounts until it has its own root.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !leftovers(&self.data).is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(100));
        }
        let leftovers = leftovers(&self.data);
        assert!(leftovers.is_empty(), "something is left: {leftovers:?}");
    }
}

/// What a server of this data directory has in the kernel: mounts, processes, loop devices.
pub fn leftovers(data: &Path) -> Vec<String> {
    let data = data.to_str().unwrap();
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mounts = mounts.lines().filter(|line| line.split(' ').nth(1).is_some_and(|at| at.starts_with(&format!("{data}/"))));
    let processes = processes().into_iter().filter(|(_, line)| line.contains(data)).map(|(pid, line)| format!("{pid} {line}"));
    let loops = fs::read_dir("/sys/block").unwrap().flatten().filter_map(|entry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        file.starts_with(&format!("{data}/")).then(|| format!("{}: {file}", entry.file_name().to_string_lossy()))
    });
    mounts.map(str::to_owned).chain(processes).chain(loops).collect()
}

/// (process id, command line) of all processes.
pub fn processes() -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()))
        })
        .collect()
}

/// Polls until `condition` holds or patience ends.
pub fn until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(25));
    }
    condition()
}

/// Standard output and error of a command.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn kill(pid: u32, signal: &str) {
    let _ = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status(); // it may be gone
}

fn curl(mut command: Command, args: &[&str]) -> (u16, String) {
    let output = command.args(["-sS", "--max-time", "30", "-w", "\n%{http_code}"]).args(args).output().unwrap();
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = answer.rsplit_once('\n').unwrap_or(("", "0"));
    (status.parse().unwrap_or(0), format!("{body}{}", String::from_utf8_lossy(&output.stderr)))
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
