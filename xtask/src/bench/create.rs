//! From the order to start a machine of a local image to the fact that it runs; the platform's side only:
//! its program is busybox's `sleep`. The peers start the same program from the same files.

use super::{Figure, PODMAN_RUN, Table, Times, time, unmount_storage};
use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::Server;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const ROUNDS: usize = 50;
const CLEARED: Duration = Duration::from_millis(300);

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let server = Server::start();
    let dockerfile = "FROM scratch\nCOPY busybox /bin/busybox\nCMD [\"/bin/busybox\", \"sleep\", \"100000\"]\n";
    let source = server.source("bench", &[("Dockerfile", dockerfile), ("dunlin.toml", "app = \"bench\"\n")]);
    fs::copy("/bin/busybox", source.join("busybox"))?;
    server.ok(&["apps", "create", "bench"]);
    server.ok_in(&source, &["deploy"]);
    let machine = server.machines("bench").pop().context("the app has a machine")?;
    let mut api = Api::connect(&server.data().join("run/api.sock"))?;
    let path = format!("/v1/apps/bench/machines/{machine}");
    let ours = Times::of(ROUNDS, |_| {
        api.call("POST", &format!("{path}/stop"), "{\"timeout\":0}")?;
        api.call("GET", &format!("{path}/wait?state=stopped&timeout=30"), "")?;
        // What the attempt left is cleared away meanwhile; `runc delete` does that before it returns.
        thread::sleep(CLEARED);
        time(|| {
            api.call("POST", &format!("{path}/start"), "{}")?;
            api.call("GET", &format!("{path}/wait?state=started&timeout=30"), "")
        })
    })?;
    println!("    dunlin: p50 {:?}, p99 {:?}", ours.p50(), ours.p99());

    let root = server.dir().join("rootfs");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sleep"))?;
    let runc = runc(&server.dir().join("bundle"), &root)?;
    println!("    runc: p50 {:?}, p99 {:?}", runc.p50(), runc.p99());
    let podman = podman(&server.dir().join("podman"), &root)?;
    println!("    podman: p50 {:?}, p99 {:?}", podman.p50(), podman.p99());
    let ms = |times: &Times| times.p50().as_secs_f64() * 1e3;
    for (name, peer) in [("runc run", &runc), ("podman run", &podman)] {
        let what = "start of a stopped machine, API call to running, p50";
        table.add(Figure { what, ours: ms(&ours), unit: "ms", peer: Some((name, ms(peer))), goal: "<= 20 ms" });
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
pub enum Network {
    Own,
    OfTheHost,
}

pub fn runc_bundle(bundle: &Path, root: &Path, command: &[String], network: Network) -> anyhow::Result<()> {
    fs::create_dir_all(bundle)?;
    sh::run(Command::new("runc").arg("spec").current_dir(bundle))?;
    let config = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    spec["root"] = serde_json::json!({ "path": root, "readonly": false });
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(command);
    spec["linux"]["resources"] = serde_json::json!({ "memory": { "limit": 256 << 20 }, "pids": { "limit": 4096 } });
    if network == Network::OfTheHost {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().context("runc names namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
    }
    fs::write(&config, spec.to_string())?;
    Ok(())
}

fn runc(bundle: &Path, root: &Path) -> anyhow::Result<Times> {
    runc_bundle(bundle, root, &["/bin/busybox", "sleep", "100000"].map(str::to_owned), Network::Own)?;
    let state = bundle.join("state");
    let tool = || {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&state).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    Times::of(ROUNDS, |_| {
        let took = time(|| sh::run(tool().args(["run", "-d", "--bundle"]).arg(bundle).arg("bench")))?;
        sh::run(tool().args(["delete", "-f", "bench"]))?;
        Ok(took)
    })
}

fn podman(dir: &Path, root: &Path) -> anyhow::Result<Times> {
    let tool = || {
        let mut command = Command::new("podman");
        command.args(["--root", &format!("{}/storage", dir.display()), "--runroot", &format!("{}/run", dir.display())]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let times = Times::of(ROUNDS, |_| {
        let took = time(|| {
            let run = ["--name", "bench", "--network", "none", "--memory", "256m", "--rootfs"];
            sh::run(tool().args(PODMAN_RUN).args(run).arg(root).args(["/bin/busybox", "sleep", "100000"]))
        })?;
        sh::run(tool().args(["rm", "-f", "-t", "0", "bench"]))?;
        Ok(took)
    });
    unmount_storage(dir);
    times
}

/// One kept connection: a process per call would be measured too.
pub struct Api {
    stream: BufReader<UnixStream>,
}

impl Api {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(socket)?) })
    }

    pub fn call(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        self.stream.read_line(&mut status)?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if !status.contains(" 200 ") {
            bail!("{method} {path}: {} {answer}", status.trim());
        }
        Ok(answer)
    }
}
