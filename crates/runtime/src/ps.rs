//! The processes of a machine as the kernel shows them to its host. What a program says of itself (its command
//! line, the name of its directory) is a tenant's text: bounded, and without control characters.

use crate::cgroup::{CgroupError, MachineCgroup};
use crate::net::ports::{self, ListenSocket};
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};

/// A machine may have as many processes and threads as this; of more, the lowest numbers are told.
const PROCESSES_MAX: usize = 4096;
/// Bytes of a command line or of a directory's name.
const TEXT_MAX: usize = 4096;
/// Descriptors that are looked at for sockets, of all processes together: some tenths of a second.
const DESCRIPTORS_MAX: usize = 131_072;
/// No file of /proc that is read here is longer.
const FILE_MAX: u64 = 64 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As the machine itself numbers it.
    pub pid: i32,
    /// Processor time in the kernel.
    pub system_ms: u64,
    /// Processor time in all.
    pub cpu_ms: u64,
    /// Since it was started.
    pub real_ms: u64,
    pub command: String,
    /// As the machine sees it.
    pub directory: String,
    pub rss_bytes: u64,
    pub sockets: Vec<ListenSocket>,
}

/// All processes of a machine, commands beside its program too; `init` is its first process.
pub fn processes(cgroup: &MachineCgroup, init: i32) -> Result<Vec<Process>, CgroupError> {
    let mut waiting = Sockets::of(init);
    let uptime_ms = uptime_ms();
    let mut found: Vec<(i32, Process)> = Vec::new();
    for pid in cgroup.procs()?.into_iter().take(PROCESSES_MAX) {
        // One that ended meanwhile is none.
        if let Some(mut process) = read_process(pid, uptime_ms) {
            process.sockets = waiting.held_by(pid);
            found.push((pid, process));
        }
    }
    // A number may have passed to a process of somebody else while it was looked at.
    let still: HashSet<i32> = cgroup.procs()?.into_iter().collect();
    let mut processes: Vec<Process> =
        found.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, process)| process).collect();
    processes.sort_by_key(|process| process.pid);
    Ok(processes)
}

fn read_process(pid: i32, uptime_ms: u64) -> Option<Process> {
    let status = read(&format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    // From our own pid namespace down: the second is the machine's.
    let own = field("NSpid")?.split_whitespace().nth(1)?.parse().ok()?;
    let rss_kb: u64 = field("VmRSS").and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let stat = read(&format!("/proc/{pid}/stat")).ok()?;
    let (name, times) = parse_stat(&stat)?;
    // The first process is ours: its command line is that of the server which made it.
    let mut command = if own == 1 { String::new() } else { text(&read(&format!("/proc/{pid}/cmdline")).unwrap_or_default()) };
    if command.is_empty() {
        command = if own == 1 { text(name) } else { format!("[{}]", text(name)) };
    }
    let directory = fs::read_link(format!("/proc/{pid}/cwd")).map(|path| text(path.as_os_str().as_encoded_bytes()));
    Some(Process {
        pid: own,
        system_ms: times.system_ms,
        cpu_ms: times.system_ms + times.user_ms,
        real_ms: uptime_ms.saturating_sub(times.started_ms),
        command,
        directory: directory.unwrap_or_default(), // a zombie has none
        rss_bytes: rss_kb * 1024,
        sockets: vec![],
    })
}

struct Times {
    user_ms: u64,
    system_ms: u64,
    /// After the host's start.
    started_ms: u64,
}

/// The name stands in brackets, and may have brackets and blanks in it.
fn parse_stat(stat: &[u8]) -> Option<(&[u8], Times)> {
    let (open, close) = (stat.iter().position(|b| *b == b'(')?, stat.iter().rposition(|b| *b == b')')?);
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let per_second = ticks_per_second();
    let ms = |nth: usize| fields.get(nth)?.parse::<u64>().ok().map(|ticks| ticks.saturating_mul(1000) / per_second);
    Some((stat.get(open + 1..close)?, Times { user_ms: ms(11)?, system_ms: ms(12)?, started_ms: ms(19)? }))
}

fn ticks_per_second() -> u64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    ticks.and_then(|ticks| u64::try_from(ticks).ok()).filter(|ticks| *ticks > 0).unwrap_or(100)
}

fn uptime_ms() -> u64 {
    let text = read("/proc/uptime").unwrap_or_default();
    let seconds = String::from_utf8_lossy(&text).split_whitespace().next().and_then(|text| text.parse::<f64>().ok());
    seconds.map_or(0, |seconds| (seconds * 1000.0) as u64)
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A tenant's bytes as one line: arguments are parted by blanks, what would move a terminal's cursor is replaced.
fn text(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(TEXT_MAX)];
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let replace = |c: char| match c {
        '\0' => ' ',
        c if c.is_control() || is_reordering(c) => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    String::from_utf8_lossy(&bytes[..end]).chars().map(replace).collect()
}

/// Characters that show a line in another order than it has.
fn is_reordering(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Sockets that wait for somebody, by inode, and how much may still be looked at for their holders.
struct Sockets {
    by_inode: HashMap<u64, ListenSocket>,
    left: usize,
}

impl Sockets {
    fn of(init: i32) -> Self {
        // The machine ended: it has neither sockets nor processes.
        let by_inode = ports::waiting_sockets(init).unwrap_or_default();
        Self { by_inode, left: DESCRIPTORS_MAX }
    }

    fn held_by(&mut self, pid: i32) -> Vec<ListenSocket> {
        if self.by_inode.is_empty() {
            return vec![];
        }
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return vec![] };
        let mut inodes = HashSet::new();
        for descriptor in descriptors.flatten() {
            if self.left == 0 {
                break;
            }
            self.left -= 1;
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            let inode: Option<u64> = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            inodes.extend(inode);
        }
        let mut sockets: Vec<ListenSocket> = inodes.iter().filter_map(|inode| self.by_inode.get(inode).copied()).collect();
        sockets.sort_by_key(|socket| (socket.addr, socket.proto.name()));
        sockets.dedup();
        sockets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_command_line_is_one_bounded_line() {
        assert_eq!(text(b"sh\0-c\0echo a\0\0"), "sh -c echo a");
        let cleaned = text("a\x1b[2Jb\nc\u{202e}d".as_bytes());
        assert_eq!(cleaned, "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
        assert_eq!(text(&[0xff, b'a']), "\u{fffd}a");
        assert_eq!(text(&vec![b'x'; 100_000]).len(), TEXT_MAX);
        assert_eq!(text(b""), "");
    }

    #[test]
    fn a_name_with_brackets_shifts_no_field() {
        let stat = b"7 (a) R 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 250 150 0 0 20 0 1 0 1200 5 6";
        let (name, times) = parse_stat(stat).unwrap();
        assert_eq!(name, b"a) R 1 (b");
        let unit = 1000 / ticks_per_second();
        assert_eq!((times.user_ms, times.system_ms, times.started_ms), (250 * unit, 150 * unit, 1200 * unit));
    }
}
