//! A machine's lock and exit records: what tells a living machine from a dead one, and how it ended.
//!
//! The lock is a POSIX record lock: kept over fork's children, gone with its process, however that
//! ends. It must only be asked about from other processes: closing any descriptor of the file in the
//! holder would drop it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Set aside for a record. Its numbers take some 200 bytes, and a character of its error up to 6.
const EXIT_BYTES: libc::off_t = 8192;
const EXIT_ERROR_MAX: usize = 1024;

/// How an attempt ended; fsynced by the supervisor before it ends itself, kept until acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub attempt: u64,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub oom_killed: bool,
    pub requested_stop: bool,
    pub at_ms: u64,
    /// Why it could not be started at all.
    pub error: Option<String>,
}

/// Takes the machine's lock for this process, or says that another holds it.
pub(crate) fn take_lock(machine_dir: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(machine_dir.join("lock"))?;
    set_lock(&file, libc::F_SETLK)?;
    Ok(file)
}

/// The process that holds the machine's lock: its living supervisor.
pub fn lock_holder(machine_dir: &Path) -> io::Result<Option<i32>> {
    let file = match OpenOptions::new().read(true).write(true).open(machine_dir.join("lock")) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let lock = set_lock(&file, libc::F_GETLK)?;
    Ok((i32::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
}

fn set_lock(file: &File, command: libc::c_int) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `lock` is a valid flock for the call's duration.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}

/// The place of an attempt's exit record, made before the attempt: a disk that fills up meanwhile does not
/// lose how it ended.
pub(crate) struct ExitFile {
    dir: File,
    file: File,
    temporary: PathBuf,
    path: PathBuf,
}

impl ExitFile {
    /// Called by the holder of the machine's lock: what earlier supervisors prepared and did not come to write
    /// is nobody's any more.
    pub fn prepare(machine_dir: &Path, attempt: u64) -> io::Result<Self> {
        let dir = machine_dir.join("exit");
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with('.')) {
                let _ = fs::remove_file(entry.path()); // a few bytes
            }
        }
        let temporary = dir.join(format!(".{attempt}"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        nix::fcntl::posix_fallocate(&file, 0, EXIT_BYTES)?;
        file.sync_all()?;
        let opened = File::open(&dir)?;
        opened.sync_all()?;
        Ok(Self { dir: opened, file, temporary, path: exit_path(machine_dir, attempt) })
    }

    /// There was no attempt.
    pub fn discard(self) -> io::Result<()> {
        fs::remove_file(&self.temporary)
    }

    /// Writes in place, then names it; durable when it returns.
    pub fn write(&mut self, record: &ExitRecord) -> io::Result<()> {
        let error = record.error.as_ref().map(|error| error.chars().take(EXIT_ERROR_MAX).collect());
        let json = serde_json::to_vec(&ExitRecord { error, ..record.clone() })?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&json)?;
        self.file.set_len(json.len() as u64)?;
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.dir.sync_all()
    }
}

/// The record of an attempt; `None` while there is none.
pub fn read_exit(machine_dir: &Path, attempt: u64) -> io::Result<Option<ExitRecord>> {
    match fs::read(exit_path(machine_dir, attempt)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// All records that are kept, the oldest attempt first.
pub fn list_exits(machine_dir: &Path) -> io::Result<Vec<ExitRecord>> {
    let mut records = Vec::new();
    for attempt in attempts_with_exits(machine_dir)? {
        records.extend(read_exit(machine_dir, attempt)?);
    }
    Ok(records)
}

/// Acknowledges the record of an attempt, which has been journalled, and those of all attempts before it: an agent
/// that was killed between the two has left its own behind.
pub fn remove_exits(machine_dir: &Path, up_to: u64) -> io::Result<()> {
    for attempt in attempts_with_exits(machine_dir)?.into_iter().filter(|attempt| *attempt <= up_to) {
        match fs::remove_file(exit_path(machine_dir, attempt)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn attempts_with_exits(machine_dir: &Path) -> io::Result<BTreeSet<u64>> {
    let entries = match fs::read_dir(machine_dir.join("exit")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(e) => return Err(e),
    };
    let mut attempts = BTreeSet::new();
    for entry in entries {
        // Others are halves of records whose supervisor was killed.
        attempts.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(attempts)
}

fn exit_path(machine_dir: &Path, attempt: u64) -> PathBuf {
    machine_dir.join("exit").join(attempt.to_string())
}

pub(crate) fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
