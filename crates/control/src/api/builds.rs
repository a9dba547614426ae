//! Builds: the context goes to disk, a builder machine makes the image, its output streams back.

use super::built::{self, Built};
use super::ndjson;
use crate::failure::Failure;
use crate::images::BaseImages;
use crate::keys::random;
use crate::releases::load_app;
use crate::{Ctx, now_ms, registry};
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use dunlin_api::ErrorCode;
use dunlin_api::wire::BuildEvent;
use dunlin_builder::BuildRequest;
use dunlin_model::AppName;
use dunlin_model::token::Verb;
use futures_util::{StreamExt, stream};
use http::HeaderMap;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

const MAX_CONTEXT_BYTES: u64 = 2 * 1024 * 1024 * 1024;
const BUILD_TIMEOUT_MS: u64 = 30 * 60 * 1000;
/// A Dockerfile with more stages does not hear of the origin of each.
const MAX_BASES_TOLD: usize = 32;
/// Beyond the build's own end, so that its last push is still allowed.
const TOKEN_LIFETIME_MS: u64 = BUILD_TIMEOUT_MS + 60_000;

#[derive(Debug, Deserialize)]
pub struct Options {
    dockerfile: Option<String>,
    target: Option<String>,
    #[serde(default)]
    no_cache: bool,
}

pub async fn build(
    State(ctx): State<Arc<Ctx>>,
    Path(app): Path<AppName>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    load_app(&ctx, &app).await?;
    let Some(builder) = &ctx.builder else {
        return Err(Failure::new(ErrorCode::FailedPrecondition, "this server builds no images")
            .hint("deploy a finished image with `--image`"));
    };
    let args = json_header(&headers, "dunlin-build-args")?;
    let secrets = json_header(&headers, "dunlin-build-secrets")?;
    let context = Context::create(&ctx.data_dir.join("builder/contexts")).await?;
    let context_sha256 = context.receive(body).await?;
    // Tag and token are made when the build begins: it may wait for long.
    let request = BuildRequest {
        org: ctx.org.clone(),
        app,
        tag: String::new(),
        context: context.dir.clone(),
        dockerfile: options.dockerfile,
        target: options.target,
        args,
        secrets,
        no_cache: options.no_cache,
        bootstrapped_bases: ctx.base_images == BaseImages::Bootstrapped,
        registry_socket: builder.registry_socket.clone(),
        registry_token: String::new(),
        timeout_ms: BUILD_TIMEOUT_MS,
    };
    let key = built::key(&ctx, &context_sha256, &request);
    let found = if request.no_cache { None } else { built::find(&ctx, &request.app, &key) };
    if let Some(found) = found {
        return Ok(ndjson(stream::iter(found.events())));
    }
    let app = request.app.clone();
    let stage = Stage::Queue(Box::new(request));
    let build = Build { ctx, context, app, key, tag: String::new(), stage, bases: vec![], next: None };
    Ok(ndjson(stream::unfold(build, next_event)))
}

/// A build and what it holds; dropping it ends the builder machine and removes the context.
struct Build {
    ctx: Arc<Ctx>,
    #[expect(dead_code, reason = "its directory is removed when the build ends")]
    context: Context,
    app: AppName,
    /// Of all that its image depends on.
    key: String,
    tag: String,
    stage: Stage,
    /// Base images whose origin was told.
    bases: Vec<String>,
    /// Follows the event that was told last.
    next: Option<BuildEvent>,
}

enum Stage {
    Queue(Box<BuildRequest>),
    Waiting(Box<BuildRequest>),
    /// The slot is held while it runs.
    Runs(mpsc::Receiver<BuildEvent>, OwnedSemaphorePermit),
}

/// One build at a time for an organization, because they share its cache.
async fn next_event(mut build: Build) -> Option<(BuildEvent, Build)> {
    if let Some(event) = build.next.take() {
        return Some((event, build));
    }
    loop {
        build.stage = match build.stage {
            Stage::Queue(request) => match Arc::clone(&build.ctx.build_slot).try_acquire_owned() {
                Ok(slot) => {
                    build.tag = format!("build-{}", now_ms());
                    begin(&build.ctx, *request, &build.tag, slot)
                }
                Err(_) => {
                    let message = format!("waiting for another build of {}", request.org);
                    build.stage = Stage::Waiting(request);
                    return Some((BuildEvent::Step { message }, build));
                }
            },
            Stage::Waiting(request) => {
                let slot = Arc::clone(&build.ctx.build_slot).acquire_owned().await.ok()?;
                build.tag = format!("build-{}", now_ms());
                begin(&build.ctx, *request, &build.tag, slot)
            }
            Stage::Runs(mut events, slot) => {
                let event = events.recv().await?;
                build.stage = Stage::Runs(events, slot);
                build.next = origin(&build.ctx, &event, &mut build.bases);
                if let Some(built) = Built::new(&build.key, &build.tag, &event) {
                    built::remember(&build.ctx, &build.app, built);
                }
                return Some((event, build));
            }
        };
    }
}

/// Said after the step that takes a base image which is not what its name says.
fn origin(ctx: &Ctx, event: &BuildEvent, told: &mut Vec<String>) -> Option<BuildEvent> {
    let BuildEvent::Output { line } = event else { return None };
    let base = base_image(line).filter(|base| told.len() < MAX_BASES_TOLD && !told.iter().any(|known| known == base))?;
    told.push(base.to_owned());
    let found = registry::made_here(&ctx.content, ctx.base_images, base);
    found.ok().flatten().map(|_| BuildEvent::Step { message: registry::origin(base) })
}

/// Of buildah's `STEP 1/7: FROM --platform=... python:3.11 AS build`.
fn base_image(line: &str) -> Option<&str> {
    let (_, step) = line.split_once("STEP ")?;
    let (_, from) = step.split_once(": FROM ")?;
    from.split_whitespace().find(|word| !word.starts_with("--"))
}

/// The slot is held: the build's time runs from now on, and its token's; and no other build has the same tag.
fn begin(ctx: &Ctx, mut request: BuildRequest, tag: &str, slot: OwnedSemaphorePermit) -> Stage {
    request.tag = tag.to_owned();
    let (apps, verbs) = (Some(vec![request.app.clone()]), vec![Verb::Pull, Verb::Push]);
    (_, request.registry_token) = ctx.tokens.create(&ctx.org, apps, verbs, now_ms() + TOKEN_LIFETIME_MS);
    Stage::Runs(dunlin_builder::build(request, Arc::clone(&ctx.host)), slot)
}

fn json_header(headers: &HeaderMap, name: &str) -> Result<BTreeMap<String, String>, Failure> {
    let Some(value) = headers.get(name) else { return Ok(BTreeMap::new()) };
    let json = BASE64.decode(value.as_bytes()).ok();
    let map = json.and_then(|json| serde_json::from_slice(&json).ok());
    map.ok_or_else(|| Failure::bad_request(format!("the header {name} is not a JSON object of texts in base64")))
}

/// A directory of its own for one context, readable by the builder's mapped root.
struct Context {
    dir: PathBuf,
}

impl Context {
    async fn create(parent: &FsPath) -> Result<Self, Failure> {
        let name: String = random::<8>().iter().map(|byte| format!("{byte:02x}")).collect();
        let dir = parent.join(name);
        let made = tokio::fs::create_dir_all(&dir).await;
        made.map_err(|error| disk_failure("the build's context cannot be stored", &error))?;
        let context = Self { dir };
        let readable = std::fs::Permissions::from_mode(0o755);
        let set = tokio::fs::set_permissions(&context.dir, readable).await;
        set.map_err(|error| disk_failure("the build's context cannot be stored", &error))?;
        Ok(context)
    }

    /// The SHA-256 of the context's bytes.
    async fn receive(&self, body: Body) -> Result<String, Failure> {
        let store = |error| disk_failure("the build's context cannot be stored", &error);
        let mut file = tokio::fs::File::create(self.dir.join("context.tar")).await.map_err(store)?;
        let mut size = 0u64;
        let mut hash = Sha256::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| {
                Failure::bad_request(format!("the context was cut off: {error}")).hint("deploy again")
            })?;
            size += chunk.len() as u64;
            if size > MAX_CONTEXT_BYTES {
                return Err(Failure::new(ErrorCode::TooLarge, format!("the context has more than {} GiB", MAX_CONTEXT_BYTES >> 30))
                    .hint("keep what the build does not need out of it with .dockerignore"));
            }
            hash.update(&chunk);
            file.write_all(&chunk).await.map_err(store)?;
        }
        file.flush().await.map_err(store)?;
        let readable = std::fs::Permissions::from_mode(0o644);
        file.set_permissions(readable).await.map_err(store)?;
        Ok(built::hex(&hash.finalize()))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "a build's context could not be removed");
        }
    }
}

fn disk_failure(what: &str, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::StorageFull || error.kind() == io::ErrorKind::QuotaExceeded {
        return Failure::new(ErrorCode::DiskFull, format!("{what}: the disk is full"))
            .hint("free some space in the data directory, then deploy again");
    }
    Failure::internal(what, error)
}

/// Contexts that a killed server left behind.
pub(crate) fn remove_leftovers(data_dir: &FsPath) -> io::Result<()> {
    match std::fs::remove_dir_all(data_dir.join("builder/contexts")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_image_of_a_stage_is_named_in_its_first_step() {
        let check = |line: &str, expected| assert_eq!(base_image(line), expected, "{line}");
        check("STEP 1/7: FROM python:3.11", Some("python:3.11"));
        check("[1/2] STEP 1/4: FROM docker.io/library/node:18 AS build", Some("docker.io/library/node:18"));
        check("STEP 1/2: FROM --platform=linux/amd64 debian:12", Some("debian:12"));
        check("STEP 2/7: RUN echo FROM here", None);
        check("FROM python:3.11", None);
    }
}
