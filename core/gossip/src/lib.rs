//! How hosts share state: every writer's rows, signed, at every reader, with no leader.
//!
//! ```text
//! writer: rows -> head {epoch, seq, floor, digest} signed --push--> 4 in the region + 2 anywhere --> they push on
//!                                                         <--sync-- every 200 ms with one peer: root, delta, buckets
//! reader: signed by a certified key? digest as signed, worked out on the side? --> swap --> `Output::Changed`
//! ```
//!
//! ```
//! use dunlin_gossip::*;
//! use ed25519_dalek::SigningKey;
//! let (cluster, key) = (SigningKey::from_bytes(&[1; 32]), SigningKey::from_bytes(&[2; 32]));
//! let (name, region) = (Name::new("host/w1").unwrap(), Region::new("fra").unwrap());
//! let subject = Subject { name, epoch: 1, key: key.verifying_key(), region, scope: Scope::Region };
//! let certificate = Certificate::issue(&cluster, &subject);
//! let (origin, now) = (certificate.id, Now { ms: 0, wall_ms: 0 });
//! let config = Config { cluster: cluster.verifying_key(), seed: 7, peers: vec![], membership: true, hold_ms: 50 };
//! let identity = Identity { certificate, key, addr: Addr::new("10.0.0.1:7000").unwrap(), life: 9 };
//! let mut node = Node::new(config, identity, None, now);
//! let change = Change { key: Key::new("m1").unwrap(), value: Some((Topic::new("shop").unwrap(), b"started".to_vec())), seq: None };
//! node.handle(Input::Tick, now); // nobody to ask: it speaks
//! let outputs = node.handle(Input::Publish { origin, schema: 1, changes: vec![change], at: None }, now);
//! assert!(outputs.iter().any(|output| matches!(output, Output::Changed { .. })));
//! ```
//!
//! Owns the logs, their verification, how they spread, membership, lives and subscriptions. Knows no noun of the platform:
//! keys, topics and values are bytes. Never does anything itself: the caller sends what [`Output`] says, hands in what
//! comes, and calls again at [`Node::next_wake_ms`]; chance comes from a seed. Transport must be authenticated on both
//! sides. Tested by its own scenarios and hostile bytes, and by `tests/sim`, where many nodes live under everything that
//! goes wrong and each bug of `planted` is found. `docs/decisions/gossip.md` has the wire and the reasons.
#![forbid(unsafe_code)]

mod beat;
mod catalogue;
mod clock;
mod fresh;
mod head;
mod id;
mod life;
mod log;
mod lthash;
mod members;
mod message;
mod node;
pub mod planted;
mod push;
mod rng;
mod row;
mod snapshot;
mod subscribe;
mod sync;
#[cfg(test)]
mod tests;
mod transfer;
mod wire;
mod write;

pub use beat::{BEAT_MS, BEATS, Beat, CHAIN_MS};
pub use catalogue::{Bad, Catalogue, MAX_ORIGINS, Taken};
pub use clock::Now;
pub use fresh::{MAX_SKEW_MS, Receipt};
pub use head::{Certificate, Head, Scope, Statement, Subject};
pub use id::{Addr, Key, Life, Name, OriginId, Peer, Region, Topic};
pub use log::{Cursor, Log, MAX_LOG_BYTES, MAX_ROWS};
pub use lthash::LtHash;
pub use message::{Alive, Batch, Entry, Fork, MAX_CHUNK_BYTES, MAX_DATAGRAM_BYTES, Message, More, Realm, Recovered, Root, Wanted};
pub use node::{At, Change, Config, Counters, Event, Identity, Input, Node, Output, Status};
pub use rng::Rng;
pub use row::{Body, MAX_ROW_BYTES, MAX_VALUE_BYTES, Row};
pub use snapshot::Snapshot;
pub use subscribe::IDLE_MS;
pub use sync::{Compared, SYNC_MS};
pub use wire::Malformed;
