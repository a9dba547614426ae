//! One layer: decompressed, bounded, its digest taken, its entries made.

use super::{Owners, UnpackError};
use super::entry::{Entry, Extensions};
use super::root::{Place, Root, failed};
use crate::digest::Digest;
use rustix::fs::FileType;
use sha2::{Digest as _, Sha256};
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use tar::EntryType;

/// Unpacked size of one layer; larger ones are data that belongs on a volume.
pub(crate) const MAX_LAYER_BYTES: u64 = 16 << 30;
/// Files of one layer: several large distributions.
pub(crate) const MAX_LAYER_ENTRIES: u64 = 1_000_000;
/// Text compresses 20 times; above this it is a bomb ...
const MAX_RATIO: u64 = 200;
/// ... unless it is small anyway.
const RATIO_FREE_BYTES: u64 = 256 << 20;
/// 128 MiB, what `zstd --long` writes.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A layer as it travels.
pub(crate) struct Packed<'a> {
    pub blob: File,
    pub compressed_bytes: u64,
    pub media_type: &'a str,
}

/// Unpacks into the empty folder `target` and returns the digest of what was unpacked. `below` are the layers that
/// it lies on, lowest first. Most layers list every folder that they use and mean the same on any other; without
/// `below`, `None` says that this one does not.
pub(crate) fn unpack_layer(
    packed: Packed<'_>,
    target: &Path,
    below: Option<&[PathBuf]>,
    owners: Owners,
) -> Result<Option<Digest>, UnpackError> {
    let Packed { blob, compressed_bytes, media_type } = packed;
    let root = Root::open(target, below, owners)?;
    let reading = || UnpackError::io("read a layer");
    let mut blob = BufReader::with_capacity(256 << 10, blob);
    let magic = blob.fill_buf().map_err(reading())?;
    // What it is called and what it is differ now and then; the content knows.
    let plain: Box<dyn Read> = if magic.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(blob))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::Decoder::with_buffer(blob).map_err(reading())?;
        decoder.window_log_max(MAX_ZSTD_WINDOW_LOG).map_err(reading())?;
        Box::new(decoder)
    } else if media_type.ends_with("gzip") || media_type.ends_with("zstd") {
        return Err(UnpackError::Refused(format!("a layer of the type {media_type} is not compressed like that")));
    } else {
        Box::new(blob)
    };
    let limit = MAX_LAYER_BYTES.min(RATIO_FREE_BYTES.max(compressed_bytes.saturating_mul(MAX_RATIO)));
    let exceeded = Cell::new(false);
    let mut reader = Measured { inner: plain, hasher: Sha256::new(), len: 0, limit, exceeded: &exceeded };
    let unpacked = unpack_archive(&mut reader, &root).and_then(|()| {
        // the rest counts for the digest: padding after the end of the archive
        io::copy(&mut reader, &mut io::sink()).map(drop).map_err(reading())
    });
    if exceeded.get() {
        let why = format!("a layer of {compressed_bytes} bytes unpacks to more than {limit}: it looks like a decompression bomb");
        return Err(UnpackError::Refused(why));
    }
    if root.needs_below() {
        return Ok(None);
    }
    unpacked.map_err(name_corruption)?;
    Ok(Some(Digest::from_hasher(reader.hasher)))
}

/// Reads, counts, hashes, and stops at the limit.
struct Measured<'a> {
    inner: Box<dyn Read>,
    hasher: Sha256,
    len: u64,
    limit: u64,
    exceeded: &'a Cell<bool>,
}

impl Read for Measured<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.len += n as u64;
        if self.len > self.limit {
            self.exceeded.set(true);
            return Err(io::Error::other("too large"));
        }
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

fn name_corruption(error: UnpackError) -> UnpackError {
    // `Other` is what the archive library says of a bad checksum.
    use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    match error {
        UnpackError::Io { what, source } if matches!(source.kind(), InvalidData | InvalidInput | Other | UnexpectedEof) => {
            UnpackError::Refused(format!("a layer is broken ({what}: {source}); push the image again"))
        }
        other => other,
    }
}

fn unpack_archive(reader: &mut Measured<'_>, root: &Root) -> Result<(), UnpackError> {
    let reading = || UnpackError::io("read the archive of a layer");
    let mut archive = tar::Archive::new(reader);
    let mut extensions = Extensions::default();
    let mut skipped_devices = 0;
    for (count, raw) in (1u64..).zip(archive.entries().map_err(reading())?.raw(true)) {
        if count > MAX_LAYER_ENTRIES {
            return Err(UnpackError::Refused(format!("a layer has more than {MAX_LAYER_ENTRIES} files")));
        }
        let mut raw = raw.map_err(reading())?;
        let Some(entry) = extensions.take(&mut raw)? else { continue };
        if matches!(entry.kind, EntryType::Char | EntryType::Block) {
            // A machine could not open them; and 0:0 would be a whiteout that nobody checked.
            skipped_devices += 1;
            continue;
        }
        let Some(place) = root.place(&entry.path)? else {
            set_root(root, &entry)?;
            continue;
        };
        if place.name.starts_with(WHITEOUT) {
            white_out(root, place, &entry)?;
            continue;
        }
        make(root, &place, &entry, &mut raw).map_err(|e| name_path(e, &entry))?;
        if entry.kind == EntryType::Directory {
            root.remember_time(entry.path, entry.mtime)?;
        }
    }
    // Last, because making what is inside a folder changes its time; and not before, as folders may be replaced.
    root.set_times()?;
    if skipped_devices > 0 {
        tracing::debug!(skipped_devices, "device nodes of a layer were left out");
    }
    Ok(())
}

/// An error of a step that did not say which file it was about.
enum Step {
    Io(io::Error),
    Unpack(UnpackError),
}

impl From<io::Error> for Step {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<UnpackError> for Step {
    fn from(error: UnpackError) -> Self {
        Self::Unpack(error)
    }
}

fn name_path(step: Step, entry: &Entry) -> UnpackError {
    match step {
        Step::Io(e) => failed("make", &entry.path, e),
        Step::Unpack(e) => e,
    }
}

fn make<R: Read>(root: &Root, place: &Place, entry: &Entry, raw: &mut tar::Entry<'_, R>) -> Result<(), Step> {
    match entry.kind {
        EntryType::Directory => {
            let found = place.kind()?;
            if found != Some(FileType::Directory) {
                place.clear()?;
                place.make_folder(0o700)?;
                // It takes the place of something that this layer put, or of its whiteout: either way what the
                // layers below have there is gone.
                if found.is_some() {
                    place.set_opaque(root.owners())?;
                }
            }
        }
        EntryType::Regular | EntryType::Continuous => {
            place.clear()?;
            let mut file = place.create()?;
            io::copy(raw, &mut file)?;
        }
        EntryType::Symlink => {
            let target = entry.link.as_deref().filter(|target| !target.is_empty());
            let target = target.ok_or_else(|| UnpackError::Refused("it has a link without a target".into()))?;
            place.clear()?;
            place.make_symlink(target)?;
        }
        EntryType::Link => {
            let target = root.link_target(entry.link.as_deref().unwrap_or_default())?;
            if matches!(target.kind()?, None | Some(FileType::Directory | FileType::CharacterDevice)) {
                let shown = String::from_utf8_lossy(&entry.path);
                return Err(UnpackError::Refused(format!("the hard link {shown:?} means no file")).into());
            }
            place.clear()?;
            place.make_hard_link(&target)?;
            return Ok(()); // owner, mode and time are the target's
        }
        EntryType::Fifo => {
            place.clear()?;
            place.make_fifo()?;
        }
        other => {
            let shown = String::from_utf8_lossy(&entry.path);
            return Err(UnpackError::Refused(format!("{shown:?} is of the unknown kind {:?}", other.as_byte())).into());
        }
    }
    // In this order: a change of owner clears set-uid bits and capabilities.
    place.set_owner(root.owners().of(entry.uid), root.owners().of(entry.gid))?;
    if entry.kind != EntryType::Symlink {
        place.set_mode(entry.mode)?;
        for (name, value) in &entry.xattrs {
            place.set_xattr(name, value)?;
        }
    }
    place.set_mtime(entry.mtime)?;
    Ok(())
}

fn white_out(root: &Root, place: Place, entry: &Entry) -> Result<(), UnpackError> {
    let make = || -> io::Result<()> {
        if place.name == OPAQUE {
            let parent = rustix::fs::openat(&place.parent, ".", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
            return Ok(rustix::fs::fsetxattr(&parent, root.owners().opaque_xattr(), b"y", rustix::fs::XattrFlags::empty())?);
        }
        let hidden = Place { parent: place.parent.try_clone()?, name: place.name[WHITEOUT.len()..].to_vec() };
        // It hides what lies below; what this same layer has under the name stays, in whatever order they come.
        match hidden.kind()? {
            None => hidden.make_whiteout(),
            Some(FileType::Directory) => hidden.set_opaque(root.owners()),
            Some(_) => Ok(()),
        }
    };
    let hidden = place.name.strip_prefix(WHITEOUT).unwrap_or_default();
    if place.name != OPAQUE && (hidden.is_empty() || hidden == b"." || hidden == b".." || hidden.starts_with(WHITEOUT)) {
        // `.wh..wh.plnk` and the like are AUFS's own bookkeeping
        return Ok(());
    }
    make().map_err(|e| failed("mark as removed", &entry.path, e))
}

fn set_root(root: &Root, entry: &Entry) -> Result<(), UnpackError> {
    if entry.kind != EntryType::Directory {
        return Err(UnpackError::Refused("its root is not a folder".into()));
    }
    let set = || -> io::Result<()> {
        let place = Place { parent: root.root()?, name: b".".to_vec() };
        place.set_owner(root.owners().of(entry.uid), root.owners().of(entry.gid))?;
        place.set_mode(entry.mode)?;
        place.set_mtime(entry.mtime)
    };
    set().map_err(|e| failed("set up the root", &entry.path, e))
}
