//! Machines made and changed by hand: each change is one transaction, and a host starts nothing before it is written.

use crate::failure::Failure;
use crate::fly::{self, Asked, Named};
use crate::launch::{LAUNCH_MS, LaunchRow};
use crate::releases::{busy, load_app};
use crate::rows::{AddressRow, Change, Outcome, Row, SecretsVersionRow, key};
use crate::{Ctx, hosts, now_ms, removal, standbys, volumes};
use dunlin_api::{ErrorCode, Refusal};
use dunlin_model::desired::{MachineRow, TombstoneRow};
use dunlin_model::volume::VolumeRow;
use dunlin_model::{
    AppName, CommandId, Generation, ImageRef, InvalidName, MachineId, MachineSpec, MachineVersion, Mount, Region, RegionExpr,
};
use dunlin_planner::{MAX_MACHINES_PER_APP, Progress};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Versions of a machine whose configurations are kept, the present one included.
const MAX_VERSIONS: usize = 10;
/// Of them together: a row of the store holds twice that.
const MAX_VERSIONS_BYTES: usize = 128 * 1024;
const MAX_NAME_BYTES: usize = 63;
const MAX_TRIES: usize = 20;

/// `configs/<machine>`: the configurations that people gave a machine, the newest first, as they wrote them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ConfigsRow {
    pub versions: Vec<GivenConfig>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct GivenConfig {
    pub version: MachineVersion,
    pub at_ms: u64,
    pub config: Value,
}

impl ConfigsRow {
    /// What was given for `spec`, with the metadata that it has by now; otherwise what its release made of it.
    pub fn shown(&self, spec: &MachineSpec, domain: &str) -> Value {
        let given = self.versions.iter().find(|given| given.version == spec.version);
        let Some(given) = given else { return fly::show(spec, domain) };
        let mut config = given.config.clone();
        if !spec.metadata.is_empty() || config.get("metadata").is_some() {
            config["metadata"] = serde_json::json!(spec.metadata);
        }
        config
    }

    fn with(mut self, newest: GivenConfig) -> Self {
        self.versions.insert(0, newest);
        self.versions.truncate(MAX_VERSIONS);
        while self.versions.len() > 1 && self.bytes() > MAX_VERSIONS_BYTES {
            self.versions.pop();
        }
        self
    }

    fn bytes(&self) -> usize {
        self.versions.iter().map(|given| given.config.to_string().len()).sum()
    }
}

/// The body of a create or an update, read as far as it needs no store.
pub(crate) struct Wish {
    pub name: Option<String>,
    /// None: anywhere.
    pub regions: Option<RegionExpr>,
    /// As it was written.
    pub config: Option<Value>,
    pub current_version: Option<MachineVersion>,
    pub skip_launch: bool,
    pub cordoned: bool,
    pub skip_secrets: bool,
    pub min_secrets_version: Option<u64>,
    pub lease_ttl_s: Option<u64>,
    pub request_id: Option<String>,
    pub nonce: Option<String>,
}

impl Wish {
    pub fn read(body: Value) -> Result<Self, Failure> {
        let mut fields = fly::Fields::of("", body)?;
        let wish = Self {
            name: fields.text("name")?,
            regions: fields.text("region")?.map(|text| text.parse()).transpose().map_err(|error: InvalidName| {
                Failure::invalid(format!("region cannot be used: {error}"))
                    .hint("name regions, the preferred one first, for example `fra,ams,eu`; GET /v1/platform/regions shows those there are")
            })?,
            config: fields.raw("config"),
            current_version: fields.text("current_version")?.map(|text| text.parse()).transpose().map_err(
                |error: InvalidName| Failure::invalid(format!("current_version cannot be used: {error}")),
            )?,
            skip_launch: fields.take("skip_launch")?.unwrap_or(false),
            cordoned: fields.take("skip_service_registration")?.unwrap_or(false),
            skip_secrets: fields.take("skip_secrets")?.unwrap_or(false),
            min_secrets_version: fields.take::<u64>("min_secrets_version")?.filter(|version| *version != 0),
            lease_ttl_s: fields.take::<u64>("lease_ttl")?.filter(|ttl| *ttl != 0),
            request_id: crate::api::request_id(),
            nonce: None,
        };
        fields.raw("id"); // Fly's clients repeat the one in the path
        fields.not_honoured("lsvd", "there are no such root file systems")?;
        fields.finish()?;
        Ok(wish)
    }

    /// Of a machine that has its place.
    fn check_region(&self, region: &Region) -> Result<(), Failure> {
        match self.regions.as_ref().filter(|wanted| wanted.rank(region).is_none()) {
            Some(wanted) => Err(hosts::no_such_region(wanted, std::iter::once(region))),
            None => Ok(()),
        }
    }

    fn check_name(&self, machines: &[Row<MachineRow>], but: Option<&MachineId>) -> Result<(), Failure> {
        let Some(name) = &self.name else { return Ok(()) };
        if name.len() > MAX_NAME_BYTES || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
            return Err(Failure::invalid(format!("{name:?} is not a name of a machine"))
                .hint(format!("use 1 to {MAX_NAME_BYTES} letters, digits, dots, dashes and underscores")));
        }
        match machines.iter().find(|row| row.value.name == *name && Some(&row.value.id) != but) {
            Some(other) => Err(Failure::new(ErrorCode::NameTaken, format!("machine {} has the name {name}", other.value.id))
                .hint("choose another name, or leave it out")),
            None => Ok(()),
        }
    }
}

/// An id that is the same for a request that is sent again.
pub(crate) fn machine_id(app: &AppName, launch_id: Option<&CommandId>) -> MachineId {
    match launch_id {
        None => MachineId::from_random(crate::keys::random()),
        Some(given) => {
            let digest = Sha256::digest(format!("machine/{app}/{given}"));
            MachineId::from_random(std::array::from_fn(|at| digest[at]))
        }
    }
}

/// The machine's, and those of its containers. A tag means the same everywhere in one machine.
async fn images(ctx: &Ctx, app: &AppName, asked: &Asked) -> Result<(ImageRef, Vec<ImageRef>), Failure> {
    let image = crate::images::resolve(ctx, app, &asked.image).await?;
    let mut resolved = BTreeMap::from([(asked.image.as_str(), image.clone())]);
    let mut of_containers = Vec::new();
    for reference in asked.container_images() {
        if !resolved.contains_key(reference) {
            resolved.insert(reference, crate::images::resolve(ctx, app, reference).await?);
        }
        of_containers.extend(resolved.get(reference).cloned());
    }
    Ok((image, of_containers))
}

/// Makes a machine that no release knows. The same id gives the same machine.
pub(crate) async fn create(ctx: &Ctx, name: &AppName, id: MachineId, mut wish: Wish) -> Result<Row<MachineRow>, Failure> {
    let config = wish.config.clone().ok_or_else(|| Failure::invalid("config is missing"))?;
    let asked = fly::read(config.clone())?;
    wish.skip_launch |= !asked.standbys.is_empty();
    if wish.current_version.is_some() {
        return Err(Failure::invalid("current_version cannot be used: a new machine has none"));
    }
    load_app(ctx, name).await?;
    let images = images(ctx, name, &asked).await?;
    let _one_at_a_time = ctx.machines_writer.lock().await;
    if let Some(found) = ctx.state.machine(&id).await?.filter(|row| row.value.spec.app == *name) {
        return Ok(found);
    }
    if ctx.state.get::<TombstoneRow>(&key::tombstone(&id)).await?.is_some() {
        return Err(Failure::new(ErrorCode::Conflict, format!("the machine of this request, {id}, was destroyed since"))
            .hint("use another dunlin-command-id to make another machine"));
    }
    let version = MachineVersion::new(now_ms(), crate::keys::random());
    let (secrets, secrets_version) = secrets(ctx, name, &wish).await?;
    let (mounts, claimed, beside) = claim(ctx, name, &asked.mounts).await?;
    if let Some(volume) = &beside {
        wish.check_region(&volume.region)?;
    }
    let app = load_app(ctx, name).await?;
    let named = Named { org: &app.value.org, app: name, release: 0, secrets_version };
    let spec = MachineSpec { mounts, ..asked.spec(version.clone(), images, &named) };
    let given = GivenConfig { version: version.clone(), at_ms: now_ms(), config };
    for _ in 0..MAX_TRIES {
        let app = load_app(ctx, name).await?;
        let machines = ctx.state.machines_of(name).await?;
        if machines.len() >= MAX_MACHINES_PER_APP as usize {
            return Err(Failure::invalid(format!("app {name} has {MAX_MACHINES_PER_APP} machines, the most of one app"))
                .hint("destroy some, or use another app"));
        }
        wish.check_name(&machines, None)?;
        let not = standbys::hosts_of_watched(&spec, &machines)?;
        let regions = wish.regions.clone().unwrap_or_else(RegionExpr::any);
        let only = beside.as_ref().map(|volume| &volume.host);
        let wanted = hosts::Wanted { app: name, id: &id, spec: &spec, regions: &regions, only, not: &not };
        let (host, address) = hosts::promised(ctx, &wanted).await?;
        let Some(there) = removal::still_takes(ctx, &host.id).await? else { continue };
        let held = ctx.state.get::<AddressRow>(&key::address(address)).await?;
        let row = MachineRow {
            id: id.clone(),
            name: wish.name.clone().unwrap_or_else(|| format!("{}-{}", spec.process_group, &id.as_str()[..6])),
            host: host.id.clone(),
            region: host.region.clone(),
            address,
            placement: Generation { incarnation: ctx.state.incarnation(), revision: 0 },
            created_at_ms: now_ms(),
            spec: spec.clone(),
        };
        let mut change = Change::default()
            // It must not begin to go away meanwhile.
            .unchanged(key::app(name), app.modified)
            .absent(key::machine(&id))
            .if_as_read(key::secrets_version(name), secrets.as_ref())
            .if_as_read(key::address(address), held.as_ref())
            .put(key::machine(&id), &row)
            .put(key::address(address), &AddressRow { machine: id.clone(), freed_at_ms: None })
            .put(key::configs(&id), &ConfigsRow::default().with(given.clone()))
            .also(claimed.clone())
            .also(there);
        if !wish.skip_launch || wish.cordoned {
            change = change.put(key::launch(&id), &launch(&wish, &version));
        }
        if ctx.state.commit(change).await? == Outcome::Committed {
            tracing::info!(app = %name, machine = %id, image = %spec.image.digest, "machine made by hand");
            ctx.launches.notify_one();
            return ctx.state.machine(&id).await?.ok_or_else(|| busy(name));
        }
    }
    Err(busy(name))
}

/// Gives a machine a new version, in its place.
pub(crate) async fn update(ctx: &Ctx, row: Row<MachineRow>, mut wish: Wish) -> Result<Row<MachineRow>, Failure> {
    let (name, id) = (row.value.spec.app.clone(), row.value.id.clone());
    let config = wish.config.clone().ok_or_else(|| Failure::invalid("config is missing"))?;
    let asked = fly::read(config.clone())?;
    wish.skip_launch |= !asked.standbys.is_empty() && !standbys::stands_in(ctx, &id).await?;
    wish.check_region(&row.value.region)?;
    if let Some(expected) = wish.current_version.as_ref().filter(|version| **version != row.value.spec.version) {
        let found = row.value.spec.version.clone();
        return Err(Refusal::VersionMismatch { machine: id, expected: expected.clone(), found }.into());
    }
    if row.value.spec.release != 0 && asked.process_group != row.value.spec.process_group {
        return Err(Failure::invalid(format!(
            "config.metadata.fly_process_group cannot be used: release v{} made the machine for {}",
            row.value.spec.release, row.value.spec.process_group
        )));
    }
    let had = row.value.spec.mounts.clone();
    let is_name = |asked: &str, name: &str| asked.is_empty() || asked == name;
    let same = |(a, b): (&Mount, &Mount)| a.volume == b.volume && a.path == b.path && is_name(&a.name, &b.name);
    if asked.mounts.len() != had.len() || !asked.mounts.iter().zip(&had).all(same) {
        return Err(Failure::invalid("config.mounts cannot be changed: a machine keeps the volume that it was made with")
            .hint("repeat config.mounts as GET shows it, or make another machine"));
    }
    // When it grows may change.
    let mounts = asked.mounts.iter().zip(had).map(|(asked, had)| Mount { extend: asked.extend, ..had }).collect();
    let images = images(ctx, &name, &asked).await?;
    let _one_at_a_time = ctx.machines_writer.lock().await;
    let progress = ctx.state.get::<Progress>(&key::progress(&name)).await?;
    if row.value.spec.release != 0 && progress.as_ref().is_some_and(|progress| progress.value.ended.is_none()) {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("a release of app {name} is under way"))
            .hint("wait until it has ended: `dunlin releases` shows it"));
    }
    let machines = ctx.state.machines_of(&name).await?;
    wish.check_name(&machines, Some(&id))?;
    let (secrets, secrets_version) = secrets(ctx, &name, &wish).await?;
    let version = MachineVersion::new(now_ms(), crate::keys::random());
    let named = Named { org: &row.value.spec.org, app: &name, release: row.value.spec.release, secrets_version };
    let spec = MachineSpec { mounts, rests: wish.skip_launch, ..asked.spec(version.clone(), images, &named) };
    standbys::check_apart(&spec, &machines, &row.value)?;
    let configs = ctx.state.get::<ConfigsRow>(&key::configs(&id)).await?;
    let before = configs.as_ref().map(|row| row.value.clone()).unwrap_or_default();
    let before = if before.versions.is_empty() {
        // So that the version that a release made can be looked at afterwards.
        let old = &row.value.spec;
        let config = fly::show(old, &ctx.domain);
        before.with(GivenConfig { version: old.version.clone(), at_ms: row.value.created_at_ms, config })
    } else {
        before
    };
    let next = MachineRow { spec, name: wish.name.clone().unwrap_or(row.value.name), ..row.value };
    let mut change = Change::default()
        .unchanged(key::machine(&id), row.modified)
        .if_as_read(key::secrets_version(&name), secrets.as_ref())
        .if_as_read(key::progress(&name), progress.as_ref())
        .if_as_read(key::configs(&id), configs.as_ref())
        .put(key::machine(&id), &next)
        .put(key::configs(&id), &before.with(GivenConfig { version: version.clone(), at_ms: now_ms(), config }));
    if !wish.skip_launch || wish.cordoned {
        change = change.put(key::launch(&id), &launch(&wish, &version));
    }
    // Images may have been on their way for long, and others were written first.
    hosts::check_lease(ctx, &next, wish.nonce.as_deref()).await?;
    if ctx.state.commit(change).await? != Outcome::Committed {
        return Err(Failure::new(ErrorCode::Conflict, format!("machine {id} or its app was changed meanwhile"))
            .hint("look at it again, then try again"));
    }
    tracing::info!(app = %name, machine = %id, version = %version, "machine changed by hand");
    ctx.launches.notify_one();
    ctx.state.machine(&id).await?.ok_or_else(|| busy(&name))
}

/// Other metadata: no new version, and nothing restarts.
pub(crate) async fn set_metadata(
    ctx: &Ctx,
    row: Row<MachineRow>,
    metadata: BTreeMap<String, String>,
) -> Result<(), Failure> {
    let metadata = fly::metadata(metadata)?;
    let group = metadata.get("fly_process_group");
    if group.is_some_and(|group| *group != row.value.spec.process_group) {
        return Err(Failure::invalid("metadata.fly_process_group cannot be changed without a new version")
            .hint("update the machine with another config"));
    }
    let app = row.value.spec.app.clone();
    let spec = MachineSpec { metadata, ..row.value.spec };
    let next = MachineRow { spec, ..row.value };
    let change = Change::default().unchanged(key::machine(&next.id), row.modified).put(key::machine(&next.id), &next);
    match ctx.state.commit(change).await? {
        Outcome::Committed => Ok(()),
        Outcome::Conflict => Err(busy(&app)),
    }
}

fn launch(wish: &Wish, version: &MachineVersion) -> LaunchRow {
    LaunchRow {
        version: version.clone(),
        start: !wish.skip_launch,
        cordon: wish.cordoned,
        until_ms: now_ms() + LAUNCH_MS,
        request_id: wish.request_id.clone(),
        nonce: wish.nonce.clone(),
    }
}

/// The newest secrets, unless the wish is for none. The row goes with the transaction: a set that nothing names is dropped.
async fn secrets(ctx: &Ctx, app: &AppName, wish: &Wish) -> Result<(Option<Row<SecretsVersionRow>>, u64), Failure> {
    let row = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(app)).await?;
    let newest = row.as_ref().map_or(0, |row| row.value.version);
    if let Some(wanted) = wish.min_secrets_version.filter(|wanted| *wanted > newest) {
        return Err(Failure::new(ErrorCode::FailedPrecondition, format!("the secrets of app {app} are in version {newest}, not {wanted}")));
    }
    Ok((row, if wish.skip_secrets { 0 } else { newest }))
}

/// The mounts with their volumes' names, the part of the transaction that takes them, and the first of the volumes: the
/// machine goes to its host.
async fn claim(ctx: &Ctx, app: &AppName, asked: &[Mount]) -> Result<(Vec<Mount>, Change, Option<VolumeRow>), Failure> {
    let (mut mounts, mut claimed, mut beside) = (vec![], Change::default(), None::<VolumeRow>);
    for mount in asked {
        let id = &mount.volume;
        let found = volumes::of_app(ctx, app).await?.into_iter().find(|row| row.value.id == *id);
        let row = found.ok_or_else(|| {
            Failure::not_found(format!("app {app} has no volume {id}")).hint(format!("`dunlin volumes list --app {app}` shows those it has"))
        })?;
        if let Some(other) = beside.as_ref().filter(|other| other.host != row.value.host) {
            return Err(Failure::invalid(format!(
                "config.mounts cannot be used: volume {id} is on host {}, and volume {} on host {}",
                row.value.host, other.id, other.host
            )));
        }
        let name = row.value.name.clone();
        beside = beside.or(Some(row.value));
        if !mount.name.is_empty() && mount.name != name {
            return Err(Failure::invalid(format!("config.mounts[0].name cannot be used: volume {id} has the name {name}")));
        }
        let claim = volumes::claim(ctx, app, id).await?.ok_or_else(|| {
            Failure::new(ErrorCode::FailedPrecondition, format!("another machine has volume {id}"))
                .hint("a volume is in one machine at a time")
        })?;
        claimed = claimed.also(claim);
        mounts.push(Mount { name, ..mount.clone() });
    }
    Ok((mounts, claimed, beside))
}

/// Those of all machines that were made or changed by hand.
pub(crate) async fn all_configs(ctx: &Ctx) -> Result<BTreeMap<MachineId, ConfigsRow>, Failure> {
    let rows = ctx.state.list_keyed::<ConfigsRow>("configs/").await?;
    Ok(rows.into_iter().filter_map(|(key, row)| Some((key.strip_prefix("configs/")?.parse().ok()?, row.value))).collect())
}
