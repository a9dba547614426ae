//! A machine's log: size-rotated files of one JSON object a line, written by its supervisor, read by
//! the agent. A full disk costs lines, never the machine, and so does a program that prints without end:
//! lost lines are counted, and said in the log once lines are written again.

use crate::files::now_ms;
use crate::spec::LogLimits;
use crate::sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A longer line is cut into several.
pub const MAX_LINE_BYTES: usize = 16 * 1024;
/// The stream of what the platform says.
const PLATFORM: &str = "system";

/// One line that a machine printed, or that the platform says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    /// Milliseconds since 1970.
    pub t: u64,
    /// `stdout`, `stderr` or `system`.
    pub stream: String,
    /// Of several containers or processes, whose it is; empty where there is no choice.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program: String,
    pub line: String,
    pub attempt: u64,
    /// Counts the lines of an attempt, those that were lost too.
    #[serde(default)]
    pub n: u64,
}

pub(crate) struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    attempt: u64,
    written: u64,
    number: u64,
    file: Option<File>,
    size: u64,
    /// Could not be written.
    lost: u64,
    rate: Rate,
    /// Were not written, for there were too many.
    over_rate: u64,
}

impl LogWriter {
    pub fn open(machine_dir: &Path, attempt: u64, limits: LogLimits) -> Self {
        let dir = machine_dir.join("log");
        let number = numbers(&dir).last().copied().unwrap_or(1);
        let rate = Rate::new(&limits, Instant::now());
        Self { dir, limits, attempt, written: 0, number, file: None, size: 0, lost: 0, rate, over_rate: 0 }
    }

    /// What the platform says is few, and never lost for being too much.
    pub fn line(&mut self, stream: &str, line: &str) {
        self.line_of("", stream, line);
    }

    /// The same, of one of several programs.
    pub fn line_of(&mut self, program: &str, stream: &str, line: &str) {
        let is_platforms = stream == PLATFORM;
        if !is_platforms && !self.rate.takes(line.len(), Instant::now()) {
            self.over_rate += 1;
            self.written += 1;
            return;
        }
        if self.say_losses().and_then(|()| self.try_write(program, stream, line)).is_err() {
            self.lost += 1;
        }
    }

    /// Called now and then: a program that printed too much and is silent now has lines to hear of, too.
    pub fn look(&mut self) {
        if self.over_rate > 0 && self.rate.has_rested(Instant::now()) {
            let _ = self.say_losses(); // said with the next line
        }
    }

    fn say_losses(&mut self) -> io::Result<()> {
        if self.lost > 0 {
            self.try_write("", PLATFORM, &format!("{} lost: the log could not be written", lines(self.lost)))?;
            self.lost = 0;
        }
        if self.over_rate > 0 {
            let rate = self.limits.bytes_per_second >> 10;
            self.try_write("", PLATFORM, &format!("{} lost: over the rate of {rate} KiB a second", lines(self.over_rate)))?;
            self.over_rate = 0;
        }
        Ok(())
    }

    fn try_write(&mut self, program: &str, stream: &str, line: &str) -> io::Result<()> {
        let record = LogRecord {
            t: now_ms(),
            stream: stream.to_owned(),
            program: program.to_owned(),
            line: line.to_owned(),
            attempt: self.attempt,
            n: self.written,
        };
        self.written += 1;
        let mut bytes = serde_json::to_vec(&record)?;
        bytes.push(b'\n');
        if self.size + bytes.len() as u64 > self.limits.file_bytes {
            self.file = None;
            self.number += 1;
        }
        let file = match &mut self.file {
            Some(file) => file,
            empty => {
                fs::create_dir_all(&self.dir)?;
                let path = self.dir.join(file_name(self.number));
                let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
                self.size = file.seek(SeekFrom::End(0))?;
                end_last_line(&mut file, &mut self.size)?;
                remove_oldest(&self.dir, self.limits.files);
                empty.insert(file)
            }
        };
        if let Err(e) = file.write_all(&bytes) {
            // Half a line may stand there now: cut it off, or it would spoil the next.
            let _ = file.set_len(self.size);
            return Err(e);
        }
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// How much may be written: a burst, and in the long run so many bytes a second. Once it was too much, nothing is
/// taken until a second's worth is there again: not every other line would be of use to anybody.
struct Rate {
    per_second: u64,
    burst: u64,
    left: u64,
    as_of: Instant,
    rests: bool,
}

impl Rate {
    /// A record's bytes besides its line.
    const RECORD_BYTES: usize = 80;

    fn new(limits: &LogLimits, now: Instant) -> Self {
        let kept = limits.file_bytes.saturating_mul(u64::from(limits.files));
        let burst = kept.max(limits.bytes_per_second);
        Self { per_second: limits.bytes_per_second, burst, left: burst, as_of: now, rests: false }
    }

    fn takes(&mut self, line_bytes: usize, now: Instant) -> bool {
        if !self.has_rested(now) {
            return false;
        }
        let cost = (line_bytes + Self::RECORD_BYTES) as u64;
        match self.left.checked_sub(cost) {
            Some(left) => self.left = left,
            None => self.rests = true,
        }
        !self.rests
    }

    fn has_rested(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.as_of).as_micros() as u64;
        let gained = gained.saturating_mul(self.per_second) / 1_000_000;
        // Shorter times than a byte takes add up.
        if gained > 0 {
            self.left = self.left.saturating_add(gained).min(self.burst);
            self.as_of = now;
        }
        self.rests &= self.left < self.per_second;
        !self.rests
    }
}

/// `1 line was`, `1,234 lines were`.
fn lines(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    format!("{} {}", groups.join(","), if number == 1 { "line was" } else { "lines were" })
}

/// A supervisor that was killed may have left half a line: it must not spoil the next.
fn end_last_line(file: &mut File, size: &mut u64) -> io::Result<()> {
    use std::io::Read;
    if *size == 0 {
        return Ok(());
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    if last != *b"\n" {
        file.write_all(b"\n")?;
        *size += 1;
    }
    Ok(())
}

fn file_name(number: u64) -> String {
    format!("{number:010}.jsonl")
}

fn numbers(dir: &Path) -> Vec<u64> {
    let listing = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut numbers: Vec<u64> = listing
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".jsonl")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

fn remove_oldest(dir: &Path, keep: u32) {
    let numbers = numbers(dir);
    for number in &numbers[..numbers.len().saturating_sub(keep as usize)] {
        let _ = fs::remove_file(dir.join(file_name(*number))); // tried again at the next rotation
    }
}

/// Splits a byte stream into lines.
#[derive(Default)]
pub(crate) struct LineSplitter {
    pending: Vec<u8>,
}

impl LineSplitter {
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for byte in bytes {
            if *byte == b'\n' || self.pending.len() >= MAX_LINE_BYTES {
                line(&String::from_utf8_lossy(&self.pending));
                self.pending.clear();
            }
            if *byte != b'\n' {
                self.pending.push(*byte);
            }
        }
    }

    /// The rest without a newline, at the end of the stream.
    pub fn finish(&mut self, mut line: impl FnMut(&str)) {
        if !self.pending.is_empty() {
            line(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        }
    }
}

/// Wakes a reader when one of the machines that it follows has printed.
pub struct LogWatch(OwnedFd);

impl LogWatch {
    pub fn new() -> io::Result<Self> {
        sys::watcher().map(Self)
    }

    /// Adds a machine; one that is there already stays. Whoever then reads its log and finds nothing misses nothing by
    /// waiting. A machine that was never started has no log yet: `NotFound`.
    pub fn add(&self, machine_dir: &Path) -> io::Result<()> {
        sys::watch(self.0.as_fd(), &machine_dir.join("log"))
    }

    /// Whether something was written within this time.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(false),
            ready => drop(ready?),
        }
        let mut events = [0; 4096];
        loop {
            match nix::unistd::read(&self.0, &mut events) {
                Ok(n) if n > 0 => {}
                Ok(_) | Err(Errno::EAGAIN) => return Ok(true),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Where a reader stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogPosition {
    number: u64,
    offset: u64,
}

/// Records after `position`, at most `limit`, and where to go on. A default position is the oldest line.
pub fn read_logs(machine_dir: &Path, position: LogPosition, limit: usize) -> io::Result<(Vec<LogRecord>, LogPosition)> {
    let dir = machine_dir.join("log");
    let mut at = position;
    let mut records = Vec::new();
    for number in numbers(&dir) {
        if number < position.number || records.len() >= limit {
            continue;
        }
        let offset = if number == position.number { position.offset } else { 0 };
        at = LogPosition { number, offset };
        let mut file = match File::open(dir.join(file_name(number))) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue, // rotated away meanwhile
            Err(e) => return Err(e),
        };
        file.seek(SeekFrom::Start(offset))?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while records.len() < limit && reader.read_until(b'\n', &mut line)? > 0 {
            if line.last() != Some(&b'\n') {
                break; // being written
            }
            at.offset += line.len() as u64;
            if let Ok(record) = serde_json::from_slice(&line) {
                records.push(record);
            }
            line.clear();
        }
    }
    Ok((records, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_rotation_and_are_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LogLimits { file_bytes: 400, files: 3, ..LogLimits::default() };
        let mut writer = LogWriter::open(dir.path(), 1, limits);
        for i in 0..6 {
            writer.line("stdout", &format!("line {i}"));
        }
        let (first, at) = read_logs(dir.path(), LogPosition::default(), 2).unwrap();
        let (rest, at) = read_logs(dir.path(), at, 100).unwrap();
        let lines: Vec<_> = first.iter().chain(&rest).map(|r| r.line.as_str()).collect();
        assert_eq!(lines, ["line 0", "line 1", "line 2", "line 3", "line 4", "line 5"]);
        assert!(read_logs(dir.path(), at, 100).unwrap().0.is_empty());
        for i in 0..100 {
            writer.line("stdout", &format!("more {i}"));
        }
        assert!(numbers(&dir.path().join("log")).len() <= 3, "old files are removed");
        let mut writer = LogWriter::open(dir.path(), 2, limits);
        writer.line("stderr", "after a restart");
        let (all, _) = read_logs(dir.path(), LogPosition::default(), 1000).unwrap();
        assert_eq!(all.last().unwrap().line, "after a restart");
        let newest = numbers(&dir.path().join("log")).pop().unwrap();
        let mut file = OpenOptions::new().append(true).open(dir.path().join("log").join(file_name(newest))).unwrap();
        file.write_all(b"{\"half\": \"a li").unwrap();
        LogWriter::open(dir.path(), 3, limits).line("stdout", "after a kill");
        let (all, _) = read_logs(dir.path(), LogPosition::default(), 1000).unwrap();
        assert_eq!(all.last().unwrap().line, "after a kill");
    }

    #[test]
    fn too_many_lines_are_lost_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        // A second's worth is never there again.
        let limits = LogLimits { file_bytes: 1000, files: 2, bytes_per_second: 0 };
        let mut writer = LogWriter::open(dir.path(), 1, limits);
        for i in 0..2000 {
            writer.line("stdout", &format!("line {i}"));
        }
        writer.line("system", "ended");
        let (records, _) = read_logs(dir.path(), LogPosition::default(), 1000).unwrap();
        let said: Vec<_> = records.iter().rev().take(2).map(|r| (r.stream.as_str(), r.line.as_str())).collect();
        assert_eq!(said[0], ("system", "ended"));
        let kept = 2000 / (Rate::RECORD_BYTES as u64 + 6 + 1);
        let lost = records[records.len() - 2].line.split(' ').next().unwrap().replace(',', "").parse::<u64>().unwrap();
        assert!((2000 - kept - 2..2000).contains(&lost), "{said:?}");
        assert!(said[1].1.ends_with("lines were lost: over the rate of 0 KiB a second"), "{said:?}");
        assert_eq!(records.last().unwrap().n, 2001, "lost lines are counted too");
        assert_eq!(lines(1_234_567), "1,234,567 lines were");
        assert_eq!(lines(1), "1 line was");
    }

    #[test]
    fn a_rate_is_a_burst_and_then_so_much_a_second() {
        let start = Instant::now();
        let limits = LogLimits { file_bytes: 1000, files: 2, bytes_per_second: 1000 };
        let mut rate = Rate::new(&limits, start);
        let line = 100 - Rate::RECORD_BYTES;
        let taken = |rate: &mut Rate, at: Duration| (0..100).filter(|_| rate.takes(line, start + at)).count();
        assert_eq!(taken(&mut rate, Duration::ZERO), 20);
        assert_eq!(taken(&mut rate, Duration::from_millis(500)), 0, "it rests");
        assert_eq!(taken(&mut rate, Duration::from_millis(1000)), 10);
        assert_eq!(taken(&mut rate, Duration::from_secs(60)), 20, "never more than the burst");
    }

    #[test]
    fn a_reader_is_woken_by_what_is_printed() {
        let dir = tempfile::tempdir().unwrap();
        let watch = LogWatch::new().unwrap();
        assert_eq!(watch.add(dir.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        let mut writer = LogWriter::open(dir.path(), 1, LogLimits { file_bytes: 300, ..LogLimits::default() });
        writer.line("stdout", "before");
        watch.add(dir.path()).unwrap();
        watch.add(dir.path()).unwrap();
        assert!(!watch.wait(Duration::ZERO).unwrap());
        let minute = Duration::from_secs(60);
        for i in 0..20 {
            writer.line("stdout", &format!("line {i}, also in the next file"));
            assert!(watch.wait(minute).unwrap());
            assert!(!watch.wait(Duration::ZERO).unwrap());
        }
    }

    #[test]
    fn long_lines_are_cut() {
        let mut splitter = LineSplitter::default();
        let mut lines = Vec::new();
        splitter.push(&vec![b'x'; MAX_LINE_BYTES * 2 + 1], |line| lines.push(line.len()));
        splitter.finish(|line| lines.push(line.len()));
        assert_eq!(lines, [MAX_LINE_BYTES, MAX_LINE_BYTES, 1]);
    }
}
