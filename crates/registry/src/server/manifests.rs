//! Manifests, tags, referrers.

use super::Server;
use super::answer::{Refusal, created, empty, on_disk, with};
use crate::digest::{Digest, Repo, is_tag};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, OCI_INDEX, Reference};
use crate::store::StoreError;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use std::collections::BTreeMap;
use std::sync::Arc;

const UNKNOWN: &str = "MANIFEST_UNKNOWN";
/// Tags of one answer; the rest comes by its `Link`.
const MAX_TAGS_PAGE: usize = 1000;

pub(super) async fn get(server: &Arc<Server>, repo: Repo, reference: Reference, method: Method) -> Result<Response, Refusal> {
    let store = server.store.clone();
    let read = move || {
        let digest = match reference {
            Reference::Digest(digest) => digest,
            Reference::Tag(tag) => match store.resolve_tag(&repo, &tag)? {
                Some(digest) => digest,
                None => return Err(StoreError::NotFound(format!("{repo}:{tag}"))),
            },
        };
        let (media_type, bytes) = store.manifest(&repo, &digest)?;
        Ok((digest, media_type, bytes))
    };
    let (digest, media_type, bytes) = on_disk(UNKNOWN, read).await?;
    let mut response = empty(StatusCode::OK);
    let len = bytes.len();
    if method == Method::GET {
        *response.body_mut() = Body::from(bytes);
    }
    response = with(response, "content-type", &media_type);
    response = with(response, "content-length", &len.to_string());
    response = with(response, "etag", &format!("\"{digest}\""));
    Ok(with(response, "docker-content-digest", digest.as_str()))
}

pub(super) async fn put(server: &Arc<Server>, repo: Repo, reference: Reference, request: Request) -> Result<Response, Refusal> {
    let media_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned();
    let body = Limited::new(request.into_body(), MAX_MANIFEST_BYTES).collect().await;
    let bytes = body.map_err(|e| {
        if e.is::<http_body_util::LengthLimitError>() {
            let why = format!("a manifest may have {MAX_MANIFEST_BYTES} bytes, this one has more");
            return Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", why);
        }
        Refusal::bad("MANIFEST_INVALID", "the manifest did not arrive whole")
    })?;
    let bytes = bytes.to_bytes();
    let store = server.store.clone();
    let (name, location) = (repo.clone(), format!("/v2/{repo}/manifests/"));
    let keep = move || {
        let tag = match &reference {
            Reference::Tag(tag) => Some(tag.as_str()),
            Reference::Digest(expected) => {
                let actual = Digest::of(&bytes);
                if actual != *expected {
                    return Err(StoreError::Digest { expected: expected.clone(), actual });
                }
                None
            }
        };
        let digest = store.put_manifest(&name, &media_type, &bytes, tag)?;
        Ok((digest, Manifest::parse(&bytes).ok().and_then(|manifest| manifest.subject)))
    };
    let (digest, subject) = on_disk("MANIFEST_BLOB_UNKNOWN", keep).await?;
    tracing::info!(%repo, %digest, "an image was pushed");
    let response = created(&format!("{location}{digest}"), &digest);
    Ok(match subject {
        Some(subject) => with(response, "oci-subject", subject.digest.as_str()),
        None => response,
    })
}

pub(super) async fn delete(server: &Arc<Server>, repo: Repo, reference: Reference) -> Result<Response, Refusal> {
    let store = server.store.clone();
    let remove = move || match reference {
        Reference::Tag(tag) => store.delete_tag(&repo, &tag),
        Reference::Digest(digest) => store.delete_manifest(&repo, &digest),
    };
    on_disk(UNKNOWN, remove).await?;
    Ok(empty(StatusCode::ACCEPTED))
}

pub(super) async fn tags(server: &Arc<Server>, repo: Repo, query: BTreeMap<String, String>) -> Result<Response, Refusal> {
    let store = server.store.clone();
    let name = repo.clone();
    let list = move || match store.has_repo(&name) {
        true => store.tags(&name),
        false => Err(StoreError::NotFound(format!("the repository {name}"))),
    };
    let tags = on_disk("NAME_UNKNOWN", list).await?;
    let wanted = match query.get("n").map(|n| n.parse::<usize>()) {
        None => MAX_TAGS_PAGE,
        Some(Ok(n)) => n.min(MAX_TAGS_PAGE),
        Some(Err(_)) => return Err(Refusal::bad("PAGINATION_NUMBER_INVALID", "n is not a number")),
    };
    let after = query.get("last").filter(|last| is_tag(last));
    let mut rest = tags.into_iter().filter(|tag| after.is_none_or(|after| tag > after));
    let page: Vec<String> = rest.by_ref().take(wanted).collect();
    let more = rest.next().is_some();
    let body = serde_json::json!({"name": repo.as_str(), "tags": page}).to_string();
    let response = json("application/json", body);
    Ok(match page.last().filter(|_| more) {
        Some(last) => with(response, "link", &format!("</v2/{repo}/tags/list?n={wanted}&last={last}>; rel=\"next\"")),
        None => response,
    })
}

pub(super) async fn referrers(server: &Arc<Server>, repo: Repo, subject: Digest, query: BTreeMap<String, String>) -> Result<Response, Refusal> {
    let store = server.store.clone();
    let wanted = query.get("artifactType").cloned();
    let filtered = wanted.is_some();
    let list = move || {
        let mut entries = Vec::new();
        for digest in store.referrers(&repo, &subject)? {
            let (media_type, bytes) = match store.manifest(&repo, &digest) {
                Ok(found) => found,
                Err(StoreError::NotFound(_)) => continue, // deleted meanwhile
                Err(e) => return Err(e),
            };
            let manifest = Manifest::parse(&bytes).map_err(StoreError::Invalid)?;
            let kind = manifest.artifact_type.or_else(|| manifest.config.map(|config| config.media_type)).unwrap_or_default();
            if wanted.as_ref().is_none_or(|wanted| *wanted == kind) {
                entries.push(serde_json::json!({
                    "mediaType": media_type, "digest": digest, "size": bytes.len(),
                    "artifactType": kind, "annotations": manifest.annotations,
                }));
            }
        }
        Ok(entries)
    };
    let entries = on_disk(UNKNOWN, list).await?;
    let body = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
    let response = json(OCI_INDEX, body);
    Ok(if filtered { with(response, "oci-filters-applied", "artifactType") } else { response })
}

fn json(media_type: &str, body: String) -> Response {
    let mut response = empty(StatusCode::OK);
    *response.body_mut() = Body::from(body);
    with(response, "content-type", media_type)
}
