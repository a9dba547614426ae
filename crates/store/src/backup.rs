//! Copies of the whole store, and their way back.

use crate::db::{self, connect, damaged, meta, set_meta};
use crate::StoreError;
use dunlin_model::Generation;
use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The store that is replaced cannot say its incarnation. It was restored less often than this since the
/// backup was made, so that hosts take the restored one for newer all the same.
const UNKNOWN_INCARNATIONS: u64 = 1000;

/// One moment of the database behind `conn`, in one file that is complete or not there.
pub(crate) fn backup(conn: &Connection, to: &Path) -> Result<Generation, StoreError> {
    let beside = with_ending(to, ".new");
    let copy = copy(conn, &beside)?;
    let generation = generation(&copy)?;
    finish(copy, &beside)?;
    fs::rename(&beside, to).map_err(failed(to))?;
    sync_folder(to)?;
    Ok(generation)
}

pub(crate) fn restore(from: &Path, path: &Path) -> Result<Generation, StoreError> {
    let _lock = db::lock(path)?;
    if !from.is_file() {
        return Err(failed(from)(std::io::ErrorKind::NotFound.into()));
    }
    let source = connect(from)?;
    db::check(&source, from)?;
    let mut incarnation = meta(&source, "incarnation")?;
    let is_replaced = path.try_exists().map_err(failed(path))?;
    let mut kept_as = with_ending(path, ".replaced-unreadable");
    if is_replaced {
        match incarnation_of(path) {
            Ok(replaced) => {
                incarnation = incarnation.max(replaced);
                kept_as = with_ending(path, &format!(".replaced-{replaced}"));
            }
            Err(error) => {
                tracing::warn!(%error, "the store that is replaced cannot be read");
                incarnation += UNKNOWN_INCARNATIONS;
            }
        }
    }
    let beside = with_ending(path, ".restoring");
    let copy = copy(&source, &beside)?;
    set_meta(&copy, "incarnation", incarnation + 1).map_err(|error| crate::writer::classify(error).0)?;
    let generation = generation(&copy)?;
    finish(copy, &beside)?;
    if is_replaced {
        // A second name first, then the exchange: at no moment is there no store.
        fs::hard_link(path, &kept_as).map_err(failed(&kept_as))?;
        // SQLite would replay the old log over the new file. One that is still here belongs to a
        // database that could not be opened.
        for ending in ["-wal", "-shm"] {
            let log = with_ending(path, ending);
            if log.try_exists().map_err(failed(&log))? {
                fs::rename(&log, with_ending(&kept_as, ending)).map_err(failed(&log))?;
            }
        }
        sync_folder(path)?;
    }
    fs::rename(&beside, path).map_err(failed(path))?;
    sync_folder(path)?;
    Ok(generation)
}

/// Of a store that nobody has open. Its log is in it afterwards, as the last connection closes.
fn incarnation_of(path: &Path) -> Result<u64, StoreError> {
    let conn = connect(path)?;
    db::check(&conn, path)?;
    let incarnation = meta(&conn, "incarnation").map_err(|error| damaged(path, error))?;
    conn.close().map_err(|(_, error)| damaged(path, error))?;
    Ok(incarnation)
}

fn copy(source: &Connection, to: &Path) -> Result<Connection, StoreError> {
    // What an earlier try left behind is nobody's.
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to).map_err(failed(to))?;
    let mut copy = connect(to)?;
    let fails = |error| crate::writer::classify(error).0;
    let step = Backup::new(source, &mut copy).and_then(|backup| backup.step(-1)).map_err(fails)?;
    if step != StepResult::Done {
        return Err(StoreError::Stopped(format!("the copy ended as {step:?}")));
    }
    // One file without a log, for people to carry around.
    copy.pragma_update(None, "journal_mode", "DELETE").map_err(fails)?;
    Ok(copy)
}

fn finish(copy: Connection, path: &Path) -> Result<(), StoreError> {
    copy.close().map_err(|(_, error)| crate::writer::classify(error).0)?;
    File::open(path).and_then(|file| file.sync_all()).map_err(failed(path))
}

fn generation(conn: &Connection) -> Result<Generation, StoreError> {
    Ok(Generation { incarnation: meta(conn, "incarnation")?, revision: meta(conn, "revision")? })
}

fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(folder))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Open { path, source }
}
