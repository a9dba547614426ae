//! Whether a host obeys many tombstones at once. A bad projection must not empty it; a person who destroys an
//! app must not be held up.

use std::path::{Path, PathBuf};

/// So many go at once on any host: an app's machines on a small one.
const FEW: usize = 10;
/// Above that, one machine in so many.
const SHARE: usize = 10;

/// Whether this many tombstones that no person asked for wait for an operator, on a host of so many machines.
pub fn wait_for_operator(unasked: usize, machines: usize) -> bool {
    unasked > FEW && unasked * SHARE > machines
}

/// An operator's yes to what waits: a file that he makes.
pub fn approval(data_dir: &Path) -> PathBuf {
    data_dir.join("host/destroy-approved")
}

/// Takes the yes, which holds for once.
pub fn take_approval(data_dir: &Path) -> bool {
    std::fs::remove_file(approval(data_dir)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_go_at_once_and_of_many_a_tenth() {
        for (unasked, machines, waits) in
            [(0, 0, false), (10, 10, false), (11, 11, true), (10, 1000, false), (100, 1000, false), (101, 1000, true)]
        {
            assert_eq!(wait_for_operator(unasked, machines), waits, "{unasked} of {machines}");
        }
    }
}
