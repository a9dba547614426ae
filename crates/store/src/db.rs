//! The database file: lock, schema, checks at opening.

use crate::StoreError;
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// "dunl", so that nobody opens another database by mistake.
const APPLICATION_ID: i64 = 0x6475_6e6c;
const FORMAT: i64 = 1;
/// Readers never block the writer in WAL mode, except while the log is being reset.
const BUSY: Duration = Duration::from_secs(10);
/// A holder that was just killed may have forked a child that has not yet become another program.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(10);
const STATEMENTS_CACHED: usize = 32;

const SCHEMA: &str = "
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO meta VALUES ('incarnation', 1), ('revision', 0), ('compacted', 0);
    CREATE TABLE rows (key TEXT PRIMARY KEY, value BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL);
    CREATE TABLE history (
        id INTEGER PRIMARY KEY, revision INTEGER NOT NULL, key TEXT NOT NULL, created INTEGER NOT NULL, value BLOB
    );
    CREATE UNIQUE INDEX history_key ON history (key, revision);
    CREATE INDEX history_revision ON history (revision);
";

/// Held by the process that may write.
pub(crate) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread just forked shares the lock until it execs.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(%error, "the lock of the store is released only when the process ends");
        }
    }
}

pub(crate) fn lock(path: &Path) -> Result<Lock, StoreError> {
    let open = |source| StoreError::Open { path: path.to_owned(), source };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(PathBuf::from(name)).map_err(open)?;
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < patience => std::thread::sleep(LOCK_RETRY),
            Err(TryLockError::WouldBlock) => {
                // Only for the message; whoever holds the lock may not have written its pid yet.
                let mut text = String::new();
                let holder = file.take(16).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(StoreError::Locked { path: path.to_owned(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(open(source)),
        }
    }
    file.set_len(0).map_err(open)?;
    file.rewind().map_err(open)?;
    // A full disk must not keep the store from being read.
    if let Err(error) = writeln!(file, "{}", std::process::id()) {
        tracing::debug!(%error, "the lock file does not name its holder");
    }
    Ok(Lock { file })
}

/// The writer's connection, with the schema in place.
pub(crate) fn open_writer(path: &Path) -> Result<Connection, StoreError> {
    let open = |source| StoreError::Open { path: path.to_owned(), source };
    // Made here, as SQLite would make it readable for everybody; its log and index take the same mode.
    let is_new = !path.exists();
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(open)?;
    let conn = connect(path)?;
    let damaged = |error: rusqlite::Error| damaged(path, error);
    conn.pragma_update(None, "journal_mode", "WAL").map_err(damaged)?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    let mode: String = conn.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    if mode != "wal" {
        return Err(StoreError::Damaged { path: path.to_owned(), what: format!("its journal mode stays {mode}") });
    }
    migrate(&conn, path)?;
    let check: String = conn.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(damaged)?;
    if check != "ok" {
        return Err(StoreError::Damaged { path: path.to_owned(), what: check });
    }
    if is_new {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(open)?;
    }
    Ok(conn)
}

pub(crate) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let conn = connect(path)?;
    conn.pragma_update(None, "query_only", true)?;
    Ok(conn)
}

pub(crate) fn connect(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(BUSY)?;
    conn.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
    conn.pragma_update(None, "temp_store", "MEMORY")?;
    Ok(conn)
}

fn migrate(conn: &Connection, path: &Path) -> Result<(), StoreError> {
    let pragma = |name| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(|e| damaged(path, e));
    let application = pragma("application_id")?;
    let found = pragma("user_version")?;
    let table: Option<String> = conn
        .query_row("SELECT name FROM sqlite_schema LIMIT 1", [], |row| row.get(0))
        .optional()
        .map_err(|e| damaged(path, e))?;
    if application == 0 && table.is_none() {
        let script = format!(
            "BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;"
        );
        conn.execute_batch(&script).map_err(|error| crate::writer::classify(error).0)?;
        return Ok(());
    }
    is_ours(application, found, path)
}

fn is_ours(application: i64, found: i64, path: &Path) -> Result<(), StoreError> {
    if application != APPLICATION_ID {
        return Err(StoreError::Damaged { path: path.to_owned(), what: "it is the database of another program".into() });
    }
    if found > FORMAT {
        return Err(StoreError::NewerFormat { path: path.to_owned(), found, known: FORMAT });
    }
    Ok(())
}

/// That it is a whole store of ours; makes and changes nothing.
pub(crate) fn check(conn: &Connection, path: &Path) -> Result<(), StoreError> {
    let pragma = |name| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(|e| damaged(path, e));
    is_ours(pragma("application_id")?, pragma("user_version")?, path)?;
    let found: String = conn.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(|e| damaged(path, e))?;
    if found != "ok" {
        return Err(StoreError::Damaged { path: path.to_owned(), what: found });
    }
    Ok(())
}

pub(crate) fn damaged(path: &Path, error: rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => {
            StoreError::Damaged { path: path.to_owned(), what: error.to_string() }
        }
        _ => crate::writer::classify(error).0,
    }
}

pub(crate) fn meta(conn: &Connection, name: &str) -> Result<u64, rusqlite::Error> {
    conn.prepare_cached("SELECT value FROM meta WHERE name = ?1")?.query_row([name], |row| row.get(0))
}

pub(crate) fn set_meta(conn: &Connection, name: &str, value: u64) -> Result<(), rusqlite::Error> {
    conn.prepare_cached("UPDATE meta SET value = ?2 WHERE name = ?1")?.execute((name, value))?;
    Ok(())
}
