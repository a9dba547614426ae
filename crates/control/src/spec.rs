//! From a release to what each process group should be.

use dunlin_model::config::{AppConfig, PrimaryRegion};
use dunlin_model::desired::{AppRow, ReleaseRow};
use dunlin_model::{MachineSpec, MachineVersion};
use dunlin_model::volume::{SIZE_DEFAULT_GB, SNAPSHOT_RETENTION_DEFAULT};
use dunlin_planner::{GroupTarget, MountTarget};
use std::collections::BTreeMap;

/// Machines of a group that nobody scaled.
const DEFAULT_COUNT: u32 = 1;

/// The wanted count of every group that the release has.
pub(crate) fn counts(config: &AppConfig, scale: &BTreeMap<String, u32>) -> BTreeMap<String, u32> {
    let count = |group: &str| scale.get(group).copied().unwrap_or(DEFAULT_COUNT);
    config.process_groups().into_iter().map(|group| (group.to_owned(), count(group))).collect()
}

/// Targets for the planner, which fills in machine versions.
pub(crate) fn groups(app: &AppRow, release: &ReleaseRow) -> BTreeMap<String, GroupTarget> {
    let target = |(group, count): (String, u32)| {
        let spec = machine_spec(app, release, &group);
        let mount = release.config.mount_for(&group).map(|mount| MountTarget {
            name: mount.source.clone(),
            path: mount.destination.clone(),
            size_gb: mount.initial_size_gb.unwrap_or(SIZE_DEFAULT_GB),
            snapshot_retention: mount.snapshot_retention.unwrap_or(SNAPSHOT_RETENTION_DEFAULT),
            auto_backup: mount.scheduled_snapshots.unwrap_or(true),
            encrypted: mount.encrypted,
            extend: mount.extend,
        });
        (group, GroupTarget { count, spec, mount })
    };
    counts(&release.config, &app.scale).into_iter().map(target).collect()
}

fn machine_spec(app: &AppRow, release: &ReleaseRow, group: &str) -> MachineSpec {
    let config = &release.config;
    MachineSpec {
        process_group: group.to_owned(),
        release: release.number,
        command: config.command_for(group),
        env: env(config),
        guest: config.guest_for(group),
        swap_mb: config.swap_size_mb.unwrap_or(0),
        files: config.files_for(group),
        services: config.services_for(group),
        checks: config.checks_for(group),
        restart: config.restart_for(group),
        stop: config.stop(),
        secrets_version: release.secrets_version,
        ..MachineSpec::of(MachineVersion::new(0, [0; 10]), app.org.clone(), app.name.clone(), release.image.clone())
    }
}

fn env(config: &AppConfig) -> BTreeMap<String, String> {
    let mut env = config.env.clone();
    if let Some(region) = config.primary_region.as_ref().and_then(PrimaryRegion::named) {
        // The configured one, as on Fly: apps compare it with the region that they are in. Of several the first, also where
        // it had no room: it is the app's word, and the same in all its machines. An app's own word wins.
        env.entry("PRIMARY_REGION".to_owned()).or_insert_with(|| region.to_string());
    }
    env
}
