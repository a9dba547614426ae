//! The handle that everybody clones.

use crate::limits::{check_key, check_prefix, check_ranges, check_txn};
use crate::read::{self, Readers, page_limit};
use crate::writer::{Command, QUEUE, Reply, TxnRequest, Writer};
use crate::{Compare, Kv, Op, Page, StoreError, Watch, WatchError, backup, db};
use dunlin_model::Generation;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// The store. Clones share one writer thread, which ends with the last of them.
#[derive(Clone)]
pub struct Store {
    commands: mpsc::Sender<Command>,
    readers: Arc<Readers>,
    revisions: watch::Receiver<u64>,
    incarnation: Arc<AtomicU64>,
}

impl Store {
    /// Opens or makes the database. Blocks for a moment; only one process may have it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = db::lock(path)?;
        let conn = db::open_writer(path)?;
        let revision = db::meta(&conn, "revision")?;
        let compacted = db::meta(&conn, "compacted")?;
        let incarnation = Arc::new(AtomicU64::new(db::meta(&conn, "incarnation")?));
        let (sender, revisions) = watch::channel(revision);
        let (commands, queue) = mpsc::channel(QUEUE);
        let writer = Writer {
            conn,
            lock,
            revision,
            compacted,
            revisions: sender,
            incarnation: Arc::clone(&incarnation),
            stopped: None,
        };
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(queue))
            .map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
        Ok(Self { commands, readers: Arc::new(Readers::new(path.to_owned())), revisions, incarnation })
    }

    /// If everything compared holds, writes everything, on disk when this returns: `Some` is its revision
    /// (the newest one, if nothing changed). `None`: something compared does not hold, nothing was written.
    pub async fn txn(&self, compare: Vec<Compare>, then: Vec<Op>) -> Result<Option<u64>, StoreError> {
        check_txn(&compare, &then)?;
        self.ask(|reply| Command::Txn(TxnRequest { compare, then, reply })).await
    }

    pub async fn get(&self, key: &str) -> Result<Option<Kv>, StoreError> {
        check_key(key)?;
        let key = key.to_owned();
        self.readers.read(move |conn| read::get(conn, &key)).await
    }

    /// All rows whose key begins with `prefix`, by key, and the revision they were read at.
    pub async fn range(&self, prefix: &str) -> Result<(Vec<Kv>, u64), StoreError> {
        let prefix = prefix.to_owned();
        self.readers.read(move |conn| read::range(conn, &prefix, None)).await
    }

    /// The same for several prefixes, in their order, all at one revision.
    pub async fn ranges(&self, prefixes: &[&str]) -> Result<(Vec<Vec<Kv>>, u64), StoreError> {
        check_ranges(prefixes)?;
        let prefixes: Vec<String> = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
        self.readers.read(move |conn| read::ranges(conn, &prefixes)).await
    }

    /// The rows as they were at an earlier revision.
    pub async fn range_at(&self, prefix: &str, revision: u64) -> Result<Vec<Kv>, StoreError> {
        let prefix = prefix.to_owned();
        Ok(self.readers.read(move |conn| read::range(conn, &prefix, Some(revision))).await?.0)
    }

    /// At most `limit` rows, beginning at the key `from`, at a revision (`None` = newest).
    pub async fn page(
        &self,
        prefix: &str,
        from: Option<&str>,
        at: Option<u64>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        let (prefix, from) = (prefix.to_owned(), from.map(str::to_owned));
        self.readers.read(move |conn| read::page(conn, &prefix, from.as_deref(), at, page_limit(limit))).await
    }

    /// Every change of the prefix after a revision, which is usually that of a [`range`](Self::range). `silence` is how
    /// long the watch waits without a change before it says so: a connection that died in silence looks like a quiet
    /// prefix, with any backend.
    pub async fn watch(&self, prefix: &str, after: u64, silence: Duration) -> Result<Watch, WatchError> {
        check_prefix(prefix)?;
        // Reads nothing, but says now rather than at the first event that the history is gone.
        self.readers.read(move |conn| read::events(conn, "", after, 0)).await?;
        Ok(Watch {
            readers: Arc::clone(&self.readers),
            revisions: self.revisions.clone(),
            prefix: prefix.to_owned(),
            after,
            ahead: Default::default(),
            silence,
        })
    }

    /// The newest revision; rings after every commit, and maybe once at the beginning.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.revisions.clone()
    }

    pub fn revision(&self) -> u64 {
        *self.revisions.borrow()
    }

    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    pub fn generation(&self) -> Generation {
        Generation { incarnation: self.incarnation(), revision: self.revision() }
    }

    /// To be called once after the database was restored or moved; returns the new incarnation.
    pub async fn raise_incarnation(&self) -> Result<u64, StoreError> {
        self.ask(|reply| Command::RaiseIncarnation { reply }).await
    }

    /// Forgets history before a revision: it can still be read and watched from, earlier ones cannot.
    pub async fn compact(&self, before: u64) -> Result<(), StoreError> {
        self.ask(|reply| Command::Compact { before, reply }).await
    }

    /// Writes a copy of this moment to the file `to`, complete and on disk when this returns.
    pub async fn backup(&self, to: &Path) -> Result<Generation, StoreError> {
        let to = to.to_owned();
        self.readers.read(move |conn| backup::backup(conn, &to)).await
    }

    /// The same of a store that another process may have open. Blocks.
    pub fn copy(path: &Path, to: &Path) -> Result<Generation, StoreError> {
        backup::backup(&db::open_reader(path)?, to)
    }

    /// Puts a backup in the place of the store `path`, which nobody may have open, under a new
    /// incarnation. Blocks. What was there is kept beside it, as `<path>.replaced-<incarnation>`.
    pub fn restore(from: &Path, path: &Path) -> Result<Generation, StoreError> {
        backup::restore(from, path)
    }

    /// Finishes what waits, closes the database and releases the lock, for all clones and watches.
    pub async fn close(self) {
        self.readers.close();
        let (reply, closed) = oneshot::channel();
        if self.commands.send(Command::Close { reply }).await.is_ok() {
            // An error means that another clone closed at the same time.
            let _ = closed.await;
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}
