//! Blobs on their way in: a file nobody sees, a running digest, then one rename.

use super::files::{make_dirs_durably, path_exists, sync_dir, unique_name};
use super::{ContentStore, StoreError};
use crate::digest::{Digest, Repo};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// One layer. Larger ones are data that belongs on a volume.
pub(crate) const MAX_BLOB_BYTES: u64 = 16 << 30;

/// An unfinished blob. Dropping it removes what was written, unless it is kept for later.
pub(crate) struct BlobWriter {
    file: File,
    path: PathBuf,
    dir: PathBuf,
    hasher: Sha256,
    len: u64,
    kept: Kept,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    No,
    ForLater,
    Done,
}

impl BlobWriter {
    pub fn len(&self) -> u64 {
        self.len
    }

    /// After an error the writer is back where it was, so that the same bytes can be sent again.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let len = self.len + bytes.len() as u64;
        if len > MAX_BLOB_BYTES {
            return Err(StoreError::TooLarge(format!("a blob may have {MAX_BLOB_BYTES} bytes, this one has more")));
        }
        if let Err(e) = self.file.write_all(bytes) {
            let back = self.file.set_len(self.len).and_then(|()| self.file.seek(io::SeekFrom::Start(self.len)));
            if let Err(e) = back {
                tracing::warn!("an upload could not be cut back: {e}");
            }
            return Err(super::full_or(e, &self.dir, "write a blob"));
        }
        self.hasher.update(bytes);
        self.len = len;
        Ok(())
    }

    /// Starts again from nothing.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        let started = self.file.set_len(0).and_then(|()| self.file.rewind());
        started.map_err(|e| super::full_or(e, &self.dir, "restart a blob"))?;
        (self.len, self.hasher) = (0, Sha256::new());
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if self.kept == Kept::No {
            let _ = fs::remove_file(&self.path); // what remains is removed at the next start
        }
    }
}

impl ContentStore {
    pub(crate) fn begin_blob(&self) -> Result<BlobWriter, StoreError> {
        let path = self.inner.dir.join("uploads").join(unique_name());
        let file = File::create_new(&path).map_err(|e| self.io(e, "begin a blob"))?;
        let dir = self.inner.dir.clone();
        Ok(BlobWriter { file, path, dir, hasher: Sha256::new(), len: 0, kept: Kept::No })
    }

    /// Goes on with what an earlier pull of the same digest left; `None` if another pull is at it right now.
    pub(crate) fn resume_blob(&self, digest: &Digest) -> Result<Option<BlobWriter>, StoreError> {
        use rustix::fs::{FlockOperation, flock};
        let io = |e| self.io(e, "go on with a blob");
        let path = self.inner.dir.join("partial").join(digest.hex());
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&path).map_err(io)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        let (mut hasher, mut len, mut buffer) = (Sha256::new(), 0, vec![0; 256 << 10]);
        loop {
            match file.read(&mut buffer).map_err(io)? {
                0 => break,
                n => {
                    hasher.update(&buffer[..n]);
                    len += n as u64;
                }
            }
        }
        Ok(Some(BlobWriter { file, path, dir: self.inner.dir.clone(), hasher, len, kept: Kept::ForLater }))
    }

    /// Bytes that an unfinished pull of it left.
    pub(crate) fn partial_len(&self, digest: &Digest) -> Result<u64, StoreError> {
        match fs::metadata(self.inner.dir.join("partial").join(digest.hex())) {
            Ok(metadata) => Ok(metadata.len()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(self.io(e, "look an unfinished pull up")),
        }
    }

    /// Checks the digest, makes the content durable, and lets `repo` see it.
    pub(crate) fn finish_blob(&self, repo: &Repo, writer: BlobWriter, expected: Option<&Digest>) -> Result<Digest, StoreError> {
        let digest = self.seal(writer, expected)?;
        let _guard = self.inner.links.read().unwrap_or_else(|e| e.into_inner());
        if !path_exists(&self.blob_path(&digest)) {
            // the collector came between; it removes only what nobody linked, so this is a retry away
            return Err(StoreError::NotFound(format!("{digest} (it was just collected: send it again)")));
        }
        self.link_blob(repo, &digest)?;
        Ok(digest)
    }

    /// Whether content is here, for the platform itself. It counts as used now.
    pub(crate) fn touch_content(&self, digest: &Digest) -> Result<bool, StoreError> {
        let _guard = self.inner.links.read().unwrap_or_else(|e| e.into_inner());
        self.seen(&self.blob_path(digest))
    }

    /// Checks the digest and makes the content durable. No repository sees it; the collector leaves it for its grace.
    pub(crate) fn keep_content(&self, writer: BlobWriter, expected: &Digest) -> Result<(), StoreError> {
        self.seal(writer, Some(expected)).map(drop)
    }

    /// Reads content through, and sets it aside if it is not what its name says. For whoever could make nothing of it.
    pub(crate) fn verify(&self, digest: &Digest) -> Result<(), StoreError> {
        let (file, _) = self.open_blob(digest)?;
        let mut hasher = Sha256::new();
        let mut reader = io::BufReader::with_capacity(256 << 10, &file);
        loop {
            let bytes = reader.fill_buf().map_err(|e| self.io(e, "read a blob"))?;
            if bytes.is_empty() {
                break;
            }
            hasher.update(bytes);
            let len = bytes.len();
            reader.consume(len);
        }
        if Digest::from_hasher(hasher) == *digest { Ok(()) } else { Err(self.set_aside(digest, &file)) }
    }

    /// Takes damaged content out of its place, so that a client which asks for it is told to send it again.
    /// `read` is the file that was read: if another has its place by now, that one stays.
    pub(crate) fn set_aside(&self, digest: &Digest, read: &File) -> StoreError {
        let path = self.blob_path(digest);
        let aside = self.inner.dir.join("damaged").join(digest.hex());
        let moved = || -> io::Result<()> {
            let (own, there) = (read.metadata()?, fs::metadata(&path)?);
            if (own.ino(), own.dev()) == (there.ino(), there.dev()) {
                fs::rename(&path, &aside)?;
                read.set_modified(std::time::SystemTime::now())?; // it is kept from now on
                sync_dir(path.parent().unwrap_or(&self.inner.dir))?;
                tracing::error!(%digest, aside = %aside.display(), "content was damaged on the disk and set aside");
            }
            Ok(())
        };
        match moved() {
            Err(e) if e.kind() != io::ErrorKind::NotFound => self.io(e, "set damaged content aside"),
            _ => StoreError::Damaged(digest.clone()),
        }
    }

    pub(super) fn add_content(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let mut writer = self.begin_blob()?;
        writer.write(bytes)?;
        self.seal(writer, None)
    }

    fn seal(&self, mut writer: BlobWriter, expected: Option<&Digest>) -> Result<Digest, StoreError> {
        let actual = Digest::from_hasher(std::mem::take(&mut writer.hasher));
        if let Some(expected) = expected.filter(|expected| **expected != actual) {
            writer.kept = Kept::No; // wrong bytes are no use to a later attempt
            return Err(StoreError::Digest { expected: expected.clone(), actual });
        }
        let io = |e| self.io(e, "keep a blob");
        let path = self.blob_path(&actual);
        // Also when it is here already: this copy was just checked, that one may have been damaged since.
        writer.file.sync_all().map_err(io)?;
        let dir = path.parent().unwrap_or(&self.inner.dir).to_owned();
        make_dirs_durably(&self.inner.dir, &dir).map_err(io)?;
        fs::rename(&writer.path, &path).map_err(io)?;
        writer.kept = Kept::Done;
        sync_dir(&dir).map_err(io)?;
        Ok(actual)
    }
}
