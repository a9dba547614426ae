//! Who a host is in its cluster, on its disk: `<data>/cluster/member.json`, 0600, whole or not there.

use crate::authority::{Authority, Issued, LEAF_VALID, PublicKeys, RENEWED_AFTER};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dunlin_gossip::Certificate;
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::{HostId, Region, Zone};
use ed25519_dalek::{SigningKey, VerifyingKey};
use rcgen::{KeyPair, PublicKeyData};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    #[error("{} cannot be {verb}", .path.display())]
    Io { path: PathBuf, verb: &'static str, source: std::io::Error },
    #[error("{} may be read by others (mode {mode:o}): `chmod 600` it, and let the host join anew if they did", .path.display())]
    TooOpen { path: PathBuf, mode: u32 },
    #[error("{} is damaged ({why}): restore it from a backup, or let the host leave and join anew", .path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("{0}")]
    BadKey(&'static str),
    #[error("a certificate cannot be made")]
    Make(#[from] rcgen::Error),
}

/// The private keys of a host, made by itself; they never leave it.
#[derive(Clone, Serialize, Deserialize)]
pub struct MemberKeys {
    /// PKCS#8 PEM.
    tls: String,
    /// Ed25519, hexadecimal.
    gossip: String,
}

/// The host that control runs on, as its settings have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlHost {
    pub host: HostId,
    pub region: Region,
    pub domain: String,
    pub machine_prefix: Ipv4Prefix,
}

/// What an operator said of a host when it joined; the settings of its server go before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Where it listens for the others, and where they reach that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Control was restored on it: it has control, and is who it was told to be when it joined.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub controls: bool,
}

/// A host as a member of its cluster.
#[derive(Clone, Serialize, Deserialize)]
pub struct Member {
    pub host: HostId,
    pub region: Region,
    pub epoch: u32,
    /// Apps are served as `<app>.<domain>`.
    pub domain: String,
    /// Its machines' addresses.
    pub machine_prefix: Ipv4Prefix,
    /// The host that control runs on.
    pub control: HostId,
    /// Where to begin: addresses of members, as they were when this one joined.
    pub peers: Vec<(HostId, SocketAddr)>,
    #[serde(default)]
    pub said: Said,
    pub keys: MemberKeys,
    pub issued: Issued,
}

impl MemberKeys {
    pub fn generate() -> Result<Self, MemberError> {
        let tls = KeyPair::generate()?;
        Ok(Self { tls: tls.serialize_pem(), gossip: hex::encode(random::<32>()) })
    }

    /// Those of a host that is about to join. They stay until it has: an answer that was lost is asked for again with the
    /// same keys.
    pub fn to_join_with(dir: &Path) -> Result<Self, MemberError> {
        let path = Self::path_until_joined(dir);
        if let Some(keys) = private_file(&path)? {
            return Ok(keys);
        }
        let keys = Self::generate()?;
        write_private(&path, &keys)?;
        Ok(keys)
    }

    fn path_until_joined(dir: &Path) -> PathBuf {
        dir.join("joining.json")
    }

    pub fn public(&self) -> Result<PublicKeys, MemberError> {
        let tls = KeyPair::from_pem(&self.tls)?;
        Ok(PublicKeys { tls: base64(&tls.subject_public_key_info()), gossip: hex::encode(self.gossip()?.verifying_key().to_bytes()) })
    }

    pub(crate) fn tls_pem(&self) -> &str {
        &self.tls
    }

    /// By which the others know that this host has ended a connection that it does not remember.
    pub(crate) fn reset_key(&self) -> Result<[u8; 32], MemberError> {
        Ok(blake3::derive_key("dunlin cluster 1 connection resets", self.gossip()?.as_bytes()))
    }

    pub fn gossip(&self) -> Result<SigningKey, MemberError> {
        let key = bytes_32(&self.gossip).ok_or(MemberError::BadKey("the private key for gossip has not 32 bytes"))?;
        Ok(SigningKey::from_bytes(&key))
    }
}

impl Member {
    /// `None`: this host has not joined a cluster.
    pub fn load(dir: &Path) -> Result<Option<Self>, MemberError> {
        private_file(&Self::path(dir))
    }

    pub fn save(&self, dir: &Path) -> Result<(), MemberError> {
        write_private(&Self::path(dir), self)?;
        match fs::remove_file(MemberKeys::path_until_joined(dir)) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(MemberError::Io { path: MemberKeys::path_until_joined(dir), verb: "removed", source })
            }
            _ => Ok(()),
        }
    }

    /// The host leaves: its keys are gone, and before them what it knew of the cluster.
    pub fn forget(dir: &Path) -> Result<(), MemberError> {
        let io = |source| MemberError::Io { path: Self::path(dir), verb: "removed", source };
        crate::flock::forget(dir).map_err(io)?;
        match fs::remove_file(crate::RemovalNotice::path(dir)) {
            Err(source) if source.kind() != ErrorKind::NotFound => return Err(io(source)),
            _ => {}
        }
        fs::remove_file(Self::path(dir)).map_err(io)?;
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
    }

    /// Control's own host, which needs no token. What it has is kept and renewed; where it was another host or region, or
    /// its file is gone, it begins anew.
    pub fn of_control(dir: &Path, authority: &Authority, of: &ControlHost, now_ms: u64) -> Result<Self, MemberError> {
        let is_of_it = |kept: &Self| kept.host == of.host && kept.region == of.region && authority.has_issued(&kept.issued);
        let kept = Self::load(dir)?.filter(is_of_it);
        let is_same = |kept: &Self| kept.domain == of.domain && kept.machine_prefix == of.machine_prefix && kept.control == of.host;
        if let Some(kept) = &kept
            && is_same(kept)
            && !kept.is_due(now_ms)
        {
            return Ok(kept.clone());
        }
        let (keys, epoch, peers, said) = match kept {
            Some(kept) => (kept.keys, kept.epoch, kept.peers, kept.said),
            // Later than every epoch that it has had, also those that nothing on this disk tells of.
            None => (MemberKeys::generate()?, u32::try_from(now_ms / 1000).unwrap_or(u32::MAX), vec![], Said::default()),
        };
        let member = Self {
            issued: authority.issue(&of.host, &of.region, epoch, &keys.public()?, now_ms)?,
            host: of.host.clone(),
            region: of.region.clone(),
            epoch,
            domain: of.domain.clone(),
            machine_prefix: of.machine_prefix,
            control: of.host.clone(),
            peers,
            said,
            keys,
        };
        member.save(dir)?;
        Ok(member)
    }

    /// Its certificate is a month old, or it has not all that members have now.
    pub fn is_due(&self, now_ms: u64) -> bool {
        if self.lacks_logs() {
            return true;
        }
        let left_ms = (LEAF_VALID - RENEWED_AFTER).as_millis() as u64;
        self.issued.not_after_ms.saturating_sub(now_ms) <= left_ms
    }

    /// Since when the others refuse its certificate.
    pub fn ended_ms_ago(&self, now_ms: u64) -> Option<u64> {
        now_ms.checked_sub(self.issued.not_after_ms)
    }

    /// It was issued for before there was a log of machines, and cannot take part without.
    pub fn lacks_logs(&self) -> bool {
        self.issued.machines_log_certificate.is_empty()
    }

    pub fn path(dir: &Path) -> PathBuf {
        dir.join("member.json")
    }

    /// By what the host knows its cluster's authority.
    pub fn ca_sha256(&self) -> Result<[u8; 32], MemberError> {
        crate::authority::sha256_of(&self.issued.ca_pem).ok_or(MemberError::BadKey("the authority's certificate is not PEM"))
    }

    pub fn cluster_key(&self) -> Result<VerifyingKey, MemberError> {
        let key = bytes_32(&self.issued.cluster_key).and_then(|bytes| VerifyingKey::from_bytes(&bytes).ok());
        key.ok_or(MemberError::BadKey("the cluster's key is not an Ed25519 public key"))
    }

    pub fn log_certificate(&self) -> Result<Certificate, MemberError> {
        certificate(&self.issued.log_certificate)
    }

    pub(crate) fn machines_log_certificate(&self) -> Result<Certificate, MemberError> {
        certificate(&self.issued.machines_log_certificate)
    }
}

fn certificate(text: &str) -> Result<Certificate, MemberError> {
    let certificate = from_base64(text).and_then(|bytes| Certificate::from_bytes(&bytes).ok());
    certificate.ok_or(MemberError::BadKey("the certificate of a log of the host's cannot be read: let it leave and join anew"))
}

/// Reads a file that nobody but root may read; `None` if there is none.
pub(crate) fn private_file<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, MemberError> {
    let io = |verb| move |source| MemberError::Io { path: path.to_owned(), verb, source };
    let bytes = match fs::read(path) {
        Ok(bytes) => zeroize::Zeroizing::new(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read")(error)),
    };
    let mode = fs::metadata(path).map_err(io("read"))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(MemberError::TooOpen { path: path.to_owned(), mode });
    }
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| MemberError::Damaged { path: path.to_owned(), why: error.to_string() })
}

/// Whole or not at all, and on disk.
pub(crate) fn write_private<T: Serialize>(path: &Path, value: &T) -> Result<(), MemberError> {
    let io = |source| MemberError::Io { path: path.to_owned(), verb: "written", source };
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    let bytes = zeroize::Zeroizing::new(serde_json::to_vec_pretty(value).expect("plain data"));
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial).map_err(io)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&partial, path).map_err(io)?;
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
}

pub(crate) fn bytes_32(text: &str) -> Option<[u8; 32]> {
    hex::decode(text).ok()?.try_into().ok()
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

pub(crate) fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// Milliseconds since 1970, by this host's clock.
pub(crate) fn now_ms() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64)
}

/// Fresh random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn a_member_is_issued_for_kept_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let now_ms = 1_800_000_000_000;
        let made = Authority::load_or_create(&dir.path().join("control/cluster"), now_ms).unwrap();
        let authority = Authority::load_or_create(&dir.path().join("control/cluster"), now_ms).unwrap();
        assert_eq!(made.ca_pem(), authority.ca_pem());
        let keys = MemberKeys::generate().unwrap();
        let (host, region): (HostId, Region) = ("h2".parse().unwrap(), "fra".parse().unwrap());
        let issued = authority.issue(&host, &region, 1, &keys.public().unwrap(), now_ms).unwrap();
        let machine_prefix = Ipv4Prefix { network: "10.202.0.0".parse().unwrap(), length: 16 };
        let (control, peers) = ("h1".parse().unwrap(), vec![]);
        let member = Member { host, region, epoch: 1, domain: "localhost".into(), machine_prefix, control, peers, said: Said::default(), keys, issued };
        member.save(&dir.path().join("cluster")).unwrap();
        let read = Member::load(&dir.path().join("cluster")).unwrap().unwrap();
        assert!(read.log_certificate().unwrap().verify(&read.cluster_key().unwrap()));
        assert_eq!(read.log_certificate().unwrap().key, read.keys.gossip().unwrap().verifying_key());
        assert!(Member::load(dir.path()).unwrap().is_none());
        Member::forget(&dir.path().join("cluster")).unwrap();
        assert!(Member::load(&dir.path().join("cluster")).unwrap().is_none());
        read.save(&dir.path().join("cluster")).unwrap();
        fs::set_permissions(Member::path(&dir.path().join("cluster")), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Member::load(&dir.path().join("cluster")), Err(MemberError::TooOpen { .. })));
    }

    #[test]
    fn keys_to_join_with_stay_until_the_host_has_joined() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("cluster");
        let keys = MemberKeys::to_join_with(&dir).unwrap();
        assert_eq!(MemberKeys::to_join_with(&dir).unwrap().public().unwrap(), keys.public().unwrap());
        let authority = Authority::load_or_create(&dir.join("control"), 0).unwrap();
        Member::of_control(&dir, &authority, &control_host("h1", "fra"), 0).unwrap();
        assert_ne!(MemberKeys::to_join_with(&dir).unwrap().public().unwrap(), keys.public().unwrap());
    }

    fn control_host(host: &str, region: &str) -> ControlHost {
        ControlHost {
            host: host.parse().unwrap(),
            region: region.parse().unwrap(),
            domain: "localhost".into(),
            machine_prefix: Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 16 },
        }
    }

    #[test]
    fn the_host_of_control_keeps_what_it_has_renews_it_and_begins_anew_as_another() {
        let dir = tempfile::tempdir().unwrap();
        let (control, dir) = (dir.path().join("control"), dir.path().join("cluster"));
        let start_ms = 1_800_000_000_000;
        let authority = Authority::load_or_create(&control, start_ms).unwrap();
        let of_control = |of: &ControlHost, now_ms| Member::of_control(&dir, &authority, of, now_ms).unwrap();
        let at_first = of_control(&control_host("h1", "fra"), start_ms);
        assert_eq!(of_control(&control_host("h1", "fra"), start_ms + 1).issued, at_first.issued);
        let late_ms = start_ms + RENEWED_AFTER.as_millis() as u64 + 1;
        let renewed = of_control(&control_host("h1", "fra"), late_ms);
        assert!(renewed.issued.not_after_ms > at_first.issued.not_after_ms);
        assert_eq!((renewed.epoch, renewed.keys.public().unwrap()), (at_first.epoch, at_first.keys.public().unwrap()));
        assert_eq!(renewed.issued.log_certificate, at_first.issued.log_certificate, "one right to one log");
        // What an earlier version has written gets what it lacks.
        let mut before = renewed.clone();
        before.issued.machines_log_certificate.clear();
        before.save(&dir).unwrap();
        assert_eq!(of_control(&control_host("h1", "fra"), late_ms + 1).issued.machines_log_certificate, at_first.issued.machines_log_certificate);
        for elsewhere in [control_host("h1", "ams"), control_host("h9", "ams")] {
            let anew = of_control(&elsewhere, late_ms);
            assert!(anew.epoch > at_first.epoch);
            assert_ne!(anew.keys.public().unwrap(), at_first.keys.public().unwrap());
            assert_eq!(Member::load(&dir).unwrap().unwrap().host, elsewhere.host);
        }
    }
}
