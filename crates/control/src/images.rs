//! From what people write to an image by its content.

use crate::Ctx;
use crate::failure::Failure;
use dunlin_api::ErrorCode;
use dunlin_model::{AppName, ImageRef};
use std::future::Future;
use std::pin::Pin;

/// Longer references are refused before they are looked at.
const MAX_REFERENCE_BYTES: usize = 512;

/// Where an image without a registry in its name is looked for first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseImages {
    /// Where its name says.
    Upstream,
    /// Among those made here from Debian packages (`dunlin image bootstrap`).
    Bootstrapped,
}

/// What a reference means, seen from one app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// In the app's repository here, by digest (`sha256:...`).
    Digest(String),
    /// In the app's repository here, by tag.
    Tag(String),
    /// In a registry elsewhere; to be pulled into the app's repository.
    Elsewhere(String),
}

/// Looks an image up in the app's repository, or pulls it there. The answer is by content.
pub type ResolveImage = Box<
    dyn Fn(AppName, Wanted) -> Pin<Box<dyn Future<Output = Result<ImageRef, Failure>> + Send>> + Send + Sync,
>;

pub(crate) struct Images {
    resolve: ResolveImage,
    domain: String,
}

impl Images {
    pub fn new(resolve: ResolveImage, domain: String) -> Self {
        Self { resolve, domain }
    }

    pub async fn resolve(&self, app: &AppName, text: &str) -> Result<ImageRef, Failure> {
        let wanted = parse(app, text, &self.domain)?;
        (self.resolve)(app.clone(), wanted).await
    }

    /// The same without pulling anything; `None`: it is in a registry elsewhere.
    pub async fn resolve_here(&self, app: &AppName, text: &str) -> Result<Option<ImageRef>, Failure> {
        match parse(app, text, &self.domain)? {
            Wanted::Elsewhere(_) => Ok(None),
            wanted => (self.resolve)(app.clone(), wanted).await.map(Some),
        }
    }
}

/// By what `text` says. An image that a machine of the app runs is known although the registry here has nothing of it, as after
/// control's restore on another host: hosts give it to each other.
pub(crate) async fn resolve(ctx: &Ctx, app: &AppName, text: &str) -> Result<ImageRef, Failure> {
    let missing = match ctx.images.resolve(app, text).await {
        Err(failure) if failure.code == ErrorCode::NotFound => failure,
        resolved => return resolved,
    };
    let Some((_, digest)) = text.rsplit_once('@') else { return Err(missing) };
    let mut running = ctx.state.machines_of(app).await?.into_iter().map(|row| row.value.spec.image);
    running.find(|image| image.digest == digest && image.repository == app.as_str()).ok_or(missing)
}

fn parse(app: &AppName, text: &str, domain: &str) -> Result<Wanted, Failure> {
    let is_plain = text.bytes().all(|b| b.is_ascii_graphic());
    if text.is_empty() || text.len() > MAX_REFERENCE_BYTES || !is_plain {
        return Err(Failure::invalid("that is not the reference of an image")
            .hint("for example `docker.io/library/nginx:1.27` or the digest that a build printed"));
    }
    let own = match text.split_once('/') {
        None => text,
        Some((host, rest)) if host.split(':').next() == Some(&format!("registry.{domain}")) => rest,
        Some(_) => return Ok(Wanted::Elsewhere(text.to_owned())),
    };
    let name_ends = own.find([':', '@']).unwrap_or(own.len());
    let (name, rest) = own.split_at(name_ends);
    if name != app.as_str() {
        if own.len() != text.len() {
            // Knowing another app's digest grants nothing.
            return Err(Failure::invalid(format!("the image is in the repository of {name}, not of {app}"))
                .hint(format!("push it as registry.{domain}/{app}")));
        }
        return Ok(Wanted::Elsewhere(text.to_owned()));
    }
    Ok(match rest.split_once('@') {
        Some((_, digest)) => {
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
                return Err(Failure::invalid(format!("{digest:?} is not a digest")).hint("it is sha256: and 64 hexadecimal digits"));
            }
            Wanted::Digest(digest.to_owned())
        }
        None => Wanted::Tag(rest.strip_prefix(':').unwrap_or("latest").to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_the_apps_own_or_elsewhere() {
        let app: AppName = "web".parse().unwrap();
        let check = |text: &str, expected: Option<Wanted>| assert_eq!(parse(&app, text, "localhost").ok(), expected, "{text}");
        let digest = format!("sha256:{}", "a".repeat(64));
        check(&format!("web@{digest}"), Some(Wanted::Digest(digest.clone())));
        check(&format!("web:v1@{digest}"), Some(Wanted::Digest(digest.clone())));
        check("web", Some(Wanted::Tag("latest".into())));
        check("web:v1", Some(Wanted::Tag("v1".into())));
        check("registry.localhost:8443/web:v1", Some(Wanted::Tag("v1".into())));
        check("registry.localhost/api:v1", None);
        check("nginx:1.27", Some(Wanted::Elsewhere("nginx:1.27".into())));
        check("docker.io/library/web:1", Some(Wanted::Elsewhere("docker.io/library/web:1".into())));
        check("web@sha256:short", None);
        check("", None);
        check("a b", None);
    }
}
