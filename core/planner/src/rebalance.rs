//! Machines that stand too close together move apart, a few at a time.
//!
//! Hosts join after machines were placed, others were cordoned or full at that time. A machine moves if its group is then
//! spread better over regions, zones or hosts; never only because a host is fuller than another, nor to a region that is
//! preferred more or less. Before that, those move that an operator wants off a host that is drained, one at a time and to
//! wherever a new one would go. Each move lowers the number of pairs that would be lost together, so that there is an end to
//! it: a settled cluster plans nothing.

use crate::plan::{Placed, addition, is_replaceable, removal, serves};
use crate::{Ask, Capacity, Demand, Desired, GroupTarget, Observed, PlanError, Pool, Spread, Step};
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_model::{HostId, MachineId, MachineSpec, MachineState};
use std::collections::BTreeSet;

/// Of one plan. What moves is stopped once its successor serves; the fewer at once, the less is felt.
pub const MAX_MOVES: usize = 2;

/// A machine that another one takes the place of, elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub machine: MachineId,
    pub group: String,
    pub from: HostId,
    pub to: HostId,
    pub why: String,
}

/// Why a machine stays on a host that is drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stays {
    /// Its files are on that host.
    HasVolume,
    /// It runs once at a time: without a service nobody says that two may run for a moment.
    IsExclusive,
    /// It ends by itself, or runs by the clock.
    IsPassing,
    /// No release made it, so that nothing makes another one.
    IsByHand,
}

/// `None`: another machine may take its place while it still runs.
pub fn stays(spec: &MachineSpec) -> Option<Stays> {
    match spec.release {
        _ if !spec.mounts.is_empty() => Some(Stays::HasVolume),
        0 => Some(Stays::IsByHand),
        _ if is_replaceable(spec) => None,
        _ if spec.schedule.is_some() || spec.auto_destroy => Some(Stays::IsPassing),
        _ => Some(Stays::IsExclusive),
    }
}

/// What would move, the most useful first; at most [`MAX_MOVES`].
pub fn drift(desired: &Desired, observed: &Observed) -> Vec<Move> {
    moves(desired, observed, &mut Capacity::new(&desired.hosts, observed)).into_iter().map(|(moved, _)| moved).collect()
}

/// New ones first, each healthy before what it replaces is stopped.
pub(crate) fn steps(
    desired: &Desired,
    observed: &Observed,
    capacity: &mut Capacity<'_>,
    pool: &mut Pool,
) -> Result<Vec<Step>, PlanError> {
    let (mut additions, mut removals) = (Vec::new(), Vec::new());
    for (moved, host) in moves(desired, observed, capacity) {
        let placed = Placed { host, volume: None, why: moved.why.clone() };
        additions.extend(addition(desired, &moved.group, vec![placed], pool)?);
        let row = desired.machines.iter().find(|row| row.id == moved.machine);
        removals.extend(row.into_iter().flat_map(|row| removal(desired, observed, row, &moved.why)));
    }
    additions.append(&mut removals);
    Ok(additions)
}

fn moves<'a>(desired: &Desired, observed: &Observed, capacity: &mut Capacity<'a>) -> Vec<(Move, &'a HostRow)> {
    if let Some(drained) = off_a_drained_host(desired, observed, capacity) {
        return vec![drained];
    }
    let mut found = Vec::new();
    for (name, group) in desired.groups.iter().filter(|(_, group)| group.mount.is_none() && is_replaceable(&group.spec)) {
        let rows = desired.machines.iter().filter(|row| row.spec.process_group == *name);
        let mut rows: Vec<&MachineRow> = rows.collect();
        if rows.len() != group.count as usize {
            continue; // first there have to be as many as there should be
        }
        let mut spread = capacity.spread(rows.iter().map(|row| &row.host));
        while found.len() < MAX_MOVES {
            let Some((at, moved, to)) = best_move(desired, observed, capacity, (name, group), &rows, &spread) else { break };
            let row = rows.remove(at);
            if let Some(from) = capacity.index(&row.host) {
                capacity.discount(&mut spread, from);
            }
            capacity.take(to, &Demand::of(&group.spec, 0), &mut spread);
            found.push((moved, capacity.row(to)));
        }
    }
    found
}

/// A move between hosts, by index.
struct Found {
    /// Pairs that are spared in regions, zones and hosts; the first that differs decides.
    gain: [i64; 3],
    at: usize,
    from: usize,
    to: usize,
}

/// The move that spares most pairs, of one that serves: what sleeps is not woken for it, and what fails gains nothing.
fn best_move(
    desired: &Desired,
    observed: &Observed,
    capacity: &Capacity<'_>,
    (name, group): (&str, &GroupTarget),
    rows: &[&MachineRow],
    spread: &Spread,
) -> Option<(usize, Move, usize)> {
    let wishes = capacity.wishes(&desired.regions);
    let ask = Ask { demand: Demand::of(&group.spec, 0), regions: &desired.regions, only: None, purpose: desired.purpose.places() };
    let mut best: Option<Found> = None;
    let mut looked_at = BTreeSet::new();
    for (at, row) in rows.iter().enumerate().filter(|(_, row)| serves(row, observed)) {
        let Some(from) = capacity.index(&row.host).filter(|from| looked_at.insert(*from)) else { continue };
        let mut without = spread.clone();
        capacity.discount(&mut without, from);
        // One outside of the regions that its app names by now stays where it is.
        let Some(now) = capacity.cost_but_load(from, &wishes, &without) else { continue };
        // Only to regions that are preferred as much as its own.
        let wishes = wishes.of_rank(now.rank);
        let Some(to) = capacity.best(&ask, &wishes, &without) else { continue };
        let Some(then) = capacity.cost_but_load(to, &wishes, &without) else { continue };
        let gain = |before: u64, after: u64| before as i64 - after as i64;
        let gain = [gain(now.region, then.region), gain(now.zone, then.zone), gain(now.host, then.host)];
        if gain > [0, 0, 0] && best.as_ref().is_none_or(|best| gain > best.gain) {
            best = Some(Found { gain, at, from, to });
        }
    }
    let Found { at, from, to, .. } = best?;
    let why = format!("{name} has {}, and {}", capacity.told(from, spread), capacity.told(to, spread));
    let (from, to_row) = (rows[at].host.clone(), capacity.row(to));
    let moved = Move { machine: rows[at].id.clone(), group: name.to_owned(), from, to: to_row.id.clone(), why };
    Some((at, moved, to))
}

/// One that serves or sleeps: what fails here would fail there. The group's new machine is looked for as any other.
fn off_a_drained_host<'a>(desired: &Desired, observed: &Observed, capacity: &Capacity<'a>) -> Option<(Move, &'a HostRow)> {
    let is_drained = |host: &HostId| capacity.index(host).is_some_and(|index| capacity.row(index).draining);
    let sleeps = |row: &MachineRow| {
        let fact = observed.machines.get(&row.id);
        fact.is_some_and(|fact| matches!(fact.state, MachineState::Stopped | MachineState::Suspended))
    };
    for (name, group) in desired.groups.iter().filter(|(_, group)| group.mount.is_none() && is_replaceable(&group.spec)) {
        let rows: Vec<&MachineRow> = desired.machines.iter().filter(|row| row.spec.process_group == *name).collect();
        // What was lost with its host is replaced by a repair.
        let is_there = |row: &MachineRow| !observed.lost.contains(&row.id) && (serves(row, observed) || sleeps(row));
        let moving = rows.iter().find(|row| is_drained(&row.host) && stays(&row.spec).is_none() && is_there(row));
        let Some(row) = moving.filter(|_| rows.len() == group.count as usize) else { continue };
        let ask = Ask { demand: Demand::of(&group.spec, 0), regions: &desired.regions, only: None, purpose: desired.purpose.places() };
        let others = capacity.spread(rows.iter().filter(|other| other.id != row.id).map(|other| &other.host));
        let Some(to) = capacity.best(&ask, &capacity.wishes(&desired.regions), &others) else { continue };
        let to = capacity.row(to);
        let why = format!("host {} is drained, and {name} has a place on host {}", row.host, to.id);
        let moved = Move { machine: row.id.clone(), group: name.clone(), from: row.host.clone(), to: to.id.clone(), why };
        return Some((moved, to));
    }
    None
}
