//! Serving: one request, one answer.

use super::{HEAD_WITHIN, Head, MAX_SILENCE, Request, VERSION, read_frame, within, write_frame};
use crate::digest::Digest;
use crate::store::{ContentStore, StoreError};
use std::fs::File;
use std::io::{self, SeekFrom};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWrite, AsyncWriteExt};

/// Blobs that are read for others at once. A whole fleet may ask one host for a new release; those who wait get a
/// head in time, or ask the next host.
pub(crate) const MAX_SERVED: usize = 16;
const READ_BYTES: usize = 256 << 10;

/// Answers one request of another host, and returns when all was sent or the other has gone. The caller knows that
/// whoever is at the other end is a member of the cluster, and lets no tenant's stream come here.
pub async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin + Send, store: ContentStore) {
    if let Err(error) = answer(&mut stream, &store).await {
        tracing::debug!(%error, "a blob did not reach the host that asked for it");
    }
}

async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), store: &ContentStore) -> io::Result<()> {
    let request: Request = within(HEAD_WITHIN, read_frame(stream)).await?;
    if request.v != VERSION {
        let why = format!("version {} was asked for, this host speaks {VERSION}", request.v);
        return within(MAX_SILENCE, write_frame(stream, &Head::Refused(why))).await;
    }
    let _turn = store.serving().acquire().await.map_err(io::Error::other)?;
    let (store, digest) = (store.clone(), request.digest.clone());
    let opened = tokio::task::spawn_blocking(move || open(&store, &digest)).await?;
    let (head, file) = match opened {
        Ok(Some((file, len))) => (Head::Size(len), Some((file, len))),
        Ok(None) => (Head::Missing(request.digest), None),
        Err(error) => {
            tracing::warn!(digest = %request.digest, %error, "content cannot be read for another host");
            (Head::Refused("it cannot read its content".into()), None)
        }
    };
    within(MAX_SILENCE, write_frame(stream, &head)).await?;
    if let Some((file, len)) = file {
        copy(file, request.offset, len, stream).await?;
    }
    within(MAX_SILENCE, stream.shutdown()).await
}

fn open(store: &ContentStore, digest: &Digest) -> Result<Option<(File, u64)>, StoreError> {
    match store.open_blob(digest) {
        Ok(opened) => Ok(Some(opened)),
        Err(StoreError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

async fn copy(file: File, offset: u64, len: u64, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut file = tokio::fs::File::from_std(file);
    file.seek(SeekFrom::Start(offset.min(len))).await?;
    let mut file = file.take(len.saturating_sub(offset));
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer).await? {
            0 => return within(MAX_SILENCE, stream.flush()).await,
            n => within(MAX_SILENCE, stream.write_all(&buffer[..n])).await?,
        }
    }
}
