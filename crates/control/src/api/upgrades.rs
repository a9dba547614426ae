//! The upgrade of the fleet: its binary comes in, how far it is, an operator's word on it.

use crate::failure::Failure;
use crate::operate::MAX_BINARY_BYTES;
use crate::upgrade::{self, State as UpgradeStateOf, Upgrade, Wanted};
use crate::{Ctx, keys};
use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use dunlin_api::ErrorCode;
use dunlin_api::fleet::{UpgradeLine, UpgradeShown, UpgradeState, UpgradeTurn};
use dunlin_model::HostId;
use dunlin_planner::upgrade::{Phase, Turn};
use futures_util::StreamExt;
use http::StatusCode;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    canary: Option<HostId>,
    parallel: Option<u32>,
    bake_s: Option<u64>,
    /// What the sender found: what comes must be that.
    sha256: String,
    /// Nothing is begun: the answer is whether it could be, before so much is sent.
    #[serde(default)]
    only_check: bool,
}

const BAKE_S: u64 = 60;

pub async fn start(
    State(ctx): State<Arc<Ctx>>,
    Query(start): Query<Start>,
    body: Body,
) -> Result<(StatusCode, Json<Option<UpgradeShown>>), Failure> {
    let wanted = Wanted {
        canary: start.canary,
        parallel: start.parallel.unwrap_or(1),
        bake_ms: start.bake_s.unwrap_or(BAKE_S).saturating_mul(1000),
    };
    upgrade::may_start(&ctx, &wanted).await?;
    if start.only_check {
        return Ok((StatusCode::OK, Json(None)));
    }
    let dir = upgrade::binaries(&ctx);
    let received = Received::create(&dir).await?;
    let (sha256, bytes) = received.receive(body).await?;
    if sha256 != start.sha256.to_ascii_lowercase() {
        return Err(Failure::invalid(format!("what came has the sha256 {sha256}, and {} was announced", start.sha256)).hint("send it again"));
    }
    let begun = upgrade::start(&ctx, &wanted, sha256.clone(), bytes, &received.path).await;
    let begun = begun.map_err(|failure| match &failure.hint {
        Some(_) => failure,
        None => failure.hint("name a binary of dunlin for the hosts' system: dunlin cluster upgrade --binary FILE"),
    })?;
    Ok((StatusCode::ACCEPTED, Json(Some(shown(&begun)))))
}

pub async fn get(State(ctx): State<Arc<Ctx>>) -> Result<Json<UpgradeShown>, Failure> {
    let row = upgrade::load(&ctx).await?.ok_or_else(upgrade::none)?;
    Ok(Json(shown(&row.value)))
}

pub async fn resume(State(ctx): State<Arc<Ctx>>) -> Result<Json<UpgradeShown>, Failure> {
    upgrade::resume(&ctx).await.map(|upgrade| Json(shown(&upgrade)))
}

pub async fn abort(State(ctx): State<Arc<Ctx>>) -> Result<Json<UpgradeShown>, Failure> {
    upgrade::abort(&ctx).await.map(|upgrade| Json(shown(&upgrade)))
}

pub(super) fn shown(upgrade: &Upgrade) -> UpgradeShown {
    let (state, why) = match &upgrade.state {
        UpgradeStateOf::Running => (UpgradeState::Running, None),
        UpgradeStateOf::Stopped { why } => (UpgradeState::Stopped, Some(why.clone())),
        UpgradeStateOf::Done => (UpgradeState::Done, None),
    };
    UpgradeShown {
        id: upgrade.id.clone(),
        version: upgrade.version.clone(),
        sha256: upgrade.sha256.clone(),
        state,
        why,
        bake_s: upgrade.bake_ms / 1000,
        parallel: upgrade.parallel,
        started_at_ms: upgrade.started_at_ms,
        hosts: upgrade.hosts.iter().map(turn).collect(),
        story: upgrade.story.iter().map(|line| UpgradeLine { at_ms: line.at_ms, text: line.text.clone() }).collect(),
        story_dropped: upgrade.story_dropped,
    }
}

fn turn(turn: &Turn) -> UpgradeTurn {
    let (phase, why, is_back) = match &turn.phase {
        Phase::Waiting => ("waiting", None, None),
        Phase::Installing { .. } => ("installing", None, None),
        Phase::Baking { worse, .. } => ("baking", worse.as_ref().map(|worse| worse.why.clone()), None),
        Phase::Keeping { .. } => ("keeping", None, None),
        Phase::GoingBack { why, .. } => ("going_back", Some(why.clone()), None),
        Phase::Kept { .. } => ("kept", None, None),
        Phase::Failed { why, is_back, .. } => ("failed", Some(why.clone()), Some(*is_back)),
        Phase::Skipped { why } => ("skipped", Some(why.clone()), None),
    };
    UpgradeTurn { host: turn.host.clone(), phase: phase.into(), why, is_back }
}

/// A binary on its way in, under a name of its own, which is gone in the end.
struct Received {
    path: PathBuf,
}

impl Received {
    async fn create(dir: &FsPath) -> Result<Self, Failure> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| unstored(&error))?;
        let name: String = keys::random::<8>().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path: dir.join(format!("{name}.part")) })
    }

    /// Its SHA-256 and how long it is.
    async fn receive(&self, body: Body) -> Result<(String, u64), Failure> {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(&self.path);
        let mut file = tokio::fs::File::from_std(file.map_err(|error| unstored(&error))?);
        let (mut bytes, mut hash, mut chunks) = (0, Sha256::new(), body.into_data_stream());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Failure::bad_request(format!("the binary was cut off: {error}")).hint("send it again"))?;
            bytes += chunk.len() as u64;
            if bytes > MAX_BINARY_BYTES {
                return Err(Failure::new(ErrorCode::TooLarge, format!("the binary has more than {} GiB", MAX_BINARY_BYTES >> 30))
                    .hint("name the binary itself, not an archive"));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(|error| unstored(&error))?;
        }
        file.sync_all().await.map_err(|error| unstored(&error))?;
        let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((digest, bytes))
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path); // it has its place by now, or is in the way of nobody
    }
}

fn unstored(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Failure::new(ErrorCode::DiskFull, "the binary cannot be stored: the disk is full").hint("free some space in the data directory")
        }
        _ => Failure::internal("the binary cannot be stored", error),
    }
}
