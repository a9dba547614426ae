//! Apps, their status, scale, secrets and logs.

use super::given::Body;
use super::{Caller, leases, machines, ndjson, releases as release_api};
use crate::failure::Failure;
use crate::releases::{self, load_app};
use crate::rows::{Change, Outcome, key};
use crate::secrets::{self, When};
use crate::owners::Owners;
use crate::{Ctx, logs, now_ms, spec};
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::Json;
use dunlin_api::wire::{self, AppList, AppStatus, CreateApp, Organization, Release, Secret, SecretSet, Secrets, SetSecrets};
use dunlin_api::{ErrorCode, LogQuery};
use dunlin_model::desired::{AppRow, ReleaseRow};
use dunlin_model::{AppName, MachineId};
use futures_util::stream;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Names whose hosts are the platform's own.
const RESERVED: &[&str] = &["api", "registry", "www", "dunlin", "localhost"];
const MAX_APPS: usize = 1_000;
const MAX_TAIL_LINES: usize = 10_000;
const DEFAULT_TAIL_LINES: usize = 100;
/// How long the answer to a destroy waits for its end.
const DESTROY_WAIT: Duration = Duration::from_secs(10);
const DESTROY_LOOK: Duration = Duration::from_millis(50);

fn wire_app(domain: &str, row: &AppRow, machine_count: usize) -> wire::App {
    wire::App {
        id: row.name.to_string(),
        name: row.name.clone(),
        status: if row.current_release == 0 { "pending".into() } else { "deployed".into() },
        organization: Organization { name: row.org.to_string(), slug: row.org.clone() },
        machine_count,
        current_release: row.current_release,
        hostname: format!("{}.{domain}", row.name),
        created_at: row.created_at_ms,
    }
}

#[derive(Debug, Deserialize)]
pub struct ListApps {
    org_slug: Option<String>,
}

pub async fn list(
    Extension(owners): Extension<Owners>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ListApps>,
) -> Result<Json<AppList>, Failure> {
    if query.org_slug.is_some_and(|org| org != owners.org().as_str()) {
        return Ok(Json(AppList { total_apps: 0, apps: vec![] }));
    }
    let machines = owners.machines().await?;
    let count = |app: &AppName| machines.iter().filter(|row| row.spec.app == *app).count();
    let rows = owners.apps().await?;
    let seen = rows.iter().filter(|row| caller.sees(owners.org(), &row.name));
    let apps: Vec<_> = seen.map(|row| wire_app(owners.domain(), row, count(&row.name))).collect();
    Ok(Json(AppList { total_apps: apps.len(), apps }))
}

pub async fn create(
    State(ctx): State<Arc<Ctx>>,
    Body(body): Body<CreateApp>,
) -> Result<(StatusCode, Json<wire::App>), Failure> {
    let name = body.app_name;
    if body.network.is_some_and(|network| !matches!(network.as_str(), "" | "default")) {
        return Err(Failure::invalid("network: apps have no networks of their own, since no machine reaches another one")
            .hint("leave it out"));
    }
    if body.enable_subdomains == Some(true) {
        return Err(Failure::invalid("enable_subdomains: an app has one host name").hint("leave it out or send false"));
    }
    if body.app_role_id.is_some_and(|role| !role.is_empty()) {
        return Err(Failure::invalid("app_role_id: apps have no roles").hint("leave it out"));
    }
    if let Some(org) = body.org_slug.filter(|org| *org != ctx.org) {
        return Err(Failure::not_found(format!("there is no organization {org}")).hint(format!("use {}", ctx.org)));
    }
    if RESERVED.contains(&name.as_str()) {
        return Err(Failure::invalid(format!("the name {name} is the platform's own")).hint("choose another one"));
    }
    if ctx.state.keys("apps/").await?.len() >= MAX_APPS {
        return Err(Failure::invalid(format!("this server has {MAX_APPS} apps, the most it takes")));
    }
    let row = AppRow {
        name: name.clone(),
        org: ctx.org.clone(),
        created_at_ms: now_ms(),
        current_release: 0,
        last_good_release: 0,
        scale: BTreeMap::new(),
        destroying: false,
    };
    let change = Change::default().absent(key::app(&name)).put(key::app(&name), &row);
    match ctx.state.commit(change).await? {
        Outcome::Committed => {
            tracing::info!(app = %name, "app created");
            Ok((StatusCode::CREATED, Json(wire_app(&ctx.domain, &row, 0))))
        }
        Outcome::Conflict => Err(Failure::new(ErrorCode::NameTaken, format!("the name {name} is taken"))
            .hint(format!("choose another one; if the app is yours, `dunlin deploy --app {name}` deploys to it"))),
    }
}

pub async fn get(Extension(owners): Extension<Owners>, Path(app): Path<AppName>) -> Result<Json<wire::App>, Failure> {
    let row = owners.app(&app).await?;
    let machines = owners.machines_of(&app).await?;
    Ok(Json(wire_app(owners.domain(), &row, machines.len())))
}

#[derive(Debug, Deserialize)]
pub struct Destroy {
    /// Whoever has leased a machine. Machines that run are destroyed in any case.
    #[serde(default)]
    force: bool,
}

/// Marks the app; the reconciler destroys its machines and then the app.
pub async fn destroy(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Query(query): Query<Destroy>,
    headers: HeaderMap,
) -> Result<StatusCode, Failure> {
    load_app(&ctx, &app).await?;
    if !query.force {
        leases::check_all(&ctx, &app, &headers).await?;
    }
    for _ in 0..releases::MAX_TRIES {
        let row = load_app(&ctx, &app).await?;
        let marked = AppRow { destroying: true, ..row.value };
        let change = Change::default().unchanged(key::app(&app), row.modified).put(key::app(&app), &marked);
        if ctx.state.commit(change).await? == Outcome::Committed {
            ctx.work.notify_one();
            // Scripts create again what they destroy: the answer comes when the name is free, as a rule.
            let _ = tokio::time::timeout(DESTROY_WAIT, async {
                while matches!(ctx.state.get::<AppRow>(&key::app(&app)).await, Ok(Some(_))) {
                    tokio::time::sleep(DESTROY_LOOK).await;
                }
            })
            .await;
            return Ok(StatusCode::ACCEPTED);
        }
    }
    Err(releases::busy(&app))
}

pub async fn status(Extension(owners): Extension<Owners>, Path(app): Path<AppName>) -> Result<Json<AppStatus>, Failure> {
    let row = owners.app(&app).await?;
    let rows = owners.machines_of(&app).await?;
    let serves = rows.iter().any(|row| !row.spec.services.is_empty());
    let view = owners.observed(&rows).await;
    let configs = owners.configs(None).await?;
    let machines = rows.iter().map(|row| machines::wire(&owners, &view, row, configs.shown(row))).collect();
    let (release, costs) = match &owners {
        Owners::Control(ctx) => {
            let release = ctx.state.get::<ReleaseRow>(&key::release(&app, row.current_release)).await?;
            (release.map(|row| release_api::wire(&row.value)), ctx.costs.clone())
        }
        Owners::Member(..) => (None, vec![]),
    };
    let urls = if serves { urls(&owners, &app) } else { vec![] };
    Ok(Json(AppStatus { app: wire_app(owners.domain(), &row, rows.len()), urls, release, machines, costs }))
}

fn urls(owners: &Owners, app: &AppName) -> Vec<String> {
    let url = |scheme: &str, port: u16, default: u16| {
        let port = if port == default { String::new() } else { format!(":{port}") };
        format!("{scheme}://{app}.{}{port}", owners.domain())
    };
    let (http, https) = owners.ports();
    vec![url("http", http, 80), url("https", https, 443)]
}

pub async fn scale(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
) -> Result<Json<BTreeMap<String, u32>>, Failure> {
    let row = load_app(&ctx, &app).await?;
    let release = ctx.state.get::<ReleaseRow>(&key::release(&app, row.value.current_release)).await?;
    Ok(Json(match release {
        Some(release) => spec::counts(&release.value.config, &row.value.scale),
        None => row.value.scale,
    }))
}

/// 201 and the release, or 200 and `null` when nothing changes.
pub async fn set_scale(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Json(counts): Json<BTreeMap<String, u32>>,
) -> Result<(StatusCode, Json<Option<Release>>), Failure> {
    let release = releases::scale(&ctx, &app, &counts).await?;
    let status = if release.is_some() { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(release.as_ref().map(release_api::wire))))
}

pub async fn secrets(State(ctx): State<Arc<Ctx>>, Path(app): Path<AppName>) -> Result<Json<Secrets>, Failure> {
    Ok(Json(secrets::list(&ctx, &app).await?))
}

#[derive(Debug, Deserialize)]
pub struct Stage {
    #[serde(default)]
    stage: bool,
}

impl Stage {
    fn when(&self) -> When {
        if self.stage { When::NextRelease } else { When::Now }
    }
}

pub async fn set_secrets(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Query(stage): Query<Stage>,
    Body(body): Body<SetSecrets>,
) -> Result<Json<Secrets>, Failure> {
    let values = body.values.into_iter().map(|(name, value)| (name, value.map(Zeroizing::new))).collect();
    Ok(Json(secrets::write(&ctx, &app, values, stage.when()).await?))
}

pub async fn secret(
    State(ctx): State<Arc<Ctx>>,
    Path((app, name)): Path<(AppName, String)>,
) -> Result<Json<Secret>, Failure> {
    find_secret(secrets::list(&ctx, &app).await?.secrets, &app, &name).map(Json)
}

fn find_secret(all: Vec<Secret>, app: &AppName, name: &str) -> Result<Secret, Failure> {
    let found = all.into_iter().find(|secret| secret.name == name);
    found.ok_or_else(|| Failure::not_found(format!("app {app} has no such secret")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretValue {
    value: String,
}

pub async fn set_secret(
    State(ctx): State<Arc<Ctx>>,
    Path((app, name)): Path<(AppName, String)>,
    Query(stage): Query<Stage>,
    Body(body): Body<SecretValue>,
) -> Result<Json<SecretSet>, Failure> {
    let values = BTreeMap::from([(name.clone(), Some(Zeroizing::new(body.value)))]);
    let Secrets { secrets, version, release } = secrets::write(&ctx, &app, values, stage.when()).await?;
    Ok(Json(SecretSet { secret: find_secret(secrets, &app, &name)?, version, release }))
}

pub async fn unset_secret(
    State(ctx): State<Arc<Ctx>>,
    Path((app, name)): Path<(AppName, String)>,
    Query(stage): Query<Stage>,
) -> Result<Json<Secrets>, Failure> {
    Ok(Json(secrets::write(&ctx, &app, BTreeMap::from([(name, None)]), stage.when()).await?))
}

#[derive(Debug, Deserialize)]
pub struct Logs {
    #[serde(default)]
    follow: bool,
    machine: Option<MachineId>,
    since_ms: Option<u64>,
    tail: Option<usize>,
}

pub async fn logs(
    Extension(owners): Extension<Owners>,
    Path(app): Path<AppName>,
    Query(query): Query<Logs>,
) -> Result<Response, Failure> {
    owners.app(&app).await?;
    if let Some(machine) = &query.machine {
        owners.machine(&app, machine).await?;
    }
    // Everything since a moment, or else the newest lines.
    let default_tail = if query.since_ms.is_some() { MAX_TAIL_LINES } else { DEFAULT_TAIL_LINES };
    let query = LogQuery {
        app: Some(app.clone()),
        machine: query.machine,
        since_ms: query.since_ms,
        tail: Some(query.tail.unwrap_or(default_tail).min(MAX_TAIL_LINES)),
        follow: query.follow,
    };
    let stop = owners.stop().clone();
    let lines = logs::lines(owners, app, query).await?;
    let lines = stream::unfold((lines, stop), |(mut lines, stop)| async move {
        let line = tokio::select! {
            line = lines.recv() => line,
            () = stop.cancelled() => None,
        };
        Some((line?, (lines, stop)))
    });
    Ok(ndjson(lines).into_response())
}
