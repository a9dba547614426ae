//! What a new host and control say to each other, and the token that lets it in.

use crate::authority::{self, Issued, PublicKeys};
use crate::member::{self, Member, MemberKeys, Said};
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::{HostId, Region, Zone};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

const PREFIX: &str = "dnj1";
const ID_BYTES: usize = 8;

/// `dnj1.<id>.<secret>.<SHA-256 of the authority's certificate>`, all hexadecimal: whoever has it may let one host join,
/// and knows the cluster by it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: String,
    secret: [u8; 32],
    pub ca_sha256: [u8; 32],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a token to join with: it begins with {PREFIX}. and has four parts; `dunlin host token` makes one")]
pub struct NotAJoinToken;

/// What a token shows of itself to control.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenProof {
    pub id: String,
    secret: String,
}

/// What a host says of itself when it joins, and at each start after that.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    pub cpus: u32,
    pub memory_mb: u32,
    /// X25519 public key, base64: secrets are sealed to it.
    pub sealing_key: String,
    pub keys: PublicKeys,
    /// Where other hosts reach it.
    pub addr: SocketAddr,
    pub version: String,
    /// The host's clock as it sent this.
    pub clock_ms: u64,
    /// Of a member: a control that was restored from an older backup does not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
}

/// What a host was given when it joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    pub region: Region,
    pub machine_prefix: Ipv4Prefix,
    /// Of its keys.
    pub epoch: u32,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub token: TokenProof,
    pub host: HostId,
    pub region: Region,
    /// `None`: control chooses a block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_prefix: Option<Ipv4Prefix>,
    pub report: HostReport,
    /// It answers at its address while it joins, see [`Answering`](crate::Answering). Hosts of before did not.
    #[serde(default)]
    pub answers: bool,
}

/// What makes a host a member.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinAnswer {
    pub issued: Issued,
    pub region: Region,
    pub epoch: u32,
    pub domain: String,
    pub machine_prefix: Ipv4Prefix,
    pub control: HostId,
    pub peers: Vec<(HostId, SocketAddr)>,
    /// Who has just dialed the new host back, over UDP and over TCP. `None`: it was let in before, or by a control that did not dial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_by: Option<HostId>,
}

impl JoinToken {
    pub fn generate(ca_sha256: [u8; 32]) -> Self {
        Self { id: hex::encode(member::random::<ID_BYTES>()), secret: member::random(), ca_sha256 }
    }

    pub fn proof(&self) -> TokenProof {
        TokenProof { id: self.id.clone(), secret: hex::encode(self.secret) }
    }

    /// As it is printed, once.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}.{}.{}.{}", self.id, hex::encode(self.secret), hex::encode(self.ca_sha256))
    }
}

impl FromStr for JoinToken {
    type Err = NotAJoinToken;

    fn from_str(text: &str) -> Result<Self, NotAJoinToken> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [PREFIX, id, secret, ca] = parts[..] else { return Err(NotAJoinToken) };
        let is_id = id.len() == 2 * ID_BYTES && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let secrets = member::bytes_32(secret).zip(member::bytes_32(ca)).filter(|_| is_id);
        let (secret, ca_sha256) = secrets.ok_or(NotAJoinToken)?;
        Ok(Self { id: id.to_owned(), secret, ca_sha256 })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, ..)", self.id)
    }
}

impl TokenProof {
    /// What control keeps of a secret. It is 32 random bytes, so that a quick digest is as good as a slow one.
    pub fn digest(&self) -> String {
        blake3::hash(self.secret.as_bytes()).to_hex().to_string()
    }

    /// Takes as long whatever is different.
    pub fn has_digest(&self, digest: &str) -> bool {
        // blake3 compares in constant time.
        blake3::Hash::from_hex(digest).is_ok_and(|kept| kept == blake3::hash(self.secret.as_bytes()))
    }
}

impl fmt::Debug for TokenProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenProof({}, ..)", self.id)
    }
}

impl JoinAnswer {
    /// Whether it names the authority that the token does. Whoever relayed it may be no friend.
    pub fn is_of(&self, token: &JoinToken) -> bool {
        authority::sha256_of(&self.issued.ca_pem) == Some(token.ca_sha256)
    }

    /// The member that the answer makes of a host with these keys.
    pub fn member(self, host: HostId, keys: MemberKeys) -> Member {
        let Self { issued, region, epoch, domain, machine_prefix, control, peers, .. } = self;
        Member { host, region, epoch, domain, machine_prefix, control, peers, said: Said::default(), keys, issued }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_printed_and_not_shown_otherwise() {
        let token = JoinToken::generate([7; 32]);
        let text = token.reveal();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert!(token.proof().has_digest(&token.proof().digest()));
        let other = JoinToken::generate([7; 32]);
        assert!(!other.proof().has_digest(&token.proof().digest()));
        assert!(!token.proof().has_digest("") && !token.proof().has_digest("zz"));
        let secret = hex::encode(token.secret);
        assert!(!format!("{token:?} {:?}", token.proof()).contains(&secret));
        let cut = &text[..text.len() - 1];
        for bad in ["", "dnj1", "dnj1.a.b.c", &text.replace("dnj1", "dnj2"), cut, &format!("{text}.x"), &text.replace(&token.id, "../../x")] {
            assert_eq!(bad.parse::<JoinToken>(), Err(NotAJoinToken), "{bad}");
        }
    }
}
