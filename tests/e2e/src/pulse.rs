//! A client at a constant rate: a request goes out at its time, whatever became of those before it, so that neither a
//! slow answer nor a gap hides what others would have met.

use crate::Namespace;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// After this a person has given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// One request and what became of it.
#[derive(Debug, Clone)]
pub struct Heard {
    /// When it went out.
    pub at: Instant,
    pub took: Duration,
    /// Status and body, or why there was none.
    pub answer: Result<(u16, String), String>,
}

/// Runs until it is stopped.
pub struct Pulse {
    stop: Arc<AtomicBool>,
    heard: Arc<Mutex<Vec<Heard>>>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// `GET path` of `host` at `to`, by somebody in `from`, so many times a second.
    pub fn start(from: &Namespace, to: SocketAddr, host: &str, path: &str, per_second: u32) -> Self {
        let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<Heard>>>::default());
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let (ends, all) = (stop.clone(), heard.clone());
        let thread = from.spawn(move || {
            let (began, step) = (Instant::now(), Duration::from_secs(1) / per_second);
            thread::scope(|scope| {
                for n in 0.. {
                    if ends.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::sleep((began + step * n).saturating_duration_since(Instant::now()));
                    let (request, all) = (&request, &all);
                    scope.spawn(move || {
                        let at = Instant::now();
                        let answer = ask(to, request, at).map_err(|error| error.to_string());
                        all.lock().unwrap().push(Heard { at, took: at.elapsed(), answer });
                    });
                }
            });
        });
        Self { stop, heard, thread: Some(thread) }
    }

    /// What was heard so far.
    pub fn heard(&self) -> Vec<Heard> {
        let mut heard = self.heard.lock().unwrap().clone();
        heard.sort_by_key(|heard| heard.at);
        heard
    }

    /// Waits for the answers that are under way.
    pub fn stop(mut self) -> Vec<Heard> {
        self.end();
        self.heard()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic in it was printed
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.end();
    }
}

impl Heard {
    pub fn is_good(&self) -> bool {
        matches!(self.answer, Ok((200, _)))
    }

    /// Of all that were heard, those that were not answered as they should.
    pub fn failed(all: &[Self]) -> Vec<&Self> {
        all.iter().filter(|heard| !heard.is_good()).collect()
    }

    /// Distinct bodies of those that were asked for after `at`, in the order of their requests.
    pub fn bodies_after(all: &[Self], at: Instant) -> Vec<String> {
        let mut bodies: Vec<String> = Vec::new();
        for body in all.iter().filter(|heard| heard.at > at && heard.is_good()).filter_map(|heard| heard.answer.as_ref().ok()) {
            if !bodies.contains(&body.1) {
                bodies.push(body.1.clone());
            }
        }
        bodies
    }

    /// The longest time without a good answer, between the first one and the last request.
    pub fn longest_gap(all: &[Self]) -> Duration {
        let mut good: Vec<Instant> = all.iter().filter(|heard| heard.is_good()).map(|heard| heard.at + heard.took).collect();
        good.sort();
        good.extend(all.iter().map(|heard| heard.at).max());
        good.windows(2).map(|pair| pair[1].saturating_duration_since(pair[0])).max().unwrap_or(Duration::MAX)
    }
}

fn ask(to: SocketAddr, request: &str, began: Instant) -> io::Result<(u16, String)> {
    let left = || PATIENCE.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&to, left())?;
    stream.set_write_timeout(Some(left()))?;
    stream.write_all(request.as_bytes())?;
    stream.set_read_timeout(Some(left()))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let cut = || io::Error::new(io::ErrorKind::UnexpectedEof, format!("the answer was cut off: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(cut)?;
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    if length.is_some_and(|length| length != body.len()) {
        return Err(cut());
    }
    Ok((status, body.to_owned()))
}
