//! Names of writers, regions, addresses: all opaque here, all bounded.

use crate::wire::{Decoded, Malformed, Reader, Write};
use std::fmt;
use std::sync::Arc;

pub const MAX_NAME_BYTES: usize = 96;
/// An IPv6 socket address as text has at most 47.
pub const MAX_ADDR_BYTES: usize = 48;
pub const MAX_TOPIC_BYTES: usize = 64;
pub const MAX_KEY_BYTES: usize = 128;

macro_rules! bounded_bytes {
    ($($(#[doc = $doc:literal])* $name:ident, $max:expr, $what:literal;)*) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<[u8]>);

        impl $name {
            pub fn new(bytes: impl AsRef<[u8]>) -> Result<Self, Malformed> {
                let bytes = bytes.as_ref();
                if bytes.len() > $max { Err(Malformed { what: $what }) } else { Ok(Self(bytes.into())) }
            }

            pub fn as_bytes(&self) -> &[u8] {
                &self.0
            }

            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                out.bytes(&self.0);
            }

            pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
                Self::new(reader.bytes($max, $what)?)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", String::from_utf8_lossy(&self.0).escape_debug())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    )*};
}

bounded_bytes! {
    /// Of a writer, for ever: `host/w1`, `config/7`.
    Name, MAX_NAME_BYTES, "the name of an origin";
    Region, 32, "a region";
    /// Where a message is sent; only the caller knows what is in it.
    Addr, MAX_ADDR_BYTES, "an address";
    /// What a reader far away may subscribe to.
    Topic, MAX_TOPIC_BYTES, "a topic";
    Key, MAX_KEY_BYTES, "a key";
}

/// One writer's log: the first bytes of its name's hash. Names are certified, so nobody can search for a collision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OriginId(pub [u8; 8]);

impl OriginId {
    pub fn of(name: &Name) -> Self {
        let hash = blake3::derive_key("dunlin gossip 1 origin", name.as_bytes());
        Self(hash[..8].try_into().expect("a hash has 32 bytes"))
    }

    pub(crate) fn bucket(self) -> usize {
        self.0[0].into()
    }
}

impl fmt::Debug for OriginId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Random, one a process start.
pub type Life = u64;

/// A process that takes part: whose it is, where it is, which start of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// The origin that it writes as a host.
    pub id: OriginId,
    pub region: Region,
    pub addr: Addr,
    pub life: Life,
    /// By its own clock, which never goes back: a later start wins over an earlier one.
    pub started_ms: u64,
    /// Raised when others have wrongly declared it down.
    pub renewed: u32,
}

impl Peer {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        self.region.write(out);
        self.addr.write(out);
        out.extend_from_slice(&self.life.to_le_bytes());
        out.number(self.started_ms);
        out.number(self.renewed.into());
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self {
            id: OriginId(reader.array("a peer's id")?),
            region: Region::read(reader)?,
            addr: Addr::read(reader)?,
            life: u64::from_le_bytes(reader.array("a life id")?),
            started_ms: reader.number("a start")?,
            renewed: reader.small("a renewal")?,
        })
    }
}
