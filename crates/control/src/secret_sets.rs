//! The secrets of an app, version by version: kept as long as a release or a machine names the version, and handed
//! to hosts sealed to their own keys.

use crate::Ctx;
use crate::failure::{Failure, chain};
use crate::keys::random;
use crate::rows::{Change, Row, SecretsSetRow, SecretsVersionRow, key};
use dunlin_model::desired::{AppRow, HostRow, MachineRow, ReleaseRow};
use dunlin_model::seal::SealingKey;
use dunlin_model::{AppName, HostId};
use dunlin_view::SecretsFact;
use std::collections::{BTreeMap, BTreeSet};
use zeroize::Zeroizing;

pub(crate) type SecretValues = BTreeMap<String, Zeroizing<String>>;

/// Sets that one transaction drops at most; it writes other rows, too.
const DROPPED_AT_ONCE: usize = 16;

/// The change that makes `values` the app's newest set, and drops those that nothing names any more.
pub(crate) async fn add(
    ctx: &Ctx,
    app: &AppName,
    row: Option<&Row<SecretsVersionRow>>,
    version: u64,
    values: &SecretValues,
) -> Result<Change, Failure> {
    let plain: BTreeMap<&str, &str> = values.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let json = serde_json::to_vec(&plain).map_err(|error| Failure::internal("secrets cannot be written as JSON", &error))?;
    let json = Zeroizing::new(json);
    let context = key::secrets_set(app, version);
    let sealed = ctx.keys.master.sealing_key().seal(&context, &json, random());
    let sealed = sealed.map_err(|error| Failure::invalid(error.to_string()))?;
    let sets = row.map(|row| row.value.sets.clone()).unwrap_or_default();
    let (mut kept, change) = without_unnamed(ctx, app, sets).await?;
    kept.insert(version);
    Ok(change
        .if_as_read(key::secrets_version(app), row)
        .put(key::secrets_version(app), &SecretsVersionRow { version, sets: kept })
        .put(context, &SecretsSetRow { sealed }))
}

/// The change that drops the app's sets that nothing names, if there are any.
///
/// A release that names one of them is made in a transaction that writes the app's row, and so is never overlooked.
pub(crate) async fn prune(ctx: &Ctx, app: &Row<AppRow>) -> Result<Option<Change>, Failure> {
    let name = &app.value.name;
    let Some(row) = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(name)).await? else { return Ok(None) };
    let mut older = row.value.sets.clone();
    older.remove(&row.value.version); // the newest is what the next release takes
    let before = older.len();
    let (mut kept, change) = without_unnamed(ctx, name, older).await?;
    if kept.len() == before {
        return Ok(None);
    }
    kept.insert(row.value.version);
    let change = change
        .unchanged(key::app(name), app.modified)
        .unchanged(key::secrets_version(name), row.modified)
        .put(key::secrets_version(name), &SecretsVersionRow { sets: kept, ..row.value });
    Ok(Some(change))
}

async fn without_unnamed(ctx: &Ctx, app: &AppName, sets: BTreeSet<u64>) -> Result<(BTreeSet<u64>, Change), Failure> {
    let releases = ctx.state.list::<ReleaseRow>(&key::releases(app)).await?;
    let machines = ctx.state.machines_of(app).await?;
    let named: BTreeSet<u64> = releases
        .iter()
        .map(|row| row.value.secrets_version)
        .chain(machines.iter().map(|row| row.value.spec.secrets_version))
        .collect();
    let dropped: Vec<u64> = sets.difference(&named).copied().take(DROPPED_AT_ONCE).collect();
    let kept = sets.into_iter().filter(|version| !dropped.contains(version)).collect();
    let change = dropped.iter().fold(Change::default(), |change, version| change.delete(key::secrets_set(app, *version)));
    Ok((kept, change))
}

/// Sets sealed to hosts, sealed again only when a host's key changed: a version never means two things.
#[derive(Default)]
pub(crate) struct SealedCache(BTreeMap<Place, Sealed>);

/// App, version and host.
type Place = (AppName, u64, HostId);
/// The host's key, and what was sealed to it.
type Sealed = (String, SecretsFact);

impl SealedCache {
    /// The sets of each app, for each host that has a machine of it: no other host has anything to open.
    pub async fn facts(
        &mut self,
        ctx: &Ctx,
        sets: &BTreeMap<AppName, BTreeSet<u64>>,
        (hosts, machines): (&[HostRow], &[MachineRow]),
    ) -> Result<BTreeMap<AppName, Vec<SecretsFact>>, Failure> {
        let mut fresh = BTreeMap::new();
        let mut facts: BTreeMap<AppName, Vec<SecretsFact>> = BTreeMap::new();
        let has_machines: BTreeSet<(&AppName, &HostId)> = machines.iter().map(|row| (&row.spec.app, &row.host)).collect();
        for (app, versions) in sets {
            let hosts: Vec<&HostRow> = hosts.iter().filter(|host| has_machines.contains(&(app, &host.id))).collect();
            for version in versions {
                let of_app = facts.entry(app.clone()).or_default();
                for (place, sealed) in self.seal(ctx, app, *version, &hosts).await? {
                    of_app.push(sealed.1.clone());
                    fresh.insert(place, sealed);
                }
            }
        }
        self.0 = fresh;
        facts.retain(|_, facts| !facts.is_empty());
        Ok(facts)
    }

    /// One set, for each host that it can be sealed to.
    async fn seal(&mut self, ctx: &Ctx, app: &AppName, version: u64, hosts: &[&HostRow]) -> Result<Vec<(Place, Sealed)>, Failure> {
        let mut opened = None;
        let mut sealed = Vec::new();
        for host in hosts {
            let place = (app.clone(), version, host.id.clone());
            if let Some(known) = self.0.remove(&place).filter(|(host_key, _)| *host_key == host.public_key) {
                sealed.push((place, known));
                continue;
            }
            if opened.is_none() {
                opened = open(ctx, app, version).await?;
            }
            let Some(json) = &opened else { continue };
            match seal_for(app, version, json, host) {
                Ok(fact) => sealed.push((place, (host.public_key.clone(), fact))),
                Err(failure) => {
                    tracing::error!(%app, host = %host.id, error = %chain(&failure), "secrets could not be sealed to the host");
                }
            }
        }
        Ok(sealed)
    }
}

/// `None`: it was dropped in this moment, and so no machine needs it; or it does not open, its key having been lost, and
/// that must not keep all else from being published.
async fn open(ctx: &Ctx, app: &AppName, version: u64) -> Result<Option<Zeroizing<Vec<u8>>>, Failure> {
    let key = key::secrets_set(app, version);
    let Some(row) = ctx.state.get::<SecretsSetRow>(&key).await? else { return Ok(None) };
    match ctx.keys.master.open(&key, &row.value.sealed) {
        Ok(json) => Ok(Some(json)),
        Err(error) => {
            tracing::error!(%app, version, error = %chain(&error), "secrets cannot be opened: is the master key another one?");
            Ok(None)
        }
    }
}

fn seal_for(app: &AppName, version: u64, json: &[u8], host: &HostRow) -> Result<SecretsFact, Failure> {
    let key = SealingKey::from_base64(&host.public_key)
        .map_err(|error| Failure::internal(&format!("the key of host {} cannot be used", host.id), &error))?;
    let sealed = key.seal(&format!("env/{app}/{version}"), json, random());
    let sealed = sealed.map_err(|error| Failure::internal("secrets cannot be sealed", &error))?;
    Ok(SecretsFact { host: host.id.clone(), version, sealed })
}
