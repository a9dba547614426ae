//! Serving: one request, one answer.

use super::pace::{Pace, TooSlow};
use super::turns::Turn;
use super::{HEAD_WITHIN, Head, MAX_SILENCE, Request, VERSION, read_frame, within, write_frame};
use crate::digest::Digest;
use crate::store::{ContentStore, StoreError};
use dunlin_model::HostId;
use std::fs::File;
use std::io::{self, SeekFrom};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};

const READ_BYTES: usize = 256 << 10;

/// Answers one request of another host, and returns when all was sent, the other has gone, or it takes too slowly while
/// others wait: it asks again for what it lacks. The caller knows that whoever is at the other end is this member of the
/// cluster, and lets no tenant's stream come here.
pub async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin + Send, peer: HostId, store: ContentStore) {
    if let Err(error) = answer(&mut stream, &peer, &store).await {
        tracing::debug!(host = %peer, %error, "a blob did not reach the host that asked for it");
    }
}

async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), peer: &HostId, store: &ContentStore) -> io::Result<()> {
    let request: Request = within(HEAD_WITHIN, read_frame(stream)).await?;
    if request.v != VERSION {
        let why = format!("version {} was asked for, this host speaks {VERSION}", request.v);
        return within(MAX_SILENCE, write_frame(stream, &Head::Refused(why))).await;
    }
    let turn = store.serving().take(peer).await?;
    let (content, digest) = (store.clone(), request.digest.clone());
    let opened = tokio::task::spawn_blocking(move || open(&content, &digest)).await?;
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
        copy(file, (request.offset, len), stream, &turn).await?;
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

async fn copy(file: File, (offset, len): (u64, u64), stream: &mut (impl AsyncWrite + Unpin), turn: &Turn<'_>) -> io::Result<()> {
    let mut file = tokio::fs::File::from_std(file);
    file.seek(SeekFrom::Start(offset.min(len))).await?;
    let mut file = file.take(len.saturating_sub(offset));
    let mut buffer = vec![0; READ_BYTES];
    let mut pace = Pace::new();
    loop {
        match file.read(&mut buffer).await? {
            0 => return within(MAX_SILENCE, stream.flush()).await,
            n => send(stream, &buffer[..n], &mut pace, turn).await?,
        }
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), mut bytes: &[u8], pace: &mut Pace, turn: &Turn<'_>) -> io::Result<()> {
    while !bytes.is_empty() {
        let began = Instant::now();
        let sent = match timeout(pace.left(), stream.write(bytes)).await {
            Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => sent?,
            Err(_) => 0,
        };
        bytes = &bytes[sent..];
        let slow = |why: TooSlow| io::Error::new(io::ErrorKind::TimedOut, match why {
            TooSlow::ForNow { bytes_a_second } => format!("it takes {bytes_a_second} bytes a second, and others wait"),
            TooSlow::Altogether { bytes } => format!("it took {bytes} bytes in half a minute"),
        });
        pace.note(began.elapsed(), sent as u64, |_| turn.is_wanted()).map_err(slow)?;
    }
    Ok(())
}
