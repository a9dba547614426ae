//! Which image a build became, so that one of the very same is answered at once. Only a cache: losing it costs a build.

use crate::Ctx;
use crate::failure::chain;
use crate::keys::write_private;
use dunlin_api::wire::BuildEvent;
use dunlin_builder::BuildRequest;
use dunlin_model::AppName;
use dunlin_model::seal::digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Builds that are remembered of an app: those of a few branches and targets.
const MAX_REMEMBERED: usize = 20;

/// A finished build.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Built {
    /// Of everything that the image depends on.
    key: String,
    tag: String,
    image: String,
    digest: String,
    size: u64,
}

/// Everything that the image depends on, as far as it is ours to know: what a `FROM` means may change upstream, and
/// `--no-cache` asks again. Secrets are in it as keyed digests, by which nothing can be guessed.
pub(crate) fn key(ctx: &Ctx, context_sha256: &str, request: &BuildRequest) -> String {
    let secret = |(name, value): (&String, &String)| (name.clone(), digest(&ctx.keys.master, name, value.as_bytes()));
    let secrets: BTreeMap<String, String> = request.secrets.iter().map(secret).collect();
    let parts = serde_json::json!([
        context_sha256,
        request.dockerfile,
        request.target,
        request.args,
        secrets,
        request.bootstrapped_bases,
    ]);
    hex(&Sha256::digest(parts.to_string()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Built {
    pub fn new(key: &str, tag: &str, event: &BuildEvent) -> Option<Self> {
        let BuildEvent::Done { image, digest, size } = event else { return None };
        let (key, tag) = (key.to_owned(), tag.to_owned());
        Some(Self { key, tag, image: image.clone(), digest: digest.clone(), size: *size })
    }

    /// The events of a build that has not to be made.
    pub fn events(self) -> [BuildEvent; 2] {
        let message = format!("nothing changed since {}, whose image is used; --no-cache builds it again", self.tag);
        [BuildEvent::Step { message }, BuildEvent::Done { image: self.image, digest: self.digest, size: self.size }]
    }
}

/// The newest build with this key whose image is still in the app's repository.
pub(crate) fn find(ctx: &Ctx, app: &AppName, key: &str) -> Option<Built> {
    let repo = app.as_str().parse().ok()?;
    let is_there = |built: &Built| {
        let digest = built.digest.parse().ok();
        digest.is_some_and(|digest| ctx.content.has_manifest(&repo, &digest).unwrap_or(false))
    };
    read(ctx, app).into_iter().rev().find(|built| built.key == key && is_there(built))
}

pub(crate) fn remember(ctx: &Ctx, app: &AppName, built: Built) {
    let mut all = read(ctx, app);
    all.retain(|known| known.key != built.key);
    all.push(built);
    let excess = all.len().saturating_sub(MAX_REMEMBERED);
    all.drain(..excess);
    let written = serde_json::to_vec(&all).map_err(std::io::Error::other).and_then(|json| {
        std::fs::create_dir_all(dir(ctx))?;
        write_private(&path(ctx, app), &json).map_err(std::io::Error::other)
    });
    if let Err(error) = written {
        tracing::warn!(%app, error = %chain(&error), "a finished build could not be noted; the same one is built again");
    }
}

/// For an app that is destroyed.
pub(crate) fn forget(ctx: &Ctx, app: &AppName) {
    if let Err(error) = std::fs::remove_file(path(ctx, app))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        // Its images are gone, so it leads nowhere.
        tracing::warn!(%app, %error, "the notes of an app's builds could not be removed");
    }
}

fn read(ctx: &Ctx, app: &AppName) -> Vec<Built> {
    std::fs::read(path(ctx, app)).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default()
}

fn dir(ctx: &Ctx) -> PathBuf {
    ctx.data_dir.join("builder/built")
}

fn path(ctx: &Ctx, app: &AppName) -> PathBuf {
    dir(ctx).join(format!("{app}.json"))
}
