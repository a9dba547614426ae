//! Which unpacked layers are in use, and the removal of the others.

use super::{Inner, Layer, UnpackError, read_image, remove_tree};
use crate::digest::Digest;
use crate::store::{StoreError, unique_name};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Who holds which layer, and when each was held last. A deploy hands layers to a machine before the machine is
/// among what the collector is told to keep; whoever asked for a layer lately still needs it.
pub(super) struct Uses {
    /// Of the time before, nothing is known: everything counts as used then.
    begun: Instant,
    by_name: Mutex<BTreeMap<String, Use>>,
}

struct Use {
    holders: usize,
    last: Instant,
}

/// Keeps the collector off these layers until it is dropped.
pub(super) struct Held {
    uses: Arc<Uses>,
    names: Vec<String>,
}

impl Uses {
    pub fn begin() -> Self {
        Self { begun: Instant::now(), by_name: Mutex::default() }
    }

    /// Before the layers are looked for: what is found after that stays.
    pub fn hold(self: &Arc<Self>, names: impl Iterator<Item = String>) -> Held {
        let names: Vec<String> = names.collect();
        let mut by_name = self.lock();
        for name in &names {
            let used = by_name.entry(name.clone()).or_insert_with(|| Use { holders: 0, last: Instant::now() });
            used.holders += 1;
        }
        Held { uses: self.clone(), names }
    }

    /// Takes the layer out of its place with `take`, which has to be short, unless it is or was in use.
    fn take_unused(&self, name: &str, grace: Duration, take: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        let by_name = self.lock();
        let in_use = match by_name.get(name) {
            Some(used) => used.holders > 0 || used.last.elapsed() < grace,
            None => self.begun.elapsed() < grace,
        };
        if in_use {
            return Ok(false);
        }
        take().map(|()| true)
    }

    /// Forgets what says nothing any more: layers held longer ago than that count as unused with and without it.
    fn forget(&self, grace: Duration) {
        self.lock().retain(|_, used| used.holders > 0 || used.last.elapsed() < grace);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Use>> {
        self.by_name.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut by_name = self.uses.lock();
        for name in &self.names {
            if let Some(used) = by_name.get_mut(name) {
                used.holders = used.holders.saturating_sub(1);
                used.last = Instant::now();
            }
        }
    }
}

/// Removes the layers that no image of `keep` needs and that nobody used for `grace`. Those who start machines
/// wait for one rename at most.
pub(super) fn collect(inner: &Inner, keep: &[Digest], grace: Duration) -> Result<u64, UnpackError> {
    let needed = needed(inner, keep)?;
    let mut removed = 0;
    let io = || UnpackError::io("remove an unpacked layer");
    for entry in fs::read_dir(inner.layers()).map_err(io())? {
        let entry = entry.map_err(io())?;
        // No layer of ours has a name that is no text.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if needed.contains(&name) {
            continue;
        }
        // First out of its place: half a layer must never have a layer's name.
        let temp = inner.dir.join("tmp").join(format!("gone-{}", unique_name()));
        if inner.uses.take_unused(&name, grace, || fs::rename(entry.path(), &temp)).map_err(io())? {
            remove_tree(&temp).map_err(io())?;
            removed += 1;
        }
    }
    inner.uses.forget(grace);
    Ok(removed)
}

fn needed(inner: &Inner, keep: &[Digest]) -> Result<BTreeSet<String>, UnpackError> {
    let mut needed = BTreeSet::new();
    for digest in keep {
        // An image that is not here any more may be what machines run: without knowing what it needs nothing may go.
        let parts = read_image(&inner.store, digest).map_err(|error| match error {
            UnpackError::Store(StoreError::NotFound(_) | StoreError::Damaged(_)) => {
                let what = format!("the image {digest}, which is in use (no layer is collected until it is pushed again),");
                UnpackError::Store(StoreError::NotFound(what))
            }
            other => other,
        })?;
        needed.extend(parts.layers.iter().flat_map(Layer::names));
    }
    Ok(needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_or_was_lately_stays() {
        let uses = Arc::new(Uses::begin());
        let taken = |name: &str, grace: Duration| uses.take_unused(name, grace, || Ok(())).unwrap();
        let hour = Duration::from_secs(3600);
        assert!(!taken("never", hour) && taken("never", Duration::ZERO));
        let names = || ["a".to_owned(), "b".to_owned()].into_iter();
        let (one, two) = (uses.hold(names()), uses.hold(names()));
        drop(one);
        assert!(!taken("a", Duration::ZERO), "the other still holds it");
        drop(two);
        assert!(!taken("a", hour) && taken("a", Duration::ZERO));
        uses.forget(Duration::ZERO);
        assert!(uses.lock().is_empty());
        assert!(!taken("a", hour));
    }
}
