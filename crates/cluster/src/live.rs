//! The handle: read without a lock, write one at a time, tell subscribers.

use crate::disk::{self, Keeper, Loaded, ViewError};
use arc_swap::ArcSwap;
use dunlin_model::{Generation, HostId, MachineId};
use dunlin_view::{ConfigState, Freshness, HostFact, HostFacts, MachineFact, Refused, ReportNews, Snapshot};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// A clone is the same view.
#[derive(Clone)]
pub struct View {
    inner: Arc<Inner>,
}

struct Inner {
    current: ArcSwap<Snapshot>,
    /// Held while a fact is folded in, so that no writer loses another's.
    write: Mutex<()>,
    changes: watch::Sender<u64>,
    /// Of them, what this process says itself: its host's facts, and desired state.
    own: watch::Sender<u64>,
    /// When the config facts that came from disk were written there.
    saved_at_ms: Option<u64>,
    keeper: Option<Keeper>,
}

impl View {
    /// A view that starts empty and leaves nothing on disk.
    pub fn memory() -> Self {
        Self::new(Snapshot::default(), None, None)
    }

    /// The view whose config facts are kept in the file `path`. A file that does not match its checksum
    /// is moved aside and the view starts empty: [`Loaded`] says so.
    pub fn open(path: &Path, now_ms: u64) -> Result<(Self, Loaded), ViewError> {
        let (config, loaded) = disk::load(path, now_ms)?;
        let saved_at_ms = match &loaded {
            Loaded::FromDisk { saved_at_ms, .. } => Some(*saved_at_ms),
            Loaded::Nothing | Loaded::Quarantined { .. } => None,
        };
        let snapshot = Snapshot { config: Arc::new(config.unwrap_or_default()), ..Snapshot::default() };
        let keeper = Keeper::start(path)?;
        Ok((Self::new(snapshot, saved_at_ms, Some(keeper)), loaded))
    }

    fn new(snapshot: Snapshot, saved_at_ms: Option<u64>, keeper: Option<Keeper>) -> Self {
        let inner = Inner {
            current: ArcSwap::from_pointee(snapshot),
            write: Mutex::new(()),
            changes: watch::Sender::new(0),
            own: watch::Sender::new(0),
            saved_at_ms,
            keeper,
        };
        Self { inner: Arc::new(inner) }
    }

    /// What is known now; immutable and complete.
    pub fn current(&self) -> Arc<Snapshot> {
        self.inner.current.load_full()
    }

    /// Changes from now on, coalesced: a slow reader sees the newest snapshot, not each.
    pub fn subscribe(&self) -> Changes {
        Changes { receiver: self.inner.changes.subscribe(), view: self.clone() }
    }

    /// Control's projection of one store revision. Facts of an older generation are refused.
    pub fn publish_config(&self, config: ConfigState, now_ms: u64) -> Result<(), Refused> {
        let config = Arc::new(config);
        let guard = self.lock();
        let next = self.current().with_config(Arc::clone(&config), now_ms)?;
        self.set(next);
        if let Some(keeper) = &self.inner.keeper {
            // Under the lock, so that the file never goes back to an older generation.
            keeper.save(config, now_ms);
        }
        self.tell_own();
        drop(guard);
        Ok(())
    }

    /// Desired state of this generation, or what has followed it, is known not to be only this disk's memory.
    pub fn confirm_config(&self, generation: Generation) {
        let _guard = self.lock();
        let current = self.current();
        if !current.config_confirmed && current.config.generation == generation {
            self.set(Snapshot { config_confirmed: true, ..Snapshot::clone(&current) });
        }
    }

    /// What a host says of one of its machines.
    pub fn publish_machine(&self, fact: MachineFact) -> Result<(), Refused> {
        let _guard = self.lock();
        let next = self.current().with_machine(Arc::new(fact))?;
        self.set(next);
        self.tell_own();
        Ok(())
    }

    /// Its host has destroyed it.
    pub fn remove_machine(&self, id: &MachineId) {
        let _guard = self.lock();
        let current = self.current();
        if current.machines.contains_key(id) {
            self.set(current.without_machine(id));
            self.tell_own();
        }
    }

    /// What a host says of itself.
    pub fn publish_host(&self, fact: HostFact) {
        let _guard = self.lock();
        let next = self.current().with_host(Arc::new(fact));
        self.set(next);
        self.tell_own();
    }

    /// What other hosts say, all at once, and how lately each was heard; gives how many facts were not taken.
    pub(crate) fn fold(&self, news: News, heard: Arc<BTreeMap<HostId, Freshness>>) -> usize {
        let _guard = self.lock();
        let current = self.current();
        if news.is_empty() && current.heard == heard {
            return 0;
        }
        let News { facts, reports, dropped } = news;
        let (mut next, refused) = current.with_facts(facts);
        if !reports.is_empty() {
            next = next.with_reports(reports);
        }
        if !dropped.is_empty() {
            next = next.without_detail_of(&dropped);
        }
        self.set(Snapshot { heard, ..next });
        refused
    }

    /// Hosts that were removed for good say nothing any more.
    pub(crate) fn forget_hosts(&self, removed: &BTreeSet<HostId>) {
        let _guard = self.lock();
        let current = self.current();
        let mut next = Snapshot::clone(&current);
        next.forget_hosts(|host| removed.contains(host));
        self.set(next);
    }

    /// Rings for what this process says itself.
    pub(crate) fn subscribe_own(&self) -> watch::Receiver<u64> {
        self.inner.own.subscribe()
    }

    /// How old each writer's facts are.
    pub fn ages(&self, now_ms: u64) -> Ages {
        let current = self.current();
        let config = match (current.config_received_at_ms, self.inner.saved_at_ms) {
            (Some(at_ms), _) => Age::Received { ago_ms: now_ms.saturating_sub(at_ms) },
            (None, Some(at_ms)) => Age::FromDisk { saved_ago_ms: now_ms.saturating_sub(at_ms) },
            (None, None) => Age::Never,
        };
        let mut newest_ms: BTreeMap<HostId, u64> = BTreeMap::new();
        let of_hosts = current.hosts.values().map(|fact| (&fact.id, fact.updated_at_ms));
        let of_machines = current.machines.values().map(|fact| (&fact.host, fact.updated_at_ms));
        for (host, at_ms) in of_hosts.chain(of_machines) {
            let newest = newest_ms.entry(host.clone()).or_default();
            *newest = at_ms.max(*newest);
        }
        let hosts = newest_ms.into_iter().map(|(host, at_ms)| (host, now_ms.saturating_sub(at_ms))).collect();
        Ages { config, hosts }
    }

    /// Blocks until the config facts that were published are on disk; at once for a view in memory.
    pub fn flush(&self) -> Result<(), ViewError> {
        self.inner.keeper.as_ref().map_or(Ok(()), Keeper::flush)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The guarded value is empty and a snapshot is swapped whole: a panic elsewhere broke nothing.
        self.inner.write.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_own(&self) {
        self.inner.own.send_modify(|count| *count += 1);
    }

    fn set(&self, next: Snapshot) {
        self.inner.current.store(Arc::new(next));
        self.inner.changes.send_modify(|count| *count += 1);
    }
}

/// What has come from others.
#[derive(Default)]
pub(crate) struct News {
    pub facts: Vec<HostFacts>,
    pub reports: Vec<ReportNews>,
    /// Hosts of which only what they say of themselves is left here.
    pub dropped: BTreeSet<HostId>,
}

impl News {
    pub fn is_empty(&self) -> bool {
        self.facts.is_empty() && self.reports.is_empty() && self.dropped.is_empty()
    }
}

/// A subscription to a view.
pub struct Changes {
    receiver: watch::Receiver<u64>,
    view: View,
}

impl Changes {
    /// Waits until the view differs from what this subscription last returned. Cancel safe.
    pub async fn changed(&mut self) -> Arc<Snapshot> {
        // The sender lives in the view that we hold, so this cannot fail.
        let _ = self.receiver.changed().await;
        self.view.current()
    }

    /// The snapshot of now; the next [`Changes::changed`] waits for a later one.
    pub fn current(&mut self) -> Arc<Snapshot> {
        self.receiver.mark_unchanged();
        self.view.current()
    }
}

/// How old facts are, for each of their writers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ages {
    pub config: Age,
    /// Since the newest fact of a host, its machines' included, in milliseconds.
    pub hosts: BTreeMap<HostId, u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// There were none, ever.
    Never,
    /// Read from disk at the start, nothing newer received.
    FromDisk { saved_ago_ms: u64 },
    Received { ago_ms: u64 },
}
