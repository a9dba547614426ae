//! A model of control: the store is durable, everything else dies with the process. It probes hosts, publishes desired state,
//! and has plans made and carried out; what is decided, the real planner decides. It may be killed before and after each
//! write and each call.

use super::Bug;
use super::rows::{self, Rows};
use super::store::{App, Class, GROUP, app};
use super::wires::{Said, Word};
use super::world::{CONTROL, HOSTS, World};
use dunlin_gossip::Input;
use dunlin_model::config::Strategy;
use dunlin_model::desired::{MachineRow, ReleaseStatus};
use dunlin_model::{AppName, Generation, HostId, MachineId, MachineVersion, RegionExpr, Service, VolumeId};
use dunlin_planner::{
    Desired, Ended, Mark, Next, Observed, Plan, Pool, Progress, Purpose, Standing, StepKind, Watch, advance, check, drift, plan,
};
use dunlin_view::Freshness;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const ACTS_EVERY_MS: u64 = 100;
const PROBES_EVERY_MS: u64 = 1_000;
/// Control's is ten minutes, which would be felt in each run.
const REBALANCE_REST_MS: u64 = 15_000;
const WAIT_TIMEOUT_MS: u64 = 20_000;
const SPARE_ADDRESSES: usize = 8;
/// Turns of one app at once; a plan that goes on beyond is looked at a moment later.
const TURNS: usize = 8;

pub struct Control {
    pub started_ms: u64,
    pub next_ms: u64,
    pub watch: Watch,
    round: u64,
    round_ends_ms: u64,
    reached: BTreeSet<HostId>,
    /// Hosts that had no room, and until when they are not asked again.
    pub refused: BTreeMap<HostId, u64>,
    pub pending: BTreeMap<AppName, Pending>,
    published: Option<Generation>,
    rows: Rows,
    /// It is killed before it does this many more effects.
    pub dies_after: Option<u64>,
    /// Until then a bug of its own leaves machines out of what it publishes.
    pub half_until_ms: u64,
    /// Restored from a backup, it has heard of another host since then.
    pub heard_since_ms: Option<u64>,
}

/// A call that is under way for the current step of a plan.
pub struct Pending {
    pub call: u64,
    pub sequence: u64,
    pub index: usize,
    pub until_ms: u64,
    pub said: Option<Said>,
}

impl Control {
    pub fn start(now_ms: u64) -> Self {
        Self {
            started_ms: now_ms,
            next_ms: now_ms,
            watch: Watch::default(),
            round: 0,
            round_ends_ms: now_ms,
            reached: BTreeSet::new(),
            refused: BTreeMap::new(),
            pending: BTreeMap::new(),
            published: None,
            rows: Rows::new(),
            dies_after: None,
            half_until_ms: 0,
            heard_since_ms: None,
        }
    }
}

impl World {
    /// Something of control is about to be done, or has just been done; `false` if it was killed there.
    pub fn survives(&mut self) -> bool {
        let Some(control) = &mut self.control else { return false };
        match &mut control.dies_after {
            None => true,
            Some(0) => {
                self.ctx.tell(|| "control is killed".into());
                self.kill(CONTROL, false);
                false
            }
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }

    pub fn control_acts(&mut self) {
        let now_ms = self.ctx.now_ms;
        let Some(control) = &mut self.control else { return };
        control.next_ms = now_ms + ACTS_EVERY_MS;
        if self.restored.is_some() && !self.is_adopted() {
            return;
        }
        let Some(control) = &mut self.control else { return };
        if control.half_until_ms > 0 && now_ms >= control.half_until_ms {
            control.half_until_ms = 0;
            self.store.commit();
        }
        if self.control.as_ref().is_some_and(|control| now_ms >= control.round_ends_ms) {
            self.judge_round();
        }
        let apps: Vec<AppName> = self.store.apps.keys().cloned().collect();
        for app in &apps {
            for _ in 0..TURNS {
                if self.control.is_none() || self.broken().is_some() || !self.turn(app) {
                    break;
                }
            }
        }
        self.publish_store();
    }

    // ---- which hosts are dead

    fn judge_round(&mut self) {
        let now_ms = self.ctx.now_ms;
        let (everybody_silent, one_probe, never_cut_off) = (self.is(Bug::ProbeAlone), self.is(Bug::OneProbe), self.is(Bug::NeverCutOff));
        let silent_is_dead = self.is(Bug::SilenceAlone);
        let others: Vec<HostId> = self.members[1..HOSTS].iter().map(|member| member.identity.host.clone()).collect();
        let Some(process) = &self.members[CONTROL].process else { return };
        let up: BTreeSet<_> = process.node.members().map(|peer| peer.id).collect();
        let heard: BTreeSet<HostId> = self.members[1..HOSTS]
            .iter()
            .filter(|member| process.view.heard.get(&member.identity.host) == Some(&Freshness::Fresh) || up.contains(&member.identity.origin))
            .map(|member| member.identity.host.clone())
            .collect();
        let Some(control) = &mut self.control else { return };
        let mut died = vec![];
        if control.round > 0 {
            let answered = |host: &HostId| if silent_is_dead { heard.contains(host) } else { control.reached.contains(host) };
            let answers: Vec<(HostId, bool)> = others.iter().map(|host| (host.clone(), answered(host))).collect();
            let all = if never_cut_off { 100 * HOSTS } else { HOSTS };
            let mut watched = control.watch.hear(&answers, all, |host| everybody_silent || !heard.contains(host), now_ms);
            if one_probe {
                let later = control.watch.hear(&answers, all, |host| !heard.contains(host), now_ms + dunlin_planner::FAILS_FOR_MS);
                watched.died.extend(later.died);
            }
            if !watched.is_nothing() {
                self.ctx.tell(|| format!("control: {watched:?}"));
            }
            died = if control.watch.is_cut_off() { vec![] } else { watched.died };
        }
        let reached = 1 + control.reached.len();
        control.reached.clear();
        control.round += 1;
        control.round_ends_ms = now_ms + PROBES_EVERY_MS;
        let round = control.round;
        for host in died {
            let is_heard = heard.contains(&host);
            self.checks.is_called_dead(&host, now_ms, is_heard, (reached, HOSTS));
        }
        for at in 1..HOSTS {
            self.say(CONTROL, at, Word::Probe { round });
        }
    }

    pub fn reached(&mut self, from: usize, round: u64) {
        let host = self.members[from].identity.host.clone();
        self.checks.reached_ms.insert(host.clone(), self.ctx.now_ms);
        if let Some(control) = self.control.as_mut().filter(|control| control.round == round) {
            control.reached.insert(host);
        }
    }

    // ---- what is published

    fn publish_store(&mut self) {
        let Some(control) = &self.control else { return };
        if control.published == Some(self.store.generation) || !self.survives() {
            return;
        }
        let Some(control) = &mut self.control else { return };
        let mut config = self.store.projection();
        if control.half_until_ms > 0 {
            let half = config.machines.iter().filter(|(id, _)| id.as_str().as_bytes()[13].is_multiple_of(2));
            config.machines = half.map(|(id, row)| (id.clone(), row.clone())).collect();
        }
        self.is_half = control.half_until_ms > 0;
        control.published = Some(config.generation);
        let rows = rows::of_config(&config);
        let changes = rows::difference(&control.rows, &rows);
        control.rows = rows;
        self.checks.publishes(&config);
        self.take_config(CONTROL, config);
        let origin = self.config.origin;
        self.handle(CONTROL, Input::Publish { origin, schema: 1, changes, at: None });
        self.survives();
    }

    // ---- what an app wants

    /// Reads, decides, does at most one thing; whether there may be more to do at once.
    fn turn(&mut self, name: &AppName) -> bool {
        if self.control.as_ref().is_some_and(|control| control.pending.contains_key(name)) {
            return self.hear_answer(name);
        }
        if let Some((plan, progress)) = self.active(name) {
            return self.go_on(name, &plan, &progress);
        }
        let Some(purpose) = self.purpose(name) else { return false };
        self.make(name, purpose)
    }

    pub fn active(&self, name: &AppName) -> Option<(Plan, Progress)> {
        let app = &self.store.apps[name];
        let (plan, progress) = app.plan.as_ref()?;
        let is_active = progress.ended.is_none() && plan.release == app.row.current_release;
        is_active.then(|| (plan.clone(), progress.clone().resumed(self.control.as_ref().map_or(0, |control| control.started_ms))))
    }

    pub fn purpose(&self, name: &AppName) -> Option<Purpose> {
        let app = &self.store.apps[name];
        let (dead, wanted) = (self.control.as_ref()?.watch.dead(), app.row.scale.clone());
        let rows = self.rows_of(name);
        let rows: Vec<&MachineRow> = rows.iter().collect();
        let last = app.plan.as_ref().map(|(plan, progress)| (plan, progress));
        let standing = Standing { status: app.current()?.status, wanted: &wanted, machines: &rows, last, dead: &dead };
        if let Some((failed, purpose)) = standing.broken_return(app.row.current_release)
            && app.releases.get(&failed).is_some_and(|failed| failed.status == ReleaseStatus::Running)
        {
            return Some(purpose);
        }
        let now_ms = self.ctx.now_ms;
        if let Some(purpose) = standing.purpose(now_ms) {
            return Some(purpose);
        }
        let may_move = app.has_succeeded()
            && !standing.has_failed_lately(Purpose::Repair, now_ms)
            && !standing.has_failed_lately(Purpose::Rebalance, now_ms);
        let ended_ms = last.map_or(0, |(_, progress)| progress.since_ms).max(self.control.as_ref()?.started_ms);
        let is_drained = self.store.hosts.iter().any(|host| host.draining);
        let has_rested = now_ms >= ended_ms + REBALANCE_REST_MS || is_drained;
        let drifts = may_move && has_rested && !drift(&self.desired(name, Purpose::Rebalance), &self.observed(name)).is_empty();
        drifts.then_some(Purpose::Rebalance)
    }

    /// The app's rows, as the planner is shown them.
    fn rows_of(&self, name: &AppName) -> Vec<MachineRow> {
        let mut rows: Vec<MachineRow> = self.store.machines_of(name).cloned().collect();
        if self.is(Bug::ReplaceExclusive) {
            let services = self.services();
            rows.iter_mut().for_each(|row| row.spec.services.clone_from(&services));
        }
        rows
    }

    /// What makes a machine one that may run twice.
    fn services(&self) -> Vec<Service> {
        self.store.apps[&app("web")].groups()[GROUP].spec.services.clone()
    }

    pub fn desired(&self, name: &AppName, purpose: Purpose) -> Desired {
        let app = &self.store.apps[name];
        let last = app.plan.as_ref();
        let mut groups = app.groups();
        if self.is(Bug::ReplaceExclusive) {
            let services = self.services();
            groups.values_mut().for_each(|group| group.spec.services.clone_from(&services));
        }
        if self.is(Bug::NeverSettles) {
            let mark = ("AT".to_owned(), self.ctx.now_ms.to_string());
            groups.values_mut().for_each(|group| drop(group.spec.env.insert(mark.0.clone(), mark.1.clone())));
        }
        Desired {
            app: name.clone(),
            sequence: last.map_or(1, |(plan, _)| plan.sequence + 1),
            purpose,
            release: app.row.current_release,
            from_release: last.map_or(0, |(plan, _)| plan.release),
            groups,
            machines: self.rows_of(name),
            free_volumes: self.store.free_volumes(name),
            left: last.map(|(plan, progress)| plan.leaves(progress)).unwrap_or_default(),
            hosts: self.store.hosts.clone(),
            regions: RegionExpr::any(),
            used_addresses: self.store.addresses.clone(),
            wait_timeout_ms: WAIT_TIMEOUT_MS,
            strategy: Strategy::Rolling,
        }
    }

    pub fn observed(&self, name: &AppName) -> Observed {
        let (Some(view), Some(control)) = (self.members[CONTROL].view(), &self.control) else { return Observed::default() };
        let dead = control.watch.dead();
        let rows: Vec<&MachineRow> = self.store.machines_of(name).collect();
        let refused = control.refused.iter().filter(|(_, until_ms)| self.ctx.now_ms < **until_ms);
        let mut assigned_memory_mb: BTreeMap<HostId, u64> = BTreeMap::new();
        for row in self.store.machines.values() {
            *assigned_memory_mb.entry(row.host.clone()).or_default() += u64::from(row.spec.guest.memory_mb);
        }
        Observed {
            assigned: rows.iter().map(|row| row.id.clone()).collect(),
            machines: view.machines_of(name).map(|fact| (fact.id.clone(), Arc::clone(fact))).collect(),
            hosts: view.hosts.iter().filter(|(id, _)| !dead.contains(*id)).map(|(id, fact)| (id.clone(), Arc::clone(fact))).collect(),
            lost: rows.iter().filter(|row| dead.contains(&row.host)).map(|row| row.id.clone()).collect(),
            dead,
            refused: refused.map(|(host, _)| (host.clone(), "it had no room".to_owned())).collect(),
            assigned_memory_mb,
        }
    }

    fn pool(&mut self, desired: &Desired) -> Pool {
        let wanted = Pool::wanted(desired);
        let mut pool = Pool::default();
        for _ in 0..wanted {
            self.made += 1;
            let random = (self.made << 8 | self.ctx.rng.below(256)).to_be_bytes();
            let mut ten = [0; 10];
            ten[2..].copy_from_slice(&random);
            pool.ids.push(MachineId::from_random(random[1..].try_into().expect("seven bytes")));
            pool.versions.push(MachineVersion::new(self.ctx.now_ms, ten));
            pool.volumes.push(VolumeId::from_random(random));
        }
        for host in &desired.hosts {
            let free = (0u32..).map_while(|n| host.prefix.nth(n)).filter(|address| !desired.used_addresses.contains(address));
            let mut free: Vec<_> = free.take(wanted + SPARE_ADDRESSES).collect();
            free.reverse();
            pool.addresses.insert(host.id.clone(), free);
        }
        pool
    }

    /// A checked plan, or why there is none. Nothing is written.
    pub fn planned(&mut self, name: &AppName, purpose: Purpose) -> Result<Plan, String> {
        let (desired, observed) = (self.desired(name, purpose), self.observed(name));
        let pool = self.pool(&desired);
        let mut made = plan(&desired, &observed, pool).map_err(|error| error.to_string())?;
        if self.is(Bug::DestroyFirst) {
            made.steps.sort_by_key(|step| !matches!(step.kind, StepKind::Destroy { .. }));
            return Ok(made);
        }
        check(&made, &desired, &observed).map_err(|problems| format!("a bad plan: {problems:?}"))?;
        Ok(made)
    }

    fn make(&mut self, name: &AppName, purpose: Purpose) -> bool {
        let made = self.planned(name, purpose);
        if purpose == Purpose::Rebalance && made.as_ref().is_ok_and(|made| made.steps.is_empty()) {
            return false;
        }
        let made = match made {
            Ok(made) => made,
            Err(why) if why.starts_with("a bad plan") => {
                self.checks.fail(|| format!("{name}: {why}"));
                return false;
            }
            Err(why) => {
                let desired = self.desired(name, purpose);
                let empty = Plan::empty(&desired);
                let progress = Progress::new(&empty, self.ctx.now_ms);
                return self.failed(name, &empty, &progress, &why);
            }
        };
        self.ctx.tell(|| format!("{name}: plan {} for {:?} of v{}: {}", made.sequence, made.purpose, made.release, told(&made)));
        self.save(name, made)
    }

    fn save(&mut self, name: &AppName, made: Plan) -> bool {
        if !self.survives() {
            return false;
        }
        let progress = Progress::new(&made, self.ctx.now_ms);
        self.app(name).plan = Some((made, progress));
        self.checks.by_hand.remove(name);
        self.store.commit();
        self.survives()
    }

    pub fn app(&mut self, name: &AppName) -> &mut App {
        self.store.apps.get_mut(name).expect("apps here are never destroyed")
    }

    // ---- a plan under way

    fn go_on(&mut self, name: &AppName, plan: &Plan, progress: &Progress) -> bool {
        let observed = self.observed(name);
        match advance(plan, progress, &observed, self.ctx.now_ms) {
            Next::Act { index, step } => self.act(name, plan, progress, index, step),
            Next::Mark(mark) => self.mark(name, plan, progress, &mark),
            Next::Wait { .. } => false,
            Next::Replan { why } => self.replan(name, plan, progress, &why),
            Next::Done => self.done(name, plan, progress),
            Next::Failed { reason, .. } => self.failed(name, plan, progress, &reason),
        }
    }

    /// Writes a mark; what the step changes in the store was changed in the same transaction.
    pub fn mark(&mut self, name: &AppName, plan: &Plan, progress: &Progress, mark: &Mark) -> bool {
        if !self.survives() {
            return false;
        }
        let next = progress.record(plan, mark, self.ctx.now_ms);
        self.app(name).plan = Some((plan.clone(), next));
        self.store.commit();
        self.survives()
    }

    pub fn replan(&mut self, name: &AppName, plan: &Plan, progress: &Progress, why: &str) -> bool {
        self.ctx.tell(|| format!("{name}: another plan is needed: {why}"));
        self.mark(name, plan, progress, &Mark::Ended(Ended::Superseded))
    }

    fn done(&mut self, name: &AppName, plan: &Plan, progress: &Progress) -> bool {
        self.ctx.tell(|| format!("{name}: plan {} is carried out", plan.sequence));
        if !self.survives() {
            return false;
        }
        let app = self.app(name);
        app.plan = Some((plan.clone(), Progress { ended: Some(Ended::Done), ..progress.clone() }));
        match plan.purpose {
            Purpose::Deploy => {
                app.row.last_good_release = plan.release;
                set_status(app, plan.release, ReleaseStatus::Succeeded);
            }
            Purpose::Return { failed_release } => set_status(app, failed_release, ReleaseStatus::RolledBack),
            Purpose::Repair | Purpose::Rebalance => {}
        }
        self.store.commit();
        self.survives()
    }

    pub fn failed(&mut self, name: &AppName, plan: &Plan, progress: &Progress, why: &str) -> bool {
        self.ctx.tell(|| format!("{name}: plan {} for {:?} failed: {why}", plan.sequence, plan.purpose));
        if !self.survives() {
            return false;
        }
        let ended = Some(Ended::Failed { machine: None, reason: why.to_owned(), details: vec![] });
        let ended = Progress { ended, ..progress.clone() };
        let good = self.app(name).row.last_good_release;
        if plan.purpose == Purpose::Deploy && self.store.apps[name].releases.contains_key(&good) {
            // The way back is planned from what this one leaves, and saved in its place.
            let app = self.app(name);
            app.plan = Some((plan.clone(), ended.clone()));
            let failed_release = app.row.current_release;
            app.row.current_release = good;
            if let Ok(back) = self.planned(name, Purpose::Return { failed_release }) {
                self.ctx.tell(|| format!("{name}: back to v{good}: {}", told(&back)));
                let progress = Progress::new(&back, self.ctx.now_ms);
                self.app(name).plan = Some((back, progress));
                self.store.commit();
                return self.survives();
            }
            self.app(name).row.current_release = failed_release;
        }
        let app = self.app(name);
        app.plan = Some((plan.clone(), ended));
        match plan.purpose {
            Purpose::Deploy => set_status(app, plan.release, ReleaseStatus::Failed),
            Purpose::Return { failed_release } => set_status(app, failed_release, ReleaseStatus::Failed),
            Purpose::Repair | Purpose::Rebalance => {}
        }
        self.store.commit();
        self.survives()
    }

    /// A person wants another release of an app.
    pub fn deploy(&mut self, name: &AppName, behaviour: crate::supervisor::Behaviour) {
        self.store.release(name, Class::of(name), behaviour);
        self.ctx.tell(|| format!("{name}: a person deploys a release that {behaviour:?}"));
    }
}

fn set_status(app: &mut App, release: u32, status: ReleaseStatus) {
    if let Some(release) = app.releases.get_mut(&release) {
        release.status = status;
    }
}

fn told(plan: &Plan) -> String {
    let steps = plan.steps.iter().map(|step| format!("{} {}", step.kind.name(), &step.machine.as_str()[..8]));
    steps.collect::<Vec<_>>().join(", ")
}
