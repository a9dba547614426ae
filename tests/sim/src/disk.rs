//! A host's journal on a disk with faults. What was synced survives everything. What was only written survives a
//! kill of the agent; a loss of power keeps any prefix of it, down to a torn last entry. A full disk refuses.

use crate::rng::Rng;
use dunlin_machine::Record;
use dunlin_model::MachineId;
use dunlin_model::hash::fnv1a;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Entries as the host writes them, with its framing: length, checksum, JSON.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    Boot { boot: u64 },
    Machine(Box<Record>),
    Forgotten { machine: MachineId },
}

#[derive(Default, Clone)]
pub struct Disk {
    bytes: Vec<u8>,
    synced: usize,
    pub full: bool,
}

/// The disk has no room; nothing was written.
pub struct Full;

impl Disk {
    pub fn append(&mut self, entry: &Entry) -> Result<(), Full> {
        if self.full {
            return Err(Full);
        }
        let json = serde_json::to_vec(entry).expect("an entry is plain data");
        self.bytes.extend((json.len() as u32).to_le_bytes());
        self.bytes.extend(checksum(&json).to_le_bytes());
        self.bytes.extend(json);
        Ok(())
    }

    pub fn sync(&mut self) {
        self.synced = self.bytes.len();
    }

    pub fn lose_power(&mut self, rng: &mut Rng) {
        let unsynced = (self.bytes.len() - self.synced) as u64;
        self.bytes.truncate(self.synced + rng.between(0, unsynced) as usize);
    }

    /// The newest record of each machine and the boot that was noted; cuts off a torn tail.
    pub fn replay(&mut self) -> (BTreeMap<MachineId, Record>, Option<u64>) {
        let (mut records, mut boot) = (BTreeMap::new(), None);
        let mut at = 0;
        while let Some((entry, next)) = self.entry(at) {
            match entry {
                Entry::Boot { boot: noted } => boot = Some(noted),
                Entry::Machine(record) => drop(records.insert(record.assignment.id.clone(), *record)),
                Entry::Forgotten { machine } => drop(records.remove(&machine)),
            }
            at = next;
        }
        self.bytes.truncate(at);
        self.synced = at;
        self.compact(&records, boot);
        (records, boot)
    }

    fn entry(&self, at: usize) -> Option<(Entry, usize)> {
        let length = u32::from_le_bytes(self.bytes.get(at..at + 4)?.try_into().ok()?) as usize;
        let sum = u32::from_le_bytes(self.bytes.get(at + 4..at + 8)?.try_into().ok()?);
        let json = self.bytes.get(at + 8..at + 8 + length)?;
        (checksum(json) == sum).then(|| (serde_json::from_slice(json).expect("what was written is read"), at + 8 + length))
    }

    /// As the host does when little of the file lives: a new file with the newest records.
    fn compact(&mut self, records: &BTreeMap<MachineId, Record>, boot: Option<u64>) {
        let full = std::mem::take(&mut self.full);
        self.bytes.clear();
        let boot = boot.map(|boot| Entry::Boot { boot });
        let records = records.values().map(|record| Entry::Machine(Box::new(record.clone())));
        for entry in boot.into_iter().chain(records) {
            let _ = self.append(&entry); // it is not full here
        }
        self.sync();
        self.full = full;
    }
}

/// Of 64 bits, folded.
fn checksum(bytes: &[u8]) -> u32 {
    let hash = fnv1a(bytes.iter().copied());
    (hash ^ (hash >> 32)) as u32
}
