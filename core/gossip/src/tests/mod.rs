//! What only the inside can show: limits that a stranger cannot reach in a fast test, and what is kept between messages.

mod logs;

use crate::*;
use ed25519_dalek::SigningKey;

pub struct Writer {
    pub certificate: Certificate,
    pub key: SigningKey,
}

pub fn cluster() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

pub fn writer(name: &str, epoch: u32, (region, scope): (&str, Scope)) -> Writer {
    let key = SigningKey::from_bytes(blake3::hash(name.as_bytes()).as_bytes());
    let (name, region) = (Name::new(name).unwrap(), Region::new(region).unwrap());
    let subject = Subject { name, epoch, key: key.verifying_key(), region, scope };
    Writer { certificate: Certificate::issue(&cluster(), &subject), key }
}

pub fn row(key: &str, seq: u64, value: &[u8]) -> Row {
    Row::live(Key::new(key).unwrap(), seq, &Topic::new("shop").unwrap(), value).unwrap()
}

impl Writer {
    pub fn head(&self, seq: u64, rows: &[Row]) -> Head {
        self.head_at(seq, 1_000, rows)
    }

    pub fn head_at(&self, seq: u64, time_ms: u64, rows: &[Row]) -> Head {
        let mut lanes = LtHash::default();
        rows.iter().for_each(|row| lanes.add(row.raw()));
        let chain = (time_ms / CHAIN_MS) as u32;
        let (id, epoch) = (self.certificate.id, self.certificate.epoch);
        let is = Statement { id, epoch, seq, floor: 0, digest: lanes.digest(), schema: 1, time_ms, life: 9, chain, anchor: [0; 16] };
        Head::sign(&self.key, is)
    }

    /// The whole of the log.
    pub fn whole(&self, seq: u64, rows: &[Row]) -> Batch {
        let (certificate, head) = (Some(self.certificate.clone()), self.head(seq, rows));
        Batch { certificate, head, after: Cursor::START, rows: rows.to_vec(), more: More::Last }
    }
}
