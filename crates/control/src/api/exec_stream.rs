//! A command in a machine, its streams over a WebSocket: what terminals, pipes and copies of files use.

use super::{Caller, request_id};
use crate::failure::Failure;
use crate::owners::Owners;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::extract::{Extension, Path};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use dunlin_api::exec::{CHUNK_BYTES, ExecAsk, ExecSay, ExecStart, MAX_MESSAGE_BYTES, STDERR, STDIN, STDOUT, channel};
use dunlin_api::{
    ErrorBody, ExecControl, ExecOutput, ExecProgram, ExecRequest, ExecSession, ExecStdin, Refusal, WindowSize,
};
use dunlin_model::transfer::Transfer;
use dunlin_model::{AppName, MachineId};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, timeout, timeout_at};

/// Once it is connected a client says at once what it wants.
const START_WITHIN: Duration = Duration::from_secs(10);
/// A client that is there answers a ping: one that does not is gone, and nobody has told us.
const PING_EVERY: Duration = Duration::from_secs(5);
const SILENT_FOR: Duration = Duration::from_secs(90);
/// Nobody sits at a terminal for longer, and a job that says nothing for longer is not followed but forgotten.
const IDLE_MS: u64 = 4 * 3600 * 1000;
/// Longer work is a machine's own program.
const MAX_TIMEOUT_S: u64 = 24 * 3600;
/// How long the last words wait for the client to hang up.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Input that a command has not read and that we hold for it, so that signals behind it are heard.
const STDIN_WINDOW_BYTES: u64 = 512 * 1024;
/// A client that keeps to the window is always heard: it may be one message beyond.
const HELD_BYTES: usize = STDIN_WINDOW_BYTES as usize + MAX_MESSAGE_BYTES;
/// A terminal's sides: more is a mistake, and some programs reserve room for each cell.
const MAX_SIDE: u16 = 4096;

pub async fn stream(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Extension(caller): Extension<Caller>,
    ws: WebSocketUpgrade,
) -> Result<Response, Failure> {
    owners.machine(&app, &id).await?;
    let session = Session { owners, app, id, by: caller.name().to_owned(), request_id: request_id().unwrap_or_default() };
    let ws = ws.max_message_size(MAX_MESSAGE_BYTES).max_frame_size(MAX_MESSAGE_BYTES);
    Ok(ws.on_upgrade(move |socket| session.run(socket)))
}

struct Session {
    owners: Owners,
    app: AppName,
    id: MachineId,
    by: String,
    request_id: String,
}

impl Session {
    async fn run(self, socket: WebSocket) {
        let (mut to, mut from) = socket.split();
        let outcome = match self.begin(&mut from).await {
            Ok((session, program, tty)) => {
                let Self { app, id, by, request_id, .. } = &self;
                tracing::info!(%app, machine = %id, program, tty, by, request_id, "exec begins");
                let began = Instant::now();
                let outcome = carry(session, &mut to, &mut from).await;
                let seconds = began.elapsed().as_secs();
                tracing::info!(%app, machine = %id, program, tty, by, request_id, outcome, seconds, "exec ended");
                return;
            }
            Err(failure) => failure,
        };
        tracing::info!(app = %self.app, machine = %self.id, by = self.by, request_id = self.request_id, why = outcome.message, "exec refused");
        let body = self.body(outcome);
        finish(&mut to, &mut from, &ExecSay::Failed(body)).await;
    }

    fn body(&self, failure: Failure) -> ErrorBody {
        let Failure { code, message, hint } = failure;
        ErrorBody { error: message, status: code, hint, request_id: Some(self.request_id.clone()) }
    }

    async fn begin(&self, from: &mut SplitStream<WebSocket>) -> Result<(ExecSession, String, bool), Failure> {
        let first = timeout(START_WITHIN, from.next()).await;
        let Ok(Some(Ok(Message::Text(text)))) = first else {
            return Err(Failure::bad_request("the session's first message does not say what to start")
                .hint("send {\"type\": \"start\", \"command\": [\"ls\"]} as text"));
        };
        let start = match serde_json::from_str(&text) {
            Ok(ExecAsk::Start(start)) => start,
            Ok(_) => return Err(Failure::bad_request("the session's first message must be `start`")),
            Err(error) => return Err(Failure::invalid(format!("the message is not what it should be: {error}"))),
        };
        let (request, program) = request(&self.id, start)?;
        let tty = request.tty.is_some();
        Ok((self.owners.of(&self.id).await?.exec(request).await?, program, tty))
    }
}

/// With the name under which it is audited: of a command the program alone, for arguments may be secrets.
fn request(id: &MachineId, start: ExecStart) -> Result<(ExecRequest, String), Failure> {
    let (program, name) = match (start.command.first(), start.transfer) {
        (Some(name), None) => {
            let name = name.clone();
            (ExecProgram::Command(start.command), name)
        }
        (None, Some(transfer)) => {
            let name = match &transfer {
                Transfer::Get { path } => format!("get {path}"),
                Transfer::Put { path } => format!("put {path}"),
            };
            (ExecProgram::Transfer(transfer), name)
        }
        _ => return Err(Failure::invalid("`start` names either a command or a transfer")),
    };
    if start.tty.is_some() && matches!(program, ExecProgram::Transfer(_)) {
        return Err(Failure::invalid("a transfer has no terminal"));
    }
    let request = ExecRequest {
        machine: id.clone(),
        program,
        env: start.env,
        user: start.user,
        container: start.container,
        tty: start.tty.map(bounded),
        stdin: ExecStdin::Open,
        timeout_ms: start.timeout.unwrap_or(MAX_TIMEOUT_S).clamp(1, MAX_TIMEOUT_S) * 1000,
        idle_ms: IDLE_MS,
    };
    Ok((request, name))
}

fn bounded(size: WindowSize) -> WindowSize {
    WindowSize { rows: size.rows.min(MAX_SIDE), columns: size.columns.min(MAX_SIDE) }
}

type To = SplitSink<WebSocket, Message>;

/// Both ways until the command has ended or the client is gone; dropping the session ends the command.
/// Returns how it ended, for the audit.
async fn carry(session: ExecSession, to: &mut To, from: &mut SplitStream<WebSocket>) -> String {
    let ExecSession { mut output, stdin, control } = session;
    if say(to, &ExecSay::Started { stdin_window: STDIN_WINDOW_BYTES }).await.is_err() {
        return "the client went away".into();
    }
    // Each must go on while the other waits: a command that echoes stops reading when it is not read.
    let (taken, tell_taken) = watch::channel(None);
    let input = Input { to: stdin, waiting: BytesMut::new(), is_over: false, taken: 0, tell: taken };
    let ended = tokio::select! {
        why = listen(from, input, &control) => Err(why),
        ended = speak(&mut output, tell_taken, to) => ended,
    };
    match ended {
        Ok(last) => {
            let outcome = match &last {
                ExecSay::Exit { exit_code } => format!("exit code {exit_code}"),
                ExecSay::Failed(body) => body.error.clone(),
                ExecSay::Started { .. } | ExecSay::Taken { .. } => "started".into(),
            };
            finish(to, from, &last).await;
            outcome
        }
        Err(why) => why,
    }
}

async fn speak(
    output: &mut mpsc::Receiver<ExecOutput>,
    mut taken: watch::Receiver<Option<u64>>,
    to: &mut To,
) -> Result<ExecSay, String> {
    let mut pings = tokio::time::interval(PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            output = output.recv() => match output {
                Some(ExecOutput::Stdout(bytes)) => Message::Binary(channel(STDOUT, &bytes)),
                Some(ExecOutput::Stderr(bytes)) => Message::Binary(channel(STDERR, &bytes)),
                Some(ExecOutput::Exited(exit_code)) => return Ok(ExecSay::Exit { exit_code }),
                Some(ExecOutput::Failed(why)) => return Ok(failed(why)),
                None => return Ok(failed("what the command said was not read in time".into())),
            },
            Ok(()) = taken.changed() => {
                let Some(bytes) = *taken.borrow_and_update() else { continue };
                text(&ExecSay::Taken { bytes }).map_err(|error| error.to_string())?
            }
            _ = pings.tick() => Message::Ping(Bytes::new()),
        };
        to.send(message).await.map_err(|_| "the client went away".to_owned())?;
    }
}

fn failed(why: String) -> ExecSay {
    let Failure { code, message, hint } = Failure::from(Refusal::Failed(why));
    ExecSay::Failed(ErrorBody { error: message, status: code, hint, request_id: None })
}

/// The command's input on its way to it.
struct Input {
    /// `None`: it is over, or the command takes no more.
    to: Option<mpsc::Sender<Bytes>>,
    waiting: BytesMut,
    is_over: bool,
    taken: u64,
    /// Something, if the client wants to know.
    tell: watch::Sender<Option<u64>>,
}

impl Input {
    fn push(&mut self, bytes: &[u8]) {
        match self.to {
            Some(_) => self.waiting.extend_from_slice(bytes),
            None => self.took(bytes.len()),
        }
    }

    /// Hands on a part of what waits, once the command has room for it. Whoever stops waiting loses nothing.
    async fn feed(&mut self) {
        let Some(to) = &self.to else { return };
        let length = self.waiting.len().min(CHUNK_BYTES);
        let Ok(place) = to.reserve().await else {
            self.to = None; // it takes no more
            let length = self.waiting.len();
            self.waiting.clear();
            return self.took(length);
        };
        place.send(self.waiting.split_to(length).freeze());
        self.took(length);
        self.end_if_over();
    }

    fn end(&mut self) {
        self.is_over = true;
        self.end_if_over();
    }

    fn end_if_over(&mut self) {
        if self.is_over && self.waiting.is_empty() {
            self.to = None;
        }
    }

    fn took(&mut self, length: usize) {
        self.taken += length as u64;
        if self.tell.borrow().is_some() {
            self.tell_taken();
        }
    }

    fn tell_taken(&mut self) {
        self.tell.send_replace(Some(self.taken));
    }
}

/// Until the client is gone; returns why. What the command does not read yet is held, so that what comes behind it is heard.
async fn listen(from: &mut SplitStream<WebSocket>, mut input: Input, control: &mpsc::Sender<ExecControl>) -> String {
    let mut silent_at = Instant::now() + SILENT_FOR;
    loop {
        let message = tokio::select! {
            () = input.feed(), if !input.waiting.is_empty() => continue,
            message = timeout_at(silent_at.into(), from.next()), if input.waiting.len() <= HELD_BYTES => match message {
                Ok(Some(Ok(message))) => message,
                Ok(_) => return "the client went away".into(),
                Err(_) => return format!("the client was silent for {} s", SILENT_FOR.as_secs()),
            },
        };
        silent_at = Instant::now() + SILENT_FOR;
        match message {
            Message::Binary(bytes) if bytes.first() == Some(&STDIN) => input.push(&bytes[1..]),
            Message::Text(text) => match serde_json::from_str(&text) {
                // Refused only by a command that has ended, whose end the client hears next.
                Ok(ExecAsk::Resize(size)) => drop(control.send(ExecControl::Resize(bounded(size))).await),
                Ok(ExecAsk::Signal { signal }) => drop(control.send(ExecControl::Signal(signal)).await),
                Ok(ExecAsk::StdinEnd) => input.end(),
                Ok(ExecAsk::TellTaken) => input.tell_taken(),
                Ok(ExecAsk::Start(_)) | Err(_) => return "the client sent what no session understands".into(),
            },
            Message::Close(_) => return "the client hung up".into(),
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Binary(_) => return "the client sent bytes of no channel".into(),
        }
    }
}

async fn say(to: &mut To, say: &ExecSay) -> Result<(), axum::Error> {
    to.send(text(say)?).await
}

fn text(say: &ExecSay) -> Result<Message, axum::Error> {
    Ok(Message::Text(Utf8Bytes::from(serde_json::to_string(say).map_err(axum::Error::new)?)))
}

/// The last word. What the client still sends is read, or the kernel could take the word back with a reset.
async fn finish(to: &mut To, from: &mut SplitStream<WebSocket>, last: &ExecSay) {
    let closing = async {
        let speaking = async {
            let _ = say(to, last).await; // or the client is gone
            let _ = to.close().await;
        };
        let listening = async { while let Some(Ok(_)) = from.next().await {} };
        tokio::join!(speaking, listening);
    };
    let _ = timeout(CLOSE_WITHIN, closing).await; // it does not hang up: we do
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(start: serde_json::Value, expected: Option<&str>) {
        let id = MachineId::from_random([0; 7]);
        let start = serde_json::from_value(start).map_err(|_| ()).and_then(|start| request(&id, start).map_err(|_| ()));
        assert_eq!(start.ok().map(|(_, name)| name).as_deref(), expected);
    }

    #[test]
    fn a_start_is_one_program() {
        use serde_json::json;
        check(json!({ "command": ["psql", "secret"] }), Some("psql"));
        check(json!({ "transfer": { "get": { "path": "/etc" } } }), Some("get /etc"));
        check(json!({ "command": ["x"], "transfer": { "put": { "path": "/etc" } } }), None);
        check(json!({}), None);
        check(json!({ "transfer": { "get": { "path": "/" } }, "tty": { "rows": 1, "columns": 1 } }), None);
        check(json!({ "command": ["x"], "unknown": 1 }), None);
    }

    #[test]
    fn limits_hold() {
        let id = MachineId::from_random([0; 7]);
        let tty = Some(WindowSize { rows: u16::MAX, columns: 80 });
        let start = ExecStart { command: vec!["x".into()], tty, timeout: Some(u64::MAX), ..ExecStart::default() };
        let (request, _) = request(&id, start).ok().unwrap();
        assert_eq!((request.timeout_ms, request.tty), (24 * 3600 * 1000, Some(WindowSize { rows: 4096, columns: 80 })));
    }
}
