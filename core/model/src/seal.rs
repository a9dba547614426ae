//! Sealing of secrets: an anonymous X25519 box (ephemeral key, SHA-256 key derivation bound to both
//! public keys and a context, ChaCha20-Poly1305). Callers pass the random bytes.
//!
//! The context is authenticated: a box sealed for `secrets/web/KEY` does not open as anything else,
//! so rows cannot be swapped.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use sha2::{Digest, Sha256};
use std::fmt;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// The longest text that is sealed: secrets fit into an environment.
pub const MAX_SEALED_BYTES: usize = 128 * 1024;
const EPHEMERAL_BYTES: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the value is {0} bytes, more than the {MAX_SEALED_BYTES} that can be sealed")]
    TooLong(usize),
    #[error("the sealed value is damaged, or was sealed to another key or for another purpose")]
    CannotOpen,
    #[error("the key is not 32 bytes of base64")]
    BadKey,
}

/// A box for whoever has the key. The salt is fresh random bytes, kept beside it; `context` is authenticated with it.
pub fn lock(key: &[u8; 32], salt: &[u8], context: &[u8], plain: &[u8]) -> Vec<u8> {
    let cipher = ChaCha20Poly1305::new((&*locked_with(key, salt)).into());
    cipher.encrypt(&Nonce::default(), Payload { msg: plain, aad: context }).expect("it fits into memory")
}

/// The counterpart of [`lock`].
pub fn unlock(key: &[u8; 32], salt: &[u8], context: &[u8], locked: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let cipher = ChaCha20Poly1305::new((&*locked_with(key, salt)).into());
    let opened = cipher.decrypt(&Nonce::default(), Payload { msg: locked, aad: context });
    opened.map(Zeroizing::new).map_err(|_| SealError::CannotOpen)
}

/// Each box has a key of its own, so that no nonce is used twice.
fn locked_with(key: &[u8; 32], salt: &[u8]) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(Sha256::new().chain_update(b"dunlin locked box 1\0").chain_update(key).chain_update(salt).finalize().into())
}

/// A private key that opens boxes. Never printed.
#[derive(Clone)]
pub struct OpeningKey(StaticSecret);

/// The public half: anyone may seal to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SealingKey(PublicKey);

impl OpeningKey {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(StaticSecret::from(bytes))
    }

    /// For writing the key's own 0600 file.
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    pub fn sealing_key(&self) -> SealingKey {
        SealingKey(PublicKey::from(&self.0))
    }

    /// Opens what was sealed to this key for the same `context`.
    pub fn open(&self, context: &str, sealed_base64: &str) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let sealed = BASE64.decode(sealed_base64).map_err(|_| SealError::CannotOpen)?;
        if sealed.len() < EPHEMERAL_BYTES {
            return Err(SealError::CannotOpen);
        }
        let (head, boxed) = sealed.split_at(EPHEMERAL_BYTES);
        let ephemeral: [u8; 32] = head.try_into().map_err(|_| SealError::CannotOpen)?;
        let ephemeral = PublicKey::from(ephemeral);
        let shared = self.0.diffie_hellman(&ephemeral);
        let key = derive(shared.as_bytes(), &ephemeral, &self.sealing_key().0);
        ChaCha20Poly1305::new((&*key).into())
            .decrypt(&Nonce::default(), Payload { msg: boxed, aad: context.as_bytes() })
            .map(Zeroizing::new)
            .map_err(|_| SealError::CannotOpen)
    }
}

impl SealingKey {
    pub fn to_base64(self) -> String {
        BASE64.encode(self.0.as_bytes())
    }

    pub fn from_base64(text: &str) -> Result<Self, SealError> {
        let bytes = BASE64.decode(text).map_err(|_| SealError::BadKey)?;
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| SealError::BadKey)?;
        Ok(Self(PublicKey::from(bytes)))
    }

    /// Seals `plain` for `context`, as base64. `random` must be fresh: it becomes the one-use key,
    /// which is why the nonce may be constant.
    pub fn seal(&self, context: &str, plain: &[u8], random: [u8; 32]) -> Result<String, SealError> {
        if plain.len() > MAX_SEALED_BYTES {
            return Err(SealError::TooLong(plain.len()));
        }
        let secret = StaticSecret::from(random);
        let ephemeral = PublicKey::from(&secret);
        let shared = secret.diffie_hellman(&self.0);
        let key = derive(shared.as_bytes(), &ephemeral, &self.0);
        let boxed = ChaCha20Poly1305::new((&*key).into())
            .encrypt(&Nonce::default(), Payload { msg: plain, aad: context.as_bytes() })
            .map_err(|_| SealError::TooLong(plain.len()))?;
        let mut out = ephemeral.as_bytes().to_vec();
        out.extend_from_slice(&boxed);
        Ok(BASE64.encode(out))
    }
}

impl fmt::Debug for OpeningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpeningKey(..)")
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealingKey({})", self.to_base64())
    }
}

fn derive(shared: &[u8; 32], ephemeral: &PublicKey, recipient: &PublicKey) -> Zeroizing<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(b"dunlin seal v1");
    hash.update(shared);
    hash.update(ephemeral.as_bytes());
    hash.update(recipient.as_bytes());
    Zeroizing::new(hash.finalize().into())
}

/// First 16 hexadecimal digits of SHA-256 over `key`, the name and the value: equal secrets of one
/// name have equal digests, and without the key nothing can be guessed from it.
pub fn digest(key: &OpeningKey, name: &str, value: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"dunlin secret digest v1");
    hash.update(*key.to_bytes());
    hash.update((name.len() as u64).to_be_bytes());
    hash.update(name);
    hash.update(value);
    hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_with_its_key_and_context() {
        let key = OpeningKey::from_bytes([7; 32]);
        let other = OpeningKey::from_bytes([8; 32]);
        let sealed = key.sealing_key().seal("secrets/web/KEY", b"hunter2", [9; 32]).unwrap();
        assert_eq!(&**key.open("secrets/web/KEY", &sealed).unwrap(), b"hunter2");
        assert_eq!(key.open("secrets/api/KEY", &sealed).unwrap_err(), SealError::CannotOpen);
        assert_eq!(other.open("secrets/web/KEY", &sealed).unwrap_err(), SealError::CannotOpen);
        let mut bytes = BASE64.decode(&sealed).unwrap();
        for i in 0..bytes.len() {
            bytes[i] ^= 1;
            assert!(key.open("secrets/web/KEY", &BASE64.encode(&bytes)).is_err(), "byte {i}");
            bytes[i] ^= 1;
        }
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", OpeningKey::from_bytes([7; 32])), "OpeningKey(..)");
    }

    #[test]
    fn digests_tell_changed_from_equal() {
        let key = OpeningKey::from_bytes([7; 32]);
        assert_eq!(digest(&key, "A", b"x"), digest(&key, "A", b"x"));
        assert_ne!(digest(&key, "A", b"x"), digest(&key, "A", b"y"));
        assert_ne!(digest(&key, "A", b"x"), digest(&key, "B", b"x"));
    }
}
