//! Volumes and snapshots over HTTP, as the Machines API has them.
//!
//! - `GET|POST /v1/apps/{app}/volumes` -> `Vec<Volume>`, [`CreateVolume`] -> [`Volume`]
//! - `GET|PUT|DELETE /v1/apps/{app}/volumes/{id}` -> [`Volume`]; PUT takes [`UpdateVolume`]
//! - `PUT /v1/apps/{app}/volumes/{id}/extend` [`ExtendVolume`] -> [`Extended`]
//! - `GET|POST /v1/apps/{app}/volumes/{id}/snapshots` -> `Vec<Snapshot>`, [`Snapshot`]

use dunlin_model::volume::VolumeRow;
use dunlin_model::{MachineId, Region, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::{VolumeSnapshot, VolumeStatus};

/// What is not known is refused: a wish that is dropped in silence may be the one that mattered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CreateVolume {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Region>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_gb: Option<u32>,
    /// `None`: where the host can, and a copy as what it is of; `true` is refused by a host that cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// Only `ext4`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fstype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_volume_id: Option<VolumeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_retention: Option<u32>,
    /// A snapshot a day; `None`: yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_backup_enabled: Option<bool>,
    /// A wish about placement: one zone is a host, and a server that has one host has one zone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub require_unique_zone: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unique_zone_app_wide: Option<bool>,
    /// Of the machine that will have it; a hint for placement, as is the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute_image: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateVolume {
    /// Days, for snapshots that are made from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_retention: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_backup_enabled: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtendVolume {
    pub size_gb: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extended {
    pub volume: Volume,
    /// The machine sees the new size from its next start on; `false`: it sees it already.
    pub needs_restart: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub name: String,
    /// `created`, or `creating` while its host has not made it.
    pub state: String,
    pub size_gb: u32,
    pub region: Region,
    /// The host that it is on.
    pub zone: String,
    pub encrypted: bool,
    pub attached_machine_id: Option<MachineId>,
    pub attached_alloc_id: Option<String>,
    pub blocks: u64,
    pub block_size: u64,
    pub blocks_free: u64,
    pub blocks_avail: u64,
    pub fstype: String,
    pub snapshot_retention: u32,
    pub auto_backup_enabled: bool,
    /// `ok`, or `unreachable`: then the blocks are not known and 0.
    pub host_status: String,
    /// RFC 3339.
    pub created_at: String,
}

impl Volume {
    pub fn new(row: &VolumeRow, attached: Option<MachineId>, status: Option<VolumeStatus>) -> Self {
        let known = status.unwrap_or_default();
        Self {
            id: row.id.clone(),
            name: row.name.clone(),
            state: if status.is_some() { "created" } else { "creating" }.into(),
            size_gb: row.size_gb,
            region: row.region.clone(),
            zone: row.host.to_string(),
            encrypted: row.encrypted,
            attached_machine_id: attached,
            attached_alloc_id: None,
            blocks: known.blocks,
            block_size: known.block_size,
            blocks_free: known.blocks_free,
            blocks_avail: known.blocks_avail,
            fstype: "ext4".into(),
            snapshot_retention: row.snapshot_retention,
            auto_backup_enabled: row.auto_backup,
            host_status: if status.is_some() { "ok" } else { "unreachable" }.into(),
            created_at: rfc3339(row.created_at_ms),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    /// Bytes on the disk.
    pub size: u64,
    /// Bytes of the volume.
    pub volume_size: u64,
    /// Of what the volume had, `sha256:` and hexadecimal. Snapshots of before there were such have none.
    pub digest: String,
    pub status: String,
    pub retention_days: u32,
    pub created_at: String,
}

impl From<VolumeSnapshot> for Snapshot {
    fn from(snapshot: VolumeSnapshot) -> Self {
        Self {
            size: snapshot.size,
            volume_size: snapshot.volume_size,
            digest: snapshot.digest,
            status: "created".into(),
            retention_days: snapshot.retention_days,
            created_at: rfc3339(snapshot.created_at_ms),
            id: snapshot.id,
        }
    }
}

/// `2024-02-29T12:00:00.000Z`.
pub(crate) fn rfc3339(ms: u64) -> String {
    let (days, of_day) = ((ms / 86_400_000) as i64, ms % 86_400_000);
    // Days since 0000-03-01, in eras of 400 years: the leap day is the last of its year.
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second, ms) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60, of_day % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_clients_read_them() {
        for (ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_827_696_789, "2000-02-29T12:34:56.789Z"),
            (1_735_689_599_999, "2024-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(ms), expected);
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let said = serde_json::from_str::<CreateVolume>(r#"{"name":"data","iops":5}"#).unwrap_err().to_string();
        assert!(said.contains("iops"), "{said}");
    }
}
