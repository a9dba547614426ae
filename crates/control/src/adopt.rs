//! What control does first after its store was restored from a backup: what the cluster was last told becomes desired
//! state again, so that nothing that was made since the backup is unknown, and nothing that was destroyed comes back.
//!
//! Every member holds the last desired state, signed and whole, as config facts. They have no releases and no configurations
//! of those: an app whose release was made after the backup goes on as it is, and the next deploy makes another. Nothing is
//! destroyed here but what was already: tombstones are taken over, and none is made. An upgrade of the fleet that ran then is halted.

use crate::failure::Failure;
use crate::rows::{AddressRow, Change, Outcome, RemovedHostRow, RevokedRow, Row, SecretsSetRow, SecretsVersionRow, key};
use crate::{Ctx, now_ms, upgrade};
use dunlin_api::ErrorCode;
use dunlin_model::desired::{AppRow, HostRow, Ipv4Prefix, MachineRow, TombstoneReason, TombstoneRow};
use dunlin_model::volume::{VolumeRow, VolumeTombstoneRow};
use dunlin_model::{AppName, Generation, HostId};
use dunlin_planner::Progress;
use dunlin_view::{ConfigState, Freshness, MachineAssignment, SecretsFact, Snapshot};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// For the first host to be heard; control says what it waits for, and is started again after that.
const HEARD_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);
/// Once a host is heard it tells the newest desired state that it has, in well under this.
const SETTLES: Duration = Duration::from_secs(3);
/// Of the store's hundred; one thing takes four at most.
const OPS_AT_ONCE: usize = 90;

/// `restored`: the store was restored, and what the cluster knows is not in it yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RestoredRow {
    /// Of the backup.
    pub generation: Generation,
    pub at_ms: u64,
    /// The host that had control when the backup was made: nobody waits for it.
    pub from: HostId,
    /// An operator knows that no other host is left.
    pub alone: bool,
}

/// The key of the row that says so.
pub const RESTORED: &str = "restored";

/// `adopted_secrets/<app>/<version>/<host>`: a set that is in no backup, as it was sealed to the host.
pub(crate) const ADOPTED_SECRETS: &str = "adopted_secrets/";

/// Does it all if the store was restored, and nothing otherwise. Repeats well.
pub(crate) async fn after_restore(ctx: &Ctx) -> Result<(), Failure> {
    let Some(restored) = ctx.state.get::<RestoredRow>(RESTORED).await? else { return Ok(()) };
    let view = heard(ctx, &restored.value).await?;
    let seen = &view.config;
    while ctx.state.incarnation() <= seen.generation.incarnation {
        ctx.state.raise_incarnation().await?;
    }
    upgrade::halt_restored(ctx).await?;
    if seen.generation > restored.value.generation {
        tracing::info!(backup = %restored.value.generation, cluster = %seen.generation, "the cluster knows more than the backup: that is adopted");
        let mut adopted = Batch { ctx, change: Change::default() };
        apps(&mut adopted, seen).await?;
        machines(&mut adopted, &view).await?;
        volumes(&mut adopted, seen).await?;
        secrets(&mut adopted, seen).await?;
        the_rest(&mut adopted, seen).await?;
        adopted.commit().await?;
    }
    ctx.state.commit(Change::default().delete(RESTORED.into())).await?;
    tracing::info!(incarnation = ctx.state.incarnation(), "control goes on from its backup");
    Ok(())
}

/// The view, once some other host has told what it knows.
async fn heard(ctx: &Ctx, restored: &RestoredRow) -> Result<std::sync::Arc<Snapshot>, Failure> {
    let rows = ctx.state.list::<HostRow>("hosts/").await?.into_iter().map(|row| row.value.id);
    let others: Vec<HostId> = rows.filter(|id| id != ctx.host.host_id() && *id != restored.from).collect();
    let is_heard = || {
        let view = ctx.view.current();
        others.iter().any(|host| view.heard.get(host) == Some(&Freshness::Fresh))
    };
    if others.is_empty() || restored.alone {
        return Ok(ctx.view.current());
    }
    let waiting = async {
        while !is_heard() {
            sleep(LOOK).await;
        }
        sleep(SETTLES).await;
    };
    tracing::info!(hosts = ?others.iter().map(HostId::as_str).collect::<Vec<_>>(), "control was restored, and waits to hear from one of the others");
    timeout_at(Instant::now() + HEARD_WITHIN, waiting).await.map_err(|_| {
        let names = others.iter().map(HostId::as_str).collect::<Vec<_>>().join(", ");
        Failure::new(ErrorCode::Unavailable, format!("control was restored from a backup and hears from none of {names}: they know what was made since"))
            .hint("start their servers or mend the way to them; if none of them will ever return, restore again with --alone")
    })?;
    Ok(ctx.view.current())
}

/// Changes that are committed a transaction at a time: each of them is right by itself.
struct Batch<'c> {
    ctx: &'c Ctx,
    change: Change,
}

impl Batch<'_> {
    async fn add(&mut self, change: Change) -> Result<(), Failure> {
        self.change = std::mem::take(&mut self.change).also(change);
        if self.change.then.len() + self.change.compare.len() >= OPS_AT_ONCE - 4 {
            self.commit().await?;
        }
        Ok(())
    }

    async fn commit(&mut self) -> Result<(), Failure> {
        let change = std::mem::take(&mut self.change);
        if change.then.is_empty() {
            return Ok(());
        }
        match self.ctx.state.commit(change).await? {
            Outcome::Committed => Ok(()),
            // Nobody else writes yet.
            Outcome::Conflict => Err(Failure::new(ErrorCode::Conflict, "desired state changed while it was adopted")),
        }
    }
}

async fn apps(adopted: &mut Batch<'_>, seen: &ConfigState) -> Result<(), Failure> {
    let rows = adopted.ctx.state.list::<AppRow>("apps/").await?;
    let mut known: BTreeMap<AppName, AppRow> = rows.into_iter().map(|row| (row.value.name.clone(), row.value)).collect();
    for (name, fact) in &seen.apps {
        let new = || AppRow {
            name: name.clone(),
            org: fact.org.clone(),
            created_at_ms: fact.created_at_ms,
            current_release: 0,
            last_good_release: 0,
            scale: BTreeMap::new(),
            destroying: false,
        };
        let before = known.remove(name);
        let row = before.clone().unwrap_or_else(new);
        let row = AppRow { current_release: fact.current_release, last_good_release: fact.current_release, ..row };
        // A plan that was under way then is not taken up again: it is long over, or the next look makes another.
        let progress = adopted.ctx.state.get::<Progress>(&key::progress(name)).await?;
        if progress.is_some_and(|progress| progress.value.ended.is_none()) {
            adopted.add(Change::default().delete(key::progress(name)).delete(key::plan(name))).await?;
        }
        let is_same = before.as_ref().is_some_and(|before| before.current_release == row.current_release);
        if !is_same {
            tracing::info!(app = %name, release = row.current_release, "a release of after the backup is kept as it runs; the next deploy makes another");
            adopted.add(Change::default().put(key::app(name), &row)).await?;
        }
    }
    for (name, row) in known.into_iter().filter(|(_, row)| !row.destroying) {
        // It was destroyed since. Nothing of it is started again, and nothing is destroyed by its absence.
        tracing::warn!(app = %name, "the app of the backup was not there any more: it is kept without machines; `dunlin apps destroy` ends it");
        adopted.add(Change::default().put(key::app(&name), &AppRow { current_release: 0, last_good_release: 0, ..row })).await?;
    }
    adopted.commit().await
}

async fn machines(adopted: &mut Batch<'_>, view: &Snapshot) -> Result<(), Failure> {
    let (seen, now_ms) = (&view.config, now_ms());
    let rows = adopted.ctx.state.machines().await?;
    let mut known: BTreeMap<_, MachineRow> = rows.into_iter().map(|row| (row.value.id.clone(), row.value)).collect();
    let mut count = 0;
    for (id, fact) in &seen.machines {
        let MachineAssignment { id: _, name, host, region, address, placement, created_at_ms, spec } = fact.clone();
        let row = MachineRow { id: id.clone(), name, host, region, address, placement, created_at_ms, spec };
        if known.remove(id).as_ref() == Some(&row) {
            continue;
        }
        count += 1;
        let holds = AddressRow { machine: id.clone(), freed_at_ms: None };
        adopted.add(Change::default().put(key::machine(id), &row).put(key::address(row.address), &holds)).await?;
    }
    for (id, row) in &known {
        // Destroyed since, with or without a tombstone that is still there: what its host still has of it, it keeps.
        let rests = AddressRow { machine: id.clone(), freed_at_ms: Some(now_ms) };
        let change = Change::default().delete(key::machine(id)).delete(key::configs(id)).delete(key::launch(id)).put(key::address(row.address), &rests);
        adopted.add(change).await?;
    }
    for (id, host) in &seen.tombstones {
        let of_row = known.get(id).map(|row| (row.spec.app.clone(), row.address));
        let of_fact = || view.machines.get(id).map(|fact| (fact.app.clone(), fact.address));
        // Of one that nobody knows any more nothing is left to destroy.
        let Some((app, address)): Option<(AppName, Ipv4Addr)> = of_row.or_else(of_fact) else { continue };
        let reason = if seen.asked_for.contains(id) { TombstoneReason::Person } else { TombstoneReason::Plan };
        let row = TombstoneRow { machine: id.clone(), host: host.clone(), app, address, at_ms: now_ms, reason };
        adopted.add(Change::default().put(key::tombstone(id), &row)).await?;
    }
    tracing::info!(adopted = count, gone = known.len(), "machines are as the cluster knows them");
    adopted.commit().await
}

async fn volumes(adopted: &mut Batch<'_>, seen: &ConfigState) -> Result<(), Failure> {
    let rows = adopted.ctx.state.list::<VolumeRow>("volumes/").await?;
    let known: BTreeMap<_, VolumeRow> = rows.into_iter().map(|row| (row.value.id.clone(), row.value)).collect();
    for (id, row) in seen.volumes.iter().filter(|(id, row)| known.get(*id) != Some(*row)) {
        adopted.add(Change::default().put(key::volume(id), row)).await?;
    }
    for (id, host) in &seen.volume_tombstones {
        let Some(row) = known.get(id) else { continue };
        let tombstone = VolumeTombstoneRow { volume: id.clone(), host: host.clone(), app: row.app.clone(), at_ms: now_ms() };
        adopted.add(Change::default().delete(key::volume(id)).put(key::volume_tombstone(id), &tombstone)).await?;
    }
    adopted.commit().await
}

/// Sets of after the backup stay as they are sealed to the hosts, for machines that have them. Their values are in nobody's
/// hands: what is deployed next has those of the backup.
async fn secrets(adopted: &mut Batch<'_>, seen: &ConfigState) -> Result<(), Failure> {
    for (app, facts) in &seen.secrets {
        let row = adopted.ctx.state.get::<SecretsVersionRow>(&key::secrets_version(app)).await?;
        let (row, before) = (row.as_ref().map(|row| row.value.clone()).unwrap_or_default(), row);
        for fact in facts.iter().filter(|fact| !row.sets.contains(&fact.version)) {
            let SecretsFact { host, version, .. } = fact;
            adopted.add(Change::default().put(format!("{ADOPTED_SECRETS}{app}/{version:020}/{host}"), fact)).await?;
        }
        let newest = facts.iter().map(|fact| fact.version).max().unwrap_or(0);
        if newest > row.version {
            tracing::warn!(%app, "secrets that were set after the backup are lost to control: machines that run keep them; set them again before the next deploy");
            adopted.add(above(adopted.ctx, app, before.as_ref(), newest + 1).await?).await?;
        }
    }
    adopted.commit().await
}

/// The newest set of the backup under a version that never meant another.
async fn above(ctx: &Ctx, app: &AppName, before: Option<&Row<SecretsVersionRow>>, version: u64) -> Result<Change, Failure> {
    let mut row = before.map(|row| row.value.clone()).unwrap_or_default();
    let key_before = key::secrets_set(app, row.version);
    let set = ctx.state.get::<SecretsSetRow>(&key_before).await?;
    let opened = set.map(|set| ctx.keys.master.open(&key_before, &set.value.sealed)).transpose();
    let opened = opened.map_err(|error| Failure::internal("the backup's secrets cannot be opened: is its master key another one?", &error))?;
    let values = opened.unwrap_or_else(|| b"{}".to_vec().into());
    let context = key::secrets_set(app, version);
    let sealed = ctx.keys.master.sealing_key().seal(&context, &values, crate::keys::random());
    let sealed = sealed.map_err(|error| Failure::internal("secrets cannot be sealed", &error))?;
    row.sets.insert(version);
    row.version = version;
    Ok(Change::default().put(context, &SecretsSetRow { sealed }).put(key::secrets_version(app), &row))
}

async fn the_rest(adopted: &mut Batch<'_>, seen: &ConfigState) -> Result<(), Failure> {
    for id in &seen.revoked_tokens {
        adopted.add(Change::default().put(key::revoked(id), &RevokedRow { at_ms: now_ms() })).await?;
    }
    for host in &seen.removed_hosts {
        let state = &adopted.ctx.state;
        if state.get::<RemovedHostRow>(&key::removed_host(host)).await?.is_some() {
            continue;
        }
        let row = state.get::<HostRow>(&key::host(host)).await?;
        let prefix = row.map_or(Ipv4Prefix { network: Ipv4Addr::UNSPECIFIED, length: 32 }, |row| row.value.prefix);
        let removed = RemovedHostRow { removed_at_ms: now_ms(), prefix };
        let change = Change::default().delete(key::host(host)).delete(key::member(host)).put(key::removed_host(host), &removed);
        adopted.add(change).await?;
    }
    Ok(())
}

/// Sealed sets that are in no backup, for those of the app's hosts and versions that control cannot seal itself.
pub(crate) async fn adopted_secrets(ctx: &Ctx) -> Result<Vec<(AppName, SecretsFact)>, Failure> {
    let rows = ctx.state.list_keyed::<SecretsFact>(ADOPTED_SECRETS).await?;
    let of_app = |key: &str| key.strip_prefix(ADOPTED_SECRETS)?.split('/').next()?.parse::<AppName>().ok();
    Ok(rows.into_iter().filter_map(|(key, row)| Some((of_app(&key)?, row.value))).collect())
}
