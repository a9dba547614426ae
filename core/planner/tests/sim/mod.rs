//! The world that plans run against: one host and the store's rows, and an executor that can be killed.

use dunlin_model::config::Strategy as DeployStrategy;
use dunlin_model::desired::{HostRow, Ipv4Prefix, MachineRow};
use dunlin_model::{
    AppName, Check, CheckKind, CommandId, ExitInfo, Generation, HostId, ImageRef, MachineId, MachineSpec, MachineState,
    MachineVersion, RegionExpr, Service,
};
use dunlin_planner::{
    Desired, Ended, GroupTarget, Mark, Next, Observed, Plan, PlanError, Pool, Progress, Purpose, Step, StepKind, advance,
    check, plan,
};
use dunlin_view::{CheckState, CheckStatus, MachineFact};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub const WAIT_TIMEOUT_MS: u64 = 60_000;
/// Enough for every plan here; a plan that needs more does not end.
const MAX_TURNS: usize = 2_000;

pub fn app() -> AppName {
    "web".parse().unwrap()
}

pub fn host() -> HostId {
    "h1".parse().unwrap()
}

/// How an image behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    Good,
    /// Its check never passes.
    Sick,
    Crashes,
    Missing,
    /// Crashes 2 s after it came up, whenever it comes up.
    Fades,
    /// The same, 5 s after it came up.
    Withers,
}

/// How long a machine of this image lives once it is up.
fn lives_ms(image: Image) -> Option<u64> {
    match image {
        Image::Crashes => Some(0),
        Image::Fades => Some(2_000),
        Image::Withers => Some(5_000),
        Image::Good | Image::Sick | Image::Missing => None,
    }
}

pub fn digest(image: Image, nth: u32) -> String {
    format!("{image:?}:{nth}")
}

pub fn image_of(spec: &MachineSpec) -> Image {
    match spec.image.digest.split(':').next() {
        Some("Good") => Image::Good,
        Some("Sick") => Image::Sick,
        Some("Crashes") => Image::Crashes,
        Some("Fades") => Image::Fades,
        Some("Withers") => Image::Withers,
        _ => Image::Missing,
    }
}

pub fn spec(image: Image, nth: u32, checked: bool) -> MachineSpec {
    let check = Check {
        name: "tcp-8080".into(),
        port: 8080,
        kind: CheckKind::Tcp,
        interval_ms: 1_000,
        timeout_ms: 1_000,
        grace_period_ms: 0,
        gates_routing: true,
    };
    let service = Service {
        internal_port: 8080,
        force_https: false,
        autostart: true,
        autostop: Default::default(),
        min_machines_running: 0,
        max_machines_running: None,
        concurrency: Default::default(),
    };
    let image = ImageRef { repository: "web".into(), digest: digest(image, nth), tag: None };
    MachineSpec {
        services: if checked { vec![service] } else { vec![] },
        checks: if checked { vec![check] } else { vec![] },
        ..MachineSpec::of(MachineVersion::new(0, [0; 10]), "personal".parse().unwrap(), app(), image)
    }
}

/// What is durable: the store's rows, and the host's machines.
#[derive(Debug, Clone)]
pub struct World {
    pub now_ms: u64,
    /// When the executor was started.
    pub started_ms: u64,
    pub drawn: u64,
    pub memory_mb: u32,
    pub rows: BTreeMap<MachineId, MachineRow>,
    pub tombstones: BTreeSet<MachineId>,
    pub reserved: BTreeSet<MachineId>,
    pub machines: BTreeMap<MachineId, MachineFact>,
    pub answers: BTreeMap<CommandId, u64>,
    pub starts: u64,
    pub plan: Option<(Plan, Progress)>,
    pub lowest_healthy: usize,
}

impl World {
    pub fn new() -> Self {
        Self {
            now_ms: 1_000_000,
            started_ms: 0,
            drawn: 0,
            memory_mb: 64 * 1024,
            rows: BTreeMap::new(),
            tombstones: BTreeSet::new(),
            reserved: BTreeSet::new(),
            machines: BTreeMap::new(),
            answers: BTreeMap::new(),
            starts: 0,
            plan: None,
            lowest_healthy: usize::MAX,
        }
    }

    pub fn draw(&mut self) -> [u8; 8] {
        self.drawn += 1;
        self.drawn.to_be_bytes()
    }

    pub fn pool(&mut self, desired: &Desired) -> Pool {
        let wanted = Pool::wanted(desired);
        let mut pool = Pool::default();
        for _ in 0..wanted {
            let random = self.draw();
            pool.ids.push(MachineId::from_random(random[1..].try_into().unwrap()));
            let mut ten = [0; 10];
            ten[2..].copy_from_slice(&random);
            pool.versions.push(MachineVersion::new(self.now_ms, ten));
        }
        let prefix = Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 24 };
        let free = (0..250).rev().filter_map(|n| prefix.nth(n)).collect();
        pool.addresses.insert(host(), free);
        pool
    }

    pub fn desired(&self, release: u32, spec: &MachineSpec, count: u32, purpose: Purpose) -> Desired {
        let prefix = Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 24 };
        let host_row = HostRow {
            id: host(),
            region: "local".parse().unwrap(),
            prefix,
            public_key: String::new(),
            cpus: 2,
            memory_mb: self.memory_mb,
            zone: None,
            labels: BTreeMap::new(),
            cordoned: false,
            draining: false,
            joined_at_ms: 0,
        };
        Desired {
            app: app(),
            sequence: self.plan.as_ref().map_or(1, |(plan, _)| plan.sequence + 1),
            purpose,
            release,
            from_release: release.saturating_sub(1),
            groups: BTreeMap::from([("app".into(), GroupTarget { count, spec: spec.clone(), mount: None })]),
            machines: self.rows.values().cloned().collect(),
            free_volumes: vec![],
            left: self.plan.as_ref().map(|(plan, progress)| plan.leaves(progress)).unwrap_or_default(),
            hosts: vec![host_row],
            regions: RegionExpr::any(),
            used_addresses: self.rows.values().map(|row| row.address).collect(),
            wait_timeout_ms: WAIT_TIMEOUT_MS,
            strategy: DeployStrategy::Rolling,
        }
    }

    pub fn observed(&self) -> Observed {
        let machines = self.machines.iter().map(|(id, fact)| (id.clone(), Arc::new(fact.clone())));
        let assigned = self.rows.values().map(|row| u64::from(row.spec.guest.memory_mb)).sum();
        Observed {
            assigned: self.rows.keys().cloned().collect(),
            machines: machines.collect(),
            hosts: BTreeMap::new(),
            refused: BTreeMap::new(),
            dead: BTreeSet::new(),
            lost: BTreeSet::new(),
            assigned_memory_mb: BTreeMap::from([(host(), assigned)]),
        }
    }

    pub fn healthy(&self) -> usize {
        let gated = |fact: &MachineFact| {
            self.rows.get(&fact.id).is_some_and(|row| row.spec.checks.is_empty()) || !fact.checks.is_empty()
        };
        self.machines.values().filter(|fact| fact.is_healthy() && gated(fact)).count()
    }

    /// One small thing happens on the host.
    pub fn host_turn(&mut self) {
        self.now_ms += 500;
        for (id, row) in &self.rows {
            self.machines.entry(id.clone()).or_insert_with(|| MachineFact {
                id: id.clone(),
                host: row.host.clone(),
                app: app(),
                sequence: 1,
                placement: Generation::default(),
                state: MachineState::Creating,
                version: row.spec.version.clone(),
                release: row.spec.release,
                process_group: "app".into(),
                attempt: 0,
                address: row.address,
                cordoned: false,
                checks: vec![],
                exit: None,
                restarts: 0,
                problem: None,
                containers: vec![],
                over: false,
                unconfirmed: false,
                due_ms: None,
                updated_at_ms: self.now_ms,
            });
        }
        let tombstones = &self.tombstones;
        self.machines.retain(|id, _| !tombstones.contains(id));
        for (id, fact) in &mut self.machines {
            let Some(row) = self.rows.get(id) else { continue };
            let before = fact.clone();
            live(fact, &row.spec, self.now_ms);
            if *fact != before {
                fact.sequence += 1;
            }
            if fact.state != before.state {
                fact.updated_at_ms = self.now_ms;
            }
        }
        self.lowest_healthy = self.lowest_healthy.min(self.healthy());
    }

    pub fn act(&mut self, plan: &Plan, step: &Step) -> Result<Option<u64>, String> {
        match &step.kind {
            StepKind::Reserve { .. } => {
                self.reserved.insert(step.machine.clone());
            }
            StepKind::Assign { name, host, region, address, group, version, volume } => {
                let mut spec = plan.spec(group, version).unwrap();
                spec.mounts = volume.iter().map(|taken| plan.mounts[group].of(taken.volume.clone())).collect();
                self.rows.entry(step.machine.clone()).or_insert_with(|| MachineRow {
                    id: step.machine.clone(),
                    name: name.clone(),
                    host: host.clone(),
                    region: region.clone(),
                    address: *address,
                    placement: Generation::default(),
                    created_at_ms: 0,
                    spec,
                });
            }
            StepKind::Update { group, version } => {
                let row = self.rows.get_mut(&step.machine).ok_or("no row")?;
                let mounts = plan.mounts(group, &row.spec.mounts);
                row.spec = MachineSpec { mounts, ..plan.spec(group, version).unwrap() };
            }
            StepKind::Start { command, version } => {
                if let Some(sequence) = self.answers.get(command) {
                    return Ok(Some(*sequence));
                }
                let fact = self.machines.get_mut(&step.machine).ok_or("no machine")?;
                assert_eq!(fact.version, *version, "a start before its version is there");
                self.starts += 1;
                fact.state = MachineState::Starting;
                fact.attempt += 1;
                (fact.restarts, fact.exit, fact.checks) = (0, None, vec![]);
                fact.sequence += 1;
                self.answers.insert(command.clone(), fact.sequence);
                return Ok(Some(fact.sequence));
            }
            StepKind::Cordon { .. } => self.machines.get_mut(&step.machine).ok_or("no machine")?.cordoned = true,
            StepKind::Uncordon { .. } => self.machines.get_mut(&step.machine).ok_or("no machine")?.cordoned = false,
            StepKind::Stop { .. } => {
                let fact = self.machines.get_mut(&step.machine).ok_or("no machine")?;
                if fact.state != MachineState::Stopped {
                    fact.state = MachineState::Stopping;
                    fact.sequence += 1;
                }
            }
            StepKind::Destroy { .. } => {
                self.rows.remove(&step.machine);
                self.tombstones.insert(step.machine.clone());
            }
            StepKind::Gate { .. } => unreachable!("gates are not acts"),
        }
        Ok(None)
    }

    /// Runs the saved plan; before each durable write and before each act `crash` may end it.
    pub fn run(&mut self, crash: &mut impl FnMut() -> bool) -> Option<Ended> {
        for _ in 0..MAX_TURNS {
            let (plan, progress) = self.plan.clone().expect("a plan is saved");
            let progress = progress.resumed(self.started_ms);
            match advance(&plan, &progress, &self.observed(), self.now_ms) {
                Next::Act { index, step } => {
                    if crash() {
                        return None;
                    }
                    let floor = self.act(&plan, step).unwrap();
                    if crash() {
                        return None;
                    }
                    if !matches!(step.kind, StepKind::Stop { .. }) {
                        self.mark(&Mark::Passed { index, floor });
                    }
                    self.host_turn();
                }
                Next::Mark(mark) => {
                    if crash() {
                        return None;
                    }
                    self.mark(&mark);
                }
                Next::Wait { until_ms, why } => {
                    assert!(until_ms > self.now_ms, "a wait into the past: {why}");
                    self.host_turn();
                }
                Next::Replan { .. } => return Some(self.end(Ended::Superseded)),
                Next::Done => return Some(self.end(Ended::Done)),
                Next::Failed { machine, reason, details } => {
                    return Some(self.end(Ended::Failed { machine, reason, details }));
                }
            }
        }
        panic!("the plan did not end: {:?}", self.plan);
    }

    fn end(&mut self, ended: Ended) -> Ended {
        self.mark(&Mark::Ended(ended.clone()));
        ended
    }

    pub fn mark(&mut self, mark: &Mark) {
        let now_ms = self.now_ms;
        let (plan, progress) = self.plan.as_mut().unwrap();
        *progress = progress.record(plan, mark, now_ms);
    }

    /// Its check fails from now on, until it is replaced.
    pub fn sicken(&mut self, id: &MachineId) {
        self.machines.get_mut(id).unwrap().checks[0].status = CheckState::Critical;
    }

    /// The executor is away for a time, and then started again.
    pub fn away(&mut self, ms: u64) {
        self.now_ms += ms;
        self.started_ms = self.now_ms;
    }

    /// Somebody destroys it by hand.
    pub fn destroy(&mut self, id: &MachineId) {
        self.rows.remove(id);
        self.tombstones.insert(id.clone());
        self.machines.remove(id);
    }

    /// Somebody stops it by hand, and it obeys.
    pub fn stop_by_hand(&mut self, id: &MachineId) {
        let exit = exit(self.machines[id].attempt, self.now_ms);
        self.stopped(id, ExitInfo { requested_stop: true, signal: Some(2), exit_code: None, ..exit });
    }

    /// Its supervisor is killed: its host starts it again.
    pub fn lose_supervisor(&mut self, id: &MachineId) {
        let error = Some("its supervisor was killed".into());
        let exit = ExitInfo { exit_code: None, error, ..exit(self.machines[id].attempt, self.now_ms) };
        self.stopped(id, exit);
        let fact = self.machines.get_mut(id).unwrap();
        (fact.state, fact.restarts) = (MachineState::Restarting, fact.restarts + 1);
    }

    /// Somebody stops it in the pause before its restart.
    pub fn stop_after_a_crash(&mut self, id: &MachineId) {
        self.stopped(id, exit(self.machines[id].attempt, self.now_ms));
    }

    /// It exits with 0, after which its policy lets it rest.
    pub fn ends_well(&mut self, id: &MachineId) {
        self.stopped(id, ExitInfo { exit_code: Some(0), ..exit(self.machines[id].attempt, self.now_ms) });
    }

    fn stopped(&mut self, id: &MachineId, exit: ExitInfo) {
        let fact = self.machines.get_mut(id).unwrap();
        (fact.state, fact.exit) = (MachineState::Stopped, Some(Box::new(exit)));
        fact.checks.clear();
        fact.sequence += 1;
    }

    /// Runs the saved plan until it has passed `boundaries` of them.
    pub fn run_until(&mut self, boundaries: usize) {
        let mut passed = 0;
        let ended = self.run(&mut || {
            passed += 1;
            passed > boundaries
        });
        assert_eq!(ended, None, "the plan has more boundaries");
    }

    /// The world at the first boundary of the saved plan at which `holds`.
    pub fn run_until_it(&self, holds: impl Fn(&World) -> bool) -> World {
        let at = |boundaries| {
            let mut world = self.clone();
            world.run_until(boundaries);
            world
        };
        (0..MAX_TURNS).map(at).find(|world| holds(world)).expect("a boundary at which it holds")
    }

    pub fn save(&mut self, desired: &Desired) -> Result<(), PlanError> {
        let pool = self.pool(desired);
        let made = plan(desired, &self.observed(), pool)?;
        check(&made, desired, &self.observed()).unwrap_or_else(|problems| panic!("{problems:?}\n{made:#?}"));
        let json = serde_json::to_string(&made).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), made, "a plan survives the store");
        let progress = Progress::new(&made, self.now_ms);
        self.plan = Some((made, progress));
        Ok(())
    }

    pub fn deploy(&mut self, release: u32, spec: &MachineSpec, count: u32) -> Ended {
        let desired = self.desired(release, spec, count, Purpose::Deploy);
        self.save(&desired).unwrap();
        self.run(&mut || false).unwrap()
    }
}

/// What a host does with a machine in one turn.
pub fn live(fact: &mut MachineFact, spec: &MachineSpec, now_ms: u64) {
    if fact.version != spec.version {
        if image_of(spec) == Image::Missing {
            fact.problem = Some("image not found".into());
            return;
        }
        let ran = !fact.state.is_asleep();
        fact.version = spec.version.clone();
        fact.release = spec.release;
        (fact.restarts, fact.exit, fact.checks, fact.problem) = (0, None, vec![], None);
        fact.state = if ran { MachineState::Starting } else { fact.state };
        fact.attempt += u64::from(ran);
        return;
    }
    match fact.state {
        MachineState::Creating if image_of(spec) == Image::Missing => {
            fact.state = MachineState::Failed;
            fact.problem = Some("image not found".into());
        }
        MachineState::Creating => fact.state = MachineState::Created,
        MachineState::Starting => fact.state = MachineState::Started,
        MachineState::Stopping => fact.state = MachineState::Stopped,
        MachineState::Restarting => {
            fact.state = MachineState::Starting;
            fact.attempt += 1;
        }
        MachineState::Started if lives_ms(image_of(spec)).is_some_and(|ms| now_ms >= fact.updated_at_ms + ms) => {
            fact.restarts += 1;
            fact.exit = Some(Box::new(exit(fact.attempt, now_ms)));
            (fact.state, fact.checks) = (MachineState::Restarting, vec![]);
        }
        MachineState::Started if fact.checks.is_empty() => {
            let status = if image_of(spec) == Image::Sick { CheckState::Critical } else { CheckState::Passing };
            fact.checks = spec.checks.iter().map(|check| CheckStatus {
                name: check.name.clone(),
                status,
                gates_routing: check.gates_routing,
                output: "connection refused".into(),
                updated_at_ms: now_ms,
            }).collect();
        }
        _ => {}
    }
}

/// The crash of an attempt.
fn exit(attempt: u64, at_ms: u64) -> ExitInfo {
    ExitInfo {
        attempt,
        exit_code: Some(1),
        signal: None,
        oom_killed: false,
        requested_stop: false,
        at_ms,
        error: None,
    }
}
