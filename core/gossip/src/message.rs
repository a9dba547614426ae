//! What hosts say to each other. `docs/decisions/gossip.md` has the bytes.
//!
//! A message is a version, a kind, a body. Bytes after a known body are fields of a newer version and are left alone; an
//! unknown kind is counted and dropped.

use crate::beat::Beat;
use crate::head::{Certificate, Head};
use crate::id::{Key, Life, OriginId, Peer, Region, Topic};
use crate::log::{Cursor, MAX_ROWS};
use crate::row::Row;
use crate::wire::{Decoded, Malformed, Reader, Write};

pub const MAX_DATAGRAM_BYTES: usize = 1_200;
pub const MAX_CHUNK_BYTES: usize = 256 << 10;
const VERSION: u8 = 1;
const MAX_BATCHES: usize = 4_096;
/// Each has at most 34 bytes: they fit a chunk.
pub(crate) const MAX_ENTRIES: usize = 7_168;
/// Origins that one process writes.
pub(crate) const MAX_OWN: usize = 256;
pub(crate) const MAX_BEATS: usize = 1_024;
pub(crate) const BUCKETS: usize = 256;

/// What is compared as a whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Realm {
    Global,
    Region(Region),
}

/// Where somebody is with one origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub id: OriginId,
    pub epoch: u32,
    pub forked: bool,
    pub seq: u64,
    pub chain: u32,
    /// Of the digest: two states of one sequence differ here.
    pub tag: u32,
}

impl Entry {
    pub fn at(&self) -> (u32, bool, u64, u32) {
        (self.epoch, self.forked, self.seq, self.chain)
    }
}

/// Whether a batch is all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum More {
    /// The head can be checked now.
    Last,
    /// The next part is on its way.
    Follows,
    /// The next part is to be asked for.
    Ask,
}

/// A head, and the rows that lead to it from `after`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub certificate: Option<Certificate>,
    pub head: Head,
    pub after: Cursor,
    pub rows: Vec<Row>,
    pub more: More,
}

/// Two heads of one sequence that say different things, both signed: nobody can make this up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fork {
    pub certificate: Certificate,
    pub heads: [Head; 2],
}

/// What a peer has heard of a host that has just started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub id: OriginId,
    pub nonce: u64,
    pub heads: Vec<(Certificate, Head)>,
}

/// Proof that a life of a host answered to `nonce`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alive {
    pub certificate: Certificate,
    pub life: Life,
    pub started_ms: u64,
    pub nonce: u64,
    pub proof: [u8; 64],
}

/// One realm in a [`Message::Sync`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    pub realm: Realm,
    pub root: u64,
    /// What has changed here since both were last known to be equal.
    pub recent: Vec<Entry>,
    /// False when there was more than fits, or nobody knows.
    pub complete: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub id: OriginId,
    pub epoch: u32,
    pub after: Cursor,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Datagram: new heads with their rows, or without them when they do not fit.
    Push(Vec<Batch>),
    /// Datagram, the round of anti-entropy.
    Sync { roots: Vec<Root>, beats: Vec<Beat> },
    /// Datagram: we are equal.
    Same { realm: Realm, root: u64 },
    Beats(Vec<Beat>),
    /// Datagram of the membership protocol, whose bytes are its own.
    Members(Vec<u8>),
    Buckets { realm: Realm, hashes: Vec<u32> },
    /// All that the sender has in `buckets`; with none of them, only what changed lately.
    Entries { realm: Realm, buckets: Vec<u8>, entries: Vec<Entry> },
    Want(Vec<Wanted>),
    Batches(Vec<Batch>),
    Fork(Box<Fork>),
    /// After a start: what is the highest that you have of me, and does another life of mine answer?
    Recover { of: Peer, nonce: u64, origins: Vec<OriginId> },
    Recovered(Recovered),
    AreYouAlive { id: OriginId, life: Life, nonce: u64 },
    IAmAlive(Alive),
    /// Handed on to the second process of one identity.
    Duplicate(Alive),
    /// Detail of a region far away: everything that bears on `topic`, beginning with what is newer than `entries`.
    Subscribe { topic: Topic, entries: Vec<Entry> },
    /// Of the logs that were just given: how far the giver had heard them. No sign of life.
    Heard(Vec<Beat>),
}

impl Message {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, self.kind()];
        match self {
            Self::Push(batches) | Self::Batches(batches) => out.list(batches, |out, batch| batch.write(out)),
            Self::Sync { roots, beats } => {
                out.list(roots, |out, root| root.write(out));
                out.list(beats, |out, beat| beat.write(out));
            }
            Self::Same { realm, root } => {
                realm.write(&mut out);
                out.extend_from_slice(&root.to_le_bytes());
            }
            Self::Beats(beats) | Self::Heard(beats) => out.list(beats, |out, beat| beat.write(out)),
            Self::Members(bytes) => out.extend_from_slice(bytes),
            Self::Buckets { realm, hashes } => {
                realm.write(&mut out);
                out.list(hashes, |out, hash| out.extend_from_slice(&hash.to_le_bytes()));
            }
            Self::Entries { realm, buckets, entries } => {
                realm.write(&mut out);
                out.bytes(buckets);
                out.list(entries, |out, entry| entry.write(out));
            }
            Self::Want(wanted) => out.list(wanted, |out, wanted| wanted.write(out)),
            Self::Fork(fork) => fork.write(&mut out),
            Self::Recover { of, nonce, origins } => {
                of.write(&mut out);
                words(&mut out, [*nonce]);
                out.list(origins, |out, id| out.extend_from_slice(&id.0));
            }
            Self::Recovered(recovered) => {
                out.extend_from_slice(&recovered.id.0);
                words(&mut out, [recovered.nonce]);
                out.list(&recovered.heads, |out, (certificate, head)| {
                    certificate.write(out);
                    head.write(out);
                });
            }
            Self::AreYouAlive { id, life, nonce } => {
                out.extend_from_slice(&id.0);
                words(&mut out, [*life, *nonce]);
            }
            Self::IAmAlive(alive) | Self::Duplicate(alive) => alive.write(&mut out),
            Self::Subscribe { topic, entries } => {
                topic.write(&mut out);
                out.list(entries, |out, entry| entry.write(out));
            }
        }
        out
    }

    /// None for a kind or version that this one does not know.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut reader = Reader::new(bytes);
        let r = &mut reader;
        let (version, kind) = (r.byte("a version")?, r.byte("a kind")?);
        if version != VERSION {
            return Ok(None);
        }
        Ok(Some(match kind {
            1 => Self::Push(r.list(MAX_BATCHES, "batches", Batch::read)?),
            2 => Self::Sync { roots: r.list(2, "roots", Root::read)?, beats: r.list(MAX_BEATS, "beats", Beat::read)? },
            3 => Self::Same { realm: Realm::read(r)?, root: word(r)? },
            4 => Self::Beats(r.list(MAX_BEATS, "beats", Beat::read)?),
            5 => Self::Members(r.take(r.remaining(), "")?.to_vec()),
            6 => {
                let hash = |r: &mut Reader<'_>| Ok(u32::from_le_bytes(r.array("a bucket")?));
                Self::Buckets { realm: Realm::read(r)?, hashes: r.list(BUCKETS, "buckets", hash)? }
            }
            7 => Self::Entries {
                realm: Realm::read(r)?,
                buckets: r.bytes(BUCKETS, "buckets")?.to_vec(),
                entries: r.list(MAX_ENTRIES, "entries", Entry::read)?,
            },
            8 => Self::Want(r.list(MAX_ENTRIES, "what is wanted", Wanted::read)?),
            9 => Self::Batches(r.list(MAX_BATCHES, "batches", Batch::read)?),
            10 => Self::Fork(Box::new(Fork::read(r)?)),
            11 => Self::Recover { of: Peer::read(r)?, nonce: word(r)?, origins: r.list(MAX_OWN, "origins", id)? },
            12 => {
                let head = |r: &mut Reader<'_>| Ok((Certificate::read(r)?, Head::read(r)?));
                let (id, nonce) = (id(r)?, word(r)?);
                Self::Recovered(Recovered { id, nonce, heads: r.list(MAX_OWN, "heads", head)? })
            }
            13 => Self::AreYouAlive { id: id(r)?, life: word(r)?, nonce: word(r)? },
            14 => Self::IAmAlive(Alive::read(r)?),
            15 => Self::Duplicate(Alive::read(r)?),
            16 => Self::Subscribe { topic: Topic::read(r)?, entries: r.list(MAX_ENTRIES, "entries", Entry::read)? },
            17 => Self::Heard(r.list(MAX_BEATS, "beats", Beat::read)?),
            _ => return Ok(None),
        }))
    }

    /// What stands before `count` batches in a push.
    pub(crate) fn push_prefix(count: u64) -> Vec<u8> {
        let mut out = vec![VERSION, 1];
        out.number(count);
        out
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Push(_) => 1,
            Self::Sync { .. } => 2,
            Self::Same { .. } => 3,
            Self::Beats(_) => 4,
            Self::Members(_) => 5,
            Self::Buckets { .. } => 6,
            Self::Entries { .. } => 7,
            Self::Want(_) => 8,
            Self::Batches(_) => 9,
            Self::Fork(_) => 10,
            Self::Recover { .. } => 11,
            Self::Recovered(_) => 12,
            Self::AreYouAlive { .. } => 13,
            Self::IAmAlive(_) => 14,
            Self::Duplicate(_) => 15,
            Self::Subscribe { .. } => 16,
            Self::Heard(_) => 17,
        }
    }
}

impl Realm {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Global => out.push(0),
            Self::Region(region) => {
                out.push(1);
                region.write(out);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        match r.byte("a realm")? {
            0 => Ok(Self::Global),
            1 => Ok(Self::Region(Region::read(r)?)),
            _ => Err(Malformed { what: "a realm" }),
        }
    }
}

impl Entry {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.number(u64::from(self.epoch) << 1 | u64::from(self.forked));
        out.number(self.seq);
        out.number(self.chain.into());
        out.extend_from_slice(&self.tag.to_le_bytes());
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        let id = id(r)?;
        let epoch = r.number("an epoch")?;
        Ok(Self {
            id,
            epoch: u32::try_from(epoch >> 1).map_err(|_| Malformed { what: "an epoch" })?,
            forked: epoch & 1 == 1,
            seq: r.number("a sequence")?,
            chain: r.small("a chain")?,
            tag: u32::from_le_bytes(r.array("a tag")?),
        })
    }
}

impl Cursor {
    fn write(&self, out: &mut Vec<u8>) {
        out.number(self.seq);
        optional(out, &self.key, Key::write);
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self { seq: r.number("a cursor")?, key: read_optional(r, Key::read)? })
    }
}

impl Batch {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        optional(out, &self.certificate, Certificate::write);
        self.head.write(out);
        self.after.write(out);
        out.list(&self.rows, |out, row| row.write(out));
        out.push(self.more as u8);
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self {
            certificate: read_optional(r, Certificate::read)?,
            head: Head::read(r)?,
            after: Cursor::read(r)?,
            rows: r.list(MAX_ROWS, "rows", Row::read)?,
            more: match r.byte("a part")? {
                0 => More::Last,
                1 => More::Follows,
                2 => More::Ask,
                _ => return Err(Malformed { what: "a part" }),
            },
        })
    }

    /// Bytes on the wire, at most.
    pub(crate) fn length(&self) -> usize {
        let certificate = self.certificate.as_ref().map_or(0, Certificate::length);
        certificate + self.head.length() + 160 + self.rows.iter().map(Row::length).sum::<usize>()
    }
}

impl Fork {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        self.certificate.write(out);
        self.heads.iter().for_each(|head| head.write(out));
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self { certificate: Certificate::read(r)?, heads: [Head::read(r)?, Head::read(r)?] })
    }
}

impl Alive {
    fn write(&self, out: &mut Vec<u8>) {
        self.certificate.write(out);
        words(out, [self.life, self.started_ms, self.nonce]);
        out.extend_from_slice(&self.proof);
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self {
            certificate: Certificate::read(r)?,
            life: word(r)?,
            started_ms: word(r)?,
            nonce: word(r)?,
            proof: r.array("a proof")?,
        })
    }
}

impl Root {
    fn write(&self, out: &mut Vec<u8>) {
        self.realm.write(out);
        out.extend_from_slice(&self.root.to_le_bytes());
        out.list(&self.recent, |out, entry| entry.write(out));
        out.push(self.complete.into());
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self {
            realm: Realm::read(r)?,
            root: word(r)?,
            recent: r.list(MAX_ENTRIES, "entries", Entry::read)?,
            complete: flag(r)?,
        })
    }
}

impl Wanted {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.number(self.epoch.into());
        self.after.write(out);
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        Ok(Self { id: id(r)?, epoch: r.small("an epoch")?, after: Cursor::read(r)? })
    }
}

fn id(r: &mut Reader<'_>) -> Decoded<OriginId> {
    Ok(OriginId(r.array("an origin")?))
}

fn word(r: &mut Reader<'_>) -> Decoded<u64> {
    Ok(u64::from_le_bytes(r.array("a word")?))
}

fn words<const N: usize>(out: &mut Vec<u8>, words: [u64; N]) {
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn flag(r: &mut Reader<'_>) -> Decoded<bool> {
    match r.byte("a flag")? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed { what: "a flag" }),
    }
}

fn optional<T>(out: &mut Vec<u8>, value: &Option<T>, write: impl FnOnce(&T, &mut Vec<u8>)) {
    out.push(value.is_some().into());
    if let Some(value) = value {
        write(value, out);
    }
}

fn read_optional<'a, T>(r: &mut Reader<'a>, read: impl FnOnce(&mut Reader<'a>) -> Decoded<T>) -> Decoded<Option<T>> {
    if flag(r)? { Ok(Some(read(r)?)) } else { Ok(None) }
}
