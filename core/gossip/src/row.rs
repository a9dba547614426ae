//! A row as its writer made it. The raw bytes are kept, hashed and relayed; fields that this version does not know
//! stay in them.
//!
//! The envelope (key, sequence, flags) never changes. The body behind it may grow: topic, value, then anything.

use crate::id::{Key, MAX_KEY_BYTES, Topic};
use crate::wire::{Decoded, Malformed, Reader, Write, number_length};
use std::fmt;
use std::sync::Arc;

pub const MAX_VALUE_BYTES: usize = 4096;
/// Envelope, topic, value, and room for fields to come.
pub const MAX_ROW_BYTES: usize = MAX_VALUE_BYTES + 1024;

/// The row says that its key is gone.
const DEAD: u64 = 1;

/// There may be a hundred thousand, so it is its bytes alone; a clone is the same row.
#[derive(Clone, PartialEq, Eq)]
pub struct Row {
    raw: Arc<[u8]>,
}

/// What readers are shown of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body<'a> {
    pub topic: &'a [u8],
    pub value: &'a [u8],
}

impl Row {
    pub fn live(key: Key, seq: u64, topic: &Topic, value: &[u8]) -> Result<Self, Malformed> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(Malformed { what: "the value of a row" });
        }
        let mut raw = envelope(&key, seq, 0);
        topic.write(&mut raw);
        raw.bytes(value);
        Ok(Self { raw: raw.into() })
    }

    pub fn tombstone(key: Key, seq: u64) -> Self {
        Self { raw: envelope(&key, seq, DEAD).into() }
    }

    /// Asked for at each comparison, so what is behind it is not read: its length is one number, of at most two bytes.
    pub fn key(&self) -> &[u8] {
        let (begin, length) = match self.raw[0] {
            short @ ..0x80 => (1, usize::from(short)),
            low => (2, usize::from(low & 0x7f) | usize::from(self.raw[1]) << 7),
        };
        &self.raw[begin..begin + length]
    }

    /// On its own.
    pub fn key_of_its_own(&self) -> Key {
        Key::new(self.key()).expect("it was read as a key")
    }

    pub fn seq(&self) -> u64 {
        self.envelope().1
    }

    pub fn is_dead(&self) -> bool {
        self.envelope().2 & DEAD != 0
    }

    fn envelope(&self) -> (&[u8], u64, u64) {
        read_envelope(&mut Reader::new(&self.raw)).expect("it was read when the row was made")
    }

    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// None where the body is of a kind that this version does not read: such a row is kept, relayed and counted.
    pub fn body(&self) -> Option<Body<'_>> {
        let mut reader = Reader::new(&self.raw);
        read_envelope(&mut reader).ok()?;
        let topic = reader.bytes(crate::id::MAX_TOPIC_BYTES, "a topic").ok()?;
        let value = reader.bytes(MAX_VALUE_BYTES, "the value of a row").ok()?;
        Some(Body { topic, value })
    }

    pub(crate) fn has_topic(&self, topic: &Topic) -> bool {
        self.body().is_some_and(|body| body.topic == topic.as_bytes())
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.bytes(&self.raw);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        let raw = reader.bytes(MAX_ROW_BYTES, "a row")?;
        read_envelope(&mut Reader::new(raw))?;
        Ok(Self { raw: raw.into() })
    }

    /// Bytes on the wire.
    pub(crate) fn length(&self) -> usize {
        self.raw.len() + number_length(self.raw.len() as u64)
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}{}", String::from_utf8_lossy(self.key()).escape_debug(), self.seq(), if self.is_dead() { " gone" } else { "" })
    }
}

fn envelope(key: &Key, seq: u64, flags: u64) -> Vec<u8> {
    let mut raw = Vec::new();
    key.write(&mut raw);
    raw.number(seq);
    raw.number(flags);
    raw
}

/// Key, sequence, flags.
fn read_envelope<'a>(reader: &mut Reader<'a>) -> Decoded<(&'a [u8], u64, u64)> {
    Ok((reader.bytes(MAX_KEY_BYTES, "a key")?, reader.number("a row's sequence")?, reader.number("a row's flags")?))
}
