//! The directory a layer is unpacked into. Every path is resolved with this directory as its root, so that no link
//! and no `..` leads out, whatever the layer did before: by the kernel (`openat2`, RESOLVE_IN_ROOT) where the layer
//! itself has all of it, else a step at a time through the layer and those below it, as overlayfs would.

use super::UnpackError;
use super::Owners;
use super::below::{self, Folder, Seen, by_descriptor};
use super::layer::{MAX_LAYER_BYTES, MAX_LAYER_ENTRIES};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Deeper trees are made to exhaust a stack.
const MAX_DEPTH: usize = 256;
/// As many as the kernel follows.
const MAX_LINKS: usize = 40;
/// The names of folders are kept in memory until their times can be set. A large distribution has 3 MiB of them.
const MAX_FOLDER_NAME_BYTES: usize = 64 << 20;
/// What Docker and others give a folder that no layer lists.
const UNLISTED_MODE: u32 = 0o755;

/// Seconds and nanoseconds.
pub(super) type Time = (i64, u32);

pub(super) struct Root {
    fd: OwnedFd,
    owners: Owners,
    /// `None`: it is not known yet what lies below.
    below: Option<Rc<Folder>>,
    needs_below: Cell<bool>,
    /// Folders and the times that they are to have, in the order of the archive.
    times: RefCell<Vec<(Vec<u8>, Time)>>,
    name_bytes: Cell<usize>,
    unlisted_folders: Cell<u64>,
    copied_bytes: Cell<u64>,
}

/// A folder of the layer and a name in it.
pub(super) struct Place {
    pub parent: OwnedFd,
    pub name: Vec<u8>,
}

/// A folder on the way: the layer's own, and what lies below it.
struct Level {
    name: Vec<u8>,
    own: OwnedFd,
    below: Rc<Folder>,
}

enum Entered {
    Folder(Level),
    Link(Vec<u8>),
}

/// The components of a path inside the layer; `..` is refused, a leading `/` or `./` means nothing.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, UnpackError> {
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                let shown = String::from_utf8_lossy(path);
                return Err(UnpackError::Refused(format!("the path {shown:?} leads out of it")));
            }
            part => parts.push(part),
        }
    }
    if parts.len() > MAX_DEPTH {
        return Err(UnpackError::Refused(format!("it has a folder more than {MAX_DEPTH} levels deep")));
    }
    Ok(parts)
}

impl Root {
    /// `below`: the layers that this one lies on, lowest first, if they are known already.
    pub fn open(dir: &Path, below: Option<&[PathBuf]>, owners: Owners) -> Result<Self, UnpackError> {
        let opened = || -> io::Result<_> {
            let fd = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
            if owners != Owners::default() {
                std::os::unix::fs::chown(dir, Some(owners.of(0)), Some(owners.of(0)))?;
            }
            Ok((fd, below.map(below::root).transpose()?.map(Rc::new)))
        };
        let (fd, below) = opened().map_err(UnpackError::io("open the folder of a layer"))?;
        Ok(Self {
            fd,
            owners,
            below,
            needs_below: Cell::default(),
            times: RefCell::default(),
            name_bytes: Cell::default(),
            unlisted_folders: Cell::default(),
            copied_bytes: Cell::default(),
        })
    }

    pub fn owners(&self) -> Owners {
        self.owners
    }

    /// Whether it failed for want of the layers below.
    pub fn needs_below(&self) -> bool {
        self.needs_below.get()
    }

    /// The folder's time is to be set once all that is in it has been made.
    pub fn remember_time(&self, folder: Vec<u8>, time: Time) -> Result<(), UnpackError> {
        self.name_bytes.set(self.name_bytes.get().saturating_add(folder.len()));
        if self.name_bytes.get() > MAX_FOLDER_NAME_BYTES {
            let why = format!("the names of its folders have more than {} MiB", MAX_FOLDER_NAME_BYTES >> 20);
            return Err(UnpackError::Refused(why));
        }
        self.times.borrow_mut().push((folder, time));
        Ok(())
    }

    pub fn set_times(&self) -> Result<(), UnpackError> {
        for (path, time) in self.times.take() {
            if let Some(place) = self.existing_folder(&path)? {
                place.set_mtime(time).map_err(|e| failed("set the time of", &path, e))?;
            }
        }
        Ok(())
    }

    /// Where `path` goes, its folders made if they are missing. `None` for the root itself.
    pub fn place(&self, path: &[u8]) -> Result<Option<Place>, UnpackError> {
        let parts = components(path)?;
        let Some((name, folders)) = parts.split_last() else { return Ok(None) };
        if name.len() > 255 {
            return Err(UnpackError::Refused("it has a file name of more than 255 bytes".into()));
        }
        let parent = match self.resolve(&folders.join(&b'/')) {
            Ok(parent) => Ok(parent),
            Err(e) if is_not_there(&e) => self.walk(folders).map(|level| level.own),
            Err(e) => Err(e),
        };
        Ok(Some(Place { parent: parent.map_err(|e| failed("reach", path, e))?, name: name.to_vec() }))
    }

    /// A folder of the layer that is still there; nothing is made.
    fn existing_folder(&self, path: &[u8]) -> Result<Option<Place>, UnpackError> {
        let parts = components(path)?;
        let Some((name, folders)) = parts.split_last() else { return Ok(None) };
        let found = || -> io::Result<Option<Place>> {
            let place = match self.resolve(&folders.join(&b'/')) {
                Ok(parent) => Place { parent, name: name.to_vec() },
                Err(e) if is_not_there(&e) => return Ok(None),
                Err(e) => return Err(e),
            };
            Ok((place.kind()? == Some(FileType::Directory)).then_some(place))
        };
        found().map_err(|e| failed("find", path, e))
    }

    /// The file that a hard link means, copied up when a layer below has it; never through a link at its end.
    pub fn link_target(&self, path: &[u8]) -> Result<Place, UnpackError> {
        let parts = components(path)?;
        let Some((name, folders)) = parts.split_last() else {
            return Err(UnpackError::Refused("it has a hard link to its root".into()));
        };
        let io = |e| failed("find the target of a hard link", path, e);
        if let Ok(parent) = self.resolve(&folders.join(&b'/')) {
            let place = Place { parent, name: name.to_vec() };
            if place.kind().map_err(io)?.is_some() {
                return Ok(place);
            }
        }
        let level = self.walk(folders).map_err(io)?;
        let place = Place { parent: level.own, name: name.to_vec() };
        if place.kind().map_err(io)?.is_none() {
            let seen = self.see(&level.below, name).map_err(io)?;
            self.copy_up(seen, &place).map_err(io)?;
        }
        Ok(place)
    }

    pub fn root(&self) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(&self.fd, ".", OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?)
    }

    /// Through what the layer itself has; where that leads to a folder, the layers below change nothing about it.
    fn resolve(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        Ok(rustix::fs::openat2(&self.fd, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty(), how)?)
    }

    /// Through this layer and those below; what the layer does not have itself is made.
    fn walk(&self, folders: &[&[u8]]) -> io::Result<Level> {
        let below = self.below.clone().unwrap_or_else(|| Rc::new(Folder::empty()));
        let mut levels = vec![Level { name: vec![], own: self.root()?, below }];
        let mut rest: VecDeque<Vec<u8>> = folders.iter().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    levels.truncate(levels.len().max(2) - 1);
                    continue;
                }
                _ => {}
            }
            if links > MAX_LINKS || levels.len() > MAX_DEPTH {
                return Err(rustix::io::Errno::LOOP.into());
            }
            match self.enter(&levels, &name)? {
                Entered::Folder(level) => levels.push(level),
                Entered::Link(target) => {
                    links += 1;
                    if target.starts_with(b"/") {
                        levels.truncate(1);
                    }
                    target.split(|b| *b == b'/').rev().for_each(|part| rest.push_front(part.to_vec()));
                }
            }
        }
        levels.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn enter(&self, levels: &[Level], name: &[u8]) -> io::Result<Entered> {
        let Some(here) = levels.last() else { return Err(io::ErrorKind::NotFound.into()) };
        let place = Place { parent: here.own.try_clone()?, name: name.to_vec() };
        let below = match place.kind()? {
            Some(FileType::Directory) if below::is_opaque(&place.open_folder()?)? => Folder::empty(),
            Some(FileType::Directory) => match here.below.look(name)? {
                Seen::Folder(folder) => folder,
                _ => Folder::empty(),
            },
            Some(FileType::Symlink) => return Ok(Entered::Link(rustix::fs::readlinkat(&place.parent, name, vec![])?.into_bytes())),
            // This layer removed what was there: the folder is a new one.
            Some(FileType::CharacterDevice) => {
                place.clear()?;
                self.make_unlisted(&place)?;
                place.set_opaque(self.owners)?;
                Folder::empty()
            }
            Some(_) => return Err(rustix::io::Errno::NOTDIR.into()),
            None => match self.see(&here.below, name)? {
                Seen::Link(target, _) => return Ok(Entered::Link(target)),
                Seen::Folder(folder) => {
                    self.copy_folder(&folder, &place, levels)?;
                    folder
                }
                Seen::Nothing | Seen::File(_) => {
                    self.make_unlisted(&place)?;
                    Folder::empty()
                }
            },
        };
        Ok(Entered::Folder(Level { name: name.to_vec(), own: place.open_folder()?, below: Rc::new(below) }))
    }

    /// What lies below, or an error that says that it has to be known first.
    fn see(&self, folder: &Folder, name: &[u8]) -> io::Result<Seen> {
        if self.below.is_none() {
            self.needs_below.set(true);
            return Err(io::ErrorKind::NotFound.into());
        }
        folder.look(name)
    }

    fn copy_folder(&self, from: &Folder, place: &Place, levels: &[Level]) -> io::Result<()> {
        self.make_unlisted(place)?;
        let Some(source) = from.highest() else { return Ok(()) };
        let stat = rustix::fs::fstat(source)?;
        place.copy_attributes(&stat, &by_descriptor(source).join("."))?;
        let names = levels.iter().skip(1).map(|level| &level.name[..]).chain([&place.name[..]]);
        let path = names.collect::<Vec<_>>().join(&b'/');
        self.remember_time(path, modified(&stat)).map_err(io::Error::other)
    }

    /// A folder that the layer uses and does not list. Each entry may ask for many, so they are counted too.
    fn make_unlisted(&self, place: &Place) -> io::Result<()> {
        self.unlisted_folders.set(self.unlisted_folders.get() + 1);
        if self.unlisted_folders.get() > MAX_LAYER_ENTRIES {
            return Err(io::Error::other(format!("it uses more than {MAX_LAYER_ENTRIES} folders that it does not list")));
        }
        place.make_folder(UNLISTED_MODE)?;
        if self.owners == Owners::default() { Ok(()) } else { place.set_owner(self.owners.of(0), self.owners.of(0)) }
    }

    /// Makes a copy of what a layer below has, so that a link can be made to it. Leaves nothing for a folder.
    fn copy_up(&self, seen: Seen, place: &Place) -> io::Result<()> {
        let parent = match seen {
            Seen::Nothing | Seen::Folder(_) => return Ok(()),
            Seen::Link(target, parent) => {
                let stat = rustix::fs::statat(&parent, &place.name[..], AtFlags::SYMLINK_NOFOLLOW)?;
                place.make_symlink(&target)?;
                place.set_owner(stat.st_uid, stat.st_gid)?;
                return place.set_mtime(modified(&stat));
            }
            Seen::File(parent) => parent,
        };
        let stat = rustix::fs::statat(&parent, &place.name[..], AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let copied = self.copied_bytes.get().saturating_add(stat.st_size.unsigned_abs());
                if copied > MAX_LAYER_BYTES {
                    return Err(io::Error::new(io::ErrorKind::FileTooLarge, "its hard links copy more than a layer may have"));
                }
                self.copied_bytes.set(copied);
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source = File::from(rustix::fs::openat(&parent, &place.name[..], flags, Mode::empty())?);
                io::copy(&mut source, &mut place.create()?)?;
            }
            FileType::Fifo => place.make_fifo()?,
            _ => return Ok(()),
        }
        place.copy_attributes(&stat, &by_descriptor(&parent).join(OsStr::from_bytes(&place.name)))?;
        place.set_mtime(modified(&stat))
    }
}

fn is_not_there(error: &io::Error) -> bool {
    // A whiteout on the way is no folder, and a link may lead to what only a layer below has.
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn modified(stat: &rustix::fs::Stat) -> Time {
    (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

impl Place {
    /// What is there already, links not followed.
    pub fn kind(&self) -> io::Result<Option<FileType>> {
        match rustix::fs::statat(&self.parent, &self.name[..], AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes room: whatever has the name goes.
    pub fn clear(&self) -> io::Result<()> {
        match self.kind()? {
            None => Ok(()),
            Some(FileType::Directory) => fs::remove_dir_all(self.proc_path()),
            Some(_) => Ok(rustix::fs::unlinkat(&self.parent, &self.name[..], AtFlags::empty())?),
        }
    }

    pub fn create(&self) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.parent, &self.name[..], flags, Mode::from_raw_mode(0o600))?.into())
    }

    /// The mode is set by itself, whatever the umask says.
    pub fn make_folder(&self, mode: u32) -> io::Result<()> {
        rustix::fs::mkdirat(&self.parent, &self.name[..], Mode::from_raw_mode(0o700))?;
        self.set_mode(mode)
    }

    pub fn open_folder(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.parent, &self.name[..], flags, Mode::empty())?)
    }

    /// Hides what the layers below have in this folder.
    pub fn set_opaque(&self, owners: Owners) -> io::Result<()> {
        self.set_xattr(owners.opaque_xattr(), b"y")
    }

    /// Owner, mode and attributes of another file, at `source`.
    fn copy_attributes(&self, stat: &rustix::fs::Stat, source: &Path) -> io::Result<()> {
        self.set_owner(stat.st_uid, stat.st_gid)?;
        self.set_mode(stat.st_mode & 0o7777)?;
        for (name, value) in below::kept_xattrs(source)? {
            self.set_xattr(&name, &value)?;
        }
        Ok(())
    }

    pub fn make_symlink(&self, target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.parent, &self.name[..])?)
    }

    pub fn make_hard_link(&self, target: &Self) -> io::Result<()> {
        Ok(rustix::fs::linkat(&target.parent, &target.name[..], &self.parent, &self.name[..], AtFlags::empty())?)
    }

    pub fn make_fifo(&self) -> io::Result<()> {
        Ok(rustix::fs::mknodat(&self.parent, &self.name[..], FileType::Fifo, Mode::from_raw_mode(0o600), 0)?)
    }

    /// overlayfs' way to say that the lower layers' file is gone.
    pub fn make_whiteout(&self) -> io::Result<()> {
        Ok(rustix::fs::mknodat(&self.parent, &self.name[..], FileType::CharacterDevice, Mode::empty(), 0)?)
    }

    pub fn set_owner(&self, uid: u32, gid: u32) -> io::Result<()> {
        use rustix::fs::{Gid, Uid};
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(rustix::fs::chownat(&self.parent, &self.name[..], Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// For anything but a symbolic link, which the caller knows it just made.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::chmodat(&self.parent, &self.name[..], Mode::from_raw_mode(mode), AtFlags::empty())?)
    }

    pub fn set_xattr(&self, name: &str, value: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::lsetxattr(self.proc_path(), name, value, rustix::fs::XattrFlags::empty())?)
    }

    pub fn set_mtime(&self, (seconds, nanoseconds): (i64, u32)) -> io::Result<()> {
        let at = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
        let times = Timestamps { last_access: at, last_modification: at };
        Ok(rustix::fs::utimensat(&self.parent, &self.name[..], &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The parent is pinned by its descriptor; only the last name is looked up, and not followed by our callers.
    fn proc_path(&self) -> PathBuf {
        by_descriptor(&self.parent).join(OsStr::from_bytes(&self.name))
    }
}

pub(super) fn failed(what: &str, path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Io { what: format!("{what} {:?} of a layer", String::from_utf8_lossy(path)), source }
}
