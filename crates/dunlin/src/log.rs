//! The server's log goes to standard error, and its last lines stay in memory for `dunlin host debug`. Requests' lines are not
//! among them: those are of the access log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

const MAX_BYTES: usize = 384 << 10;
/// WARN and ERROR are kept apart, so that much chatter does not drive them out.
const MAX_TROUBLE_BYTES: usize = 64 << 10;
const MAX_LINE_BYTES: usize = 4 << 10;

static KEPT: Mutex<Kept> = Mutex::new(Kept { all: Ring::new(MAX_BYTES), trouble: Ring::new(MAX_TROUBLE_BYTES) });

struct Kept {
    all: Ring,
    trouble: Ring,
}

/// The last lines, and the last of those at WARN and ERROR.
pub fn last() -> (String, String) {
    let kept = kept();
    (kept.all.text(), kept.trouble.text())
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines, as many as have room.
struct Ring {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    max_bytes: usize,
}

impl Ring {
    const fn new(max_bytes: usize) -> Self {
        Self { lines: VecDeque::new(), bytes: 0, max_bytes }
    }

    fn push(&mut self, line: &[u8]) {
        let line = &line[..line.len().min(MAX_LINE_BYTES)];
        self.bytes += line.len();
        self.lines.push_back(line.into());
        while self.bytes > self.max_bytes {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
    }

    fn text(&self) -> String {
        let lines = self.lines.iter().map(|line| String::from_utf8_lossy(line));
        lines.flat_map(|line| [line.trim_end().to_owned(), "\n".to_owned()]).collect()
    }
}

/// Writes to both.
pub struct Tee;

pub struct Line {
    is_trouble: bool,
}

impl<'a> MakeWriter<'a> for Tee {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { is_trouble: false }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        Line { is_trouble: *meta.level() <= Level::WARN }
    }
}

impl Write for Line {
    /// Of one event all at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut kept = kept();
        kept.all.push(line);
        if self.is_trouble {
            kept.trouble.push(line);
        }
        drop(kept);
        io::stderr().write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_stay() {
        let mut ring = Ring::new(25);
        for n in 0..5 {
            ring.push(format!("line {n}....\n").as_bytes());
        }
        assert_eq!(ring.text(), "line 3....\nline 4....\n");
        ring.push(&[b'x'; 2 * MAX_LINE_BYTES]);
        assert_eq!(ring.text(), "", "longer than all of it");
    }
}
