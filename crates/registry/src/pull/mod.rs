//! The client of other registries: token flow, resumption, and nothing believed before its digest is checked.

mod client;

use crate::digest::{Digest, Repo};
use crate::manifest::{
    DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, MAX_MANIFEST_BYTES, Manifest, OCI_INDEX, OCI_MANIFEST, Reference, architecture,
};
use crate::store::{BlobWriter, ContentStore, MAX_BLOB_BYTES, StoreError};
use bytes::Bytes;
use client::{Client, Question};
use futures_util::{StreamExt, TryStreamExt};
use http::StatusCode;
use http_body_util::BodyExt;
use std::time::Duration;

/// At once; more gain nothing on one line.
const MAX_PARALLEL_BLOBS: usize = 3;
/// A blob that breaks off is gone on with this often.
const MAX_ATTEMPTS: u32 = 5;
/// Pause before the next attempt, times its number.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// A registry that sends nothing for this long has gone.
const MAX_SILENCE: Duration = Duration::from_secs(60);
const WRITE_BYTES: usize = 1 << 20;

/// For the other registry.
#[derive(Clone)]
pub struct Login {
    pub user: String,
    pub password: String,
}

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("{0:?} is not the reference of an image; write for example docker.io/library/nginx:1.27")]
    Reference(String),
    #[error("{0} does not exist, or may not be seen without logging in; check the name and the tag")]
    NotFound(String),
    #[error("{registry} refuses: {why}; give credentials that may pull")]
    Denied { registry: String, why: String },
    #[error("{registry} cannot be reached: {why}; check the name and the network, then try again")]
    Unreachable { registry: String, why: String },
    #[error("{reference} has no variant for linux/{architecture}, only {offered}")]
    Platform { reference: String, architecture: &'static str, offered: String },
    #[error("{registry} sent {actual} for {expected}: it or something on the way damages content; try again")]
    Digest { registry: String, expected: Digest, actual: Digest },
    #[error("{registry} answered what a registry should not: {why}")]
    Protocol { registry: String, why: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// `host/name:tag@digest`, with Docker Hub's habits filled in.
struct Parsed {
    registry: String,
    name: String,
    reference: Reference,
}

/// Brings an image into `into`. The digest is that of the manifest for this computer; it has no tag.
pub async fn pull(store: &ContentStore, into: &Repo, reference: &str, login: Option<&Login>) -> Result<Digest, PullError> {
    let Parsed { registry, name, reference: wanted } = parse(reference)?;
    let client = Client::new(registry, name, login.cloned())?;
    let (mut digest, mut media_type, mut bytes) = fetch_manifest(&client, &wanted, reference).await?;
    let mut manifest = parse_manifest(&client, &bytes)?;
    if manifest.is_index_shaped() {
        let entry = manifest.for_this_platform().ok_or_else(|| PullError::Platform {
            reference: reference.to_owned(),
            architecture: architecture(),
            offered: manifest.platforms(),
        })?;
        let wanted = Reference::Digest(entry.digest.clone());
        (digest, media_type, bytes) = fetch_manifest(&client, &wanted, reference).await?;
        manifest = parse_manifest(&client, &bytes)?;
        if manifest.is_index_shaped() {
            return Err(client.protocol("an index inside an index"));
        }
    }
    let blobs: Vec<Descriptor> = manifest.blobs().cloned().collect();
    let fetches = futures_util::stream::iter(blobs.into_iter().map(|blob| fetch_blob(&client, store, into, blob)));
    fetches.buffer_unordered(MAX_PARALLEL_BLOBS).try_collect::<Vec<()>>().await?;
    let (store, into) = (store.clone(), into.clone());
    let kept = on_disk(move || store.put_manifest(&into, &media_type, &bytes, None)).await?;
    debug_assert_eq!(kept, digest);
    Ok(kept)
}

fn parse(text: &str) -> Result<Parsed, PullError> {
    let bad = || PullError::Reference(text.chars().take(200).collect());
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|_| bad())?)),
        None => (text, None),
    };
    let (registry, rest) = match rest.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", rest),
    };
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    let is_host = registry.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b));
    let is_hub = matches!(registry, "docker.io" | "index.docker.io");
    let name = if is_hub && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
    if !is_host || name.parse::<Repo>().is_err() {
        return Err(bad());
    }
    let tag = tag.unwrap_or("latest");
    let reference = match digest {
        Some(digest) => Reference::Digest(digest),
        None if crate::is_tag(tag) => Reference::Tag(tag.to_owned()),
        None => return Err(bad()),
    };
    // The Hub's API has another host name than its images.
    let registry = if is_hub { "registry-1.docker.io" } else { registry };
    Ok(Parsed { registry: registry.to_owned(), name, reference })
}

fn parse_manifest(client: &Client, bytes: &[u8]) -> Result<Manifest, PullError> {
    Manifest::parse(bytes).map_err(|why| client.protocol(why))
}

async fn fetch_manifest(client: &Client, wanted: &Reference, shown: &str) -> Result<(Digest, String, Bytes), PullError> {
    let last = match wanted {
        Reference::Tag(tag) => tag.clone(),
        Reference::Digest(digest) => digest.to_string(),
    };
    let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX].join(", ");
    let path = format!("/v2/{}/manifests/{last}", client.name());
    let answer = client.get(&Question { path, accept: Some(accept), from: 0 }).await?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(PullError::NotFound(shown.to_owned())),
        status => return Err(client.protocol(format!("{status} for a manifest"))),
    }
    let media_type = answer.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
    let body = client::collect(answer.into_body(), MAX_MANIFEST_BYTES).await;
    let bytes = body.map_err(|why| client.protocol(format!("a manifest that {why}")))?;
    let actual = Digest::of(&bytes);
    match wanted {
        Reference::Digest(expected) if *expected != actual => {
            Err(PullError::Digest { registry: client.registry().to_owned(), expected: expected.clone(), actual })
        }
        _ => Ok((actual, media_type, bytes)),
    }
}

async fn fetch_blob(client: &Client, store: &ContentStore, into: &Repo, blob: Descriptor) -> Result<(), PullError> {
    if blob.size > MAX_BLOB_BYTES {
        return Err(StoreError::TooLarge(format!("a layer has {} bytes; at most {MAX_BLOB_BYTES} are taken", blob.size)).into());
    }
    let (own_store, repo, digest) = (store.clone(), into.clone(), blob.digest.clone());
    if on_disk(move || own_store.has_blob(&repo, &digest)).await?.is_some() {
        return Ok(());
    }
    let (own_store, digest) = (store.clone(), blob.digest.clone());
    let writer = on_disk(move || match own_store.resume_blob(&digest)? {
        Some(writer) => Ok(writer),
        None => own_store.begin_blob(), // another pull is at the same one
    });
    let mut writer = Some(writer.await?);
    let mut attempt = 1;
    loop {
        match fetch_rest(client, &mut writer, &blob).await {
            Ok(()) => break,
            Err(PullError::Unreachable { .. }) if attempt < MAX_ATTEMPTS && writer.is_some() => {
                tracing::debug!(digest = %blob.digest, attempt, "a blob broke off; going on with it");
                tokio::time::sleep(RETRY_PAUSE * attempt).await;
                attempt += 1;
            }
            Err(e) => return Err(e),
        }
    }
    let writer = writer.ok_or_else(|| client.protocol("nothing"))?;
    let (store, into, registry) = (store.clone(), into.clone(), client.registry().to_owned());
    let finished = on_disk(move || store.finish_blob(&into, writer, Some(&blob.digest))).await;
    match finished {
        Err(PullError::Store(StoreError::Digest { expected, actual })) => Err(PullError::Digest { registry, expected, actual }),
        other => other.map(drop),
    }
}

/// What is missing of the blob, appended. A registry that knows no ranges sends it all again.
async fn fetch_rest(client: &Client, writer: &mut Option<BlobWriter>, blob: &Descriptor) -> Result<(), PullError> {
    let Some(have) = writer.as_mut() else { return Err(client.protocol("nothing")) };
    if have.len() > blob.size {
        have.restart()?;
    }
    if have.len() == blob.size && blob.size > 0 {
        return Ok(());
    }
    let path = format!("/v2/{}/blobs/{}", client.name(), blob.digest);
    let answer = client.get(&Question { path, accept: None, from: have.len() }).await?;
    match answer.status() {
        StatusCode::OK => have.restart()?,
        StatusCode::PARTIAL_CONTENT => {
            let range = answer.headers().get("content-range").and_then(|value| value.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {}-", have.len())) {
                return Err(client.protocol(format!("another part of a blob than was asked for ({range:?})")));
            }
        }
        StatusCode::RANGE_NOT_SATISFIABLE => {
            have.restart()?;
            return Err(client.unreachable("it has less of a blob than came before"));
        }
        StatusCode::NOT_FOUND => return Err(PullError::NotFound(format!("the layer {}", blob.digest))),
        status => return Err(client.protocol(format!("{status} for a blob"))),
    }
    let mut body = answer.into_body();
    let mut gathered: Vec<u8> = Vec::new();
    loop {
        let frame = tokio::time::timeout(MAX_SILENCE, body.frame()).await;
        let frame = match frame {
            Ok(None) => None,
            Ok(Some(Ok(frame))) => Some(frame),
            Ok(Some(Err(e))) => {
                append(client, writer, &mut gathered, blob).await?;
                return Err(client.unreachable(format!("a blob broke off: {e}")));
            }
            Err(_) => {
                append(client, writer, &mut gathered, blob).await?;
                return Err(client.unreachable("it stopped sending"));
            }
        };
        let ended = frame.is_none();
        if let Some(Ok(data)) = frame.map(|frame| frame.into_data()) {
            gathered.extend_from_slice(&data);
        }
        if ended || gathered.len() >= WRITE_BYTES {
            append(client, writer, &mut gathered, blob).await?;
        }
        if ended {
            let len = writer.as_ref().map_or(0, BlobWriter::len);
            if len < blob.size {
                return Err(client.unreachable("a blob broke off"));
            }
            return Ok(());
        }
    }
}

async fn append(client: &Client, writer: &mut Option<BlobWriter>, gathered: &mut Vec<u8>, blob: &Descriptor) -> Result<(), PullError> {
    let Some(mut taken) = writer.take() else { return Err(client.protocol("nothing")) };
    if taken.len() + gathered.len() as u64 > blob.size {
        taken.restart()?;
        return Err(client.protocol(format!("more than the {} bytes of {}", blob.size, blob.digest)));
    }
    let bytes = std::mem::take(gathered);
    *writer = Some(on_disk(move || taken.write(&bytes).map(|()| taken)).await?);
    Ok(())
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T, StoreError> + Send + 'static) -> Result<T, PullError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|e| StoreError::Io {
        what: "finish its work".into(),
        source: std::io::Error::other(e),
    })?;
    Ok(done?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let check = |text: &str, expected: &str| {
            let shown = parse(text).map(|p| match p.reference {
                Reference::Tag(tag) => format!("{} {} {tag}", p.registry, p.name),
                Reference::Digest(digest) => format!("{} {} {}", p.registry, p.name, &digest.hex()[..4]),
            });
            assert_eq!(shown.unwrap_or_else(|_| "refused".into()), expected, "{text}");
        };
        let hub = "registry-1.docker.io";
        check("nginx", &format!("{hub} library/nginx latest"));
        check("nginx:1.27", &format!("{hub} library/nginx 1.27"));
        check("docker.io/a/b:c", &format!("{hub} a/b c"));
        check("localhost:5000/web", "localhost:5000 web latest");
        check("example.org/a/b/c:1", "example.org a/b/c 1");
        check(&format!("example.org/a:1@sha256:{}", "ab".repeat(32)), "example.org a abab");
        for bad in ["", "Nginx", "a:", "a@sha256:1", "ex ample.org/a", "a/../b"] {
            check(bad, "refused");
        }
    }
}
