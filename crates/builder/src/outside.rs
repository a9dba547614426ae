//! The server's side of a build.

use crate::job::{JOB_VARIABLE, Job};
use dunlin_api::wire::BuildEvent;
use dunlin_api::{BuilderRequest, ExecOutput, HostApi, Refusal};
use dunlin_model::{AppName, OrgName};
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// First argument of the hidden personality that runs inside the machine.
pub const PERSONALITY: &str = "__builder";
/// Lines that wait for a slow reader before the build itself waits.
const EVENT_CAPACITY: usize = 256;
/// A longer line of output is cut here: it is a progress bar or a mistake.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// How many of the last lines an unexplained end shows.
const LAST_LINES: usize = 20;

/// One build. The context is a directory with one file, `context.tar` (plain or gzip), readable by all.
#[derive(Clone)]
pub struct BuildRequest {
    pub org: OrgName,
    pub app: AppName,
    pub tag: String,
    pub context: PathBuf,
    pub dockerfile: Option<String>,
    pub target: Option<String>,
    pub args: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, String>,
    pub no_cache: bool,
    pub bootstrapped_bases: bool,
    pub registry_socket: PathBuf,
    pub registry_token: String,
    pub timeout_ms: u64,
}

/// Starts the build; the last event is `Done` or `Failed`. Dropping the receiver ends the build and
/// its machine.
pub fn build(request: BuildRequest, host: Arc<dyn HostApi>) -> mpsc::Receiver<BuildEvent> {
    let (events, receiver) = mpsc::channel(EVENT_CAPACITY);
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = run(request, host, &events) => ended,
            () = events.closed() => return,
        };
        if let Some(event) = ended {
            let _ = events.send(event).await; // nobody listens any more: nothing to tell
        }
    });
    receiver
}

/// Runs it and forwards its events; returns the closing event if the machine did not say one itself.
async fn run(
    request: BuildRequest,
    host: Arc<dyn HostApi>,
    events: &mpsc::Sender<BuildEvent>,
) -> Option<BuildEvent> {
    let mut run = match host.run_builder(machine_request(request)).await {
        Ok(run) => run,
        Err(refusal) => return Some(refused(&refusal)),
    };
    let mut lines = Lines::default();
    let mut last_lines = VecDeque::with_capacity(LAST_LINES);
    let mut ended = false;
    while let Some(output) = run.output.recv().await {
        let (bytes, is_stdout) = match output {
            ExecOutput::Stdout(bytes) => (bytes, true),
            ExecOutput::Stderr(bytes) => (bytes, false),
            ExecOutput::Exited(_) if ended => return None,
            ExecOutput::Exited(code) => {
                return Some(unexplained(format!("the builder ended with exit code {code}"), last_lines));
            }
            ExecOutput::Failed(why) => return Some(unexplained(why, last_lines)),
        };
        for line in lines.push(&bytes, is_stdout) {
            let event = match serde_json::from_str::<BuildEvent>(&line) {
                Ok(event) if is_stdout => event,
                _ => BuildEvent::Output { line },
            };
            if let BuildEvent::Output { line } = &event {
                if last_lines.len() == LAST_LINES {
                    last_lines.pop_front();
                }
                last_lines.push_back(line.clone());
            }
            ended |= matches!(event, BuildEvent::Done { .. } | BuildEvent::Failed { .. });
            if events.send(event).await.is_err() {
                return None;
            }
        }
    }
    (!ended).then(|| unexplained("the builder machine disappeared".into(), last_lines))
}

fn machine_request(request: BuildRequest) -> BuilderRequest {
    let job = Job {
        app: request.app.to_string(),
        tag: request.tag,
        dockerfile: request.dockerfile,
        target: request.target,
        args: request.args,
        secrets: request.secrets,
        no_cache: request.no_cache,
        bootstrapped_bases: request.bootstrapped_bases,
        registry_token: request.registry_token,
    };
    let job = serde_json::to_string(&job).expect("a job is plain data");
    BuilderRequest {
        org: request.org,
        app: request.app,
        context: request.context,
        registry_socket: request.registry_socket,
        command: vec!["/dunlin".into(), PERSONALITY.into()],
        env: vec![
            (JOB_VARIABLE.into(), job),
            ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("HOME".into(), "/root".into()),
        ],
        files: vec![],
        timeout_ms: request.timeout_ms,
    }
}

fn refused(refusal: &Refusal) -> BuildEvent {
    let hint = match refusal {
        Refusal::DiskFull(_) => "free some space in the data directory, then deploy again",
        Refusal::InsufficientCapacity { .. } => "stop machines that you do not need, or build on a larger host",
        _ => "`dunlin doctor` checks what a builder needs",
    };
    BuildEvent::Failed {
        error: format!("no builder could be started: {refusal}"),
        step: None,
        hint: Some(hint.into()),
        last_lines: vec![],
    }
}

fn unexplained(error: String, last_lines: VecDeque<String>) -> BuildEvent {
    BuildEvent::Failed {
        error,
        step: None,
        hint: Some("deploy again; if it stays so, `dunlin doctor` checks what a builder needs".into()),
        last_lines: last_lines.into(),
    }
}

/// Splits the two output streams into lines.
#[derive(Default)]
struct Lines {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], is_stdout: bool) -> Vec<String> {
        let pending = if is_stdout { &mut self.stdout } else { &mut self.stderr };
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte == b'\n' || pending.len() >= MAX_LINE_BYTES {
                lines.push(String::from_utf8_lossy(pending).trim_end_matches('\r').to_owned());
                pending.clear();
            }
            if *byte != b'\n' {
                pending.push(*byte);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_a_stream_at_a_time_and_bounded() {
        let mut lines = Lines::default();
        assert!(lines.push(b"STEP 1", true).is_empty());
        assert_eq!(lines.push(b"warning\n", false), ["warning"]);
        assert_eq!(lines.push(b"/2: FROM x\r\nnext", true), ["STEP 1/2: FROM x"]);
        let long = lines.push(&[b'x'; MAX_LINE_BYTES + 10], false);
        assert_eq!(long.len(), 1);
        assert_eq!(long[0].len(), MAX_LINE_BYTES);
    }
}
