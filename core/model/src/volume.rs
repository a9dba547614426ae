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
    /// A snapshot a day. Volumes of before there were such have none.
    #[serde(default)]
    pub auto_backup: bool,
    /// On the disk of its host, from when it was made.
    #[serde(default)]
    pub encrypted: bool,
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
    #[serde(default, flatten, skip_serializing_if = "Option::is_none")]
    pub extend: Option<AutoExtend>,
}

/// When a volume grows by itself: as long as a machine has it that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoExtend {
    /// Of what can be written to it; see [`EXTEND_PERCENT`].
    #[serde(rename = "extend_threshold_percent")]
    pub percent: u32,
    #[serde(rename = "add_size_gb")]
    pub add_gb: u32,
    /// It never grows beyond it.
    #[serde(rename = "size_gb_limit")]
    pub limit_gb: u32,
}

/// Below it a volume would grow for nothing, at 100 too late.
pub const EXTEND_PERCENT: std::ops::RangeInclusive<u32> = 50..=99;

impl AutoExtend {
    /// As a machine's mount has it: all three or none. An error says what is wrong with which.
    pub fn read(percent: Option<u32>, add_gb: Option<u32>, limit_gb: Option<u32>) -> Result<Option<Self>, (&'static str, String)> {
        // Fly's clients send zeroes for what was not asked for.
        let given = |value: Option<u32>| value.filter(|value| *value != 0);
        let (percent, add_gb, limit_gb) = match (given(percent), given(add_gb), given(limit_gb)) {
            (None, None, None) => return Ok(None),
            (Some(percent), Some(add_gb), Some(limit_gb)) => (percent, add_gb, limit_gb),
            (None, ..) => return Err(("extend_threshold_percent", "it belongs to add_size_gb and size_gb_limit".into())),
            (_, None, _) => return Err(("add_size_gb", "it belongs to extend_threshold_percent".into())),
            (_, _, None) => return Err(("size_gb_limit", "without a limit a program that fills its volume would take the whole disk".into())),
        };
        if !EXTEND_PERCENT.contains(&percent) {
            return Err(("extend_threshold_percent", format!("it must be from {} to {}", EXTEND_PERCENT.start(), EXTEND_PERCENT.end())));
        }
        for (name, gb) in [("add_size_gb", add_gb), ("size_gb_limit", limit_gb)] {
            if !(SIZE_MIN_GB..=SIZE_MAX_GB).contains(&gb) {
                return Err((name, format!("it must be from {SIZE_MIN_GB} to {SIZE_MAX_GB}")));
            }
        }
        Ok(Some(Self { percent, add_gb, limit_gb }))
    }

    /// The size that a volume should have which is so full; `None`: that which it has.
    pub fn wants(&self, size_gb: u32, used: u64, of: u64) -> Option<u32> {
        let is_full = of > 0 && used.saturating_mul(100) >= of.saturating_mul(u64::from(self.percent));
        let larger = size_gb.saturating_add(self.add_gb).min(self.limit_gb);
        (is_full && larger > size_gb).then_some(larger)
    }
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
        let row = serde_json::from_str::<VolumeRow>(row).unwrap();
        assert_eq!((row.snapshot_retention, row.auto_backup, row.encrypted), (5, false, false));
        let mount = r#"{"volume":"vol_abababababababab","name":"data","path":"/data"}"#;
        let mount = serde_json::from_str::<Mount>(mount).unwrap();
        assert_eq!(mount.extend, None);
        let extend = Some(AutoExtend { percent: 80, add_gb: 1, limit_gb: 5 });
        let text = serde_json::to_string(&Mount { extend, ..mount.clone() }).unwrap();
        assert_eq!(serde_json::from_str::<Mount>(&text).unwrap().extend, extend);
    }

    #[test]
    fn a_volume_grows_when_it_is_full_and_up_to_its_limit() {
        let extend = AutoExtend::read(Some(80), Some(3), Some(10)).unwrap().unwrap();
        for (size_gb, used, of, expected) in [
            (1, 79, 100, None),
            (1, 80, 100, Some(4)),
            (8, 100, 100, Some(10)),
            (10, 100, 100, None),
            (12, 100, 100, None),
            (1, 0, 0, None),
        ] {
            assert_eq!(extend.wants(size_gb, used, of), expected, "{size_gb} GB, {used} of {of}");
        }
        assert_eq!(AutoExtend::read(None, Some(0), None), Ok(None));
        for (percent, add, limit, named) in [
            (Some(80), Some(1), None, "size_gb_limit"),
            (Some(80), None, Some(9), "add_size_gb"),
            (None, Some(1), Some(9), "extend_threshold_percent"),
            (Some(30), Some(1), Some(9), "extend_threshold_percent"),
            (Some(80), Some(1), Some(100_000), "size_gb_limit"),
        ] {
            assert_eq!(AutoExtend::read(percent, add, limit).unwrap_err().0, named);
        }
    }
}
