//! The table that all cores read, and the news that it changed.

use arc_swap::ArcSwap;
use dunlin_cluster::View;
use dunlin_model::Region;
use dunlin_routing::{Loads, Table};
use dunlin_view::Snapshot;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

pub struct Routes {
    pub(crate) region: Region,
    table: ArcSwap<Table>,
    loads: Loads,
    changed: watch::Sender<u64>,
    /// Held while a table is built, so that an older one never replaces a newer.
    building: Mutex<()>,
}

impl Routes {
    /// Routes nothing until the first [`Routes::update`].
    pub fn new(region: Region) -> Arc<Self> {
        Arc::new(Self {
            region,
            table: ArcSwap::from_pointee(Table::default()),
            loads: Loads::default(),
            changed: watch::Sender::new(0),
            building: Mutex::new(()),
        })
    }

    /// Builds the table of a snapshot and swaps it in; requests that wait look again.
    pub fn update(&self, snapshot: &Snapshot) {
        let _building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let table = Table::build(snapshot, &self.loads, Some(&self.table.load()));
        let serial = table.serial;
        self.table.store(Arc::new(table));
        self.loads.prune();
        self.changed.send_replace(serial);
    }

    pub fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// Follows the view until it is dropped: run it as a task of the main runtime.
    pub async fn follow(self: Arc<Self>, view: View) {
        let mut changes = view.subscribe();
        self.update(&changes.current());
        loop {
            let snapshot = changes.changed().await;
            self.update(&snapshot);
        }
    }

    pub(crate) fn load(&self) -> arc_swap::Guard<Arc<Table>> {
        self.table.load()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
