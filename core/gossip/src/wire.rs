//! The wire's primitives: small, bounded, and safe against any bytes.
//!
//! Integers are LEB128, byte strings have their length before them. A reader never allocates more than what is left to
//! read, and what it does not know at the end of a record is kept by whoever holds the raw bytes, so that it is relayed.

use thiserror::Error;

/// Foreign bytes that are not what they should be. `what` names the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{what} is malformed or out of bounds")]
pub struct Malformed {
    pub what: &'static str,
}

pub(crate) type Decoded<T> = Result<T, Malformed>;

pub(crate) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub fn remaining(&self) -> usize {
        self.left.len()
    }

    pub fn take(&mut self, length: usize, what: &'static str) -> Decoded<&'a [u8]> {
        let (taken, left) = self.left.split_at_checked(length).ok_or(Malformed { what })?;
        self.left = left;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self, what: &'static str) -> Decoded<[u8; N]> {
        self.take(N, what)?.try_into().map_err(|_| Malformed { what })
    }

    pub fn byte(&mut self, what: &'static str) -> Decoded<u8> {
        Ok(self.array::<1>(what)?[0])
    }

    /// Only the shortest form of a number is read: one value has one encoding.
    pub fn number(&mut self, what: &'static str) -> Decoded<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let bits = u64::from(byte & 0x7f);
            if (shift == 63 && bits > 1) || (byte == 0 && shift > 0) {
                return Err(Malformed { what });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed { what })
    }

    pub fn small(&mut self, what: &'static str) -> Decoded<u32> {
        u32::try_from(self.number(what)?).map_err(|_| Malformed { what })
    }

    pub fn bytes(&mut self, max: usize, what: &'static str) -> Decoded<&'a [u8]> {
        let length = self.number(what)?;
        if length > max as u64 {
            return Err(Malformed { what });
        }
        self.take(length as usize, what)
    }

    /// A list of at most `max` items; each takes at least a byte, so a lie about the count costs nothing.
    pub fn list<T>(&mut self, max: usize, what: &'static str, mut item: impl FnMut(&mut Self) -> Decoded<T>) -> Decoded<Vec<T>> {
        let count = self.number(what)?;
        if count > max.min(self.remaining()) as u64 {
            return Err(Malformed { what });
        }
        (0..count).map(|_| item(self)).collect()
    }

    /// Nothing may follow.
    pub fn end(self, what: &'static str) -> Decoded<()> {
        if self.left.is_empty() { Ok(()) } else { Err(Malformed { what }) }
    }
}

/// What writes the same forms into a buffer.
pub(crate) trait Write {
    fn number(&mut self, value: u64);
    fn bytes(&mut self, bytes: &[u8]);
    fn list<T>(&mut self, items: &[T], item: impl FnMut(&mut Self, &T));
}

impl Write for Vec<u8> {
    fn number(&mut self, mut value: u64) {
        while value > 0x7f {
            self.push((value as u8 & 0x7f) | 0x80);
            value >>= 7;
        }
        self.push(value as u8);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.extend_from_slice(bytes);
    }

    fn list<T>(&mut self, items: &[T], mut item: impl FnMut(&mut Self, &T)) {
        self.number(items.len() as u64);
        for it in items {
            item(self, it);
        }
    }
}

/// How many bytes `value` takes as a number.
pub(crate) fn number_length(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}
