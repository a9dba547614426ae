//! What a machine writes to beside its volumes: its root file system and temporary directories.

use serde::{Deserialize, Serialize};

/// Of a root file system's writable layer.
pub const ROOTFS_GB: std::ops::RangeInclusive<u32> = 1..=100;
/// Of one that nobody sizes.
pub const ROOTFS_DEFAULT_GB: u32 = 8;
/// Of a temporary directory.
pub const TEMP_DIR_MB: std::ops::RangeInclusive<u32> = 16..=100 * 1024;
/// Temporary directories of one machine.
pub const MAX_TEMP_DIRS: usize = 8;

/// The writable layer of a machine's root file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRootfs {
    /// 0: as its host is set.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size_gb: u32,
    #[serde(default)]
    pub persist: Persist,
}

impl MachineRootfs {
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// How long what a machine wrote to its root file system is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Persist {
    /// Each start begins with the image.
    #[default]
    Never,
    /// Starts do not change it, a new version of the machine does.
    Restart,
    /// A new version does not change it either; its image comes below it.
    Always,
}

impl Persist {
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "never" | "none" => Some(Self::Never),
            "restart" => Some(Self::Restart),
            "always" => Some(Self::Always),
            _ => None,
        }
    }
}

/// A directory that is empty at each start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TempDir {
    pub name: String,
    /// Where it is in the machine; see [`crate::volume::mount_path`]. Empty: only a container says.
    pub path: String,
    pub storage: TempStorage,
    pub size_mb: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TempStorage {
    Disk,
    /// Counts as the machine's memory.
    Memory,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}
