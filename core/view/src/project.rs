//! Control's projection of desired state into config facts.

use crate::{AppFact, CertificateFact, ConfigState, MachineAssignment, PlatformFact, SecretsFact};
use dunlin_model::desired::{AppRow, CertificateRow, MachineRow, TombstoneReason, TombstoneRow};
use dunlin_model::volume::{VolumeRow, VolumeTombstoneRow};
use dunlin_model::{AppName, Generation, HostId};
use std::collections::{BTreeMap, BTreeSet};

/// The rows of one store revision that readers outside control may know of.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    pub generation: Generation,
    /// The platform's domain: an app is served as `<app>.<domain>`.
    pub domain: String,
    pub apps: Vec<AppRow>,
    pub machines: Vec<MachineRow>,
    pub tombstones: Vec<TombstoneRow>,
    pub volumes: Vec<VolumeRow>,
    pub volume_tombstones: Vec<VolumeTombstoneRow>,
    pub certificates: Vec<CertificateRow>,
    /// Resealed by control to each host that needs them; sealing needs randomness, so it is not done here.
    pub secrets: BTreeMap<AppName, Vec<SecretsFact>>,
    pub revoked_tokens: Vec<String>,
    pub removed_hosts: BTreeSet<HostId>,
    pub platform: Option<PlatformFact>,
}

/// A pure function of the revision, so that any control process may publish it.
pub fn project(desired: Desired) -> ConfigState {
    // One that is being destroyed serves nobody and takes no images any more.
    let apps = desired.apps.iter().filter(|app| !app.destroying).map(|app| {
        let hostnames = vec![format!("{}.{}", app.name, desired.domain)];
        (app.name.clone(), AppFact { org: app.org.clone(), hostnames, current_release: app.current_release, created_at_ms: app.created_at_ms })
    });
    let machines = desired.machines.into_iter().map(|row| {
        let assignment = MachineAssignment {
            id: row.id.clone(),
            name: row.name,
            host: row.host,
            region: row.region,
            address: row.address,
            placement: row.placement,
            created_at_ms: row.created_at_ms,
            spec: row.spec,
        };
        (row.id, assignment)
    });
    let certificates = desired.certificates.into_iter().map(|row| CertificateFact {
        names: row.names,
        chain_pem: row.chain_pem,
        sealed_key: row.sealed_key,
        sealed: row.sealed,
        not_after_ms: row.not_after_ms,
    });
    let is_asked_for = |reason| matches!(reason, TombstoneReason::Person | TombstoneReason::HostLost);
    let asked_for = desired.tombstones.iter().filter(|tombstone| is_asked_for(tombstone.reason));
    ConfigState {
        generation: desired.generation,
        apps: apps.collect(),
        machines: machines.collect(),
        asked_for: asked_for.map(|tombstone| tombstone.machine.clone()).collect(),
        tombstones: desired.tombstones.into_iter().map(|t| (t.machine, t.host)).collect(),
        volumes: desired.volumes.into_iter().map(|row| (row.id.clone(), row)).collect(),
        volume_tombstones: desired.volume_tombstones.into_iter().map(|t| (t.volume, t.host)).collect(),
        secrets: desired.secrets.into_iter().collect(),
        certificates: certificates.collect(),
        revoked_tokens: desired.revoked_tokens.into_iter().collect(),
        removed_hosts: desired.removed_hosts.into_iter().collect(),
        platform: desired.platform,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_that_is_being_destroyed_is_no_more() {
        let app = |name: &str, destroying| AppRow {
            name: name.parse().unwrap(),
            org: "personal".parse().unwrap(),
            created_at_ms: 0,
            current_release: 1,
            last_good_release: 1,
            scale: BTreeMap::new(),
            destroying,
        };
        let apps = vec![app("web", false), app("gone", true)];
        let config = project(Desired { domain: "localhost".into(), apps, ..Desired::default() });
        let served: Vec<_> = config.apps.values().flat_map(|app| &app.hostnames).collect();
        assert_eq!(served, ["web.localhost"]);
    }
}
