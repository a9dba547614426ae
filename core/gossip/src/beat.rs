//! Signs of life that cost 26 bytes and no signature.
//!
//! Each head commits to the end of a hash chain; every [`BEAT_MS`] its writer reveals one link further back. A link can
//! only come from the writer, and belongs to one head, so it says: at that time this head was still the newest. A
//! relay that holds heads back cannot make the old one look fresh. Beats are not part of any digest or root.
//!
//! The chain is a pure function of the writer's key and the head, so all processes that publish `config/<shard>` at
//! one revision give the same beats.

use crate::id::OriginId;
use crate::wire::{Decoded, Malformed, Reader};

/// With four copies of each a reader rarely misses two in a row: the age stays below six seconds.
pub const BEAT_MS: u64 = 3_000;
/// Links in a chain. Then a new head (or, with a foreign sequence, the same head signed for the next chain) is due.
pub const BEATS: u16 = 256;
/// For how long a chain lasts: 12.8 minutes.
pub const CHAIN_MS: u64 = BEAT_MS * BEATS as u64;
pub(crate) const BEAT_BYTES: usize = 8 + 2 + 16;

pub(crate) type Link = [u8; 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    pub id: OriginId,
    pub index: u16,
    pub link: Link,
}

impl Beat {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.link);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        let id = OriginId(reader.array("a beat's origin")?);
        let index = u16::from_le_bytes(reader.array("a beat's index")?);
        let link = reader.array("a beat's link")?;
        if index > BEATS { Err(Malformed { what: "a beat's index" }) } else { Ok(Self { id, index, link }) }
    }
}

/// Which chain `clock_ms` is in, and how far.
pub(crate) fn position(clock_ms: u64) -> (u32, u16) {
    ((clock_ms / CHAIN_MS) as u32, (clock_ms % CHAIN_MS / BEAT_MS) as u16)
}

/// The last link heard of a head's chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heard {
    pub index: u16,
    pub link: Link,
}

impl Heard {
    pub fn anchor(anchor: Link) -> Self {
        Self { index: 0, link: anchor }
    }

    /// Whether the beat is a later link of the same chain; at most [`BEATS`] hashes.
    pub fn follows(&self, beat: &Beat) -> Option<Self> {
        let steps = beat.index.checked_sub(self.index).filter(|steps| *steps > 0)?;
        let end = (0..steps).fold(beat.link, |link, _| next(link));
        (end == self.link).then_some(Self { index: beat.index, link: beat.link })
    }
}

/// From the chain's secret to the link at `index`.
pub(crate) fn link(secret: Link, index: u16) -> Link {
    (index..BEATS).fold(secret, |link, _| next(link))
}

fn next(link: Link) -> Link {
    let hash = blake3::hash(&link);
    hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes")
}
