//! A fleet of hosts that obey at once: what is assigned runs, what is destroyed is gone.

use dunlin_model::config::{PrimaryRegion, Strategy};
use dunlin_model::desired::{HostRow, Ipv4Prefix, MachineRow};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{
    AppName, CpuKind, Generation, Guest, HostId, ImageRef, MachineId, MachineSpec, MachineState, MachineVersion, Region, RegionExpr,
    Service, VolumeId,
};
use dunlin_planner::{
    Demand, Desired, GroupTarget, KEPT_FOR_RESTARTS_PERCENT, Observed, Plan, PlanError, Pool, Purpose, StepKind, check, plan,
};
use dunlin_view::{HostFact, HostRoom, MachineFact};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub fn app() -> AppName {
    "web".parse().unwrap()
}

pub fn region(code: &str) -> Region {
    code.parse().unwrap()
}

pub fn host_row(id: &str, code: &str, zone: Option<&str>, cpus: u32, memory_mb: u32) -> HostRow {
    HostRow {
        id: id.parse().unwrap(),
        region: region(code),
        prefix: Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 24 },
        public_key: String::new(),
        cpus,
        memory_mb,
        zone: zone.map(|zone| zone.parse().unwrap()),
        labels: BTreeMap::new(),
        cordoned: false,
        draining: false,
        joined_at_ms: 0,
    }
}

pub fn guest(memory_mb: u32, cores: u32) -> Guest {
    let cpu_kind = if cores > 0 { CpuKind::Performance } else { CpuKind::Shared };
    Guest { cpu_kind, cpus: cores.max(1), memory_mb }
}

/// A service without volumes.
pub fn group(name: &str, count: u32, guest: Guest) -> GroupTarget {
    let service = Service {
        internal_port: 8080,
        force_https: false,
        autostart: true,
        autostop: Default::default(),
        min_machines_running: 0,
        max_machines_running: None,
        concurrency: Default::default(),
    };
    let image = ImageRef { repository: "web".into(), digest: "sha256:1".into(), tag: None };
    let spec = MachineSpec {
        process_group: name.into(),
        release: 1,
        guest,
        services: vec![service],
        ..MachineSpec::of(MachineVersion::new(0, [0; 10]), "personal".parse().unwrap(), app(), image)
    };
    GroupTarget { count, spec, mount: None }
}

#[derive(Debug, Clone, Default)]
pub struct Fleet {
    pub hosts: Vec<HostRow>,
    /// Of each host; without, it says nothing of its disk and cores.
    pub disk_gb: BTreeMap<HostId, u32>,
    pub rows: BTreeMap<MachineId, MachineRow>,
    pub free_volumes: Vec<VolumeRow>,
    pub groups: BTreeMap<String, GroupTarget>,
    pub primary: Option<PrimaryRegion>,
    pub refused: BTreeMap<HostId, String>,
    pub dead: BTreeSet<HostId>,
    pub drawn: u64,
    pub sequence: u64,
}

impl Fleet {
    pub fn of(hosts: Vec<HostRow>) -> Self {
        Self { hosts, ..Self::default() }
    }

    pub fn host(&self, id: &HostId) -> &HostRow {
        self.hosts.iter().find(|host| host.id == *id).unwrap()
    }

    pub fn desired(&self, purpose: Purpose) -> Desired {
        Desired {
            app: app(),
            sequence: self.sequence + 1,
            purpose,
            release: 1,
            from_release: 1,
            groups: self.groups.clone(),
            machines: self.rows.values().cloned().collect(),
            free_volumes: self.free_volumes.clone(),
            left: BTreeMap::new(),
            hosts: self.hosts.clone(),
            regions: self.wish(),
            used_addresses: BTreeSet::new(),
            wait_timeout_ms: 60_000,
            strategy: Strategy::Rolling,
        }
    }

    pub fn wish(&self) -> RegionExpr {
        PrimaryRegion::places(self.primary.as_ref())
    }

    pub fn used(&self, host: &HostId) -> Demand {
        let on_it = self.rows.values().filter(|row| row.host == *host);
        on_it.map(|row| Demand::of(&row.spec, self.volume_gb(row))).fold(Demand::default(), |sum, one| Demand {
            memory_mb: sum.memory_mb + one.memory_mb,
            cores: sum.cores + one.cores,
            shared_cpus: sum.shared_cpus + one.shared_cpus,
            volume_gb: sum.volume_gb + one.volume_gb,
            layer_gb: 0,
        })
    }

    fn volume_gb(&self, row: &MachineRow) -> u32 {
        let mount = self.groups.get(&row.spec.process_group).and_then(|group| group.mount.as_ref());
        mount.map_or(0, |mount| mount.size_gb)
    }

    pub fn observed(&self) -> Observed {
        let fact = |host: &HostRow| {
            let used = self.used(&host.id);
            let disk_gb = self.disk_gb.get(&host.id);
            let fact = HostFact {
                id: host.id.clone(),
                region: host.region.clone(),
                cpus: host.cpus,
                memory_mb: host.memory_mb,
                memory_reserved_mb: used.memory_mb,
                room: disk_gb.map(|disk_gb| HostRoom {
                    memory_yielding_mb: 0,
                    cores_reserved: used.cores,
                    shared_cpus: used.shared_cpus,
                    machines: self.rows.values().filter(|row| row.host == host.id).count() as u32,
                    machines_max: 4096,
                    disk_gb: *disk_gb,
                    disk_free_gb: disk_gb.saturating_sub(used.volume_gb),
                }),
                updated_at_ms: 0,
            };
            (host.id.clone(), Arc::new(fact))
        };
        Observed {
            assigned: self.rows.keys().cloned().collect(),
            machines: self.rows.values().map(|row| (row.id.clone(), Arc::new(running(row)))).collect(),
            hosts: self.hosts.iter().map(fact).collect(),
            refused: self.refused.clone(),
            dead: self.dead.clone(),
            lost: self.rows.values().filter(|row| self.dead.contains(&row.host)).map(|row| row.id.clone()).collect(),
            assigned_memory_mb: BTreeMap::new(),
        }
    }

    pub fn pool(&mut self, desired: &Desired) -> Pool {
        let mut pool = Pool::default();
        for _ in 0..Pool::wanted(desired) + 4 {
            self.drawn += 1;
            let random = self.drawn.to_be_bytes();
            pool.ids.push(MachineId::from_random(random[1..].try_into().unwrap()));
            let mut ten = [0; 10];
            ten[2..].copy_from_slice(&random);
            pool.versions.push(MachineVersion::new(0, ten));
            pool.volumes.push(VolumeId::from_random(random));
        }
        for host in &self.hosts {
            // Addresses are not what these tests are about: each host has more than enough of its own.
            let number = u32::try_from(self.drawn).unwrap() << 8;
            let free = (0..120).map(|n| std::net::Ipv4Addr::from(0x0a00_0000 + number + n)).collect();
            pool.addresses.insert(host.id.clone(), free);
        }
        pool
    }

    /// A checked plan; nothing is carried out.
    pub fn plan(&mut self, purpose: Purpose) -> Result<Plan, PlanError> {
        let (desired, observed) = (self.desired(purpose), self.observed());
        let mut pool = self.pool(&desired);
        // One address is on one host only.
        for (nth, addresses) in pool.addresses.values_mut().enumerate() {
            addresses.iter_mut().for_each(|address| *address = std::net::Ipv4Addr::from(u32::from(*address) + ((nth as u32) << 20)));
        }
        let made = plan(&desired, &observed, pool)?;
        check(&made, &desired, &observed).unwrap_or_else(|problems| panic!("{problems:?}\n{made:#?}"));
        Ok(made)
    }

    /// Carries a plan out.
    pub fn obey(&mut self, made: &Plan) {
        self.sequence = made.sequence;
        for step in &made.steps {
            match &step.kind {
                StepKind::Assign { name, host, region, address, group, version, volume } => {
                    let mut spec = made.spec(group, version).unwrap();
                    spec.mounts = volume.iter().map(|taken| made.mounts[group].of(taken.volume.clone())).collect();
                    self.free_volumes.retain(|row| volume.as_ref().is_none_or(|taken| taken.volume != row.id));
                    let row = MachineRow {
                        id: step.machine.clone(),
                        name: name.clone(),
                        host: host.clone(),
                        region: region.clone(),
                        address: *address,
                        placement: Generation::default(),
                        created_at_ms: 0,
                        spec,
                    };
                    self.rows.insert(step.machine.clone(), row);
                }
                StepKind::Destroy { .. } => {
                    self.rows.remove(&step.machine);
                }
                _ => {}
            }
        }
    }

    pub fn deploy(&mut self) -> Result<Plan, PlanError> {
        let made = self.plan(Purpose::Deploy)?;
        self.obey(&made);
        Ok(made)
    }

    /// How many of a group are on each host.
    pub fn counts(&self, group: &str) -> BTreeMap<HostId, u64> {
        let mut counts: BTreeMap<HostId, u64> = self.hosts.iter().map(|host| (host.id.clone(), 0)).collect();
        for row in self.rows.values().filter(|row| row.spec.process_group == group) {
            *counts.entry(row.host.clone()).or_default() += 1;
        }
        counts
    }

    /// Whether one more machine of the group would fit, by what hosts say.
    pub fn fits(&self, group: &GroupTarget, host: &HostRow) -> bool {
        let used = self.used(&host.id);
        let demand = Demand::of(&group.spec, group.mount.as_ref().map_or(0, |mount| mount.size_gb));
        let kept = if self.hosts.len() > 1 { u64::from(host.memory_mb) * KEPT_FOR_RESTARTS_PERCENT / 100 } else { 0 };
        let free_mb = u64::from(host.memory_mb.saturating_sub(used.memory_mb)).saturating_sub(kept);
        let disk_gb = self.disk_gb.get(&host.id);
        !host.cordoned
            && self.wish().rank(&host.region).is_some()
            && u64::from(demand.memory_mb) <= free_mb
            && disk_gb.is_none_or(|disk_gb| used.volume_gb + demand.volume_gb <= *disk_gb)
            && disk_gb.is_none_or(|_| demand.cores == 0 || used.cores + demand.cores <= host.cpus)
    }
}

fn running(row: &MachineRow) -> MachineFact {
    MachineFact {
        id: row.id.clone(),
        host: row.host.clone(),
        app: app(),
        sequence: 1,
        placement: Generation::default(),
        state: MachineState::Started,
        version: row.spec.version.clone(),
        release: 1,
        process_group: row.spec.process_group.as_str().into(),
        attempt: 1,
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
        updated_at_ms: 0,
    }
}
