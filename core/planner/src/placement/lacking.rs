//! Why a machine has no place: where, how much of what is missing, and which region would have room.

use super::room::Room;
use super::{Ask, Capacity, Demand, For};
use dunlin_model::region::distance_km;
use dunlin_model::{Region, RegionExpr};
use std::collections::BTreeMap;
use std::fmt;

/// With more hosts than this, one line a region says enough.
const MOST_HOSTS_TOLD: usize = 8;
/// More regions than that are counted.
const MOST_REGIONS_TOLD: usize = 12;

/// No host has room, with what each one lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NoCapacity {
    pub demand: Demand,
    /// `None`: everywhere.
    pub regions: Option<RegionExpr>,
    /// By host, or by region where there are many.
    pub why: Vec<String>,
    /// Of the regions that were not asked for.
    pub nearest: Option<Nearest>,
}

/// A region that has room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nearest {
    pub region: Region,
    /// A region that was asked for, and how far it is; `None`: the place of one of them is not known.
    pub away: Option<(Region, u32)>,
}

impl fmt::Display for NoCapacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Demand { memory_mb, cores, volume_gb, .. } = self.demand;
        f.write_str("no host")?;
        if let Some(regions) = &self.regions {
            write!(f, " in {regions}")?;
        }
        write!(f, " has room for a machine with {memory_mb} MB")?;
        if cores > 0 {
            write!(f, " and {cores} performance cpus")?;
        }
        if volume_gb > 0 {
            write!(f, " and a new volume of {volume_gb} GB")?;
        }
        write!(f, ": {}", self.why.join("; "))?;
        match &self.nearest {
            None => Ok(()),
            Some(Nearest { region, away: Some((from, km)) }) => {
                write!(f, "; the nearest region with room is {region}, {km} km from {from}")
            }
            Some(Nearest { region, away: None }) => write!(f, "; region {region} has room"),
        }
    }
}

impl<'a> Capacity<'a> {
    pub(crate) fn no_capacity(&self, ask: &Ask<'_>) -> NoCapacity {
        let is_asked = |room: &&Room<'a>| match ask.only {
            Some(only) => room.row.id == *only,
            None => ask.regions.rank(&room.row.region).is_some(),
        };
        let asked: Vec<&Room<'a>> = self.hosts.iter().filter(is_asked).collect();
        let mut why = if asked.len() > MOST_HOSTS_TOLD {
            by_region(&asked, ask)
        } else {
            asked.iter().map(|room| self.lacks(room, &ask.demand, ask.purpose)).collect()
        };
        if why.is_empty() {
            why.push(if self.hosts.is_empty() { "no host has joined".into() } else { "no host is there".into() });
        }
        let everywhere = ask.only.is_some() || asked.len() == self.hosts.len();
        NoCapacity {
            demand: ask.demand,
            regions: (!everywhere).then(|| ask.regions.clone()),
            why,
            nearest: if everywhere { None } else { self.nearest(ask) },
        }
    }

    /// Of one that is there and stays where it is.
    pub(super) fn no_capacity_to_grow(&self, index: usize, demand: Demand, more: Demand) -> NoCapacity {
        let why = vec![self.lacks(&self.hosts[index], &more, For::Restart)];
        NoCapacity { demand: Demand { volume_gb: 0, ..demand }, regions: None, why, nearest: None }
    }

    fn nearest(&self, ask: &Ask<'_>) -> Option<Nearest> {
        // A word such as `eu` names none: then from one that it stands for.
        let is_asked = |room: &&Room<'a>| ask.regions.rank(&room.row.region).is_some();
        let from = ask.regions.first().or_else(|| self.hosts.iter().find(is_asked).map(|room| &room.row.region));
        let has_room = |room: &&Room<'a>| ask.regions.rank(&room.row.region).is_none() && room.fits(&ask.demand, ask.purpose);
        let away = |room: &Room<'a>| from.and_then(|from| distance_km(from, &room.row.region));
        let found = self.hosts.iter().filter(has_room);
        let found = found.min_by_key(|room| (away(room).unwrap_or(super::UNKNOWN_KM), &room.row.region))?;
        Some(Nearest { region: found.row.region.clone(), away: from.cloned().zip(away(found)) })
    }

    fn lacks(&self, room: &Room<'a>, demand: &Demand, purpose: For) -> String {
        let id = &room.row.id;
        if let Some(why) = room.refused {
            return format!("host {id}: {why}");
        }
        if self.is_one_host() && !room.row.cordoned {
            return format!("host {id} {}", missing(room, demand, purpose, Told::Free));
        }
        format!("host {id} ({}) {}", room.row.region, missing(room, demand, purpose, Told::FreeAndMissing))
    }
}

#[derive(Clone, Copy)]
enum Told {
    Free,
    FreeAndMissing,
}

/// What stands in the way on a host, the memory last: where something else is missing too, that is news.
fn missing(room: &Room<'_>, demand: &Demand, purpose: For, told: Told) -> String {
    if room.row.cordoned {
        return "is cordoned".into();
    }
    let mut parts = Vec::new();
    if room.addresses == Some(0) {
        parts.push("has no free address: freed ones rest for 24 hours".to_owned());
    }
    if room.free_slots == Some(0) {
        parts.push(format!("carries {} machines, the most", room.slots));
    }
    if let Some(free) = room.free_cores.filter(|free| demand.cores > 0 && *free < u64::from(demand.cores)) {
        let missing = u64::from(demand.cores) - free;
        parts.push(format!("has {free} of {} performance cpus free, {missing} are missing", room.cores));
    }
    if let Some(disk) = room.disk.filter(|disk| disk.free_gb < u64::from(demand.volume_gb)) {
        let missing = u64::from(demand.volume_gb) - disk.free_gb;
        parts.push(format!("has {} GB of disk free for volumes, {missing} GB are missing", disk.free_gb));
    }
    let usable_mb = room.usable_mb(purpose);
    if parts.is_empty() || usable_mb < u64::from(demand.memory_mb) {
        let mut text = format!("has {usable_mb} MB free");
        if purpose == For::New && room.kept_mb > 0 {
            text.push_str(&format!(" beside {} that are kept for restarts", room.free_mb.min(room.kept_mb)));
        }
        let missing_mb = u64::from(demand.memory_mb).saturating_sub(usable_mb);
        if matches!(told, Told::FreeAndMissing) && missing_mb > 0 {
            text.push_str(&format!(", {missing_mb} MB are missing"));
        }
        parts.push(text);
    }
    parts.join(" and ")
}

/// One line a region: what stands in the way on its roomiest host, and how many could not be asked.
fn by_region(asked: &[&Room<'_>], ask: &Ask<'_>) -> Vec<String> {
    let mut regions: BTreeMap<&Region, Vec<&Room<'_>>> = BTreeMap::new();
    for room in asked {
        regions.entry(&room.row.region).or_default().push(room);
    }
    let line = |(region, rooms): (&&Region, &Vec<&Room<'_>>)| {
        let cordoned = rooms.iter().filter(|room| room.row.cordoned).count();
        let refused = rooms.iter().filter(|room| room.refused.is_some() && !room.row.cordoned).count();
        let mut text = format!("{region}: {} hosts", rooms.len());
        for (count, what) in [(cordoned, "cordoned"), (refused, "refused it themselves")] {
            if count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        }
        let open = rooms.iter().filter(|room| !room.row.cordoned && room.refused.is_none());
        if let Some(roomiest) = open.max_by_key(|room| (room.free_mb, std::cmp::Reverse(&room.row.id))) {
            let why = missing(roomiest, &ask.demand, ask.purpose, Told::FreeAndMissing);
            text.push_str(&format!(", the roomiest, {}, {why}", roomiest.row.id));
        }
        text
    };
    let mut lines: Vec<String> = regions.iter().take(MOST_REGIONS_TOLD).map(line).collect();
    if regions.len() > MOST_REGIONS_TOLD {
        lines.push(format!("and {} regions more", regions.len() - MOST_REGIONS_TOLD));
    }
    lines
}
