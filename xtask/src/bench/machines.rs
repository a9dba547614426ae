//! How fast one machine is for whoever waits for it, with a trivial server in it: woken by a request through the
//! edge, started by the API until its program answers, and a command in it. The peers start the same program from
//! the same files and answer the same first request.

use super::create::{Api, Network, runc_bundle};
use super::{Figure, PODMAN_RUN, Table, Times, time, unmount_storage};
use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::Server;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const ROUNDS: usize = 50;
/// What an attempt left is cleared away meanwhile, and the next one made ready; the peers' `delete` does the former
/// before it returns.
const CLEARED: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(30);
/// Of one attempt to connect.
const ATTEMPT: Duration = Duration::from_millis(5);
const PORT: u16 = 8080;
const SERVE: [&str; 6] = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h"];
const SERVICE: &str = "[http_service]\ninternal_port = 8080\nauto_start_machines = true\n";

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    let cold = Ours::measure(&["--ready-machines", "0"])?;
    let ready = Ours::measure(&[])?;
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let root = dir.join("rootfs");
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("www"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    fs::write(root.join("www/index.html"), "ok\n")?;
    symlink("busybox", root.join("bin/sleep"))?;
    let mut peers = vec![("runc", oci("runc", &dir.join("runc"), &root)?)];
    // It refuses the hybrid control groups of many machines.
    match oci("crun", &dir.join("crun"), &root) {
        Ok(times) => peers.push(("crun", times)),
        Err(error) => println!("    crun: NOT MEASURED, {error}"),
    }
    peers.push(("podman", podman(&dir.join("podman"), &root)?));
    let bare = bare(&root)?;
    row(table, "start of one that stands ready to first byte, p50", ready.started.p50(), Some(("a process", bare.p50())), "<= 2 ms");
    row(table, "the same, p99", ready.started.p99(), Some(("a process", bare.p99())), "-");

    for (name, (start, peers_exec)) in &peers {
        row(table, "create to first byte, p50", cold.started.p50(), Some((name, start.p50())), "<= 12 ms");
        row(table, "create to first byte, p99", cold.started.p99(), Some((name, start.p99())), "<= 45 ms");
        row(table, "start of one that stands ready to first byte, p50", ready.started.p50(), Some((name, start.p50())), "<= 2 ms");
        row(table, "exec, API call to its end, p50", ready.exec.p50(), Some((name, peers_exec.p50())), "<= 4 ms");
    }
    row(table, "first byte through the proxy, stopped, p50", cold.woken.p50(), None, "<= 25 ms");
    row(table, "first byte through the proxy, stands ready, p50", ready.woken.p50(), None, "<= 6 ms");
    row(table, "first byte through the proxy, suspended, p50", ready.resumed.p50(), None, "<= 3 ms");
    Ok(())
}

struct Ours {
    started: Times,
    woken: Times,
    resumed: Times,
    exec: Times,
}

impl Ours {
    fn measure(flags: &[&str]) -> anyhow::Result<Self> {
        let mut server = Server::prepare();
        server.flags.extend(flags.iter().map(|flag| flag.to_string()));
        server.boot();
        let command: Vec<String> = SERVE.iter().chain(&["/www"]).map(|word| format!("{word:?}")).collect();
        let dockerfile = format!("FROM scratch\nCOPY busybox /bin/busybox\nCOPY www /www\nCMD [{}]\n", command.join(", "));
        let files =
            [("Dockerfile", dockerfile.as_str()), ("www/index.html", "ok\n"), ("dunlin.toml", &format!("app = \"bench\"\n{SERVICE}"))];
        let source = server.source("bench", &files);
        fs::copy("/bin/busybox", source.join("busybox"))?;
        server.ok(&["apps", "create", "bench"]);
        server.ok_in(&source, &["deploy"]);
        let machine = server.machine_list("bench").pop().context("the app has a machine")?;
        let address: IpAddr = machine["private_ip"].as_str().context("it has an address")?.parse()?;
        let mut api = Api::connect(&server.data().join("run/api.sock"))?;
        let path = format!("/v1/apps/bench/machines/{}", machine["id"].as_str().context("it has an id")?);
        let edge = SocketAddr::from((Ipv4Addr::LOCALHOST, server.http));

        let started = Times::of(ROUNDS, |_| {
            rest(&mut api, &path, "stop", "stopped")?;
            time(|| {
                api.call("POST", &format!("{path}/start"), "{}")?;
                first_byte((address, PORT).into(), "bench")
            })
        })?;
        let woken = Times::of(ROUNDS, |_| {
            rest(&mut api, &path, "stop", "stopped")?;
            time(|| first_byte(edge, "bench.localhost"))
        })?;
        let resumed = Times::of(ROUNDS, |_| {
            rest(&mut api, &path, "suspend", "suspended")?;
            time(|| first_byte(edge, "bench.localhost"))
        })?;
        let exec_body = r#"{"command":["/bin/busybox","true"]}"#;
        let exec = Times::of(ROUNDS, |_| time(|| api.call("POST", &format!("{path}/exec"), exec_body)))?;
        Ok(Self { started, woken, resumed, exec })
    }
}

fn row(table: &mut Table, what: &str, ours: Duration, peer: Option<(&str, Duration)>, goal: &str) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let peer = peer.map(|(name, time)| (name, ms(time)));
    table.add(Figure { what, ours: ms(ours), unit: "ms", peer, goal });
}

fn rest(api: &mut Api, path: &str, verb: &str, state: &str) -> anyhow::Result<()> {
    let body = if verb == "stop" { "{\"timeout\":0}" } else { "{}" };
    if verb == "suspend" {
        api.call("GET", &format!("{path}/wait?state=started&timeout=30"), "")?;
    }
    api.call("POST", &format!("{path}/{verb}"), body)?;
    api.call("GET", &format!("{path}/wait?state={state}&timeout=30"), "")?;
    thread::sleep(CLEARED);
    Ok(())
}

/// The same program as a process of the host: what no isolation could be faster than.
fn bare(root: &Path) -> anyhow::Result<Times> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Times::of(ROUNDS, |_| {
        let mut child = None;
        let took = time(|| {
            let mut command = Command::new(SERVE[0]);
            command.args(["httpd", "-f", "-p", &at.to_string(), "-h"]).arg(root.join("www"));
            child = Some(command.spawn()?);
            first_byte(at, "bench")
        });
        if let Some(mut child) = child {
            child.kill()?;
            child.wait()?;
        }
        thread::sleep(CLEARED);
        took
    })
}

/// Asks until somebody answers: a program that starts does not listen at once.
/// Until the machine's link stands its address is somebody else's: whoever answers there, or lets the attempt wait,
/// is not what is waited for.
fn first_byte(at: SocketAddr, host: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Ok(mut stream) = TcpStream::connect_timeout(&at, ATTEMPT) {
            stream.set_read_timeout(Some(PATIENCE))?;
            let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            let mut start = [0; 12];
            if stream.write_all(request.as_bytes()).and_then(|()| stream.read_exact(&mut start)).is_ok() && start.ends_with(b"200") {
                return Ok(());
            }
        }
        thread::sleep(Duration::from_micros(200));
    }
    bail!("{at} did not answer within {PATIENCE:?}")
}

/// (start to first byte, exec) of a runtime with runc's command line, in the host's network.
fn oci(program: &str, bundle: &Path, root: &Path) -> anyhow::Result<(Times, Times)> {
    let port = dunlin_e2e::free_port();
    runc_bundle(bundle, root, &serve(port), Network::OfTheHost)?;
    let tool = || {
        let mut command = Command::new(program);
        command.arg("--root").arg(bundle.join("state")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let run = || {
        sh::run(tool().args(["run", "-d", "--bundle"]).arg(bundle).arg("bench"))?;
        first_byte((Ipv4Addr::LOCALHOST, port).into(), "bench")
    };
    let starts = Times::of(ROUNDS, |_| {
        let took = time(run);
        sh::run(tool().args(["delete", "-f", "bench"]))?;
        took
    })?;
    run()?;
    let execs = Times::of(ROUNDS, |_| time(|| sh::run(tool().args(["exec", "bench", "/bin/busybox", "true"]))));
    sh::run(tool().args(["delete", "-f", "bench"]))?;
    Ok((starts, execs?))
}

fn podman(dir: &Path, root: &Path) -> anyhow::Result<(Times, Times)> {
    let port = dunlin_e2e::free_port();
    let tool = || {
        let mut command = Command::new("podman");
        command.args(["--root", &format!("{}/storage", dir.display()), "--runroot", &format!("{}/run", dir.display())]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let run = || {
        let flags = ["--name", "bench", "--network", "host", "--memory", "256m", "--rootfs"];
        sh::run(tool().args(PODMAN_RUN).args(flags).arg(root).args(serve(port)))?;
        first_byte((Ipv4Addr::LOCALHOST, port).into(), "bench")
    };
    let remove = || sh::run(tool().args(["rm", "-f", "-t", "0", "bench"]));
    let starts = Times::of(ROUNDS, |_| {
        let took = time(run);
        remove()?;
        took
    });
    let execs = run().and_then(|()| Times::of(ROUNDS, |_| time(|| sh::run(tool().args(["--runtime=runc", "exec", "bench", "/bin/busybox", "true"])))));
    let removed = remove();
    unmount_storage(dir);
    removed?;
    Ok((starts?, execs?))
}

fn serve(port: u16) -> Vec<String> {
    let port = port.to_string();
    SERVE.iter().map(|word| if *word == "8080" { port.as_str() } else { word }).chain(["/www"]).map(str::to_owned).collect()
}
