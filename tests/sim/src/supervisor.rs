//! What of a machine outlives the agent: its supervisor with the program, and the exit records.

use crate::host::exit_info;
use crate::rng::Rng;
use dunlin_model::{ExitInfo, MachineSpec};
use std::collections::BTreeMap;

/// What a program does, written into its image's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Runs until it is told to stop.
    Serves,
    /// Ends well after a while.
    Finishes,
    /// Ends badly after a while.
    Crashes,
    /// Hears no signal but the last.
    Deaf,
    /// There is no such image.
    Missing,
}

impl Behaviour {
    pub const ALL: &'static [Self] =
        &[Self::Serves, Self::Serves, Self::Serves, Self::Finishes, Self::Crashes, Self::Deaf, Self::Missing];

    pub fn image(self) -> String {
        format!("{self:?}")
    }

    /// In the calm at the end only what must end does.
    pub fn ends_by_itself(self, rng: &mut Rng, calm: bool) -> Option<(u64, End)> {
        match self {
            Self::Finishes => Some((rng.between(0, 90_000), End::Exits(0))),
            Self::Crashes => Some((rng.between(0, 90_000), End::Exits(1))),
            Self::Serves | Self::Deaf if !calm && rng.percent(15) => Some((rng.between(0, 20_000), End::SupervisorKilled)),
            Self::Serves | Self::Deaf | Self::Missing => None,
        }
    }
}

pub fn fate(spec: &MachineSpec) -> Behaviour {
    let named = |behaviour: &&Behaviour| behaviour.image() == spec.image.digest;
    *Behaviour::ALL.iter().find(named).expect("the images of this world")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exits(i32),
    /// By its supervisor, because the time was over.
    Killed,
    /// With its supervisor: no exit record.
    SupervisorKilled,
}

pub struct Living {
    pub attempt: u64,
    pub behaviour: Behaviour,
    /// To stop.
    pub told: bool,
    pub frozen: bool,
}

#[derive(Default)]
pub struct Kept {
    pub alive: Option<Living>,
    pub exits: BTreeMap<u64, ExitInfo>,
}

impl Kept {
    pub fn come_up(&mut self, attempt: u64, behaviour: Behaviour) {
        self.alive = Some(Living { attempt, behaviour, told: false, frozen: false });
    }

    /// `None` if that attempt does not live.
    pub fn end(&mut self, attempt: u64, end: End, now_ms: u64) -> Option<ExitInfo> {
        let living = self.alive.take_if(|alive| alive.attempt == attempt)?;
        let exit = ExitInfo { requested_stop: living.told, ..exit_info(attempt, now_ms) };
        let exit = match end {
            End::Exits(code) => ExitInfo { exit_code: Some(code), ..exit },
            End::Killed => ExitInfo { signal: Some(9), ..exit },
            End::SupervisorKilled => {
                return Some(ExitInfo { requested_stop: false, error: Some("its supervisor was killed".into()), ..exit });
            }
        };
        self.exits.insert(attempt, exit.clone());
        Some(exit)
    }
}
