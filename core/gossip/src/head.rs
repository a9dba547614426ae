//! What is signed: certificates by the cluster, heads by the writers that it certified.
//!
//! Both keep the bytes that were signed. A newer version may add fields at the end; they are covered by the signature
//! and relayed as they came.

use crate::beat::{self, Link};
use crate::id::{Life, Name, OriginId, Region};
use crate::wire::{Decoded, Malformed, Reader, Write};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use std::sync::Arc;

/// Room for fields to come.
const MAX_SIGNED_BYTES: usize = 512;
const CERTIFICATE: &[u8] = b"dunlin gossip 1 certificate\0";
const HEAD: &[u8] = b"dunlin gossip 1 head\0";
const BEAT_KEY: &str = "dunlin gossip 1 beats";

/// Who holds a whole log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The hosts of the writer's region, and who subscribes.
    Region,
    /// Everybody.
    Global,
}

/// The cluster's word that whoever has `key` writes the log `name` in `epoch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub id: OriginId,
    pub name: Name,
    pub epoch: u32,
    pub key: VerifyingKey,
    pub region: Region,
    pub scope: Scope,
    signed: Signed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Signed {
    raw: Arc<[u8]>,
    signature: [u8; 64],
}

impl Certificate {
    /// Only control does this.
    pub fn issue(cluster: &SigningKey, subject: &Subject) -> Self {
        let mut raw = Vec::new();
        subject.name.write(&mut raw);
        raw.number(subject.epoch.into());
        raw.extend_from_slice(subject.key.as_bytes());
        subject.region.write(&mut raw);
        raw.push(u8::from(subject.scope == Scope::Global));
        let signed = Signed::sign(cluster, CERTIFICATE, raw);
        Self::parse(signed).expect("what was just written is read")
    }

    pub fn verify(&self, cluster: &VerifyingKey) -> bool {
        self.signed.verify(cluster, CERTIFICATE)
    }

    /// The certificate as bytes, to be handed to its host.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let certificate = Self::read(&mut reader)?;
        reader.end("a certificate")?;
        Ok(certificate)
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        self.signed.write(out);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        Self::parse(Signed::read(reader)?)
    }

    pub(crate) fn length(&self) -> usize {
        self.signed.raw.len() + 66
    }

    fn parse(signed: Signed) -> Decoded<Self> {
        let mut reader = Reader::new(&signed.raw);
        let name = Name::read(&mut reader)?;
        let epoch = reader.small("an epoch")?;
        let key = reader.array("a writer's key")?;
        let key = VerifyingKey::from_bytes(&key).map_err(|_| Malformed { what: "a writer's key" })?;
        let region = Region::read(&mut reader)?;
        let scope = match reader.byte("a scope")? {
            0 => Scope::Region,
            1 => Scope::Global,
            _ => return Err(Malformed { what: "a scope" }),
        };
        Ok(Self { id: OriginId::of(&name), name, epoch, key, region, scope, signed })
    }
}

/// What a certificate is about.
#[derive(Debug, Clone)]
pub struct Subject {
    pub name: Name,
    pub epoch: u32,
    pub key: VerifyingKey,
    pub region: Region,
    pub scope: Scope,
}

/// The state of a log at one sequence, in a few bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    pub id: OriginId,
    pub epoch: u32,
    pub seq: u64,
    /// Tombstones up to here are gone: who is further back needs the whole.
    pub floor: u64,
    pub digest: [u8; 32],
    /// Of the values, for readers; nothing here depends on it.
    pub schema: u32,
    /// The writer's clock.
    pub time_ms: u64,
    pub life: Life,
    /// Which stretch of time `anchor` is for.
    pub chain: u32,
    pub anchor: Link,
}

/// A signed [`Statement`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub is: Statement,
    signed: Signed,
}

impl Head {
    /// Signs, and fills in the anchor of its chain of beats.
    pub fn sign(key: &SigningKey, mut is: Statement) -> Self {
        is.anchor = beat::link(secret(key, &is), 0);
        let mut raw = Vec::with_capacity(128);
        raw.extend_from_slice(&is.id.0);
        raw.number(is.epoch.into());
        raw.number(is.seq);
        raw.number(is.floor);
        raw.extend_from_slice(&is.digest);
        raw.number(is.schema.into());
        raw.number(is.time_ms);
        raw.extend_from_slice(&is.life.to_le_bytes());
        raw.number(is.chain.into());
        raw.extend_from_slice(&is.anchor);
        Self { is, signed: Signed::sign(key, HEAD, raw) }
    }

    pub fn verify(&self, certificate: &Certificate) -> bool {
        let is = &self.is;
        is.id == certificate.id && is.epoch == certificate.epoch && self.signed.verify(&certificate.key, HEAD)
    }

    /// The order of what one writer says in one epoch.
    pub fn at(&self) -> (u64, u32) {
        (self.is.seq, self.is.chain)
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        self.signed.write(out);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        let signed = Signed::read(reader)?;
        let mut reader = Reader::new(&signed.raw);
        let is = Statement {
            id: OriginId(reader.array("a head's origin")?),
            epoch: reader.small("a head's epoch")?,
            seq: reader.number("a head's sequence")?,
            floor: reader.number("a head's floor")?,
            digest: reader.array("a head's digest")?,
            schema: reader.small("a head's schema")?,
            time_ms: reader.number("a head's time")?,
            life: u64::from_le_bytes(reader.array("a head's life")?),
            chain: reader.small("a head's chain")?,
            anchor: reader.array("a head's anchor")?,
        };
        if is.floor > is.seq { Err(Malformed { what: "a head's floor" }) } else { Ok(Self { is, signed }) }
    }

    pub(crate) fn length(&self) -> usize {
        self.signed.raw.len() + 66
    }
}

/// The start of a head's chain of beats; only the writer can know it.
pub(crate) fn secret(key: &SigningKey, is: &Statement) -> Link {
    let mut input = Vec::with_capacity(32);
    input.extend_from_slice(&is.id.0);
    input.number(is.epoch.into());
    input.number(is.seq);
    input.number(is.chain.into());
    let hash = blake3::keyed_hash(&blake3::derive_key(BEAT_KEY, key.as_bytes()), &input);
    hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes")
}

impl Signed {
    fn sign(key: &SigningKey, domain: &[u8], raw: Vec<u8>) -> Self {
        let signature = key.sign(&[domain, &raw].concat()).to_bytes();
        Self { raw: raw.into(), signature }
    }

    fn verify(&self, key: &VerifyingKey, domain: &[u8]) -> bool {
        let signature = Signature::from_bytes(&self.signature);
        key.verify_strict(&[domain, &self.raw].concat(), &signature).is_ok()
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.bytes(&self.raw);
        out.extend_from_slice(&self.signature);
    }

    fn read(reader: &mut Reader<'_>) -> Decoded<Self> {
        let raw = reader.bytes(MAX_SIGNED_BYTES, "what was signed")?.into();
        Ok(Self { raw, signature: reader.array("a signature")? })
    }
}

/// A fresh proof that the key's holder is alive in `life`: what a second process with the same identity is shown.
pub(crate) mod alive {
    use super::{Life, Signature, Signer, SigningKey, VerifyingKey};

    const ALIVE: &[u8] = b"dunlin gossip 1 alive\0";

    pub fn sign(key: &SigningKey, (life, started_ms): (Life, u64), nonce: u64) -> [u8; 64] {
        key.sign(&words(life, started_ms, nonce)).to_bytes()
    }

    pub fn verify(key: &VerifyingKey, (life, started_ms): (Life, u64), nonce: u64, signature: &[u8; 64]) -> bool {
        key.verify_strict(&words(life, started_ms, nonce), &Signature::from_bytes(signature)).is_ok()
    }

    fn words(life: Life, started_ms: u64, nonce: u64) -> Vec<u8> {
        [ALIVE, &life.to_le_bytes(), &started_ms.to_le_bytes(), &nonce.to_le_bytes()].concat()
    }
}
