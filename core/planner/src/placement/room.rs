//! One host's room: what it has, what is taken, whether something fits.

use super::For;
use crate::Observed;
use dunlin_model::desired::HostRow;
use dunlin_model::disk::{ROOTFS_DEFAULT_GB, TempStorage};
use dunlin_model::{CpuKind, Guest, MachineSpec};
use dunlin_view::HostFact;
use std::sync::Arc;

/// A shared cpu weighs as a sixteenth of a core: so many of them share one before they get less than they are promised.
const SHARED_CPUS_OF_A_CORE: u64 = 16;
const THOUSAND: u64 = 1000;
/// A host that is thousand times too full is as full as can be; its square still adds up.
const MOST_LOAD: u64 = 1_000_000;

/// What a machine takes of its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    pub memory_mb: u32,
    /// Performance cpus: they are nobody else's.
    pub cores: u32,
    /// Shared cpus share all cores, with less for each the more there are. So a host may be fuller than another of them,
    /// and is never full.
    pub shared_cpus: u32,
    /// Of volumes that are made with it: their blocks are reserved.
    pub volume_gb: u32,
    /// What its root file systems and temporary directories may become. They take up disk as they are written, and
    /// hosts do not add them up; but of two hosts the one with more free disk is better.
    pub layer_gb: u32,
}

impl Demand {
    pub fn of_guest(guest: &Guest) -> Self {
        let (cores, shared_cpus) = match guest.cpu_kind {
            CpuKind::Performance => (guest.cpus, 0),
            CpuKind::Shared => (0, guest.cpus),
        };
        Self { memory_mb: guest.memory_mb, cores, shared_cpus, ..Self::default() }
    }

    /// With a volume of that size which is made with it; 0: none is.
    pub fn of(spec: &MachineSpec, volume_gb: u32) -> Self {
        let root_gb = if spec.rootfs.size_gb == 0 { ROOTFS_DEFAULT_GB } else { spec.rootfs.size_gb };
        let roots = spec.containers.len().max(1) as u32;
        let on_disk = spec.temp_dirs.iter().filter(|dir| dir.storage == TempStorage::Disk);
        let temp_gb: u32 = on_disk.map(|dir| dir.size_mb.div_ceil(1024)).sum();
        Self { volume_gb, layer_gb: root_gb.saturating_mul(roots).saturating_add(temp_gb), ..Self::of_guest(&spec.guest) }
    }

    /// What this takes more than `held`.
    pub(super) fn beyond(self, held: Self) -> Self {
        Self {
            memory_mb: self.memory_mb.saturating_sub(held.memory_mb),
            cores: self.cores.saturating_sub(held.cores),
            shared_cpus: self.shared_cpus.saturating_sub(held.shared_cpus),
            volume_gb: 0,
            layer_gb: 0,
        }
    }
}

/// A host. What it says nothing of is not counted: it will say so itself.
#[derive(Debug, Clone)]
pub(super) struct Room<'a> {
    pub row: &'a HostRow,
    /// Indices.
    pub region: usize,
    pub zone: usize,
    pub refused: Option<&'a str>,
    pub addresses: Option<usize>,
    pub memory_mb: u64,
    pub free_mb: u64,
    /// Of the free memory, for machines that come back.
    pub kept_mb: u64,
    pub cores: u64,
    pub free_cores: Option<u64>,
    pub shared_cpus: u64,
    pub disk: Option<Disk>,
    pub free_slots: Option<u64>,
    pub slots: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    pub gb: u64,
    pub free_gb: u64,
    /// What layers of machines placed here may become.
    pub layers_gb: u64,
}

impl<'a> Room<'a> {
    pub fn new(row: &'a HostRow, fact: Option<&Arc<HostFact>>, observed: &'a Observed, region: usize, zone: usize) -> Self {
        let room = fact.and_then(|fact| fact.room);
        let (memory_mb, reserved_mb) = match fact {
            // Those that sleep make room.
            Some(fact) => {
                let yields_mb = room.map_or(0, |room| room.memory_yielding_mb);
                (fact.memory_mb, u64::from(fact.memory_reserved_mb.saturating_sub(yields_mb)))
            }
            None => (row.memory_mb, observed.assigned_memory_mb.get(&row.id).copied().unwrap_or(0)),
        };
        let cores = u64::from(fact.map_or(row.cpus, |fact| fact.cpus));
        Self {
            row,
            region,
            zone,
            refused: match observed.dead.contains(&row.id) {
                true => Some("it is down"),
                false => observed.refused.get(&row.id).map(String::as_str),
            },
            addresses: None,
            memory_mb: u64::from(memory_mb),
            free_mb: u64::from(memory_mb).saturating_sub(reserved_mb),
            kept_mb: 0,
            cores,
            free_cores: room.map(|room| cores.saturating_sub(u64::from(room.cores_reserved))),
            shared_cpus: room.map_or(0, |room| u64::from(room.shared_cpus)),
            disk: room.filter(|room| room.disk_gb > 0).map(|room| Disk {
                gb: u64::from(room.disk_gb),
                free_gb: u64::from(room.disk_free_gb),
                layers_gb: 0,
            }),
            free_slots: room.map(|room| u64::from(room.machines_max.saturating_sub(room.machines))),
            slots: room.map_or(0, |room| u64::from(room.machines_max)),
        }
    }

    pub fn keeping(self, percent: u64) -> Self {
        Self { kept_mb: self.memory_mb * percent / 100, ..self }
    }

    /// Memory that a machine may have.
    pub fn usable_mb(&self, purpose: For) -> u64 {
        match purpose {
            For::New => self.free_mb.saturating_sub(self.kept_mb),
            For::Restart => self.free_mb,
        }
    }

    pub fn fits(&self, demand: &Demand, purpose: For) -> bool {
        !self.row.cordoned
            && self.refused.is_none()
            && u64::from(demand.memory_mb) <= self.usable_mb(purpose)
            && self.addresses.is_none_or(|free| free > 0)
            && self.free_slots.is_none_or(|free| free > 0)
            && (demand.cores == 0 || self.free_cores.is_none_or(|free| u64::from(demand.cores) <= free))
            && self.disk.is_none_or(|disk| u64::from(demand.volume_gb) <= disk.free_gb)
    }

    /// One that is there becomes larger.
    pub fn grows_by(&self, more: &Demand) -> bool {
        u64::from(more.memory_mb) <= self.free_mb
            && (more.cores == 0 || self.free_cores.is_none_or(|free| u64::from(more.cores) <= free))
    }

    /// Only of what fits.
    pub fn take(&mut self, demand: &Demand) {
        self.free_mb -= u64::from(demand.memory_mb);
        self.shared_cpus += u64::from(demand.shared_cpus);
        if let Some(free) = &mut self.free_cores {
            *free -= u64::from(demand.cores);
        }
        if let Some(disk) = &mut self.disk {
            disk.free_gb -= u64::from(demand.volume_gb);
            disk.layers_gb += u64::from(demand.layer_gb);
        }
    }

    /// What every machine takes, however small it is.
    pub fn enter(&mut self) {
        self.free_slots = self.free_slots.map(|free| free - 1);
        self.addresses = self.addresses.map(|free| free - 1);
    }

    pub fn leave(&mut self) {
        self.free_slots = self.free_slots.map(|free| free + 1);
        self.addresses = self.addresses.map(|free| free + 1);
    }

    pub fn give_back(&mut self, demand: &Demand) {
        self.free_mb += u64::from(demand.memory_mb);
        self.shared_cpus -= u64::from(demand.shared_cpus);
        if let Some(free) = &mut self.free_cores {
            *free += u64::from(demand.cores);
        }
        if let Some(disk) = &mut self.disk {
            disk.free_gb += u64::from(demand.volume_gb);
            disk.layers_gb -= u64::from(demand.layer_gb);
        }
    }

    /// By how much it becomes fuller. Squares, so that of two hosts the emptier one is better, and of two as empty the
    /// larger one; the sum over all hosts is least where all are equally full.
    pub fn load_of(&self, demand: &Demand) -> u64 {
        let grows = |used: u64, more: u64, all: u64| {
            let square = |used: u64| (used.saturating_mul(THOUSAND) / all.max(1)).min(MOST_LOAD).pow(2);
            square(used + more) - square(used)
        };
        let memory = grows(self.memory_mb.saturating_sub(self.free_mb), u64::from(demand.memory_mb), self.memory_mb);
        let own = self.free_cores.map_or(0, |free| self.cores.saturating_sub(free));
        // A core that is somebody's own is as much as sixteen shared cpus.
        let cpus = own * SHARED_CPUS_OF_A_CORE + self.shared_cpus;
        let more_cpus = u64::from(demand.cores) * SHARED_CPUS_OF_A_CORE + u64::from(demand.shared_cpus);
        let cpus = grows(cpus, more_cpus, self.cores * SHARED_CPUS_OF_A_CORE);
        let disk = self.disk.map_or(0, |disk| {
            let used = disk.gb.saturating_sub(disk.free_gb) + disk.layers_gb;
            grows(used, u64::from(demand.volume_gb) + u64::from(demand.layer_gb), disk.gb)
        });
        memory + cpus + disk
    }
}
