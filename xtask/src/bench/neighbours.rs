//! A machine that uses up processor, memory and disk, and what its neighbours and the server notice of it: answers of
//! another machine through the edge, and of the API, beside the same when all is quiet.

use super::{Figure, Table, Times, time};
use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::Server;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const ROUNDS: usize = 2000;
/// Between two requests, so that they meet the neighbour in all its moods.
const PAUSE: Duration = Duration::from_millis(5);
/// Until it has taken what it gets.
const SETTLE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);

const BURN: &str = r#"
import os, time
def cpu():
    while True:
        pass
def memory():
    while True:
        hoard = [bytearray(os.urandom(1 << 20)) for _ in range(64)]
def disk():
    while True:
        with open("/burn", "wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 20))
                os.fsync(file.fileno())
for burn in [cpu, cpu, cpu, memory, disk, disk]:
    if os.fork() == 0:
        burn()
print("burns", flush=True)
time.sleep(100000)
"#;
const BURNER: &str = "FROM python:3.11-slim\nCOPY burn.py /burn.py\nCMD [\"python3\", \"/burn.py\"]\n";

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let server = Server::start();
    let web = server.source("web", dunlin_e2e::PYTHON);
    fs::write(web.join("dunlin.toml"), "app = \"web\"\n[http_service]\ninternal_port = 8080\n")?;
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&web, &["deploy"]);
    let quiet = look(&server)?;
    let burner = server.source("burner", &[("burn.py", BURN), ("Dockerfile", BURNER), ("dunlin.toml", "app = \"burner\"\n")]);
    server.ok(&["apps", "create", "burner"]);
    server.ok_in(&burner, &["deploy"]);
    thread::sleep(SETTLE);
    let loud = look(&server)?;
    for (what, quiet, loud) in [("a neighbour's answer through the edge", quiet.0, loud.0), ("the API's answer", quiet.1, loud.1)] {
        println!("    {what}: quiet {}, beside a greedy machine {}", quiet.spread(), loud.spread());
        for (name, quiet, loud) in [("p50", quiet.p50(), loud.p50()), ("p99", quiet.p99(), loud.p99())] {
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            let what = format!("{what} beside a greedy machine, {name}");
            table.add(Figure { what: &what, ours: ms(loud), unit: "ms", peer: Some(("quiet", ms(quiet))), goal: "p99 < 2x" });
        }
    }
    if server.server_pid().is_none() {
        bail!("the server did not live through it");
    }
    Ok(())
}

/// Times of requests to the other machine, and to the API.
fn look(server: &Server) -> anyhow::Result<(Times, Times)> {
    // Who asks is not what is looked at: it must not wait for a processor itself.
    renice("-20")?;
    let seen = ask_both(server);
    renice("0")?;
    seen
}

fn renice(nice: &str) -> anyhow::Result<()> {
    sh::run(Command::new("renice").args(["-n", nice, "-p", &std::process::id().to_string()]).stdout(Stdio::null()))
}

fn ask_both(server: &Server) -> anyhow::Result<(Times, Times)> {
    let (port, socket) = (server.http, server.data().join("run/api.sock"));
    let edge = Times::of(ROUNDS, |_| {
        thread::sleep(PAUSE);
        time(|| ask(TcpStream::connect(("127.0.0.1", port))?, "web.localhost", "/"))
    })?;
    let api = Times::of(ROUNDS / 2, |_| {
        thread::sleep(PAUSE);
        time(|| ask(connect(&socket)?, "x", "/v1/apps/web/machines"))
    })?;
    Ok((edge, api))
}

fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(mut stream: impl Read + Write, host: &str, path: &str) -> anyhow::Result<()> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.lines().next().context("an answer")?;
    if !status.contains(" 200 ") {
        bail!("{path}: {status}");
    }
    Ok(())
}
