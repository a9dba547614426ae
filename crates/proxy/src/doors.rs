//! Places for connections, by the door that they come to: who fills one leaves room at the others.

use crate::limits::Limits;
use crate::metrics::ProxyMetrics;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a connection comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    Http,
    Https,
    Hop,
}

/// One of the connections that a limit counts.
pub(crate) struct Slot {
    metrics: Arc<ProxyMetrics>,
    of: fn(&ProxyMetrics) -> &AtomicUsize,
}

impl Slot {
    /// Another edge has places of its own first: a flood of clients must not close the way to this host's machines. Beyond
    /// these it comes in like any client.
    pub fn take(metrics: &Arc<ProxyMetrics>, limits: &Limits, door: Door) -> Option<Self> {
        let take = |of: fn(&ProxyMetrics) -> &AtomicUsize, limit: usize| {
            of(metrics).fetch_update(Relaxed, Relaxed, |n| (n < limit).then(|| n + 1)).ok()?;
            Some(Self { metrics: metrics.clone(), of })
        };
        let own = if door == Door::Hop { take(|metrics| &metrics.hop_connections, limits.max_hop_connections) } else { None };
        own.or_else(|| take(|metrics| &metrics.connections, limits.max_connections))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.of)(&self.metrics).fetch_sub(1, Relaxed);
    }
}

/// Connections at the last hop's door that have not shown yet whose they are: anybody can make these. They are few, and no
/// address has more than half of them, so that one stranger does not keep the members out.
pub(crate) struct Handshakes {
    max: usize,
    by: Mutex<HashMap<IpAddr, usize>>,
}

impl Handshakes {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, by: Mutex::default() })
    }

    pub fn take(self: &Arc<Self>, from: IpAddr) -> Option<Handshake> {
        let mut by = self.by.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, own) = (by.values().sum::<usize>(), by.get(&from).copied().unwrap_or_default());
        if all >= self.max || own >= self.max.div_ceil(2) {
            return None;
        }
        by.insert(from, own + 1);
        Some(Handshake { all: self.clone(), from })
    }
}

/// One of them.
pub(crate) struct Handshake {
    all: Arc<Handshakes>,
    from: IpAddr,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut by = self.all.by.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                by.remove(&self.from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::Routes;

    #[test]
    fn a_full_door_leaves_the_last_hop_its_places() {
        let limits = Limits { max_connections: 2, max_hop_connections: 1, ..Limits::default() };
        let metrics = Arc::new(ProxyMetrics::new(Routes::new("local".parse().unwrap()), 1));
        let take = |door| Slot::take(&metrics, &limits, door);
        let clients = [take(Door::Http).unwrap(), take(Door::Https).unwrap()];
        assert!(take(Door::Http).is_none() && take(Door::Https).is_none());
        let edge = take(Door::Hop).expect("its place is not the clients'");
        assert!(take(Door::Hop).is_none() && take(Door::Http).is_none());
        assert_eq!(metrics.open_connections(), 3);
        drop(clients);
        let beyond = take(Door::Hop).expect("what clients leave, it may have too");
        drop((edge, beyond));
        assert_eq!(metrics.open_connections(), 0);
        assert_eq!((metrics.connections.load(Relaxed), metrics.hop_connections.load(Relaxed)), (0, 0));
    }

    #[test]
    fn strangers_leave_room_for_members() {
        let all = Handshakes::new(4);
        let (stranger, other, member): (IpAddr, IpAddr, IpAddr) =
            ("203.0.113.1".parse().unwrap(), "203.0.113.2".parse().unwrap(), "10.0.0.1".parse().unwrap());
        let held: Vec<_> = (0..10).filter_map(|_| all.take(stranger)).collect();
        assert_eq!(held.len(), 2, "half of them");
        drop(all.take(member).expect("the others have theirs"));
        let more: Vec<_> = (0..10).filter_map(|_| all.take(other)).collect();
        assert_eq!(more.len(), 2);
        assert!(all.take(member).is_none(), "more are never begun");
        drop((held, more));
        assert!(all.by.lock().unwrap().is_empty() && all.take(member).is_some());
    }
}
