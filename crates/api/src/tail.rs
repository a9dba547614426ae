//! The newest lines of a log, as many as there is room for in memory.

use crate::host::LogLine;
use crate::shares::Share;
use dunlin_model::{AppName, MachineId};
use std::collections::VecDeque;

/// What a line costs beside its text: its names, and where they are.
const LINE_BYTES: usize = 256;

/// What holding a line takes up.
pub fn bytes_of(line: &LogLine) -> usize {
    LINE_BYTES + line.line.len() + line.program.len()
}

/// Bounded in lines, in bytes, and by what memory there is for all readers' lines.
pub struct Tail {
    lines: VecDeque<LogLine>,
    held: Share,
    max_lines: usize,
    max_bytes: usize,
    left_out: bool,
}

impl Tail {
    pub fn new(held: Share, max_lines: usize, max_bytes: usize) -> Self {
        Self { lines: VecDeque::new(), held, max_lines, max_bytes, left_out: false }
    }

    /// Takes a line that is newer than those that are there.
    pub fn push(&mut self, line: LogLine) {
        let bytes = bytes_of(&line);
        while self.held.grow(bytes).is_err() {
            self.left_out = true;
            if !self.drop_oldest() {
                return;
            }
        }
        self.lines.push_back(line);
        while self.lines.len() > self.max_lines {
            self.drop_oldest();
        }
        while self.held.amount() > self.max_bytes && self.lines.len() > 1 {
            self.left_out = true;
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) -> bool {
        let Some(line) = self.lines.pop_front() else { return false };
        self.held.shrink(bytes_of(&line));
        true
    }

    pub fn taken(self) -> Taken {
        Taken { lines: self.lines.into(), held: self.held, left_out: self.left_out }
    }
}

/// Lines in the order of their time, and their room in memory, to be given back as they are sent.
pub struct Taken {
    pub lines: Vec<LogLine>,
    pub held: Share,
    /// There were older ones, for which there was no room.
    pub left_out: bool,
}

impl Taken {
    /// The newest of both, within bounds.
    pub fn merge(&mut self, other: Taken, max_lines: usize, max_bytes: usize) {
        self.lines.extend(other.lines);
        self.held.absorb(other.held);
        self.left_out |= other.left_out;
        self.lines.sort_by_key(|line| line.at_ms);
        let mut beyond = self.lines.len().saturating_sub(max_lines);
        let mut bytes: usize = self.lines[beyond..].iter().map(bytes_of).sum();
        while bytes > max_bytes && beyond + 1 < self.lines.len() {
            bytes -= bytes_of(&self.lines[beyond]);
            beyond += 1;
            self.left_out = true;
        }
        for line in self.lines.drain(..beyond) {
            self.held.shrink(bytes_of(&line));
        }
    }

    /// The lines, after one that says so if there are fewer than were wanted for want of room.
    pub fn told(self, wanted: usize, app: &AppName, machine: &MachineId) -> (Vec<LogLine>, Share) {
        let Self { mut lines, held, left_out } = self;
        if left_out && lines.len() < wanted {
            let said = LogLine {
                at_ms: lines.first().map_or(0, |line| line.at_ms),
                app: app.clone(),
                machine: machine.clone(),
                stream: "system".into(),
                program: String::new(),
                line: "older lines are left out here: there is no room in memory for more now; ask for fewer lines, or for those of \
                       one machine"
                    .into(),
            };
            lines.insert(0, said);
        }
        (lines, held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shares::Shares;

    fn line(n: u64, text: &str) -> LogLine {
        let (app, machine) = ("web".parse().unwrap(), MachineId::from_random([1; 7]));
        LogLine { at_ms: n, app, machine, stream: "stdout".into(), program: String::new(), line: text.into() }
    }

    /// Of six lines of 300 bytes these are kept, and whether it is said that others were not.
    fn check(share: usize, max_lines: usize, max_bytes: usize, expected: (&[u64], bool)) {
        let shares = Shares::halves(2 * share);
        let app = "web".parse().unwrap();
        let mut tail = Tail::new(shares.take(Some(&app), 0).unwrap(), max_lines, max_bytes);
        (1..=6).for_each(|n| tail.push(line(n, &"x".repeat(300 - LINE_BYTES))));
        let (lines, held) = tail.taken().told(max_lines, &app, &MachineId::from_random([1; 7]));
        let kept: Vec<u64> = lines.iter().filter(|line| line.stream == "stdout").map(|line| line.at_ms).collect();
        assert_eq!((kept.as_slice(), lines.len() > kept.len()), expected, "{share} {max_lines} {max_bytes}");
        assert_eq!(held.amount(), kept.len() * 300);
    }

    #[test]
    fn it_holds_what_there_is_room_for_and_says_what_it_does_not() {
        check(10_000, 9, 10_000, (&[1, 2, 3, 4, 5, 6], false));
        check(10_000, 2, 10_000, (&[5, 6], false));
        check(10_000, 9, 900, (&[4, 5, 6], true));
        check(10_000, 9, 1, (&[6], true));
        check(700, 9, 10_000, (&[5, 6], true));
        check(0, 9, 10_000, (&[], true));
    }

    #[test]
    fn of_several_the_newest_stay() {
        let shares = Shares::halves(20_000);
        let text = "x".repeat(300 - LINE_BYTES);
        let tail = |numbers: &[u64]| {
            let mut tail = Tail::new(shares.take(None, 0).unwrap(), 9, 10_000);
            numbers.iter().for_each(|n| tail.push(line(*n, &text)));
            tail.taken()
        };
        let check = |max_lines, max_bytes, expected: (&[u64], bool)| {
            let mut merged = tail(&[1, 4, 6]);
            merged.merge(tail(&[2, 3, 5]), max_lines, max_bytes);
            let kept: Vec<u64> = merged.lines.iter().map(|line| line.at_ms).collect();
            assert_eq!((kept.as_slice(), merged.left_out), expected);
            assert_eq!(merged.held.amount(), kept.len() * 300);
        };
        check(9, 10_000, (&[1, 2, 3, 4, 5, 6], false));
        check(4, 10_000, (&[3, 4, 5, 6], false));
        check(9, 900, (&[4, 5, 6], true));
    }
}
