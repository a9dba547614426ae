//! The host's journal: the newest record of each machine, on disk before anybody hears of it.
//!
//! One append-only file of framed records: length (4 bytes, little endian), CRC-32 (4), JSON. Space is
//! preallocated, so that a full disk is met when the file grows and not in the middle of a record. A
//! torn tail (a crash during a write) is cut off on open; damage before the tail is an error, because
//! acknowledged records would be lost. When the file has grown far beyond what lives, a new one with
//! only the newest records replaces it.
//!
//! A failed fsync ends the process: what the kernel then has on disk is unknown.

use dunlin_machine::{MAX_EVENTS, Record};
use dunlin_model::MachineId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const HEADER_BYTES: usize = 8;
/// Larger than any record: a length beyond it is damage.
const MAX_RECORD_BYTES: usize = 4 << 20;
/// Preallocated at a time.
const GROW_BYTES: u64 = 1 << 20;
/// Rewritten when it is larger than this and less than a quarter of it lives.
const COMPACT_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    /// Written first: the boot in which the records below were made.
    Boot { boot_id: String },
    Machine(Box<Record>),
    Forgotten { machine: MachineId },
    Reserved { machine: MachineId, reservation: Reservation },
}

/// What was promised to a machine that will be assigned, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    pub memory_mb: u32,
    /// That it shares with nobody.
    pub cores: u32,
    pub until_ms: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("the disk is full: the journal {0} cannot grow")]
    Full(PathBuf),
    #[error("the journal {path} is damaged at byte {offset}; restore it from a backup, or move it away to start without machines")]
    Damaged { path: PathBuf, offset: u64 },
    #[error("the journal {path} cannot be used")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What the journal held when it was opened.
pub struct Replayed {
    pub machines: BTreeMap<MachineId, Record>,
    /// Whether the host was booted since.
    pub rebooted: bool,
}

pub struct Journal {
    path: PathBuf,
    file: File,
    /// End of the records.
    end: u64,
    allocated: u64,
    live: BTreeMap<MachineId, Record>,
    reserved: BTreeMap<MachineId, Reservation>,
    boot_id: String,
    boot_is_recorded: bool,
}

impl Journal {
    /// Opens or makes it and replays it.
    pub fn open(path: &Path, boot_id: &str) -> Result<(Self, Replayed), JournalError> {
        let io_error = |source| JournalError::Io { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error)?;
        }
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io_error(e)),
        };
        let (entries, end) = parse(&bytes).map_err(|offset| JournalError::Damaged { path: path.to_owned(), offset })?;
        let (mut live, mut reserved) = (BTreeMap::new(), BTreeMap::new());
        let mut recorded_boot = None;
        for entry in entries {
            match entry {
                Entry::Boot { boot_id } => recorded_boot = Some(boot_id),
                Entry::Machine(record) => replay(&mut live, *record),
                Entry::Forgotten { machine } => drop(live.remove(&machine)),
                Entry::Reserved { machine, reservation } => drop(reserved.insert(machine, reservation)),
            }
        }
        let file = open_file(path).map_err(io_error)?;
        // A torn tail goes, so that nothing of it is ever read behind a shorter record.
        if bytes[end as usize..].iter().any(|byte| *byte != 0) {
            file.set_len(end).and_then(|()| file.sync_all()).map_err(io_error)?;
        }
        sync_parent(path).map_err(io_error)?;
        let allocated = file.metadata().map_err(io_error)?.len();
        let rebooted = recorded_boot.as_deref().is_some_and(|recorded| recorded != boot_id);
        let boot_is_recorded = recorded_boot.as_deref() == Some(boot_id);
        let journal = Self {
            path: path.to_owned(),
            file,
            end,
            allocated,
            live: live.clone(),
            reserved,
            boot_id: boot_id.to_owned(),
            boot_is_recorded,
        };
        Ok((journal, Replayed { machines: live, rebooted }))
    }

    /// Recovery is over: a crash from now on is none of the boot's. Before it is called, a next start
    /// would find that the host was booted, as this one did.
    pub fn mark_boot(&mut self) -> Result<(), JournalError> {
        if !self.boot_is_recorded {
            self.append(&Entry::Boot { boot_id: self.boot_id.clone() })?;
            self.boot_is_recorded = true;
        }
        Ok(())
    }

    /// Durable when it returns.
    pub fn write(&mut self, record: &Record) -> Result<(), JournalError> {
        let mut news = record.clone();
        let written = self.live.get(&record.assignment.id).map_or(0, |live| live.last_event);
        news.events.retain(|event| event.id > written);
        self.append(&Entry::Machine(Box::new(news)))?;
        self.live.insert(record.assignment.id.clone(), record.clone());
        self.compact_if_large();
        Ok(())
    }

    pub fn forget(&mut self, machine: &MachineId) -> Result<(), JournalError> {
        self.append(&Entry::Forgotten { machine: machine.clone() })?;
        self.live.remove(machine);
        Ok(())
    }

    /// Durable when it returns; a later one for the same machine replaces it.
    pub fn reserve(&mut self, machine: MachineId, reservation: Reservation) -> Result<(), JournalError> {
        self.append(&Entry::Reserved { machine: machine.clone(), reservation })?;
        self.reserved.insert(machine, reservation);
        self.compact_if_large();
        Ok(())
    }

    pub fn reserved(&self) -> &BTreeMap<MachineId, Reservation> {
        &self.reserved
    }

    /// Needs no write: what a replay finds expired is dropped again.
    pub fn drop_expired(&mut self, now_ms: u64) {
        self.reserved.retain(|_, reservation| reservation.until_ms > now_ms);
    }

    fn append(&mut self, entry: &Entry) -> Result<(), JournalError> {
        let frame = frame(entry);
        let end = self.end + frame.len() as u64;
        if end > self.allocated {
            self.grow(end)?;
        }
        let written = self.file.seek(SeekFrom::Start(self.end)).and_then(|_| self.file.write_all(&frame));
        if let Err(source) = written {
            if source.raw_os_error() == Some(nix::libc::ENOSPC) {
                return Err(JournalError::Full(self.path.clone()));
            }
            return Err(JournalError::Io { path: self.path.clone(), source });
        }
        if let Err(error) = self.file.sync_data() {
            tracing::error!(path = %self.path.display(), %error, "the journal cannot be synced; ending, because what is on disk is unknown");
            std::process::abort();
        }
        self.end = end;
        Ok(())
    }

    fn grow(&mut self, needed: u64) -> Result<(), JournalError> {
        let allocated = needed.next_multiple_of(GROW_BYTES);
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&self.file, flags, 0, allocated) {
            Ok(()) => {
                self.allocated = allocated;
                Ok(())
            }
            Err(rustix::io::Errno::NOSPC) => Err(JournalError::Full(self.path.clone())),
            // A file system without preallocation: a full disk is then met by the write itself.
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(JournalError::Io { path: self.path.clone(), source: e.into() }),
        }
    }

    /// A failure leaves the old file as it is; the next write tries again.
    fn compact_if_large(&mut self) {
        if self.end < COMPACT_BYTES || !self.boot_is_recorded {
            return;
        }
        let mut bytes = frame(&Entry::Boot { boot_id: self.boot_id.clone() });
        for record in self.live.values() {
            bytes.extend(frame(&Entry::Machine(Box::new(record.clone()))));
        }
        for (machine, reservation) in &self.reserved {
            bytes.extend(frame(&Entry::Reserved { machine: machine.clone(), reservation: *reservation }));
        }
        if bytes.len() as u64 * 4 > self.end {
            return;
        }
        let temporary = self.path.with_extension("new");
        let replaced = || -> io::Result<File> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)?;
            sync_parent(&self.path)?;
            open_file(&self.path)
        };
        match replaced() {
            Ok(file) => {
                self.file = file;
                self.end = bytes.len() as u64;
                self.allocated = self.end;
            }
            Err(error) => tracing::warn!(%error, "the journal could not be compacted; it goes on growing"),
        }
    }
}

/// An entry has the events since the one before it.
fn replay(live: &mut BTreeMap<MachineId, Record>, mut record: Record) {
    let id = record.assignment.id.clone();
    if let Some(before) = live.remove(&id) {
        let mut events = before.events;
        let last = events.back().map_or(0, |event| event.id);
        events.extend(record.events.into_iter().filter(|event| event.id > last));
        events.drain(..events.len().saturating_sub(MAX_EVENTS));
        record.events = events;
    }
    live.insert(id, record);
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn frame(entry: &Entry) -> Vec<u8> {
    let json = serde_json::to_vec(entry).expect("a record is plain data");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + json.len());
    bytes.extend((json.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(&json).to_le_bytes());
    bytes.extend(json);
    bytes
}

/// Entries and where they end; the offset of damage that is not a torn tail.
fn parse(bytes: &[u8]) -> Result<(Vec<Entry>, u64), u64> {
    let mut entries = Vec::new();
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + HEADER_BYTES) {
        let length = u32::from_le_bytes(header[..4].try_into().expect("4 bytes")) as usize;
        let crc = u32::from_le_bytes(header[4..].try_into().expect("4 bytes"));
        if length == 0 {
            break; // preallocated space
        }
        let body = bytes.get(at + HEADER_BYTES..at + HEADER_BYTES + length);
        match body {
            Some(json) if length <= MAX_RECORD_BYTES && crc32fast::hash(json) == crc => {
                entries.push(serde_json::from_slice(json).map_err(|_| at as u64)?);
                at += HEADER_BYTES + length;
            }
            _ if is_torn_tail(bytes, at) => break,
            _ => return Err(at as u64),
        }
    }
    Ok((entries, at as u64))
}

/// The last write may be half there; nothing valid may follow it.
fn is_torn_tail(bytes: &[u8], from: usize) -> bool {
    !(from + 1..bytes.len().saturating_sub(HEADER_BYTES)).any(|at| {
        let length = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")) as usize;
        let crc = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().expect("4 bytes"));
        (1..=MAX_RECORD_BYTES).contains(&length)
            && bytes.get(at + HEADER_BYTES) == Some(&b'{')
            && bytes.get(at + HEADER_BYTES..at + HEADER_BYTES + length).is_some_and(|json| crc32fast::hash(json) == crc)
    })
}

/// The kernel's id of this boot.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_machine::Machine;
    use dunlin_view::MachineAssignment;

    fn record(n: u8, sequence: u64) -> Record {
        let json = serde_json::json!({
            "id": format!("{n:02x}000000000000"), "name": "x", "host": "h1", "region": "local", "address": "10.0.0.1",
            "placement": {"incarnation": 1, "revision": 1}, "created_at_ms": 0,
            "spec": {
                "version": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "org": "personal", "app": "web", "process_group": "app",
                "release": 1, "image": {"repository": "web", "digest": "sha256:00"},
                "guest": {"cpu_kind": "shared", "cpus": 1, "memory_mb": 256}
            }
        });
        let assignment: MachineAssignment = serde_json::from_value(json).unwrap();
        let mut record = Machine::assigned(assignment, 1_000_000, 0).0.record().clone();
        record.sequence = sequence;
        record
    }

    #[test]
    fn the_newest_record_of_each_machine_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, _) = Journal::open(&path, "boot-1").unwrap();
        for sequence in 1..=5 {
            journal.write(&record(1, sequence)).unwrap();
            journal.write(&record(2, sequence)).unwrap();
        }
        journal.forget(&record(2, 0).assignment.id).unwrap();
        let (_, replayed) = Journal::open(&path, "boot-1").unwrap();
        assert_eq!(replayed.machines.values().map(|r| r.sequence).collect::<Vec<_>>(), [5]);
        let events = replayed.machines.values().map(|record| record.events.iter().map(|event| event.id).collect::<Vec<_>>());
        assert_eq!(events.collect::<Vec<_>>(), [[1]], "its launch, once");
        assert!(!replayed.rebooted);
        assert!(!Journal::open(&path, "boot-2").unwrap().1.rebooted, "no boot was recorded yet");
        journal.mark_boot().unwrap();
        assert!(Journal::open(&path, "boot-2").unwrap().1.rebooted);
        let (mut journal, replayed) = Journal::open(&path, "boot-2").unwrap();
        assert!(replayed.rebooted, "until the recovery is over");
        journal.mark_boot().unwrap();
        assert!(!Journal::open(&path, "boot-2").unwrap().1.rebooted);
    }

    #[test]
    fn promises_survive_a_restart_and_a_compaction() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let id = |n| record(n, 0).assignment.id;
        let promise = |until_ms| Reservation { memory_mb: 256, cores: 1, until_ms };
        let (mut journal, _) = Journal::open(&path, "b").unwrap();
        journal.mark_boot().unwrap();
        journal.reserve(id(1), promise(10)).unwrap();
        journal.reserve(id(2), promise(10)).unwrap();
        journal.reserve(id(2), promise(30)).unwrap();
        let (mut journal, _) = Journal::open(&path, "b").unwrap();
        journal.drop_expired(20);
        assert_eq!(journal.reserved(), &BTreeMap::from([(id(2), promise(30))]));
        let large = Record { problem: Some("x".repeat(COMPACT_BYTES as usize / 8)), ..record(3, 1) };
        (0..9).for_each(|_| journal.write(&large).unwrap());
        assert!(journal.end < COMPACT_BYTES / 2, "it was replaced by a short one");
        let (journal, replayed) = Journal::open(&path, "b").unwrap();
        assert_eq!(journal.reserved(), &BTreeMap::from([(id(2), promise(30))]));
        assert_eq!(replayed.machines.len(), 1);
    }

    #[test]
    fn a_file_cut_anywhere_gives_a_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, _) = Journal::open(&path, "b").unwrap();
        for sequence in 1..=3 {
            journal.write(&record(1, sequence)).unwrap();
        }
        let end = journal.end as usize;
        let whole = fs::read(&path).unwrap();
        let mut last = 0;
        for cut in 0..=end {
            fs::write(&path, &whole[..cut]).unwrap();
            let (journal, replayed) = Journal::open(&path, "b").unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), journal.end, "the torn tail is cut off");
            let sequence = replayed.machines.values().next().map_or(0, |r| r.sequence);
            assert!(sequence >= last, "byte {cut}");
            last = sequence;
        }
        assert_eq!(last, 3);
    }

    #[test]
    fn damage_in_the_middle_is_not_taken_for_a_torn_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (mut journal, _) = Journal::open(&path, "b").unwrap();
        let first = journal.end as usize;
        for sequence in 1..=3 {
            journal.write(&record(1, sequence)).unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        bytes[first + 40] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(Journal::open(&path, "b"), Err(JournalError::Damaged { .. })));
    }
}
