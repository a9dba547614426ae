//! Active health checks of one attempt. Often at first, until the first pass; then at the interval.

mod tls;

use crate::agent::Input;
use crate::{Shared, exec, now_ms};
use bytes::Bytes;
use dunlin_api::{ExecOutput, ExecRequest};
use dunlin_machine::Record;
use dunlin_model::{Check, CheckKind, MachineId};
use dunlin_runtime::Client;
use dunlin_view::{CheckState, CheckStatus};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Until the first pass a pause is a quarter of the time that the program has had, from the shortest to the longest: so a
/// request and a deploy wait for the app and not for a timer, and a slow one is not asked without end.
const FIRST_EAGER_PAUSE: Duration = Duration::from_millis(1);
const EAGER_PAUSE: Duration = Duration::from_millis(100);
/// A program that began a moment ago need not answer yet: that is no news.
const NEWS_AFTER: Duration = Duration::from_millis(125);
/// The same for commands, each of which is a process in the machine.
const EAGER_SCRIPT_PAUSE: Duration = Duration::from_millis(500);
const MAX_OUTPUT_BYTES: usize = 1024;
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Of an answer, kept for people.
const MAX_ANSWER_CHARS: usize = 200;

/// The running checks of one attempt; dropping them ends them.
pub struct Checks {
    attempt: u64,
    tasks: Vec<JoinHandle<()>>,
}

impl Checks {
    pub fn start(shared: &Arc<Shared>, inputs: &mpsc::Sender<Input>, record: &Record) -> Self {
        let tasks = record.spec().checks.iter().map(|check| {
            let run = Run {
                shared: shared.clone(),
                inputs: inputs.clone(),
                machine: record.assignment.id.clone(),
                attempt: record.attempt,
                address: record.assignment.address.into(),
                check: check.clone(),
            };
            tokio::spawn(run.repeat())
        });
        Self { attempt: record.attempt, tasks: tasks.collect() }
    }

    pub fn attempt(&self) -> u64 {
        self.attempt
    }
}

impl Drop for Checks {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Before the first result: not passing yet, and no failure either.
pub fn pending(check: &Check) -> CheckStatus {
    status(check, CheckState::Warning, "not checked yet".into())
}

fn status(check: &Check, status: CheckState, mut output: String) -> CheckStatus {
    if output.len() > MAX_OUTPUT_BYTES {
        let end = (0..=MAX_OUTPUT_BYTES).rev().find(|end| output.is_char_boundary(*end)).unwrap_or(0);
        output.truncate(end);
    }
    CheckStatus { name: check.name.clone(), status, gates_routing: check.gates_routing, output, updated_at_ms: now_ms() }
}

/// One result: passed or not, why in the host's own words, and the start of what the app answered.
struct Outcome {
    passed: bool,
    reason: String,
    answer: String,
}

impl Outcome {
    fn passed(reason: String) -> Self {
        Self { passed: true, reason, answer: String::new() }
    }

    fn failed(reason: String) -> Self {
        Self { passed: false, reason, answer: String::new() }
    }
}

struct Run {
    shared: Arc<Shared>,
    inputs: mpsc::Sender<Input>,
    machine: MachineId,
    attempt: u64,
    address: IpAddr,
    check: Check,
}

impl Run {
    async fn repeat(self) {
        let started = Instant::now();
        let mut passed = false;
        let is_script = matches!(self.check.kind, CheckKind::Script { .. });
        let eager_pause = || (started.elapsed() / 4).clamp(FIRST_EAGER_PAUSE, EAGER_PAUSE);
        loop {
            let timeout = Duration::from_millis(self.check.timeout_ms.max(1));
            let is_news = is_script || started.elapsed() >= NEWS_AFTER;
            let outcome = match tokio::time::timeout(timeout, self.once(is_news)).await {
                Ok(outcome) => outcome.unwrap_or_else(Outcome::failed),
                Err(_) => Outcome::failed(format!("no answer within {} ms", self.check.timeout_ms)),
            };
            passed |= outcome.passed;
            if !passed && !is_news {
                tokio::time::sleep(eager_pause()).await;
                continue;
            }
            let in_grace = !passed && started.elapsed() < Duration::from_millis(self.check.grace_period_ms);
            let state = match outcome.passed {
                true => CheckState::Passing,
                false if in_grace => CheckState::Warning,
                false => CheckState::Critical,
            };
            let status = status(&self.check, state, outcome.reason);
            let (machine, attempt, answer) = (self.machine.clone(), self.attempt, outcome.answer);
            if self.inputs.send(Input::Check { machine, attempt, status, answer }).await.is_err() {
                return;
            }
            let interval = Duration::from_millis(self.check.interval_ms.max(100));
            let pause = match passed {
                true => interval,
                false if is_script => EAGER_SCRIPT_PAUSE.min(interval),
                false => eager_pause(),
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn once(&self, explains: bool) -> Result<Outcome, String> {
        if let CheckKind::Script { command } = &self.check.kind {
            return self.script(command.clone()).await;
        }
        let address = SocketAddr::new(self.address, self.check.port);
        let stream = match TcpStream::connect(address).await {
            Ok(stream) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused && explains => return Err(self.refused().await),
            Err(e) => return Err(format!("cannot connect to {address}: {e}")),
        };
        match &self.check.kind {
            CheckKind::Http { method, path, headers, https, tls_server_name, tls_skip_verify } => {
                let host = tls_server_name.clone().unwrap_or_else(|| address.to_string());
                let asked = Asked { method, path, headers, host, address };
                if *https {
                    let stream = tls::connect(stream, self.address, tls_server_name.as_deref(), *tls_skip_verify).await?;
                    http(stream, asked).await
                } else {
                    http(stream, asked).await
                }
            }
            CheckKind::Tcp | CheckKind::Script { .. } => Ok(Outcome::passed(format!("connected to {address}"))),
        }
    }

    /// In the machine, as its own user. Whoever stops waiting for it ends it.
    async fn script(&self, command: Vec<String>) -> Result<Outcome, String> {
        // Its time is the check's, which is shorter.
        let request = ExecRequest::new(self.machine.clone(), command, 2 * self.check.timeout_ms);
        let mut session = exec::begin(&self.shared, request, ()).await.map_err(|refusal| refusal.to_string())?;
        let mut said = Vec::new();
        while let Some(output) = session.output.recv().await {
            match output {
                // What is more than is kept is read all the same: the command must not wait for us.
                ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => {
                    let room = MAX_OUTPUT_BYTES - said.len();
                    said.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                ExecOutput::Exited(code) => {
                    let answer = String::from_utf8_lossy(&said).trim().chars().take(MAX_ANSWER_CHARS).collect();
                    return Ok(Outcome { passed: code == 0, reason: format!("exit code {code}"), answer });
                }
                ExecOutput::Failed(why) => return Err(why),
            }
        }
        Err("the command ended without an exit code".into())
    }

    /// Says which sockets the app does listen on: the usual mistakes are another port and loopback.
    async fn refused(&self) -> String {
        let port = self.check.port;
        let dir = self.shared.machine_dir(self.machine.as_str());
        let listening = tokio::task::spawn_blocking(move || {
            let pid = Client::connect(&dir).ok()?.status().ok()?.init_pid;
            dunlin_runtime::net::ports::listen_sockets(pid).ok()
        });
        let sockets: Vec<SocketAddr> =
            listening.await.ok().flatten().unwrap_or_default().into_iter().map(|socket| socket.addr).collect();
        explain_refused(port, &sockets)
    }
}

fn explain_refused(port: u16, sockets: &[SocketAddr]) -> String {
    if sockets.is_empty() {
        return format!("connection refused on port {port}: the app listens on no port yet");
    }
    let list: Vec<String> = sockets.iter().map(SocketAddr::to_string).collect();
    let list = list.join(", ");
    if sockets.iter().any(|socket| socket.port() == port && socket.ip().is_loopback()) {
        return format!(
            "connection refused on port {port}: the app listens on {list}, which only it can reach; \
             make it listen on 0.0.0.0:{port}"
        );
    }
    format!(
        "connection refused on port {port}: the app listens on {list}; \
         make it listen on 0.0.0.0:{port}, or change internal_port"
    )
}

/// What is asked of the app.
struct Asked<'a> {
    method: &'a str,
    path: &'a str,
    headers: &'a BTreeMap<String, String>,
    /// For the header `host`, unless the check has its own.
    host: String,
    address: SocketAddr,
}

async fn http(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, asked: Asked<'_>) -> Result<Outcome, String> {
    let Asked { method, path, headers, host, address } = asked;
    let said = |e: hyper::Error| format!("{address} does not speak HTTP: {e}");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(said)?;
    let connection = tokio::spawn(connection);
    let mut request = Request::builder().method(method.to_ascii_uppercase().as_str()).uri(path);
    if !headers.keys().any(|name| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", host);
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request
        .header("user-agent", "Dunlin health check")
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("the check is not a valid request: {e}"))?;
    let answer = sender.send_request(request).await.map_err(said)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY_BYTES).collect().await;
    connection.abort();
    let body = body.map(|body| body.to_bytes());
    let size = body.as_ref().map_or_else(|_| "no readable body".to_owned(), |body| format!("{} bytes", body.len()));
    let text = body.map(|body| String::from_utf8_lossy(&body).trim().chars().take(MAX_ANSWER_CHARS).collect());
    let reason = if status.is_success() {
        format!("HTTP {status}")
    } else if status.is_redirection() {
        format!("HTTP {status}: a redirect is not a pass; check a path that answers 200 itself")
    } else {
        format!("HTTP {status}, {size}")
    };
    Ok(Outcome { passed: status.is_success(), reason, answer: text.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_connection_says_what_the_app_listens_on() {
        let check = |sockets: &[&str]| {
            explain_refused(8080, &sockets.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>())
        };
        assert!(check(&[]).contains("no port yet"));
        assert!(check(&["127.0.0.1:8080"]).contains("listen on 0.0.0.0:8080"));
        assert!(check(&["0.0.0.0:5000"]).contains("0.0.0.0:5000") && check(&["0.0.0.0:5000"]).contains("internal_port"));
    }
}
