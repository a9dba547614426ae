//! A command beside a machine's program, its streams carried over channels. A session is a few tasks and
//! no thread, so that one whose client stalls costs its buffers only.

use crate::agent::chain;
use crate::{Shared, convert};
use bytes::Bytes;
use dunlin_api::shares::Full;
use dunlin_api::{ExecControl, ExecOutput, ExecProgram, ExecRequest, ExecSession, ExecStdin, Refusal};
use dunlin_model::AppName;
use dunlin_runtime::{Client, ExecHandle, ExecSpec, Phase, RuntimeError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

/// Chunks that wait for a slow reader; then the command itself waits.
const QUEUE: usize = 64;
/// Chunks that wait for a command which does not read; then the client waits.
const STDIN_QUEUE: usize = 16;
const CONTROL_QUEUE: usize = 16;
const CHUNK_BYTES: usize = 32 * 1024;
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
/// Of all machines, and half of them of one app; each has up to three megabytes in its queues.
pub const MAX_SESSIONS: usize = 128;
/// How long what a command said is kept for its reader after the command was ended.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// What a hung-up terminal's programs have to tidy up.
const HANGUP_GRACE: Duration = Duration::from_secs(2);
/// What the key for the end of the input sends.
const END_KEY: u8 = 4;

pub async fn start(shared: &Shared, app: &AppName, request: ExecRequest) -> Result<ExecSession, Refusal> {
    let turn = shared.sessions.take(Some(app), 1).map_err(|full| {
        Refusal::Busy(match full {
            Full::One => format!("{} commands run in the machines of app {app} on this host, and an app may have no more", shared.sessions.most_of_one()),
            Full::All => format!("{MAX_SESSIONS} commands run on this host, and it takes no more"),
        })
    })?;
    let attached = shared.attached.begin(&request.machine);
    begin(shared, request, (turn, attached)).await
}

/// Runs it; `held` is let go when it has ended.
pub async fn begin(shared: &Shared, request: ExecRequest, held: impl Send + 'static) -> Result<ExecSession, Refusal> {
    let machine_dir = shared.machine_dir(request.machine.as_str());
    let machine = request.machine.clone();
    let asked = request.clone();
    let begun = tokio::task::spawn_blocking(move || ask(&machine_dir, asked)).await;
    let begun = match begun.map_err(|e| Refusal::Failed(e.to_string()))? {
        Ok(begun) => begun,
        Err(RuntimeError::NotRunning) => {
            return Err(Refusal::Invalid(format!(
                "machine {machine} is not running; `dunlin machine start {machine}` starts it"
            )));
        }
        Err(error) => return Err(Refusal::Invalid(chain(&error))),
    };
    let live = begun.live().map_err(|e| Refusal::Failed(format!("the session's streams cannot be followed: {e}")))?;
    let (output_sender, output) = mpsc::channel(QUEUE);
    let (stdin_sender, stdin) = mpsc::channel(STDIN_QUEUE);
    let (control, controls) = mpsc::channel(CONTROL_QUEUE);
    let stdin_sender = match request.stdin {
        ExecStdin::Open => Some(stdin_sender),
        ExecStdin::Whole(bytes) => {
            let _ = stdin_sender.try_send(bytes); // there is room for the first
            None
        }
    };
    let limits = Limits {
        deadline: Instant::now() + Duration::from_millis(request.timeout_ms.min(MAX_TIMEOUT_MS)),
        timeout: Duration::from_millis(request.timeout_ms.min(MAX_TIMEOUT_MS)),
        idle: Duration::from_millis(request.idle_ms.min(MAX_TIMEOUT_MS)),
    };
    tokio::spawn(async move {
        live.run(output_sender, stdin, controls, limits).await;
        drop(held);
    });
    Ok(ExecSession { output, stdin: stdin_sender, control })
}

/// What the supervisor gave.
struct Begun {
    handle: ExecHandle,
    streams: Streams,
}

enum Streams {
    Terminal(OwnedFd),
    Pipes { stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd },
}

fn ask(machine_dir: &Path, request: ExecRequest) -> Result<Begun, RuntimeError> {
    let client = Client::connect(machine_dir)?;
    let (command, transfer) = match request.program {
        ExecProgram::Command(command) => (command, None),
        ExecProgram::Transfer(transfer) => (vec![], Some(transfer)),
    };
    let copies = transfer.is_some();
    // One that waits to be started has its supervisor already.
    let refused = |error| match Client::connect(machine_dir).and_then(|client| client.status()) {
        Ok(status) if status.phase == Phase::Created => RuntimeError::NotRunning,
        _ => error,
    };
    let spec = ExecSpec {
        command,
        env: request.env,
        user: request.user,
        container: request.container,
        transfer,
        ..ExecSpec::default()
    };
    if let Some(size) = request.tty.filter(|_| !copies) {
        let size = dunlin_runtime::WindowSize { rows: size.rows, columns: size.columns };
        let (handle, master) = client.exec_tty(spec, size).map_err(refused)?;
        return Ok(Begun { handle, streams: Streams::Terminal(master) });
    }
    let pipe = || std::io::pipe().map_err(|source| RuntimeError::Io { what: "no pipe".into(), source });
    let ((stdin_reader, stdin), (stdout, stdout_writer), (stderr, stderr_writer)) = (pipe()?, pipe()?, pipe()?);
    let handle = client.exec(spec, [stdin_reader.into(), stdout_writer.into(), stderr_writer.into()]).map_err(refused)?;
    let streams = Streams::Pipes { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
    Ok(Begun { handle, streams })
}

impl Begun {
    fn live(self) -> io::Result<Live> {
        let (stdin, stdout, stderr, terminal) = match self.streams {
            Streams::Terminal(master) => {
                let master = Arc::new(stream(master)?);
                (master.clone(), master.clone(), None, Some(master))
            }
            Streams::Pipes { stdin, stdout, stderr } => {
                (Arc::new(stream(stdin)?), Arc::new(stream(stdout)?), Some(Arc::new(stream(stderr)?)), None)
            }
        };
        Ok(Live { handle: followed(self.handle)?, stdin, stdout, stderr, terminal })
    }
}

type Stream = AsyncFd<File>;

fn stream(fd: OwnedFd) -> io::Result<Stream> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    followed(File::from(fd))
}

#[expect(deprecated, reason = "the other way is `unsafe`, for types that do not own their descriptor; these do")]
fn followed<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(owner)
}

struct Limits {
    deadline: Instant,
    timeout: Duration,
    idle: Duration,
}

/// When a byte last went either way.
struct Activity {
    began: Instant,
    last_ms: AtomicU64,
}

impl Activity {
    fn note(&self) {
        self.last_ms.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }
}

/// A running command; dropping the handle ends it.
struct Live {
    handle: AsyncFd<ExecHandle>,
    stdin: Arc<Stream>,
    stdout: Arc<Stream>,
    stderr: Option<Arc<Stream>>,
    /// The same as the others, to be resized.
    terminal: Option<Arc<Stream>>,
}

impl Live {
    async fn run(
        self,
        output: mpsc::Sender<ExecOutput>,
        stdin: mpsc::Receiver<Bytes>,
        mut controls: mpsc::Receiver<ExecControl>,
        limits: Limits,
    ) {
        let Self { handle, stdin: to, stdout, stderr, terminal } = self;
        let activity = Arc::new(Activity { began: Instant::now(), last_ms: AtomicU64::new(0) });
        let mut writer = JoinSet::new();
        writer.spawn(feed(stdin, to, terminal.is_some(), activity.clone()));
        let mut readers = JoinSet::new();
        readers.spawn(carry(stdout, output.clone(), ExecOutput::Stdout, activity.clone()));
        if let Some(stderr) = stderr {
            readers.spawn(carry(stderr, output.clone(), ExecOutput::Stderr, activity.clone()));
        }
        let mut controlled = true;
        let last = loop {
            tokio::select! {
                code = ended(&handle) => break Some(match code {
                    Ok(code) => ExecOutput::Exited(code),
                    Err(_) => ExecOutput::Failed("the machine stopped while the command ran".into()),
                }),
                control = controls.recv(), if controlled => match control {
                    Some(control) => apply(&control, &handle, terminal.as_deref()),
                    None => controlled = false,
                },
                () = output.closed() => break None,
                () = sleep_until(limits.deadline) => {
                    let seconds = limits.timeout.as_secs();
                    break Some(ExecOutput::Failed(format!("the command was ended after {seconds} s")));
                }
                () = sleep_until(activity.last() + limits.idle) => {
                    if activity.last().elapsed() >= limits.idle {
                        let seconds = limits.idle.as_secs();
                        break Some(ExecOutput::Failed(format!("the command was ended after {seconds} s without a byte")));
                    }
                }
            }
        };
        writer.shutdown().await;
        let Some(last) = last else {
            readers.shutdown().await;
            if terminal.is_some() {
                drop(terminal); // the last one: the kernel hangs up
                let _ = timeout(HANGUP_GRACE, ended(&handle)).await; // then the supervisor ends them
            }
            return;
        };
        drop((handle, terminal));
        // All of them are gone now, or will be in a moment: what they said comes before their end.
        let patience = limits.deadline.max(Instant::now() + LAST_WORDS);
        let rest = async {
            while readers.join_next().await.is_some() {}
            let _ = output.send(last).await; // or nobody listens any more
        };
        let _ = timeout_at(patience, rest).await; // nobody took it
    }
}

async fn ended(handle: &AsyncFd<ExecHandle>) -> Result<i32, RuntimeError> {
    loop {
        let broken = |source| RuntimeError::Io { what: "the session cannot be followed".into(), source };
        let mut ready = handle.readable().await.map_err(broken)?;
        match handle.get_ref().wait(Duration::ZERO)? {
            Some(code) => return Ok(code),
            None => ready.clear_ready(),
        }
    }
}

fn apply(control: &ExecControl, handle: &AsyncFd<ExecHandle>, terminal: Option<&Stream>) {
    let done = match control {
        ExecControl::Resize(size) => {
            let size = rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
            terminal.map_or(Ok(()), |terminal| rustix::termios::tcsetwinsize(terminal.get_ref(), size)).map_err(|e| e.to_string())
        }
        ExecControl::Signal(signal) => convert::signal_number(signal)
            .map_err(|refusal| refusal.to_string())
            .and_then(|signal| handle.get_ref().signal(signal).map_err(|e| chain(&e))),
    };
    if let Err(error) = done {
        tracing::debug!(%error, ?control, "a command was not told");
    }
}

/// Until the stream's end, or until nobody listens.
async fn carry(from: Arc<Stream>, to: mpsc::Sender<ExecOutput>, wrap: fn(Bytes) -> ExecOutput, activity: Arc<Activity>) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let Ok(mut ready) = from.readable().await else { return };
        match ready.try_io(|from| from.get_ref().read(&mut chunk)) {
            Ok(Ok(n)) if n > 0 => {
                activity.note();
                if to.send(wrap(Bytes::copy_from_slice(&chunk[..n]))).await.is_err() {
                    return;
                }
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) => return, // a terminal that nobody has open any more says EIO
            Err(_would_block) => {}
        }
    }
}

/// Until the end of the input, or until the command takes no more.
async fn feed(mut from: mpsc::Receiver<Bytes>, to: Arc<Stream>, is_terminal: bool, activity: Arc<Activity>) {
    let mut last = None;
    while let Some(bytes) = from.recv().await {
        if write(&to, &bytes, &activity).await.is_err() {
            return;
        }
        last = bytes.last().copied().or(last);
    }
    if is_terminal {
        let _ = write(&to, end_of_input(last), &activity).await; // nobody reads it any more
    }
}

/// By the last byte before it. After half a line the key only hands that on; at the beginning of one it ends the input.
fn end_of_input(last: Option<u8>) -> &'static [u8] {
    match last {
        None | Some(b'\n' | b'\r' | END_KEY) => &[END_KEY],
        Some(_) => &[END_KEY, END_KEY],
    }
}

async fn write(to: &Stream, mut bytes: &[u8], activity: &Activity) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = to.writable().await?;
        match ready.try_io(|to| to.get_ref().write(bytes)) {
            Ok(Ok(n)) => {
                activity.note();
                bytes = &bytes[n..];
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
