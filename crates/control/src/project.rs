//! From every change of desired state to config facts in the view.

use crate::certificates::{SealedCertificates, StoredCertificate};
use crate::failure::Failure;
use crate::rows::SecretsVersionRow;
use crate::secret_sets::SealedCache;
use crate::{Ctx, adopt, now_ms};
use dunlin_model::desired::{AppRow, HostRow, TombstoneRow};
use dunlin_model::{AppName, Generation, token};
use dunlin_view::{Desired, PlatformFact, project};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A watch that says nothing is not believed for longer than this.
const RELIST: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);

/// Publishes until `stop`.
pub(crate) async fn run(ctx: Arc<Ctx>, stop: CancellationToken) {
    let mut cache = Sealed::default();
    let mut changes = ctx.state.changes();
    let mut published = None;
    loop {
        let pause = match publish(&ctx, &mut cache, &mut published).await {
            Ok(()) => RELIST,
            Err(failure) => {
                tracing::error!(%failure, "desired state could not be published");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            Ok(()) = changes.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What was sealed to hosts before.
#[derive(Default)]
struct Sealed {
    secrets: SealedCache,
    certificates: SealedCertificates,
}

async fn publish(ctx: &Ctx, cache: &mut Sealed, published: &mut Option<Generation>) -> Result<(), Failure> {
    let (desired, revoked) = load(ctx, cache).await?;
    if *published == Some(desired.generation) {
        return Ok(());
    }
    let generation = desired.generation;
    ctx.tokens.revoke(revoked);
    ctx.kill.pass("publish", "before");
    ctx.view.publish_config(project(desired), now_ms()).map_err(|refused| Failure::internal("the view refuses desired state", &refused))?;
    ctx.view.confirm_config(generation);
    ctx.kill.pass("publish", "after");
    *published = Some(generation);
    ctx.published.store(true, Ordering::Release);
    tracing::debug!(%generation, "desired state published");
    Ok(())
}

/// All rows that others may know of, read at one revision: config facts are those of one revision. Sets of secrets are
/// read beside them, as they never change.
async fn load(ctx: &Ctx, cache: &mut Sealed) -> Result<(Desired, Vec<String>), Failure> {
    let prefixes = [
        "apps/", "hosts/", "machines/", "secrets_version/", "revoked/", "tombstones/", "certificates/", "volumes/",
        "volume_tombstones/", "removed_hosts/",
    ];
    let (rows, generation) = ctx.state.at_once(prefixes).await?;
    let [apps, hosts, machines, versions, revoked, tombstones, certificates, volumes, volume_tombstones, removed] = rows;
    let apps: Vec<AppRow> = apps.values()?;
    let hosts: Vec<HostRow> = hosts.values()?;
    let exists = |name: &AppName| apps.iter().any(|app| app.name == *name);
    let sets: BTreeMap<AppName, BTreeSet<u64>> = versions
        .keyed::<SecretsVersionRow>()?
        .into_iter()
        .filter_map(|(key, row)| Some((key.strip_prefix("secrets_version/")?.parse().ok()?, row.value.sets)))
        .filter(|(app, _)| exists(app))
        .collect();
    let machines = machines.machines(generation.incarnation)?;
    let revoked: Vec<String> = revoked.keys().filter_map(|key| Some(key.strip_prefix("revoked/")?.to_owned())).collect();
    let certificates = certificates.values::<StoredCertificate>()?;
    let mut secrets = cache.secrets.facts(ctx, &sets, (&hosts, &machines)).await?;
    for (app, fact) in adopt::adopted_secrets(ctx).await? {
        let is_had = machines.iter().any(|row| row.spec.app == app && row.host == fact.host && row.spec.secrets_version == fact.version);
        if is_had {
            secrets.entry(app).or_default().push(fact);
        }
    }
    let desired = Desired {
        generation,
        domain: ctx.domain.clone(),
        secrets,
        apps,
        machines,
        tombstones: tombstones.values::<TombstoneRow>()?,
        volumes: volumes.values()?,
        volume_tombstones: volume_tombstones.values()?,
        certificates: cache.certificates.rows(ctx, certificates, &hosts),
        revoked_tokens: revoked.clone(),
        platform: Some(PlatformFact { control: ctx.host.host_id().clone(), token_key: token::key_text(&ctx.tokens.public_key()) }),
        removed_hosts: removed.keys().filter_map(|key| key.strip_prefix("removed_hosts/")?.parse().ok()).collect(),
    };
    Ok((desired, revoked))
}
