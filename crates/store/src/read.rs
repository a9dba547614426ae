//! Readers: a few connections, each read in one SQLite transaction on a blocking thread.

use crate::db::{meta, open_reader};
use crate::limits::{MAX_PAGE_ROWS, MAX_RANGE_BYTES, check_prefix, prefix_end};
use crate::{Event, Kv, Page, StoreError};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 4;

pub(crate) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Connection>>,
    free: Arc<Semaphore>,
}

impl Readers {
    pub fn new(path: PathBuf) -> Self {
        Self { path, idle: Mutex::default(), free: Arc::new(Semaphore::new(CONNECTIONS)) }
    }

    pub async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.free).acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let readers = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let idle = readers.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let conn = idle.map_or_else(|| open_reader(&readers.path), Ok)?;
            let tx = conn.unchecked_transaction()?;
            let answer = work(&tx);
            drop(tx);
            // A connection that failed is not kept.
            if answer.is_ok() {
                readers.idle.lock().unwrap_or_else(PoisonError::into_inner).push(conn);
            }
            answer
        });
        match task.await {
            Ok(answer) => answer,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(StoreError::Closed), // the runtime is going away
        }
    }

    /// Connections in use are closed when their read ends.
    pub fn close(&self) {
        self.free.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

pub(crate) fn get(conn: &Connection, key: &str) -> Result<Option<Kv>, StoreError> {
    let mut statement = conn.prepare_cached("SELECT key, value, created, modified FROM rows WHERE key = ?1")?;
    Ok(statement.query_row([key], kv).optional()?)
}

/// `at` = `None`: the newest revision.
pub(crate) fn page(
    conn: &Connection,
    prefix: &str,
    from: Option<&str>,
    at: Option<u64>,
    limit: usize,
) -> Result<Page, StoreError> {
    check_prefix(prefix)?;
    let newest = meta(conn, "revision")?;
    let revision = at.unwrap_or(newest);
    check_revision(conn, revision, newest)?;
    let begin = from.filter(|from| *from > prefix).unwrap_or(prefix);
    let end = prefix_end(prefix);
    let mut statement = conn.prepare_cached(if at.is_none() {
        "SELECT key, value, created, modified FROM rows WHERE key >= ?1 AND key < ?2 AND ?3 = ?3 ORDER BY key"
    } else {
        "SELECT h.key, h.value, h.created, h.revision FROM history h
         WHERE h.key >= ?1 AND h.key < ?2 AND h.revision <= ?3 AND h.value IS NOT NULL
           AND NOT EXISTS (SELECT 1 FROM history n WHERE n.key = h.key AND n.revision > h.revision AND n.revision <= ?3)
         ORDER BY h.key"
    })?;
    let mut found = statement.query((begin, &end, revision))?;
    let mut page = Page { rows: Vec::new(), revision, next: None };
    let mut bytes = 0;
    while let Some(row) = found.next()? {
        let row = kv(row)?;
        bytes += row.key.len() + row.value.len();
        if page.rows.len() >= limit || bytes > MAX_RANGE_BYTES {
            page.next = Some(row.key);
            break;
        }
        page.rows.push(row);
    }
    Ok(page)
}

pub(crate) fn range(conn: &Connection, prefix: &str, at: Option<u64>) -> Result<(Vec<Kv>, u64), StoreError> {
    let page = page(conn, prefix, None, at, usize::MAX)?;
    match page.next {
        None => Ok((page.rows, page.revision)),
        Some(_) => Err(StoreError::RangeTooLarge { prefix: prefix.to_owned(), limit: MAX_RANGE_BYTES }),
    }
}

/// In the caller's one SQLite transaction, and so at one revision.
pub(crate) fn ranges(conn: &Connection, prefixes: &[String]) -> Result<(Vec<Vec<Kv>>, u64), StoreError> {
    let mut all = Vec::with_capacity(prefixes.len());
    for prefix in prefixes {
        all.push(range(conn, prefix, None)?.0);
    }
    Ok((all, meta(conn, "revision")?))
}

pub(crate) fn page_limit(limit: usize) -> usize {
    limit.clamp(1, MAX_PAGE_ROWS)
}

/// Whole revisions after `after`, oldest first, until they have `bytes`; and the revision read up to.
pub(crate) fn events(
    conn: &Connection,
    prefix: &str,
    after: u64,
    bytes: usize,
) -> Result<(Vec<Vec<Event>>, u64), StoreError> {
    let newest = meta(conn, "revision")?;
    check_revision(conn, after, newest)?;
    let mut statement = conn.prepare_cached(
        "SELECT key, value, created, revision FROM history INDEXED BY history_revision
         WHERE revision > ?1 AND key >= ?2 AND key < ?3 ORDER BY revision, id",
    )?;
    let mut found = statement.query((after, prefix, prefix_end(prefix)))?;
    let mut batches: Vec<Vec<Event>> = Vec::new();
    let mut last = after;
    let mut read = 0;
    while let Some(row) = found.next()? {
        let revision: u64 = row.get(3)?;
        if revision != last {
            if read >= bytes {
                return Ok((batches, last));
            }
            batches.push(Vec::new());
            last = revision;
        }
        let event = match row.get_ref(1)? {
            ValueRef::Null => Event::Delete { key: row.get(0)?, revision },
            _ => Event::Put(kv(row)?),
        };
        read += event.key().len() + if let Event::Put(row) = &event { row.value.len() } else { 0 };
        if let Some(batch) = batches.last_mut() {
            batch.push(event);
        }
    }
    Ok((batches, newest))
}

fn check_revision(conn: &Connection, asked: u64, newest: u64) -> Result<(), StoreError> {
    if asked > newest {
        return Err(StoreError::Future { asked, newest });
    }
    let oldest = meta(conn, "compacted")?;
    if asked < oldest {
        return Err(StoreError::Compacted { asked, oldest });
    }
    Ok(())
}

fn kv(row: &Row<'_>) -> Result<Kv, rusqlite::Error> {
    Ok(Kv { key: row.get(0)?, value: row.get(1)?, created: row.get(2)?, modified: row.get(3)? })
}
