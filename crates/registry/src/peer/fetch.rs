//! Fetching: manifest first, then what it names and the store lacks, each from the nearest host that has it.

use super::pace::{BELIEVED_FOR, PATIENT_BYTES, Pace, SlowHosts, TooSlow};
use super::{Duplex, HEAD_WITHIN, Head, Request, VERSION, read_frame, within, write_frame};
use crate::digest::Digest;
use crate::manifest::{Descriptor, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest, architecture};
use crate::store::{BlobWriter, ContentStore, MAX_BLOB_BYTES, StoreError};
use dunlin_model::HostId;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// Blobs that come in at once, of all images; more gain nothing on one line.
const MAX_PARALLEL_BLOBS: usize = 4;
/// A member that is not connected to within this time is as good as gone.
const DIAL_WITHIN: Duration = Duration::from_secs(5);
/// Hosts that cannot be reached or break off are asked again for this long after the last kilobyte: they may be restarting.
const PATIENCE: Duration = Duration::from_secs(60);
/// Before all hosts are asked again.
const PAUSE: Duration = Duration::from_secs(1);
const WRITE_BYTES: usize = 1 << 20;
/// Hosts that an error names with their reasons; it is shown to people.
const MAX_TOLD: usize = 8;

/// Opens a stream on which the other host calls [`serve`](super::serve).
pub type Dial = Arc<dyn Fn(&HostId) -> BoxFuture<'static, io::Result<Box<dyn Duplex>>> + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("no host has {digest}: {asked}; push or build the image again, or bring back a host that has it")]
    Nowhere { digest: Digest, asked: String },
    #[error("{digest} comes too slowly: {asked}; mend the line to a host that has it, or bring back another one that does")]
    Slow { digest: Digest, asked: String },
    #[error("the image is refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The other hosts, as images come from them. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    dial: Dial,
    order: Box<dyn Fn() -> Vec<HostId> + Send + Sync>,
    permits: Semaphore,
    /// One fetch at a time per digest; the others find it done.
    busy: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    slow: SlowHosts,
}

/// What is asked for.
struct Wanted {
    digest: Digest,
    /// As the manifest says; of the manifest itself nobody says.
    size: Option<u64>,
    max_bytes: u64,
}

/// Why a host did not give it.
enum Failure {
    /// It will not have it in a moment either.
    Lacks(String),
    /// It cannot be reached or broke off.
    Broke(String),
    /// It sent something else.
    Lied(String),
    Slow(TooSlow),
    /// Our own disk.
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Peers {
    /// `order` gives the hosts to ask, without this one: the nearest first, control's last, since it has everything.
    pub fn new(dial: Dial, order: impl Fn() -> Vec<HostId> + Send + Sync + 'static) -> Self {
        let permits = Semaphore::new(MAX_PARALLEL_BLOBS);
        Self { inner: Arc::new(Inner { dial, order: Box::new(order), permits, busy: Mutex::default(), slow: SlowHosts::default() }) }
    }

    /// Brings what the store lacks of an image: of an index, the image for this computer. When it returns, all of the
    /// image is in the store, checked. What a broken fetch leaves is gone on with by the next one.
    pub async fn fetch_image(&self, store: &ContentStore, digest: &Digest) -> Result<(), FetchError> {
        let began = Instant::now();
        let wanted = Wanted { digest: digest.clone(), size: None, max_bytes: MAX_MANIFEST_BYTES as u64 };
        let mut fetched = self.fetch(store, wanted).await?;
        let mut manifest = parsed(store, digest).await?;
        if manifest.is_index_shaped() {
            let missing = || format!("it has no variant for linux/{}, only {}", architecture(), manifest.platforms());
            let entry = manifest.for_this_platform().ok_or_else(|| FetchError::Refused(missing()))?.clone();
            fetched += self.fetch(store, bounded(&entry, MAX_MANIFEST_BYTES as u64)?).await?;
            manifest = parsed(store, &entry.digest).await?;
        }
        let config = manifest.config.as_ref().ok_or_else(|| FetchError::Refused("it is an index inside an index".into()))?;
        let mut blobs = vec![bounded(config, MAX_CONFIG_BYTES)?];
        for layer in manifest.layers.iter().filter(|layer| !layer.is_foreign()) {
            blobs.push(bounded(layer, MAX_BLOB_BYTES)?);
        }
        let fetches = futures_util::stream::iter(blobs.into_iter().map(|blob| self.fetch(store, blob)));
        let sizes: Vec<u64> = fetches.buffer_unordered(MAX_PARALLEL_BLOBS).try_collect().await?;
        fetched += sizes.into_iter().sum::<u64>();
        if fetched > 0 {
            tracing::info!(image = %digest, bytes = fetched, ms = began.elapsed().as_millis() as u64, "image pulled from other hosts");
        }
        Ok(())
    }

    /// One blob, unless it is here. Returns its size if it had to come.
    async fn fetch(&self, store: &ContentStore, wanted: Wanted) -> Result<u64, FetchError> {
        let lock = {
            let mut busy = self.inner.busy.lock().unwrap_or_else(|e| e.into_inner());
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            busy.entry(wanted.digest.clone()).or_default().clone()
        };
        let _mine = lock.lock().await;
        let (own, digest) = (store.clone(), wanted.digest.clone());
        if on_disk(move || own.touch_content(&digest)).await? {
            return Ok(0);
        }
        let _permit = self.inner.permits.acquire().await.map_err(|_| ended())?; // it is never closed
        let (mut came, mut came_at) = (0, Instant::now());
        // When they last did not give it.
        let mut failed: BTreeMap<HostId, Instant> = BTreeMap::new();
        loop {
            let mut asked = Vec::new();
            let (mut may_help, mut is_slow) = (false, false);
            for host in self.inner.slow.last((self.inner.order)()) {
                let found = self.fetch_from(store, &host, &wanted, &failed).await;
                if !matches!(found, Err(Failure::Slow(TooSlow::ForNow { .. }))) {
                    failed.insert(host.clone(), Instant::now());
                }
                let why = match found {
                    Ok(size) => return Ok(size),
                    Err(Failure::Store(error)) => return Err(error.into()),
                    Err(Failure::Lacks(why)) => why,
                    Err(Failure::Slow(how)) => {
                        (may_help, is_slow) = (true, true);
                        self.remember_slow(&host, how, &wanted.digest)
                    }
                    Err(Failure::Lied(why)) => {
                        tracing::warn!(digest = %wanted.digest, %host, why, "a host sent damaged content; the next one is asked");
                        why
                    }
                    Err(Failure::Broke(why)) => {
                        may_help = true;
                        why
                    }
                };
                asked.push(format!("{host} {why}"));
            }
            let (own, digest) = (store.clone(), wanted.digest.clone());
            let has_come = on_disk(move || own.partial_len(&digest)).await?;
            if has_come >= came + PATIENT_BYTES {
                (came, came_at) = (has_come, Instant::now());
            }
            if !may_help || came_at.elapsed() >= PATIENCE {
                let (digest, asked) = (wanted.digest.clone(), told(&asked));
                return Err(if is_slow { FetchError::Slow { digest, asked } } else { FetchError::Nowhere { digest, asked } });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Goes on with what is there of it. If the whole is wrong and the beginning was another's, it comes again from this
    /// one: nobody is blamed for what another sent.
    async fn fetch_from(&self, store: &ContentStore, host: &HostId, wanted: &Wanted, failed: &BTreeMap<HostId, Instant>) -> Result<u64, Failure> {
        // Who has just not given it is no reason to leave one who gives at least something.
        let may = |other: &HostId| other != host && failed.get(other).is_none_or(|at| at.elapsed() >= BELIEVED_FOR);
        let is_elsewhere = |rate: u64| (self.inner.order)().iter().any(|other| may(other) && self.inner.slow.is_faster(other, rate));
        loop {
            let (own, digest) = (store.clone(), wanted.digest.clone());
            let begun = move || match own.resume_blob(&digest)? {
                Some(writer) => Ok(writer),
                None => own.begin_blob(), // a pull of the registry is at the same one
            };
            let mut writer = Some(on_disk(begun).await?);
            let had = writer.as_ref().map_or(0, BlobWriter::len);
            let size = self.fetch_rest(host, &mut writer, wanted, &is_elsewhere).await?;
            let writer = writer.ok_or_else(ended)?;
            let (own, digest) = (store.clone(), wanted.digest.clone());
            match on_disk(move || own.keep_content(writer, &digest)).await {
                Ok(()) => return Ok(size),
                Err(StoreError::Digest { .. }) if had > 0 => {} // the partial file is gone with it
                Err(StoreError::Digest { actual, .. }) => return Err(Failure::Lied(format!("sent {actual} for it"))),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What the next one is to know of a host that is left.
    fn remember_slow(&self, host: &HostId, how: TooSlow, digest: &Digest) -> String {
        let (bytes_a_second, why) = match how {
            TooSlow::ForNow { bytes_a_second } => (bytes_a_second, format!("sent {bytes_a_second} bytes a second")),
            TooSlow::Altogether { bytes } => (0, format!("sent {bytes} bytes in half a minute")),
        };
        tracing::warn!(%digest, %host, why, "a host is slow; it goes on with the next one, and this one is asked last for some minutes");
        self.inner.slow.remember(host, bytes_a_second);
        why
    }

    async fn fetch_rest(
        &self,
        host: &HostId,
        writer: &mut Option<BlobWriter>,
        wanted: &Wanted,
        is_elsewhere: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<u64, Failure> {
        let mut have = writer.as_ref().map_or(0, BlobWriter::len);
        let cannot = |e: io::Error| Failure::Broke(format!("cannot be reached ({e})"));
        let mut stream = within(DIAL_WITHIN, (self.inner.dial)(host)).await.map_err(cannot)?;
        let request = Request { v: VERSION, digest: wanted.digest.clone(), offset: have };
        let asked = async {
            write_frame(&mut stream, &request).await?;
            read_frame(&mut stream).await
        };
        let size = match within(HEAD_WITHIN, asked).await.map_err(broke)? {
            Head::Size(size) => size,
            Head::Missing(_) => return Err(Failure::Lacks("does not have it".into())),
            Head::Refused(why) => return Err(Failure::Lacks(format!("refuses: {}", why.chars().take(200).collect::<String>()))),
        };
        if wanted.size.is_some_and(|expected| expected != size) || size > wanted.max_bytes {
            return Err(Failure::Lied(format!("has {size} bytes for it")));
        }
        if have > size {
            // Another's lie: this one has been asked for nothing of it.
            if let Some(writer) = writer {
                writer.restart()?;
            }
            return Err(Failure::Broke("has less of it than came before".into()));
        }
        let mut pace = Pace::new();
        while have < size {
            let wanted_bytes = WRITE_BYTES.min(usize::try_from(size - have).unwrap_or(WRITE_BYTES));
            let mut bytes = Vec::with_capacity(wanted_bytes);
            let read = fill(&mut stream, &mut bytes, wanted_bytes, (&mut pace, is_elsewhere)).await;
            have += bytes.len() as u64;
            append(writer, bytes).await?;
            read?;
        }
        Ok(size)
    }
}

/// Up to `wanted` bytes; what came before an error is in `bytes`.
async fn fill(
    stream: &mut Box<dyn Duplex>,
    bytes: &mut Vec<u8>,
    wanted: usize,
    (pace, is_elsewhere): (&mut Pace, &(dyn Fn(u64) -> bool + Sync)),
) -> Result<(), Failure> {
    while bytes.len() < wanted {
        let (before, began) = (bytes.len(), Instant::now());
        let mut rest = stream.take((wanted - before) as u64);
        match timeout(pace.left(), rest.read_buf(bytes)).await {
            Ok(Ok(0)) => return Err(broke(io::ErrorKind::UnexpectedEof.into())),
            Ok(Ok(_)) | Err(_) => {}
            Ok(Err(error)) => return Err(broke(error)),
        }
        pace.note(began.elapsed(), (bytes.len() - before) as u64, is_elsewhere).map_err(Failure::Slow)?;
    }
    Ok(())
}

async fn append(writer: &mut Option<BlobWriter>, bytes: Vec<u8>) -> Result<(), StoreError> {
    let mut taken = writer.take().ok_or_else(ended)?;
    *writer = Some(on_disk(move || taken.write(&bytes).map(|()| taken)).await?);
    Ok(())
}

fn bounded(entry: &Descriptor, max_bytes: u64) -> Result<Wanted, FetchError> {
    if entry.size > max_bytes {
        let why = format!("{} has {} bytes; at most {max_bytes} are taken", entry.digest, entry.size);
        return Err(FetchError::Refused(why));
    }
    Ok(Wanted { digest: entry.digest.clone(), size: Some(entry.size), max_bytes })
}

async fn parsed(store: &ContentStore, digest: &Digest) -> Result<Manifest, FetchError> {
    let (store, digest) = (store.clone(), digest.clone());
    match on_disk(move || store.parsed(&digest)).await {
        Err(StoreError::Invalid(why)) => Err(FetchError::Refused(why)),
        other => Ok(other?),
    }
}

fn told(reasons: &[String]) -> String {
    match reasons.len() {
        0 => "there was none to ask".into(),
        n if n > MAX_TOLD => format!("{}, and {} more like that", reasons[..MAX_TOLD].join(", "), n - MAX_TOLD),
        _ => reasons.join(", "),
    }
}

fn broke(error: io::Error) -> Failure {
    Failure::Broke(format!("broke off ({error})"))
}

fn ended() -> StoreError {
    StoreError::Io { what: "finish a fetch".into(), source: io::ErrorKind::BrokenPipe.into() }
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T, StoreError> + Send + 'static) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| StoreError::Io { what: "finish its work".into(), source: io::Error::other(e) })?
}
