//! Calls of root's own API as a program makes them: many, and none that starts a process.

use crate::PATIENCE;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than the longest wait that the API grants.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(20);

/// A clone is the same API.
#[derive(Clone)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    pub fn of(data: &Path) -> Self {
        Self { socket: data.join("run/api.sock") }
    }

    /// Status and body; an error if the server died before it had answered.
    pub fn once(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}\
             content-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let cut = || io::Error::new(io::ErrorKind::UnexpectedEof, "the answer was cut off");
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(cut)?;
        let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok());
        if length.is_some_and(|length| length != body.len()) {
            return Err(cut());
        }
        Ok((status, body.to_owned()))
    }

    /// Until a server has answered with something else than that it is about to be there.
    pub fn through_kills(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<(u16, String), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let story = match self.once(method, path, headers, body) {
                Ok((503, said)) => said,
                Ok(answer) => return Ok(answer),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                return Err(format!("{method} {path}: no answer within {PATIENCE:?}: {story}"));
            }
            thread::sleep(PAUSE);
        }
    }
}
