//! A relay that lies: it alters, mixes, repeats and makes up, with every message that it understands. What it cannot do is
//! sign for others.

use crate::rng::Rng;
use dunlin_gossip::{Batch, Certificate, Cursor, Head, LtHash, Message, More, Recovered, Row, Statement, Subject, Topic};
use ed25519_dalek::SigningKey;

const KEPT: usize = 64;

pub struct Liar {
    /// What passed through, to be told again much later.
    kept: Vec<Vec<u8>>,
    batches: Vec<Batch>,
    /// A key that nobody has certified.
    key: SigningKey,
}

impl Liar {
    pub fn new() -> Self {
        Self { kept: vec![], batches: vec![], key: SigningKey::from_bytes(&[0x66; 32]) }
    }

    /// What is sent instead.
    pub fn lie(&mut self, rng: &mut Rng, bytes: Vec<u8>) -> Vec<u8> {
        self.keep(rng, &bytes);
        if !rng.percent(30) {
            return bytes;
        }
        if rng.percent(30) {
            return rng.pick(&self.kept).unwrap_or(bytes);
        }
        let Ok(Some(message)) = Message::decode(&bytes) else { return bytes };
        let lie = match message {
            Message::Push(batches) => Message::Push(self.alter(rng, batches)),
            Message::Batches(batches) => Message::Batches(self.alter(rng, batches)),
            Message::Entries { realm, buckets, mut entries } => {
                entries.iter_mut().for_each(|entry| entry.seq += rng.below(3));
                Message::Entries { realm, buckets, entries }
            }
            Message::Beats(mut beats) => {
                beats.iter_mut().for_each(|beat| beat.index = (beat.index + 1).min(256));
                Message::Beats(beats)
            }
            Message::Recovered(recovered) => Message::Recovered(Recovered { heads: vec![], ..recovered }),
            other => other,
        };
        let bytes = lie.encode();
        if matches!(lie, Message::Push(_)) && bytes.len() > dunlin_gossip::MAX_DATAGRAM_BYTES { vec![] } else { bytes }
    }

    fn keep(&mut self, rng: &mut Rng, bytes: &[u8]) {
        if self.kept.len() < KEPT {
            self.kept.push(bytes.to_vec());
        } else if rng.percent(5) {
            let at = rng.below(KEPT as u64) as usize;
            self.kept[at] = bytes.to_vec();
        }
        if let Ok(Some(Message::Batches(batches))) = Message::decode(bytes) {
            self.batches.extend(batches.into_iter().filter(|batch| batch.after == Cursor::START).take(4));
            if self.batches.len() > KEPT {
                self.batches.remove(rng.below(KEPT as u64) as usize);
            }
        }
    }

    fn alter(&self, rng: &mut Rng, batches: Vec<Batch>) -> Vec<Batch> {
        let mut altered: Vec<Batch> = batches.into_iter().map(|batch| self.alter_one(rng, batch)).collect();
        if let Some(old) = rng.pick(&self.batches).filter(|_| rng.percent(50)) {
            altered.push(old);
        }
        altered
    }

    fn alter_one(&self, rng: &mut Rng, batch: Batch) -> Batch {
        let mut rows = batch.rows.clone();
        match rng.below(5) {
            // Another value under a key that was written.
            0 => {
                if let Some(at) = (!rows.is_empty()).then(|| rng.below(rows.len() as u64) as usize) {
                    rows[at] = other_value(&rows[at]);
                }
                Batch { rows, ..batch }
            }
            1 => {
                rows.pop();
                Batch { rows, ..batch }
            }
            // Rows of one time under the head of another.
            2 => match rng.pick(&self.batches).filter(|old| old.head.is.id == batch.head.is.id) {
                Some(old) => Batch { rows: old.rows, after: old.after, ..batch },
                None => Batch { after: Cursor::START, ..batch },
            },
            // A head of its own, with a digest that fits, signed with a key that is not the writer's.
            3 => {
                let rows: Vec<Row> = rows.iter().map(other_value).collect();
                let mut lanes = LtHash::default();
                rows.iter().for_each(|row| lanes.add(row.raw()));
                let is = Statement { seq: batch.head.is.seq + 1, digest: lanes.digest(), ..batch.head.is };
                Batch { head: Head::sign(&self.key, is), after: Cursor::START, rows, ..batch }
            }
            // A whole new epoch, certified by nobody.
            _ => match &batch.certificate {
                Some(real) => self.usurp(real, &batch),
                None => batch,
            },
        }
    }

    fn usurp(&self, real: &Certificate, batch: &Batch) -> Batch {
        let subject = Subject {
            name: real.name.clone(),
            epoch: real.epoch + 1,
            key: self.key.verifying_key(),
            region: real.region.clone(),
            scope: real.scope,
        };
        let certificate = Certificate::issue(&self.key, &subject);
        let is = Statement { epoch: subject.epoch, seq: 1, floor: 0, digest: LtHash::default().digest(), ..batch.head.is.clone() };
        let head = Head::sign(&self.key, is);
        Batch { certificate: Some(certificate), head, after: Cursor::START, rows: vec![], more: More::Last }
    }
}

fn other_value(row: &Row) -> Row {
    let topic = Topic::new("lie").expect("short");
    Row::live(row.key().clone(), row.seq(), &topic, b"never written").expect("short")
}
