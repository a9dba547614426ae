//! Control's side of the image registry: who may push and pull, what a reference means, and which
//! images are still needed.

use crate::failure::Failure;
use crate::images::{BaseImages, ResolveImage, Wanted};
use crate::{Ctx, now_ms};
use dunlin_api::ErrorCode;
use dunlin_model::desired::ReleaseRow;
use dunlin_model::token::Verb;
use dunlin_model::{AppName, ImageRef};
use dunlin_registry::{Access, Authorizer, ContentStore, Credentials, Denied, Digest, PullError, Repo};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Base images for everybody's builds.
const LIBRARY: &str = "library/";
/// A deploy uses its build's image within seconds; a person who builds first and releases by hand has this long.
const BUILD_GRACE_MS: u64 = 2 * 3600 * 1000;

/// The authorizer of the registry: a token as bearer or as password, one repository an app.
pub(crate) fn authorizer(ctx: Arc<Ctx>) -> Authorizer {
    Arc::new(move |credentials, repo, access| authorize(&ctx, credentials, repo, access))
}

fn authorize(ctx: &Ctx, credentials: &Credentials, repo: &str, access: Access) -> Result<(), Denied> {
    let token = match credentials {
        Credentials::Anonymous => {
            return Err(Denied::Unauthenticated(
                "log in with any user name and a token as password; `dunlin tokens create --verb pull --verb push` makes one".into(),
            ));
        }
        Credentials::Basic { password, .. } => password,
        Credentials::Bearer(token) => token,
    };
    let capability =
        ctx.tokens.verify(token, now_ms()).map_err(|failure| Denied::Unauthenticated(failure.message))?;
    let verb = match access {
        Access::Login => return Ok(()),
        Access::Pull => Verb::Pull,
        Access::Push | Access::Delete => Verb::Push,
    };
    let forbid = |why: String| Err(Denied::Forbidden(why));
    if repo.starts_with(LIBRARY) {
        // Base images are nobody's secret, and only the server itself makes them.
        let may = verb == Verb::Pull && capability.verbs.contains(&Verb::Pull) && capability.org == ctx.org;
        return if may { Ok(()) } else { forbid(format!("{repo} is a base image: it can only be pulled")) };
    }
    let Ok(app) = repo.parse::<AppName>() else {
        return forbid(format!("{repo} is not the name of an app, and so not a repository"));
    };
    if !capability.allows(verb, &ctx.org, Some(&app)) {
        return forbid(format!("the token {} does not allow {verb:?} on {app}", capability.id).to_lowercase());
    }
    if !ctx.view.current().config.apps.contains_key(&app) {
        return forbid(format!("there is no app {app}: `dunlin apps create {app}` makes it"));
    }
    Ok(())
}

/// Looks images up in the registry's store, and takes those from elsewhere into the app's repository.
pub fn resolver(store: ContentStore, bases: BaseImages) -> ResolveImage {
    Box::new(move |app, wanted| {
        let store = store.clone();
        Box::pin(async move { resolve(&store, bases, &app, wanted).await })
    })
}

async fn resolve(
    store: &ContentStore,
    bases: BaseImages,
    app: &AppName,
    wanted: Wanted,
) -> Result<ImageRef, Failure> {
    let repo = repository(app)?;
    let missing = |what: String| {
        Failure::not_found(format!("the image {what} is not in the registry"))
            .hint(format!("`dunlin deploy --app {app}` builds and pushes one; or name an image of another registry"))
    };
    let broken = |error: dunlin_registry::StoreError| Failure::internal("the registry's store cannot be read", &error);
    let image = |digest: &Digest, tag: Option<String>| ImageRef {
        repository: app.to_string(),
        digest: digest.as_str().to_owned(),
        tag,
    };
    match wanted {
        Wanted::Digest(text) => {
            let digest: Digest = text.parse().map_err(|error| Failure::invalid(format!("{error}")))?;
            if store.has_manifest(&repo, &digest).map_err(broken)? {
                return Ok(image(&digest, None));
            }
            Err(missing(format!("{app}@{digest}")))
        }
        Wanted::Tag(tag) => match store.resolve_tag(&repo, &tag).map_err(broken)? {
            Some(digest) => Ok(image(&digest, Some(tag))),
            None => Err(missing(format!("{app}:{tag}"))),
        },
        Wanted::Elsewhere(reference) => {
            if let Some((from, digest)) = made_here(store, bases, &reference).map_err(broken)? {
                store.copy_image(&from, &repo, &digest).map_err(broken)?;
                return Ok(image(&digest, None));
            }
            let digest = dunlin_registry::pull(store, &repo, &reference, None).await.map_err(pull_failure)?;
            Ok(image(&digest, None))
        }
    }
}

/// The base image that was made here under this name, where the server's setting prefers those, and its repository.
pub(crate) fn made_here(
    store: &ContentStore,
    bases: BaseImages,
    reference: &str,
) -> Result<Option<(Repo, Digest)>, dunlin_registry::StoreError> {
    let name = reference.strip_prefix("docker.io/").unwrap_or(reference);
    let name = if name.contains('/') { name.to_owned() } else { format!("{LIBRARY}{name}") };
    let (name, tag) = name.rsplit_once(':').unwrap_or((name.as_str(), "latest"));
    let Ok(from) = name.parse::<Repo>() else { return Ok(None) };
    if bases == BaseImages::Upstream || !name.starts_with(LIBRARY) || !dunlin_registry::is_tag(tag) {
        return Ok(None);
    }
    Ok(store.resolve_tag(&from, tag)?.map(|digest| (from, digest)))
}

/// What people are told of such an image.
pub(crate) fn origin(reference: &str) -> String {
    format!("the image {reference} is the one made here from Debian packages (`dunlin image bootstrap`), not a registry's")
}

fn pull_failure(error: PullError) -> Failure {
    let code = match &error {
        PullError::NotFound { .. } => ErrorCode::NotFound,
        PullError::Store(dunlin_registry::StoreError::Full { .. }) => ErrorCode::DiskFull,
        PullError::Unreachable { .. } => ErrorCode::Unavailable,
        PullError::Store(_) => ErrorCode::Internal,
        _ => ErrorCode::Invalid,
    };
    Failure::new(code, crate::failure::chain(&error))
        .hint("check the image's name and tag, and that this server reaches its registry")
}

/// Digests that releases may still run: what a collection of garbage must keep.
pub(crate) async fn images_in_use(ctx: &Ctx) -> Result<Vec<String>, Failure> {
    let releases = ctx.state.list::<ReleaseRow>("releases/").await?;
    let machines = ctx.state.machines().await?;
    let used: BTreeSet<String> = releases
        .into_iter()
        .map(|row| row.value.image.digest)
        .chain(machines.iter().flat_map(|row| row.value.spec.images().map(|image| image.digest.clone())))
        .collect();
    Ok(used.into_iter().collect())
}

/// Removes an app's repository, before its name is free: its next owner must not find the images.
pub(crate) async fn forget_repository(ctx: &Ctx, app: &AppName) -> Result<(), Failure> {
    let repo = repository(app)?;
    off_the_runtime(ctx, move |content| content.delete_repo(&repo)).await
}

/// Drops the tags of builds that no release and no machine uses; the collector of garbage takes their content.
pub(crate) async fn forget_builds(ctx: &Ctx) -> Result<(), Failure> {
    let used: BTreeSet<String> = images_in_use(ctx).await?.into_iter().collect();
    let mut repos = Vec::new();
    for key in ctx.state.keys("apps/").await? {
        let app: Option<AppName> = key.strip_prefix("apps/").and_then(|name| name.parse().ok());
        repos.extend(app.as_ref().map(repository).transpose()?);
    }
    let before_ms = now_ms().saturating_sub(BUILD_GRACE_MS);
    off_the_runtime(ctx, move |content| {
        for repo in &repos {
            for tag in content.tags(repo)?.iter().filter(|tag| built_at_ms(tag).is_some_and(|at_ms| at_ms < before_ms)) {
                let digest = content.resolve_tag(repo, tag)?;
                if digest.is_none_or(|digest| !used.contains(digest.as_str())) {
                    content.delete_tag(repo, tag)?;
                    tracing::debug!(app = %repo, tag, "the image of a build that nobody uses is not kept");
                }
            }
        }
        Ok(())
    })
    .await
}

/// When the build with this tag began; `None` for tags that people gave.
fn built_at_ms(tag: &str) -> Option<u64> {
    tag.strip_prefix("build-")?.parse().ok()
}

fn repository(app: &AppName) -> Result<Repo, Failure> {
    app.as_str().parse().map_err(|error| Failure::invalid(format!("{error}")))
}

async fn off_the_runtime<T: Send + 'static>(
    ctx: &Ctx,
    work: impl FnOnce(&ContentStore) -> Result<T, dunlin_registry::StoreError> + Send + 'static,
) -> Result<T, Failure> {
    let content = ctx.content.clone();
    let done = tokio::task::spawn_blocking(move || work(&content)).await;
    let done = done.map_err(|error| Failure::internal("the registry's store could not be worked on", &error))?;
    done.map_err(|error| Failure::internal("the registry's store cannot be read or written", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_images_made_here_are_preferred_only_where_the_server_is_set_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::open(dir.path()).unwrap();
        let from: Repo = "library/python".parse().unwrap();
        let (config, size) = store.put_blob(&from, &b"{}"[..], None).unwrap();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media_type, "layers": [],
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.as_str(), "size": size },
        });
        store.put_manifest(&from, media_type, manifest.to_string().as_bytes(), Some("3.11")).unwrap();
        let found = |bases, reference: &str| made_here(&store, bases, reference).unwrap().is_some();
        for reference in ["python:3.11", "library/python:3.11", "docker.io/library/python:3.11"] {
            assert!(found(BaseImages::Bootstrapped, reference), "{reference}");
            assert!(!found(BaseImages::Upstream, reference), "{reference}");
        }
        for reference in ["python:3.12", "python", "ghcr.io/library/python:3.11", "python@sha256:abc", "../python:3.11"] {
            assert!(!found(BaseImages::Bootstrapped, reference), "{reference}");
        }
    }
}
