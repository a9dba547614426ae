//! Whose turn it is to be served.

use dunlin_model::HostId;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::{Semaphore, SemaphorePermit, OwnedSemaphorePermit};

/// Blobs that are read for others at once. A whole fleet may ask one host for a new release; those who wait get a
/// head in time, or ask the next host.
const MAX_SERVED: usize = 16;
/// For one of them: whoever takes slowly, or not at all, leaves most turns to the others.
const MAX_SERVED_EACH: usize = 4;

pub(crate) struct Turns {
    all: Semaphore,
    each: Mutex<BTreeMap<HostId, Weak<Semaphore>>>,
    /// Those that wait for others' turns to end.
    waiting: AtomicUsize,
}

/// It ends when it is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    _own: OwnedSemaphorePermit,
    _any: SemaphorePermit<'a>,
}

impl Turns {
    pub fn new() -> Self {
        Self { all: Semaphore::new(MAX_SERVED), each: Mutex::default(), waiting: AtomicUsize::default() }
    }

    pub(super) async fn take(&self, peer: &HostId) -> io::Result<Turn<'_>> {
        let own = self.of(peer).acquire_owned().await.map_err(io::Error::other)?;
        let waits = Waits::begin(&self.waiting);
        let any = self.all.acquire().await.map_err(io::Error::other)?;
        drop(waits);
        Ok(Turn { turns: self, _own: own, _any: any })
    }

    fn of(&self, peer: &HostId) -> Arc<Semaphore> {
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = each.get(peer).and_then(Weak::upgrade) {
            return own;
        }
        each.retain(|_, own| own.strong_count() > 0);
        let own = Arc::new(Semaphore::new(MAX_SERVED_EACH));
        each.insert(peer.clone(), Arc::downgrade(&own));
        own
    }
}

impl Turn<'_> {
    /// Somebody waits for all turns that there are.
    pub fn is_wanted(&self) -> bool {
        self.turns.waiting.load(Relaxed) > 0
    }
}

struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
