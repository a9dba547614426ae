//! What is kept on disk for a cold start: who the peers are, the clock, and every log. Checksummed as a whole, verified
//! log by log like everything else, and unconfirmed until a live head or beat covers it.

use crate::beat::Beat;
use crate::catalogue::{Catalogue, Taken};
use crate::fresh::Receipt;
use crate::id::{OriginId, Peer};
use crate::log::Cursor;
use crate::members::MAX_SAVED_PEERS;
use crate::message::{Batch, Fork, More};
use crate::planted::planted;
use crate::wire::{Decoded, Malformed, Reader, Write};
use ed25519_dalek::VerifyingKey;

const MAGIC: &[u8; 16] = b"dunlin gossip 2\n";
const MAX_LOGS: usize = crate::catalogue::MAX_ORIGINS;

pub struct Snapshot {
    pub(crate) clock_ms: u64,
    pub(crate) peers: Vec<Peer>,
    pub(crate) catalogue: Catalogue,
    /// Logs that were in it and could not be verified.
    pub refused: usize,
}

impl Snapshot {
    pub(crate) fn empty(cluster: VerifyingKey) -> Self {
        Self { clock_ms: 0, peers: vec![], catalogue: Catalogue::new(cluster), refused: 0 }
    }

    /// A snapshot whose checksum is wrong, or that cannot be read, is none: start without it.
    pub fn decode(cluster: VerifyingKey, bytes: &[u8]) -> Result<Self, Malformed> {
        let (body, sum) = bytes.split_last_chunk::<32>().ok_or(Malformed { what: "a snapshot" })?;
        if blake3::hash(body).as_bytes() != sum {
            return Err(Malformed { what: "the checksum of a snapshot" });
        }
        let mut reader = Reader::new(body);
        if reader.array::<16>("a snapshot")? != *MAGIC {
            return Err(Malformed { what: "the version of a snapshot" });
        }
        let mut snapshot = Self::empty(cluster);
        snapshot.clock_ms = reader.number("a clock")?;
        snapshot.peers = reader.list(MAX_SAVED_PEERS, "peers", Peer::read)?;
        for id in reader.list(MAX_LOGS, "removed origins", |r| Ok(OriginId(r.array("an origin")?)))? {
            snapshot.catalogue.remove(id);
        }
        reader.list(MAX_LOGS, "logs", |r| snapshot.take_log(r))?;
        for beat in reader.list(MAX_LOGS, "beats", Beat::read)? {
            if let Some(log) = snapshot.catalogue.log_mut(beat.id) {
                log.heard_before(&beat);
            }
        }
        reader.list(MAX_LOGS, "forks", |r| {
            let fork = Fork::read(r)?;
            snapshot.refused += usize::from(snapshot.catalogue.take_fork(fork).is_err());
            Ok(())
        })?;
        Ok(snapshot)
    }

    fn take_log(&mut self, reader: &mut Reader<'_>) -> Decoded<()> {
        // A record of its own: one that cannot be read costs that log, not all of them.
        let record = reader.bytes(usize::MAX, "a log")?;
        let Ok(batch) = Batch::read(&mut Reader::new(record)) else {
            self.refused += 1;
            return Ok(());
        };
        let id = batch.head.is.id;
        match self.catalogue.take(batch, Receipt { now_ms: 0, clock_ms: 0, fetched: true }) {
            Taken::Changed { .. } => {
                let log = self.catalogue.log_mut(id).expect("it was just taken");
                log.fresh.confirmed = planted!(TrustSnapshot);
            }
            _ => self.refused += 1,
        }
        Ok(())
    }
}

pub(crate) fn encode(clock_ms: u64, peers: &[Peer], catalogue: &Catalogue) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.number(clock_ms);
    out.list(peers, |out, peer| peer.write(out));
    out.list(&catalogue.removed().collect::<Vec<_>>(), |out, id| out.extend_from_slice(&id.0));
    let logs: Vec<_> = catalogue.logs().collect();
    out.list(&logs, |out, log| {
        let (rows, _) = log.rows_after(&Cursor::START, usize::MAX);
        let (certificate, head) = (Some(log.certificate.clone()), log.head.clone());
        let mut record = Vec::new();
        Batch { certificate, head, after: Cursor::START, rows, more: More::Last }.write(&mut record);
        out.bytes(&record);
    });
    let beats: Vec<_> = logs.iter().filter_map(|log| log.last_beat()).collect();
    out.list(&beats, |out, beat| beat.write(out));
    // Behind the logs: what was verified before a fork stays readable, and nothing is taken of an epoch that has forked.
    out.list(&catalogue.forks().collect::<Vec<_>>(), |out, fork| fork.write(out));
    let sum = *blake3::hash(&out).as_bytes();
    out.extend_from_slice(&sum);
    out
}
