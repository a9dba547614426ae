//! Making a plan: what is read, what is drawn, what is saved.

use super::story::events_of;
use crate::failure::Failure;
use crate::rows::{AddressRow, Change, Row, key};
use crate::{Ctx, now_ms, spec, volumes};
use dunlin_model::config::{PrimaryRegion, Strategy};
use dunlin_model::desired::{AppRow, HostRow, MachineRow, ReleaseRow};
use dunlin_model::{AppName, Guest, HostId, MachineId, MachineVersion, VolumeId};
use dunlin_planner::{Ask, Capacity, Demand, Desired, NoCapacity, Observed, Plan, PlanError, Pool, Progress, Purpose, check, plan};
use dunlin_view::MachineFact;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Addresses drawn beyond those that are needed, because other apps draw at the same time.
const SPARE_ADDRESSES: usize = 8;

/// A plan that was checked, with its first progress.
pub(crate) struct Made {
    pub plan: Plan,
    pub progress: Progress,
    /// Why the release cannot be planned; the plan is then empty.
    pub impossible: Option<String>,
    /// What would make it possible, where that is more than room.
    pub hint: Option<String>,
    /// There is no room as far as is known; by then, newer facts say whether that is so.
    pub doubtful_until_ms: Option<u64>,
    /// Hosts that say that they are full, and what they are to be asked for before that is believed.
    pub to_confirm: Option<(Vec<HostId>, Guest)>,
}

pub(crate) async fn make(
    ctx: &Ctx,
    app: &AppRow,
    release: &ReleaseRow,
    purpose: Purpose,
) -> Result<Made, Failure> {
    let (desired, observed, made) = decide(ctx, app, release, purpose).await?;
    let doubtful_until_ms = match &made {
        Err(PlanError::NoCapacity(_)) => ctx.room.doubt(&app.name, desired.sequence, &observed, now_ms()),
        _ => None,
    };
    let is_final = matches!(made, Err(PlanError::NoCapacity(_))) && doubtful_until_ms.is_none();
    let to_confirm = if is_final { who_is_full(&desired, &observed) } else { None };
    let hint = made.as_ref().err().and_then(hint);
    let (plan, impossible) = checked(&desired, &observed, made);
    let progress = Progress::new(&plan, now_ms());
    Ok(Made { plan, progress, impossible, hint, doubtful_until_ms, to_confirm })
}

fn hint(error: &PlanError) -> Option<String> {
    match error {
        PlanError::NoCapacity(NoCapacity { regions: Some(regions), nearest: Some(nearest), .. }) => Some(format!(
            "let it go elsewhere too, for example with primary_region = \"{regions},{}\", or make room there, and deploy again",
            nearest.region
        )),
        PlanError::VolumeElsewhere { volume, name, region, regions } => Some(format!(
            "to use what is on it, deploy with primary_region = \"{regions},{region}\"; else `dunlin volume destroy {volume}`, and a new {name} is made"
        )),
        _ => None,
    }
}

/// As far as its largest machine is concerned.
fn who_is_full(desired: &Desired, observed: &Observed) -> Option<(Vec<HostId>, Guest)> {
    let largest = desired.groups.values().max_by_key(|group| group.spec.guest.memory_mb)?;
    let ask = Ask { demand: Demand::of(&largest.spec, 0), regions: &desired.regions, only: None, purpose: desired.purpose.places() };
    let hosts = Capacity::new(&desired.hosts, observed).claim_to_be_full(&ask).into_iter().cloned().collect();
    Some((hosts, largest.spec.guest.clone()))
}

/// What a plan for the release would be, or why there is none. Nothing is written, and nobody is asked.
pub(crate) async fn foresee(ctx: &Ctx, app: &AppRow, release: &ReleaseRow) -> Result<(Plan, Option<String>), Failure> {
    let (desired, observed, made) = decide(ctx, app, release, Purpose::Deploy).await?;
    Ok(checked(&desired, &observed, made))
}

async fn decide(
    ctx: &Ctx,
    app: &AppRow,
    release: &ReleaseRow,
    purpose: Purpose,
) -> Result<(Desired, Observed, Result<Plan, PlanError>), Failure> {
    let desired = desired(ctx, app, release, purpose).await?;
    let refused = ctx.room.refused(&app.name, release.number, now_ms());
    let observed = Observed { refused, ..observe(ctx, &app.name).await? };
    let pool = draw(&desired);
    let made = plan(&desired, &observed, pool);
    Ok((desired, observed, made))
}

/// An empty plan, and why, instead of one that cannot be made or must not be carried out.
fn checked(desired: &Desired, observed: &Observed, made: Result<Plan, PlanError>) -> (Plan, Option<String>) {
    let made = made.map_err(|error| error.to_string()).and_then(|made| {
        check(&made, desired, observed).map(|()| made).map_err(|problems| {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            let problems = problems.join("; ");
            tracing::error!(app = %desired.app, plan = desired.sequence, problems, "the planner made a bad plan");
            format!("the server made a plan that it must not carry out: {problems}")
        })
    });
    match made {
        Ok(plan) => (plan, None),
        Err(reason) => (Plan::empty(desired), Some(reason)),
    }
}

/// The change that makes a plan the app's plan.
pub(crate) async fn save(ctx: &Ctx, made: &Made) -> Result<Change, Failure> {
    let app = &made.plan.app;
    let before = ctx.state.get::<Progress>(&key::progress(app)).await?;
    let change = Change::default()
        .if_as_read(key::progress(app), before.as_ref())
        .put(key::plan(app), &made.plan)
        .put(key::progress(app), &made.progress)
        .also(events_of(ctx, &made.plan).await?);
    Ok(change)
}

pub(crate) async fn desired(ctx: &Ctx, app: &AppRow, release: &ReleaseRow, purpose: Purpose) -> Result<Desired, Failure> {
    let last = ctx.state.get::<Plan>(&key::plan(&app.name)).await?.map(|row| row.value);
    let progress = ctx.state.get::<Progress>(&key::progress(&app.name)).await?.map(|row| row.value);
    let left = last.as_ref().zip(progress).map(|(plan, progress)| plan.leaves(&progress)).unwrap_or_default();
    let machines = ctx.state.machines().await?;
    let addresses = addresses_in_use(ctx).await?;
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let of_app = |row: &Row<MachineRow>| row.value.spec.app == app.name && row.value.spec.release != 0;
    Ok(Desired {
        app: app.name.clone(),
        sequence: last.as_ref().map_or(1, |plan| plan.sequence + 1),
        purpose,
        release: release.number,
        from_release: last.map_or(0, |plan| plan.release),
        left,
        free_volumes: volumes::free(ctx, &app.name).await?.into_iter().map(|row| row.value).collect(),
        groups: spec::groups(app, release),
        used_addresses: addresses,
        machines: machines.into_iter().filter(of_app).map(|row| row.value).collect(),
        hosts: hosts.into_iter().map(|row| row.value).collect(),
        regions: PrimaryRegion::places(release.config.primary_region.as_ref()),
        wait_timeout_ms: release.config.deploy.wait_timeout_ms,
        strategy: match purpose {
            Purpose::Deploy => release.config.deploy.strategy,
            // What comes back is proven, one by one.
            Purpose::Return { .. } | Purpose::Repair | Purpose::Rebalance => Strategy::Rolling,
        },
    })
}

pub(crate) async fn addresses_in_use(ctx: &Ctx) -> Result<BTreeSet<std::net::Ipv4Addr>, Failure> {
    let machines = ctx.state.machines().await?;
    let rows = ctx.state.list_keyed::<AddressRow>("addresses/").await?;
    let now_ms = now_ms();
    let resting = rows.iter().filter(|(_, row)| !row.value.is_free(now_ms));
    let resting = resting.filter_map(|(key, _)| key.strip_prefix("addresses/")?.parse().ok());
    Ok(resting.chain(machines.iter().map(|row| row.value.address)).collect())
}

/// Random ids, and free addresses of each host.
fn draw(desired: &Desired) -> Pool {
    let wanted = Pool::wanted(desired);
    let mut pool = Pool::default();
    for _ in 0..wanted {
        pool.ids.push(MachineId::from_random(crate::keys::random()));
        pool.versions.push(MachineVersion::new(now_ms(), crate::keys::random()));
        pool.volumes.push(VolumeId::from_random(crate::keys::random()));
    }
    for host in &desired.hosts {
        let all = (0u32..).map_while(|n| host.prefix.nth(n));
        let free = all.filter(|address| !desired.used_addresses.contains(address));
        let mut free: Vec<_> = free.take(wanted + SPARE_ADDRESSES).collect();
        free.reverse(); // the planner takes from the end
        pool.addresses.insert(host.id.clone(), free);
    }
    pool
}

pub(crate) async fn observe(ctx: &Ctx, app: &AppName) -> Result<Observed, Failure> {
    let view = ctx.view.current();
    let rows = ctx.state.machines().await?;
    let dead = ctx.watched.dead();
    let of_app = || rows.iter().filter(|row| row.value.spec.app == *app);
    let homes: BTreeMap<&MachineId, &HostId> = of_app().map(|row| (&row.value.id, &row.value.host)).collect();
    // Nothing is judged by what another host says of a machine.
    let is_its_hosts = |fact: &MachineFact| homes.get(&fact.id).is_none_or(|home| **home == fact.host);
    let mut assigned_memory_mb: BTreeMap<HostId, u64> = BTreeMap::new();
    for row in &rows {
        *assigned_memory_mb.entry(row.value.host.clone()).or_default() += u64::from(row.value.spec.guest.memory_mb);
    }
    Ok(Observed {
        assigned: of_app().map(|row| row.value.id.clone()).collect(),
        machines: view.machines_of(app).filter(|fact| is_its_hosts(fact)).map(|fact| (fact.id.clone(), Arc::clone(fact))).collect(),
        hosts: view.hosts.iter().filter(|(id, _)| !dead.contains(*id) && ctx.room.believes(id, now_ms())).map(|(id, fact)| (id.clone(), Arc::clone(fact))).collect(),
        lost: of_app().filter(|row| dead.contains(&row.value.host)).map(|row| row.value.id.clone()).collect(),
        dead,
        refused: BTreeMap::new(),
        assigned_memory_mb,
    })
}
