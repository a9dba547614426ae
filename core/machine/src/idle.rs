//! Which of a group's running machines is one too many.

use dunlin_model::MachineId;
use std::cmp::Reverse;

/// A machine that runs and is healthy, and what its host saw of its load.
#[derive(Debug, Clone, Copy)]
pub struct Running<'a> {
    pub id: &'a MachineId,
    /// Requests now.
    pub in_flight: u32,
    /// The most at once since the host began to look; `None`: it has not looked for long enough.
    pub peak: Option<u32>,
    pub soft_limit: u32,
    /// Its configuration and whoever leased it allow that it is put to sleep.
    pub may_sleep: bool,
}

/// As Fly has it: one more than those at their soft limit is enough, and the last one goes when it has no load at all.
/// Never one that has a request now. The later in the order of ids goes first: requests wake the earlier first.
pub fn one_too_many<'a>(group: &[Running<'a>], min_running: u32) -> Option<&'a MachineId> {
    let n = group.len();
    if n <= min_running as usize {
        return None;
    }
    let is_busy = |machine: &&Running<'_>| machine.peak.is_none_or(|peak| peak >= machine.soft_limit.max(1));
    let enough = group.iter().filter(is_busy).count() + 1;
    let idle = group.iter().filter_map(|machine| {
        let peak = machine.peak.filter(|_| machine.may_sleep && machine.in_flight == 0)?;
        let goes = if n == 1 { peak == 0 } else { n > enough };
        goes.then_some((peak, Reverse(machine.id)))
    });
    idle.min().map(|(_, Reverse(id))| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(peaks: &[(Option<u32>, u32)], min_running: u32) -> Option<usize> {
        let ids: Vec<MachineId> = (0..peaks.len()).map(|n| MachineId::from_random([n as u8; 7])).collect();
        let group: Vec<Running<'_>> = ids.iter().zip(peaks).map(|(id, (peak, in_flight))| Running {
            id, in_flight: *in_flight, peak: *peak, soft_limit: 10, may_sleep: true,
        }).collect();
        one_too_many(&group, min_running).map(|id| ids.iter().position(|other| other == id).expect("one of them"))
    }

    #[test]
    fn one_more_than_the_busy_ones_is_enough() {
        assert_eq!(check(&[(Some(3), 0), (Some(3), 0), (Some(3), 0)], 0), Some(2), "of equals the last");
        assert_eq!(check(&[(Some(1), 0), (Some(3), 0)], 0), Some(0), "the least loaded");
        assert_eq!(check(&[(Some(10), 0), (Some(0), 0)], 0), None, "one is at its soft limit");
        assert_eq!(check(&[(Some(10), 9), (Some(0), 0), (Some(0), 0)], 0), Some(2));
        assert_eq!(check(&[(Some(0), 0), (Some(0), 0)], 2), None);
        assert_eq!(check(&[(Some(0), 0), (Some(0), 0)], 1), Some(1));
    }

    #[test]
    fn the_last_one_goes_without_any_load() {
        assert_eq!(check(&[(Some(0), 0)], 0), Some(0));
        assert_eq!(check(&[(Some(1), 0)], 0), None);
        assert_eq!(check(&[(None, 0)], 0), None, "not looked at for long enough");
        assert_eq!(check(&[(Some(0), 0)], 1), None);
        assert_eq!(check(&[], 0), None);
    }

    #[test]
    fn none_with_a_request_goes() {
        assert_eq!(check(&[(Some(1), 1), (Some(1), 1)], 0), None);
        assert_eq!(check(&[(Some(1), 1), (Some(2), 0)], 0), Some(1));
        assert_eq!(check(&[(None, 0), (None, 0), (Some(0), 0)], 0), None, "those that just came may be needed");
    }
}
