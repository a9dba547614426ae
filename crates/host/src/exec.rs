//! A command beside a machine's program, its streams carried over channels.

use crate::Shared;
use crate::agent::chain;
use dunlin_api::{ExecOutput, ExecRequest, ExecSession, Refusal};
use dunlin_runtime::{Client, ExecHandle, ExecSpec, RuntimeError};
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, error::TrySendError};

/// Chunks that wait for a slow reader; then the command itself waits.
const QUEUE: usize = 64;
const CHUNK_BYTES: usize = 32 * 1024;
/// How often a session looks whether anybody still listens.
const LOOK: Duration = Duration::from_millis(200);
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
/// Each takes four threads.
pub const MAX_SESSIONS: usize = 128;
/// A reader that takes nothing is looked after this often.
const FULL_PAUSE: Duration = Duration::from_millis(20);
/// How long the end of a command waits for a reader.
const LAST_WORDS: Duration = Duration::from_secs(10);

pub async fn start(shared: &Shared, request: ExecRequest) -> Result<ExecSession, Refusal> {
    let Ok(turn) = shared.sessions.clone().try_acquire_owned() else {
        return Err(Refusal::Failed(format!("{MAX_SESSIONS} commands run on this host; end one, or try again")));
    };
    let machine_dir = shared.machine_dir(request.machine.as_str());
    let (sender, output) = mpsc::channel(QUEUE);
    let machine = request.machine.clone();
    let started = tokio::task::spawn_blocking(move || begin(&machine_dir, request, sender, turn)).await;
    match started.map_err(|e| Refusal::Failed(e.to_string()))? {
        Ok(()) => Ok(ExecSession { output }),
        Err(RuntimeError::NotRunning) => Err(Refusal::Invalid(format!(
            "machine {machine} is not running; `dunlin machine start {machine}` starts it"
        ))),
        Err(error) => Err(Refusal::Invalid(chain(&error))),
    }
}

fn begin(
    machine_dir: &Path,
    request: ExecRequest,
    sender: mpsc::Sender<ExecOutput>,
    turn: OwnedSemaphorePermit,
) -> Result<(), RuntimeError> {
    let pipe = || std::io::pipe().map_err(|source| RuntimeError::Io { what: "no pipe".into(), source });
    let ((stdin_reader, mut stdin), (stdout, stdout_writer), (stderr, stderr_writer)) = (pipe()?, pipe()?, pipe()?);
    let client = Client::connect(machine_dir)?;
    let spec = ExecSpec { command: request.command, env: request.env, ..ExecSpec::default() };
    let stdio: [OwnedFd; 3] = [stdin_reader.into(), stdout_writer.into(), stderr_writer.into()];
    let handle = client.exec(spec, stdio)?;
    let timeout = Duration::from_millis(request.timeout_ms.min(MAX_TIMEOUT_MS));
    let deadline = Instant::now() + timeout;
    std::thread::spawn(move || {
        let _ = stdin.write_all(&request.stdin); // the command may not want it; its end ends this
    });
    let readers = [
        carry(stdout, sender.clone(), ExecOutput::Stdout, deadline),
        carry(stderr, sender.clone(), ExecOutput::Stderr, deadline),
    ];
    std::thread::spawn(move || {
        finish(handle, readers, &sender, timeout);
        drop(turn);
    });
    Ok(())
}

fn carry(
    mut from: PipeReader,
    to: mpsc::Sender<ExecOutput>,
    wrap: fn(bytes::Bytes) -> ExecOutput,
    deadline: Instant,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(n) = from.read(&mut chunk) {
            if n == 0 || !send(&to, wrap(bytes::Bytes::copy_from_slice(&chunk[..n])), deadline + LAST_WORDS) {
                return;
            }
        }
    })
}

/// False: nobody listens, or whoever does took nothing until the deadline.
pub fn send(to: &mpsc::Sender<ExecOutput>, mut output: ExecOutput, deadline: Instant) -> bool {
    loop {
        match to.try_send(output) {
            Ok(()) => return true,
            Err(TrySendError::Closed(_)) => return false,
            Err(TrySendError::Full(_)) if Instant::now() >= deadline => return false,
            Err(TrySendError::Full(full)) => output = full,
        }
        std::thread::sleep(FULL_PAUSE);
    }
}

/// Waits for the end, the time-out, or for nobody to be listening; dropping the handle ends the command.
fn finish(
    handle: ExecHandle,
    readers: [std::thread::JoinHandle<()>; 2],
    sender: &mpsc::Sender<ExecOutput>,
    timeout: Duration,
) {
    let deadline = Instant::now() + timeout;
    let last = loop {
        match handle.wait(LOOK) {
            Ok(Some(code)) => break ExecOutput::Exited(code),
            Err(_) => break ExecOutput::Failed("the machine stopped while the command ran".into()),
            Ok(None) if sender.is_closed() => return,
            Ok(None) if Instant::now() >= deadline => {
                break ExecOutput::Failed(format!("the command was ended after {} s", timeout.as_secs()));
            }
            Ok(None) => {}
        }
    };
    drop(handle);
    for reader in readers {
        let _ = reader.join(); // it cannot panic; output before the end comes before the end
    }
    send(sender, last, Instant::now() + LAST_WORDS); // or nobody listens any more
}
