//! What machines hold of the host, and whether there is room for more.

use crate::agent::{Agent, MAX_MACHINES, chain};
use crate::journal::Reservation;
use crate::now_ms;
use dunlin_api::{Refusal, Reserve};
use dunlin_model::{CpuKind, Guest, MachineId, MachineSpec};
use dunlin_view::HostRoom;

/// From the promise to the machine's start; a plan that needs longer asks again.
const MAX_RESERVATION_MS: u64 = 30_000;

/// Memory and cores that are nobody else's.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Held {
    pub memory_mb: u32,
    pub cores: u32,
}

impl Held {
    fn of(guest: &Guest) -> Self {
        // Shared cpus share all cores.
        let cores = if guest.cpu_kind == CpuKind::Performance { guest.cpus } else { 0 };
        Self { memory_mb: guest.memory_mb, cores }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            memory_mb: self.memory_mb.saturating_add(other.memory_mb),
            cores: self.cores.saturating_add(other.cores),
        }
    }

    fn most(self, other: Self) -> Self {
        Self { memory_mb: self.memory_mb.max(other.memory_mb), cores: self.cores.max(other.cores) }
    }
}

impl Agent {
    /// A promise that lasts until the machine is started or its time is over, over restarts of the agent.
    pub(crate) fn reserve(&mut self, reserve: Reserve) -> Result<(), Refusal> {
        let host = self.shared.config.id.clone();
        if self.slots.len() >= MAX_MACHINES {
            return Err(Refusal::InsufficientCapacity { host, why: format!("it carries {MAX_MACHINES} machines") });
        }
        // Those that sleep are gone before it starts.
        if let Err(why) = self.room(&reserve.guest, &reserve.machine)
            && !self.make_room(&reserve.guest, &reserve.machine)
        {
            return Err(Refusal::InsufficientCapacity { host, why });
        }
        let Held { memory_mb, cores } = Held::of(&reserve.guest);
        let until_ms = now_ms() + reserve.ttl_ms.min(MAX_RESERVATION_MS);
        let written = self.journal.reserve(reserve.machine, Reservation { memory_mb, cores, until_ms });
        written.map_err(|error| Refusal::DiskFull(chain(&error)))
    }

    /// For a start: of the version that it is in.
    pub(crate) fn room_to_start(&self, id: &MachineId) -> Result<(), String> {
        self.slots.get(id).map_or(Ok(()), |slot| self.room(&slot.machine.record().spec().guest, id))
    }

    /// For an exchange: of the version that it should be in.
    pub(crate) fn room_to_update(&self, id: &MachineId) -> Result<(), String> {
        self.slots.get(id).map_or(Ok(()), |slot| self.room(&slot.machine.record().assignment.spec.guest, id))
    }

    /// Whether a machine of this size fits beside all others.
    fn room(&self, guest: &Guest, id: &MachineId) -> Result<(), String> {
        self.room_beside(guest, self.held(std::slice::from_ref(id)))
    }

    /// Whether one of this size would fit if these were gone.
    pub(crate) fn fits_without(&self, guest: &Guest, gone: &[MachineId]) -> bool {
        self.room_beside(guest, self.held(gone)).is_ok()
    }

    fn room_beside(&self, guest: &Guest, held: Held) -> Result<(), String> {
        let wanted = Held::of(guest);
        let config = &self.shared.config;
        crate::layers::room(&config.data_dir)?;
        if held.memory_mb.saturating_add(wanted.memory_mb) > config.memory_mb {
            let free = config.memory_mb.saturating_sub(held.memory_mb);
            return Err(format!("{} MiB are wanted, {free} of {} MiB are free", wanted.memory_mb, config.memory_mb));
        }
        if wanted.cores > 0 && held.cores.saturating_add(wanted.cores) > config.cpus {
            let free = config.cpus.saturating_sub(held.cores);
            let missing = wanted.cores - free.min(wanted.cores);
            return Err(format!("{} performance cpus are wanted, {free} of {} are free, {missing} are missing", wanted.cores, config.cpus));
        }
        Ok(())
    }

    /// What it tells those who look for a host, beside memory. A disk that cannot be asked is not told of: `room` refuses then.
    pub(crate) fn room_told(&self) -> HostRoom {
        let sleepers: Vec<MachineId> = self.sleepers().into_iter().map(|(_, id)| id).collect();
        let (held, awake) = (self.held(&[]), self.held(&sleepers));
        let shared = |spec: &MachineSpec| if spec.guest.cpu_kind == CpuKind::Shared { spec.guest.cpus } else { 0 };
        let running = self.slots.values().map(|slot| slot.machine.record()).filter(|record| record.reserved_mb() > 0);
        let shared_cpus = running.map(|record| shared(record.spec())).sum();
        let (disk_gb, disk_free_gb) = crate::volumes::disk_gb(&self.shared.config.data_dir).unwrap_or((0, 0));
        HostRoom {
            memory_yielding_mb: held.memory_mb.saturating_sub(awake.memory_mb),
            cores_reserved: awake.cores,
            shared_cpus,
            machines: self.slots.len() as u32,
            machines_max: MAX_MACHINES as u32,
            disk_gb,
            disk_free_gb,
        }
    }

    /// By machines that run, and by promises: a machine that runs on a promise holds the greater of both.
    pub(crate) fn held(&self, but: &[MachineId]) -> Held {
        let now = now_ms();
        let promised = |id: &MachineId| {
            let promise = self.journal.reserved().get(id).filter(|promise| promise.until_ms > now);
            promise.map_or(Held::default(), |promise| Held { memory_mb: promise.memory_mb, cores: promise.cores })
        };
        let machines = self.slots.iter().map(|(id, slot)| {
            let record = slot.machine.record();
            let holds = Held { memory_mb: record.reserved_mb(), cores: record.reserved_cores() };
            (id, holds.most(promised(id)))
        });
        let only_promised = self.journal.reserved().keys().filter(|id| !self.slots.contains_key(*id));
        let all = machines.chain(only_promised.map(|id| (id, promised(id))));
        all.filter(|(id, _)| !but.contains(id)).map(|(_, held)| held).fold(Held::default(), Held::plus)
    }
}
