//! Random numbers for choices and ids, one generator a core.

use std::cell::Cell;

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// Not for secrets: request ids and tie-breaks.
pub(crate) struct Random(Cell<u64>);

impl Random {
    pub fn seeded() -> Result<Self, getrandom::Error> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        Ok(Self(Cell::new(u64::from_le_bytes(seed))))
    }

    /// splitmix64.
    pub fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A ULID: sorts by time.
    pub fn request_id(&self, now_ms: u64) -> RequestId {
        let random = (u128::from(self.next()) << 64 | u128::from(self.next())) >> 48;
        let value = u128::from(now_ms & 0xffff_ffff_ffff) << 80 | random;
        RequestId(std::array::from_fn(|i| CROCKFORD[((value >> (125 - 5 * i)) & 31) as usize]))
    }
}

/// Under this name the whole story of a request can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) struct RequestId([u8; 26]);

impl RequestId {
    /// As another edge has written it.
    pub fn read(text: &[u8]) -> Option<Self> {
        let id: [u8; 26] = text.try_into().ok()?;
        id.iter().all(|byte| CROCKFORD.contains(byte)).then_some(Self(id))
    }

    pub fn as_str(&self) -> &str {
        // Made of the letters above.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_differ_and_sort_by_time() {
        let random = Random::seeded().unwrap();
        let (a, b) = (random.request_id(1_000), random.request_id(1_000));
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), 26);
        assert_eq!(RequestId::read(a.as_str().as_bytes()), Some(a));
        assert_eq!(RequestId::read(b"0123456789ABCDEFGHJKMNPQR!"), None);
        assert!(a < random.request_id(2_000));
    }
}
