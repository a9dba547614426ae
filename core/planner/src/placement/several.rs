//! Several machines at once, of groups of different sizes.
//!
//! One after the other, the largest first, each on its best host. For machines that are alike that is the best there is:
//! what regions, zones, hosts and their fullness cost only grows faster the more there are, and one contains the other. Of
//! different sizes, small ones may stand in the way of each other or of a large one. So what was found is improved one
//! machine and one pair at a time; a small plan is then searched whole, leaving out what is already worse, and a large one
//! with going back where there seemed to be no room. Both searches are bounded.

use super::{Ask, Capacity, Cost, NoCapacity, Spread, Wishes};

/// Hosts times machines of a plan that is searched whole: few hosts, or few machines. Of larger ones a search would see
/// too little to find more than improving does.
const SMALL: usize = 128;
/// Hosts that a search looks at before it ends with what it has: some milliseconds.
const MOST_LOOKED_AT: usize = 100_000;
/// Rounds over all machines to improve; it seldom takes more than two.
const MAX_ROUNDS: usize = 4;
/// Pairs are exchanged only in plans of at most so many machines: there are as many as the square.
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
    let no_capacity = stuck.map(|index| places.capacity.no_capacity(&requests[index].ask));
    if stuck.is_none() && !are_alike {
        places.improve();
    }
    let is_hopeless = stuck.is_some_and(|index| {
        places.clear();
        are_alike || !places.fits_alone(index)
    });
    let is_small = places.capacity.hosts.len() * requests.len() <= SMALL;
    if !is_hopeless && !are_alike && (is_small || stuck.is_some()) {
        places.search_from(&order, if is_small { Goal::Least } else { Goal::Any });
    }
    let hosts: Vec<usize> = places.hosts.iter().flatten().copied().collect();
    match no_capacity {
        Some(no_capacity) if hosts.len() < requests.len() => Err(no_capacity),
        _ => Ok(hosts),
    }
}

/// When a search ends.
#[derive(Clone, Copy, PartialEq)]
enum Goal {
    Any,
    Least,
}

/// What a search has found, and how much longer it goes on.
struct Search {
    goal: Goal,
    best: Option<(Cost, Vec<Option<usize>>)>,
    looks_left: usize,
}

impl Search {
    fn is_over(&self) -> bool {
        self.looks_left == 0 || (self.goal == Goal::Any && self.best.is_some())
    }
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

    fn fits_alone(&self, index: usize) -> bool {
        let request = &self.requests[index];
        self.capacity.best(&request.ask, &self.wishes[index], &self.spreads[request.group]).is_some()
    }

    /// From what is placed, if all is, to what a search finds; nothing is placed if it finds nothing.
    fn search_from(&mut self, order: &[usize], goal: Goal) {
        let mut search = Search { goal, best: None, looks_left: MOST_LOOKED_AT };
        if self.hosts.iter().all(Option::is_some) {
            let found = self.hosts.clone();
            self.clear();
            let mut cost = Cost::default();
            for (index, host) in found.iter().enumerate() {
                cost = cost + self.cost_at(index, *host).unwrap_or_default();
                host.iter().for_each(|host| self.put(index, *host));
            }
            search.best = Some((cost, found));
        }
        self.clear();
        self.search(order, Cost::default(), &mut search);
        for (index, host) in search.best.into_iter().flat_map(|(_, hosts)| hosts).enumerate() {
            host.iter().for_each(|host| self.put(index, *host));
        }
    }

    /// Those of one group are alike, so that of their orders one is enough: by host.
    fn search(&mut self, order: &[usize], so_far: Cost, search: &mut Search) {
        let Some((&index, rest)) = order.split_first() else {
            search.best = Some((so_far, self.hosts.clone()));
            return;
        };
        let request = &self.requests[index];
        let group = request.group;
        let alike = (0..self.hosts.len()).filter(|other| self.requests[*other].group == group);
        let lowest = alike.filter_map(|other| self.hosts[other]).max().unwrap_or(0);
        search.looks_left = search.looks_left.saturating_sub(self.capacity.hosts.len());
        let hosts = self.capacity.by_cost(&request.ask, &self.wishes[index], &self.spreads[group]);
        for host in hosts.into_iter().filter(|host| *host >= lowest) {
            let Some(cost) = self.cost_at(index, Some(host)).map(|cost| so_far + cost) else { continue };
            // Whatever follows costs something, too. The next hosts cost more.
            if search.is_over() || search.best.as_ref().is_some_and(|(least, _)| cost >= *least) {
                return;
            }
            self.put(index, host);
            self.search(rest, cost, search);
            self.lift(index);
        }
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
