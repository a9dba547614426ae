//! The content store on disk.
//!
//! ```text
//! blobs/<2 hex>/<hex>            content, written once
//! repos/<name>/blobs/<hex>       this repository may see that blob
//! repos/<name>/manifests/<hex>   ... and that manifest; the file holds its media type
//! repos/<name>/tags/<tag>        holds a digest
//! uploads/  partial/             unfinished; partial ones are gone on with by the next pull
//! damaged/<hex>                  content that the disk gave back wrong, for a person to look at
//! ```
//! A blob is complete and durable before anything names it; a link is durable before anybody is told.

mod blob;
mod files;
mod gc;
mod uploads;

pub(crate) use blob::{BlobWriter, MAX_BLOB_BYTES};
pub(crate) use files::unique_name;
pub use gc::Gc;
pub(crate) use uploads::{UploadError, Uploads};

use crate::digest::{Digest, InvalidName, Repo, is_tag};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, is_known_media_type};
use crate::peer::Turns;
use bytes::Bytes;
use files::{hold_lock, list, path_exists, read_small, remove_if_there, write_durably};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

/// What somebody asked about lately is not collected: a client that saw a blob here is about to name it.
pub(crate) const GC_GRACE: Duration = Duration::from_secs(3600);
/// Unfinished pulls are gone on with for this long.
const PARTIAL_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Damaged content is looked at within a week or never.
const DAMAGED_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// A media type is a short word.
const MAX_MEDIA_TYPE_BYTES: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the disk of the image store ({}) is full; nothing was lost: free space or remove old images, then try again", .dir.display())]
    Full { dir: PathBuf },
    #[error("{0} is not here")]
    NotFound(String),
    #[error("the content is {actual}, but {expected} was announced; it was damaged on the way: try again")]
    Digest { expected: Digest, actual: Digest },
    #[error("the content {0} was damaged on the disk; it has been set aside, so that pushing or pulling its image again repairs it")]
    Damaged(Digest),
    #[error("{0}")]
    TooLarge(String),
    #[error("{0}")]
    Invalid(String),
    #[error("the image store could not {what}")]
    Io { what: String, source: io::Error },
}

impl From<InvalidName> for StoreError {
    fn from(error: InvalidName) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Content by digest, and per repository what it may see. Cheap to clone.
#[derive(Clone)]
pub struct ContentStore {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    /// Readers add links, the collector removes: never both at once.
    links: RwLock<()>,
    uploads: Uploads,
    /// Blobs that are read for other hosts.
    serving: Turns,
    /// Held for life: only a process that is alone removes what others left unfinished.
    _lock: File,
}

impl ContentStore {
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        let dir = dir.as_ref().to_owned();
        let io = |what: &str| {
            let what = format!("{what} in {}", dir.display());
            move |source| StoreError::Io { what: what.clone(), source }
        };
        for part in ["blobs", "repos", "uploads", "partial", "damaged"] {
            fs::create_dir_all(dir.join(part)).map_err(|e| full_or(e, &dir, "make its folders"))?;
        }
        let (lock, alone) = hold_lock(&dir.join("lock")).map_err(io("take its lock"))?;
        if alone {
            clean(&dir.join("uploads"), Duration::ZERO).map_err(io("remove unfinished uploads"))?;
            clean(&dir.join("partial"), PARTIAL_KEPT).map_err(io("remove unfinished pulls"))?;
            clean(&dir.join("damaged"), DAMAGED_KEPT).map_err(io("remove damaged content"))?;
        }
        let serving = Turns::new();
        Ok(Self { inner: Arc::new(Inner { dir, links: RwLock::new(()), uploads: Uploads::default(), serving, _lock: lock }) })
    }

    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    pub(crate) fn uploads(&self) -> &Uploads {
        &self.inner.uploads
    }

    pub(crate) fn serving(&self) -> &Turns {
        &self.inner.serving
    }

    // --- manifests and tags

    pub fn resolve_tag(&self, repo: &Repo, tag: &str) -> Result<Option<Digest>, StoreError> {
        if !is_tag(tag) {
            return Err(StoreError::Invalid(format!("{tag:?} is not a tag")));
        }
        let text = self.read(&self.repo(repo).join("tags").join(tag))?;
        Ok(text.and_then(|text| String::from_utf8_lossy(&text).parse().ok()))
    }

    pub fn has_manifest(&self, repo: &Repo, digest: &Digest) -> Result<bool, StoreError> {
        // A link outlives content that was damaged and set aside.
        Ok(self.seen(&self.repo(repo).join("manifests").join(digest.hex()))? && path_exists(&self.blob_path(digest)))
    }

    /// (media type, content)
    pub fn manifest(&self, repo: &Repo, digest: &Digest) -> Result<(String, Bytes), StoreError> {
        let link = self.repo(repo).join("manifests").join(digest.hex());
        let media_type = self.read(&link)?.ok_or_else(|| not_found(repo, digest))?;
        self.seen(&link)?;
        let media_type = String::from_utf8_lossy(&media_type).into_owned();
        Ok((media_type, self.small_blob(digest, MAX_MANIFEST_BYTES as u64)?))
    }

    /// Takes a manifest whose blobs (and, of an index, manifests) are all in the repository.
    pub fn put_manifest(&self, repo: &Repo, media_type: &str, bytes: &[u8], tag: Option<&str>) -> Result<Digest, StoreError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(StoreError::TooLarge(format!("the manifest has more than {MAX_MANIFEST_BYTES} bytes")));
        }
        let manifest = Manifest::parse(bytes).map_err(StoreError::Invalid)?;
        check_media_type(&manifest, media_type)?;
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(StoreError::Invalid(format!("{tag:?} is not a tag")));
        }
        let digest = self.add_content(bytes)?;
        let _guard = self.inner.links.read().unwrap_or_else(|e| e.into_inner());
        for blob in manifest.blobs() {
            let size = self.has_blob(repo, &blob.digest)?;
            let Some(size) = size else { return Err(not_found(repo, &blob.digest)) };
            if size != blob.size {
                return Err(StoreError::Invalid(format!("{} has {size} bytes, the manifest says {}", blob.digest, blob.size)));
            }
        }
        for child in &manifest.manifests {
            if !self.has_manifest(repo, &child.digest)? && self.has_blob(repo, &child.digest)?.is_none() {
                return Err(not_found(repo, &child.digest));
            }
        }
        let dir = self.repo(repo);
        if let Some(subject) = &manifest.subject {
            let referrers = dir.join("referrers").join(subject.digest.hex());
            self.write(&referrers.join(digest.hex()), b"")?;
        }
        self.write(&dir.join("manifests").join(digest.hex()), media_type.as_bytes())?;
        if let Some(tag) = tag {
            self.write(&dir.join("tags").join(tag), digest.as_str().as_bytes())?;
        }
        Ok(digest)
    }

    pub fn tag(&self, repo: &Repo, tag: &str, digest: &Digest) -> Result<(), StoreError> {
        if !is_tag(tag) {
            return Err(StoreError::Invalid(format!("{tag:?} is not a tag")));
        }
        let _guard = self.inner.links.read().unwrap_or_else(|e| e.into_inner());
        if !self.has_manifest(repo, digest)? {
            return Err(not_found(repo, digest));
        }
        self.write(&self.repo(repo).join("tags").join(tag), digest.as_str().as_bytes())
    }

    /// Sorted, as the API wants them.
    pub fn tags(&self, repo: &Repo) -> Result<Vec<String>, StoreError> {
        self.list(&self.repo(repo).join("tags"))
    }

    pub fn has_repo(&self, repo: &Repo) -> bool {
        self.repo(repo).is_dir()
    }

    pub fn delete_tag(&self, repo: &Repo, tag: &str) -> Result<(), StoreError> {
        if !is_tag(tag) {
            return Err(StoreError::Invalid(format!("{tag:?} is not a tag")));
        }
        self.remove(&self.repo(repo).join("tags").join(tag), || format!("{repo}:{tag}"))
    }

    /// Removes the manifest and every tag of it; its content goes with the next `gc`.
    pub fn delete_manifest(&self, repo: &Repo, digest: &Digest) -> Result<(), StoreError> {
        let link = self.repo(repo).join("manifests").join(digest.hex());
        if !self.seen(&link)? {
            return Err(not_found(repo, digest));
        }
        for tag in self.tags(repo)? {
            if self.resolve_tag(repo, &tag)?.as_ref() == Some(digest) {
                self.delete_tag(repo, &tag)?;
            }
        }
        let manifest = match self.parsed(digest) {
            Ok(manifest) => Some(manifest),
            Err(StoreError::NotFound(_) | StoreError::Damaged(_)) => None, // only its name is left to remove
            Err(e) => return Err(e),
        };
        if let Some(subject) = manifest.and_then(|manifest| manifest.subject) {
            let referrer = self.repo(repo).join("referrers").join(subject.digest.hex()).join(digest.hex());
            remove_if_there(&referrer).map_err(|e| self.io(e, "remove a referrer"))?;
        }
        self.remove(&link, || format!("{repo}@{digest}"))
    }

    pub fn delete_repo(&self, repo: &Repo) -> Result<(), StoreError> {
        let _guard = self.inner.links.write().unwrap_or_else(|e| e.into_inner());
        match fs::remove_dir_all(self.repo(repo)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.io(e, "remove a repository")),
            _ => Ok(()),
        }
    }

    /// Digests of the manifests that name `subject` as theirs.
    pub(crate) fn referrers(&self, repo: &Repo, subject: &Digest) -> Result<Vec<Digest>, StoreError> {
        let names = self.list(&self.repo(repo).join("referrers").join(subject.hex()))?;
        Ok(names.iter().filter_map(|hex| Digest::from_hex(hex)).collect())
    }

    // --- blobs

    /// The size of a blob that this repository may see.
    pub fn has_blob(&self, repo: &Repo, digest: &Digest) -> Result<Option<u64>, StoreError> {
        if !self.seen(&self.repo(repo).join("blobs").join(digest.hex()))? {
            return Ok(None);
        }
        match fs::metadata(self.blob_path(digest)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.io(e, "look a blob up")),
        }
    }

    pub fn put_blob(&self, repo: &Repo, mut reader: impl Read, expected: Option<&Digest>) -> Result<(Digest, u64), StoreError> {
        let mut writer = self.begin_blob()?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => writer.write(&buffer[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.io(e, "read what it is to keep")),
            }
        }
        let size = writer.len();
        Ok((self.finish_blob(repo, writer, expected)?, size))
    }

    /// Lets `to` see a blob that `from` sees; `false` if `from` does not.
    pub fn mount(&self, from: &Repo, to: &Repo, digest: &Digest) -> Result<bool, StoreError> {
        let _guard = self.inner.links.read().unwrap_or_else(|e| e.into_inner());
        if self.has_blob(from, digest)?.is_none() {
            return Ok(false);
        }
        self.link_blob(to, digest)?;
        Ok(true)
    }

    /// Lets `to` see an image of `from`: the manifest and all it refers to.
    pub fn copy_image(&self, from: &Repo, to: &Repo, digest: &Digest) -> Result<(), StoreError> {
        let (media_type, bytes) = self.manifest(from, digest)?;
        let manifest = Manifest::parse(&bytes).map_err(StoreError::Invalid)?;
        for child in &manifest.manifests {
            let (media_type, bytes) = self.manifest(from, &child.digest)?;
            let parsed = Manifest::parse(&bytes).map_err(StoreError::Invalid)?;
            self.mount_all(from, to, &parsed)?;
            self.put_manifest(to, &media_type, &bytes, None)?;
        }
        self.mount_all(from, to, &manifest)?;
        self.put_manifest(to, &media_type, &bytes, None).map(drop)
    }

    fn mount_all(&self, from: &Repo, to: &Repo, manifest: &Manifest) -> Result<(), StoreError> {
        for blob in manifest.blobs() {
            if !self.mount(from, to, &blob.digest)? {
                return Err(not_found(from, &blob.digest));
            }
        }
        Ok(())
    }

    /// Content of any repository; for the platform itself, never for an answer over the network.
    pub(crate) fn open_blob(&self, digest: &Digest) -> Result<(File, u64), StoreError> {
        let opened = File::open(self.blob_path(digest)).and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((len, file)) => Ok((file, len)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(StoreError::NotFound(format!("the content {digest}"))),
            Err(e) => Err(self.io(e, "open a blob")),
        }
    }

    pub(crate) fn small_blob(&self, digest: &Digest, max_bytes: u64) -> Result<Bytes, StoreError> {
        let (file, len) = self.open_blob(digest)?;
        if len > max_bytes {
            return Err(StoreError::TooLarge(format!("{digest} has {len} bytes; at most {max_bytes} are taken")));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        (&file).take(max_bytes).read_to_end(&mut bytes).map_err(|e| self.io(e, "read a blob"))?;
        if Digest::of(&bytes) != *digest {
            return Err(self.set_aside(digest, &file));
        }
        Ok(bytes.into())
    }

    pub(crate) fn parsed(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        let bytes = self.small_blob(digest, MAX_MANIFEST_BYTES as u64)?;
        Manifest::parse(&bytes).map_err(StoreError::Invalid)
    }

    // --- inner things

    fn repo(&self, repo: &Repo) -> PathBuf {
        self.inner.dir.join("repos").join(repo.file_name())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.inner.dir.join("blobs").join(&digest.hex()[..2]).join(digest.hex())
    }

    fn link_blob(&self, repo: &Repo, digest: &Digest) -> Result<(), StoreError> {
        let link = self.repo(repo).join("blobs").join(digest.hex());
        if self.seen(&link)? {
            return Ok(());
        }
        self.write(&link, b"")
    }

    /// Whether the link exists; if so it counts as used now, which keeps it through `GC_GRACE`.
    fn seen(&self, link: &Path) -> Result<bool, StoreError> {
        let metadata = match fs::metadata(link) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(self.io(e, "look a link up")),
        };
        let now = SystemTime::now();
        let age = metadata.modified().ok().and_then(|at| now.duration_since(at).ok()).unwrap_or_default();
        if age > GC_GRACE / 4 {
            let touched = File::options().write(true).open(link).and_then(|file| file.set_modified(now));
            touched.map_err(|e| self.io(e, "mark a link as used"))?;
        }
        Ok(true)
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
        read_small(path).map_err(|e| self.io(e, "read a link"))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        write_durably(&self.inner.dir, path, bytes).map_err(|e| self.io(e, "write a link"))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        list(dir).map_err(|e| self.io(e, "list a folder"))
    }

    fn remove(&self, path: &Path, what: impl Fn() -> String) -> Result<(), StoreError> {
        if !path_exists(path) {
            return Err(StoreError::NotFound(what()));
        }
        remove_if_there(path).map_err(|e| self.io(e, "remove a link"))
    }

    pub(crate) fn io(&self, source: io::Error, what: &str) -> StoreError {
        full_or(source, &self.inner.dir, what)
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn full_or(source: io::Error, dir: &Path, what: &str) -> StoreError {
    if is_full(&source) {
        return StoreError::Full { dir: dir.to_owned() };
    }
    StoreError::Io { what: what.to_owned(), source }
}

fn not_found(repo: &Repo, digest: &Digest) -> StoreError {
    StoreError::NotFound(format!("{digest} in the repository {repo}"))
}

fn check_media_type(manifest: &Manifest, media_type: &str) -> Result<(), StoreError> {
    let invalid = |why: String| Err(StoreError::Invalid(why));
    if media_type.len() > MAX_MEDIA_TYPE_BYTES || !is_known_media_type(media_type) {
        let shown: String = media_type.chars().take(100).collect();
        return invalid(format!("{shown:?} is not the media type of an OCI or Docker manifest or index"));
    }
    if let Some(own) = manifest.media_type.as_deref().filter(|own| *own != media_type) {
        return invalid(format!("the manifest says it is {own:?}, the request says {media_type:?}"));
    }
    let is_index = media_type.contains("index") || media_type.contains("list");
    if is_index != manifest.config.is_none() {
        return invalid(format!("the content is not what {media_type} promises"));
    }
    Ok(())
}

/// Removes what is older than `kept`; nobody else uses it.
fn clean(dir: &Path, kept: Duration) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let modified = entry.metadata()?.modified()?;
        if SystemTime::now().duration_since(modified).unwrap_or_default() >= kept {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
