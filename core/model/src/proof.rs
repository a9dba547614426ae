//! Proofs: what the bearer of a token shows for one call to a host that is not to have the token itself.
//!
//! A token's signature (R, s) by the cluster's key A says s·B = R + H(R, A, payload)·A. So s is a private key whose public
//! half everybody works out from R, the payload and A, while only who has the token knows s. A proof signs one call with
//! it. (The identity-based signature of Galindo and Garcia, 2009, on Ed25519.) Whoever is shown it learns what the token
//! allows, and can neither use it for another call nor work out the token.

use crate::token::{Capability, MAX_TOKEN_BYTES, TokenError, parts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use curve25519_dalek::edwards::CompressedEdwardsY;
use curve25519_dalek::scalar::Scalar;
use ed25519_dalek::hazmat::{ExpandedSecretKey, raw_sign};
use ed25519_dalek::{Signature, VerifyingKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha512};

/// No token begins like this, so that no proof is ever one.
const CALL: &[u8] = b"dunlin call 1\0";
const NONCES: &[u8] = b"dunlin proof nonces 1\0";

/// That the bearer of a token wants a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The token without its signature.
    signed: String,
    /// R, the half of its signature that tells nothing.
    point: String,
    /// Of the call.
    signature: String,
}

impl Proof {
    /// By `token`, of which `cluster` is the key that signed it.
    pub fn of(token: &str, cluster: &VerifyingKey, call: &[u8]) -> Result<Self, TokenError> {
        let (signed, signature) = parts(token)?;
        let point = signature.r_bytes();
        let public = public_half(signed, point, cluster).ok_or(TokenError::Malformed)?;
        let scalar = Option::from(Scalar::from_canonical_bytes(*signature.s_bytes())).ok_or(TokenError::Malformed)?;
        let seed = Sha512::new().chain_update(NONCES).chain_update(signature.s_bytes()).finalize();
        let mut hash_prefix = [0; 32];
        hash_prefix.copy_from_slice(&seed[..32]);
        let key = ExpandedSecretKey { scalar, hash_prefix };
        let signature = raw_sign::<Sha512>(&key, &bound(call), &public);
        Ok(Self { signed: signed.to_owned(), point: BASE64.encode(point), signature: BASE64.encode(signature.to_bytes()) })
    }

    /// What the token allows with which `call` was signed, if `cluster` signed that and it has not expired.
    pub fn verify(&self, cluster: &VerifyingKey, call: &[u8], now_ms: u64) -> Result<Capability, TokenError> {
        if self.signed.len() + self.point.len() + self.signature.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Malformed);
        }
        let decoded = |text: &str| BASE64.decode(text).map_err(|_| TokenError::Malformed);
        let point: [u8; 32] = decoded(&self.point)?.try_into().map_err(|_| TokenError::Malformed)?;
        let signature = Signature::from_slice(&decoded(&self.signature)?).map_err(|_| TokenError::Malformed)?;
        let public = public_half(&self.signed, &point, cluster).ok_or(TokenError::Malformed)?;
        public.verify_strict(&bound(call), &signature).map_err(|_| TokenError::BadSignature)?;
        Capability::said(&self.signed, now_ms)
    }
}

/// R + H(R, A, payload)·A.
fn public_half(signed: &str, point: &[u8; 32], cluster: &VerifyingKey) -> Option<VerifyingKey> {
    let hash = Sha512::new().chain_update(point).chain_update(cluster.as_bytes()).chain_update(signed.as_bytes()).finalize();
    let factor = Scalar::from_bytes_mod_order_wide(&hash.into());
    let public = CompressedEdwardsY(*point).decompress()? + cluster.to_edwards() * factor;
    VerifyingKey::from_bytes(public.compress().as_bytes()).ok()
}

fn bound(call: &[u8]) -> Vec<u8> {
    [CALL, call].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Verb;
    use ed25519_dalek::SigningKey;

    fn capability() -> Capability {
        Capability { id: "t1".into(), org: "personal".parse().unwrap(), apps: None, verbs: vec![Verb::Read], expires_at_ms: 2_000 }
    }

    #[test]
    fn a_proof_shows_what_the_token_allows_for_one_call() {
        for seed in 1..20 {
            let key = SigningKey::from_bytes(&[seed; 32]);
            let (token, cluster) = (capability().sign(&key), key.verifying_key());
            let proof = Proof::of(&token, &cluster, b"stop a").unwrap();
            assert_eq!(proof.verify(&cluster, b"stop a", 1_999), Ok(capability()));
            assert_eq!(proof.verify(&cluster, b"stop a", 2_000), Err(TokenError::Expired));
            assert_eq!(proof.verify(&cluster, b"stop b", 0), Err(TokenError::BadSignature));
            let other = SigningKey::from_bytes(&[seed + 100; 32]).verifying_key();
            assert_eq!(proof.verify(&other, b"stop a", 0), Err(TokenError::BadSignature));
        }
    }

    #[test]
    fn nobody_makes_one_without_the_token_of_another_payload_or_key() {
        let (key, thief) = (SigningKey::from_bytes(&[1; 32]), SigningKey::from_bytes(&[9; 32]));
        let cluster = key.verifying_key();
        // Signed by another cluster's key, whatever the proof says of whose it is.
        let foreign = capability().sign(&thief);
        for as_of in [cluster, thief.verifying_key()] {
            let proof = Proof::of(&foreign, &as_of, b"stop").unwrap();
            assert_eq!(proof.verify(&cluster, b"stop", 0), Err(TokenError::BadSignature));
        }
        // The payload of a token that allows more, with the signature of one that does not.
        let more = Capability { verbs: vec![Verb::Admin], ..capability() }.sign(&thief);
        let own = capability().sign(&key);
        let mixed = format!("{}.{}", more.rsplit_once('.').unwrap().0, own.rsplit_once('.').unwrap().1);
        assert_eq!(Proof::of(&mixed, &cluster, b"stop").unwrap().verify(&cluster, b"stop", 0), Err(TokenError::BadSignature));
        let proof = Proof::of(&own, &cluster, b"stop").unwrap();
        let raised = Proof { signed: more.rsplit_once('.').unwrap().0.to_owned(), ..proof };
        assert_eq!(raised.verify(&cluster, b"stop", 0), Err(TokenError::BadSignature));
    }

    #[test]
    fn a_proof_is_no_token_and_tells_none() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let (token, cluster) = (capability().sign(&key), key.verifying_key());
        let proof = Proof::of(&token, &cluster, b"stop").unwrap();
        let as_token = format!("{}.{}", proof.signed, proof.signature);
        assert_eq!(Capability::verify(&as_token, &cluster, 0), Err(TokenError::BadSignature));
        assert!(!serde_json::to_string(&proof).unwrap().contains(token.rsplit_once('.').unwrap().1));
        assert_eq!(Proof::of("dunlin_v1.x.y", &cluster, b"stop"), Err(TokenError::Malformed));
    }
}
