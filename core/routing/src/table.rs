//! The immutable route table, built from a snapshot.

use crate::load::{AppLoad, Load, Loads};
use dunlin_model::{AppName, Generation, HostId, MachineId, MachineState, MachineVersion, OrgName, Region, Service, region};
use dunlin_view::{CheckState, Freshness, MachineAssignment, MachineFact, Snapshot, Summary};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What light in glass and the detours of cables need there and back: so many kilometres a millisecond.
const KM_PER_MS: u32 = 60;

/// Where an edge stands: what is near to it and what is far.
#[derive(Debug, Clone)]
pub struct Vantage {
    pub region: Region,
    /// The edge's own host; `None` where there are no others.
    pub host: Option<HostId>,
    /// There and back, as measured. A region is as near as the nearest of its hosts.
    pub rtt_ms: BTreeMap<HostId, u32>,
}

impl Vantage {
    /// Of an edge that knows its region and nothing else.
    pub fn of(region: Region) -> Self {
        Self { region, host: None, rtt_ms: BTreeMap::new() }
    }
}

/// Host name -> app -> machines.
#[derive(Debug, Default)]
pub struct Table {
    /// Grows with every table of this process: what was learned of one table does not hold for the next.
    pub serial: u64,
    pub generation: Generation,
    /// The edge hears of most hosts nothing.
    pub is_cut_off: bool,
    by_host: HashMap<Box<str>, Arc<Route>>,
}

/// One app as the edge sees it.
#[derive(Debug)]
pub struct Route {
    pub app: AppName,
    pub org: OrgName,
    /// Redirect plain HTTP.
    pub force_https: bool,
    /// Machines of the app, with or without a service.
    pub machine_count: usize,
    /// Machines that serve, in the order of their ids.
    pub candidates: Vec<Arc<Candidate>>,
    /// Regions with machines of which nothing is seen from here, in the order of their names.
    pub far: Vec<Far>,
    pub load: Arc<AppLoad>,
}

/// One machine that may take requests.
#[derive(Debug)]
pub struct Candidate {
    pub machine: MachineId,
    pub app: AppName,
    pub host: HostId,
    /// On the edge's own host.
    pub is_here: bool,
    pub region: Region,
    /// From the edge to that region: 0 is its own, others are as far as they are in milliseconds.
    pub distance: u32,
    /// How lately anything was heard of its host.
    pub freshness: Freshness,
    /// The version that runs (or will, when woken), as its host said last.
    pub version: MachineVersion,
    pub placement: Generation,
    pub service: Service,
    pub availability: Availability,
    pub load: Arc<Load>,
    /// Whether its host could be reached, whichever machine was asked for.
    pub host_load: Arc<Load>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// Started, and its checks pass.
    Ready,
    /// Started, and a check that gates routing fails.
    Unhealthy,
    /// Starting now, or started and not yet checked: an app that boots is no sick one.
    Starting,
    /// It would run, and its host, which was booted, waits for control's word that it may.
    Unconfirmed,
    /// On its way back: created, restarted or updated.
    Returning,
    Asleep,
    /// Stopping, cordoned, failed, going: not for requests.
    Unavailable,
    /// Its host has said nothing of it.
    Unknown,
    /// In another region, and its host's detail is not here: whoever wants it asks for it, see [`Route::look_into`].
    Unseen,
}

/// A region of which only the summary is here, or not all of the detail.
#[derive(Debug)]
pub struct Far {
    pub region: Region,
    pub distance: u32,
    /// By its reporters; `None`: they have said nothing of the app, or were not heard lately.
    pub summary: Option<Summary>,
    /// Machines there of which the detail is not here.
    pub unseen: usize,
}

impl Table {
    /// `previous` tells which service belongs to a version that still runs while its successor is
    /// already desired.
    pub fn build(snapshot: &Snapshot, loads: &Loads, previous: Option<&Table>, vantage: &Vantage) -> Self {
        let seen = Seen { snapshot, loads, vantage, near: near(snapshot, vantage) };
        let mut machines: HashMap<&AppName, Vec<&MachineAssignment>> = HashMap::new();
        for assignment in snapshot.config.machines.values() {
            if !snapshot.config.tombstones.contains_key(&assignment.id) {
                machines.entry(&assignment.spec.app).or_default().push(assignment);
            }
        }
        let mut by_host = HashMap::new();
        for (app, fact) in &snapshot.config.apps {
            let assigned = machines.remove(app).unwrap_or_default();
            let known = previous.and_then(|table| table.route_of_any(&fact.hostnames));
            let candidates: Vec<_> = assigned
                .iter()
                .filter_map(|assignment| {
                    let machine = snapshot.machines.get(&assignment.id);
                    seen.candidate(assignment, machine.map(|fact| &**fact), known).map(Arc::new)
                })
                .collect();
            let route = Arc::new(Route {
                app: app.clone(),
                org: fact.org.clone(),
                force_https: candidates.iter().any(|c| c.service.force_https),
                machine_count: assigned.len(),
                far: seen.far(app, &candidates),
                candidates,
                load: loads.app(app),
            });
            for name in &fact.hostnames {
                by_host.insert(name.as_str().into(), route.clone());
            }
        }
        let serial = previous.map_or(1, |table| table.serial + 1);
        Self { serial, generation: snapshot.config.generation, is_cut_off: snapshot.is_cut_off(), by_host }
    }

    /// The app that a host name belongs to.
    pub fn find(&self, host: &str) -> Option<&Arc<Route>> {
        self.by_host.get(host)
    }

    /// All routes; an app with several host names comes once for each.
    pub fn routes(&self) -> impl Iterator<Item = (&str, &Arc<Route>)> {
        self.by_host.iter().map(|(host, route)| (&**host, route))
    }

    fn route_of_any(&self, hostnames: &[String]) -> Option<&Route> {
        hostnames.iter().find_map(|name| self.by_host.get(name.as_str())).map(|route| &**route)
    }
}

/// What a table is made of.
struct Seen<'a> {
    snapshot: &'a Snapshot,
    loads: &'a Loads,
    vantage: &'a Vantage,
    near: BTreeMap<&'a Region, u32>,
}

impl Seen<'_> {
    /// `None` for a machine without a service: workers are not served.
    fn candidate(
        &self,
        assignment: &MachineAssignment,
        fact: Option<&MachineFact>,
        known: Option<&Route>,
    ) -> Option<Candidate> {
        let version = fact.map_or(&assignment.spec.version, |fact| &fact.version);
        let before = known
            .filter(|_| *version != assignment.spec.version)
            .and_then(|route| route.candidates.iter().find(|c| c.machine == assignment.id && c.version == *version))
            .map(|candidate| &candidate.service);
        // An app has one service over HTTP: a machine with several is served by its first.
        let service = before.or(assignment.spec.services.first())?.clone();
        let is_removed = self.snapshot.config.removed_hosts.contains(&assignment.host);
        Some(Candidate {
            machine: assignment.id.clone(),
            app: assignment.spec.app.clone(),
            host: assignment.host.clone(),
            is_here: self.vantage.host.as_ref().is_none_or(|own| *own == assignment.host),
            region: assignment.region.clone(),
            distance: self.distance(&assignment.region),
            freshness: self.snapshot.freshness(&assignment.host),
            version: version.clone(),
            placement: assignment.placement,
            service,
            availability: match fact {
                _ if is_removed => Availability::Unavailable,
                Some(fact) => availability(assignment, fact),
                None if assignment.region != self.vantage.region && !self.snapshot.told.contains(&assignment.host) => Availability::Unseen,
                None => Availability::Unknown,
            },
            load: self.loads.machine(&assignment.id),
            host_load: self.loads.host(&assignment.host),
        })
    }

    fn far(&self, app: &AppName, candidates: &[Arc<Candidate>]) -> Vec<Far> {
        let mut far: BTreeMap<&Region, Far> = BTreeMap::new();
        for c in candidates.iter().filter(|c| c.availability == Availability::Unseen) {
            let begin = || Far { region: c.region.clone(), distance: c.distance, summary: self.snapshot.summary(&c.region, app), unseen: 0 };
            far.entry(&c.region).or_insert_with(begin).unseen += 1;
        }
        far.into_values().collect()
    }

    fn distance(&self, to: &Region) -> u32 {
        let own = &self.vantage.region;
        if to == own {
            return 0;
        }
        // Before anything was measured, and where nothing is, maps help.
        let guessed = || region::distance_km(own, to).map(|km| km / KM_PER_MS);
        self.near.get(to).copied().or_else(guessed).map_or(u32::MAX, |ms| ms.saturating_add(1))
    }
}

/// How far regions are that have hosts whose distance was measured, in milliseconds.
fn near<'a>(snapshot: &'a Snapshot, vantage: &Vantage) -> BTreeMap<&'a Region, u32> {
    let mut near = BTreeMap::new();
    for (host, rtt_ms) in &vantage.rtt_ms {
        if let Some(fact) = snapshot.hosts.get(host) {
            near.entry(&fact.region).and_modify(|nearest: &mut u32| *nearest = (*nearest).min(*rtt_ms)).or_insert(*rtt_ms);
        }
    }
    near
}

fn availability(assignment: &MachineAssignment, fact: &MachineFact) -> Availability {
    if fact.cordoned || fact.host != assignment.host {
        return Availability::Unavailable;
    }
    if fact.unconfirmed {
        return Availability::Unconfirmed;
    }
    match fact.state {
        MachineState::Started if fact.is_healthy() => Availability::Ready,
        MachineState::Started if fails_a_check(fact) => Availability::Unhealthy,
        MachineState::Started => Availability::Starting,
        MachineState::Starting => Availability::Starting,
        MachineState::Creating | MachineState::Restarting | MachineState::Updating => Availability::Returning,
        MachineState::Created | MachineState::Stopped | MachineState::Suspending | MachineState::Suspended => {
            Availability::Asleep
        }
        MachineState::Stopping | MachineState::Failed | MachineState::Destroying | MachineState::Destroyed => {
            Availability::Unavailable
        }
    }
}

/// A check that waits for its first pass, or fails within its grace period, is a warning and no failure.
fn fails_a_check(fact: &MachineFact) -> bool {
    fact.checks.iter().any(|check| check.gates_routing && check.status == CheckState::Critical)
}
