//! Secrets: sealed at rest to the master key, written and never read back over the API.
//!
//! A row for each secret is what people list and change; hosts get the set of a version, see [`secret_sets`].

use crate::failure::Failure;
use crate::keys::random;
use crate::releases::{self, Intent, busy, load_app};
use crate::rows::{Change, Outcome, Row, SecretsVersionRow, key};
use crate::secret_sets::{self, SecretValues};
use crate::{Ctx, now_ms};
use dunlin_api::wire::{Secret, Secrets};
use dunlin_model::AppName;
use dunlin_model::config::reserved_prefix;
use dunlin_model::desired::SecretRow;
use dunlin_model::seal::{MAX_SEALED_BYTES, digest};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// In one request, and so in one transaction.
const MAX_SECRETS_A_REQUEST: usize = 64;
const MAX_SECRETS: usize = 256;
const MAX_NAME_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 64 * 1024;
/// What JSON adds to a name and a value.
const JSON_OVERHEAD_BYTES: usize = 8;

pub(crate) async fn list(ctx: &Ctx, app: &AppName) -> Result<Secrets, Failure> {
    load_app(ctx, app).await?;
    let rows = ctx.state.list::<SecretRow>(&key::secrets(app)).await?;
    Ok(Secrets { secrets: rows.iter().map(wire).collect(), version: version(ctx, app).await?, release: None })
}

fn wire(row: &Row<SecretRow>) -> Secret {
    let row = &row.value;
    Secret {
        name: row.name.clone(),
        digest: row.digest.clone(),
        created_at: row.created_at_ms,
        updated_at: row.updated_at_ms,
    }
}

async fn version(ctx: &Ctx, app: &AppName) -> Result<u64, Failure> {
    Ok(ctx.state.get::<SecretsVersionRow>(&key::secrets_version(app)).await?.map_or(0, |row| row.value.version))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// A release brings them to the machines.
    Now,
    /// They wait for the next release.
    NextRelease,
}

/// Sets (`Some`) and unsets (`None`); values that are set already to the same change nothing. With [`When::Now`] the
/// newest secrets are brought to the machines even if they were set before, to wait for a release.
pub(crate) async fn write(
    ctx: &Ctx,
    app: &AppName,
    values: BTreeMap<String, Option<Zeroizing<String>>>,
    when: When,
) -> Result<Secrets, Failure> {
    let _one_writer = ctx.secrets_writer.lock().await;
    for _ in 0..releases::MAX_TRIES {
        let app_row = load_app(ctx, app).await?;
        let before = ctx.state.list::<SecretRow>(&key::secrets(app)).await?;
        let after = validate(ctx, app, &before, &values)?;
        let version_row = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(app)).await?;
        let stored = version_row.as_ref().map_or(0, |row| row.value.version);
        let (change, names) = change(ctx, app, &before, &values, stored + 1)?;
        let is_news = !names.is_empty();
        let change = match is_news {
            true => change.also(secret_sets::add(ctx, app, version_row.as_ref(), stored + 1, &after).await?),
            false => Change::default(),
        };
        ctx.kill.pass("secrets", "before");
        let release = if when == When::Now && app_row.value.current_release != 0 {
            bring(ctx, app, &names, if is_news { stored + 1 } else { stored }, change).await?
        } else {
            // Tied to the app: one that is destroyed in this moment leaves no secrets to its name's next owner.
            let change = change.unchanged(key::app(app), app_row.modified);
            if is_news && ctx.state.commit(change).await? == Outcome::Conflict {
                continue;
            }
            None
        };
        ctx.kill.pass("secrets", "after");
        if is_news {
            tracing::info!(%app, version = stored + 1, names = names.join(","), "secrets changed");
        }
        return Ok(Secrets { release, ..list(ctx, app).await? });
    }
    Err(busy(app))
}

/// A release with the secrets of `version`, unless the current one has them: its number.
async fn bring(ctx: &Ctx, app: &AppName, names: &[String], version: u64, change: Change) -> Result<Option<u32>, Failure> {
    let reason = match names {
        [] => "secrets that were set before".to_owned(),
        names => format!("secrets changed: {}", names.join(", ")),
    };
    let made = releases::create(ctx, app, |base| {
        let Some(current) = base.current.filter(|current| current.secrets_version != version) else { return Ok(None) };
        Ok(Some(Intent {
            image: current.image.clone(),
            config: current.config.clone(),
            reason: reason.clone(),
            scale: base.app.scale.clone(),
            secrets_version: Some(version),
            change: change.clone(),
        }))
    });
    let made = made.await?;
    if made.is_none() && !names.is_empty() {
        return Err(busy(app)); // the app lost its release meanwhile, and the secrets were not written
    }
    Ok(made.map(|release| release.number))
}

/// Checks names and values; all secrets as they would be.
fn validate(
    ctx: &Ctx,
    app: &AppName,
    before: &[Row<SecretRow>],
    values: &BTreeMap<String, Option<Zeroizing<String>>>,
) -> Result<SecretValues, Failure> {
    if values.len() > MAX_SECRETS_A_REQUEST {
        return Err(Failure::invalid(format!("{} secrets in one request are more than {MAX_SECRETS_A_REQUEST}", values.len())));
    }
    for (name, value) in values {
        let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let is_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !starts_well || !is_plain || name.len() > MAX_NAME_BYTES {
            let name: String = name.chars().take(80).collect();
            return Err(Failure::invalid(format!("{name:?} cannot be the name of a secret"))
                .hint("use letters, digits and underscores, not beginning with a digit: it becomes an environment variable"));
        }
        let Some(value) = value else { continue };
        if let Some(prefix) = reserved_prefix(name) {
            return Err(Failure::invalid(format!("{name} cannot be the name of a secret: names that begin with {prefix} are set by the platform")));
        }
        if value.len() > MAX_VALUE_BYTES {
            return Err(Failure::invalid(format!("the value of {name} is {} bytes, more than {MAX_VALUE_BYTES}", value.len())));
        }
        if value.contains('\0') {
            return Err(Failure::invalid(format!("the value of {name} holds a zero byte, which no environment can")));
        }
    }
    // What is replaced need not open: its key may have been lost.
    let kept: Vec<_> = before.iter().filter(|row| !values.contains_key(&row.value.name)).cloned().collect();
    let mut after = open_all(ctx, app, &kept)?;
    for (name, value) in values {
        match value {
            Some(value) => after.insert(name.clone(), value.clone()),
            None => after.remove(name),
        };
    }
    let size: usize = after.iter().map(|(name, value)| name.len() + 2 * value.len() + JSON_OVERHEAD_BYTES).sum();
    if after.len() > MAX_SECRETS || size > MAX_SEALED_BYTES {
        return Err(Failure::invalid(format!("the secrets of {app} would be more than an environment holds"))
            .hint("unset those that are not needed, or fetch large values from elsewhere"));
    }
    Ok(after)
}

/// The rows to write, and the names that change.
fn change(
    ctx: &Ctx,
    app: &AppName,
    before: &[Row<SecretRow>],
    values: &BTreeMap<String, Option<Zeroizing<String>>>,
    version: u64,
) -> Result<(Change, Vec<String>), Failure> {
    let mut change = Change::default();
    let mut names = Vec::new();
    for (name, value) in values {
        let had = before.iter().map(|row| &row.value).find(|row| row.name == *name);
        let Some(value) = value else {
            if had.is_some() {
                change = change.delete(key::secret(app, name));
                names.push(name.clone());
            }
            continue;
        };
        let digest = digest(&ctx.keys.master, &format!("{app}/{name}"), value.as_bytes());
        if had.is_some_and(|row| row.digest == digest) {
            continue;
        }
        let context = key::secret(app, name);
        let sealed = ctx.keys.master.sealing_key().seal(&context, value.as_bytes(), random());
        let row = SecretRow {
            app: app.clone(),
            name: name.clone(),
            sealed: sealed.map_err(|error| Failure::invalid(error.to_string()))?,
            digest,
            version,
            created_at_ms: had.map_or_else(now_ms, |row| row.created_at_ms),
            updated_at_ms: now_ms(),
        };
        change = change.put(context, &row);
        names.push(name.clone());
    }
    Ok((change, names))
}

fn open_all(
    ctx: &Ctx,
    app: &AppName,
    rows: &[Row<SecretRow>],
) -> Result<SecretValues, Failure> {
    let mut opened = BTreeMap::new();
    for row in rows {
        let row = &row.value;
        let value = ctx.keys.master.open(&key::secret(app, &row.name), &row.sealed);
        let value = value.map_err(|error| Failure::internal(&format!("the secret {} of {app} cannot be opened", row.name), &error))?;
        let text = std::str::from_utf8(&value).map_err(|error| Failure::internal("a secret is not text", &error))?;
        opened.insert(row.name.clone(), Zeroizing::new(text.to_owned()));
    }
    Ok(opened)
}
