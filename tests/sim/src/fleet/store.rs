//! Control's store: what is written to it survives everything. It is the only place where desired state is.

use crate::supervisor::Behaviour;
use dunlin_model::desired::{AppRow, HostRow, Ipv4Prefix, MachineRow, ReleaseStatus, TombstoneReason, TombstoneRow};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{
    AppName, Generation, Guest, HostId, ImageRef, MachineId, MachineSpec, MachineVersion, RestartPolicy, RestartWhen, Service, VolumeId,
};
use dunlin_planner::{GroupTarget, MountTarget, Plan, Progress};
use dunlin_view::{ConfigState, Desired, project};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// The one process group of each app here.
pub const GROUP: &str = "app";
const MEMORY_MB: u32 = 64;

/// What an app is, and with that what may happen to its machines while hosts do not hear of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A service and no files: replaceable.
    Web,
    /// A service with a volume: exclusive, and tied to its host.
    Database,
    /// No service: exclusive.
    Worker,
}

impl Class {
    pub const ALL: [(&'static str, Self, u32); 3] = [("web", Self::Web, 3), ("db", Self::Database, 1), ("worker", Self::Worker, 1)];

    pub fn of(app: &AppName) -> Self {
        Self::ALL.iter().find(|(name, ..)| *name == app.as_str()).expect("an app of this world").1
    }

    pub fn is_exclusive(self) -> bool {
        self != Self::Web
    }

    pub fn serves(self) -> bool {
        self != Self::Worker
    }
}

/// An app of this world.
pub fn app(name: &str) -> AppName {
    name.parse().expect("a name")
}

#[derive(Clone)]
pub struct Release {
    pub status: ReleaseStatus,
    target: GroupTarget,
}

#[derive(Clone)]
pub struct App {
    pub row: AppRow,
    pub releases: BTreeMap<u32, Release>,
    pub plan: Option<(Plan, Progress)>,
}

impl App {
    /// None: it was made after the backup that this store is of.
    pub fn current(&self) -> Option<&Release> {
        self.releases.get(&self.row.current_release)
    }

    pub fn has_succeeded(&self) -> bool {
        self.current().is_some_and(|current| current.status == ReleaseStatus::Succeeded)
    }

    pub fn count(&self) -> u32 {
        self.row.scale.get(GROUP).copied().unwrap_or(1)
    }

    pub fn groups(&self) -> BTreeMap<String, GroupTarget> {
        let current = self.current().expect("nothing is planned for an app whose release nobody knows");
        BTreeMap::from([(GROUP.to_owned(), GroupTarget { count: self.count(), ..current.target.clone() })])
    }
}

#[derive(Clone)]
pub struct Store {
    pub generation: Generation,
    pub apps: BTreeMap<AppName, App>,
    pub hosts: Vec<HostRow>,
    pub machines: BTreeMap<MachineId, MachineRow>,
    pub tombstones: BTreeMap<MachineId, TombstoneRow>,
    pub volumes: BTreeMap<VolumeId, VolumeRow>,
    /// Of all machines that there ever were: they rest for longer than a run lasts.
    pub addresses: BTreeSet<Ipv4Addr>,
}

impl Store {
    pub fn new(hosts: &[(HostId, &str)]) -> Self {
        let host = |(at, (id, region)): (usize, &(HostId, &str))| HostRow {
            id: id.clone(),
            region: region.parse().expect("a region"),
            prefix: Ipv4Prefix { network: Ipv4Addr::new(10, 200 + at as u8, 0, 0), length: 20 },
            public_key: String::new(),
            cpus: 4,
            memory_mb: crate::world::MEMORY_MB,
            zone: None,
            labels: BTreeMap::new(),
            cordoned: false,
            draining: false,
            joined_at_ms: 0,
        };
        let mut store = Self {
            generation: Generation { incarnation: 1, revision: 1 },
            apps: BTreeMap::new(),
            hosts: hosts.iter().enumerate().map(host).collect(),
            machines: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            volumes: BTreeMap::new(),
            addresses: BTreeSet::new(),
        };
        for (name, class, count) in Class::ALL {
            let row = AppRow {
                name: app(name),
                org: "personal".parse().expect("a name"),
                created_at_ms: 0,
                current_release: 0,
                last_good_release: 0,
                scale: BTreeMap::from([(GROUP.to_owned(), count)]),
                destroying: false,
            };
            store.apps.insert(row.name.clone(), App { row, releases: BTreeMap::new(), plan: None });
            store.release(&app(name), class, Behaviour::Serves);
        }
        store
    }

    /// One transaction.
    pub fn commit(&mut self) -> Generation {
        self.generation.revision += 1;
        self.generation
    }

    /// A new release of the app is to run.
    pub fn release(&mut self, name: &AppName, class: Class, behaviour: Behaviour) {
        self.commit();
        let Some(app) = self.apps.get_mut(name) else { return };
        if let Some(current) = app.releases.get_mut(&app.row.current_release).filter(|current| current.status == ReleaseStatus::Running) {
            current.status = ReleaseStatus::Superseded;
        }
        let number = app.releases.last_key_value().map_or(0, |(number, _)| *number).max(app.row.current_release) + 1;
        let target = target(name, class, behaviour, number);
        app.releases.insert(number, Release { status: ReleaseStatus::Running, target });
        app.row.current_release = number;
    }

    pub fn destroy(&mut self, id: &MachineId, reason: TombstoneReason, now_ms: u64) {
        self.commit();
        let Some(row) = self.machines.remove(id) else { return };
        let tombstone = TombstoneRow { machine: id.clone(), host: row.host, app: row.spec.app, address: row.address, at_ms: now_ms, reason };
        self.tombstones.insert(id.clone(), tombstone);
    }

    pub fn machines_of(&self, app: &AppName) -> impl Iterator<Item = &MachineRow> {
        self.machines.values().filter(move |row| row.spec.app == *app)
    }

    pub fn free_volumes(&self, app: &AppName) -> Vec<VolumeRow> {
        let taken = |volume: &VolumeId| self.machines.values().any(|row| row.spec.mounts.iter().any(|mount| mount.volume == *volume));
        self.volumes.values().filter(|row| row.app == *app && !taken(&row.id)).cloned().collect()
    }

    pub fn projection(&self) -> ConfigState {
        project(Desired {
            generation: self.generation,
            domain: "localhost".into(),
            apps: self.apps.values().map(|app| app.row.clone()).collect(),
            machines: self.machines.values().cloned().collect(),
            tombstones: self.tombstones.values().cloned().collect(),
            volumes: self.volumes.values().cloned().collect(),
            ..Desired::default()
        })
    }
}

fn target(app: &AppName, class: Class, behaviour: Behaviour, release: u32) -> GroupTarget {
    let service = Service {
        internal_port: 8080,
        force_https: false,
        autostart: true,
        autostop: Default::default(),
        min_machines_running: 0,
        max_machines_running: None,
        concurrency: Default::default(),
    };
    let image = ImageRef { repository: app.to_string(), digest: behaviour.image(), tag: None };
    let spec = MachineSpec {
        process_group: GROUP.into(),
        release,
        guest: Guest { memory_mb: MEMORY_MB, ..Guest::default() },
        services: if class.serves() { vec![service] } else { vec![] },
        restart: RestartPolicy { policy: RestartWhen::Always, max_retries: 0 },
        env: BTreeMap::from([("RELEASE".to_owned(), release.to_string())]),
        ..MachineSpec::of(MachineVersion::new(0, [0; 10]), "personal".parse().expect("a name"), app.clone(), image)
    };
    let mount = (class == Class::Database).then(|| MountTarget {
        name: "data".into(),
        path: "/data".into(),
        size_gb: 1,
        snapshot_retention: 1,
        auto_backup: false,
        encrypted: None,
        extend: None,
    });
    GroupTarget { count: 1, spec, mount }
}
