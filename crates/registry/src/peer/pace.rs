//! How fast a host gives: who is slower than others could be is left, and who hardly gives anything is given up. The same
//! holds for a host that takes while others wait.

use dunlin_model::HostId;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Who gives less than this in [`BRISK_FOR`] is left where another host could give it: a layer of 100 MB would take two hours.
const BRISK_BYTES: u64 = BRISK_BYTES_A_SECOND * BRISK_FOR.as_secs();
const BRISK_BYTES_A_SECOND: u64 = 16 << 10;
const BRISK_FOR: Duration = Duration::from_secs(10);
/// Who gives less than this in [`PATIENT_FOR`] gives as good as nothing, also if nobody else has it.
pub(super) const PATIENT_BYTES: u64 = 1 << 10;
const PATIENT_FOR: Duration = Duration::from_secs(30);
/// What was found out about a host is believed for so long; then it may be another line, or another load.
pub(super) const BELIEVED_FOR: Duration = Duration::from_secs(300);
/// Among slow hosts one is left for another only if that one was clearly faster, or they would be left in turn for ever.
const CLEARLY: u64 = 2;

/// Why a host is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooSlow {
    /// Others could give it faster; how fast this one gave.
    ForNow { bytes_a_second: u64 },
    /// It gave next to nothing.
    Altogether { bytes: u64 },
}

/// Of one stream. Only the time counts in which the host was waited for, not that of this host's own disk.
pub(super) struct Pace {
    brisk: Window,
    patient: Window,
}

struct Window {
    of: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    pub fn new() -> Self {
        let window = |of| Window { of, waited: Duration::ZERO, bytes: 0 };
        Self { brisk: window(BRISK_FOR), patient: window(PATIENT_FOR) }
    }

    /// Until there is something to judge.
    pub fn left(&self) -> Duration {
        self.brisk.left().min(self.patient.left())
    }

    /// So many bytes came after so long. `is_elsewhere`: another host could give it, faster than so many bytes a second.
    pub fn note(&mut self, waited: Duration, bytes: u64, is_elsewhere: impl FnOnce(u64) -> bool) -> Result<(), TooSlow> {
        for window in [&mut self.brisk, &mut self.patient] {
            window.waited += waited;
            window.bytes += bytes;
        }
        if let Some(bytes) = self.patient.ended().filter(|bytes| *bytes < PATIENT_BYTES) {
            return Err(TooSlow::Altogether { bytes });
        }
        if let Some(bytes) = self.brisk.ended().filter(|bytes| *bytes < BRISK_BYTES) {
            let bytes_a_second = bytes / BRISK_FOR.as_secs();
            if is_elsewhere(bytes_a_second) {
                return Err(TooSlow::ForNow { bytes_a_second });
            }
        }
        Ok(())
    }
}

impl Window {
    fn left(&self) -> Duration {
        self.of.saturating_sub(self.waited)
    }

    /// What came in it, once it is over; then the next one begins.
    fn ended(&mut self) -> Option<u64> {
        if self.waited < self.of {
            return None;
        }
        self.waited = Duration::ZERO;
        Some(std::mem::take(&mut self.bytes))
    }
}

/// Hosts that were slow lately, for all blobs alike: it is mostly the line.
#[derive(Default)]
pub(super) struct SlowHosts(Mutex<BTreeMap<HostId, (Instant, u64)>>);

impl SlowHosts {
    pub fn remember(&self, host: &HostId, bytes_a_second: u64) {
        let mut known = self.0.lock().unwrap_or_else(|e| e.into_inner());
        known.retain(|_, (at, _)| at.elapsed() < BELIEVED_FOR);
        known.insert(host.clone(), (Instant::now(), bytes_a_second));
    }

    /// Whether it may well give more than so many bytes a second.
    pub fn is_faster(&self, host: &HostId, than: u64) -> bool {
        self.rate(host).is_none_or(|rate| rate > than.saturating_mul(CLEARLY))
    }

    /// Who was slow comes after all others, the fastest of them first.
    pub fn last(&self, mut hosts: Vec<HostId>) -> Vec<HostId> {
        hosts.sort_by_cached_key(|host| self.rate(host).map(std::cmp::Reverse));
        hosts
    }

    fn rate(&self, host: &HostId) -> Option<u64> {
        let known = self.0.lock().unwrap_or_else(|e| e.into_inner());
        known.get(host).filter(|(at, _)| at.elapsed() < BELIEVED_FOR).map(|(_, rate)| *rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostId {
        name.parse().unwrap()
    }

    /// A second after the other, so many bytes in each, until the host is left.
    fn left_after(bytes: u64, is_elsewhere: bool) -> Option<(u64, TooSlow)> {
        let mut pace = Pace::new();
        (1..=120).find_map(|second| Some((second, pace.note(Duration::from_secs(1), bytes, |_| is_elsewhere).err()?)))
    }

    #[test]
    fn who_is_slow_is_left_where_there_is_another_and_kept_where_there_is_none() {
        assert_eq!(left_after(16 << 10, true), None);
        assert_eq!(left_after((16 << 10) - 1, true), Some((10, TooSlow::ForNow { bytes_a_second: (16 << 10) - 1 })));
        assert_eq!(left_after((16 << 10) - 1, false), None);
        assert_eq!(left_after(35, false), None);
        assert_eq!(left_after(34, false), Some((30, TooSlow::Altogether { bytes: 1_020 })));
        assert_eq!(left_after(0, true), Some((10, TooSlow::ForNow { bytes_a_second: 0 })));
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_slow_is_asked_last_for_a_while() {
        let slow = SlowHosts::default();
        slow.remember(&host("a"), 10);
        slow.remember(&host("b"), 1_000);
        let order = || slow.last(["a", "b", "d", "c"].map(host).to_vec());
        assert_eq!(order(), ["d", "c", "b", "a"].map(host));
        assert!(slow.is_faster(&host("c"), 1 << 40) && slow.is_faster(&host("b"), 10) && !slow.is_faster(&host("b"), 500) && !slow.is_faster(&host("a"), 1_000));
        tokio::time::advance(BELIEVED_FOR).await;
        assert_eq!(order(), ["a", "b", "d", "c"].map(host));
    }
}
