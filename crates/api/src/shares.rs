//! Something that a host has so much of, and of which no app gets more than its part: sessions, bytes of memory.

use dunlin_model::AppName;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What there is of it, and what is taken.
#[derive(Debug)]
pub struct Shares {
    most: usize,
    most_of_one: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by: BTreeMap<Option<AppName>, usize>,
}

/// Why there is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// This app has its part.
    One,
    /// All is taken, by several.
    All,
}

impl Shares {
    /// An app gets half of it: so it takes several to leave others nothing.
    pub fn halves(most: usize) -> Arc<Self> {
        Arc::new(Self { most, most_of_one: most.div_ceil(2), taken: Mutex::default() })
    }

    pub fn most_of_one(&self) -> usize {
        self.most_of_one
    }

    /// A share to begin with; it is given back with the value. `None` stands for who asks for no app.
    pub fn take(self: &Arc<Self>, who: Option<&AppName>, amount: usize) -> Result<Share, Full> {
        let mut share = Share { of: self.clone(), who: who.cloned(), amount: 0 };
        share.grow(amount)?;
        Ok(share)
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What somebody has of it.
#[derive(Debug)]
pub struct Share {
    of: Arc<Shares>,
    who: Option<AppName>,
    amount: usize,
}

impl Share {
    pub fn amount(&self) -> usize {
        self.amount
    }

    pub fn grow(&mut self, by: usize) -> Result<(), Full> {
        let mut taken = self.of.taken();
        let has = taken.by.get(&self.who).copied().unwrap_or(0);
        if has.saturating_add(by) > self.of.most_of_one {
            return Err(Full::One);
        }
        if taken.all.saturating_add(by) > self.of.most {
            return Err(Full::All);
        }
        taken.all += by;
        *taken.by.entry(self.who.clone()).or_default() += by;
        drop(taken);
        self.amount += by;
        Ok(())
    }

    /// Takes over what another share of the same has.
    pub fn absorb(&mut self, mut other: Share) {
        debug_assert!(Arc::ptr_eq(&self.of, &other.of) && self.who == other.who);
        self.amount += std::mem::take(&mut other.amount);
    }

    pub fn shrink(&mut self, by: usize) {
        let by = by.min(self.amount);
        self.amount -= by;
        let mut taken = self.of.taken();
        taken.all -= by;
        if let Some(has) = taken.by.get_mut(&self.who) {
            *has -= by;
            if *has == 0 {
                taken.by.remove(&self.who);
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_more_than_half_nor_all_more_than_all() {
        let [a, b, c]: [AppName; 3] = ["a1", "b1", "c1"].map(|name| name.parse().unwrap());
        let shares = Shares::halves(10);
        let mut first = shares.take(Some(&a), 3).unwrap();
        assert_eq!(first.grow(3), Err(Full::One));
        first.grow(2).unwrap();
        assert_eq!(shares.take(Some(&a), 1).err(), Some(Full::One));
        let second = shares.take(Some(&b), 4).unwrap();
        assert_eq!(shares.take(Some(&c), 2).err(), Some(Full::All));
        let third = shares.take(None, 1).unwrap();
        assert_eq!(shares.take(Some(&c), 1).err(), Some(Full::All));
        first.shrink(1);
        shares.take(Some(&a), 1).unwrap();
        drop((first, second, third));
        assert_eq!(shares.taken().all, 0);
        assert!(shares.taken().by.is_empty());
    }
}
