//! Blobs on their way out.

use super::Server;
use super::answer::{Refusal, empty, on_disk, with};
use crate::digest::{Digest, Repo};
use crate::store::ContentStore;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::Arc;

const UNKNOWN: &str = "BLOB_UNKNOWN";
/// Read and sent at a time.
const CHUNK_BYTES: u64 = 256 << 10;

pub(super) async fn get(server: &Arc<Server>, repo: Repo, digest: Digest, method: &Method, headers: &HeaderMap) -> Result<Response, Refusal> {
    let (store, wanted) = (server.store.clone(), digest.clone());
    let opened = move || match store.has_blob(&repo, &wanted)? {
        Some(_) => store.open_blob(&wanted),
        None => Err(crate::StoreError::NotFound(format!("{wanted} in the repository {repo}"))),
    };
    let (file, len) = on_disk(UNKNOWN, opened).await?;
    let (start, end, status) = match requested_range(headers, len) {
        Wanted::All => (0, len, StatusCode::OK),
        Wanted::Part(start, end) => (start, end, StatusCode::PARTIAL_CONTENT),
        Wanted::Nothing => {
            let refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the blob is shorter than that");
            return Err(refusal);
        }
    };
    let mut response = empty(status);
    if *method == Method::GET {
        let whole = (status == StatusCode::OK).then(|| Check { store: server.store.clone(), digest: digest.clone(), hasher: Sha256::new() });
        *response.body_mut() = stream(file, whole, start, end);
    }
    if status == StatusCode::PARTIAL_CONTENT {
        response = with(response, "content-range", &format!("bytes {start}-{}/{len}", end - 1));
    }
    response = with(response, "content-length", &(end - start).to_string());
    response = with(response, "content-type", "application/octet-stream");
    response = with(response, "accept-ranges", "bytes");
    response = with(response, "etag", &format!("\"{digest}\""));
    Ok(with(response, "docker-content-digest", digest.as_str()))
}

enum Wanted {
    All,
    /// First byte, and the one after the last.
    Part(u64, u64),
    Nothing,
}

/// One range of bytes; anything else is answered with the whole, as HTTP allows.
fn requested_range(headers: &HeaderMap, len: u64) -> Wanted {
    let text = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let Some((first, last)) = text.and_then(|text| text.strip_prefix("bytes=")).and_then(|range| range.split_once('-')) else {
        return Wanted::All;
    };
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), _) if first >= len => Wanted::Nothing,
        (Ok(first), Ok(last)) if last >= first => Wanted::Part(first, len.min(last.saturating_add(1))),
        (Ok(first), Err(_)) if last.is_empty() => Wanted::Part(first, len),
        (Err(_), Ok(0)) if first.is_empty() => Wanted::Nothing,
        (Err(_), Ok(suffix)) if first.is_empty() && len > 0 => Wanted::Part(len.saturating_sub(suffix), len),
        _ => Wanted::All,
    }
}

/// Of a blob that is sent whole: a client that gets damaged content asks for it once more, and then is to be told
/// that it is not here, not sent the same again.
struct Check {
    store: ContentStore,
    digest: Digest,
    hasher: Sha256,
}

impl Check {
    fn end(self, file: &File) -> io::Result<()> {
        if Digest::from_hasher(self.hasher) == self.digest {
            return Ok(());
        }
        Err(io::Error::other(self.store.set_aside(&self.digest, file)))
    }
}

fn stream(file: File, check: Option<Check>, start: u64, end: u64) -> Body {
    let chunks = futures_util::stream::try_unfold((file, check, start), move |(mut file, mut check, at)| async move {
        if at >= end {
            return Ok(None);
        }
        let read = move || -> io::Result<(Bytes, File, Option<Check>)> {
            let want = (end - at).min(CHUNK_BYTES) as usize;
            let mut buffer = vec![0; want];
            file.seek(io::SeekFrom::Start(at))?;
            file.read_exact(&mut buffer)?;
            if let Some(check) = &mut check {
                check.hasher.update(&buffer);
            }
            // Before the last of it goes out, so that the client sees it break off.
            if at + want as u64 == end
                && let Some(check) = check.take()
            {
                check.end(&file)?;
            }
            Ok((buffer.into(), file, check))
        };
        let (bytes, file, check) = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)??;
        let next = at + bytes.len() as u64;
        Ok::<_, io::Error>(Some((bytes, (file, check, next))))
    });
    Body::from_stream(chunks)
}
