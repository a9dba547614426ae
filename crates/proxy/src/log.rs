//! The access log: a line for each request, written by a thread of its own.
//!
//! A worker appends to a buffer; full ones, and what is left a moment after the last request, go through a
//! bounded channel to the writer. A sink that is slower than the traffic loses lines, which are counted; it
//! never holds up a request.

use dunlin_model::calendar::civil;
use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// About a hundred lines for one system call.
const BUFFER_BYTES: usize = 32 * 1024;
/// Buffers on their way to the writer: 2 MiB, a second of heavy traffic.
const QUEUE: usize = 64;
/// How long a line may wait for company before it is written.
const LINGER: Duration = Duration::from_millis(100);
/// Longest path in a line; the rest is cut.
const MAX_PATH: usize = 1024;

/// Where the access log goes, and how it looks.
pub struct AccessLog {
    pub format: LogFormat,
    pub sink: Box<dyn Write + Send>,
}

/// The same two as the server's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `2026-01-02T03:04:05.678901Z  INFO access: name=value ...`
    Text,
    /// One object a line, the values below `fields`.
    Json,
}

/// One request, when it has ended.
pub(crate) struct Line<'a> {
    pub request_id: &'a str,
    pub app: &'a str,
    pub machine: &'a str,
    pub client: &'a str,
    pub protocol: &'static str,
    pub is_tls: bool,
    pub method: &'a str,
    pub host: &'a str,
    pub path: &'a str,
    pub status: u16,
    pub code: &'static str,
    pub took: Duration,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub attempts: u32,
    pub is_complete: bool,
}

/// The writer's thread; it ends when the last [`Lines`] is gone.
pub(crate) fn start(log: AccessLog, lost: Arc<AtomicU64>) -> io::Result<(LogHandle, JoinHandle<()>)> {
    let (sender, receiver) = sync_channel(QUEUE);
    let handle = LogHandle { format: log.format, sender, lost: lost.clone() };
    let body = move || write(log.sink, receiver, &lost);
    Ok((handle, std::thread::Builder::new().name("access-log".into()).spawn(body)?))
}

fn write(mut sink: Box<dyn Write + Send>, buffers: Receiver<Vec<u8>>, lost: &AtomicU64) {
    for buffer in buffers {
        if let Err(error) = sink.write_all(&buffer).and_then(|()| sink.flush()) {
            // Once a buffer, and the sink may be the place where this would be read.
            tracing::debug!(%error, "the access log could not be written");
            lost.fetch_add(lines(&buffer), Relaxed);
        }
    }
}

fn lines(buffer: &[u8]) -> u64 {
    buffer.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// What a worker makes its [`Lines`] from.
#[derive(Clone)]
pub(crate) struct LogHandle {
    format: LogFormat,
    sender: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

/// One worker's end of the log.
pub(crate) struct Lines {
    to: Option<LogHandle>,
    buffer: RefCell<Vec<u8>>,
    /// The last second that a line was written in, as text.
    second: RefCell<(u64, String)>,
    /// Somebody sees to it that the buffer is written soon.
    is_due: Cell<bool>,
    due: Notify,
}

impl Lines {
    pub fn new(to: Option<LogHandle>) -> Self {
        Self {
            to,
            buffer: RefCell::default(),
            second: RefCell::new((u64::MAX, String::new())),
            is_due: Cell::new(false),
            due: Notify::new(),
        }
    }

    pub fn append(&self, line: &Line<'_>) {
        let Some(to) = &self.to else { return };
        let mut buffer = self.buffer.borrow_mut();
        if buffer.capacity() == 0 {
            buffer.reserve_exact(BUFFER_BYTES);
        }
        self.timestamp(&mut buffer, to.format);
        line.append(&mut buffer, to.format);
        if buffer.len() > BUFFER_BYTES - 2 * MAX_PATH {
            let full = std::mem::take(&mut *buffer);
            drop(buffer);
            send(to, full);
        } else if !self.is_due.replace(true) {
            self.due.notify_one();
        }
    }

    /// Writes lines that wait for company. Runs as a task of the worker.
    pub async fn flush_regularly(&self) {
        loop {
            self.due.notified().await;
            tokio::time::sleep(LINGER).await;
            self.is_due.set(false);
            self.flush();
        }
    }

    pub fn flush(&self) {
        let buffer = std::mem::take(&mut *self.buffer.borrow_mut());
        if let Some(to) = &self.to
            && !buffer.is_empty()
        {
            send(to, buffer);
        }
    }

    fn timestamp(&self, out: &mut Vec<u8>, format: LogFormat) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut second = self.second.borrow_mut();
        if second.0 != now.as_secs() {
            *second = (now.as_secs(), date_and_time(now.as_secs()));
        }
        if format == LogFormat::Json {
            out.extend_from_slice(b"{\"timestamp\":\"");
        }
        out.extend_from_slice(second.1.as_bytes());
        let mut micros = [b'0'; 7];
        let mut rest = now.subsec_micros();
        for digit in micros[1..].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        micros[0] = b'.';
        out.extend_from_slice(&micros);
        out.extend_from_slice(match format {
            LogFormat::Text => b"Z  INFO access:",
            LogFormat::Json => b"Z\",\"level\":\"INFO\",\"fields\":{",
        });
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.flush();
    }
}

fn send(to: &LogHandle, buffer: Vec<u8>) {
    if let Err(TrySendError::Full(buffer) | TrySendError::Disconnected(buffer)) = to.sender.try_send(buffer) {
        to.lost.fetch_add(lines(&buffer), Relaxed);
    }
}

enum Value<'a> {
    /// What a client may have chosen.
    Text(&'a str),
    Number(u64),
    Flag(bool),
}

impl Line<'_> {
    fn append(&self, out: &mut Vec<u8>, format: LogFormat) {
        let path = self.path.get(..MAX_PATH).unwrap_or(self.path);
        let fields = [
            ("request_id", Value::Text(self.request_id)),
            ("app", Value::Text(self.app)),
            ("machine", Value::Text(self.machine)),
            ("client", Value::Text(self.client)),
            ("protocol", Value::Text(self.protocol)),
            ("tls", Value::Flag(self.is_tls)),
            ("method", Value::Text(self.method)),
            ("host", Value::Text(self.host)),
            ("path", Value::Text(path)),
            ("status", Value::Number(self.status.into())),
            ("code", Value::Text(self.code)),
            ("duration_us", Value::Number(self.took.as_micros() as u64)),
            ("bytes_in", Value::Number(self.bytes_in)),
            ("bytes_out", Value::Number(self.bytes_out)),
            ("attempts", Value::Number(self.attempts.into())),
            ("complete", Value::Flag(self.is_complete)),
        ];
        match format {
            LogFormat::Text => {
                for (name, value) in fields {
                    out.push(b' ');
                    out.extend_from_slice(name.as_bytes());
                    out.push(b'=');
                    value.append(out, |byte| byte.is_ascii_graphic());
                }
            }
            LogFormat::Json => {
                for (n, (name, value)) in fields.into_iter().enumerate() {
                    out.extend_from_slice(if n == 0 { b"\"" } else { b",\"" });
                    out.extend_from_slice(name.as_bytes());
                    out.extend_from_slice(b"\":");
                    let is_quoted = matches!(value, Value::Text(_));
                    if is_quoted {
                        out.push(b'"');
                    }
                    value.append(out, |byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\');
                    if is_quoted {
                        out.push(b'"');
                    }
                }
                out.extend_from_slice(b"},\"target\":\"access\"}");
            }
        }
        out.push(b'\n');
    }
}

impl Value<'_> {
    /// No client breaks a line: what is not plain is written as `\u00..`, in both formats.
    fn append(&self, out: &mut Vec<u8>, is_plain: impl Fn(u8) -> bool) {
        match self {
            Self::Number(number) => decimal(out, *number),
            Self::Flag(true) => out.extend_from_slice(b"true"),
            Self::Flag(false) => out.extend_from_slice(b"false"),
            Self::Text(text) if text.bytes().all(&is_plain) => out.extend_from_slice(text.as_bytes()),
            Self::Text(text) => {
                for byte in text.bytes() {
                    if is_plain(byte) {
                        out.push(byte);
                    } else {
                        // Writing to memory does not fail.
                        let _ = write!(out, "\\u{byte:04x}");
                    }
                }
            }
        }
    }
}

pub(crate) fn decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// `2026-01-02T03:04:05` of a second since 1970.
fn date_and_time(seconds: u64) -> String {
    let ((year, month, day), second) = (civil(seconds / 86_400), seconds % 86_400);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn the_calendar_has_leap_days() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_709_251_199, "2024-02-29T23:59:59"),
            (1_709_251_200, "2024-03-01T00:00:00"),
            (1_798_761_599, "2026-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(date_and_time(seconds), text);
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn line(path: &str) -> Line<'_> {
        Line {
            request_id: "01J",
            app: "web",
            machine: "m1",
            client: "127.0.0.1",
            protocol: "HTTP/1.1",
            is_tls: true,
            method: "GET",
            host: "web.example.test",
            path,
            status: 200,
            code: "",
            took: Duration::from_micros(1_234),
            bytes_in: 0,
            bytes_out: 98_765_432_109,
            attempts: 1,
            is_complete: true,
        }
    }

    fn written(format: LogFormat, paths: &[&str]) -> String {
        let sink = Sink::default();
        let (handle, thread) = start(AccessLog { format, sink: Box::new(sink.clone()) }, Arc::default()).unwrap();
        let lines = Lines::new(Some(handle));
        for path in paths {
            lines.append(&line(path));
        }
        drop(lines);
        thread.join().unwrap();
        String::from_utf8(std::mem::take(&mut *sink.0.lock().unwrap())).unwrap()
    }

    #[test]
    fn no_client_can_break_a_line() {
        let hostile = "/a\"b\\c\nd é";
        let text = written(LogFormat::Text, &["/plain", hostile]);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains(
            "Z  INFO access: request_id=01J app=web machine=m1 client=127.0.0.1 protocol=HTTP/1.1 tls=true \
             method=GET host=web.example.test path=/plain status=200 code= duration_us=1234 bytes_in=0 \
             bytes_out=98765432109 attempts=1 complete=true\n"
        ), "{text}");
        let json = written(LogFormat::Json, &["/plain", hostile]);
        let values: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(values[0]["fields"]["duration_us"], 1234);
        assert_eq!(values[0]["target"], "access");
        assert!(values[1]["fields"]["path"].as_str().unwrap().starts_with("/a\"b\\c\nd "));
    }

    /// A sink that takes nothing, as a pipe that nobody reads.
    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv(); // an error says that the test is over
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_sink_loses_lines_and_holds_nobody_up() {
        let (release, stuck) = std::sync::mpsc::channel();
        let lost = Arc::new(AtomicU64::new(0));
        let log = AccessLog { format: LogFormat::Text, sink: Box::new(Stuck(stuck)) };
        let (handle, thread) = start(log, lost.clone()).unwrap();
        let lines = Lines::new(Some(handle));
        let path = format!("/{}", "a".repeat(4 * MAX_PATH));
        while lost.load(Relaxed) == 0 {
            lines.append(&line(&path));
        }
        drop(release);
        drop(lines);
        thread.join().unwrap();
    }
}
