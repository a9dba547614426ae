//! The values that go in and out.

use dunlin_model::desired::{HostRow, MachineRow};
use dunlin_model::config::Strategy;
use dunlin_model::volume::{AutoExtend, VolumeRow};
use dunlin_model::{
    AppName, CommandId, Guest, HostId, MachineId, MachineSpec, MachineVersion, Mount, Region, RegionExpr, VolumeId,
};
use dunlin_view::{HostFact, MachineFact};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// What an app should be.
#[derive(Debug, Clone)]
pub struct Desired {
    pub app: AppName,
    /// One more than that of the app's last plan.
    pub sequence: u64,
    pub purpose: Purpose,
    pub release: u32,
    pub from_release: u32,
    /// The process groups of the release; a group that is missing here loses its machines.
    pub groups: BTreeMap<String, GroupTarget>,
    /// The app's machines that releases made. Those made by hand are not a plan's business.
    pub machines: Vec<MachineRow>,
    /// The app's volumes that no machine has.
    pub free_volumes: Vec<VolumeRow>,
    /// What plans that were not carried out to their end have left of them: [`Plan::leaves`] of the last one.
    pub left: BTreeMap<MachineId, Left>,
    pub hosts: Vec<HostRow>,
    /// Where new machines may go, in the order of preference; those that are elsewhere stay.
    pub regions: RegionExpr,
    /// Addresses of all machines of the platform.
    pub used_addresses: BTreeSet<Ipv4Addr>,
    /// How long a machine may take to be prepared and to become healthy, each.
    pub wait_timeout_ms: u64,
    pub strategy: Strategy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "purpose")]
pub enum Purpose {
    Deploy,
    /// Back to the last good release, because this one failed.
    Return { failed_release: u32 },
    /// The release is there, and fewer machines than it should have.
    Repair,
    /// All is there, and its spread over hosts has drifted: some that can be replaced move.
    Rebalance,
}

impl Purpose {
    /// Whether what it makes is beyond what there was, or comes back.
    pub fn places(&self) -> crate::For {
        match self {
            Self::Deploy | Self::Rebalance => crate::For::New,
            Self::Return { .. } | Self::Repair => crate::For::Restart,
        }
    }
}

/// What a process group should be. `version` and `release` of the template are filled in by the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupTarget {
    pub count: u32,
    /// Without mounts: each machine has its own.
    pub spec: MachineSpec,
    #[serde(default)]
    pub mount: Option<MountTarget>,
}

/// The volume that each machine of a group has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountTarget {
    /// A free volume of this name is taken; without one, one is made.
    pub name: String,
    pub path: String,
    /// Of one that is made.
    pub size_gb: u32,
    pub snapshot_retention: u32,
    /// A snapshot a day. Plans of before there were such made volumes without.
    #[serde(default)]
    pub auto_backup: bool,
    /// `None`: where its host can.
    #[serde(default)]
    pub encrypted: Option<bool>,
    #[serde(default)]
    pub extend: Option<AutoExtend>,
}

impl MountTarget {
    /// A machine that has no such volume cannot get one: it is replaced.
    pub(crate) fn fits(&self, had: &[Mount]) -> bool {
        had.iter().any(|mount| mount.name == self.name)
    }

    pub fn of(&self, volume: VolumeId) -> Mount {
        Mount { volume, name: self.name.clone(), path: self.path.clone(), extend: self.extend }
    }
}

/// The mounts of a machine that stays: its volume, where its group has it now.
pub(crate) fn kept_mounts(target: Option<&MountTarget>, had: &[Mount]) -> Vec<Mount> {
    let Some(target) = target else { return Vec::new() };
    let kept = had.iter().filter(|mount| mount.name == target.name);
    kept.map(|mount| target.of(mount.volume.clone())).collect()
}

/// The volume of a new machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTaken {
    pub volume: VolumeId,
    /// It is made with the machine; otherwise it is there and nobody has it.
    pub is_new: bool,
}

/// What readers see of the app's machines, and of the hosts. A missing fact means *unknown*.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The app's machines that exist: those with a row. A person may destroy one under a plan.
    pub assigned: BTreeSet<MachineId>,
    pub machines: BTreeMap<MachineId, Arc<MachineFact>>,
    pub hosts: BTreeMap<HostId, Arc<HostFact>>,
    /// Hosts that are held for dead. Nothing is placed on them, and nobody waits for what they would have to do.
    pub dead: BTreeSet<HostId>,
    /// The app's machines that are assigned to one of these. What was last heard of them is no news.
    pub lost: BTreeSet<MachineId>,
    /// Hosts that refused a reservation lately, and why: their own word goes before their facts.
    pub refused: BTreeMap<HostId, String>,
    /// Memory of all machines that are assigned to a host, for a host that says nothing of itself.
    pub assigned_memory_mb: BTreeMap<HostId, u64>,
}

/// Random and scarce things, drawn beforehand so that planning itself is a pure function.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    pub ids: Vec<MachineId>,
    pub versions: Vec<MachineVersion>,
    pub addresses: BTreeMap<HostId, Vec<Ipv4Addr>>,
    pub volumes: Vec<VolumeId>,
}

/// An immutable list of steps, in order, with everything named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub app: AppName,
    pub sequence: u64,
    pub purpose: Purpose,
    pub release: u32,
    pub from_release: u32,
    pub wait_timeout_ms: u64,
    #[serde(default)]
    pub strategy: Strategy,
    /// Specs by process group; steps name a group and a machine version.
    pub specs: BTreeMap<String, MachineSpec>,
    /// By process group; a group without volumes is not in it.
    #[serde(default)]
    pub mounts: BTreeMap<String, MountTarget>,
    /// What plans before this one have left of its machines, so that it is not forgotten if this one does not come to
    /// its end either.
    #[serde(default)]
    pub left: BTreeMap<MachineId, Left>,
    pub steps: Vec<Step>,
}

/// What a plan that was not carried out to its end has left of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Made or changed, and not known to be healthy.
    pub unproven: bool,
    /// Cordoned by a plan. One that a person cordoned is not in here, and stays so.
    pub cordoned: bool,
    /// Stopped by a plan.
    pub stopped: bool,
}

impl Plan {
    /// One that does nothing: instead of one that cannot be made.
    pub fn empty(desired: &Desired) -> Self {
        Self {
            app: desired.app.clone(),
            sequence: desired.sequence,
            purpose: desired.purpose,
            release: desired.release,
            from_release: desired.from_release,
            wait_timeout_ms: desired.wait_timeout_ms,
            strategy: desired.strategy,
            specs: BTreeMap::new(),
            mounts: BTreeMap::new(),
            left: desired.left.clone(),
            steps: vec![],
        }
    }

    /// The spec of one machine of the plan.
    pub fn spec(&self, group: &str, version: &MachineVersion) -> Option<MachineSpec> {
        let template = self.specs.get(group)?;
        Some(MachineSpec { version: version.clone(), release: self.release, ..template.clone() })
    }

    /// The mounts that a machine of the group keeps.
    pub fn mounts(&self, group: &str, had: &[Mount]) -> Vec<Mount> {
        kept_mounts(self.mounts.get(group), had)
    }

    /// What a plan that came to its end says of its release: whether a machine was seen healthy in it.
    pub fn tests(&self) -> Tested {
        let has = |is: fn(&StepKind) -> bool| self.steps.iter().any(|step| is(&step.kind));
        match () {
            () if has(|kind| matches!(kind, StepKind::Gate { .. })) => Tested::Healthy,
            () if has(|kind| matches!(kind, StepKind::Assign { .. } | StepKind::Update { .. })) => Tested::Unseen,
            () => Tested::Unchanged,
        }
    }

    /// What is left to do for later plans if this one goes no further than `progress`.
    ///
    /// The act of the current step may have happened, so it counts as begun. A gate that was passed proves nothing for
    /// later: what came up was to be looked back at until the end.
    pub fn leaves(&self, progress: &Progress) -> BTreeMap<MachineId, Left> {
        let mut left = self.left.clone();
        if progress.ended == Some(Ended::Done) {
            return BTreeMap::new();
        }
        for (index, step) in self.steps.iter().enumerate().take(progress.next + 1) {
            let is_over = index < progress.next;
            let left = left.entry(step.machine.clone()).or_default();
            match step.kind {
                StepKind::Assign { .. } | StepKind::Update { .. } | StepKind::Gate { .. } => left.unproven = true,
                StepKind::Start { .. } => {
                    left.unproven = true;
                    left.stopped &= !is_over;
                }
                StepKind::Cordon { .. } => left.cordoned = true,
                StepKind::Uncordon { .. } => left.cordoned &= !is_over,
                StepKind::Stop { .. } => left.stopped = true,
                StepKind::Reserve { .. } | StepKind::Destroy { .. } => {}
            }
        }
        left
    }
}

/// See [`Plan::tests`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tested {
    /// A gate was passed.
    Healthy,
    /// It is as good as the one before.
    Unchanged,
    /// Machines were brought into it, and none was waited for: they sleep, or the strategy waits for nobody.
    Unseen,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub machine: MachineId,
    /// For people.
    pub why: String,
    #[serde(flatten)]
    pub kind: StepKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "step")]
pub enum StepKind {
    /// Ask the host to set capacity aside.
    Reserve { host: HostId, guest: Guest },
    /// Store: the machine exists.
    Assign {
        name: String,
        host: HostId,
        region: Region,
        address: Ipv4Addr,
        group: String,
        version: MachineVersion,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        volume: Option<VolumeTaken>,
    },
    /// Store: the machine should be in this version.
    Update { group: String, version: MachineVersion },
    /// Once the host has the version prepared: start it, unless it runs already.
    Start { version: MachineVersion, command: CommandId },
    /// Wait until it is healthy in this version.
    Gate { group: String, version: MachineVersion },
    Cordon { command: CommandId },
    /// It serves again: an earlier plan cordoned it to remove it, and this one keeps it.
    Uncordon { command: CommandId },
    /// Stop it and wait until it is stopped.
    Stop { command: CommandId, timeout_ms: u64 },
    /// Store: tombstone; the host destroys the machine.
    Destroy { host: HostId, address: Ipv4Addr },
}

impl StepKind {
    /// The step's name, also that of its kill points.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reserve { .. } => "reserve",
            Self::Assign { .. } => "assign",
            Self::Update { .. } => "update",
            Self::Start { .. } => "start",
            Self::Gate { .. } => "gate",
            Self::Cordon { .. } => "cordon",
            Self::Uncordon { .. } => "uncordon",
            Self::Stop { .. } => "stop",
            Self::Destroy { .. } => "destroy",
        }
    }

    /// The id of the command that it is, if it is one to a host.
    pub fn command(&self) -> Option<&CommandId> {
        match self {
            Self::Start { command, .. }
            | Self::Cordon { command }
            | Self::Uncordon { command }
            | Self::Stop { command, .. } => Some(command),
            Self::Reserve { .. }
            | Self::Assign { .. }
            | Self::Update { .. }
            | Self::Gate { .. }
            | Self::Destroy { .. } => None,
        }
    }
}

/// The id of a plan's command: the same after every crash, so that a repeat gets the first answer.
pub fn command_id(app: &AppName, sequence: u64, machine: &MachineId, verb: &str) -> CommandId {
    let text = format!("plan.{app}.{sequence}.{machine}.{verb}");
    text.parse().expect("names of apps and machines are valid in a command id")
}

/// How far a plan got; durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub sequence: u64,
    /// Index of the current step.
    pub next: usize,
    /// When the current step became current.
    pub since_ms: u64,
    /// The lowest fact sequence that counts, of each machine that was commanded.
    #[serde(default)]
    pub floors: BTreeMap<MachineId, u64>,
    /// Machines at this gate and at those that follow at once, since when they were seen healthy.
    #[serde(default)]
    pub healthy: BTreeMap<MachineId, Healthy>,
    /// Machines that passed their gate, and the attempt in which they did: looked back at before anything else is
    /// taken down, and before the end.
    #[serde(default)]
    pub proven: BTreeMap<MachineId, u64>,
    #[serde(default)]
    pub ended: Option<Ended>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healthy {
    pub attempt: u64,
    pub since_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ended")]
pub enum Ended {
    Done,
    Failed { machine: Option<MachineId>, reason: String, details: Vec<String> },
    /// A newer plan took over.
    Superseded,
}

/// One durable change of a progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// The current step is complete; `floor`: facts of its machine count from this sequence on.
    Passed { index: usize, floor: Option<u64> },
    /// The machine was first seen healthy in this attempt.
    Healthy { machine: MachineId, attempt: u64 },
    /// The current step is a gate, and its machine has stayed healthy in this attempt for long enough.
    Proven { index: usize, attempt: u64 },
    Ended(Ended),
}

impl Progress {
    pub fn new(plan: &Plan, now_ms: u64) -> Self {
        Self {
            sequence: plan.sequence,
            next: 0,
            since_ms: now_ms,
            floors: BTreeMap::new(),
            healthy: BTreeMap::new(),
            proven: BTreeMap::new(),
            ended: None,
        }
    }

    /// The same, for an executor that runs since `started_ms`: time in which nobody looked does not count against the
    /// current step. A server that was away for long would otherwise fail a deploy in the moment it is back.
    pub fn resumed(self, started_ms: u64) -> Self {
        Self { since_ms: self.since_ms.max(started_ms), ..self }
    }

    /// The progress after `mark`. A mark of another step than the current one changes nothing: it was
    /// made by an executor that woke up late.
    pub fn record(&self, plan: &Plan, mark: &Mark, now_ms: u64) -> Self {
        let mut next = self.clone();
        match mark {
            _ if self.ended.is_some() => {}
            Mark::Passed { index, .. } | Mark::Proven { index, .. } if *index != self.next => {}
            Mark::Passed { index, floor } => {
                if let (Some(floor), Some(step)) = (floor, plan.steps.get(*index)) {
                    next.floors.insert(step.machine.clone(), *floor);
                }
                next.pass(now_ms);
            }
            Mark::Proven { index, attempt } => {
                if let Some(step) = plan.steps.get(*index) {
                    next.healthy.remove(&step.machine);
                    next.proven.insert(step.machine.clone(), *attempt);
                }
                next.pass(now_ms);
            }
            Mark::Healthy { machine, attempt } => {
                next.healthy.insert(machine.clone(), Healthy { attempt: *attempt, since_ms: now_ms });
            }
            Mark::Ended(ended) => next.ended = Some(ended.clone()),
        }
        next
    }

    fn pass(&mut self, now_ms: u64) {
        self.next += 1;
        self.since_ms = now_ms;
    }
}

/// What to do now.
#[derive(Debug, Clone, PartialEq)]
pub enum Next<'plan> {
    /// Do this step, then mark it as passed. It may have been done before.
    Act { index: usize, step: &'plan Step },
    /// Nothing to do but to write this down.
    Mark(Mark),
    /// Ask again when a fact changes, and at `until_ms` at the latest.
    Wait { until_ms: u64, why: String },
    /// The world is not what the plan was made for: give it up and make another one for the same purpose.
    Replan { why: String },
    Done,
    Failed { machine: Option<MachineId>, reason: String, details: Vec<String> },
}
