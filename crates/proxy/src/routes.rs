//! The table that all cores read, and the news that it changed.

use arc_swap::ArcSwap;
use dunlin_cluster::{SeeDetail, View};
use dunlin_model::{AppName, HostId, Region};
use dunlin_routing::{Loads, Table, Vantage};
use dunlin_view::Snapshot;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A process that has just started has heard of nobody yet.
const HEARS_WITHIN: Duration = Duration::from_secs(10);

/// There and back to a host, as measured.
pub type Rtt = Box<dyn Fn(&HostId) -> Option<Duration> + Send + Sync>;

/// How often it is said of one region and app, however many requests go there.
const SEE_AGAIN: Duration = Duration::from_secs(20);
/// Regions and apps that are remembered for that: beyond, those of which it is due again are let go.
const MAX_SEEN: usize = 1_024;

/// What an edge among others has beside the view.
pub struct Elsewhere {
    /// Its own.
    pub host: HostId,
    pub rtt: Rtt,
    pub see_detail: SeeDetail,
}

pub struct Routes {
    pub(crate) region: Region,
    /// Of an edge among others.
    elsewhere: Option<Elsewhere>,
    seen: Mutex<HashMap<(Region, AppName), Instant>>,
    table: ArcSwap<Table>,
    loads: Loads,
    began: Instant,
    changed: watch::Sender<u64>,
    /// Held while a table is built, so that an older one never replaces a newer.
    building: Mutex<()>,
}

impl Routes {
    /// Routes nothing until the first [`Routes::update`].
    pub fn new(region: Region) -> Arc<Self> {
        Self::with(region, None)
    }

    /// The same for an edge of a fleet.
    pub fn in_fleet(region: Region, elsewhere: Elsewhere) -> Arc<Self> {
        Self::with(region, Some(elsewhere))
    }

    fn with(region: Region, elsewhere: Option<Elsewhere>) -> Arc<Self> {
        Arc::new(Self {
            region,
            elsewhere,
            seen: Mutex::default(),
            table: ArcSwap::from_pointee(Table::default()),
            loads: Loads::default(),
            began: Instant::now(),
            changed: watch::Sender::new(0),
            building: Mutex::new(()),
        })
    }

    /// Builds the table of a snapshot and swaps it in; requests that wait look again.
    pub fn update(&self, snapshot: &Snapshot) {
        let _building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::build(snapshot, &self.loads, Some(&self.table.load()), &self.vantage(snapshot));
        let serial = table.serial;
        table.is_cut_off &= self.began.elapsed() >= HEARS_WITHIN;
        match (self.table.load().is_cut_off, table.is_cut_off) {
            (false, true) => tracing::warn!(
                "this edge hears nothing of most hosts: it goes on with what it knew, asks machines' hosts about it, and says dunlin-stale; \
                 `dunlin cluster status` here shows who is heard: check this host's network (UDP)"
            ),
            (true, false) => tracing::info!("this edge hears of the other hosts again"),
            _ => {}
        }
        self.table.store(Arc::new(table));
        self.loads.prune();
        self.changed.send_replace(serial);
    }

    fn vantage(&self, snapshot: &Snapshot) -> Vantage {
        let mut vantage = Vantage::of(self.region.clone());
        if let Some(Elsewhere { host, rtt, .. }) = &self.elsewhere {
            let in_ms = |rtt: Duration| u32::try_from(rtt.as_millis()).unwrap_or(u32::MAX);
            let measured = |host: &HostId| Some((host.clone(), in_ms(rtt(host)?)));
            vantage.rtt_ms = snapshot.hosts.keys().filter(|other| *other != host).filter_map(measured).collect();
            vantage.host = Some(host.clone());
        }
        vantage
    }

    /// A request goes there, or would if it were known what is there.
    pub(crate) fn see(&self, region: &Region, app: &AppName) {
        let Some(elsewhere) = self.elsewhere.as_ref().filter(|_| *region != self.region) else { return };
        let now = Instant::now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = |at: &Instant| now.duration_since(*at) >= SEE_AGAIN;
        let at = (region.clone(), app.clone());
        if seen.get(&at).is_none_or(is_due) && (elsewhere.see_detail)(region, app) {
            if seen.len() >= MAX_SEEN {
                seen.retain(|_, at| !is_due(at));
            }
            seen.insert(at, now);
        }
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
