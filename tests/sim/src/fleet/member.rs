//! A host of the fleet: what lives while its process does, and what outlives it.

use super::rows;
use crate::host::{Host, Image};
use crate::world::Assigned;
use dunlin_gossip::{Certificate, Node, Now, OriginId};
use dunlin_model::{Generation, HostId, MachineId, MachineState};
use dunlin_routing::{Loads, Table};
use dunlin_view::{ConfigState, HostFact, Snapshot};
use ed25519_dalek::SigningKey;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// A system's clock in 2026; every host is a little off.
const EPOCH_MS: u64 = 1_790_000_000_000;

/// Who a host is in the cluster.
#[derive(Clone)]
pub struct Identity {
    pub host: HostId,
    pub origin: OriginId,
    pub key: SigningKey,
    pub certificate: Certificate,
    pub region: &'static str,
}

/// Everything that is on a host's disk.
#[derive(Clone, Default)]
pub struct Kept {
    pub agent: Option<Image>,
    pub gossip: Option<Vec<u8>>,
    pub config: Arc<ConfigState>,
}

pub struct Member {
    pub identity: Identity,
    pub is_clone: bool,
    /// The agent with its journal, and the supervisors that outlive it.
    pub agent: Host,
    pub kept: Kept,
    /// Its disk as it once was.
    pub backup: Option<Kept>,
    pub skew_ms: i64,
    /// Another process has its identity, and it was ended for that.
    pub is_silenced: bool,
    /// What had been decided when its disk was put back: until it hears of that it knows no better.
    pub behind: Option<Generation>,
    pub heard_since_ms: u64,
    /// `None` while no process runs.
    pub process: Option<Process>,
}

/// What dies with the process.
pub struct Process {
    pub node: Node,
    pub started_ms: u64,
    pub view: Arc<Snapshot>,
    pub config_is_news: bool,
    /// Sequences of the facts of this life; `None` before the first publication.
    pub said: Option<BTreeMap<MachineId, u64>>,
    pub look_at_ms: u64,
    pub looks: u64,
    pub table: Option<Arc<Table>>,
    pub table_is_stale: bool,
    pub loads: Loads,
}

impl Process {
    pub fn new(node: Node, config: Arc<ConfigState>, now_ms: u64) -> Self {
        let view = Arc::new(Snapshot { config, ..Snapshot::default() });
        Self {
            node,
            started_ms: now_ms,
            view,
            config_is_news: true,
            said: None,
            look_at_ms: now_ms,
            looks: 0,
            table: None,
            table_is_stale: true,
            loads: Loads::default(),
        }
    }
}

impl Member {
    pub fn new(index: usize, identity: Identity) -> Self {
        Self {
            identity,
            is_clone: false,
            agent: Host::new(index),
            kept: Kept::default(),
            backup: None,
            skew_ms: 0,
            is_silenced: false,
            behind: None,
            heard_since_ms: 0,
            process: None,
        }
    }

    pub fn now(&self, now_ms: u64) -> Now {
        let started_ms = self.process.as_ref().map_or(now_ms, |process| process.started_ms);
        Now { ms: now_ms - started_ms, wall_ms: (EPOCH_MS + now_ms).saturating_add_signed(self.skew_ms) }
    }

    pub fn next_ms(&self) -> u64 {
        let next = |process: &Process| process.node.next_wake_ms().saturating_add(process.started_ms).min(process.look_at_ms);
        self.process.as_ref().map_or(u64::MAX, next)
    }

    pub fn view(&self) -> Option<&Arc<Snapshot>> {
        self.process.as_ref().map(|process| &process.view)
    }

    /// A disk as it is now.
    pub fn disk(&self) -> Kept {
        Kept { agent: Some(self.agent.image()), ..self.kept.clone() }
    }

    /// What of desired state is this host's.
    pub fn assigned(&self, config: &ConfigState, ignores_tombstones: bool) -> Rc<Assigned> {
        let own = &self.identity.host;
        let machines = config.machines.iter().filter(|(id, row)| row.host == *own && !config.tombstones.contains_key(*id));
        let tombstones = config.tombstones.iter().filter(|(_, host)| *host == own && !ignores_tombstones);
        Rc::new(Assigned {
            generation: (config.generation.incarnation << 40) + config.generation.revision,
            machines: machines.map(|(id, row)| (id.clone(), row.clone())).collect(),
            tombstones: tombstones.map(|(id, _)| id.clone()).collect(),
        })
    }

    pub fn fact_of_host(&self, now_ms: u64) -> HostFact {
        let records = self.agent.slots.iter().flatten().map(|(_, slot)| slot.machine.record());
        let held = records.filter(|record| record.state != MachineState::Destroying).map(dunlin_machine::Record::reserved_mb);
        HostFact {
            id: self.identity.host.clone(),
            region: self.identity.region.parse().expect("a region"),
            cpus: 4,
            memory_mb: crate::world::MEMORY_MB,
            memory_reserved_mb: held.sum(),
            room: None,
            updated_at_ms: now_ms,
        }
    }

    /// Rows of what its agent says and has not said yet, with the facts themselves.
    pub fn news(&mut self, now_ms: u64) -> News {
        let mut news = News::default();
        let is_recovered = self.agent.is_recovered();
        let (Some(slots), Some(process)) = (&self.agent.slots, &mut self.process) else { return news };
        // The first publication is the whole truth: it waits until the agent knows it.
        if process.said.is_none() && !is_recovered {
            return news;
        }
        let is_first = process.said.is_none();
        let said = process.said.get_or_insert_default();
        let gone: Vec<MachineId> = said.keys().filter(|id| !slots.contains_key(*id)).cloned().collect();
        for id in gone {
            said.remove(&id);
            news.changes.push(rows::gone(&id));
            news.gone.push(id);
        }
        for (id, slot) in slots {
            let record = slot.machine.record();
            if said.get(id) != Some(&record.sequence) {
                said.insert(id.clone(), record.sequence);
                let fact = record.fact(vec![]);
                news.changes.push(rows::of_machine(&fact));
                news.facts.push(fact);
            }
        }
        if is_first {
            let fact = self.fact_of_host(now_ms);
            news.changes.push(rows::of_host(&fact));
            news.host = Some(fact);
        }
        news
    }
}

#[derive(Default)]
pub struct News {
    pub changes: Vec<dunlin_gossip::Change>,
    pub facts: Vec<dunlin_view::MachineFact>,
    pub gone: Vec<MachineId>,
    pub host: Option<HostFact>,
}
