//! The host's disk, promised once: what is being made, and what control was told that there is room for and has not written
//! down yet, counts as taken. All are let in under one lock, so that of several at the same time none is let in on the room of
//! another.

use crate::volumes::{disk, lock};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a new volume leaves free on the disk: images, logs and the journal need room too, and no machine starts below what
/// `layers` keeps, which is less.
pub const DISK_KEPT_BYTES: u64 = 3 << 30;
/// How long control may take to write down what it was told that there is room for, and the facts to come here.
const OFFERED: Duration = Duration::from_secs(30);
/// Offers that are kept; those of a caller that asks and asks are forgotten, the oldest first.
const OFFERS_MAX: usize = 1024;

#[derive(Default)]
pub struct Promises(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    next: u64,
    making: BTreeMap<u64, Making>,
    offers: Vec<(Instant, u64)>,
}

/// A file that is being made or grown, and what it has in the end.
struct Making {
    file: PathBuf,
    bytes: u64,
}

impl Making {
    fn owes(&self) -> u64 {
        self.bytes.saturating_sub(has(&self.file))
    }
}

/// What a file takes up, under its name or while it has none yet.
fn has(file: &Path) -> u64 {
    let mut unfinished = file.as_os_str().to_owned();
    unfinished.push(".new");
    [Path::new(&unfinished), file].into_iter().filter_map(|path| Some(fs::metadata(path).ok()?.blocks() * 512)).sum()
}

/// A volume that desired state has: its file, and how long that is to be.
pub struct Wanted {
    pub file: PathBuf,
    pub bytes: u64,
}

/// What is being made has its room until the value is dropped.
pub struct Promise {
    of: Arc<Promises>,
    number: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        lock(&self.of.0).making.remove(&self.number);
    }
}

impl Promises {
    /// For what control has written down, and was let in before.
    pub fn take_up(self: &Arc<Self>, data_dir: &Path, wanted: Wanted) -> Result<Promise, String> {
        let mut kept = lock(&self.0);
        kept.forget_offer(wanted.bytes.saturating_sub(has(&wanted.file)));
        let free = free(data_dir)?.saturating_sub(kept.being_made());
        kept.begin(self, wanted, free)
    }

    /// For what nobody has announced. `written` are all volumes of this host; what they lack is theirs.
    pub fn begin(self: &Arc<Self>, data_dir: &Path, wanted: Wanted, written: impl Iterator<Item = Wanted>) -> Result<Promise, String> {
        let mut kept = lock(&self.0);
        let free = free(data_dir)?.saturating_sub(kept.all(written));
        kept.begin(self, wanted, free)
    }

    /// Whether there is room for so much more; for a moment it is kept.
    pub fn offer(&self, data_dir: &Path, bytes: u64, written: impl Iterator<Item = Wanted>) -> Result<(), String> {
        let mut kept = lock(&self.0);
        let free = free(data_dir)?.saturating_sub(kept.all(written));
        fits(bytes, free)?;
        if kept.offers.len() == OFFERS_MAX {
            kept.offers.remove(0);
        }
        kept.offers.push((Instant::now(), bytes));
        Ok(())
    }
}

impl Kept {
    fn begin(&mut self, promises: &Arc<Promises>, wanted: Wanted, free: u64) -> Result<Promise, String> {
        let Wanted { file, bytes } = wanted;
        fits(bytes.saturating_sub(has(&file)), free)?;
        self.next += 1;
        self.making.insert(self.next, Making { file, bytes });
        Ok(Promise { of: promises.clone(), number: self.next })
    }

    fn being_made(&self) -> u64 {
        self.making.values().map(Making::owes).sum()
    }

    /// With what is written down and not begun, and what was offered.
    fn all(&mut self, written: impl Iterator<Item = Wanted>) -> u64 {
        self.offers.retain(|(at, _)| at.elapsed() < OFFERED);
        let not_begun = written.filter(|wanted| self.making.values().all(|making| making.file != wanted.file));
        let lacks: u64 = not_begun.map(|wanted| wanted.bytes.saturating_sub(has(&wanted.file))).sum();
        self.being_made() + lacks + self.offers.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// It has been written down. Offers have no names: the one that is nearest in size, in whole GiB, was for it.
    fn forget_offer(&mut self, bytes: u64) {
        if let Some(nth) = self.offers.iter().position(|(_, offered)| offered.div_ceil(1 << 30) == bytes >> 30) {
            self.offers.remove(nth);
        }
    }
}

fn free(data_dir: &Path) -> Result<u64, String> {
    Ok(disk(data_dir)?.1.saturating_sub(DISK_KEPT_BYTES))
}

fn fits(bytes: u64, free: u64) -> Result<(), String> {
    if bytes <= free {
        return Ok(());
    }
    Err(format!("{} GiB of disk are wanted, {} GiB are free for volumes", bytes.div_ceil(1 << 30), free >> 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const GIB: u64 = 1 << 30;

    fn wanted(dir: &Path, name: &str, gib: u64) -> Wanted {
        Wanted { file: dir.join(name), bytes: gib * GIB }
    }

    #[test]
    fn what_is_promised_is_not_free() {
        let dir = tempfile::tempdir().unwrap();
        let promises = Arc::new(Promises::default());
        let begin = |name: &str, gib, free: u64| {
            let mut kept = lock(&promises.0);
            let left = (free * GIB).saturating_sub(kept.being_made());
            kept.begin(&promises, wanted(dir.path(), name, gib), left)
        };
        let first = begin("a", 6, 10).unwrap();
        assert!(begin("b", 5, 10).is_err_and(|why| why == "5 GiB of disk are wanted, 4 GiB are free for volumes"));
        let second = begin("b", 4, 10).unwrap();
        // What a file has is taken from the disk, and from what it still owes.
        let file = fs::File::create(dir.path().join("a.new")).unwrap();
        (&file).write_all(&vec![1; 8 << 20]).unwrap();
        file.sync_all().unwrap();
        assert!((6 * GIB - (9 << 20)..6 * GIB).contains(&(lock(&promises.0).being_made() - 4 * GIB)));
        drop((first, second));
        assert_eq!(lock(&promises.0).being_made(), 0);
    }

    #[test]
    fn what_was_offered_and_what_is_written_down_count_once() {
        let dir = tempfile::tempdir().unwrap();
        let promises = Arc::new(Promises::default());
        let all = |written: &[(&str, u64)]| lock(&promises.0).all(written.iter().map(|(name, gib)| wanted(dir.path(), name, *gib))) / GIB;
        lock(&promises.0).offers.extend([(Instant::now(), 3 * GIB), (Instant::now(), 5 * GIB)]);
        assert_eq!(all(&[]), 8);
        assert_eq!(all(&[("a", 7)]), 15);
        // It has come, encrypted: its header is beside what was offered.
        let _making = {
            let mut kept = lock(&promises.0);
            kept.forget_offer(5 * GIB + (16 << 20));
            kept.begin(&promises, wanted(dir.path(), "a", 5), 100 * GIB).unwrap()
        };
        assert_eq!(all(&[("a", 5)]), 8);
        if let Some(long_ago) = Instant::now().checked_sub(OFFERED) {
            lock(&promises.0).offers[0].0 = long_ago;
            assert_eq!(all(&[("a", 5)]), 5);
        }
    }

    #[test]
    fn of_many_at_once_so_many_are_let_in_as_there_is_room_for() {
        let dir = tempfile::tempdir().unwrap();
        let promises = Arc::new(Promises::default());
        let free = free(dir.path()).unwrap();
        let each = free / 4 + 1;
        let let_in = std::thread::scope(|scope| {
            let ask = || promises.offer(dir.path(), each, std::iter::empty()).is_ok();
            let all: Vec<_> = (0..16).map(|_| scope.spawn(ask)).collect();
            all.into_iter().map(|one| one.join().unwrap()).filter(|is_in| *is_in).count()
        });
        assert!(free < 8 * GIB || (2..=3).contains(&let_in), "{let_in}");
    }
}
