//! The one thread that writes, with group commit.
//!
//! Everything that waits is applied in one SQLite transaction, each request with a revision of its own,
//! and all are answered after the commit: a wait for the disk serves many writers.

use crate::db::{Lock, meta, set_meta};
use crate::limits::HISTORY_REVISIONS;
use crate::{Compare, Op, StoreError};
use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait; more wait at their sender.
pub(crate) const QUEUE: usize = 256;
const GROUP: usize = 64;
/// The history is trimmed once it is this much longer than it needs to be.
const TRIM_EVERY: u64 = 1000;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

pub(crate) struct TxnRequest {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
    pub reply: Reply<Option<u64>>,
}

pub(crate) enum Command {
    Txn(TxnRequest),
    Compact { before: u64, reply: Reply<()> },
    RaiseIncarnation { reply: Reply<u64> },
    Close { reply: oneshot::Sender<()> },
}

pub(crate) struct Writer {
    pub conn: Connection,
    /// Released after the connection is closed.
    pub lock: Lock,
    pub revision: u64,
    pub compacted: u64,
    pub revisions: watch::Sender<u64>,
    pub incarnation: std::sync::Arc<std::sync::atomic::AtomicU64>,
    /// Set by a failed write after which nobody knows what is on the disk.
    pub stopped: Option<String>,
}

impl Writer {
    pub fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut closed = None;
        while let Some(command) = commands.blocking_recv() {
            let mut group = Vec::new();
            let mut next = Some(command);
            let mut after = None;
            while let Some(command) = next.take() {
                match command {
                    Command::Txn(request) => group.push(request),
                    other => after = Some(other),
                }
                if after.is_none() && group.len() < GROUP {
                    next = commands.try_recv().ok();
                }
            }
            if !group.is_empty() {
                self.commit(group);
            }
            match after {
                Some(Command::Compact { before, reply }) => answer(reply, self.compact(before)),
                Some(Command::RaiseIncarnation { reply }) => answer(reply, self.raise_incarnation()),
                Some(Command::Close { reply }) => {
                    closed = Some(reply);
                    break;
                }
                Some(Command::Txn(_)) | None => {}
            }
            self.trim();
        }
        let Self { conn, lock, revisions, .. } = self;
        drop(commands);
        if let Err((_, error)) = conn.close() {
            tracing::warn!(%error, "the store did not close well; its log is replayed at the next start");
        }
        drop(lock);
        drop(revisions);
        if let Some(reply) = closed {
            // Whoever closed may have gone away.
            let _ = reply.send(());
        }
    }

    fn commit(&mut self, mut group: Vec<TxnRequest>) {
        if let Some(why) = &self.stopped {
            for request in group {
                answer(request.reply, Err(StoreError::Stopped(why.clone())));
            }
            return;
        }
        match self.apply(&group) {
            Ok((answers, revision)) => {
                if revision != self.revision {
                    self.revision = revision;
                    self.revisions.send_replace(revision);
                }
                for (request, revision) in group.into_iter().zip(answers) {
                    answer(request.reply, Ok(revision));
                }
            }
            Err(error) => {
                let (error, stops) = classify(error);
                // A request too large for what is left of the disk must not fail its neighbours.
                if matches!(error, StoreError::Full) && group.len() > 1 {
                    for request in group {
                        self.commit(vec![request]);
                    }
                    return;
                }
                let text = error.to_string();
                if stops {
                    self.stop(&error);
                }
                let is_full = matches!(error, StoreError::Full);
                let last = group.pop();
                for request in group {
                    answer(request.reply, Err(if is_full { StoreError::Full } else { StoreError::Stopped(text.clone()) }));
                }
                if let Some(request) = last {
                    answer(request.reply, Err(error));
                }
            }
        }
    }

    /// Answers and the revision after all, or nothing has happened.
    fn apply(&mut self, group: &[TxnRequest]) -> Result<(Vec<Option<u64>>, u64), rusqlite::Error> {
        let tx = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut revision = self.revision;
        let mut answers = Vec::with_capacity(group.len());
        for request in group {
            if !holds(&tx, &request.compare)? {
                answers.push(None);
                continue;
            }
            let mut changed = false;
            for op in &request.then {
                changed |= write(&tx, op, revision + 1)?;
            }
            revision += u64::from(changed);
            answers.push(Some(revision));
        }
        if revision != self.revision {
            set_meta(&tx, "revision", revision)?;
            tx.commit()?;
        }
        Ok((answers, revision))
    }

    fn compact(&mut self, before: u64) -> Result<(), StoreError> {
        if before > self.revision {
            return Err(StoreError::Future { asked: before, newest: self.revision });
        }
        if before <= self.compacted {
            return Ok(());
        }
        self.alone(|tx| {
            // What a newer version, itself not newer than `before`, has replaced; then what was deleted.
            tx.execute(
                "DELETE FROM history WHERE revision < ?1 AND EXISTS (SELECT 1 FROM history n
                 WHERE n.key = history.key AND n.revision > history.revision AND n.revision <= ?1)",
                [before],
            )?;
            tx.execute("DELETE FROM history WHERE revision <= ?1 AND value IS NULL", [before])?;
            set_meta(tx, "compacted", before)
        })?;
        self.compacted = before;
        Ok(())
    }

    fn raise_incarnation(&mut self) -> Result<u64, StoreError> {
        let raised = self.alone(|tx| {
            let raised = meta(tx, "incarnation")? + 1;
            set_meta(tx, "incarnation", raised)?;
            Ok(raised)
        })?;
        self.incarnation.store(raised, std::sync::atomic::Ordering::Release);
        Ok(raised)
    }

    fn trim(&mut self) {
        let keep_from = self.revision.saturating_sub(HISTORY_REVISIONS);
        if self.stopped.is_none()
            && keep_from >= self.compacted + TRIM_EVERY
            && let Err(error) = self.compact(keep_from)
        {
            tracing::warn!(%error, "the history of the store is not trimmed and grows on");
        }
    }

    fn alone<T>(&mut self, work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>) -> Result<T, StoreError> {
        if let Some(why) = &self.stopped {
            return Err(StoreError::Stopped(why.clone()));
        }
        let done = self.conn.transaction_with_behavior(TransactionBehavior::Immediate).and_then(|tx| {
            let value = work(&tx)?;
            tx.commit()?;
            Ok(value)
        });
        done.map_err(|error| {
            let (error, stops) = classify(error);
            if stops {
                self.stop(&error);
            }
            error
        })
    }

    fn stop(&mut self, error: &StoreError) {
        tracing::error!(%error, "a write failed and the store takes no more: check the disk, then restart");
        self.stopped = Some(error.to_string());
    }
}

fn holds(conn: &Connection, compare: &[Compare]) -> Result<bool, rusqlite::Error> {
    for compare in compare {
        let modified = version(conn, compare.key())?.map(|(_, modified)| modified);
        let holds = match compare {
            Compare::Absent(_) => modified.is_none(),
            Compare::Exists(_) => modified.is_some(),
            Compare::Modified(_, revision) => modified == Some(*revision),
        };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

/// (created, modified)
fn version(conn: &Connection, key: &str) -> Result<Option<(u64, u64)>, rusqlite::Error> {
    conn.prepare_cached("SELECT created, modified FROM rows WHERE key = ?1")?
        .query_row([key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

/// Whether anything changed.
fn write(conn: &Connection, op: &Op, revision: u64) -> Result<bool, rusqlite::Error> {
    let before = version(conn, op.key())?;
    let mut record =
        conn.prepare_cached("INSERT INTO history (revision, key, created, value) VALUES (?1, ?2, ?3, ?4)")?;
    match (op, before) {
        (Op::Put(key, value), before) => {
            let created = before.map_or(revision, |(created, _)| created);
            conn.prepare_cached(
                "INSERT INTO rows (key, value, created, modified) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value, modified = excluded.modified",
            )?
            .execute((key, value, created, revision))?;
            record.execute((revision, key, created, Some(value)))?;
        }
        (Op::Delete(_), None) => return Ok(false),
        (Op::Delete(key), Some((created, _))) => {
            conn.prepare_cached("DELETE FROM rows WHERE key = ?1")?.execute([key])?;
            record.execute((revision, key, created, None::<&[u8]>))?;
        }
    }
    Ok(true)
}

/// The error for the caller, and whether the store must stop.
pub(crate) fn classify(error: rusqlite::Error) -> (StoreError, bool) {
    let extended = error.sqlite_error().map(|e| e.extended_code);
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => (StoreError::Full, false),
        // The index of the log could not grow.
        Some(ErrorCode::SystemIoFailure) if extended == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE) => {
            (StoreError::Full, false)
        }
        Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            (StoreError::Stopped(error.to_string()), true)
        }
        _ => (StoreError::Sql(error), false),
    }
}

fn answer<T>(reply: Reply<T>, value: Result<T, StoreError>) {
    // Whoever asked may have gone away; the write stands all the same.
    let _ = reply.send(value);
}
