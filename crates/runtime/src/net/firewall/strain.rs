//! The kernel's table of connections is one for the host and all its machines, and drops everybody's new ones when it is full.
//!
//! nft can count the connections of one address, by a list that it walks for each new one; one list of all machines' would be
//! walked for milliseconds, and the kernel frees few entries of it at a time, so that a busy host would be taken for a full
//! one. So the agent looks at the kernel's own count, and between two looks machines begin no more connections than the
//! host's part has room for.

use super::CONNECTIONS_PART;
use crate::sys::number_in;

const KEPT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const NOW: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// Where the kernel does not tell how many it keeps: its own least number, on a host with little memory.
const KEPT_LEAST: u32 = 65_536;
/// Sixteenths of the table from which machines with many connections get no more of them, and from which no machine does.
/// What machines begin until that is noticed leaves the last eighth to the host.
const TIGHT: u64 = 10;
const FULL: u64 = 13;

/// How much of the machines' new connections is refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strain {
    #[default]
    None,
    /// Those of machines that have many.
    Tight,
    /// All of them.
    Full,
}

/// The table as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    pub now: u32,
    pub most: u32,
}

impl Connections {
    /// In the network namespace of the calling thread. `None` where nothing wants to know of connections.
    pub fn look() -> Option<Self> {
        Some(Self { now: number_in(NOW).ok()?, most: kept() })
    }

    pub fn strain(self) -> Strain {
        let (now, most) = (u64::from(self.now) * 16, u64::from(self.most));
        match now {
            _ if now >= most * FULL => Strain::Full,
            _ if now >= most * TIGHT => Strain::Tight,
            _ => Strain::None,
        }
    }
}

/// The kernel has the file from the first rule on that wants to know of connections.
pub(super) fn kept() -> u32 {
    number_in(KEPT).unwrap_or(KEPT_LEAST).max(CONNECTIONS_PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_part_of_the_table_is_not_the_machines() {
        for (now, strain) in [(0, Strain::None), (624, Strain::None), (625, Strain::Tight), (812, Strain::Tight), (813, Strain::Full), (1000, Strain::Full)] {
            assert_eq!(Connections { now, most: 1000 }.strain(), strain, "{now}");
        }
        assert_eq!(Connections { now: u32::MAX, most: u32::MAX }.strain(), Strain::Full);
    }
}
