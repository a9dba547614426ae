//! Rows of the store: what should exist, and in which version. Control is their only writer.
//!
//! Keys: `apps/<app>`, `releases/<app>/<number, 10 digits>`, `machines/<id>`, `tombstones/<id>`,
//! `secrets/<app>/<NAME>`, `secrets_version/<app>`, `plans/<app>`, `hosts/<id>`,
//! `removed_hosts/<id>`, `certificates/<name>`, `addresses/<ipv4>`, `volumes/<id>`, `volume_tombstones/<id>`; control's own: `progress/<app>`, `events/<app>/<number>`,
//! `secrets_sets/<app>/<version, 20 digits>`, `revoked/<token id>`, `configs/<machine id>`, `launches/<machine id>`,
//! `host_tokens/<id>`, `members/<host>`.

use crate::config::AppConfig;
use crate::{AppName, Generation, HostId, ImageRef, MachineId, MachineSpec, OrgName, Region, Zone};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

/// An app: a namespace of machines with one current release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AppRow {
    pub name: AppName,
    pub org: OrgName,
    pub created_at_ms: u64,
    /// The release that should run; 0 before the first deploy.
    pub current_release: u32,
    /// The newest release that reached every machine and stayed healthy; 0 = none.
    pub last_good_release: u32,
    /// Machines wanted in each process group; a missing group means one.
    #[serde(default)]
    pub scale: BTreeMap<String, u32>,
    /// Its machines are being destroyed, then the app itself; nothing new is taken.
    #[serde(default)]
    pub destroying: bool,
}

/// One immutable app version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReleaseRow {
    pub app: AppName,
    pub number: u32,
    pub image: ImageRef,
    pub config: AppConfig,
    pub secrets_version: u64,
    /// The app's `scale` when it was made: a return to this release returns to it, too.
    #[serde(default)]
    pub scale: BTreeMap<String, u32>,
    pub created_at_ms: u64,
    pub status: ReleaseStatus,
    /// Why it failed, or what it is for (`rollback to v3`, `secrets set`).
    #[serde(default)]
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseStatus {
    /// Written, its plan is not finished.
    Running,
    Succeeded,
    /// It failed and nothing could be or had to be returned to.
    Failed,
    /// It failed and the last good release runs again.
    RolledBack,
    /// A newer release took over before it was finished.
    Superseded,
}

/// Existence and assignment of a machine, and the version that it should be in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineRow {
    pub id: MachineId,
    pub name: String,
    pub host: HostId,
    pub region: Region,
    pub address: Ipv4Addr,
    /// Of the transaction that assigned it to this host. Filled with the transaction's revision by
    /// readers when `revision` is 0 (the revision is not known before the commit).
    pub placement: Generation,
    pub created_at_ms: u64,
    pub spec: MachineSpec,
}

/// Written when a machine is destroyed; the only thing that lets a host destroy it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TombstoneRow {
    pub machine: MachineId,
    pub host: HostId,
    pub app: AppName,
    pub address: Ipv4Addr,
    pub at_ms: u64,
    #[serde(default)]
    pub reason: TombstoneReason,
}

/// Why a machine is destroyed. A host obeys many tombstones of plans at once only after an operator has looked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TombstoneReason {
    /// A plan replaces it, or its app needs fewer.
    #[default]
    Plan,
    /// A person destroyed it, or its app, or wanted it destroyed once its run has ended.
    Person,
    /// Its host was lost, and another machine took its place. Should the host return, it is not asked about each of them.
    HostLost,
}

/// One secret of an app, sealed to the master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretRow {
    pub app: AppName,
    pub name: String,
    /// Envelope made by [`crate::seal`], base64.
    pub sealed: String,
    /// First 16 hexadecimal digits of a keyed digest: tells equal from changed, reveals nothing.
    pub digest: String,
    pub version: u64,
    pub created_at_ms: u64,
    pub updated_at_ms: u64,
}

/// A server that machines can be placed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRow {
    pub id: HostId,
    pub region: Region,
    /// Machines get their addresses from this block.
    pub prefix: Ipv4Prefix,
    /// X25519 public key, base64: secrets are sealed to it.
    pub public_key: String,
    pub cpus: u32,
    pub memory_mb: u32,
    /// None: it is in the zone of those of its region that name none, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Zone>,
    /// What an operator says of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// By an operator: it gets no new machine, and keeps those that it has. Not for the host itself to say.
    #[serde(default)]
    pub cordoned: bool,
    /// By an operator: its machines move to other hosts, those that can. It is cordoned, too.
    #[serde(default)]
    pub draining: bool,
    /// 0: before this was kept.
    #[serde(default)]
    pub joined_at_ms: u64,
}

/// Of one host.
pub const HOST_LABELS_MAX: usize = 16;
const LABEL_BYTES_MAX: usize = 63;

/// Whether this may be the key or the value of a host's label.
pub fn is_host_label(text: &str) -> bool {
    (1..=LABEL_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// A block of IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv4Prefix {
    pub network: Ipv4Addr,
    pub length: u8,
}

impl fmt::Display for Ipv4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

impl Ipv4Prefix {
    /// Whether machines of a host may have addresses of it: private, of at least a /24, and written by its first address.
    pub fn is_for_machines(&self) -> bool {
        let is_sized = (8..=24).contains(&self.length);
        is_sized && u32::from(self.network) & !self.mask() == 0 && self.network.is_private()
    }

    /// Whether some address is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let mask = self.mask() & other.mask();
        u32::from(self.network) & mask == u32::from(other.network) & mask
    }

    fn mask(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.length.min(32))).unwrap_or(0)
    }

    /// The `n`th address for a machine, `None` past the last. Network and broadcast are not given out, and the
    /// end of the block is the builders'.
    pub fn nth(&self, n: u32) -> Option<Ipv4Addr> {
        let machines = self.usable() - self.builders();
        (u64::from(n) < machines).then(|| self.usable_at(u64::from(n)))
    }

    /// The `n`th address for a builder machine, from the end of the block.
    pub fn nth_builder(&self, n: u32) -> Option<Ipv4Addr> {
        (u64::from(n) < self.builders()).then(|| self.usable_at(self.usable() - 1 - u64::from(n)))
    }

    fn usable(&self) -> u64 {
        (1u64 << (32 - u32::from(self.length.min(32)))).saturating_sub(2)
    }

    /// One an organization that builds on the host at once; a small block keeps three quarters for machines.
    fn builders(&self) -> u64 {
        const MOST: u64 = 64;
        (self.usable() / 4).min(MOST)
    }

    fn usable_at(&self, n: u64) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + 1 + n as u32)
    }
}

/// A served certificate; the key is sealed to the edge's host key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRow {
    /// Host names, wildcards allowed (`*.localhost`).
    pub names: Vec<String>,
    pub chain_pem: String,
    /// PKCS#8 PEM, sealed by [`crate::seal`], base64.
    pub sealed_key: String,
    /// The same, sealed to each host's key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sealed: BTreeMap<HostId, String>,
    pub not_after_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_of_before_there_were_zones_is_still_read() {
        let old = r#"{"id":"h1","region":"local","prefix":{"network":"10.201.0.0","length":16},"public_key":"","cpus":2,"memory_mb":4096}"#;
        let row: HostRow = serde_json::from_str(old).unwrap();
        assert_eq!((row.zone, row.labels.len(), row.cordoned), (None, 0, false));
        assert_eq!((row.draining, row.joined_at_ms), (false, 0));
    }

    #[test]
    fn blocks_overlap_where_one_is_in_the_other() {
        let block = |text: &str| {
            let (network, length) = text.split_once('/').unwrap();
            Ipv4Prefix { network: network.parse().unwrap(), length: length.parse().unwrap() }
        };
        for (one, other, expected) in [
            ("10.201.0.0/16", "10.201.16.0/20", true),
            ("10.208.0.0/20", "10.208.16.0/20", false),
            ("10.208.0.0/12", "10.223.240.0/20", true),
            ("10.208.0.0/12", "10.224.0.0/20", false),
            ("0.0.0.0/0", "10.0.0.0/8", true),
            ("10.0.0.1/32", "10.0.0.2/32", false),
        ] {
            assert_eq!(block(one).overlaps(&block(other)), expected, "{one} {other}");
            assert_eq!(block(other).overlaps(&block(one)), expected, "{other} {one}");
            assert!(block(one).overlaps(&block(one)));
        }
        for (text, expected) in [("10.201.0.0/16", true), ("10.201.1.0/16", false), ("8.8.8.0/24", false), ("10.0.0.0/25", false), ("0.0.0.0/0", false)] {
            assert_eq!(block(text).is_for_machines(), expected, "{text}");
        }
    }

    #[test]
    fn machines_and_builders_never_get_the_same_address() {
        for (length, machines, builders) in [(16, 65_470, 64), (24, 191, 63), (28, 11, 3), (30, 2, 0), (32, 0, 0)] {
            let prefix = Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length };
            let of_machines: Vec<_> = (0..).map_while(|n| prefix.nth(n)).collect();
            let of_builders: Vec<_> = (0..).map_while(|n| prefix.nth_builder(n)).collect();
            assert_eq!((of_machines.len(), of_builders.len()), (machines, builders), "/{length}");
            assert!(of_builders.iter().all(|address| !of_machines.contains(address)), "/{length}");
            assert!(!of_machines.contains(&prefix.network), "/{length}");
        }
        let prefix = Ipv4Prefix { network: "10.201.0.0".parse().unwrap(), length: 16 };
        assert_eq!(prefix.nth(0), Some("10.201.0.1".parse().unwrap()));
        assert_eq!(prefix.nth_builder(0), Some("10.201.255.254".parse().unwrap()));
    }
}
