//! CPU that a request costs the edge, beside nginx and haproxy: the same upstream, the same load, with limits,
//! timeouts, counters and an access log on in all three. CPU and not requests a second: the load and the
//! upstream share the machine's cores with what is measured.

use super::{Figure, Table, cpu_ticks, median};
use crate::sh;
use anyhow::{Context, bail};
use dunlin_e2e::free_port;
use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const ROUNDS: usize = 5;
const SECONDS: &str = "4";
const CONNECTIONS: &str = "64";
const PATIENCE: Duration = Duration::from_secs(10);
/// The name that the edge's machine, and the certificate, have.
const HOST: &str = "web.example.test";

#[derive(Clone, Copy)]
enum Load {
    Http1,
    Tls,
    TlsHttp2,
}

const LOADS: [(&str, Load); 3] = [
    ("edge, HTTP/1.1 keepalive: CPU a request", Load::Http1),
    ("edge, TLS 1.3, HTTP/1.1: CPU a request", Load::Tls),
    ("edge, TLS 1.3, HTTP/2: CPU a request", Load::TlsHttp2),
];

/// What stands between the load and the upstream.
struct Proxy {
    name: &'static str,
    process: Running,
    http: u16,
    https: u16,
}

/// A process of ours, ended with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status(); // TERM: nginx ends its workers
        let _ = self.0.wait(); // it is ours, and was told to end
    }
}

pub fn run(table: &mut Table) -> anyhow::Result<()> {
    sh::run(sh::cargo().args(["build", "--release", "--package", "dunlin-proxy", "--example", "edge"]))?;
    let dir = TempDir::with_prefix("dunlin-bench-")?;
    let dir = dir.path();
    certificate(dir)?;
    let upstream_port = free_port();
    let _upstream = upstream(dir, upstream_port)?;
    let log = log_sink(&dir.join("syslog"))?;
    let proxies = [edge(dir, upstream_port)?, nginx(dir, upstream_port)?, haproxy(dir, upstream_port)?];
    for (what, load) in LOADS {
        let mut costs = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (proxy, costs) in proxies.iter().zip(&mut costs) {
                costs.push(cost_us(proxy, load)?);
            }
        }
        let costs = costs.map(median);
        for (proxy, cost) in proxies.iter().zip(costs) {
            println!("    {what}: {} {cost:.1} us", proxy.name);
        }
        let (peer, best) = if costs[1] <= costs[2] { (&proxies[1], costs[1]) } else { (&proxies[2], costs[2]) };
        table.add(Figure { what, ours: costs[0], unit: "us", peer: Some((peer.name, best)), goal: "<= 1.3x of the better" });
    }
    drop(log);
    Ok(())
}

/// Microseconds of CPU a request.
fn cost_us(proxy: &Proxy, load: Load) -> anyhow::Result<f64> {
    let family = family(proxy.process.0.id())?;
    let ticks = || family.iter().map(|pid| cpu_ticks(*pid)).sum::<anyhow::Result<u64>>();
    let before = ticks()?;
    let requests = match load {
        Load::Http1 => wrk(&format!("http://127.0.0.1:{}/", proxy.http))?,
        Load::Tls => wrk(&format!("https://127.0.0.1:{}/", proxy.https))?,
        Load::TlsHttp2 => h2load(&format!("https://{HOST}:{}/", proxy.https), proxy.https)?,
    };
    Ok((ticks()? - before) as f64 * 10_000.0 / requests as f64)
}

/// A process and its children.
fn family(pid: u32) -> anyhow::Result<Vec<u32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let mut family = vec![pid];
    for child in children.split_whitespace() {
        family.push(child.parse()?);
    }
    Ok(family)
}

fn wrk(url: &str) -> anyhow::Result<u64> {
    let args = ["-t1", "-c", CONNECTIONS, "-d", SECONDS, "-H", &format!("Host: {HOST}"), url];
    let text = sh::output(Command::new("wrk").args(args))?;
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("wrk was refused:\n{text}");
    }
    let line = text.lines().find(|line| line.contains(" requests in ")).context("wrk's count of requests")?;
    Ok(line.split_whitespace().next().context("wrk's count")?.parse()?)
}

fn h2load(url: &str, port: u16) -> anyhow::Result<u64> {
    let to = format!("--connect-to=127.0.0.1:{port}");
    // Streams at once of a connection: 4, so that in all as many requests are under way as above.
    let text = sh::output(Command::new("h2load").args(["-t1", "-c16", "-m4", "-D", SECONDS, &to, url]))?;
    let line = text.lines().find(|line| line.starts_with("status codes:")).context("h2load's status codes")?;
    if !line.contains(" 0 3xx, 0 4xx, 0 5xx") {
        bail!("h2load was refused:\n{text}");
    }
    Ok(line.split_whitespace().nth(2).context("h2load's count")?.parse()?)
}

fn certificate(dir: &Path) -> anyhow::Result<()> {
    let make = [
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-keyout",
        "key.pem", "-out", "cert.pem", "-subj", &format!("/CN={HOST}"), "-addext", &format!("subjectAltName=DNS:{HOST}"),
    ];
    sh::run(Command::new("openssl").args(make).current_dir(dir).stderr(Stdio::null()))?;
    let both = fs::read_to_string(dir.join("cert.pem"))? + &fs::read_to_string(dir.join("key.pem"))?;
    Ok(fs::write(dir.join("both.pem"), both)?)
}

fn start(command: &mut Command, ports: &[u16]) -> anyhow::Result<Running> {
    let running = Running(command.stdout(Stdio::null()).spawn()?);
    let deadline = Instant::now() + PATIENCE;
    for port in ports {
        while TcpStream::connect(("127.0.0.1", *port)).is_err() {
            if Instant::now() > deadline {
                bail!("{command:?} does not listen on port {port}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(running)
}

/// An nginx with files of its own.
fn run_nginx(dir: &Path, http: &str, ports: &[u16]) -> anyhow::Result<Running> {
    fs::create_dir_all(dir)?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()))
        .concat();
    let config = format!(
        "daemon off;\nworker_processes 2;\npid {0}/pid;\nerror_log {0}/error.log;\nevents {{ worker_connections 4096; }}\n\
         http {{\nkeepalive_requests 100000000;\n{temporary}{http}}}\n",
        dir.display()
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config)?;
    start(Command::new("nginx").arg("-p").arg(dir).arg("-c").arg(&file).arg("-e").arg(dir.join("error.log")), ports)
}

fn upstream(dir: &Path, port: u16) -> anyhow::Result<Running> {
    let http = format!(
        "access_log off;\nserver {{ listen 127.0.0.1:{port}; location / {{ return 200 \"{}\"; }} }}\n",
        "hello ".repeat(20)
    );
    run_nginx(&dir.join("upstream"), &http, &[port])
}

fn edge(dir: &Path, upstream: u16) -> anyhow::Result<Proxy> {
    let (http, https) = (free_port(), free_port());
    let mut command = Command::new(sh::target_dir().join("release/examples/edge"));
    command
        .args(["--http", &format!("127.0.0.1:{http}"), "--https", &format!("127.0.0.1:{https}"), "--cluster", "off"])
        .args(["--upstream", &format!("127.0.0.1:{upstream}"), "--threads", "2", "--sockets", "2", "--host", HOST])
        .args([PathBuf::from("--cert"), dir.join("cert.pem"), "--key".into(), dir.join("key.pem")])
        .args([PathBuf::from("--log"), dir.join("edge.log")]);
    Ok(Proxy { name: "dunlin", process: start(&mut command, &[http, https])?, http, https })
}

fn nginx(dir: &Path, upstream: u16) -> anyhow::Result<Proxy> {
    let (http, https) = (free_port(), free_port());
    let config = format!(
        "log_format main '$remote_addr [$time_iso8601] \"$request\" $host $status $body_bytes_sent $request_length \
         $request_time $upstream_addr $upstream_response_time $request_id';\n\
         access_log {0}/nginx.log main buffer=64k flush=1s;\n\
         limit_conn_zone $server_name zone=app:1m;\n\
         upstream app {{ server 127.0.0.1:{upstream} max_conns=1000; keepalive 256; keepalive_requests 100000000; }}\n\
         server {{\n\
         listen 127.0.0.1:{http} reuseport; listen 127.0.0.1:{https} ssl http2 reuseport; server_name {HOST};\n\
         ssl_certificate {0}/cert.pem; ssl_certificate_key {0}/key.pem; ssl_protocols TLSv1.3;\n\
         client_header_timeout 10s; client_body_timeout 60s; send_timeout 60s; limit_conn app 1000;\n\
         location = /status {{ stub_status; }}\n\
         location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_connect_timeout 5s; proxy_read_timeout 60s;\n\
         proxy_set_header Connection ''; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n\
         proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Request-Id $request_id;\n\
         add_header X-Request-Id $request_id; }}\n\
         }}\n",
        dir.display()
    );
    Ok(Proxy { name: "nginx", process: run_nginx(&dir.join("nginx"), &config, &[http, https])?, http, https })
}

fn haproxy(dir: &Path, upstream: u16) -> anyhow::Result<Proxy> {
    let (http, https) = (free_port(), free_port());
    let config = format!(
        "global\n  nbthread 2\n  maxconn 4000\n  log {0}/syslog format raw local0\n  stats socket {0}/stats.sock\n\
         defaults\n  mode http\n  log global\n  option httplog\n  option forwardfor\n  http-reuse always\n\
         \x20 timeout http-request 10s\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         \x20 unique-id-format %[uuid()]\n  unique-id-header X-Request-Id\n\
         frontend edge\n  bind 127.0.0.1:{http}\n\
         \x20 bind 127.0.0.1:{https} ssl crt {0}/both.pem alpn h2,http/1.1 ssl-min-ver TLSv1.3\n\
         \x20 http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}\n  default_backend app\n\
         backend app\n  server machine 127.0.0.1:{upstream} maxconn 1000\n",
        dir.display()
    );
    let file = dir.join("haproxy.cfg");
    fs::write(&file, config)?;
    let process = start(Command::new("haproxy").arg("-db").arg("-f").arg(&file), &[http, https])?;
    Ok(Proxy { name: "haproxy", process, http, https })
}

/// haproxy logs to a datagram socket; here somebody must read it, as syslogd would.
fn log_sink(path: &Path) -> anyhow::Result<UnixDatagram> {
    let socket = UnixDatagram::bind(path)?;
    let reader = socket.try_clone()?;
    thread::spawn(move || {
        let mut line = [0; 4096];
        while reader.recv(&mut line).is_ok_and(|count| count > 0) {}
    });
    Ok(socket)
}
