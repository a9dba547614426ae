//! Health, metrics, version, tokens.

use super::Caller;
use super::given::Body;
use crate::failure::Failure;
use crate::owners::Owners;
use crate::rows::{Change, RevokedRow, key};
use crate::tokens::{MAX_APPS, MAX_LIFETIME_S};
use crate::{Ctx, now_ms};
use axum::Json;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use dunlin_api::wire::{CreateToken, CreatedToken, VersionInfo};
use dunlin_api::ErrorCode;
use dunlin_model::Region;
use dunlin_model::desired::{AppRow, HostRow};
use dunlin_model::region::place_of;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A token's id: 16 hexadecimal digits.
const TOKEN_ID_BYTES: usize = 16;

/// Requests answered, by kind of status.
#[derive(Default)]
pub(crate) struct Requests {
    ok: AtomicU64,
    client_error: AtomicU64,
    server_error: AtomicU64,
}

impl Requests {
    pub fn count(&self, status: StatusCode) {
        let counter = match status.as_u16() {
            400..500 => &self.client_error,
            500.. => &self.server_error,
            _ => &self.ok,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The process answers.
pub async fn healthz() -> &'static str {
    "ok\n"
}

/// The store answers, config facts were published, and every part that was handed in is ready.
pub async fn readyz(State(ctx): State<Arc<Ctx>>) -> Result<&'static str, Failure> {
    ctx.state.keys("hosts/").await?;
    let mut missing: Vec<String> = ctx.ready.iter().filter_map(|ready| ready().err()).collect();
    if !ctx.published.load(Ordering::Acquire) {
        missing.push("desired state has not been published yet".into());
    }
    if missing.is_empty() {
        return Ok("ready\n");
    }
    Err(Failure::new(ErrorCode::Unavailable, missing.join("; ")))
}

pub async fn metrics(State(ctx): State<Arc<Ctx>>) -> Result<Response, Failure> {
    let apps = ctx.state.list::<AppRow>("apps/").await?.len();
    let machines = ctx.state.machines().await?.len();
    let mut text = String::new();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let requests = &ctx.requests;
    let mut line = |kind: &str, name: &str, help: &str, samples: &[(&str, u64)]| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    line("gauge", "dunlin_apps", "Apps that exist.", &[("", apps as u64)]);
    line("gauge", "dunlin_machines_desired", "Machines that should exist.", &[("", machines as u64)]);
    line("counter", "dunlin_api_requests_total", "Answered requests to the control API.", &[
        ("{status=\"ok\"}", count(&requests.ok)),
        ("{status=\"client_error\"}", count(&requests.client_error)),
        ("{status=\"server_error\"}", count(&requests.server_error)),
    ]);
    for piece in &ctx.metrics {
        piece(&mut text);
    }
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

pub async fn version(Extension(owners): Extension<Owners>) -> Json<VersionInfo> {
    let ctx = match owners {
        Owners::Control(ctx) => ctx,
        Owners::Member(member, _) => return Json(member.version.clone()),
    };
    Json(VersionInfo {
        version: ctx.version.clone(),
        commit: ctx.commit.clone(),
        host: ctx.host_row.id.to_string(),
        domain: ctx.domain.clone(),
        http_port: ctx.http_port,
        https_port: ctx.https_port,
        costs: ctx.costs.clone(),
    })
}

/// The authority's certificate, for whoever wants to trust it.
pub async fn ca(State(ctx): State<Arc<Ctx>>) -> Response {
    ([(CONTENT_TYPE, "application/x-pem-file")], ctx.authority.certificate_pem().to_owned()).into_response()
}

/// Those that hosts are in.
pub async fn regions(State(ctx): State<Arc<Ctx>>) -> Result<Json<Value>, Failure> {
    let hosts = ctx.state.list::<HostRow>("hosts/").await?;
    let codes: BTreeSet<Region> = hosts.into_iter().map(|row| row.value.region).collect();
    let shown = codes.iter().map(|code| {
        let mut shown = json!({ "code": code, "name": code, "gateway_available": false, "deprecated": false });
        if let Some(place) = place_of(code) {
            shown["name"] = json!(place.name);
            shown["latitude"] = json!(place.latitude);
            shown["longitude"] = json!(place.longitude);
        }
        shown
    });
    Ok(Json(json!({ "Regions": shown.collect::<Vec<_>>(), "Nearest": ctx.host_row.region })))
}

pub async fn create_token(
    State(ctx): State<Arc<Ctx>>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<CreateToken>,
) -> Result<(StatusCode, Json<CreatedToken>), Failure> {
    if body.verbs.is_empty() {
        return Err(Failure::invalid("a token without verbs could do nothing").hint("for example [\"read\", \"deploy\"]"));
    }
    if body.expires_in_s == 0 || body.expires_in_s > MAX_LIFETIME_S {
        return Err(Failure::invalid(format!("a token lives between 1 second and {MAX_LIFETIME_S} seconds, which is a year")));
    }
    if body.apps.as_ref().is_some_and(|apps| apps.len() > MAX_APPS) {
        return Err(Failure::invalid(format!("a token names at most {MAX_APPS} apps")).hint("without apps it covers all of the organization"));
    }
    if !caller.may_grant(&ctx, &body.verbs, body.apps.as_deref()) {
        return Err(Failure::new(ErrorCode::Forbidden, "a token cannot make one that allows more than itself"));
    }
    let expires_at_ms = now_ms() + body.expires_in_s * 1000;
    let expires_at_ms = caller.expires_at_ms().map_or(expires_at_ms, |own| own.min(expires_at_ms));
    let (id, token) = ctx.tokens.create(&ctx.org, body.apps, body.verbs, expires_at_ms);
    tracing::info!(token = %id, "token created");
    Ok((StatusCode::CREATED, Json(CreatedToken { id, token })))
}

#[derive(Debug, Deserialize)]
pub struct Revoke {
    id: String,
}

pub async fn revoke_token(State(ctx): State<Arc<Ctx>>, Body(body): Body<Revoke>) -> Result<Json<Value>, Failure> {
    if body.id.len() != TOKEN_ID_BYTES || !body.id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Failure::invalid("a token's id is 16 hexadecimal digits").hint("`dunlin tokens create` printed it"));
    }
    let id = body.id.to_lowercase();
    ctx.state.commit(Change::default().put(key::revoked(&id), &RevokedRow { at_ms: now_ms() })).await?;
    ctx.tokens.revoke([id.clone()]);
    tracing::info!(token = %id, "token revoked");
    Ok(Json(json!({ "ok": true, "id": id })))
}

