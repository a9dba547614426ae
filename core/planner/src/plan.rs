//! Making a plan: new machines first, then updates one at a time, then removals.

use crate::placement::{Request, place_all};
use crate::{
    Ask, Capacity, Demand, Desired, GroupTarget, MAX_MACHINES_PER_APP, NoCapacity, Observed, Plan, Pool, Purpose, Spread,
    Step, StepKind, VolumeTaken, command_id, kept_mounts, rebalance,
};
use dunlin_model::config::Strategy;
use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{AutoStop, HostId, MachineId, MachineSpec, MachineState, MachineVersion, Region, RegionExpr, VolumeId};
use dunlin_view::MachineFact;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{0}")]
    NoCapacity(#[from] NoCapacity),
    #[error("the release wants {wanted} machines, more than the {MAX_MACHINES_PER_APP} of one app")]
    TooManyMachines { wanted: u32 },
    #[error("volume {volume} ({name}) is free, but it is in {region}, and primary_region {regions} leaves that out")]
    VolumeElsewhere { volume: VolumeId, name: String, region: Region, regions: RegionExpr },
    #[error("host {0} has no free address: freed ones rest for 24 hours")]
    NoAddress(HostId),
    #[error("the pool of drawn ids is too small for this plan")]
    PoolTooSmall,
}

/// The steps from `observed` to `desired`; an empty list when nothing differs.
///
/// Machines of a lost host that may run twice are replaced. Where there is no room for all of them, as many are as there
/// is room for; the others keep their place, and come back with their host or with the next plan.
pub fn plan(desired: &Desired, observed: &Observed, pool: Pool) -> Result<Plan, PlanError> {
    // Where most hosts are gone, it is rather the one who says so that is cut off.
    let is_cut_off = 2 * observed.dead.len() > desired.hosts.len();
    let is_to_go = |row: &&MachineRow| !is_cut_off && observed.lost.contains(&row.id) && is_replaceable(&row.spec);
    let lost = desired.machines.iter().filter(is_to_go);
    let lost: Vec<&MachineId> = lost.map(|row| &row.id).collect();
    let attempt = |replaced: usize| plan_with(desired, observed, pool.clone(), &lost[..replaced].iter().copied().collect());
    let mut replaced = lost.len();
    let all = attempt(replaced);
    // A repair that replaces nothing changes nothing: then it has failed, and says why.
    let least = usize::from(desired.purpose == Purpose::Repair);
    let mut made = all.clone();
    while matches!(made, Err(PlanError::NoCapacity(_))) && replaced > least {
        replaced = (replaced / 2).max(least);
        made = attempt(replaced);
    }
    made.or(all)
}

/// See [`MachineSpec::is_replaceable`].
pub fn is_replaceable(spec: &MachineSpec) -> bool {
    spec.is_replaceable()
}

fn plan_with(
    desired: &Desired,
    observed: &Observed,
    mut pool: Pool,
    replaced: &BTreeSet<&MachineId>,
) -> Result<Plan, PlanError> {
    let wanted = desired.groups.values().fold(0u32, |sum, group| sum.saturating_add(group.count));
    if wanted > MAX_MACHINES_PER_APP {
        return Err(PlanError::TooManyMachines { wanted });
    }
    let mut capacity = Capacity::new(&desired.hosts, observed);
    capacity.limit_addresses(&pool.addresses);
    if desired.purpose == Purpose::Rebalance {
        return Ok(with_steps(desired, rebalance::steps(desired, observed, &mut capacity, &mut pool)?));
    }
    let (mut missing, mut kept, mut removals) = (Vec::new(), Kept::default(), Vec::new());
    for (name, group) in &desired.groups {
        let rows = desired.machines.iter().filter(|row| row.spec.process_group == *name);
        let (lost, rows): (Vec<_>, Vec<_>) = rows.partition(|row| replaced.contains(&row.id));
        let (rows, misfits): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| fits(group, row));
        let found = rows.len();
        let (mut rows, surplus) = keep_the_best(&capacity, desired, observed, rows, group.count as usize);
        missing.push(Missing {
            name,
            group,
            count: group.count as usize - rows.len(),
            spread: capacity.spread(rows.iter().map(|row| &row.host)),
        });
        let has_new = rows.len() < group.count as usize;
        let woken = if has_new { None } else { to_wake(desired, observed, group, &rows, &mut capacity) };
        // Those that do not serve are updated first: nobody misses them, and they may serve afterwards.
        rows.sort_by_key(|row| (woken.as_ref() != Some(&row.id), serves(row, observed), row.id.clone()));
        kept.woken.extend(woken);
        for row in rows {
            keep(desired, observed, group, row, &mut pool, &mut kept)?;
            resize(desired, observed, group, row, &mut capacity)?;
        }
        for row in surplus {
            let why = format!("{name} should have {} machines, not {found}", group.count);
            removals.extend(removal(desired, observed, row, &why));
        }
        for row in lost {
            let why = format!("host {} is lost, and another machine takes its place", row.host);
            removals.extend(removal(desired, observed, row, &why));
        }
        for row in misfits {
            removals.extend(removal(desired, observed, row, "a machine with the volume that it lacks takes its place"));
        }
    }
    let mut additions = Vec::new();
    for (name, placed) in place_missing(desired, &mut capacity, missing, &mut pool)? {
        additions.extend(addition(desired, name, placed, &mut pool)?);
    }
    for row in desired.machines.iter().filter(|row| !desired.groups.contains_key(&row.spec.process_group)) {
        let why = format!("process group {} is not in release {}", row.spec.process_group, desired.release);
        removals.extend(removal(desired, observed, row, &why));
    }
    let Kept { uncordons, starts, gates, updates, woken: _ } = kept;
    let mut steps = [uncordons, additions, starts, gates, updates, removals].concat();
    if desired.strategy == Strategy::Immediate {
        steps.retain(|step| !matches!(step.kind, StepKind::Gate { .. }));
    }
    Ok(with_steps(desired, steps))
}

fn with_steps(desired: &Desired, steps: Vec<Step>) -> Plan {
    let exists = |id: &MachineId| desired.machines.iter().any(|row| row.id == *id);
    Plan {
        specs: desired.groups.iter().map(|(name, group)| (name.clone(), group.spec.clone())).collect(),
        mounts: desired.groups.iter().filter_map(|(name, group)| Some((name.clone(), group.mount.clone()?))).collect(),
        left: desired.left.iter().filter(|(id, _)| exists(id)).map(|(id, left)| (id.clone(), *left)).collect(),
        steps,
        ..Plan::empty(desired)
    }
}

/// Whether requests may reach it.
pub(crate) fn serves(row: &MachineRow, observed: &Observed) -> bool {
    !observed.lost.contains(&row.id)
        && observed.machines.get(&row.id).is_some_and(|fact| fact.is_healthy() && !fact.cordoned)
}

/// Whether the machine can become what its group should be. A volume ties it to the host that it is on, so that a
/// machine without the volume of its group may be on the wrong one.
fn fits(group: &GroupTarget, row: &MachineRow) -> bool {
    group.mount.as_ref().is_none_or(|mount| mount.fits(&row.spec.mounts))
}

/// Those to keep, and those that are too many. Those that serve are kept before those that do not, then those that are
/// spread best; the oldest id breaks the tie.
fn keep_the_best<'d>(
    capacity: &Capacity<'_>,
    desired: &Desired,
    observed: &Observed,
    mut rows: Vec<&'d MachineRow>,
    count: usize,
) -> (Vec<&'d MachineRow>, Vec<&'d MachineRow>) {
    let wishes = capacity.wishes(&desired.regions);
    let mut spread = capacity.spread([]);
    let mut kept = Vec::new();
    while kept.len() < count {
        let key = |row: &&MachineRow| {
            let cost = capacity.index(&row.host).and_then(|index| capacity.cost_but_load(index, &wishes, &spread));
            (!serves(row, observed), cost.is_none(), cost, row.id.clone()) // a host that is gone is the last
        };
        let Some(at) = (0..rows.len()).min_by_key(|at| key(&rows[*at])) else { break };
        let row = rows.remove(at);
        if let Some(index) = capacity.index(&row.host) {
            capacity.count(&mut spread, index);
        }
        kept.push(row);
    }
    rows.sort_by_key(|row| (!serves(row, observed), row.id.clone()));
    (kept, rows)
}

/// How many machines of a group are to be made, and where those are that stay.
struct Missing<'d> {
    name: &'d str,
    group: &'d GroupTarget,
    count: usize,
    spread: Spread,
}

/// A new machine's host.
pub(crate) struct Placed<'d> {
    pub host: &'d HostRow,
    pub volume: Option<VolumeTaken>,
    pub why: String,
}

/// A machine goes where its volume is, so these are placed first. Only where no volume is free, one is made: a machine that
/// found none of its files because their host is full would be worse than none.
fn place_missing<'d>(
    desired: &'d Desired,
    capacity: &mut Capacity<'d>,
    mut missing: Vec<Missing<'d>>,
    pool: &mut Pool,
) -> Result<Vec<(&'d str, Vec<Placed<'d>>)>, PlanError> {
    let (regions, purpose) = (&desired.regions, desired.purpose.places());
    let mut free_volumes: Vec<_> = desired.free_volumes.iter().collect();
    free_volumes.sort_by_key(|row| (row.created_at_ms, row.id.clone()));
    let mut placed: Vec<(&str, Vec<Placed<'_>>)> = missing.iter().map(|missing| (missing.name, Vec::new())).collect();
    for (missing, (_, placed)) in missing.iter_mut().zip(&mut placed) {
        let Some(mount) = &missing.group.mount else { continue };
        while placed.len() < missing.count && free_volumes.iter().any(|row| row.name == mount.name) {
            let ask = Ask { demand: Demand::of(&missing.group.spec, 0), regions, only: None, purpose };
            let (host, taken) = beside_its_volume(capacity, ask, &mut missing.spread, &mut free_volumes, &mount.name)?;
            let why = format!("{} needs {} more; volume {taken} is on host {}", missing.name, missing.count, host.id);
            placed.push(Placed { host, volume: Some(VolumeTaken { volume: taken, is_new: false }), why });
        }
    }
    let mut requests = Vec::new();
    for (group, missing) in missing.iter().enumerate() {
        let volume_gb = missing.group.mount.as_ref().map_or(0, |mount| mount.size_gb);
        let ask = Ask { demand: Demand::of(&missing.group.spec, volume_gb), regions, only: None, purpose };
        requests.extend((placed[group].1.len()..missing.count).map(|_| Request { ask, group }));
    }
    let mut spreads: Vec<Spread> = missing.iter().map(|missing| missing.spread.clone()).collect();
    let hosts = place_all(capacity, &mut spreads, &requests)?;
    for (request, index) in requests.iter().zip(hosts) {
        let (missing, host) = (&missing[request.group], capacity.row(index));
        let volume = match &missing.group.mount {
            None => None,
            Some(_) => Some(VolumeTaken { volume: pool.volumes.pop().ok_or(PlanError::PoolTooSmall)?, is_new: true }),
        };
        let fell_back = fell_back(regions, &host.region);
        let told = capacity.told(index, &spreads[request.group]);
        let why = format!("{} needs {} more; then it has {told}{fell_back}", missing.name, missing.count);
        placed[request.group].1.push(Placed { host, volume, why });
    }
    Ok(placed)
}

/// For people: the regions that are preferred to the one that it is.
fn fell_back(regions: &RegionExpr, region: &Region) -> String {
    let preferred = &regions.terms()[..regions.rank(region).unwrap_or(0)];
    let preferred: Vec<String> = preferred.iter().map(ToString::to_string).collect();
    match &preferred[..] {
        [] => String::new(),
        [one] => format!("; {one} has no room for it"),
        several => format!("; {} have no room for it", several.join(", ")),
    }
}

/// The oldest volume of the name on whose host there is room. One outside of the regions that the app names is not taken, and
/// not passed over for a new one either: what is on it would be missed.
fn beside_its_volume<'d>(
    capacity: &mut Capacity<'d>,
    ask: Ask<'_>,
    spread: &mut Spread,
    free: &mut Vec<&'d VolumeRow>,
    name: &str,
) -> Result<(&'d HostRow, VolumeId), PlanError> {
    let (mut refused, mut elsewhere) = (None, None);
    for at in (0..free.len()).filter(|at| free[*at].name == name) {
        if ask.regions.rank(&free[at].region).is_none() {
            elsewhere = elsewhere.or(Some(free[at]));
            continue;
        }
        match capacity.place(&Ask { only: Some(&free[at].host), ..ask }, spread) {
            Ok(host) => return Ok((host, free.remove(at).id.clone())),
            Err(no_capacity) => refused = refused.or(Some(no_capacity)),
        }
    }
    Err(match (refused, elsewhere) {
        (Some(no_capacity), _) => PlanError::NoCapacity(no_capacity),
        (None, Some(row)) => PlanError::VolumeElsewhere {
            volume: row.id.clone(),
            name: name.to_owned(),
            region: row.region.clone(),
            regions: ask.regions.clone(),
        },
        (None, None) => PlanError::PoolTooSmall,
    })
}

/// All reservations and assignments first, so that hosts prepare while the first one starts.
pub(crate) fn addition(
    desired: &Desired,
    name: &str,
    placed: Vec<Placed<'_>>,
    pool: &mut Pool,
) -> Result<Vec<Step>, PlanError> {
    let group = &desired.groups[name];
    let (mut assigned, mut started, mut gated) = (Vec::new(), Vec::new(), Vec::new());
    for Placed { host, volume, why } in placed {
        let machine = pool.ids.pop().ok_or(PlanError::PoolTooSmall)?;
        let version = pool.versions.pop().ok_or(PlanError::PoolTooSmall)?;
        let address = take_address(pool, desired, &host.id)?;
        let step = |why: String, kind| Step { machine: machine.clone(), why, kind };
        assigned.push(step(why, StepKind::Reserve { host: host.id.clone(), guest: group.spec.guest.clone() }));
        assigned.push(step(
            format!("a new machine of {name} for release {}", desired.release),
            StepKind::Assign {
                name: format!("{name}-{}", &machine.as_str()[..6]),
                host: host.id.clone(),
                region: host.region.clone(),
                address,
                group: name.to_owned(),
                version: version.clone(),
                volume,
            },
        ));
        let command = command_id(&desired.app, desired.sequence, &machine, "start");
        started.push(step("a new machine is started".into(), StepKind::Start { version: version.clone(), command }));
        gated.push(step(
            "nothing else changes before it is healthy".into(),
            StepKind::Gate { group: name.to_owned(), version },
        ));
    }
    assigned.append(&mut started);
    assigned.append(&mut gated);
    Ok(assigned)
}

fn take_address(pool: &mut Pool, desired: &Desired, host: &HostId) -> Result<Ipv4Addr, PlanError> {
    let addresses = pool.addresses.get_mut(host);
    addresses
        .and_then(|free| std::iter::from_fn(|| free.pop()).find(|address| !desired.used_addresses.contains(address)))
        .ok_or_else(|| PlanError::NoAddress(host.clone()))
}

/// What a machine that is kept needs.
#[derive(Default)]
struct Kept {
    /// First of all: nothing brings more machines to serve with less.
    uncordons: Vec<Step>,
    /// Starts and gates of machines in the right version; all start before the first gate waits, as none goes down.
    starts: Vec<Step>,
    gates: Vec<Step>,
    updates: Vec<Step>,
    /// Those that sleep and are started all the same: see [`to_wake`].
    woken: BTreeSet<MachineId>,
}

/// A machine with the right content is left alone, however it does: what it does is its host's business. Not so one
/// that an earlier plan made or changed without coming to see it healthy. Of one whose host is lost only the target is
/// changed: its host brings it there when it returns.
fn keep(
    desired: &Desired,
    observed: &Observed,
    group: &GroupTarget,
    row: &MachineRow,
    pool: &mut Pool,
    kept: &mut Kept,
) -> Result<(), PlanError> {
    let fact = observed.machines.get(&row.id);
    let is_lost = observed.lost.contains(&row.id);
    let left = desired.left.get(&row.id).copied().filter(|_| !is_lost).unwrap_or_default();
    let is_woken = kept.woken.contains(&row.id);
    let sleeps = is_lost || !is_woken && is_left_asleep(desired, row, fact);
    if left.cordoned {
        let kind = StepKind::Uncordon { command: command_id(&desired.app, desired.sequence, &row.id, "uncordon") };
        let why = "an earlier plan was going to remove it".into();
        kept.uncordons.push(Step { machine: row.id.clone(), why, kind });
    }
    if same_content(&row.spec, group) {
        let never_ran =
            fact.is_some_and(|fact| matches!(fact.state, MachineState::Creating | MachineState::Created));
        if !sleeps && (never_ran || left.unproven || left.stopped) {
            let why = if is_woken { WOKEN } else { "an earlier plan did not come to its end" };
            let [start, gate] = start_and_gate(desired, row, &row.spec.version, why);
            kept.starts.push(start);
            kept.gates.push(gate);
        }
        return Ok(());
    }
    let version = pool.versions.pop().ok_or(PlanError::PoolTooSmall)?;
    let why = format!("from release {} to release {}", row.spec.release, desired.release);
    let kind = StepKind::Update { group: row.spec.process_group.clone(), version: version.clone() };
    kept.updates.push(Step { machine: row.id.clone(), why, kind });
    if !sleeps {
        let why = if is_woken { WOKEN } else { "it ran before the update" };
        kept.updates.extend(start_and_gate(desired, row, &version, why));
    }
    Ok(())
}

/// For people.
const WOKEN: &str = "all that would run this release sleep; one is woken to see whether it runs, and sleeps again when it is idle";

/// Where all that a release changes of a group sleep, nothing would show whether it runs: the one that is woken for that.
/// Only where requests may wake it at any time, and where it sleeps again by itself: what a person stopped otherwise stays
/// stopped. `None` too where no host of theirs has room for it; then the release is not tested.
fn to_wake(
    desired: &Desired,
    observed: &Observed,
    group: &GroupTarget,
    rows: &[&MachineRow],
    capacity: &mut Capacity<'_>,
) -> Option<MachineId> {
    let wakes = group.spec.services.iter().any(|service| service.autostart) && group.spec.autostop() != AutoStop::Off;
    if !wakes || desired.purpose != Purpose::Deploy || desired.strategy == Strategy::Immediate {
        return None;
    }
    let is_to_prove = |row: &&&MachineRow| {
        !observed.lost.contains(&row.id)
            && (!same_content(&row.spec, group) || desired.left.get(&row.id).is_some_and(|left| left.unproven || left.stopped))
    };
    let (asleep, awake): (Vec<_>, Vec<_>) =
        rows.iter().filter(is_to_prove).partition(|row| is_left_asleep(desired, row, observed.machines.get(&row.id)));
    if !awake.is_empty() {
        return None;
    }
    let mut has_room = |row: &&&MachineRow| {
        let Some(fact) = observed.machines.get(&row.id).filter(|fact| !fact.cordoned) else { return false };
        // One that is suspended holds its memory.
        let held = if fact.state != MachineState::Stopped { Demand::of_guest(&row.spec.guest) } else { Demand::default() };
        capacity.resize(&row.host, held, Demand::of_guest(&group.spec.guest)).is_ok()
    };
    asleep.into_iter().find(|row| has_room(row)).map(|row| row.id.clone())
}

/// An update that needs more memory is admitted like a new machine. One that sleeps is admitted when it wakes.
fn resize(
    desired: &Desired,
    observed: &Observed,
    group: &GroupTarget,
    row: &MachineRow,
    capacity: &mut Capacity<'_>,
) -> Result<(), PlanError> {
    let fact = observed.machines.get(&row.id);
    if row.spec.guest == group.spec.guest || observed.lost.contains(&row.id) || is_left_asleep(desired, row, fact) {
        return Ok(());
    }
    let holds = match fact {
        // Without a fact of its host, all that is assigned counts as held.
        _ if !observed.hosts.contains_key(&row.host) => true,
        Some(fact) => {
            fact.state.is_running()
                || matches!(fact.state, MachineState::Suspended | MachineState::Updating | MachineState::Restarting)
        }
        None => true,
    };
    let held = if holds { Demand::of_guest(&row.spec.guest) } else { Demand::default() };
    Ok(capacity.resize(&row.host, held, Demand::of_guest(&group.spec.guest))?)
}

/// A machine that was put to sleep is updated, not woken. Unknown counts as started, and so does one that is created: an
/// earlier plan made it and did not come to start it. How it ended says nothing: a person may stop a machine that just
/// crashed and waits for its restart. One that a plan stopped does not sleep: nobody decided that it should.
fn is_left_asleep(desired: &Desired, row: &MachineRow, fact: Option<&Arc<MachineFact>>) -> bool {
    let by_a_plan = desired.left.get(&row.id).is_some_and(|left| left.stopped);
    !by_a_plan && fact.is_some_and(|fact| matches!(fact.state, MachineState::Stopped | MachineState::Suspending | MachineState::Suspended))
}

fn start_and_gate(desired: &Desired, row: &MachineRow, version: &MachineVersion, why: &str) -> [Step; 2] {
    let command = command_id(&desired.app, desired.sequence, &row.id, "start");
    let start = StepKind::Start { version: version.clone(), command };
    let gate = StepKind::Gate { group: row.spec.process_group.clone(), version: version.clone() };
    [
        Step { machine: row.id.clone(), why: why.to_owned(), kind: start },
        Step { machine: row.id.clone(), why: "the next one is touched only when it is healthy".into(), kind: gate },
    ]
}

pub(crate) fn removal(desired: &Desired, observed: &Observed, row: &MachineRow, why: &str) -> Vec<Step> {
    let step = |kind| Step { machine: row.id.clone(), why: why.to_owned(), kind };
    let mut steps = Vec::new();
    // The tombstone is all that one on a lost host can be given.
    let fact = observed.machines.get(&row.id).filter(|_| !observed.lost.contains(&row.id));
    if fact.is_some_and(|fact| fact.state.is_running() || fact.state == MachineState::Restarting) {
        let id = |verb| command_id(&desired.app, desired.sequence, &row.id, verb);
        // A person's cordon is not ours to take back, should the plan not come to its end.
        let by_a_person = fact.is_some_and(|fact| fact.cordoned) && !desired.left.get(&row.id).is_some_and(|left| left.cordoned);
        if !by_a_person {
            steps.push(step(StepKind::Cordon { command: id("cordon") }));
        }
        steps.push(step(StepKind::Stop { command: id("stop"), timeout_ms: row.spec.stop.timeout_ms }));
    }
    steps.push(step(StepKind::Destroy { host: row.host.clone(), address: row.address }));
    steps
}

/// Equal but for the labels that every release changes, and for what was said of how a version is taken up.
fn same_content(have: &MachineSpec, group: &GroupTarget) -> bool {
    let mounts = kept_mounts(group.mount.as_ref(), &have.mounts);
    let (version, release) = (have.version.clone(), have.release);
    let mut want = MachineSpec { version, release, mounts, rests: have.rests, ..group.spec.clone() };
    want.image.tag.clone_from(&have.image.tag); // the digest says what it is; the tag is for people
    *have == want
}

/// How many ids a plan can need at most, for whoever fills the pool.
impl Pool {
    pub fn wanted(desired: &Desired) -> usize {
        desired.machines.len() + desired.groups.values().map(|group| group.count as usize).sum::<usize>()
    }
}
