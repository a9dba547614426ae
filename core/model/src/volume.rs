//! Volumes: files of an app that outlive its machines, on one host, in one machine at a time.

use crate::{AppName, HostId, OrgName, Region, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

pub const SIZE_MIN_GB: u32 = 1;
/// What ext4 in one file takes with usual options.
pub const SIZE_MAX_GB: u32 = 8 << 10;
/// Of a volume that a configuration or a command does not size.
pub const SIZE_DEFAULT_GB: u32 = 1;
/// Days.
pub const SNAPSHOT_RETENTION: std::ops::RangeInclusive<u32> = 1..=60;
pub const SNAPSHOT_RETENTION_DEFAULT: u32 = 5;
/// Longest path of a mount.
const PATH_MAX: usize = 255;
/// The platform mounts there itself, and would hide what is below.
const TAKEN: &[&str] = &["/proc", "/sys", "/dev", "/.fly"];

/// `volumes/<id>`: existence and assignment of a volume. Which machine has it is in the machines' specs; whoever writes
/// it into one writes this row again in the same transaction, so that two cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRow {
    pub id: VolumeId,
    /// Several volumes of an app may have one name: a process group's machines have one each.
    pub name: String,
    pub org: OrgName,
    pub app: AppName,
    pub host: HostId,
    pub region: Region,
    /// Grows, never shrinks.
    pub size_gb: u32,
    pub created_at_ms: u64,
    #[serde(default = "default_retention")]
    pub snapshot_retention: u32,
    /// What it begins with; without one it begins empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
}

fn default_retention() -> u32 {
    SNAPSHOT_RETENTION_DEFAULT
}

/// What a volume begins as a copy of, on the same host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSource {
    pub volume: VolumeId,
    /// `None`: the volume as it is in that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
}

/// `volume_tombstones/<id>`: the only thing that lets a host remove a volume's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeTombstoneRow {
    pub volume: VolumeId,
    pub host: HostId,
    pub app: AppName,
    pub at_ms: u64,
}

/// A volume in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub volume: VolumeId,
    /// The volume's name, by which a release finds it again.
    pub name: String,
    /// Where it is in the machine; see [`mount_path`].
    pub path: String,
}

/// Why a path is not one that a volume can be mounted at.
pub fn mount_path(path: &str) -> Result<(), &'static str> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if !path.starts_with('/') || path.len() > PATH_MAX || path.contains(['\0', '\n']) {
        return Err("a mount's destination is an absolute path of at most 255 bytes");
    }
    if parts.is_empty() {
        return Err("a volume cannot be the machine's root; give it a directory of its own, for example /data");
    }
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err("a mount's destination has no . and no .. in it");
    }
    let top = format!("/{}", parts[0]);
    if TAKEN.contains(&top.as_str()) {
        return Err("/proc, /sys, /dev and /.fly are the platform's; choose another directory, for example /data");
    }
    Ok(())
}

/// Fly's rule.
pub fn is_volume_name(name: &str) -> bool {
    (1..=30).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

pub const VOLUME_NAME_RULE: &str = "a volume's name has 1 to 30 lower-case letters, digits and underscores";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_hides_nothing_of_the_platforms() {
        for good in ["/data", "/var/lib/postgresql/data", "/data/"] {
            assert_eq!(mount_path(good), Ok(()), "{good}");
        }
        for bad in ["", "/", "//", "data", "/a/../etc", "/proc", "/dev/shm", "/sys/x", "/a\0b"] {
            assert!(mount_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_have_their_prefix() {
        let id = VolumeId::from_random([0xab; 8]);
        assert_eq!(id.as_str(), "vol_abababababababab");
        assert!(id.as_str().parse::<VolumeId>().is_ok() && id.as_str().parse::<SnapshotId>().is_err());
        assert!("vol_../../../../etc0".parse::<VolumeId>().is_err());
    }

    #[test]
    fn rows_of_earlier_versions_are_understood() {
        let row = r#"{"id":"vol_abababababababab","name":"data","org":"personal","app":"web","host":"h1",
            "region":"local","size_gb":1,"created_at_ms":0}"#;
        assert_eq!(serde_json::from_str::<VolumeRow>(row).unwrap().snapshot_retention, 5);
    }
}
