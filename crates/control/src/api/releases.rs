//! Releases and their events.

use super::given::Body;
use super::ndjson;
use crate::failure::Failure;
use crate::releases::{self, load_app};
use crate::rows::key;
use crate::{Ctx, foresee, now_ms, reconcile};
use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use dunlin_api::wire::{CreateRelease, DeployEvent, PlanRequest, PlanShown, Release, Rollback};
use dunlin_model::AppName;
use dunlin_model::desired::{ReleaseRow, ReleaseStatus};
use futures_util::stream;
use http::StatusCode;
use std::sync::Arc;
use std::time::Duration;

/// A follower looks at the release's row this often, should its end not be told.
const LOOK_EVERY: Duration = Duration::from_secs(2);

pub(crate) fn wire(row: &ReleaseRow) -> Release {
    let digest = &row.image.digest;
    let image = match &row.image.tag {
        Some(tag) => format!("{}:{tag}@{digest}", row.image.repository),
        None => format!("{}@{digest}", row.image.repository),
    };
    Release {
        app: row.app.clone(),
        version: row.number,
        image,
        status: row.status,
        reason: row.reason.clone(),
        created_at: row.created_at_ms,
        config: None,
    }
}

pub async fn list(State(ctx): State<Arc<Ctx>>, Path(app): Path<AppName>) -> Result<Json<Vec<Release>>, Failure> {
    load_app(&ctx, &app).await?;
    let rows = ctx.state.list::<ReleaseRow>(&key::releases(&app)).await?;
    let mut releases: Vec<_> = rows.iter().map(|row| wire(&row.value)).collect();
    releases.sort_by_key(|release| std::cmp::Reverse(release.version));
    Ok(Json(releases))
}

pub async fn create(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Body(body): Body<CreateRelease>,
) -> Result<(StatusCode, Json<Release>), Failure> {
    let row = releases::deploy(&ctx, &app, body).await?;
    Ok((StatusCode::CREATED, Json(wire(&row))))
}

/// What a deploy would do.
pub async fn plan(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Body(body): Body<PlanRequest>,
) -> Result<Json<PlanShown>, Failure> {
    Ok(Json(foresee::plan(&ctx, &app, body).await?))
}

async fn load(ctx: &Ctx, app: &AppName, number: u32) -> Result<ReleaseRow, Failure> {
    load_app(ctx, app).await?;
    let row = ctx.state.get::<ReleaseRow>(&key::release(app, number)).await?;
    row.map(|row| row.value).ok_or_else(|| {
        Failure::not_found(format!("app {app} has no release v{number}"))
            .hint(format!("`dunlin releases --app {app}` shows those it has"))
    })
}

pub async fn get(
    State(ctx): State<Arc<Ctx>>,
    Path((app, number)): Path<(AppName, u32)>,
) -> Result<Json<Release>, Failure> {
    let row = load(&ctx, &app, number).await?;
    Ok(Json(Release { config: Some(row.config.clone()), ..wire(&row) }))
}

pub async fn rollback(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Body(body): Body<Rollback>,
) -> Result<(StatusCode, Json<Release>), Failure> {
    let row = releases::rollback(&ctx, &app, body.version).await?;
    Ok((StatusCode::CREATED, Json(wire(&row))))
}

/// All events so far, then those that come, until the release has ended.
pub async fn events(
    State(ctx): State<Arc<Ctx>>,
    Path((app, number)): Path<(AppName, u32)>,
) -> Result<Response, Failure> {
    load(&ctx, &app, number).await?;
    let history = reconcile::history(&ctx, &app, number).await?;
    let follow = Follow { ctx, app, number, history, next: 0, ended: false };
    Ok(ndjson(stream::unfold(follow, next_event)))
}

struct Follow {
    ctx: Arc<Ctx>,
    app: AppName,
    number: u32,
    history: tokio::sync::watch::Receiver<Arc<Vec<DeployEvent>>>,
    next: usize,
    ended: bool,
}

async fn next_event(mut follow: Follow) -> Option<(DeployEvent, Follow)> {
    if follow.ended {
        return None;
    }
    loop {
        let event = follow.history.borrow_and_update().get(follow.next).cloned();
        if let Some(event) = event {
            follow.next += 1;
            follow.ended = event.ended.is_some();
            return Some((event, follow));
        }
        // A release that was superseded, or whose app was destroyed, ends without an event.
        let row = load(&follow.ctx, &follow.app, follow.number).await;
        let status = row.as_ref().map_or(ReleaseStatus::Failed, |row| row.status);
        let is_told = follow.history.borrow().len() > follow.next;
        if status != ReleaseStatus::Running && !is_told {
            follow.ended = true;
            // The end is written with its event, and told a moment later.
            let stored = follow.ctx.state.get::<Vec<DeployEvent>>(&key::events(&follow.app, follow.number)).await;
            let last = stored.ok().flatten().and_then(|row| row.value.last().cloned());
            if let Some(event) = last.filter(|event| event.ended.is_some()) {
                return Some((event, follow));
            }
            let message = match (&row, status) {
                (Err(failure), _) => failure.message.clone(),
                (Ok(_), ReleaseStatus::Superseded) => format!("release v{} was superseded by a newer one", follow.number),
                (Ok(row), _) => row.reason.clone(),
            };
            let event = DeployEvent {
                at_ms: now_ms(),
                release: follow.number,
                message,
                machine: None,
                ended: Some(status),
                details: vec![],
                hint: None,
            };
            return Some((event, follow));
        }
        tokio::select! {
            Ok(()) = follow.history.changed() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = follow.ctx.stop.cancelled() => return None,
        }
    }
}
