//! Leases: one caller's word that nobody else changes a machine for a while. The host that owns the machine keeps it.

use super::{Caller, given, machines};
use crate::failure::Failure;
use crate::owners::Owners;
use crate::rows::Row;
use crate::{Ctx, hosts};
use axum::Json;
use axum::extract::{Extension, Path, Query};
use axum::response::{IntoResponse, Response};
use dunlin_api::{CommandKind, ErrorCode, Refusal};
use dunlin_model::desired::MachineRow;
use dunlin_model::{AppName, Lease, MachineId};
use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

/// As on Fly, where none is asked for.
const DEFAULT_TTL_S: u64 = 3600;

/// Hosts that are asked side by side, once for each machine.
const MOST_AT_ONCE: usize = 16;

/// Hosts make nonces of 32 characters.
const MAX_NONCE_BYTES: usize = 128;

/// What cannot be a nonce is not taken for one that has ended, nor carried to a host.
pub(super) fn nonce(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(given) = headers.get("fly-machine-lease-nonce").filter(|given| !given.is_empty()) else { return Ok(None) };
    let nonce = given.to_str().ok().filter(|nonce| nonce.len() <= MAX_NONCE_BYTES);
    nonce.map(|nonce| Some(nonce.to_owned())).ok_or_else(|| {
        Failure::bad_request(format!("the header fly-machine-lease-nonce is no text of at most {MAX_NONCE_BYTES} characters"))
            .hint("send the nonce as it came with the lease")
    })
}

/// Refuses what changes the machine in the store while somebody else has the lease.
pub(super) async fn check(ctx: &Ctx, row: &Row<MachineRow>, headers: &HeaderMap) -> Result<(), Failure> {
    let nonce = nonce(headers)?;
    Ok(hosts::check_lease(ctx, &row.value, nonce.as_deref()).await?)
}

/// Refuses the end of an app while somebody else has the lease of one of its machines, or while a host cannot say it. Of those
/// without a lease a nonce is not asked for.
pub(super) async fn check_all(ctx: &Ctx, app: &AppName, headers: &HeaderMap) -> Result<(), Failure> {
    let nonce = nonce(headers)?;
    let machines = ctx.state.machines_of(app).await?;
    let mut refused = vec![];
    for some in machines.chunks(MOST_AT_ONCE) {
        let checked = some.iter().map(async |row| match hosts::check_lease(ctx, &row.value, nonce.as_deref()).await {
            Err(Refusal::NotLeased { .. }) => Ok(()),
            checked => checked,
        });
        refused.extend(join_all(checked).await.into_iter().filter_map(Result::err));
    }
    // What is known for sure first.
    refused.sort_by_key(|refusal| !matches!(refusal, Refusal::Leased { .. }));
    let Some(first) = refused.first().cloned() else { return Ok(()) };
    let more = match refused.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} of its other machines cannot be destroyed either"),
    };
    let why = format!("app {app} cannot be destroyed: {first}{more}");
    let hint = "wait until the leases end, or send the nonce of the lease; `--force` (`?force=true`) destroys the app all the same";
    let hint = match &first {
        Refusal::Leased { .. } => hint,
        _ => "try again when its host answers; `--force` (`?force=true`) gives up its machines, which the host destroys when it returns",
    };
    Err(Failure { message: why, ..Failure::from(first) }.hint(hint))
}

#[derive(Debug, Default, Deserialize)]
pub struct Acquire {
    /// Seconds.
    ttl: Option<u64>,
    description: Option<String>,
}

/// Takes the lease, or makes that of the nonce last longer.
pub async fn acquire(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Query(query): Query<Acquire>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<Response, Failure> {
    let body: Acquire = given::optional(&body)?;
    let row = owners.machine(&app, &id).await?;
    let kind = CommandKind::Lease {
        ttl_ms: query.ttl.or(body.ttl).unwrap_or(DEFAULT_TTL_S).saturating_mul(1000),
        owner: caller.name().to_owned(),
        description: query.description.or(body.description).unwrap_or_default(),
    };
    match machines::send(&owners, &row, &headers, kind).await {
        Ok(answer) => {
            let lease = answer.lease.ok_or_else(|| {
                Failure::new(ErrorCode::Internal, "the host gave no lease").hint("look at the machine's lease, then try again")
            })?;
            let body = shown(&lease, row.spec.version.as_str(), true);
            Ok((StatusCode::CREATED, Json(body)).into_response())
        }
        Err(failure) if failure.code == ErrorCode::Conflict => Ok(conflict(failure)),
        Err(failure) => Err(failure),
    }
}

/// What Fly's clients look at is `message` and `code` here; `error` is everywhere.
fn conflict(failure: Failure) -> Response {
    let body = json!({
        "status": "error",
        "error": failure.message,
        "message": failure.message,
        "code": "conflict",
        "hint": failure.hint,
        "request_id": super::request_id(),
    });
    (StatusCode::CONFLICT, Json(body)).into_response()
}

/// Whoever knows the nonce has the lease: it is shown to nobody but them.
fn shown(lease: &Lease, version: &str, with_nonce: bool) -> Value {
    json!({
        "status": "success",
        "data": {
            "nonce": if with_nonce { lease.nonce.as_str() } else { "" },
            "expires_at": lease.expires_at_ms / 1000,
            "owner": lease.owner,
            "description": lease.description,
            "version": version,
        },
    })
}

pub async fn get(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    let row = owners.machine(&app, &id).await?;
    let lease = owners.reach(&row.host)?.lease(&id).await?;
    let lease = lease.ok_or_else(|| {
        Failure::not_found(format!("nobody has a lease of machine {id}"))
            .hint("whoever may deploy the app may change it; a POST to the same path takes a lease")
    })?;
    let is_own = nonce(&headers)?.as_ref() == Some(&lease.nonce);
    Ok(Json(shown(&lease, row.spec.version.as_str(), is_own)))
}

pub async fn release(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    headers: HeaderMap,
) -> Result<Json<Value>, Failure> {
    if nonce(&headers)?.is_none() {
        return Err(Failure::bad_request("the request has no nonce")
            .hint("send the header fly-machine-lease-nonce with the nonce of the lease"));
    }
    let row = owners.machine(&app, &id).await?;
    machines::send(&owners, &row, &headers, CommandKind::Release).await?;
    Ok(Json(json!({ "status": "success", "ok": true })))
}
