//! Places that strangers take: so many in all, and from one address no more than a part of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) struct Shares {
    max: usize,
    max_each: usize,
    by: Mutex<HashMap<IpAddr, usize>>,
}

impl Shares {
    pub fn new(max: usize, max_each: usize) -> Arc<Self> {
        Arc::new(Self { max, max_each, by: Mutex::default() })
    }

    pub fn take(self: &Arc<Self>, from: IpAddr) -> Option<Share> {
        let from = network(from);
        let mut by = self.by.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, own) = (by.values().sum::<usize>(), by.get(&from).copied().unwrap_or_default());
        if all >= self.max || own >= self.max_each {
            return None;
        }
        by.insert(from, own + 1);
        Some(Share { all: self.clone(), from })
    }
}

/// Whoever has an IPv6 address has a whole network of 64 bits of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// One place.
pub(crate) struct Share {
    all: Arc<Shares>,
    from: IpAddr,
}

impl Drop for Share {
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

    #[test]
    fn one_address_leaves_places_for_the_others() {
        let all = Shares::new(3, 2);
        let take = |from: &str| all.take(from.parse().unwrap());
        let held = [take("203.0.113.1").unwrap(), take("::ffff:203.0.113.1").unwrap()];
        assert!(take("203.0.113.1").is_none(), "it has its part, however it is written");
        let other = take("2001:db8::1").unwrap();
        assert!(take("2001:db8:1::1").is_none(), "all are taken");
        drop(held);
        let more = take("2001:db8::ffff:2").unwrap();
        assert!(take("2001:db8::3").is_none(), "it is one network");
        assert!(take("2001:db8:0:1::3").is_some(), "and this another");
        drop((other, more));
        assert!(all.by.lock().unwrap().is_empty());
    }
}
