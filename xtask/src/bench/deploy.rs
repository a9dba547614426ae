//! Deploys of a Python and a Node app: unchanged, and with one line changed, to the first request that the
//! new release answers. The peer does the same by hand: `buildah build` of the same Dockerfile, `podman run`.

use super::{Figure, PODMAN_RUN, Table, Times, time, unmount_storage};
use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::Server;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
const PATIENCE: Duration = Duration::from_secs(120);
/// The peer's containers run in a network namespace of this name, because they listen on a fixed port.
const NAMESPACE: &str = "dunlin-bench";

struct App {
    name: &'static str,
    what: &'static str,
    files: &'static [(&'static str, &'static str)],
    /// The file whose `GREETING` changes.
    changes: &'static str,
    base: &'static str,
}

const APPS: [App; 2] = [
    App {
        name: "bench-flask",
        what: "Flask",
        files: &[
            ("requirements.txt", "flask>=3\n"),
            ("app.py", "from flask import Flask\napp = Flask(__name__)\n@app.get('/')\ndef index():\n    return 'GREETING'\n"),
        ],
        changes: "app.py",
        base: "python:3.11-slim",
    },
    App {
        name: "bench-express",
        what: "Express",
        files: &[
            ("package.json", r#"{ "name": "bench", "scripts": { "start": "node server.js" }, "dependencies": { "express": "^4.19.2" } }"#),
            ("server.js", "const app = require('express')();\napp.get('/', (q, r) => r.send('GREETING'));\napp.listen(process.env.PORT || 8080);\n"),
        ],
        changes: "server.js",
        base: "node:18-slim",
    },
];

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let server = Server::start();
    let peer = Peer::start(&server)?;
    for app in &APPS {
        let source = server.source(app.name, app.files);
        greet(&source, app, "0")?;
        let cold = time(|| Ok(server.ok_in(&source, &["launch", "--yes"])))?;
        println!("    {} cold: {:.1} s", app.what, cold.as_secs_f64());
        peer.prepare(app)?;
        peer.deploy(app, &source)?;

        let unchanged = Times::of(ROUNDS, |_| time(|| Ok(server.ok_in(&source, &["deploy"]))))?;
        println!("    {} unchanged: {}", app.what, unchanged.spread());
        let peers = Times::of(ROUNDS, |_| time(|| peer.build(app, &source)))?;
        table.add(Figure {
            what: &format!("{}: unchanged deploy", app.what),
            ours: unchanged.p50().as_secs_f64(),
            unit: "s",
            peer: Some(("buildah build", peers.p50().as_secs_f64())),
            goal: "<= 2 s",
        });

        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for round in 0..ROUNDS {
            // In turn, so that what else the machine does hits both.
            ours.push(one_line(&server, app, &source, round)?);
            theirs.push(peer.one_line(app, &source, round)?);
        }
        let (ours, theirs) = (Times::of(ROUNDS, |n| Ok(ours[n]))?, Times::of(ROUNDS, |n| Ok(theirs[n]))?);
        println!("    {} one line: {}; by hand {}", app.what, ours.spread(), theirs.spread());
        table.add(Figure {
            what: &format!("{}: one-line change to its first answer", app.what),
            ours: ours.p50().as_secs_f64(),
            unit: "s",
            peer: Some(("buildah + podman", theirs.p50().as_secs_f64())),
            goal: "<= 6 s",
        });
        peer.remove(app);
    }
    Ok(())
}

fn greet(source: &Path, app: &App, greeting: &str) -> anyhow::Result<()> {
    let (_, text) = app.files.iter().find(|(name, _)| *name == app.changes).context("the file that changes")?;
    Ok(fs::write(source.join(app.changes), text.replace("GREETING", &format!("hello {greeting}")))?)
}

/// Deploys in the background and asks until the new release answers.
fn one_line(server: &Server, app: &App, source: &Path, round: usize) -> anyhow::Result<Duration> {
    let greeting = format!("ours {round}");
    greet(source, app, &greeting)?;
    let began = Instant::now();
    let mut deploy = server.cli(source, &["deploy"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let url = format!("http://{}.localhost:{}/", app.name, server.http);
    let took = answered(began, &format!("hello {greeting}"), || curl(&[&url]))?;
    if !deploy.wait()?.success() {
        bail!("the deploy of {} failed", app.name);
    }
    Ok(took)
}

fn answered(began: Instant, expected: &str, ask: impl Fn() -> String) -> anyhow::Result<Duration> {
    while began.elapsed() < PATIENCE {
        if ask() == expected {
            return Ok(began.elapsed());
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("{expected:?} was not answered within {} s", PATIENCE.as_secs())
}

fn curl(args: &[&str]) -> String {
    let output = Command::new("curl").args(["-s", "--max-time", "5"]).args(args).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// buildah and podman with a storage of their own.
struct Peer {
    dir: PathBuf,
    registry: String,
    token: String,
}

impl Peer {
    fn start(server: &Server) -> anyhow::Result<Self> {
        let _ = Command::new("ip").args(["netns", "delete", NAMESPACE]).stderr(Stdio::null()).status(); // of a run that was cut off
        sh::run(Command::new("ip").args(["netns", "add", NAMESPACE]))?;
        sh::run(Command::new("ip").args(["netns", "exec", NAMESPACE, "ip", "link", "set", "lo", "up"]))?;
        let token = server.ok(&["tokens", "create", "--verb", "pull"]).trim().to_owned();
        Ok(Self { dir: server.dir().join("peer"), registry: format!("localhost:{}", server.http), token })
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["--root", &format!("{}/storage", self.dir.display()), "--runroot", &format!("{}/run", self.dir.display())])
            .args(["--storage-driver", "overlay"])
            .env("BUILDAH_ISOLATION", "chroot")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// The same base image under the same name.
    fn prepare(&self, app: &App) -> anyhow::Result<()> {
        let from = format!("docker://{}/library/{}", self.registry, app.base);
        let to = format!(
            "containers-storage:[overlay@{0}/storage+{0}/run]docker.io/library/{1}",
            self.dir.display(),
            app.base
        );
        sh::run(Command::new("skopeo").args(["copy", "-q", "--src-tls-verify=false", "--src-creds", &format!("any:{}", self.token), &from, &to]))
    }

    fn build(&self, app: &App, source: &Path) -> anyhow::Result<()> {
        sh::run(self.tool("buildah").args(["build", "--layers", "--network", "host", "--pull-never", "-t", app.name]).arg(source))
    }

    fn deploy(&self, app: &App, source: &Path) -> anyhow::Result<()> {
        self.build(app, source)?;
        self.remove(app);
        let network = format!("ns:/var/run/netns/{NAMESPACE}");
        sh::run(self.tool("podman").args(PODMAN_RUN).args(["--name", app.name, "--network", &network, &format!("localhost/{}", app.name)]))
    }

    fn remove(&self, app: &App) {
        let _ = self.tool("podman").args(["rm", "-f", "-t", "0", app.name]).status(); // there may be none
    }

    fn one_line(&self, app: &App, source: &Path, round: usize) -> anyhow::Result<Duration> {
        let greeting = format!("peer {round}");
        greet(source, app, &greeting)?;
        let began = Instant::now();
        self.deploy(app, source)?;
        answered(began, &format!("hello {greeting}"), || {
            let output = Command::new("ip").args(["netns", "exec", NAMESPACE, "curl", "-s", "--max-time", "5", "http://127.0.0.1:8080/"]).output();
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        })
        .with_context(|| {
            let logs = self.tool("podman").args(["logs", app.name]).stdout(Stdio::piped()).stderr(Stdio::piped()).output();
            format!("podman's container says: {logs:?}")
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for app in &APPS {
            self.remove(app);
        }
        let _ = Command::new("ip").args(["netns", "delete", NAMESPACE]).status(); // as above
        unmount_storage(&self.dir);
    }
}
