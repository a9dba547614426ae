//! What a host and control say to each other when the host's certificate is of no use any more: it was off for longer than that
//! lives, or what it has was issued before there were all of its parts. It still has its keys, and control knows the public ones.
//!
//! ```text
//! host, without a certificate -- its id --> member --> control
//! host <-- a challenge of this minute -- control
//! host -- the challenge, signed with its key for gossip --> member --> control
//! host <-- certificates for the keys that control knows -- control
//! ```
//!
//! It goes the way of a request to join, so every member relays it. What is signed is bound to the cluster, the host and the
//! challenge, and is a digest of 32 bytes, which nothing else is that this key signs. A relay that keeps a proof can have the same
//! keys certified once more within a minute, and has none of them.

use crate::authority::{Issued, PublicKeys};
use crate::member::{self, Member, MemberError, bytes_32};
use dunlin_gossip::Certificate;
use dunlin_model::HostId;
use ed25519_dalek::{Signature, Signer, VerifyingKey};
use serde::{Deserialize, Serialize};

const CONTEXT: &str = "dunlin cluster 1 a host asks to be certified again";

/// Sent where others send a request to join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReturnRequest {
    pub returning: HostId,
    /// `None` asks for the challenge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<ReturnProof>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReturnProof {
    pub challenge: String,
    /// Ed25519, 64 bytes, hexadecimal.
    signature: String,
}

/// What control has made up for one host; only control can read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReturnChallenge {
    pub challenge: String,
}

impl ReturnRequest {
    pub fn to_be_challenged(host: &HostId) -> Self {
        Self { returning: host.clone(), proof: None }
    }

    pub fn proving(member: &Member, challenge: &ReturnChallenge) -> Result<Self, MemberError> {
        let ca = member.ca_sha256()?;
        let signature = member.keys.gossip()?.sign(&signed(&ca, &member.host, &challenge.challenge));
        let proof = ReturnProof { challenge: challenge.challenge.clone(), signature: hex::encode(signature.to_bytes()) };
        Ok(Self { returning: member.host.clone(), proof: Some(proof) })
    }
}

impl ReturnProof {
    /// Whether the host with these keys has signed it, for the cluster of this authority. Says nothing of the challenge's age.
    pub fn is_by(&self, host: &HostId, keys: &PublicKeys, ca_sha256: &[u8; 32]) -> bool {
        let key = bytes_32(&keys.gossip).and_then(|bytes| VerifyingKey::from_bytes(&bytes).ok());
        let signature = hex::decode(&self.signature).ok().and_then(|bytes| Signature::from_slice(&bytes).ok());
        let shown = key.zip(signature);
        shown.is_some_and(|(key, signature)| key.verify_strict(&signed(ca_sha256, host, &self.challenge), &signature).is_ok())
    }
}

/// Whoever relayed what was issued may be no friend: of what says itself that it is the cluster's, all that this member can use of
/// it for gossip. What it shows in TLS the other hosts judge.
impl Member {
    pub fn with_logs_of(&self, issued: &Issued) -> Result<Self, MemberError> {
        const NOT_OURS: MemberError = MemberError::BadKey("what was issued is not for this host in this cluster");
        let (cluster, own) = (self.cluster_key()?, self.keys.gossip()?.verifying_key());
        let is_ours = |text: &str, name| {
            let certificate = member::from_base64(text).and_then(|bytes| Certificate::from_bytes(&bytes).ok());
            certificate.is_some_and(|found| found.verify(&cluster) && found.key == own && found.name == name)
        };
        let (log, machines) = (crate::authority::log_name(&self.host), crate::authority::machines_log_name(&self.host));
        if !is_ours(&issued.log_certificate, log) || !is_ours(&issued.machines_log_certificate, machines) {
            return Err(NOT_OURS);
        }
        let logs = Issued {
            log_certificate: issued.log_certificate.clone(),
            machines_log_certificate: issued.machines_log_certificate.clone(),
            ..self.issued.clone()
        };
        Ok(Self { issued: logs, ..self.clone() })
    }
}

fn signed(ca_sha256: &[u8; 32], host: &HostId, challenge: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    for part in [ca_sha256.as_slice(), host.as_str().as_bytes(), challenge.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::member::{MemberKeys, Said};

    fn member(authority: &Authority, host: &str) -> Member {
        let (host, region, keys): (HostId, dunlin_model::Region, _) = (host.parse().unwrap(), "fra".parse().unwrap(), MemberKeys::generate().unwrap());
        let issued = authority.issue(&host, &region, 1, &keys.public().unwrap(), 0).unwrap();
        let machine_prefix = dunlin_model::desired::Ipv4Prefix { network: "10.208.0.0".parse().unwrap(), length: 20 };
        let control = "h1".parse().unwrap();
        Member { host, region, epoch: 1, domain: "localhost".into(), machine_prefix, control, peers: vec![], said: Said::default(), keys, issued }
    }

    #[test]
    fn only_who_has_the_key_proves_it_for_this_cluster_host_and_challenge() {
        let dir = tempfile::tempdir().unwrap();
        let [authority, foreign] = ["a", "b"].map(|name| Authority::load_or_create(&dir.path().join(name), 0).unwrap());
        let (member, other) = (member(&authority, "h2"), member(&authority, "h3"));
        let proof = |of: &Member, challenge: &str| {
            ReturnRequest::proving(of, &ReturnChallenge { challenge: challenge.into() }).unwrap().proof.unwrap()
        };
        let (keys, ca) = (member.keys.public().unwrap(), authority.ca_sha256().unwrap());
        let good = proof(&member, "c1");
        assert!(good.is_by(&member.host, &keys, &ca));
        assert!(!good.is_by(&other.host, &keys, &ca), "another host's");
        assert!(!good.is_by(&member.host, &keys, &foreign.ca_sha256().unwrap()), "another cluster's");
        assert!(!good.is_by(&member.host, &other.keys.public().unwrap(), &ca), "another key's");
        assert!(!ReturnProof { challenge: "c2".into(), ..good.clone() }.is_by(&member.host, &keys, &ca), "another challenge's");
        for signature in ["", "zz", "00", &"00".repeat(64)] {
            assert!(!ReturnProof { signature: signature.into(), ..good.clone() }.is_by(&member.host, &keys, &ca), "{signature}");
        }
        assert_eq!(serde_json::to_string(&ReturnRequest::to_be_challenged(&member.host)).unwrap(), r#"{"returning":"h2"}"#);
    }

    #[test]
    fn a_member_takes_only_its_own_logs_of_its_own_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let [authority, foreign] = ["a", "b"].map(|name| Authority::load_or_create(&dir.path().join(name), 0).unwrap());
        let mut old = member(&authority, "h2");
        let whole = old.issued.clone();
        old.issued.machines_log_certificate.clear();
        assert_eq!(old.with_logs_of(&whole).unwrap().issued, whole);
        let public = old.keys.public().unwrap();
        let by = |authority: &Authority, host: &str| authority.issue(&host.parse().unwrap(), &old.region, 1, &public, 0).unwrap();
        assert!(old.with_logs_of(&by(&foreign, "h2")).is_err());
        assert!(old.with_logs_of(&by(&authority, "h3")).is_err());
        assert!(old.with_logs_of(&old.issued.clone()).is_err(), "nothing new in it");
        assert!(old.with_logs_of(&member(&authority, "h2").issued).is_err(), "for other keys");
    }
}
