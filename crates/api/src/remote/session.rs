//! Sessions: a command with its input and output, and lines of logs. Both sides are here, since they are one protocol.
//!
//! Input and output go in windows: each frame of them takes a place, and gives it back once it was handed on. So a slow
//! reader never stops what else goes over the stream: signals, the input's end, and that the other side is still there.

use super::call::Tell;
use super::frame::{self, Frame};
use super::server::and_no_end;
use super::{CALL_WRITTEN, CHUNK_BYTES, Duplex, MAX_SESSION_BYTES};
use crate::host::{ExecControl, ExecOutput, ExecSession, LogLine, LogStream, Refusal};
use bytes::Bytes;
use dunlin_model::HostId;
use std::io;
use std::sync::{Arc, OnceLock};
use tokio::io::ReadHalf;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::sleep;

/// Frames that a command said and nobody has read yet.
const OUTPUT_WINDOW: usize = 64;
/// Frames that a command has not read yet.
const STDIN_WINDOW: usize = 16;
/// Signals and sizes of the terminal; more at once are too many.
const CONTROL_QUEUE: usize = 16;
const WRITE_QUEUE: usize = 8;
const LINE_QUEUE: usize = 64;
/// Of a line that does not fit into a frame, this much is told.
const CUT_LINE_BYTES: usize = 16 * 1024;

/// Places for frames under way.
struct Window {
    places: Semaphore,
    size: usize,
}

impl Window {
    fn new(size: usize) -> Arc<Self> {
        Arc::new(Self { places: Semaphore::new(size), size })
    }

    async fn take(&self) {
        if let Ok(place) = self.places.acquire().await {
            place.forget();
        }
    }

    fn give_back(&self) -> io::Result<()> {
        if self.places.available_permits() >= self.size {
            return Err(frame::garbage("a frame was handed on that was never sent"));
        }
        self.places.add_permits(1);
        Ok(())
    }
}

fn chunks(mut bytes: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!bytes.is_empty()).then(|| bytes.split_to(bytes.len().min(CHUNK_BYTES))))
}

/// What is sent after the other side has gone is lost, as everything that is not on its way yet.
async fn tell(to_writer: &mpsc::Sender<Frame>, tell: &Tell) {
    if let Ok(frame) = Frame::json(tell) {
        let _ = to_writer.send(frame).await;
    }
}

/// Into a queue that has as many places as the other side's window.
fn queue<T>(to: Option<&mpsc::Sender<T>>, what: T) -> io::Result<()> {
    let too_much = || frame::garbage("more was sent than there is room for");
    match to.map(|to| to.try_send(what)) {
        None => Err(frame::garbage("input after its end")),
        Some(Err(mpsc::error::TrySendError::Full(_))) => Err(too_much()),
        Some(Ok(()) | Err(mpsc::error::TrySendError::Closed(_))) => Ok(()),
    }
}

// The caller's side.

pub(super) fn exec(host: HostId, stream: Box<dyn Duplex>, whole: Option<Bytes>) -> ExecSession {
    let (said, output) = mpsc::channel(1); // the window is before it
    let (stdin, typed) = mpsc::channel(1);
    let (control, controls) = mpsc::channel(CONTROL_QUEUE);
    let stdin = match whole {
        None => Some(stdin),
        Some(bytes) => {
            let _ = stdin.try_send(bytes); // there is room for one
            None
        }
    };
    tokio::spawn(follow_exec(host, stream, said, typed, controls));
    ExecSession { output, stdin, control }
}

async fn follow_exec(
    host: HostId,
    stream: Box<dyn Duplex>,
    said: mpsc::Sender<ExecOutput>,
    typed: mpsc::Receiver<Bytes>,
    controls: mpsc::Receiver<ExecControl>,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (to_writer, frames) = mpsc::channel(WRITE_QUEUE);
    let (heard, inbox) = mpsc::channel(OUTPUT_WINDOW + 1);
    let window = Window::new(STDIN_WINDOW);
    let hears = async {
        if let Err(error) = hear_output(&mut reader, &heard, &window).await {
            let why = format!("host {host} was lost while the command ran: {error}");
            let _ = heard.send(ExecOutput::Failed(why)).await;
        }
        drop(heard);
    };
    let background = async {
        tokio::join!(
            hears,
            async { drop(frame::write_all(&mut writer, frames).await) }, // if it broke, the reader says so
            feed_remote(typed, &to_writer, &window),
            steer_remote(controls, &to_writer),
        );
    };
    tokio::select! {
        () = deliver(inbox, &said, &to_writer) => {}
        () = said.closed() => {}
        () = and_no_end(background) => {}
    }
}

/// Until the command's end.
async fn hear_output(reader: &mut ReadHalf<Box<dyn Duplex>>, heard: &mpsc::Sender<ExecOutput>, window: &Window) -> io::Result<()> {
    loop {
        let output = match frame::next(reader, MAX_SESSION_BYTES).await? {
            Frame::Stdout(bytes) => ExecOutput::Stdout(bytes),
            Frame::Stderr(bytes) => ExecOutput::Stderr(bytes),
            Frame::Taken => {
                window.give_back()?;
                continue;
            }
            Frame::Json(json) => match frame::parse(&json)? {
                Tell::Exited(code) => ExecOutput::Exited(code),
                Tell::Failed(why) => ExecOutput::Failed(why),
                other => return Err(frame::garbage(format!("{other:?} of a command"))),
            },
            Frame::Stdin(_) | Frame::Alive => return Err(frame::garbage("input from where the command runs")),
        };
        let is_last = matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed(_));
        queue(Some(heard), output)?;
        if is_last {
            return Ok(());
        }
    }
}

async fn deliver(mut inbox: mpsc::Receiver<ExecOutput>, said: &mpsc::Sender<ExecOutput>, to_writer: &mpsc::Sender<Frame>) {
    while let Some(output) = inbox.recv().await {
        let is_last = matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed(_));
        if said.send(output).await.is_err() || is_last {
            return;
        }
        let _ = to_writer.send(Frame::Taken).await; // the reader says when it broke
    }
}

async fn feed_remote(mut typed: mpsc::Receiver<Bytes>, to_writer: &mpsc::Sender<Frame>, window: &Window) {
    while let Some(bytes) = typed.recv().await {
        for chunk in chunks(bytes) {
            window.take().await;
            let _ = to_writer.send(Frame::Stdin(chunk)).await;
        }
    }
    tell(to_writer, &Tell::StdinEnd).await;
}

async fn steer_remote(mut controls: mpsc::Receiver<ExecControl>, to_writer: &mpsc::Sender<Frame>) {
    while let Some(control) = controls.recv().await {
        tell(to_writer, &Tell::Control(control)).await;
    }
}

pub(super) fn logs(host: HostId, stream: Box<dyn Duplex>) -> LogStream {
    let (sender, lines) = mpsc::channel(LINE_QUEUE);
    let followed = LogStream::new(lines);
    let broken = Arc::clone(&followed.broken);
    tokio::spawn(follow_logs(host, stream, sender, broken));
    followed
}

async fn follow_logs(host: HostId, stream: Box<dyn Duplex>, lines: mpsc::Sender<LogLine>, broken: Arc<OnceLock<Refusal>>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (held, frames) = mpsc::channel::<Frame>(1); // nothing is sent but that somebody is here
    tokio::select! {
        relayed = relay(&mut reader, &lines) => if let Err(error) = relayed {
            let _ = broken.set(Refusal::Unreachable { host, why: format!("its lines end: {error}") }); // set once
        },
        () = lines.closed() => {}
        () = and_no_end(async { drop(frame::write_all(&mut writer, frames).await) }) => {}
    }
    drop(held);
}

async fn relay(reader: &mut ReadHalf<Box<dyn Duplex>>, lines: &mpsc::Sender<LogLine>) -> io::Result<()> {
    loop {
        let Frame::Json(json) = frame::next(reader, MAX_SESSION_BYTES).await? else {
            return Err(frame::garbage("no line of a log"));
        };
        match frame::parse(&json)? {
            Tell::Line(line) => {
                if lines.send(line).await.is_err() {
                    return Ok(());
                }
            }
            Tell::LinesEnd => return Ok(()),
            other => return Err(frame::garbage(format!("{other:?} of a log"))),
        }
    }
}

// The host's side. Each returns when the caller has gone; what is left to be written is written until then.

pub(super) async fn serve_exec<S: Duplex>(mut reader: ReadHalf<S>, to_writer: mpsc::Sender<Frame>, session: ExecSession) {
    let ExecSession { output, stdin, control } = session;
    let (input, typed) = mpsc::channel(STDIN_WINDOW);
    let window = Window::new(OUTPUT_WINDOW);
    let works = async {
        tokio::select! {
            () = carry(output, &to_writer, &window) => {}
            () = and_no_end(feed(typed, stdin, &to_writer)) => {}
        }
        drop(to_writer); // then the writer comes to its end
        sleep(CALL_WRITTEN).await; // and the caller closes the stream
    };
    tokio::select! {
        _ = hear_input(&mut reader, input, control, &window) => {} // gone, or sends what it must not
        () = works => {}
    }
}

async fn hear_input<S: Duplex>(
    reader: &mut ReadHalf<S>,
    input: mpsc::Sender<Bytes>,
    control: mpsc::Sender<ExecControl>,
    window: &Window,
) -> io::Result<()> {
    let mut input = Some(input);
    loop {
        match frame::next(reader, MAX_SESSION_BYTES).await? {
            Frame::Stdin(bytes) => queue(input.as_ref(), bytes)?,
            Frame::Taken => window.give_back()?,
            Frame::Json(json) => match frame::parse(&json)? {
                Tell::StdinEnd => input = None,
                // The host takes them at once; one whose command has ended, no more.
                Tell::Control(told) => drop(control.send(told).await),
                other => return Err(frame::garbage(format!("{other:?} from a caller"))),
            },
            other => return Err(frame::garbage(format!("{other:?} from a caller"))),
        }
    }
}

async fn carry(mut output: mpsc::Receiver<ExecOutput>, to_writer: &mpsc::Sender<Frame>, window: &Window) {
    while let Some(said) = output.recv().await {
        let (bytes, wrap): (_, fn(Bytes) -> Frame) = match said {
            ExecOutput::Stdout(bytes) => (bytes, Frame::Stdout),
            ExecOutput::Stderr(bytes) => (bytes, Frame::Stderr),
            ExecOutput::Exited(code) => return tell(to_writer, &Tell::Exited(code)).await,
            ExecOutput::Failed(why) => return tell(to_writer, &Tell::Failed(why)).await,
        };
        for chunk in chunks(bytes) {
            window.take().await;
            let _ = to_writer.send(wrap(chunk)).await; // when the caller has gone, all this ends
        }
    }
}

async fn feed(mut typed: mpsc::Receiver<Bytes>, stdin: Option<mpsc::Sender<Bytes>>, to_writer: &mpsc::Sender<Frame>) {
    while let Some(bytes) = typed.recv().await {
        if let Some(stdin) = &stdin {
            let _ = stdin.send(bytes).await; // a command that reads no more loses it, as it does here
        }
        let _ = to_writer.send(Frame::Taken).await;
    }
}

pub(super) async fn serve_logs<S: Duplex>(mut reader: ReadHalf<S>, to_writer: mpsc::Sender<Frame>, stream: LogStream) {
    let works = async {
        let mut lines = stream.lines;
        while let Some(line) = lines.recv().await {
            let _ = to_writer.send(line_frame(line)).await; // when the caller has gone, all this ends
        }
        if stream.broken.get().is_none() {
            tell(&to_writer, &Tell::LinesEnd).await;
        }
        drop(to_writer);
        sleep(CALL_WRITTEN).await; // the caller closes the stream
    };
    tokio::select! {
        _ = frame::next(&mut reader, MAX_SESSION_BYTES) => {} // gone: it has nothing to say
        () = works => {}
    }
}

fn line_frame(line: LogLine) -> Frame {
    let fits = |frame: &Frame| matches!(frame, Frame::Json(json) if json.len() < MAX_SESSION_BYTES);
    let cut: String = line.line.chars().take(CUT_LINE_BYTES / 4).collect();
    let cut = LogLine { line: cut, ..line.clone() };
    let whole = Frame::json(&Tell::Line(line)).ok().filter(fits);
    whole.or_else(|| Frame::json(&Tell::Line(cut)).ok()).unwrap_or(Frame::Alive)
}
