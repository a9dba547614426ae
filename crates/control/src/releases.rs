//! Releases: an app version is one transaction, and the intent to deploy it is in it.
//!
//! Deploy, rollback, scale and a change of secrets are all releases, so that one machinery carries them
//! out, shows them and undoes them.

use crate::failure::Failure;
use crate::rows::{Change, Outcome, Row, SecretsVersionRow, key};
use crate::{Ctx, now_ms, reconcile, registry, spec, volumes};
use dunlin_api::ErrorCode;
use dunlin_api::wire::CreateRelease;
use dunlin_model::config::AppConfig;
use crate::reconcile::lacking;
use dunlin_model::desired::{AppRow, HostRow, MachineRow, ReleaseRow, ReleaseStatus};
use dunlin_model::{AppName, CpuKind, HostId, ImageRef};
use dunlin_planner::{Ended, MAX_MACHINES_PER_APP, Plan, Progress, Purpose};
use std::collections::BTreeMap;

/// The executor writes its progress often, and each write makes one try here fail.
pub(crate) const MAX_TRIES: usize = 100;
/// Older releases are forgotten, except the current and the last good one.
const MAX_RELEASES: usize = 50;
const MAX_REASON_BYTES: usize = 200;

/// What a new release consists of.
pub(crate) struct Intent {
    pub image: ImageRef,
    pub config: AppConfig,
    pub reason: String,
    pub scale: BTreeMap<String, u32>,
    /// `None`: the newest, those that wait for a release included.
    pub secrets_version: Option<u64>,
    /// Rows that belong to it.
    pub change: Change,
}

/// What an intent is made from.
pub(crate) struct Base<'a> {
    pub app: &'a AppRow,
    pub current: Option<&'a ReleaseRow>,
    pub releases: &'a [Row<ReleaseRow>],
    pub machines: &'a [Row<MachineRow>],
}

/// Writes the release that `intent` makes of the app's present state; `Ok(None)` when it makes none.
/// `intent` is called again when somebody else wrote meanwhile.
pub(crate) async fn create(
    ctx: &Ctx,
    name: &AppName,
    intent: impl Fn(&Base<'_>) -> Result<Option<Intent>, Failure>,
) -> Result<Option<ReleaseRow>, Failure> {
    for _ in 0..MAX_TRIES {
        let app = load_app(ctx, name).await?;
        let releases = ctx.state.list::<ReleaseRow>(&key::releases(name)).await?;
        let current = base_of(&app.value, &releases);
        let machines = ctx.state.machines_of(name).await?;
        let base = Base { app: &app.value, current, releases: &releases, machines: &machines };
        let Some(intent) = intent(&base)? else { return Ok(None) };
        let stored = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(name)).await?;
        // Control that was restored from a backup does not know the last ones.
        let number = releases.iter().map(|row| row.value.number).max().unwrap_or(0).max(app.value.current_release) + 1;
        let release = ReleaseRow {
            app: name.clone(),
            number,
            image: intent.image,
            config: intent.config,
            secrets_version: intent.secrets_version.or(stored.as_ref().map(|row| row.value.version)).unwrap_or(0),
            scale: intent.scale.clone(),
            created_at_ms: now_ms(),
            status: ReleaseStatus::Running,
            reason: intent.reason.chars().take(MAX_REASON_BYTES).collect(),
        };
        let next = AppRow { current_release: number, scale: intent.scale, ..app.value.clone() };
        let change = Change::default()
            .unchanged(key::app(name), app.modified)
            .absent(key::release(name, number))
            // A set of secrets that no release names yet may be dropped for a newer one in this moment.
            .if_as_read(key::secrets_version(name), stored.as_ref())
            .put(key::release(name, number), &release)
            .put(key::app(name), &next)
            .also(intent.change)
            .also(supersede(ctx, name, &releases).await?)
            .also(forget_old(&app.value, &releases));
        ctx.kill.pass("release", "before");
        if ctx.state.commit(change).await? == Outcome::Committed {
            ctx.kill.pass("release", "after");
            tracing::info!(app = %name, release = number, image = %release.image.digest, "release written");
            ctx.work.notify_one();
            return Ok(Some(release));
        }
    }
    Err(busy(name))
}

pub(crate) fn busy(app: &AppName) -> Failure {
    Failure::new(ErrorCode::Conflict, format!("app {app} is being changed by somebody else all the time"))
        .hint("try again in a moment")
}

/// The app, unless it is being destroyed.
pub(crate) async fn load_app(ctx: &Ctx, name: &AppName) -> Result<Row<AppRow>, Failure> {
    let found = ctx.state.get::<AppRow>(&key::app(name)).await?;
    let app = found.ok_or_else(|| {
        Failure::not_found(format!("there is no app {name}"))
            .hint(format!("`dunlin apps list` shows those there are; `dunlin apps create {name}` makes it"))
    })?;
    if app.value.destroying {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("app {name} is being destroyed"))
            .hint("wait until it is gone, then create it again"));
    }
    Ok(app)
}

/// Ends what the release takes over from: its plan stops at the next step.
async fn supersede(ctx: &Ctx, name: &AppName, releases: &[Row<ReleaseRow>]) -> Result<Change, Failure> {
    let mut change = Change::default();
    let plan = ctx.state.get::<Plan>(&key::plan(name)).await?;
    let progress = ctx.state.get::<Progress>(&key::progress(name)).await?;
    change = change.if_as_read(key::progress(name), progress.as_ref());
    if let Some(Row { value: progress, .. }) = progress
        && progress.ended.is_none()
    {
        let ended = Progress { ended: Some(Ended::Superseded), ..progress };
        change = change.put(key::progress(name), &ended);
    }
    let returning = plan.and_then(|row| match row.value.purpose {
        Purpose::Return { failed_release } => Some(failed_release),
        Purpose::Deploy | Purpose::Repair | Purpose::Rebalance => None,
    });
    for row in releases.iter().filter(|row| row.value.status == ReleaseStatus::Running) {
        // One that failed and was on its way back has failed, whatever comes now.
        let failed = returning == Some(row.value.number);
        let status = if failed { ReleaseStatus::Failed } else { ReleaseStatus::Superseded };
        let ended = ReleaseRow { status, ..row.value.clone() };
        change = change.put(key::release(name, ended.number), &ended);
    }
    Ok(change)
}

fn forget_old(app: &AppRow, releases: &[Row<ReleaseRow>]) -> Change {
    let excess = (releases.len() + 1).saturating_sub(MAX_RELEASES);
    let needed = [app.current_release, app.last_good_release];
    let ended = releases.iter().filter(|row| row.value.status != ReleaseStatus::Running);
    let old = ended.map(|row| row.value.number).filter(|number| !needed.contains(number));
    old.take(excess.min(4)).fold(Change::default(), |change, number| {
        change.delete(key::release(&app.name, number)).delete(key::events(&app.name, number))
    })
}

/// A deploy of an image with a configuration.
pub(crate) async fn deploy(ctx: &Ctx, name: &AppName, body: CreateRelease) -> Result<ReleaseRow, Failure> {
    load_app(ctx, name).await?;
    let body = CreateRelease { config: check_config(name, body.config)?, ..body };
    for mount in body.config.mounts.iter().filter(|mount| mount.encrypted == Some(true)) {
        volumes::encrypted_somewhere(ctx, mount.encrypted).await?;
    }
    let hosts = sizes_of_hosts(ctx).await?;
    let image = crate::images::resolve(ctx, name, &body.image).await?;
    let found = registry::made_here(&ctx.content, ctx.base_images, &body.image);
    let is_made_here = found.ok().flatten().is_some_and(|(_, digest)| digest.as_str() == image.digest);
    let made = create(ctx, name, |base| {
        let counts = spec::counts(&body.config, &base.app.scale);
        within_limits(&counts)?;
        fits_a_host(&body.config, &counts, &hosts)?;
        Ok(Some(Intent {
            image: image.clone(),
            config: body.config.clone(),
            reason: body.reason.clone(),
            scale: base.app.scale.clone(),
            secrets_version: None,
            change: Change::default(),
        }))
    });
    let release = made.await?.ok_or_else(|| busy(name))?;
    if is_made_here {
        reconcile::note(ctx, name, release.number, registry::origin(&body.image)).await?;
    }
    Ok(release)
}

/// The configuration, if it is one of the app and can be used.
pub(crate) fn check_config(name: &AppName, config: AppConfig) -> Result<AppConfig, Failure> {
    if let Some(other) = config.app.as_ref().filter(|other| *other != name) {
        return Err(Failure::invalid(format!("the configuration is of app {other}, not of {name}"))
            .hint(format!("change `app` in it, or deploy with --app {other}")));
    }
    config.validate().map_err(|invalid| {
        Failure::invalid(format!("the configuration cannot be used: {invalid}"))
            .hint("`dunlin config validate` finds the same, with its place in the file")
    })?;
    Ok(config)
}

/// The release that should run.
pub(crate) fn base_of<'r>(app: &AppRow, releases: &'r [Row<ReleaseRow>]) -> Option<&'r ReleaseRow> {
    releases.iter().map(|row| &row.value).find(|row| row.number == app.current_release)
}

pub(crate) fn within_limits(counts: &BTreeMap<String, u32>) -> Result<(), Failure> {
    let wanted = counts.values().fold(0u32, |sum, count| sum.saturating_add(*count));
    if wanted <= MAX_MACHINES_PER_APP {
        return Ok(());
    }
    Err(Failure::invalid(format!("{wanted} machines are more than the {MAX_MACHINES_PER_APP} of one app")))
}

/// What a host could hold if nothing else were on it.
struct HostSize {
    id: HostId,
    memory_mb: u32,
    cpus: u32,
}

/// As they say themselves; of those that say nothing, as they joined.
async fn sizes_of_hosts(ctx: &Ctx) -> Result<Vec<HostSize>, Failure> {
    let view = ctx.view.current();
    let rows = ctx.state.list::<HostRow>("hosts/").await?;
    let size = |row: HostRow| match view.hosts.get(&row.id) {
        Some(fact) => HostSize { id: row.id, memory_mb: fact.memory_mb, cpus: fact.cpus },
        None => HostSize { id: row.id, memory_mb: row.memory_mb, cpus: row.cpus },
    };
    Ok(rows.into_iter().map(|row| size(row.value)).collect())
}

/// A machine that no host could hold even if it were empty is refused before anything is written: waiting and making
/// room would not help. Whether there is room now, the plan finds.
fn fits_a_host(config: &AppConfig, counts: &BTreeMap<String, u32>, hosts: &[HostSize]) -> Result<(), Failure> {
    let Some(largest) = hosts.iter().max_by_key(|host| (host.memory_mb, host.cpus)) else { return Ok(()) };
    for (group, _) in counts.iter().filter(|(_, count)| **count > 0) {
        let guest = config.guest_for(group);
        let cores = if guest.cpu_kind == CpuKind::Performance { guest.cpus } else { 0 };
        if hosts.iter().any(|host| guest.memory_mb <= host.memory_mb && cores <= host.cpus) {
            continue;
        }
        let cores = if cores == 0 { String::new() } else { format!(" and {cores} performance cpus") };
        return Err(Failure::invalid(format!(
            "no host could ever hold a machine of {group}: it is to have {} MB{cores}, and the largest host, {}, has {} MB and {} cpus",
            guest.memory_mb, largest.id, largest.memory_mb, largest.cpus
        ))
        .hint("make it smaller under [[vm]] in dunlin.toml, or add a larger host; nothing was changed"));
    }
    Ok(())
}

/// A new release with the image, the configuration and the secrets of an earlier one.
pub(crate) async fn rollback(ctx: &Ctx, name: &AppName, to: Option<u32>) -> Result<ReleaseRow, Failure> {
    let made = create(ctx, name, |base| {
        let all = || base.releases.iter().map(|row| &row.value);
        let target = match to {
            Some(number) => all().find(|row| row.number == number).ok_or_else(|| {
                Failure::not_found(format!("app {name} has no release v{number}"))
                    .hint(format!("`dunlin releases --app {name}` shows those it has"))
            })?,
            None => default_target(name, base)?,
        };
        Ok(Some(Intent {
            image: target.image.clone(),
            config: target.config.clone(),
            reason: format!("rollback to v{}", target.number),
            scale: base.app.scale.clone(),
            secrets_version: Some(target.secrets_version),
            change: Change::default(),
        }))
    });
    made.await?.ok_or_else(|| busy(name))
}

/// The newest good release that is another than the current one: a release that only scaled, or brought the same again,
/// is nothing to go back to.
fn default_target<'a>(name: &AppName, base: &Base<'a>) -> Result<&'a ReleaseRow, Failure> {
    let refuse = |why: String| {
        Failure::new(ErrorCode::FailedPrecondition, why).hint(format!("`dunlin releases --app {name}` shows what it has"))
    };
    let current = base.current.ok_or_else(|| refuse(format!("app {name} has no release")))?;
    let good = base.releases.iter().map(|row| &row.value);
    let good = good.filter(|row| row.status == ReleaseStatus::Succeeded && row.number < current.number);
    let mut good: Vec<_> = good.collect();
    good.sort_by_key(|row| std::cmp::Reverse(row.number));
    if good.is_empty() {
        return Err(refuse(format!("app {name} has no earlier good release")));
    }
    let differs = |row: &&ReleaseRow| {
        row.image.digest != current.image.digest
            || row.config != current.config
            || row.secrets_version != current.secrets_version
    };
    good.into_iter().find(differs).ok_or_else(|| {
        let number = current.number;
        refuse(format!("all earlier good releases of app {name} have the image, the configuration and the secrets of v{number}"))
    })
}

/// Other counts of machines; `None` when nothing has to change on hosts.
pub(crate) async fn scale(
    ctx: &Ctx,
    name: &AppName,
    wanted: &BTreeMap<String, u32>,
) -> Result<Option<ReleaseRow>, Failure> {
    create(ctx, name, |base| {
        let Some(current) = base.current else {
            return Err(Failure::new(ErrorCode::FailedPrecondition, format!("app {name} has no release to scale"))
                .hint("deploy it first"));
        };
        let before = spec::counts(&current.config, &base.app.scale);
        if let Some(unknown) = wanted.keys().find(|group| !before.contains_key(*group)) {
            let groups: Vec<_> = before.keys().map(String::as_str).collect();
            return Err(Failure::invalid(format!("release v{} has no process group {unknown}", current.number))
                .hint(format!("it has {}", groups.join(", "))));
        }
        let mut after = base.app.scale.clone();
        after.extend(wanted.clone());
        let counts = spec::counts(&current.config, &after);
        within_limits(&counts)?;
        // Machines that are missing are being replaced, or could not be: whoever asks for them is told how it ends.
        let lacking = lacking(base.app, current, base.machines);
        let is_news = |(group, count): &(&String, &u32)| before.get(*group) != Some(count) || lacking.contains_key(*group);
        if !counts.iter().any(|count| is_news(&count)) {
            return Ok(None);
        }
        let changed = counts.iter().filter(is_news);
        let changed: Vec<_> = changed.map(|(group, count)| format!("{group} to {count}")).collect();
        Ok(Some(Intent {
            image: current.image.clone(),
            config: current.config.clone(),
            reason: format!("scale {}", changed.join(", ")),
            scale: after,
            // Secrets that wait for a release wait for a deploy: more machines of the same are no reason to bring them.
            secrets_version: Some(current.secrets_version),
            change: Change::default(),
        }))
    })
    .await
}
