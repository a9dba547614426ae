//! A relay that lies: it alters, mixes, repeats and makes up, with every message but those of membership, whose protocol
//! believes its members. What it cannot do is
//! sign for others.

use crate::rng::Rng;
use dunlin_gossip::{Beat, Batch, Certificate, Cursor, Entry, Head, LtHash, Message, More, OriginId, Recovered, Row, Statement, Subject, Topic, Wanted};
use ed25519_dalek::SigningKey;

const KEPT: usize = 64;

pub struct Liar {
    /// What passed through, to be told again much later.
    kept: Vec<Vec<u8>>,
    batches: Vec<Batch>,
    /// Signs of life, to be shown when they are not true any more.
    beats: Vec<Beat>,
    pub rests: bool,
    /// A key that nobody has certified.
    key: SigningKey,
}

impl Liar {
    pub fn new() -> Self {
        Self { kept: vec![], batches: vec![], beats: vec![], rests: false, key: SigningKey::from_bytes(&[0x66; 32]) }
    }

    /// What is sent instead.
    pub fn lie(&mut self, rng: &mut Rng, bytes: Vec<u8>) -> Vec<u8> {
        self.keep(rng, &bytes);
        if self.rests || !rng.percent(30) {
            return bytes;
        }
        if rng.percent(30) {
            return rng.pick(&self.kept).unwrap_or(bytes);
        }
        let Ok(Some(message)) = Message::decode(&bytes) else { return bytes };
        let lie = match message {
            Message::Push(batches) => Message::Push(self.alter(rng, batches)),
            Message::Batches(batches) => Message::Batches(self.alter(rng, batches)),
            Message::Entries { realm, buckets, entries } => Message::Entries { realm, buckets, entries: claim(rng, entries) },
            Message::Beats(beats) => Message::Beats(self.other_beats(rng, beats)),
            Message::Heard(beats) => Message::Heard(self.other_beats(rng, beats)),
            Message::Sync { mut roots, beats } => {
                for root in &mut roots {
                    root.root ^= rng.draw();
                    root.recent = claim(rng, std::mem::take(&mut root.recent));
                    root.recent.truncate(12);
                }
                Message::Sync { roots, beats: self.other_beats(rng, beats) }
            }
            Message::Subscribe { topic, entries } => Message::Subscribe { topic, entries: claim(rng, entries) },
            Message::Want(mut wanted) => {
                for wanted in &mut wanted {
                    wanted.after.seq = wanted.after.seq.wrapping_add(rng.below(3)).wrapping_sub(1);
                }
                wanted.push(Wanted { id: OriginId(rng.draw().to_le_bytes()), epoch: 1, after: Cursor::START });
                Message::Want(wanted)
            }
            Message::Recover { of, nonce, mut origins } => {
                origins.push(OriginId(rng.draw().to_le_bytes()));
                Message::Recover { of, nonce, origins }
            }
            // Two heads that do not contradict each other, or of which one is not signed.
            Message::Fork(mut fork) => {
                let is = Statement { seq: fork.heads[0].is.seq, digest: [0x66; 32], ..fork.heads[1].is.clone() };
                fork.heads[1] = if rng.percent(50) { fork.heads[0].clone() } else { Head::sign(&self.key, is) };
                Message::Fork(fork)
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
        if let Ok(Some(Message::Beats(beats))) = Message::decode(bytes) {
            self.beats.extend(beats);
            let surplus = self.beats.len().saturating_sub(KEPT * 8);
            self.beats.drain(..surplus);
        }
        if let Ok(Some(Message::Batches(batches))) = Message::decode(bytes) {
            self.batches.extend(batches.into_iter().filter(|batch| batch.after == Cursor::START).take(4));
            if self.batches.len() > KEPT {
                self.batches.remove(rng.below(KEPT as u64) as usize);
            }
        }
    }

    /// What was revealed before, or what could not have been revealed yet.
    fn other_beats(&self, rng: &mut Rng, mut beats: Vec<Beat>) -> Vec<Beat> {
        let kept = |rng: &mut Rng| rng.pick(&self.beats).filter(|_| rng.percent(50));
        for beat in &mut beats {
            *beat = kept(rng).unwrap_or(Beat { index: (beat.index + 1).min(256), ..*beat });
        }
        beats
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
        match rng.below(6) {
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
            // The rest of it never comes, or is to be asked for.
            4 => Batch { more: if rng.percent(50) { More::Follows } else { More::Ask }, ..batch },
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

/// More than there is, of those that there are and of one that nobody knows.
fn claim(rng: &mut Rng, mut entries: Vec<Entry>) -> Vec<Entry> {
    entries.iter_mut().for_each(|entry| entry.seq += rng.below(3));
    let made_up = Entry { id: OriginId(rng.draw().to_le_bytes()), epoch: 1, forked: rng.percent(20), seq: rng.draw() >> 8, chain: 9, tag: 0 };
    entries.insert(rng.below(entries.len() as u64 + 1) as usize, made_up);
    entries
}

fn other_value(row: &Row) -> Row {
    let topic = Topic::new("lie").expect("short");
    Row::live(row.key_of_its_own(), row.seq(), &topic, b"never written").expect("short")
}
