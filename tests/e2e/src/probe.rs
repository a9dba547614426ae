//! A client that never rests: one new connection after the other, so that a gap of any length shows.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(60);

/// What became of all requests.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub good: usize,
    /// Connections that were refused or could not be made: there must never be one.
    pub refused: Vec<String>,
    /// Connected and then cut off without a whole answer.
    pub cut: Vec<String>,
    /// Answers other than 200.
    pub bad: Vec<String>,
    /// Distinct bodies in the order in which they first came.
    pub bodies: Vec<String>,
    pub slowest: Duration,
}

/// Runs until [`Probe::stop`].
pub struct Probe {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Seen>>,
}

impl Probe {
    /// `threads` clients, each with one request at a time, to `http://<app>.localhost:<port>/`.
    pub fn start(app: &str, port: u16, threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let run = || {
            let (stop, app) = (stop.clone(), app.to_owned());
            thread::spawn(move || {
                let mut seen = Seen::default();
                while !stop.load(Ordering::Relaxed) {
                    seen.one(&app, port);
                }
                seen
            })
        };
        let threads = (0..threads).map(|_| run()).collect();
        Self { stop, threads }
    }

    pub fn stop(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Seen::default();
        for thread in self.threads {
            let seen = thread.join().unwrap();
            all.good += seen.good;
            all.refused.extend(seen.refused);
            all.cut.extend(seen.cut);
            all.bad.extend(seen.bad);
            for body in seen.bodies {
                if !all.bodies.contains(&body) {
                    all.bodies.push(body);
                }
            }
            all.slowest = all.slowest.max(seen.slowest);
        }
        all
    }
}

impl Seen {
    fn one(&mut self, app: &str, port: u16) {
        let began = Instant::now();
        let mut stream = match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => stream,
            Err(e) => return self.refused.push(e.to_string()),
        };
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: {app}.localhost\r\nconnection: close\r\n\r\n");
        let mut answer = Vec::new();
        let exchanged = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut answer));
        self.slowest = self.slowest.max(began.elapsed());
        let text = String::from_utf8_lossy(&answer);
        match exchanged {
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.bad.push(format!("no answer within {TIMEOUT:?}")),
            Err(e) => self.cut.push(e.to_string()),
            Ok(_) if answer.is_empty() => self.cut.push("closed without an answer".into()),
            Ok(_) => match text.split_once("\r\n\r\n") {
                Some((head, body)) if length(head) != Some(body.len()) => self.cut.push(format!("half a body: {text}")),
                Some((head, body)) if head.starts_with("HTTP/1.1 200") => {
                    self.good += 1;
                    if !self.bodies.iter().any(|known| known == body) {
                        self.bodies.push(body.to_owned());
                    }
                }
                Some(_) => self.bad.push(text.into_owned()),
                None => self.cut.push(format!("half an answer: {text}")),
            },
        }
    }
}

fn length(head: &str) -> Option<usize> {
    let line = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned));
    line?.trim().parse().ok()
}
