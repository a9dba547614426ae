//! How many processes and threads machines may have together: less than the kernel has numbers for, whatever one machine
//! may have. A computer without a free number starts nothing any more, not even the shell of who wants to help.

use std::io;

use super::{Cgroups, Result, write};
use crate::sys::number_in;

/// The kernel's numbers for processes and threads. 32,768 where nobody asked for more, so that eight machines could take all.
pub const PID_MAX: &str = "/proc/sys/kernel/pid_max";
/// What the kernel thinks that memory is there for.
const THREADS_MAX: &str = "/proc/sys/kernel/threads-max";
/// The most of them on 64 bits, as systemd sets it.
pub const PID_MAX_WANTED: u32 = 4 << 20;
/// The host's own: an eighth, and at least as much as one machine may have.
const HOST_PART: u32 = 8;
const HOST_LEAST: u32 = 4096;

/// How many processes there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessRoom {
    /// On the computer, of everybody.
    pub computer: u32,
    pub machines: u32,
}

impl ProcessRoom {
    /// As the kernel is set now.
    pub fn look() -> io::Result<Self> {
        let threads = number_in(THREADS_MAX).unwrap_or(u32::MAX);
        Ok(Self::of(number_in(PID_MAX)?.min(threads)))
    }

    pub fn of(computer: u32) -> Self {
        let host = (computer / HOST_PART).max(HOST_LEAST).min(computer / 2);
        Self { computer, machines: computer - host }
    }
}

/// Asks for as many numbers as there can be. Refused in most containers and to ordinary users.
pub fn raise_pid_max() -> io::Result<()> {
    if number_in(PID_MAX)? >= PID_MAX_WANTED {
        return Ok(());
    }
    std::fs::OpenOptions::new().write(true).open(PID_MAX).and_then(|mut file| io::Write::write_all(&mut file, PID_MAX_WANTED.to_string().as_bytes()))
}

impl Cgroups {
    /// All that is beneath our root together has no more processes and threads than this. False: there are no control
    /// groups to say it in.
    pub fn bound_processes(&self, most: u32) -> Result<bool> {
        let Some(hierarchy) = self.hierarchies.iter().find(|hierarchy| hierarchy.controllers.iter().any(|name| name == "pids")) else {
            return Ok(false);
        };
        write(&hierarchy.root.join("pids.max"), &most.to_string()).map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_keeps_some_for_itself() {
        for (computer, machines) in [(4 << 20, 7 << 19), (65_536, 57_344), (32_768, 28_672), (16_384, 12_288), (4096, 2048), (0, 0)] {
            assert_eq!(ProcessRoom::of(computer), ProcessRoom { computer, machines });
        }
        assert!(ProcessRoom::look().expect("the kernel says it").machines > 0);
    }
}
