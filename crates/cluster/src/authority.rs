//! The cluster's two authorities: one certifies who speaks TLS under a host's name, the other who writes which log.
//!
//! Both live with control (`<data>/control/cluster/authority.json`, 0600) and nowhere else; a host has its own keys and what was
//! issued for them, see [`Member`](crate::Member).

use crate::member::{self, MemberError, private_file};
use dunlin_gossip::{Certificate, Name, Region as GossipRegion, Scope, Subject};
use dunlin_model::{HostId, Region};
use ed25519_dalek::{SigningKey, VerifyingKey};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Every host's name in TLS ends with it, and the authority can vouch for no other name.
pub(crate) const HOSTS_DOMAIN: &str = "hosts.dunlin.internal";
pub(crate) const HOST_LOG: &str = "host/";
pub(crate) const MACHINES_LOG: &str = "machines/";
/// All of desired state is one log.
pub const CONFIG_LOG: &str = "config/0";
const CA_VALID: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// While control is lost nobody renews, and members go on: so long at most. A host that was removed is refused by name,
/// whatever its certificate says.
pub(crate) const LEAF_VALID: Duration = Duration::from_secs(2 * 365 * 24 * 3600);
/// A member asks for the next one when it has its own for so long.
pub(crate) const RENEWED_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
/// Clocks of hosts may be behind.
const BACKDATE: Duration = Duration::from_secs(3600);

/// The name under which a host speaks TLS.
pub(crate) fn tls_name(host: &HostId) -> String {
    format!("{host}.{HOSTS_DOMAIN}")
}

/// The log in which a host speaks of itself, and of its region if it is a reporter. Everybody holds it.
pub fn log_name(host: &HostId) -> Name {
    Name::new(format!("{HOST_LOG}{host}")).expect("a host's id is shorter than a name may be")
}

/// The log of its machines. The hosts of its region hold it, and who subscribes.
pub fn machines_log_name(host: &HostId) -> Name {
    Name::new(format!("{MACHINES_LOG}{host}")).expect("a host's id is shorter than a name may be")
}

pub struct Authority {
    gossip: SigningKey,
    config: SigningKey,
    ca_pem: String,
    ca_key_pem: String,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    gossip_key: String,
    config_key: String,
    ca_pem: String,
    ca_key_pem: String,
}

/// The public halves of a new member's keys; it keeps the private ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKeys {
    /// SubjectPublicKeyInfo, DER, base64.
    pub tls: String,
    /// Ed25519, 32 bytes, hexadecimal.
    pub gossip: String,
}

/// What the authorities say of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// Trusted for TLS between hosts.
    pub ca_pem: String,
    pub certificate_pem: String,
    pub not_after_ms: u64,
    /// The key that certifies writers, 32 bytes, hexadecimal.
    pub cluster_key: String,
    /// The member's right to write its log, as gossip has it, base64.
    pub log_certificate: String,
    /// And that of its machines. Empty in what was issued before there was such.
    #[serde(default)]
    pub machines_log_certificate: String,
}

impl Authority {
    /// Reads it, or makes it at the first start.
    pub fn load_or_create(dir: &Path, now_ms: u64) -> Result<Self, MemberError> {
        let path = dir.join("authority.json");
        if let Some(saved) = private_file::<Saved>(&path)? {
            let key = |text: &str| member::bytes_32(text).map(|bytes| SigningKey::from_bytes(&bytes));
            let keys = key(&saved.gossip_key).zip(key(&saved.config_key));
            let (gossip, config) = keys.ok_or(MemberError::Damaged { path, why: "a key has not 32 bytes".into() })?;
            return Ok(Self { gossip, config, ca_pem: saved.ca_pem, ca_key_pem: saved.ca_key_pem });
        }
        let (ca_pem, ca_key_pem) = create_ca(now_ms)?;
        let (gossip, config) = (SigningKey::from_bytes(&member::random()), SigningKey::from_bytes(&member::random()));
        let saved = Saved {
            gossip_key: hex::encode(gossip.to_bytes()),
            config_key: hex::encode(config.to_bytes()),
            ca_pem: ca_pem.clone(),
            ca_key_pem: ca_key_pem.clone(),
        };
        member::write_private(&path, &saved)?;
        Ok(Self { gossip, config, ca_pem, ca_key_pem })
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// By what a new host knows the authority: SHA-256 of its certificate.
    pub fn ca_sha256(&self) -> Result<[u8; 32], MemberError> {
        sha256_of(&self.ca_pem).ok_or(MemberError::BadKey("the authority's certificate is not PEM"))
    }

    pub(crate) fn gossip_key(&self) -> &SigningKey {
        &self.gossip
    }

    /// Whether it has issued this.
    pub(crate) fn has_issued(&self, issued: &Issued) -> bool {
        issued.ca_pem == self.ca_pem && issued.cluster_key == hex::encode(self.gossip.verifying_key().to_bytes())
    }

    /// Certifies a host's keys. The epoch is higher with every new set of keys of the same host.
    pub fn issue(&self, host: &HostId, region: &Region, epoch: u32, keys: &PublicKeys, now_ms: u64) -> Result<Issued, MemberError> {
        let gossip = member::bytes_32(&keys.gossip).and_then(|bytes| VerifyingKey::from_bytes(&bytes).ok());
        let gossip = gossip.ok_or(MemberError::BadKey("the key for gossip is not an Ed25519 public key"))?;
        let certify = |name, scope| {
            let subject = Subject { name, epoch, key: gossip, region: region_of(region), scope };
            member::base64(&Certificate::issue(&self.gossip, &subject).to_bytes())
        };
        Ok(Issued {
            ca_pem: self.ca_pem.clone(),
            certificate_pem: self.leaf(host, &keys.tls, now_ms)?,
            not_after_ms: now_ms + LEAF_VALID.as_millis() as u64,
            cluster_key: hex::encode(self.gossip.verifying_key().to_bytes()),
            log_certificate: certify(log_name(host), Scope::Global),
            machines_log_certificate: certify(machines_log_name(host), Scope::Region),
        })
    }

    /// What a control process writes desired state with: its log, in the epoch that is the store's incarnation.
    pub fn config_log(&self, region: &Region, incarnation: u64) -> (Certificate, SigningKey) {
        let name = Name::new(CONFIG_LOG).expect("it is short");
        let epoch = u32::try_from(incarnation).unwrap_or(u32::MAX);
        let key = self.config.verifying_key();
        let subject = Subject { name, epoch, key, region: region_of(region), scope: Scope::Global };
        (Certificate::issue(&self.gossip, &subject), self.config.clone())
    }

    fn leaf(&self, host: &HostId, tls_key: &str, now_ms: u64) -> Result<String, MemberError> {
        let der = member::from_base64(tls_key).ok_or(MemberError::BadKey("the key for TLS is not base64"))?;
        let key = SubjectPublicKeyInfo::from_der(&der).map_err(|_| MemberError::BadKey("the key for TLS is not a public key"))?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca_pem, KeyPair::from_pem(&self.ca_key_pem)?)?;
        let mut params = CertificateParams::new([tls_name(host)])?;
        params.distinguished_name = common_name(host.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now_ms, LEAF_VALID);
        Ok(params.signed_by(&key, &issuer)?.pem())
    }
}

/// Of a certificate.
pub(crate) fn sha256_of(pem: &str) -> Option<[u8; 32]> {
    CertificateDer::from_pem_slice(pem.as_bytes()).ok().map(|der| Sha256::digest(&der).into())
}

pub(crate) fn region_of(region: &Region) -> GossipRegion {
    GossipRegion::new(region.as_str()).expect("a region's name is shorter than gossip allows")
}

fn create_ca(now_ms: u64) -> Result<(String, String), MemberError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("Dunlin cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let permitted_subtrees = vec![GeneralSubtree::DnsName(HOSTS_DOMAIN.into())];
    params.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: vec![] });
    set_validity(&mut params, now_ms, CA_VALID);
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, now_ms: u64, valid_for: Duration) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(now_ms);
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + valid_for).into();
}
