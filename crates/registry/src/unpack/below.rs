//! The layers below one in the making, as overlayfs shows them: the highest that has a name decides, whiteouts
//! and opaque folders hide what lies lower.

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Tell overlayfs to show nothing of the lower layers' folder of the same name: the first where root of the computer mounts
/// it, the second where root of a user namespace does. No image brings either.
pub(super) const OPAQUE_XATTRS: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];
/// A list of attribute names has 64 KiB at most.
const MAX_XATTR_BYTES: usize = 64 << 10;

/// A folder of the layers below: its part in each layer that has it, the highest first.
pub(super) struct Folder {
    parts: Vec<OwnedFd>,
}

/// What the layers below have under a name.
pub(super) enum Seen {
    Nothing,
    Folder(Folder),
    /// A symbolic link: where it leads, and the part of the folder that it lies in.
    Link(Vec<u8>, OwnedFd),
    /// Anything else, by the part of the folder that it lies in.
    File(OwnedFd),
}

/// Opens the roots of these layers, lowest first.
pub(super) fn root(layers: &[PathBuf]) -> io::Result<Folder> {
    let mut parts = Vec::with_capacity(layers.len());
    for layer in layers.iter().rev() {
        parts.push(open_folder(rustix::fs::CWD, layer)?);
    }
    Ok(Folder { parts })
}

impl Folder {
    pub fn empty() -> Self {
        Self { parts: vec![] }
    }

    pub fn look(&self, name: &[u8]) -> io::Result<Seen> {
        let mut parts = Vec::new();
        for part in &self.parts {
            let stat = match rustix::fs::statat(part, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(e.into()),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let folder = open_folder(part, name)?;
                    let ends = is_opaque(&folder)?;
                    parts.push(folder);
                    if ends {
                        break;
                    }
                }
                _ if !parts.is_empty() => break, // hidden by the folders above it
                // Devices are left out of layers, so this is a whiteout.
                FileType::CharacterDevice => return Ok(Seen::Nothing),
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(part, name, vec![])?.into_bytes();
                    return Ok(Seen::Link(target, part.try_clone()?));
                }
                _ => return Ok(Seen::File(part.try_clone()?)),
            }
        }
        Ok(if parts.is_empty() { Seen::Nothing } else { Seen::Folder(Self { parts }) })
    }

    /// The part whose owner, mode and attributes the folder has.
    pub fn highest(&self) -> Option<&OwnedFd> {
        self.parts.first()
    }
}

/// The layers that an image shows: nothing below a layer whose root is opaque. overlayfs itself knows opaque
/// folders only inside of layers.
pub(super) fn visible(mut layers: Vec<PathBuf>) -> io::Result<Vec<PathBuf>> {
    for at in (1..layers.len()).rev() {
        if is_opaque(&open_folder(rustix::fs::CWD, &layers[at])?)? {
            layers.drain(..at);
            break;
        }
    }
    Ok(layers)
}

fn open_folder(dir: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

pub(super) fn is_opaque(folder: &OwnedFd) -> io::Result<bool> {
    for name in OPAQUE_XATTRS {
        let mut value = [0; 8];
        match rustix::fs::getxattr(by_descriptor(folder), name, &mut value[..]) {
            Ok(len) if &value[..len] == b"y" => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

/// The attributes of a file that a copy of it keeps; links are not followed.
pub(super) fn kept_xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; MAX_XATTR_BYTES];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    let names = names[..len].split(|b| *b == 0).filter_map(|name| std::str::from_utf8(name).ok());
    let mut kept = Vec::new();
    for name in names.filter(|name| super::entry::is_kept(name)) {
        let mut value = vec![0; MAX_XATTR_BYTES];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(len);
        kept.push((name.to_owned(), value));
    }
    Ok(kept)
}

/// A path to what the descriptor is of, for calls that take none opened for its place alone.
pub(super) fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    let fd: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(fd);
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
