//! Which hosts are dead. Control's own probe alone never says so: the host must be silent for others, too. What is known is
//! in memory; a new process counts anew.
//!
//! ```text
//! there --probe fails--> failing since t --5 s, and silent--> dead --probe answers--> there
//! ```

use dunlin_model::HostId;
use std::collections::{BTreeMap, BTreeSet};

/// A host whose probe has failed for this long may be dead.
pub const FAILS_FOR_MS: u64 = 5_000;

/// What the probes have said so far.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    failing_since_ms: BTreeMap<HostId, u64>,
    dead: BTreeSet<HostId>,
    cut_off: bool,
}

/// What a round of probes has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    pub died: Vec<HostId>,
    pub returned: Vec<HostId>,
    /// It was not so before, or is not so any more.
    pub cut_off: Option<bool>,
}

impl Watched {
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl Watch {
    /// Nothing asked of it is answered.
    pub fn is_dead(&self, host: &HostId) -> bool {
        self.dead.contains(host)
    }

    /// Those whose machines are to be replaced: none, while control itself may be what is cut off.
    pub fn dead(&self) -> BTreeSet<HostId> {
        if self.cut_off { BTreeSet::new() } else { self.dead.clone() }
    }

    /// Most hosts do not answer: it is control that is cut off.
    pub fn is_cut_off(&self) -> bool {
        self.cut_off
    }

    /// It answered in the last round.
    pub fn answers(&self, host: &HostId) -> bool {
        !self.failing_since_ms.contains_key(host)
    }

    /// What the probes of a round have said of the other hosts. `all_hosts` counts control's own, which is reachable;
    /// `is_silent` says of a host whether nobody else hears of it.
    pub fn hear(&mut self, answers: &[(HostId, bool)], all_hosts: usize, is_silent: impl Fn(&HostId) -> bool, now_ms: u64) -> Watched {
        self.failing_since_ms.retain(|host, _| answers.iter().any(|(other, answered)| other == host && !answered));
        for (host, _) in answers.iter().filter(|(_, answered)| !answered) {
            self.failing_since_ms.entry(host.clone()).or_insert(now_ms);
        }
        let for_long = |since_ms: &u64| now_ms >= since_ms.saturating_add(FAILS_FOR_MS);
        let failing = self.failing_since_ms.iter();
        let dead = failing.filter(|(host, since_ms)| for_long(since_ms) && (self.dead.contains(*host) || is_silent(host)));
        let dead: BTreeSet<HostId> = dead.map(|(host, _)| host.clone()).collect();
        let cut_off = 2 * (all_hosts.saturating_sub(self.failing_since_ms.len())) < all_hosts;
        let watched = Watched {
            died: dead.difference(&self.dead).cloned().collect(),
            returned: self.dead.difference(&dead).cloned().collect(),
            cut_off: (cut_off != self.cut_off).then_some(cut_off),
        };
        (self.dead, self.cut_off) = (dead, cut_off);
        watched
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    fn host(n: usize) -> HostId {
        format!("h{n}").parse().unwrap()
    }

    /// A round in which of `all` hosts, this one the first, those named do not answer.
    fn round(watch: &mut Watch, all: usize, failing: &[usize], silent: &[usize], now_ms: u64) -> Vec<usize> {
        let answers: Vec<_> = (2..=all).map(|n| (host(n), !failing.contains(&n))).collect();
        let before = watch.dead.clone();
        let watched = watch.hear(&answers, all, |id| silent.iter().any(|n| host(*n) == *id), now_ms);
        assert_eq!(watched.died.is_empty() && watched.returned.is_empty(), watch.dead == before);
        (2..=all).filter(|n| watch.is_dead(&host(*n))).collect()
    }

    #[test]
    fn a_host_is_dead_when_everybody_says_so_for_long_enough() {
        let mut watch = Watch::default();
        assert_eq!(round(&mut watch, 3, &[2], &[2], 1_000), NONE);
        assert_eq!(round(&mut watch, 3, &[2], &[2], 5_900), NONE);
        assert_eq!(round(&mut watch, 3, &[2], &[], 6_000), NONE, "others still hear of it");
        assert_eq!(round(&mut watch, 3, &[2], &[2], 7_000), [2]);
        assert_eq!(round(&mut watch, 3, &[2], &[], 8_000), [2], "what is old news is not heard again");
        assert_eq!(round(&mut watch, 3, &[], &[], 9_000), NONE);
        assert_eq!(round(&mut watch, 3, &[2], &[2], 9_500), NONE, "it counts anew");
        assert_eq!(round(&mut watch, 3, &[2], &[2], 14_500), [2]);
        assert_eq!(round(&mut watch, 2, &[], &[], 15_000), NONE, "a host that has left is no dead one");
    }

    #[test]
    fn one_answer_in_between_is_enough() {
        let mut watch = Watch::default();
        for n in 0..100 {
            let failing: &[usize] = if n % 4 == 3 { &[] } else { &[2] };
            assert_eq!(round(&mut watch, 3, failing, &[2], n * 1_000), NONE);
        }
    }

    #[test]
    fn who_hears_of_fewer_than_half_is_cut_off() {
        let check = |all: usize, failing: &[usize], cut_off: bool| {
            let mut watch = Watch::default();
            for now_ms in [0, 5_000] {
                round(&mut watch, all, failing, failing, now_ms);
            }
            assert_eq!(watch.is_cut_off(), cut_off, "{failing:?} of {all}");
            assert_eq!(watch.dead().is_empty(), cut_off, "then nobody is replaced");
        };
        check(2, &[2], false);
        check(3, &[2], false);
        check(3, &[2, 3], true);
        check(4, &[2, 3], false);
        check(4, &[2, 3, 4], true);
    }
}
