//! A command in a machine whose streams are ours.

use crate::args::RunArgs;
use crate::terminal::{self, Heard, Raw, Signals};
use crate::{CliError, Exit, Session};
use bytes::Bytes;
use dunlin_api::ApiError;
use dunlin_api::exec::{CHUNK_BYTES, ExecAsk, ExecEvent, ExecEvents, ExecInput, ExecSay, ExecStart, STDERR, STDOUT};
use dunlin_model::{AppName, MachineId};
use std::io::{self, Read, Write};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// Chunks between us and our own standard streams.
const QUEUE: usize = 8;
/// The server ends the session of a client that it has not heard of for 90 s.
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long a command that was told to end may take; after that we leave, which ends it.
const END_WITHIN: Duration = Duration::from_secs(10);
/// What shells say of a program that wrote to a pipe which nobody reads.
const BROKEN_PIPE: i32 = 128 + 13;

pub struct Program {
    pub command: Vec<String>,
    pub timeout: Option<u64>,
    pub args: RunArgs,
}

/// How following a command ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    /// Whoever took the output takes no more.
    NotRead,
    /// We were told to leave, and leave with this code.
    Left(i32),
}

/// Runs a command at our own standard streams. Its exit code becomes ours.
pub async fn attach(session: &Session, app: &AppName, id: &MachineId, program: Program) -> Result<Exit, CliError> {
    Ok(exit(run(session, app, id, program).await?))
}

/// The same, for whoever has something to do afterwards. Returns the exit code.
pub async fn run(session: &Session, app: &AppName, id: &MachineId, program: Program) -> Result<i32, CliError> {
    let RunArgs { user, container, tty, no_tty, term } = program.args;
    let has_tty = tty || !no_tty && terminal::is_interactive();
    let start = ExecStart {
        command: program.command,
        user,
        container,
        tty: has_tty.then(terminal::size),
        env: if has_tty { vec![("TERM".into(), term)] } else { vec![] },
        timeout: program.timeout,
        transfer: None,
    };
    let (input, events) = open(session, app, id, start).await?;
    // With --tty and a pipe there is nothing to be made raw.
    let raw = (has_tty && io::IsTerminal::is_terminal(&io::stdin())).then(Raw::enter).transpose()?;
    let (sink, printer) = print();
    let ended = follow(input, events, read_stdin(), sink).await;
    drop(raw);
    // What has come is printed before anything is said of its end.
    let _ = printer.join(); // it cannot panic
    match ended? {
        Ended::Exited(code) | Ended::Left(code) => Ok(code),
        Ended::NotRead => Ok(BROKEN_PIPE),
    }
}

/// The command's own code is the answer that scripts want; unless it is zero it is none of ours.
pub fn exit(code: i32) -> Exit {
    if code == 0 {
        return Exit::Ok;
    }
    let _ = io::stdout().flush();
    std::process::exit(code.clamp(1, 255))
}

/// Starts it; refusals are errors here.
pub async fn open(session: &Session, app: &AppName, id: &MachineId, start: ExecStart) -> Result<(ExecInput, ExecEvents), CliError> {
    let of_default = start.container.is_empty();
    let (mut input, mut events) = session.client.exec(&format!("/v1/apps/{app}/machines/{id}/exec/stream")).await?;
    input.ask(&ExecAsk::Start(start)).await?;
    match events.next().await? {
        Some(ExecEvent::Say(ExecSay::Started { .. })) => {
            input.keep_to_window().await?;
            Ok((input, events))
        }
        Some(ExecEvent::Say(ExecSay::Failed(body))) => {
            let error = failed(body);
            let hint = match of_default {
                true if error.message.contains("is not running") => "start the machine first, or see with `dunlin machine status` why it does not run",
                true => "the image has no such program? `dunlin ssh sftp get` copies its files without one",
                false => "name a container that the machine has, and a program of its image; without --container the default one is meant",
            };
            Err(if error.hint.is_none() { error.hint(hint) } else { error })
        }
        Some(_) => Err(ApiError::BadAnswer("the session began with something else than `started`".into()).into()),
        None => Err(gone()),
    }
}

fn failed(body: dunlin_api::ErrorBody) -> CliError {
    ApiError::Refused { http_status: body.status.http_status(), body }.into()
}

fn gone() -> CliError {
    let error: CliError = ApiError::Broken(io::ErrorKind::UnexpectedEof.into()).into();
    error.hint("the command ends with its session; run it again, or give long work a machine of its own")
}

/// Carries both ways until the end. Each way goes on while the other waits.
pub async fn follow(
    input: ExecInput,
    events: ExecEvents,
    source: mpsc::Receiver<Vec<u8>>,
    sink: mpsc::Sender<(u8, Bytes)>,
) -> Result<Ended, CliError> {
    let (signals, insisting) = (Signals::new()?, Signals::new()?);
    tokio::select! {
        ended = listen(events, sink) => ended,
        error = speak(input, source, signals) => Err(error),
        code = told_to_leave(insisting) => Ok(Ended::Left(code)),
    }
}

async fn listen(mut events: ExecEvents, sink: mpsc::Sender<(u8, Bytes)>) -> Result<Ended, CliError> {
    loop {
        let chunk = match events.next().await.map_err(|error| match error {
            ApiError::Broken(_) => gone(),
            other => other.into(),
        })? {
            Some(ExecEvent::Stdout(bytes)) => (STDOUT, bytes),
            Some(ExecEvent::Stderr(bytes)) => (STDERR, bytes),
            Some(ExecEvent::Say(ExecSay::Exit { exit_code })) => return Ok(Ended::Exited(exit_code)),
            Some(ExecEvent::Say(ExecSay::Failed(body))) => return Err(failed(body)),
            Some(ExecEvent::Say(ExecSay::Started { .. } | ExecSay::Taken { .. })) => continue,
            None => return Err(gone()),
        };
        if sink.send(chunk).await.is_err() {
            return Ok(Ended::NotRead);
        }
    }
}

/// Input waits here while the command reads none: sent, it would be in the way of signals.
/// Returns only when nothing more can be sent; the other way then says how it ended, if it hears it.
async fn speak(mut input: ExecInput, mut source: mpsc::Receiver<Vec<u8>>, mut signals: Signals) -> CliError {
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut open, mut next) = (true, None::<Vec<u8>>);
    loop {
        let sent = tokio::select! {
            () = input.room(), if next.is_some() => input.stdin(&next.take().unwrap_or_default()).await,
            bytes = source.recv(), if open && next.is_none() => match bytes {
                Some(bytes) => {
                    next = Some(bytes);
                    continue;
                }
                None => {
                    open = false;
                    input.ask(&ExecAsk::StdinEnd).await
                }
            },
            heard = signals.next() => match heard {
                Heard::Resized => input.ask(&ExecAsk::Resize(terminal::size())).await,
                Heard::Interrupt => input.ask(&ExecAsk::Signal { signal: "SIGINT".into() }).await,
                Heard::Terminate => input.ask(&ExecAsk::Signal { signal: "SIGTERM".into() }).await,
                Heard::Hangup => Ok(()),
            },
            _ = pings.tick() => input.ping().await,
        };
        if sent.is_err() {
            // The server's last word may be on its way.
            tokio::time::sleep(END_WITHIN).await;
            return gone();
        }
    }
}

/// The first signal is the command's, if it takes it; the next one is ours.
async fn told_to_leave(mut signals: Signals) -> i32 {
    let code = |heard| match heard {
        Heard::Interrupt => Some(128 + 2),
        Heard::Terminate => Some(128 + 15),
        Heard::Hangup => Some(128 + 1),
        Heard::Resized => None,
    };
    let mut next = async || loop {
        let heard = signals.next().await;
        if let Some(code) = code(heard) {
            return (heard, code);
        }
    };
    match next().await {
        (Heard::Hangup, code) => code, // nobody is there any more
        (Heard::Terminate, code) => match tokio::time::timeout(END_WITHIN, next()).await {
            Ok((_, code)) => code,
            Err(_) => code,
        },
        _ => next().await.1,
    }
}

/// On a thread of its own: a read of standard input cannot be called off, and must not hold up the end.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut chunk) {
                Ok(n) if n > 0 => {
                    if sender.blocking_send(chunk[..n].to_vec()).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    });
    receiver
}

/// On a thread of its own: whoever reads us may take their time, and the server must not think us gone.
fn print() -> (mpsc::Sender<(u8, Bytes)>, JoinHandle<()>) {
    let (sender, mut receiver) = mpsc::channel::<(u8, Bytes)>(QUEUE);
    let printer = thread::spawn(move || {
        while let Some((stream, bytes)) = receiver.blocking_recv() {
            let written = if stream == STDOUT { put(&mut io::stdout(), &bytes) } else { put(&mut io::stderr(), &bytes) };
            if written.is_err() {
                return;
            }
        }
    });
    (sender, printer)
}

fn put(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
