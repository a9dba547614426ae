//! Images from host to host: each host serves what it has, and fetches what its machines need from the nearest that has it.
//!
//! ```text
//! -> u32 LE, {"v":1,"digest":"sha256:..","offset":0}
//! <- u32 LE, {"size":123}, then the bytes from the offset on   (or {"missing":"sha256:.."}, {"refused":"why"})
//! ```
//! One stream is one blob; manifests are blobs like all others here. "Knowing a hash never grants content" is a rule for
//! tenants, who come through the registry's API. Members are mutually authenticated hosts of one cluster, each of which may
//! have to run any machine: they give one another whatever is named. What a host fetched is linked into no repository, so
//! no tenant sees it through this host's registry either.
//!
//! A peer is authenticated, not believed: every byte is checked against the digest, and nothing longer than announced is read. Nor
//! does a slow one hold a blob for long that others may have, or a turn to be served that others wait for.

mod fetch;
mod pace;
mod serve;
mod turns;

pub use fetch::{Dial, FetchError, Peers};
pub use serve::serve;
pub(crate) use turns::Turns;

use crate::digest::Digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const VERSION: u32 = 1;
/// A digest and two numbers, or a sentence.
const MAX_FRAME_BYTES: u32 = 4096;
/// A head is asked and answered in this time, also by one who serves many others first.
const HEAD_WITHIN: Duration = Duration::from_secs(20);
/// One who takes or sends nothing for this long has gone.
const MAX_SILENCE: Duration = Duration::from_secs(30);

/// A stream to another host.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    v: u32,
    digest: Digest,
    offset: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Head {
    /// Of the whole blob.
    Size(u64),
    Missing(Digest),
    Refused(String),
}

async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(value)?;
    let len = u32::try_from(json.len()).ok().filter(|len| *len <= MAX_FRAME_BYTES);
    let len = len.ok_or_else(|| io::Error::other("a frame is too long to be sent"))?;
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend(json);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn read_frame<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let len = stream.read_u32_le().await?;
    if len > MAX_FRAME_BYTES {
        let why = format!("a frame of {len} bytes; at most {MAX_FRAME_BYTES} are taken");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let mut bytes = vec![0; len as usize];
    stream.read_exact(&mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// `work`, or the error that it took too long.
async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("nothing came for {} s", time.as_secs()));
    tokio::time::timeout(time, work).await.map_err(late)?
}
