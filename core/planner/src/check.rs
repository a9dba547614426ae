//! What a plan must never do, found before it is saved.

use crate::plan::serves;
use crate::{Desired, MAX_MACHINES_PER_APP, Observed, Plan, StepKind};
use dunlin_model::config::Strategy;
use dunlin_model::{HostId, MachineId, MachineVersion, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Steps of one machine are at most four.
const MAX_STEPS: usize = 8 * MAX_MACHINES_PER_APP as usize;

/// A rule that the plan breaks. Each one is a bug of the planner, so nobody but people branches on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{0} steps are more than {MAX_STEPS}")]
    TooManySteps(usize),
    #[error("machine {0} would have a volume that another one has")]
    VolumeTwice(MachineId),
    #[error("machine {0} would have no volume, and its group has one each; or the other way round")]
    WrongVolume(MachineId),
    #[error("two machines would have the address {0}")]
    SharedAddress(Ipv4Addr),
    #[error("machine {0} is assigned, but exists or is assigned already")]
    MachineTwice(MachineId),
    #[error("machine {0} is assigned to host {1}, which is cordoned")]
    OnCordonedHost(MachineId, HostId),
    #[error("machine {0} is assigned to host {1}, which is dead")]
    OnDeadHost(MachineId, HostId),
    #[error("machine {0} is assigned to host {1}, and its volume is on another one")]
    AwayFromVolume(MachineId, HostId),
    #[error("machine {0} is assigned without a reservation")]
    NotReserved(MachineId),
    #[error("machine {0} is neither of this app nor assigned before")]
    UnknownMachine(MachineId),
    #[error("machine version {0} is used for two machines")]
    VersionTwice(MachineVersion),
    #[error("the command id {0} is used twice")]
    CommandTwice(String),
    #[error("machine {machine} would be started in {started}, but it should be in {target}")]
    WrongVersion { machine: MachineId, started: MachineVersion, target: MachineVersion },
    #[error("machine {0} is taken down while another one is down: rolling takes one at a time")]
    TwoDown(MachineId),
    #[error("machine {0} serves and is taken down before machine {1}, which does not")]
    ServingFirst(MachineId, MachineId),
    #[error("machine {0} is removed before machine {1} is known to be healthy")]
    RemovedTooEarly(MachineId, MachineId),
    #[error("machine {0} is destroyed while it runs, without being stopped")]
    DestroyedRunning(MachineId),
    #[error("machine {0} is kept, and stays cordoned as an earlier plan left it")]
    LeftCordoned(MachineId),
    #[error("the spec of process group {0} is missing")]
    NoSpec(String),
    #[error("machine {0} is started, and nothing waits for its health")]
    NoGate(MachineId),
    #[error("the health gates have no deadline")]
    NoDeadline,
    #[error("{found} machines of {group} would be left, not {wanted}")]
    WrongCount { group: String, found: usize, wanted: u32 },
}

/// Walks the plan as if every step succeeded.
pub fn check(plan: &Plan, desired: &Desired, observed: &Observed) -> Result<(), Vec<Problem>> {
    let mut walk = Walk::new(desired, observed);
    if plan.steps.len() > MAX_STEPS {
        walk.problems.push(Problem::TooManySteps(plan.steps.len()));
    }
    if plan.wait_timeout_ms == 0 && !plan.steps.is_empty() {
        walk.problems.push(Problem::NoDeadline);
    }
    walk.gates_left = plan.steps.iter().filter(|step| is_gate(&step.kind)).map(|step| step.machine.clone()).collect();
    for step in &plan.steps {
        walk.place(desired, observed, &step.machine, &step.kind);
        walk.step(plan, &step.machine, &step.kind);
    }
    walk.end(desired);
    if walk.problems.is_empty() { Ok(()) } else { Err(walk.problems) }
}

fn is_gate(kind: &StepKind) -> bool {
    matches!(kind, StepKind::Gate { .. })
}

struct Known {
    group: String,
    version: MachineVersion,
    runs: bool,
    serves: bool,
}

struct Walk {
    machines: BTreeMap<MachineId, Known>,
    addresses: BTreeSet<Ipv4Addr>,
    /// That machines have.
    volumes: BTreeSet<VolumeId>,
    reserved: BTreeSet<MachineId>,
    versions: BTreeSet<MachineVersion>,
    commands: BTreeSet<String>,
    /// Started, and not yet known to be healthy.
    unproven: BTreeSet<MachineId>,
    /// The plan is still going to wait for their health.
    gates_left: BTreeSet<MachineId>,
    /// Served before, and down until its gate passes.
    down: Option<MachineId>,
    /// By an earlier plan.
    cordoned: BTreeSet<MachineId>,
    problems: Vec<Problem>,
}

impl Walk {
    fn new(desired: &Desired, observed: &Observed) -> Self {
        let machines = desired.machines.iter().map(|row| {
            // What a lost host's machine does, nobody can wait for.
            let heard = observed.machines.get(&row.id).filter(|_| !observed.lost.contains(&row.id));
            let runs = heard.is_some_and(|fact| fact.state.is_running());
            let (group, version) = (row.spec.process_group.clone(), row.spec.version.clone());
            let known = Known { group, version, runs, serves: serves(row, observed) };
            (row.id.clone(), known)
        });
        Self {
            machines: machines.collect(),
            addresses: desired.used_addresses.iter().copied().chain(desired.machines.iter().map(|m| m.address)).collect(),
            volumes: desired.machines.iter().flat_map(|row| &row.spec.mounts).map(|mount| mount.volume.clone()).collect(),
            reserved: BTreeSet::new(),
            versions: desired.machines.iter().map(|row| row.spec.version.clone()).collect(),
            commands: BTreeSet::new(),
            unproven: BTreeSet::new(),
            gates_left: BTreeSet::new(),
            down: None,
            cordoned: desired.left.iter().filter(|(id, left)| left.cordoned && !observed.lost.contains(id)).map(|(id, _)| id.clone()).collect(),
            problems: vec![],
        }
    }

    fn place(&mut self, desired: &Desired, observed: &Observed, machine: &MachineId, kind: &StepKind) {
        let StepKind::Assign { host, volume, .. } = kind else { return };
        let is_open = desired.hosts.iter().any(|row| row.id == *host && !row.cordoned);
        self.need(is_open, || Problem::OnCordonedHost(machine.clone(), host.clone()));
        self.need(!observed.dead.contains(host), || Problem::OnDeadHost(machine.clone(), host.clone()));
        let elsewhere = desired.free_volumes.iter().any(|row| {
            row.host != *host && volume.as_ref().is_some_and(|taken| taken.volume == row.id)
        });
        self.need(!elsewhere, || Problem::AwayFromVolume(machine.clone(), host.clone()));
    }

    fn step(&mut self, plan: &Plan, machine: &MachineId, kind: &StepKind) {
        match kind {
            StepKind::Reserve { .. } => {
                self.reserved.insert(machine.clone());
            }
            StepKind::Assign { address, group, version, volume, .. } => {
                let taken = volume.as_ref().map(|taken| &taken.volume);
                self.need(taken.is_some() == plan.mounts.contains_key(group), || Problem::WrongVolume(machine.clone()));
                let fresh = taken.is_none_or(|volume| self.volumes.insert(volume.clone()));
                self.need(fresh, || Problem::VolumeTwice(machine.clone()));
                self.need(self.reserved.contains(machine), || Problem::NotReserved(machine.clone()));
                let fresh = self.addresses.insert(*address);
                self.need(fresh, || Problem::SharedAddress(*address));
                self.spec_and_version(plan, group, version);
                let known = Known { group: group.clone(), version: version.clone(), runs: false, serves: false };
                let replaced = self.machines.insert(machine.clone(), known);
                self.need(replaced.is_none(), || Problem::MachineTwice(machine.clone()));
            }
            StepKind::Update { group, version } => {
                self.spec_and_version(plan, group, version);
                if plan.strategy == Strategy::Rolling {
                    self.order(machine);
                }
                let runs = match self.machines.get_mut(machine) {
                    Some(known) => {
                        known.version = version.clone();
                        known.serves = false;
                        known.runs
                    }
                    None => return self.problems.push(Problem::UnknownMachine(machine.clone())),
                };
                if runs && plan.strategy == Strategy::Rolling {
                    self.need(self.down.is_none(), || Problem::TwoDown(machine.clone()));
                    self.down = Some(machine.clone());
                    self.unproven.insert(machine.clone());
                }
            }
            StepKind::Start { version, command } => {
                self.command(command.as_str());
                match self.machines.get_mut(machine) {
                    Some(known) if known.version == *version => known.runs = true,
                    Some(known) => {
                        let target = known.version.clone();
                        let (machine, started) = (machine.clone(), version.clone());
                        self.problems.push(Problem::WrongVersion { machine, started, target });
                    }
                    None => self.problems.push(Problem::UnknownMachine(machine.clone())),
                }
                if plan.strategy == Strategy::Rolling {
                    self.unproven.insert(machine.clone());
                }
            }
            StepKind::Gate { .. } => {
                self.unproven.remove(machine);
                self.gates_left.remove(machine);
                if let Some(known) = self.machines.get_mut(machine) {
                    known.serves = true;
                }
                if self.down.as_ref() == Some(machine) {
                    self.down = None;
                }
            }
            StepKind::Cordon { command } => self.command(command.as_str()),
            StepKind::Uncordon { command } => {
                self.command(command.as_str());
                self.cordoned.remove(machine);
            }
            StepKind::Stop { command, .. } => {
                self.command(command.as_str());
                self.removal(machine);
                if let Some(known) = self.machines.get_mut(machine) {
                    known.runs = false;
                }
            }
            StepKind::Destroy { .. } => {
                self.removal(machine);
                match self.machines.remove(machine) {
                    Some(known) => self.need(!known.runs, || Problem::DestroyedRunning(machine.clone())),
                    None => self.problems.push(Problem::UnknownMachine(machine.clone())),
                }
            }
        }
    }

    fn end(&mut self, desired: &Desired) {
        for machine in std::mem::take(&mut self.unproven) {
            self.problems.push(Problem::NoGate(machine));
        }
        for machine in self.cordoned.iter().filter(|machine| self.machines.contains_key(machine)) {
            self.problems.push(Problem::LeftCordoned(machine.clone()));
        }
        for (name, group) in &desired.groups {
            let found = self.machines.values().filter(|known| known.group == *name).count();
            let (group, wanted) = (name.clone(), group.count);
            self.need(found == wanted as usize, || Problem::WrongCount { group, found, wanted });
        }
    }

    /// One that serves waits for all of its group that do not and are going to.
    fn order(&mut self, machine: &MachineId) {
        let Some(known) = self.machines.get(machine).filter(|known| known.serves) else { return };
        let waits = |(id, other): &(&MachineId, &Known)| {
            other.group == known.group && !other.serves && self.gates_left.contains(*id)
        };
        if let Some(other) = self.machines.iter().find(waits).map(|(id, _)| id.clone()) {
            self.problems.push(Problem::ServingFirst(machine.clone(), other));
        }
    }

    fn removal(&mut self, machine: &MachineId) {
        if let Some(unproven) = self.unproven.first().cloned() {
            self.problems.push(Problem::RemovedTooEarly(machine.clone(), unproven));
        }
    }

    fn spec_and_version(&mut self, plan: &Plan, group: &str, version: &MachineVersion) {
        self.need(plan.specs.contains_key(group), || Problem::NoSpec(group.to_owned()));
        let fresh = self.versions.insert(version.clone());
        self.need(fresh, || Problem::VersionTwice(version.clone()));
    }

    fn command(&mut self, id: &str) {
        let fresh = self.commands.insert(id.to_owned());
        self.need(fresh, || Problem::CommandTwice(id.to_owned()));
    }

    fn need(&mut self, holds: bool, problem: impl FnOnce() -> Problem) {
        if !holds {
            self.problems.push(problem());
        }
    }
}
