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

/// There may be a hundred thousand: the key is where it is in the raw bytes, and a clone is the same row.
#[derive(Clone, PartialEq, Eq)]
pub struct Row {
    raw: Arc<[u8]>,
    seq: u64,
    key: Place,
    dead: bool,
}

/// Of the key in the raw bytes: at their beginning, so a byte can tell where.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    begin: u8,
    length: u8,
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
        let (mut raw, key) = envelope(&key, seq, 0);
        topic.write(&mut raw);
        raw.bytes(value);
        Ok(Self { raw: raw.into(), key, seq, dead: false })
    }

    pub fn tombstone(key: Key, seq: u64) -> Self {
        let (raw, key) = envelope(&key, seq, DEAD);
        Self { raw: raw.into(), key, seq, dead: true }
    }

    pub fn key(&self) -> &[u8] {
        let begin = usize::from(self.key.begin);
        &self.raw[begin..begin + usize::from(self.key.length)]
    }

    /// On its own.
    pub fn key_of_its_own(&self) -> Key {
        Key::new(self.key()).expect("it was read as a key")
    }

    pub fn seq(&self) -> u64 {
        self.seq
    }

    pub fn is_dead(&self) -> bool {
        self.dead
    }

    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// None where the body is of a kind that this version does not read: such a row is kept, relayed and counted.
    pub fn body(&self) -> Option<Body<'_>> {
        let mut reader = Reader::new(&self.raw);
        let _ = (Key::read(&mut reader).ok()?, reader.number("").ok()?, reader.number("").ok()?);
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
        let mut inner = Reader::new(raw);
        let key = Place::behind(inner.bytes(MAX_KEY_BYTES, "a key")?.len());
        let seq = inner.number("a row's sequence")?;
        let flags = inner.number("a row's flags")?;
        Ok(Self { raw: raw.into(), key, seq, dead: flags & DEAD != 0 })
    }

    /// Bytes on the wire.
    pub(crate) fn length(&self) -> usize {
        self.raw.len() + number_length(self.raw.len() as u64)
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}{}", String::from_utf8_lossy(self.key()).escape_debug(), self.seq, if self.dead { " gone" } else { "" })
    }
}

impl Place {
    /// Of a key, which is the first thing in a row, behind its length.
    fn behind(length: usize) -> Self {
        let bytes = |number: usize| u8::try_from(number).expect("a key is short");
        Self { begin: bytes(number_length(length as u64)), length: bytes(length) }
    }
}

fn envelope(key: &Key, seq: u64, flags: u64) -> (Vec<u8>, Place) {
    let mut raw = Vec::new();
    key.write(&mut raw);
    raw.number(seq);
    raw.number(flags);
    (raw, Place::behind(key.as_bytes().len()))
}
