//! Counters beside the table. Atomics, because every core routes on its own.

use dunlin_model::{AppName, HostId, MachineId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

/// A machine, or a host, that failed is asked last for this long.
const PENALTY_MS: u64 = 5_000;

/// What one machine has to do, seen from this edge. Aligned to a cache line (as fetched: a pair): the counters
/// of two machines are not fought over as if they were one's.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Load {
    in_flight: AtomicU32,
    /// Failures since the last success.
    failures: AtomicU32,
    last_failure_ms: AtomicU64,
}

impl Load {
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// The machine could not be reached, or broke off before it answered.
    pub fn record_failure(&self, now_ms: u64) {
        self.failures.fetch_add(1, Relaxed);
        self.last_failure_ms.store(now_ms, Relaxed);
    }

    pub fn record_success(&self) {
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
    }

    /// A request goes there. If it failed last, that one finds out whether it is better now, and until it has, the others
    /// stay away: what is silent costs each that tries it seconds.
    pub fn begin_trial(&self, now_ms: u64) {
        if self.failures.load(Relaxed) != 0 {
            self.last_failure_ms.store(now_ms, Relaxed);
        }
    }

    /// Whether others should be preferred for now. Never excludes: it may be the only one.
    pub fn is_penalised(&self, now_ms: u64) -> bool {
        self.failures.load(Relaxed) != 0 && now_ms.saturating_sub(self.last_failure_ms.load(Relaxed)) < PENALTY_MS
    }

    /// Reserves one place below `limit`.
    pub fn reserve(self: &Arc<Self>, limit: Option<u32>) -> Option<Ticket> {
        let limit = limit.unwrap_or(u32::MAX);
        let taken = self.in_flight.fetch_update(Relaxed, Relaxed, |n| (n < limit).then(|| n + 1));
        taken.ok().map(|_| Ticket(self.clone()))
    }
}

/// A reserved place; dropping it gives the place back.
#[derive(Debug)]
pub struct Ticket(Arc<Load>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// What an app's requests do at this edge. Aligned like [`Load`].
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct AppLoad {
    /// Requests that wait for a machine.
    pub waiting: AtomicU32,
    /// Answers by class: index 2 counts 2xx. Index 0 counts requests that ended without an answer.
    pub answers: [AtomicU64; 6],
}

/// All counters of this edge. Entries outlive tables; those that no table and no request holds are let go.
#[derive(Debug, Default)]
pub struct Loads {
    machines: RwLock<HashMap<MachineId, Arc<Load>>>,
    apps: RwLock<HashMap<AppName, Arc<AppLoad>>>,
    hosts: RwLock<HashMap<HostId, Arc<Load>>>,
}

impl Loads {
    pub fn machine(&self, id: &MachineId) -> Arc<Load> {
        if let Some(load) = self.machines.read().unwrap_or_else(PoisonError::into_inner).get(id) {
            return load.clone();
        }
        self.machines.write().unwrap_or_else(PoisonError::into_inner).entry(id.clone()).or_default().clone()
    }

    pub fn app(&self, name: &AppName) -> Arc<AppLoad> {
        if let Some(load) = self.apps.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return load.clone();
        }
        self.apps.write().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default().clone()
    }

    pub fn host(&self, id: &HostId) -> Arc<Load> {
        if let Some(load) = self.hosts.read().unwrap_or_else(PoisonError::into_inner).get(id) {
            return load.clone();
        }
        self.hosts.write().unwrap_or_else(PoisonError::into_inner).entry(id.clone()).or_default().clone()
    }

    /// Drops counters that nobody else holds.
    pub fn prune(&self) {
        self.machines.write().unwrap_or_else(PoisonError::into_inner).retain(|_, load| Arc::strong_count(load) > 1);
        self.apps.write().unwrap_or_else(PoisonError::into_inner).retain(|_, load| Arc::strong_count(load) > 1);
        self.hosts.write().unwrap_or_else(PoisonError::into_inner).retain(|_, load| Arc::strong_count(load) > 1);
    }

    pub fn len(&self) -> usize {
        self.machines.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_with_many_threads() {
        const LIMIT: u32 = 7;
        let load = Arc::new(Load::default());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let ticket = load.reserve(Some(LIMIT));
                        assert!(load.in_flight() <= LIMIT);
                        drop(ticket);
                    }
                });
            }
        });
        assert_eq!(load.in_flight(), 0);
    }

    #[test]
    fn counters_live_as_long_as_somebody_counts() {
        let loads = Loads::default();
        let id = MachineId::from_random([1; 7]);
        let ticket = loads.machine(&id).reserve(None).unwrap();
        loads.prune();
        assert_eq!(loads.machine(&id).in_flight(), 1);
        drop(ticket);
        loads.prune();
        assert!(loads.is_empty());
    }

    #[test]
    fn a_failure_is_forgiven_by_time_or_success() {
        let load = Load::default();
        load.record_failure(1_000);
        assert!(load.is_penalised(1_001));
        assert!(!load.is_penalised(1_000 + PENALTY_MS));
        load.record_failure(2_000);
        load.record_success();
        assert!(!load.is_penalised(2_001));
        load.begin_trial(2_001);
        assert!(!load.is_penalised(2_002), "nothing is wrong with it");
    }

    #[test]
    fn one_request_tries_what_has_failed() {
        let load = Load::default();
        load.record_failure(1_000);
        load.begin_trial(1_000 + PENALTY_MS);
        assert!(load.is_penalised(1_001 + PENALTY_MS), "the others wait for what it finds out");
        load.record_success();
        assert!(!load.is_penalised(1_002 + PENALTY_MS));
    }
}
