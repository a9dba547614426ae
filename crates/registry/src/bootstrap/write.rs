//! A folder (a root, or the upper folder of an overlay) as a layer: sorted, without times that differ from run
//! to run, overlayfs's marks as whiteouts.

use super::BootstrapError;
use crate::digest::{Digest, Repo};
use crate::store::{BlobWriter, ContentStore};
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Files made within this time of now were made by us, and get a time that is the same in every run; the times
/// that packages set stay, because Python's compiled files remember them.
const OURS_S: i64 = 3600;
/// Far above what a distribution has; the walk is over something we made.
const MAX_DEPTH: usize = 128;

pub(super) struct WrittenLayer {
    pub digest: Digest,
    pub size: u64,
    pub diff_id: Digest,
}

pub(super) fn write_layer(store: &ContentStore, repo: &Repo, dir: &Path, epoch: i64) -> Result<WrittenLayer, BootstrapError> {
    let blob = Blob { writer: store.begin_blob()?, full: None };
    let gzip = GzEncoder::new(blob, Compression::fast());
    let hashed = Hashed { inner: gzip, hasher: Sha256::new() };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    let mut tree = Tree { tar: tar::Builder::new(hashed), links: BTreeMap::new(), epoch, newest: now - OURS_S };
    let reading = || BootstrapError::io("write the layer");
    tree.add_folder(dir, Path::new(""), 0).map_err(reading())?;
    let Hashed { inner, hasher } = tree.tar.into_inner().map_err(reading())?;
    let blob = inner.finish().map_err(reading())?;
    if let Some(error) = blob.full {
        return Err(error.into());
    }
    let size = blob.writer.len();
    let digest = store.finish_blob(repo, blob.writer, None)?;
    Ok(WrittenLayer { digest, size, diff_id: Digest::from_hasher(hasher) })
}

/// Carries the store's own error past `io::Write`.
struct Blob {
    writer: BlobWriter,
    full: Option<crate::StoreError>,
}

impl Write for Blob {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(e) => {
                let text = e.to_string();
                self.full = Some(e);
                Err(io::Error::other(text))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Hashed<W> {
    inner: W,
    hasher: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

struct Tree<W: Write> {
    tar: tar::Builder<W>,
    /// First name of each file that has several.
    links: BTreeMap<(u64, u64), PathBuf>,
    epoch: i64,
    newest: i64,
}

impl<W: Write> Tree<W> {
    fn add_folder(&mut self, dir: &Path, inside: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("the folders are nested too deeply"));
        }
        let mut names: Vec<_> = fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            self.add(&dir.join(&name), &inside.join(&name), depth)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, inside: &Path, depth: usize) -> io::Result<()> {
        let metadata = fs::symlink_metadata(path)?;
        let kind = metadata.file_type();
        let mut header = tar::Header::new_gnu();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        let mtime = if metadata.mtime() > self.newest { self.epoch } else { metadata.mtime() };
        header.set_mtime(mtime.max(0) as u64);
        header.set_size(0);
        if kind.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            self.tar.append_data(&mut header, inside, io::empty())?;
            if xattr(path, "trusted.overlay.opaque")?.is_some() {
                self.add_empty(&inside.join(".wh..wh..opq"))?;
            }
            return self.add_folder(path, inside, depth + 1);
        }
        if kind.is_char_device() && metadata.rdev() == 0 {
            let name = inside.file_name().map(|name| name.as_bytes()).unwrap_or_default();
            let name = [b".wh.", name].concat();
            return self.add_empty(&inside.with_file_name(std::ffi::OsStr::from_bytes(&name)));
        }
        if kind.is_char_device() || kind.is_block_device() || kind.is_socket() || kind.is_fifo() {
            return Ok(()); // a machine gets its devices when it starts
        }
        if kind.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            return self.tar.append_link(&mut header, inside, fs::read_link(path)?);
        }
        let id = (metadata.dev(), metadata.ino());
        if metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&id) {
                header.set_entry_type(tar::EntryType::Link);
                return self.tar.append_link(&mut header, inside, first);
            }
            self.links.insert(id, inside.to_owned());
        }
        if let Some(value) = xattr(path, "security.capability")? {
            self.tar.append_pax_extensions([("SCHILY.xattr.security.capability", &value[..])])?;
        }
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(metadata.len());
        self.tar.append_data(&mut header, inside, File::open(path)?)
    }

    fn add_empty(&mut self, inside: &Path) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0);
        header.set_size(0);
        header.set_mtime(self.epoch.max(0) as u64);
        header.set_entry_type(tar::EntryType::Regular);
        self.tar.append_data(&mut header, inside, io::empty())
    }
}

fn xattr(path: &Path, name: &str) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 256];
    match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOTSUP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
