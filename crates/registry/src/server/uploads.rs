//! Blobs on their way in: in one request, in chunks, streamed, or mounted from another repository.

use super::Server;
use super::answer::{Refusal, created, empty, on_disk, with};
use crate::digest::{Digest, Repo};
use crate::store::{BlobWriter, MAX_BLOB_BYTES, StoreError, UploadError};
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const UNKNOWN: &str = "BLOB_UPLOAD_UNKNOWN";
/// Gathered before it goes to the disk.
const WRITE_BYTES: usize = 1 << 20;
/// A client that sends nothing for this long has gone.
const MAX_SILENCE: Duration = Duration::from_secs(120);

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        let (status, code) = match error {
            UploadError::Unknown => (StatusCode::NOT_FOUND, UNKNOWN),
            UploadError::Busy => (StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID"),
            UploadError::TooMany(_) => (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS"),
            UploadError::Random(_) => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
        };
        Self::new(status, code, error.to_string())
    }
}

pub(super) async fn begin(
    server: &Arc<Server>,
    repo: Repo,
    query: BTreeMap<String, String>,
    from: Option<String>,
    request: Request,
) -> Result<Response, Refusal> {
    if let (Some(digest), Some(from)) = (query.get("mount"), from) {
        let digest: Digest = digest.parse().map_err(bad_digest)?;
        if let Ok(from) = from.parse::<Repo>() {
            let (store, to, wanted) = (server.store.clone(), repo.clone(), digest.clone());
            if on_disk("BLOB_UNKNOWN", move || store.mount(&from, &to, &wanted)).await? {
                return Ok(created(&format!("/v2/{repo}/blobs/{digest}"), &digest));
            }
        }
    }
    let store = server.store.clone();
    let writer = on_disk(UNKNOWN, move || store.begin_blob()).await?;
    let Some(digest) = query.get("digest") else {
        let id = server.store.uploads().add(&repo, writer)?;
        return Ok(accepted(&repo, &id, 0));
    };
    let digest: Digest = digest.parse().map_err(bad_digest)?;
    let mut writer = Some(writer);
    receive(&mut writer, request.into_body()).await?;
    complete(server, repo, writer, digest).await
}

pub(super) async fn progress(server: &Arc<Server>, repo: Repo, id: String) -> Result<Response, Refusal> {
    let taken = server.store.uploads().take(&repo, &id)?;
    let len = taken.writer.as_ref().map_or(0, BlobWriter::len);
    let response = accepted(&repo, &id, len);
    Ok(with_status(response, StatusCode::NO_CONTENT))
}

pub(super) async fn append(server: &Arc<Server>, repo: Repo, id: String, request: Request) -> Result<Response, Refusal> {
    let mut taken = server.store.uploads().take(&repo, &id)?;
    check_offset(request.headers(), taken.writer.as_ref().map_or(0, BlobWriter::len))?;
    receive(&mut taken.writer, request.into_body()).await?;
    let len = taken.writer.as_ref().map_or(0, BlobWriter::len);
    Ok(accepted(&repo, &id, len))
}

pub(super) async fn finish(
    server: &Arc<Server>,
    repo: Repo,
    id: String,
    query: BTreeMap<String, String>,
    request: Request,
) -> Result<Response, Refusal> {
    let Some(digest) = query.get("digest") else {
        return Err(Refusal::bad("DIGEST_INVALID", "the last request of an upload names its digest"));
    };
    let digest: Digest = digest.parse().map_err(bad_digest)?;
    let mut taken = server.store.uploads().take(&repo, &id)?;
    check_offset(request.headers(), taken.writer.as_ref().map_or(0, BlobWriter::len))?;
    receive(&mut taken.writer, request.into_body()).await?;
    let writer = taken.writer.take();
    complete(server, repo, writer, digest).await
}

pub(super) async fn cancel(server: &Arc<Server>, repo: Repo, id: String) -> Result<Response, Refusal> {
    drop(server.store.uploads().take(&repo, &id)?);
    server.store.uploads().remove(&id);
    Ok(empty(StatusCode::NO_CONTENT))
}

async fn complete(server: &Arc<Server>, repo: Repo, writer: Option<BlobWriter>, digest: Digest) -> Result<Response, Refusal> {
    let writer = writer.ok_or_else(unknown)?;
    let store = server.store.clone();
    let (name, expected) = (repo.clone(), digest.clone());
    on_disk("BLOB_UPLOAD_INVALID", move || store.finish_blob(&name, writer, Some(&expected))).await?;
    Ok(created(&format!("/v2/{repo}/blobs/{digest}"), &digest))
}

/// Body to disk. What arrived before an error stays, so that a chunked client can go on from there.
async fn receive(writer: &mut Option<BlobWriter>, mut body: Body) -> Result<(), Refusal> {
    let mut gathered: Vec<u8> = Vec::new();
    let cut = || Refusal::bad("BLOB_UPLOAD_INVALID", "the upload was cut off");
    loop {
        let frame = tokio::time::timeout(MAX_SILENCE, body.frame()).await.map_err(|_| cut())?;
        let ended = frame.is_none();
        if let Some(frame) = frame
            && let Ok(data) = frame.map_err(|_| cut())?.into_data() {
                gathered.extend_from_slice(&data);
            }
        if gathered.len() >= WRITE_BYTES || (ended && !gathered.is_empty()) {
            let mut taken = writer.take().ok_or_else(unknown)?;
            let bytes = std::mem::take(&mut gathered);
            let write = tokio::task::spawn_blocking(move || {
                let written = taken.write(&bytes);
                (taken, written)
            });
            let (taken, written) = write.await.map_err(|_| cut())?;
            *writer = Some(taken);
            written.map_err(|e: StoreError| Refusal::of(e, UNKNOWN))?;
        }
        if ended {
            return Ok(());
        }
    }
}

/// A chunk says where it belongs: anywhere but at the end is refused, with where the end is.
fn check_offset(headers: &HeaderMap, len: u64) -> Result<(), Refusal> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|declared| declared.saturating_add(len) > MAX_BLOB_BYTES) {
        let why = format!("a blob may have {MAX_BLOB_BYTES} bytes");
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", why));
    }
    let Some(range) = headers.get(header::CONTENT_RANGE) else { return Ok(()) };
    let range = range.to_str().unwrap_or_default();
    let range = range.strip_prefix("bytes ").unwrap_or(range);
    match range.split_once('-').and_then(|(first, _)| first.parse::<u64>().ok()) {
        Some(first) if first == len => Ok(()),
        _ => {
            let why = format!("the chunk {range:?} does not follow: {len} bytes are here");
            Err(Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", why))
        }
    }
}

fn accepted(repo: &Repo, id: &str, len: u64) -> Response {
    let response = with(empty(StatusCode::ACCEPTED), "location", &format!("/v2/{repo}/blobs/uploads/{id}"));
    let response = with(response, "docker-upload-uuid", id);
    with(response, "range", &format!("0-{}", len.saturating_sub(1)))
}

fn with_status(mut response: Response, status: StatusCode) -> Response {
    *response.status_mut() = status;
    response
}

fn unknown() -> Refusal {
    UploadError::Unknown.into()
}

fn bad_digest(error: crate::InvalidName) -> Refusal {
    Refusal::bad("DIGEST_INVALID", error.to_string())
}
