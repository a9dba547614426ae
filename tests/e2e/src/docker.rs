//! A Docker engine with a directory of its own. It is unpacked from Debian's packages and not installed: an
//! installed one starts by itself, and changes the firewall of whoever runs the tests.

use crate::{PATIENCE, target, text};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The engine, and what it starts.
const PACKAGES: [&str; 2] = ["docker.io", "containerd"];

pub struct Docker {
    dir: TempDir,
    engine: Child,
}

impl Docker {
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("dunlin-docker-").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let log = fs::File::create(at("log")).unwrap();
        let engine = command("usr/sbin/dockerd")
            // No interface, no rule, no setting of the host's is touched.
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--storage-driver=vfs"])
            .arg("--data-root")
            .arg(at("data"))
            .arg("--exec-root")
            .arg(at("exec"))
            .arg("--pidfile")
            .arg(at("pid"))
            .arg("--host")
            .arg(format!("unix://{}", at("sock").display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let docker = Self { dir, engine };
        let deadline = Instant::now() + PATIENCE;
        while !docker.run(&["info"]).status.success() {
            let log = || fs::read_to_string(docker.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the Docker engine does not answer:\n{}", log());
            thread::sleep(Duration::from_millis(100));
        }
        docker
    }

    /// What a command that must succeed printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "docker {}\n{}", args[0], text(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn run(&self, args: &[&str]) -> Output {
        command("usr/bin/docker")
            .arg("--config")
            .arg(self.dir.path().join("config"))
            .arg("--host")
            .arg(format!("unix://{}", self.dir.path().join("sock").display()))
            .args(args)
            .output()
            .unwrap()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        crate::kill(self.engine.id(), "TERM");
        let _ = self.engine.wait(); // ended, and what it started with it
    }
}

fn command(program: &str) -> Command {
    let root = unpacked();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(root.join(program));
    command.env("PATH", format!("{0}/usr/bin:{0}/usr/sbin:{path}", root.display()));
    command
}

fn unpacked() -> &'static Path {
    static UNPACKED: OnceLock<PathBuf> = OnceLock::new();
    UNPACKED.get_or_init(|| {
        let root = target().join("e2e-docker");
        if !root.exists() {
            let made = tempfile::tempdir_in(target()).unwrap();
            unpack(made.path());
            fs::rename(made.keep(), &root).unwrap();
        }
        root
    })
}

fn unpack(root: &Path) {
    let download = || {
        let mut command = Command::new("apt-get");
        command.args(["download", "-qq"]).args(PACKAGES).current_dir(root).output().unwrap()
    };
    let mut downloaded = download();
    if !downloaded.status.success() {
        // What the lists name may be gone from the archive.
        Command::new("apt-get").args(["update", "-qq"]).status().unwrap();
        downloaded = download();
    }
    assert!(downloaded.status.success(), "{}", text(&downloaded));
    for entry in fs::read_dir(root).unwrap() {
        let package = entry.unwrap().path();
        assert!(Command::new("dpkg").arg("-x").arg(&package).arg(root).status().unwrap().success());
        fs::remove_file(package).unwrap();
    }
}
