//! Where a new machine goes.
//!
//! Of the hosts that it fits on, the one that is best by [`Cost`], which is compared from the first part to the last:
//! the order of preference of its regions, then how many of its group are in the same region, zone and host, then the
//! way from the region that is named first, then how full the host becomes. What does not fit is told as
//! [`NoCapacity`]. The host has the last word: it may refuse, and is then left out.

mod lacking;
mod room;
mod several;

pub use lacking::{Nearest, NoCapacity};
pub use room::Demand;
pub(crate) use several::{Request, place_all};

use crate::Observed;
use dunlin_model::desired::HostRow;
use dunlin_model::{HostId, Region, RegionExpr};
use room::Room;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Of each host's memory, this part is not given to machines that are new: those of a host that dies, and those that
/// wake, find room in it. With eleven hosts alike it holds the machines of one; a larger part would be felt by everybody
/// every day, and with fewer hosts no part that one would accept is enough. Where there is one host only, nothing of
/// another can come back on it, and its own hold their memory while they restart: then nothing is kept.
pub const KEPT_FOR_RESTARTS_PERCENT: u64 = 10;

/// Farther than any place on earth: where a region's place is not known.
const UNKNOWN_KM: u32 = 25_000;

/// What a machine is placed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// There is more of it than before.
    New,
    /// There was one, and its host or its release is lost: it may have what is kept for that.
    Restart,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'q> {
    pub demand: Demand,
    pub regions: &'q RegionExpr,
    /// No other host comes into question: its volume is there.
    pub only: Option<&'q HostId>,
    pub purpose: For,
}

/// What a machine costs on a host beside those that are there; smaller is better, the first part that differs decides.
/// Costs of several machines add up, in whatever order they are placed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    /// How far down the order of regions.
    pub rank: u64,
    /// Machines of the group that are in the same region: summed up, the pairs that would be lost together.
    pub region: u64,
    pub zone: u64,
    pub host: u64,
    /// From the region that is named first.
    pub km: u64,
    /// By how much the squares of the host's used parts of memory, cpus and disk grow, in thousandths.
    pub load: u64,
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            rank: self.rank + other.rank,
            region: self.region + other.region,
            zone: self.zone + other.zone,
            host: self.host + other.host,
            km: self.km + other.km,
            load: self.load + other.load,
        }
    }
}

/// The room of all hosts while machines are placed.
#[derive(Debug, Clone)]
pub struct Capacity<'a> {
    /// In the order of their ids.
    hosts: Vec<Room<'a>>,
    regions: Vec<&'a Region>,
    zones: usize,
}

/// How many machines of one group are where.
#[derive(Debug, Clone)]
pub struct Spread {
    hosts: Vec<u32>,
    zones: Vec<u32>,
    regions: Vec<u32>,
}

/// What an expression means for each region there is.
#[derive(Debug, Clone)]
pub(crate) struct Wishes {
    ranks: Vec<Option<u32>>,
    km: Vec<u32>,
}

/// A map that is asked for its keys in their order: for a thousand hosts much faster than looking each one up.
struct InOrder<'m, V>(std::iter::Peekable<std::collections::btree_map::Iter<'m, HostId, V>>);

impl<'m, V> InOrder<'m, V> {
    fn of(map: &'m BTreeMap<HostId, V>) -> Self {
        Self(map.iter().peekable())
    }

    fn at(&mut self, host: &HostId) -> Option<&'m V> {
        while self.0.next_if(|(id, _)| *id < host).is_some() {}
        self.0.next_if(|(id, _)| *id == host).map(|(_, value)| value)
    }
}

impl Wishes {
    /// Of these regions only those that are so far down the order.
    pub fn of_rank(&self, rank: u64) -> Self {
        let ranks = self.ranks.iter().map(|own| own.filter(|own| u64::from(*own) == rank)).collect();
        Self { ranks, km: self.km.clone() }
    }
}

impl<'a> Capacity<'a> {
    pub fn new(hosts: &'a [HostRow], observed: &'a Observed) -> Self {
        let mut rows: Vec<&HostRow> = hosts.iter().collect();
        rows.sort_by(|a, b| a.id.cmp(&b.id));
        let mut regions: BTreeMap<&Region, usize> = BTreeMap::new();
        // By region, as a zone's name means something in its region only.
        let (mut zones, mut zones_in): (usize, Vec<BTreeMap<_, usize>>) = Default::default();
        let keeps = rows.len() > 1;
        let mut facts = InOrder::of(&observed.hosts);
        let rooms = rows.into_iter().map(|row| {
            let region = *regions.entry(&row.region).or_insert_with(|| {
                zones_in.push(BTreeMap::new());
                zones_in.len() - 1
            });
            let zone = *zones_in[region].entry(&row.zone).or_insert_with(|| {
                zones += 1;
                zones - 1
            });
            let room = Room::new(row, facts.at(&row.id), observed, region, zone);
            if keeps { room.keeping(KEPT_FOR_RESTARTS_PERCENT) } else { room }
        });
        let hosts = rooms.collect();
        let mut by_index: Vec<(usize, &Region)> = regions.into_iter().map(|(region, index)| (index, region)).collect();
        by_index.sort_by_key(|(index, _)| *index);
        Self { hosts, regions: by_index.into_iter().map(|(_, region)| region).collect(), zones }
    }

    /// Free addresses of each host; a host that is not there has none.
    pub fn limit_addresses(&mut self, free: &BTreeMap<HostId, Vec<Ipv4Addr>>) {
        let mut free = InOrder::of(free);
        for room in &mut self.hosts {
            room.addresses = Some(free.at(&room.row.id).map_or(0, Vec::len));
        }
    }

    /// How a group's machines are spread that are on these hosts. Hosts that are gone count nowhere.
    pub fn spread<'h>(&self, hosts: impl IntoIterator<Item = &'h HostId>) -> Spread {
        let mut spread = Spread {
            hosts: vec![0; self.hosts.len()],
            zones: vec![0; self.zones],
            regions: vec![0; self.regions.len()],
        };
        for index in hosts.into_iter().filter_map(|host| self.index(host)) {
            self.count(&mut spread, index);
        }
        spread
    }

    /// Hosts that by what they said of themselves could not even take it back after a failure, though nothing else stands in the
    /// way; the roomiest first.
    pub fn claim_to_be_full(&self, ask: &Ask<'_>) -> Vec<&'a HostId> {
        let claims = |room: &&Room<'a>| {
            let is_in_question = !room.row.cordoned && room.refused.is_none() && room.addresses != Some(0);
            is_in_question && ask.regions.rank(&room.row.region).is_some() && !room.fits(&ask.demand, For::Restart)
        };
        let mut found: Vec<&Room<'a>> = self.hosts.iter().filter(claims).collect();
        found.sort_by_key(|room| (ask.regions.rank(&room.row.region), std::cmp::Reverse(room.free_mb), &room.row.id));
        found.into_iter().map(|room| &room.row.id).collect()
    }

    /// The best host for a machine of the group; from now on what it takes is taken.
    pub fn place(&mut self, ask: &Ask<'_>, spread: &mut Spread) -> Result<&'a HostRow, NoCapacity> {
        let wishes = self.wishes(ask.regions);
        let found = self.best(ask, &wishes, spread).ok_or_else(|| self.no_capacity(ask))?;
        self.take(found, &ask.demand, spread);
        Ok(self.hosts[found].row)
    }

    /// The machine stays on its host and becomes another size; what it gains counts as taken from now on, what it frees
    /// only once it is stopped. `held` is what it has at present: nothing, if it does not run.
    pub fn resize(&mut self, host: &HostId, held: Demand, wanted: Demand) -> Result<(), NoCapacity> {
        // Its host is gone, and with it the machine: that is not for its size to say.
        let Some(index) = self.index(host) else { return Ok(()) };
        let more = wanted.beyond(held);
        if !self.hosts[index].grows_by(&more) {
            return Err(self.no_capacity_to_grow(index, wanted, more));
        }
        self.hosts[index].take(&more);
        Ok(())
    }

    pub(crate) fn index(&self, host: &HostId) -> Option<usize> {
        self.hosts.binary_search_by(|room| room.row.id.cmp(host)).ok()
    }

    pub(crate) fn row(&self, index: usize) -> &'a HostRow {
        self.hosts[index].row
    }

    pub(crate) fn is_one_host(&self) -> bool {
        self.hosts.len() == 1
    }

    pub(crate) fn wishes(&self, regions: &RegionExpr) -> Wishes {
        let km = |region: &&Region| match regions.first() {
            Some(first) => dunlin_model::region::distance_km(first, region).unwrap_or(UNKNOWN_KM),
            None => 0,
        };
        Wishes {
            ranks: self.regions.iter().map(|region| regions.rank(region).map(|rank| rank as u32)).collect(),
            km: self.regions.iter().map(km).collect(),
        }
    }

    /// Ties are broken by the host's id.
    pub(crate) fn best(&self, ask: &Ask<'_>, wishes: &Wishes, spread: &Spread) -> Option<usize> {
        let mut best: Option<(Cost, usize)> = None;
        for index in self.candidates(ask) {
            let Some(mut cost) = self.cost_but_load(index, wishes, spread) else { continue };
            // How full it becomes takes the longest to say, and seldom decides.
            if best.is_some_and(|(least, _)| cost > Cost { load: 0, ..least }) || !self.fits(index, ask) {
                continue;
            }
            cost.load = self.hosts[index].load_of(&ask.demand);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, index));
            }
        }
        best.map(|(_, index)| index)
    }

    /// All hosts that it fits on, the best one first.
    pub(crate) fn by_cost(&self, ask: &Ask<'_>, wishes: &Wishes, spread: &Spread) -> Vec<usize> {
        let costs = self.candidates(ask).filter(|index| self.fits(*index, ask));
        let mut costs: Vec<_> = costs.filter_map(|index| Some((self.cost(index, ask, wishes, spread)?, index))).collect();
        costs.sort();
        costs.into_iter().map(|(_, index)| index).collect()
    }

    /// What the machine costs there; `None`: it is not wanted in that region.
    pub(crate) fn cost(&self, index: usize, ask: &Ask<'_>, wishes: &Wishes, spread: &Spread) -> Option<Cost> {
        let cost = self.cost_but_load(index, wishes, spread)?;
        Some(Cost { load: self.hosts[index].load_of(&ask.demand), ..cost })
    }

    pub(crate) fn cost_but_load(&self, index: usize, wishes: &Wishes, spread: &Spread) -> Option<Cost> {
        let room = &self.hosts[index];
        Some(Cost {
            rank: u64::from(wishes.ranks[room.region]?),
            region: u64::from(spread.regions[room.region]),
            zone: u64::from(spread.zones[room.zone]),
            host: u64::from(spread.hosts[index]),
            km: u64::from(wishes.km[room.region]),
            load: 0,
        })
    }

    pub(crate) fn fits(&self, index: usize, ask: &Ask<'_>) -> bool {
        self.hosts[index].fits(&ask.demand, ask.purpose)
    }

    fn candidates(&self, ask: &Ask<'_>) -> std::ops::Range<usize> {
        match ask.only {
            None => 0..self.hosts.len(),
            Some(only) => self.index(only).map_or(0..0, |index| index..index + 1),
        }
    }

    pub(crate) fn take(&mut self, index: usize, demand: &Demand, spread: &mut Spread) {
        self.hosts[index].take(demand);
        self.hosts[index].enter();
        self.count(spread, index);
    }

    pub(crate) fn give_back(&mut self, index: usize, demand: &Demand, spread: &mut Spread) {
        self.hosts[index].give_back(demand);
        self.hosts[index].leave();
        self.discount(spread, index);
    }

    pub(crate) fn count(&self, spread: &mut Spread, index: usize) {
        let room = &self.hosts[index];
        spread.hosts[index] += 1;
        spread.zones[room.zone] += 1;
        spread.regions[room.region] += 1;
    }

    pub(crate) fn discount(&self, spread: &mut Spread, index: usize) {
        let room = &self.hosts[index];
        spread.hosts[index] -= 1;
        spread.zones[room.zone] -= 1;
        spread.regions[room.region] -= 1;
    }

    /// For people: how many of a group are near a host.
    pub(crate) fn told(&self, index: usize, spread: &Spread) -> String {
        let room = &self.hosts[index];
        let zone = room.row.zone.as_ref().map_or(String::new(), |zone| format!(", {} in its zone {zone}", spread.zones[room.zone]));
        format!("{} on host {}{zone}, {} in {}", spread.hosts[index], room.row.id, spread.regions[room.region], room.row.region)
    }
}
