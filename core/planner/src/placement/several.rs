//! Several machines at once, of groups of different sizes.
//!
//! One after the other, the largest first, each on its best host. For machines that are alike that is the best there is:
//! what regions, zones, hosts and their fullness cost only grows faster the more there are, and one contains the other. Of
//! different sizes, small ones may stand in the way of each other or of a large one. Then places are searched with
//! going back, for a bounded number of tries, and what was found is improved one machine and one pair at a time.

use super::{Ask, Capacity, Cost, NoCapacity, Spread, Wishes};

/// Hosts that are tried before it counts that there is no room. With thousand hosts that is a tenth of a second.
const MAX_TRIES: usize = 2_000;
/// Rounds over all machines to improve; it seldom takes more than two.
const MAX_ROUNDS: usize = 4;
/// Pairs are exchanged only in small plans: there are as many as the square.
const MAX_EXCHANGED: usize = 24;

/// A machine that needs a place.
pub(crate) struct Request<'q> {
    pub ask: Ask<'q>,
    /// Index of the spread that it counts in. Machines of one group are alike.
    pub group: usize,
}

/// The host of each request, by index. All or none.
pub(crate) fn place_all(
    capacity: &mut Capacity<'_>,
    spreads: &mut [Spread],
    requests: &[Request<'_>],
) -> Result<Vec<usize>, NoCapacity> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    let size = |index: &usize| {
        let demand = &requests[*index].ask.demand;
        (demand.memory_mb, demand.cores, demand.volume_gb, std::cmp::Reverse(requests[*index].group))
    };
    order.sort_by_key(|index| std::cmp::Reverse(size(index)));
    let wishes: Vec<Wishes> = requests.iter().map(|request| capacity.wishes(request.ask.regions)).collect();
    let mut places = Places { capacity, spreads, requests, wishes, hosts: vec![None; requests.len()] };
    let stuck = order.iter().find(|index| !places.put_best(**index)).copied();
    let are_alike = requests.windows(2).all(|pair| pair[0].group == pair[1].group);
    if let Some(stuck) = stuck {
        let told = places.capacity.no_capacity(&requests[stuck].ask);
        places.clear();
        let ask = &requests[stuck].ask;
        let fits_alone = !places.capacity.by_cost(ask, &places.wishes[stuck], &places.spreads[requests[stuck].group]).is_empty();
        let mut tries = MAX_TRIES;
        if are_alike || !fits_alone || !places.search(&order, &mut tries) {
            places.clear();
            return Err(told);
        }
    }
    if !are_alike {
        places.improve();
    }
    Ok(places.hosts.iter().flatten().copied().collect())
}

struct Places<'c, 'a, 'q> {
    capacity: &'c mut Capacity<'a>,
    spreads: &'c mut [Spread],
    requests: &'c [Request<'q>],
    wishes: Vec<Wishes>,
    hosts: Vec<Option<usize>>,
}

impl Places<'_, '_, '_> {
    fn put_best(&mut self, index: usize) -> bool {
        let request = &self.requests[index];
        let best = self.capacity.best(&request.ask, &self.wishes[index], &self.spreads[request.group]);
        best.is_some_and(|host| {
            self.put(index, host);
            true
        })
    }

    fn put(&mut self, index: usize, host: usize) {
        let request = &self.requests[index];
        self.capacity.take(host, &request.ask.demand, &mut self.spreads[request.group]);
        self.hosts[index] = Some(host);
    }

    fn lift(&mut self, index: usize) -> Option<usize> {
        let request = &self.requests[index];
        let host = self.hosts[index].take()?;
        self.capacity.give_back(host, &request.ask.demand, &mut self.spreads[request.group]);
        Some(host)
    }

    fn clear(&mut self) {
        for index in 0..self.hosts.len() {
            self.lift(index);
        }
    }

    /// Going back. Those of one group are alike, so that of their orders one is enough: by host.
    fn search(&mut self, order: &[usize], tries: &mut usize) -> bool {
        let Some((&index, rest)) = order.split_first() else { return true };
        let request = &self.requests[index];
        let group = request.group;
        let before = (0..self.hosts.len()).filter(|other| self.requests[*other].group == group);
        let lowest = before.filter_map(|other| self.hosts[other]).max().unwrap_or(0);
        let hosts = self.capacity.by_cost(&request.ask, &self.wishes[index], &self.spreads[group]);
        for host in hosts.into_iter().filter(|host| *host >= lowest) {
            if *tries == 0 {
                return false;
            }
            *tries -= 1;
            self.put(index, host);
            if self.search(rest, tries) {
                return true;
            }
            self.lift(index);
        }
        false
    }

    fn improve(&mut self) {
        for _ in 0..MAX_ROUNDS {
            let mut is_better = false;
            for index in 0..self.hosts.len() {
                is_better |= self.moves_alone(index);
            }
            if self.hosts.len() <= MAX_EXCHANGED {
                for one in 0..self.hosts.len() {
                    for other in one + 1..self.hosts.len() {
                        is_better |= self.exchanges(one, other);
                    }
                }
            }
            if !is_better {
                return;
            }
        }
    }

    fn moves_alone(&mut self, index: usize) -> bool {
        let Some(before) = self.lift(index) else { return false };
        self.put_best(index); // where it was it still fits
        self.hosts[index] != Some(before) && {
            let now = self.lift(index);
            let better = self.cost_at(index, now) < self.cost_at(index, Some(before));
            self.put(index, now.filter(|_| better).unwrap_or(before));
            better
        }
    }

    /// Two of different groups change places.
    fn exchanges(&mut self, one: usize, other: usize) -> bool {
        let (Some(a), Some(b)) = (self.hosts[one], self.hosts[other]) else { return false };
        if a == b || self.requests[one].group == self.requests[other].group {
            return false;
        }
        self.lift(one);
        self.lift(other);
        let kept = self.both(one, a, other, b);
        let changed = self.both(one, b, other, a);
        let is_better = changed.zip(kept).is_some_and(|(changed, kept)| changed < kept);
        let (a, b) = if is_better { (b, a) } else { (a, b) };
        self.put(one, a);
        self.put(other, b);
        is_better
    }

    /// The cost of both there, neither of which is placed; `None`: they do not fit.
    fn both(&mut self, one: usize, a: usize, other: usize, b: usize) -> Option<Cost> {
        if !self.capacity.fits(a, &self.requests[one].ask) {
            return None;
        }
        let first = self.cost_at(one, Some(a))?;
        self.put(one, a);
        let fits = self.capacity.fits(b, &self.requests[other].ask);
        let second = self.cost_at(other, Some(b)).filter(|_| fits);
        self.lift(one);
        Some(first + second?)
    }

    fn cost_at(&self, index: usize, host: Option<usize>) -> Option<Cost> {
        let request = &self.requests[index];
        self.capacity.cost(host?, &request.ask, &self.wishes[index], &self.spreads[request.group])
    }
}
