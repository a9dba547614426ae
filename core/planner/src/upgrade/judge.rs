//! Whether a host does worse than it did.

use dunlin_model::{MachineId, MachineState, MachineVersion};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// So many failed answers are not yet a finding, whatever their share.
const FEW_FAILURES: u64 = 5;

/// What a host says of itself when it is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Of its server's process.
    pub life: u64,
    pub version: String,
    /// Of the binary that its server is started from; empty if it cannot be read.
    pub sha256: String,
    pub trial: Trial,
    /// Names of what `dunlin doctor` misses there.
    pub lacks: BTreeSet<String>,
    /// What a request through its own edge came to, if it was not what it should be.
    pub edge: Option<String>,
    pub machines: BTreeMap<MachineId, MachineLook>,
    pub answered: Answered,
}

/// Answers of its edge since its server started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    pub all: u64,
    /// Cut off, or 5xx.
    pub failed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineLook {
    pub state: MachineState,
    pub version: MachineVersion,
    pub healthy: bool,
    /// The last attempt that ended badly and that nobody had asked to stop.
    pub crashed: Option<u64>,
}

/// What became of a binary that control gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "trial", rename_all = "snake_case")]
pub enum Trial {
    None,
    /// Its keeper goes back unless it hears in time that all is well.
    On { upgrade: String },
    Kept { upgrade: String },
    WentBack { upgrade: String, why: String },
}

impl Trial {
    pub fn is_on(&self) -> bool {
        matches!(self, Self::On { .. })
    }

    /// It was taken, whatever became of it.
    pub fn is_of(&self, id: &str) -> bool {
        match self {
            Self::None => false,
            Self::On { upgrade } | Self::Kept { upgrade } | Self::WentBack { upgrade, .. } => upgrade == id,
        }
    }

    pub fn is_kept(&self, id: &str) -> bool {
        matches!(self, Self::Kept { upgrade } if upgrade == id)
    }

    pub fn went_back(&self, id: &str) -> Option<&str> {
        match self {
            Self::WentBack { upgrade, why } if upgrade == id => Some(why),
            _ => None,
        }
    }
}

/// The first finding; `None`: it does as well as before. Machines that are not `assigned` any more do not count.
pub fn worse(before: &Look, now: &Look, assigned: &BTreeSet<MachineId>) -> Option<String> {
    if let Some(lacks) = now.lacks.difference(&before.lacks).next() {
        return Some(format!("its self-test fails at {lacks:?}, which it did not before (`dunlin doctor` there says more)"));
    }
    if let (Some(why), None) = (&now.edge, &before.edge) {
        return Some(format!("a request through its own edge fails: {why}"));
    }
    let machines = before.machines.iter().filter(|(id, was)| was.healthy && assigned.contains(id));
    let mut found = machines.filter_map(|(id, was)| Some(format!("machine {id} {}", worse_machine(was, now.machines.get(id))?)));
    found.next().or_else(|| worse_answers(before.answered, now.answered))
}

fn worse_machine(was: &MachineLook, is: Option<&MachineLook>) -> Option<String> {
    use MachineState::{Creating, Failed, Restarting, Started, Starting};
    let Some(is) = is else { return Some("is not known there any more".into()) };
    if is.version != was.version {
        return None; // a deploy came in between
    }
    if is.crashed.is_some() && is.crashed != was.crashed {
        return Some("ended by itself".into());
    }
    match is.state {
        Started if !is.healthy => Some("has checks that fail".into()),
        Failed | Restarting | Creating | Starting => Some(format!("is {}", is.state.as_str())),
        _ => None, // it runs, or it sleeps, or somebody has stopped it
    }
}

/// The share of failures counts: a host that is asked more fails more often.
fn worse_answers(before: Answered, now: Answered) -> Option<String> {
    let share = |answered: Answered| answered.failed as f64 / answered.all.max(1) as f64;
    let is_worse = now.failed >= FEW_FAILURES && share(now) > 2.0 * share(before) + 0.01;
    is_worse.then(|| {
        let Answered { all, failed } = now;
        format!("{failed} of {all} answers of its edge failed, before it were {} of {}", before.failed, before.all)
    })
}
