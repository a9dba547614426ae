//! From a manifest to directories that a machine's overlay is made of.
//!
//! ```text
//! layers/<diff id>/      one unpacked layer, whole and verified
//! layers/on-<chain id>/  likewise, of a layer that means something else on other layers
//! tmp/                   layers in the making and on their way out; what a crash leaves is removed by the next start
//! ```
//! A layer that uses folders which it does not list takes them over from the layers below it, so it is good for
//! that chain of layers alone.
//!
//! The folder is 0700: layers hold set-uid files that belong to root.

mod below;
mod collect;
mod entry;
mod layer;
mod root;

pub(crate) use layer::{Packed, unpack_layer};

use crate::digest::Digest;
use crate::manifest::{ImageConfig, MAX_CONFIG_BYTES, MAX_LAYERS, MAX_MANIFEST_BYTES, Manifest, parse_config};
use crate::peer::{FetchError, Peers};
use crate::store::{ContentStore, GC_GRACE, StoreError, is_full};
use collect::{Held, Uses};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Unpacking is work for a processor and a disk; more at once only share them.
const MAX_PARALLEL_LAYERS: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("the disk of the unpacked images ({}) is full; nothing was lost: free space, then try again", .dir.display())]
    Full { dir: PathBuf },
    #[error("a layer of the image unpacks to {actual}, but its configuration says {expected}; push the image again")]
    Digest { expected: Digest, actual: Digest },
    /// Hostile or broken content.
    #[error("the image is refused: {0}")]
    Refused(String),
    #[error("could not {what}")]
    Io { what: String, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl UnpackError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What a machine is started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// Of the manifest for this platform.
    pub digest: Digest,
    /// Lowest first.
    pub layers: Vec<PathBuf>,
    pub config: ImageConfig,
    /// Bytes as they travel, compressed.
    pub size: u64,
}

/// Whose the files of layers are on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owners {
    /// Stands for the image's root, and so on upwards. 0: files have the ids that the image gives them.
    pub first: u32,
}

impl Owners {
    /// As many ids as a machine has; a file of another one is nobody's there.
    const RANGE: u32 = 65_536;
    const NOBODY: u32 = 65_534;

    fn of(self, id: u32) -> u32 {
        match self.first {
            0 => id,
            first => first + if id < Self::RANGE { id } else { Self::NOBODY },
        }
    }

    /// Other ids than the image's are there for a root that is not the computer's, and may not set the usual one.
    fn opaque_xattr(self) -> &'static str {
        below::OPAQUE_XATTRS[usize::from(self.first != 0)]
    }

    /// Layers of other owners are other files.
    fn folder(self) -> String {
        if self.first == 0 { "layers".into() } else { format!("layers-of-{}", self.first) }
    }
}

/// Unpacked layers, shared by all images. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    owners: Owners,
    store: ContentStore,
    permits: Semaphore,
    /// One at a time per name of a layer; the others find it done.
    busy: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    uses: Arc<Uses>,
    /// Other hosts, where there are some.
    peers: OnceLock<Peers>,
}

/// What is read of an image before it is unpacked.
struct Parts {
    digest: Digest,
    config: ImageConfig,
    layers: Vec<Layer>,
    size: u64,
}

#[derive(Clone)]
struct Layer {
    blob: Digest,
    diff_id: Digest,
    /// Of this layer and all below it.
    chain_id: Digest,
    media_type: String,
}

impl Layer {
    /// Its folder, if it means the same on every other layer.
    fn own_name(&self) -> String {
        self.diff_id.hex().to_owned()
    }

    /// Its folder, if it does not.
    fn chained_name(&self) -> String {
        format!("on-{}", self.chain_id.hex())
    }

    fn names(&self) -> [String; 2] {
        [self.own_name(), self.chained_name()]
    }
}

impl Images {
    /// With the ids of the images.
    pub fn open(dir: impl AsRef<Path>, store: ContentStore) -> Result<Self, UnpackError> {
        Self::open_as(dir, store, Owners::default())
    }

    pub fn open_as(dir: impl AsRef<Path>, store: ContentStore, owners: Owners) -> Result<Self, UnpackError> {
        let dir = dir.as_ref().to_owned();
        let made = || -> io::Result<()> {
            for part in [dir.clone(), dir.join(owners.folder()), dir.join("tmp")] {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(part)?;
            }
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
            for entry in fs::read_dir(dir.join("tmp"))? {
                fs::remove_dir_all(entry?.path())?;
            }
            Ok(())
        };
        made().map_err(UnpackError::io(format!("prepare the folder of unpacked images {}", dir.display())))?;
        let inner = Inner {
            dir,
            owners,
            store,
            permits: Semaphore::new(MAX_PARALLEL_LAYERS),
            busy: Mutex::default(),
            uses: Arc::new(Uses::begin()),
            peers: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// From now on, what the store lacks of an image comes from other hosts. To be said once; later calls change nothing.
    pub fn fetch_from(&self, peers: Peers) {
        let _ = self.inner.peers.set(peers);
    }

    /// Unpacks what is not unpacked yet. Of an index, the image for this computer.
    pub async fn ensure(&self, manifest: &Digest) -> Result<ImageRecord, UnpackError> {
        match self.ensure_once(manifest).await {
            // It is set aside, and another host may have it whole.
            Err(UnpackError::Store(StoreError::Damaged(_))) if self.inner.peers.get().is_some() => self.ensure_once(manifest).await,
            ended => ended,
        }
    }

    async fn ensure_once(&self, manifest: &Digest) -> Result<ImageRecord, UnpackError> {
        let Parts { digest, config, layers, size } = self.read(manifest).await?;
        let held = Arc::new(self.inner.uses.hold(layers.iter().flat_map(Layer::names)));
        // Each by itself first and side by side; those that turn out to need the ones below, after them.
        let own = layers.iter().map(|layer| self.ensure_layer(layer, None, &held));
        let own = futures_util::future::try_join_all(own).await?;
        let mut paths: Vec<PathBuf> = Vec::with_capacity(layers.len());
        for (layer, own) in layers.iter().zip(own) {
            let path = match own {
                Some(path) => Some(path),
                None => self.ensure_layer(layer, Some(paths.clone()), &held).await?,
            };
            let missing = || UnpackError::Refused(format!("the layer {} cannot be laid on those below it", layer.blob));
            paths.push(path.ok_or_else(missing)?);
        }
        let visible = tokio::task::spawn_blocking(move || below::visible(paths)).await.map_err(died)?;
        Ok(ImageRecord { digest, layers: visible.map_err(UnpackError::io("look at the layers"))?, config, size })
    }

    /// Reads what the image consists of. What the store lacks comes from other hosts first, if there are some.
    async fn read(&self, manifest: &Digest) -> Result<Parts, UnpackError> {
        let read = || {
            let (inner, wanted) = (self.inner.clone(), manifest.clone());
            tokio::task::spawn_blocking(move || {
                let parts = read_image(&inner.store, &wanted)?;
                let is_whole = inner.peers.get().is_none() || inner.has_all(&parts)?;
                Ok::<_, UnpackError>((parts, is_whole))
            })
        };
        let found = read().await.map_err(died)?;
        match (&found, self.inner.peers.get()) {
            (Ok((_, false)) | Err(UnpackError::Store(StoreError::NotFound(_) | StoreError::Damaged(_))), Some(peers)) => {
                peers.fetch_image(&self.inner.store, manifest).await?;
                Ok(read().await.map_err(died)??.0)
            }
            _ => Ok(found?.0),
        }
    }

    /// Removes layers that none of these manifests needs and that nobody used during the last hour. Returns how
    /// many went. Machines start meanwhile.
    pub async fn gc(&self, keep: &[Digest]) -> Result<u64, UnpackError> {
        self.gc_older_than(keep, GC_GRACE).await
    }

    pub async fn gc_older_than(&self, keep: &[Digest], grace: Duration) -> Result<u64, UnpackError> {
        let (inner, keep) = (self.inner.clone(), keep.to_vec());
        tokio::task::spawn_blocking(move || collect::collect(&inner, &keep, grace)).await.map_err(died)?
    }

    /// Where the layer is; without the layers `below` it, `None` if they have to be known.
    async fn ensure_layer(&self, layer: &Layer, below: Option<Vec<PathBuf>>, held: &Arc<Held>) -> Result<Option<PathBuf>, UnpackError> {
        if let Some(path) = self.inner.find(layer) {
            return Ok(Some(path));
        }
        let name = if below.is_some() { layer.chained_name() } else { layer.own_name() };
        let lock = {
            let mut busy = self.inner.busy.lock().unwrap_or_else(|e| e.into_inner());
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            busy.entry(name.clone()).or_default().clone()
        };
        let mine = lock.lock_owned().await;
        if let Some(path) = self.inner.find(layer) {
            return Ok(Some(path));
        }
        let _permit = self.inner.permits.acquire().await.map_err(died)?;
        let (inner, layer, held) = (self.inner.clone(), layer.clone(), held.clone());
        let work = tokio::task::spawn_blocking(move || {
            // Both go into the thread: it goes on when the one who asked has gone away.
            let (_mine, _held) = (mine, held);
            inner.unpack(&layer, &name, below.as_deref())
        });
        work.await.map_err(died)?
    }
}

impl Inner {
    fn layers(&self) -> PathBuf {
        self.dir.join(self.owners.folder())
    }

    fn find(&self, layer: &Layer) -> Option<PathBuf> {
        layer.names().into_iter().map(|name| self.layers().join(name)).find(|path| path.is_dir())
    }

    /// Whether every layer is unpacked, or here to be.
    fn has_all(&self, parts: &Parts) -> Result<bool, UnpackError> {
        for layer in &parts.layers {
            if self.find(layer).is_none() && !self.store.touch_content(&layer.blob)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn unpack(&self, layer: &Layer, name: &str, below: Option<&[PathBuf]>) -> Result<Option<PathBuf>, UnpackError> {
        let temp = self.dir.join("tmp").join(name);
        let result = self.unpack_into(layer, &temp, below);
        let kept = match &result {
            Ok(true) => Ok(Some(self.layers().join(name))),
            Ok(false) | Err(_) => remove_tree(&temp).map(|()| None),
        };
        match (result, kept) {
            (Err(UnpackError::Io { source, .. }), _) if is_full(&source) => Err(UnpackError::Full { dir: self.dir.clone() }),
            (Err(e), Err(left)) => {
                tracing::warn!("an unfinished layer stays until the next start: {left}");
                Err(e)
            }
            (Err(e @ (UnpackError::Refused(_) | UnpackError::Digest { .. })), Ok(_)) => {
                // Was it made so, or did the disk do it? In the second case sending it again helps.
                self.store.verify(&layer.blob)?;
                Err(e)
            }
            (Err(e), Ok(_)) => Err(e),
            (Ok(_), kept) => kept.map_err(UnpackError::io("remove an unfinished layer")),
        }
    }

    /// `false`: it can only be unpacked on the layers below, which are not known yet.
    fn unpack_into(&self, layer: &Layer, temp: &Path, below: Option<&[PathBuf]>) -> Result<bool, UnpackError> {
        remove_tree(temp).map_err(UnpackError::io("remove an unfinished layer"))?;
        fs::DirBuilder::new().mode(0o755).create(temp).map_err(UnpackError::io("make a folder for a layer"))?;
        let (blob, compressed_bytes) = self.store.open_blob(&layer.blob)?;
        let packed = Packed { blob, compressed_bytes, media_type: &layer.media_type };
        let Some(actual) = unpack_layer(packed, temp, below, self.owners)? else { return Ok(false) };
        if actual != layer.diff_id {
            return Err(UnpackError::Digest { expected: layer.diff_id.clone(), actual });
        }
        // A name under layers/ promises whole content, after a power loss too.
        let synced = File::open(temp).and_then(|dir| rustix::fs::syncfs(&dir).map_err(io::Error::from));
        synced.map_err(UnpackError::io("write a layer to the disk"))?;
        let layers = self.layers();
        let target = layers.join(temp.file_name().unwrap_or_default());
        let renamed = fs::rename(temp, target).and_then(|()| File::open(layers)?.sync_all());
        renamed.map_err(UnpackError::io("put a layer in its place"))?;
        Ok(true)
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn read_image(store: &ContentStore, wanted: &Digest) -> Result<Parts, UnpackError> {
    let (digest, manifest) = platform_manifest(store, wanted)?;
    let refuse = |why: String| UnpackError::Refused(why);
    let config = manifest.config.as_ref().ok_or_else(|| refuse("it is an index inside an index".into()))?;
    let bytes = store.small_blob(&config.digest, MAX_CONFIG_BYTES)?;
    let (config, diff_ids) = parse_config(&bytes).map_err(refuse)?;
    if diff_ids.len() != manifest.layers.len() || diff_ids.len() > MAX_LAYERS {
        let (named, listed) = (diff_ids.len(), manifest.layers.len());
        return Err(refuse(format!("its configuration names {named} layers, its manifest {listed}; at most {MAX_LAYERS}")));
    }
    if let Some(layer) = manifest.layers.iter().find(|layer| layer.is_foreign()) {
        return Err(refuse(format!("the layer {} is kept elsewhere by its maker; build on another base image", layer.digest)));
    }
    let size = manifest.layers.iter().map(|layer| layer.size).fold(bytes.len() as u64, u64::saturating_add);
    let mut layers: Vec<Layer> = Vec::with_capacity(diff_ids.len());
    for (layer, diff_id) in manifest.layers.into_iter().zip(diff_ids) {
        let chain_id = match layers.last() {
            None => diff_id.clone(),
            Some(below) => Digest::of(format!("{} {diff_id}", below.chain_id).as_bytes()),
        };
        layers.push(Layer { blob: layer.digest, diff_id, chain_id, media_type: layer.media_type });
    }
    Ok(Parts { digest, config, layers, size })
}

fn platform_manifest(store: &ContentStore, wanted: &Digest) -> Result<(Digest, Manifest), UnpackError> {
    let bytes = store.small_blob(wanted, MAX_MANIFEST_BYTES as u64)?;
    let manifest = Manifest::parse(&bytes).map_err(UnpackError::Refused)?;
    if !manifest.is_index_shaped() {
        return Ok((wanted.clone(), manifest));
    }
    let Some(entry) = manifest.for_this_platform() else {
        let (own, theirs) = (crate::manifest::architecture(), manifest.platforms());
        return Err(UnpackError::Refused(format!("it has no variant for linux/{own}, only {theirs}")));
    };
    Ok((entry.digest.clone(), store.parsed(&entry.digest)?))
}

fn died(error: impl std::error::Error + Send + Sync + 'static) -> UnpackError {
    UnpackError::Io { what: "finish unpacking".into(), source: io::Error::other(error) }
}
