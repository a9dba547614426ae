//! Machines made and changed by hand, by the bodies that Fly's clients send.

use super::given::{self, Body};
use super::{Caller, leases, machines};
use crate::failure::Failure;
use crate::launch::LaunchRow;
use crate::machine_rows::{self, ConfigsRow, Wish};
use crate::owners::Owners;
use crate::rows::{Row, key};
use crate::{Ctx, fly, hosts};
use axum::Json;
use axum::extract::{Extension, Path, Query, State};
use dunlin_api::wire;
use dunlin_api::{CommandKind, ErrorCode, Process};
use dunlin_model::desired::MachineRow;
use dunlin_model::{AppName, MachineId, MachineState};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long an answer waits for the host to take the machine up and to begin its start; both go on without it.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
const ANSWER_LOOK: Duration = Duration::from_millis(10);

pub async fn create(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Result<Json<wire::Machine>, Failure> {
    let wish = Wish::read(body)?;
    let launch_id = given::command_id(&headers)?;
    let id = machine_rows::machine_id(&app, launch_id.as_ref());
    let lease_ttl_s = wish.lease_ttl_s;
    let row = machine_rows::create(&ctx, &app, id, wish).await?;
    answer(&ctx, &row, &caller, &headers, lease_ttl_s).await
}

/// The same machine in a new version. It keeps its id, its address and its host.
pub async fn update(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Result<Json<wire::Machine>, Failure> {
    let wish = Wish { nonce: leases::nonce(&headers)?, ..Wish::read(body)? };
    let row = machines::load(&ctx, &app, &id).await?;
    leases::check(&ctx, &row, &headers).await?;
    let lease_ttl_s = wish.lease_ttl_s;
    let row = machine_rows::update(&ctx, row, wish).await?;
    answer(&ctx, &row, &caller, &headers, lease_ttl_s).await
}

/// The machine, once its host knows it: what a client asks next is then understood.
async fn answer(
    ctx: &Arc<Ctx>,
    row: &Row<MachineRow>,
    caller: &Caller,
    headers: &HeaderMap,
    lease_ttl_s: Option<u64>,
) -> Result<Json<wire::Machine>, Failure> {
    match tokio::time::timeout(ANSWER_WAIT, taken_up(ctx, row)).await {
        Ok(taken) => taken?,
        // It is written, and its host goes on trying; the answer says in which state it is, and its problem.
        Err(_) => tracing::warn!(
            machine = %row.value.id, host = %row.value.host, version = %row.value.spec.version,
            "the host has not taken the version up within {} s; the request is answered, and the host goes on", ANSWER_WAIT.as_secs()
        ),
    }
    let owners = Owners::Control(Arc::clone(ctx));
    let nonce = match lease_ttl_s {
        None => None,
        Some(ttl_s) => {
            let kind = CommandKind::Lease {
                ttl_ms: ttl_s.saturating_mul(1000),
                owner: caller.name().to_owned(),
                description: String::new(),
            };
            let lease = machines::send(&owners, &row.value, headers, kind).await.map_err(|failure| {
                let what = format!("machine {} was written, but cannot be leased: {}", row.value.id, failure.message);
                Failure { message: what, ..failure }
            })?;
            lease.lease.map(|lease| lease.nonce)
        }
    };
    Ok(Json(wire::Machine { nonce, ..machines::asked(&owners, &row.value).await? }))
}

/// Once somebody else has changed the machine, the version that is waited for never comes: whoever asked for it is told.
async fn taken_up(ctx: &Ctx, row: &Row<MachineRow>) -> Result<(), Failure> {
    let (id, version) = (&row.value.id, &row.value.spec.version);
    loop {
        let fact = match hosts::reach(ctx, &row.value.host) {
            Ok(host) => host.machine(id).await,
            Err(refusal) => Err(refusal),
        };
        let is_known = fact.is_ok_and(|fact| {
            fact.version == *version && !matches!(fact.state, MachineState::Creating | MachineState::Updating)
        });
        let launch = ctx.state.get::<LaunchRow>(&key::launch(id)).await;
        // A host that cannot prepare it says so, and goes on trying.
        match ctx.state.machine(id).await {
            Ok(None) => return Ok(()),
            Ok(Some(now)) if now.value.spec.version != *version => {
                let what = format!(
                    "machine {id} was changed meanwhile: it is to be in version {}, and no longer in {version}, which this request made",
                    now.value.spec.version
                );
                return Err(Failure::new(ErrorCode::Conflict, what).hint("look at it again, then try again"));
            }
            Ok(Some(_)) if is_known && matches!(launch, Ok(None)) => return Ok(()),
            Ok(Some(_)) | Err(_) => tokio::time::sleep(ANSWER_LOOK).await,
        }
    }
}

/// The newest first; the host has the first of them.
pub async fn versions(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id)): Path<(AppName, MachineId)>,
) -> Result<Json<Value>, Failure> {
    let row = machines::load(&ctx, &app, &id).await?;
    let configs = ctx.state.get::<ConfigsRow>(&key::configs(&id)).await?.map(|row| row.value).unwrap_or_default();
    let spec = &row.value.spec;
    let mut versions = vec![json!({ "version": spec.version, "user_config": configs.shown(spec, &ctx.domain) })];
    let older = configs.versions.iter().filter(|given| given.version != spec.version);
    versions.extend(older.map(|given| {
        json!({ "version": given.version, "user_config": given.config, "created_at": fly::rfc3339(given.at_ms) })
    }));
    Ok(Json(Value::Array(versions)))
}

pub async fn metadata(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
) -> Result<Json<BTreeMap<String, String>>, Failure> {
    Ok(Json(owners.machine(&app, &id).await?.spec.metadata))
}

pub async fn metadata_value(
    Extension(owners): Extension<Owners>,
    Path((app, id, name)): Path<(AppName, MachineId, String)>,
) -> Result<Json<Value>, Failure> {
    let row = owners.machine(&app, &id).await?;
    let value = row.spec.metadata.get(&name);
    value.map(|value| Json(json!({ "value": value }))).ok_or_else(|| no_metadata(&id))
}

fn no_metadata(id: &MachineId) -> Failure {
    Failure::not_found(format!("machine {id} has no such metadata"))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetadataValue {
    value: String,
}

pub async fn set_metadata(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id, name)): Path<(AppName, MachineId, String)>,
    headers: HeaderMap,
    Body(body): Body<MetadataValue>,
) -> Result<StatusCode, Failure> {
    let row = machines::load(&ctx, &app, &id).await?;
    leases::check(&ctx, &row, &headers).await?;
    let mut metadata = row.value.spec.metadata.clone();
    metadata.insert(name, body.value);
    machine_rows::set_metadata(&ctx, row, metadata).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub async fn remove_metadata(
    State(ctx): State<Arc<Ctx>>,
    Path((app, id, name)): Path<(AppName, MachineId, String)>,
    headers: HeaderMap,
) -> Result<StatusCode, Failure> {
    let row = machines::load(&ctx, &app, &id).await?;
    leases::check(&ctx, &row, &headers).await?;
    let mut metadata = row.value.spec.metadata.clone();
    metadata.remove(&name).ok_or_else(|| no_metadata(&id))?;
    machine_rows::set_metadata(&ctx, row, metadata).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub struct Ps {
    sort_by: Option<String>,
    order: Option<String>,
}

pub async fn processes(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Ps>,
) -> Result<Json<Vec<Process>>, Failure> {
    let row = owners.machine(&app, &id).await?;
    let compare: fn(&Process, &Process) -> Ordering = match query.sort_by.as_deref() {
        None | Some("pid") => |a, b| a.pid.cmp(&b.pid),
        Some("stime") => |a, b| a.stime.cmp(&b.stime),
        Some("rtime") => |a, b| a.rtime.cmp(&b.rtime),
        Some("command") => |a, b| a.command.cmp(&b.command),
        Some("directory") => |a, b| a.directory.cmp(&b.directory),
        Some("cpu") => |a, b| a.cpu.cmp(&b.cpu),
        Some("rss") => |a, b| a.rss.cmp(&b.rss),
        Some(other) => {
            return Err(Failure::bad_request(format!("processes cannot be sorted by {other:?}"))
                .hint("use pid, stime, rtime, command, directory, cpu or rss"));
        }
    };
    let is_descending = match query.order.as_deref() {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(other) => {
            return Err(Failure::new(ErrorCode::BadRequest, format!("{other:?} is not an order")).hint("use asc or desc"));
        }
    };
    let mut processes = owners.reach(&row.host)?.processes(&id).await?;
    processes.sort_by(compare);
    if is_descending {
        processes.reverse();
    }
    Ok(Json(processes))
}
