//! Removing trees that a tenant made: any depth, any names, in bounded stack and descriptors.
//!
//! `std::fs::remove_dir_all` recurses and holds a descriptor a level: a directory 15,000 levels deep, which a
//! program makes in a second, ends the process that removes it. Here every subdirectory moves up to the top of
//! the tree before its turn, so that there is never more than one level below the top.

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat2, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlink, unlinkat};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// How often a directory may be empty when it is listed and not when it is removed: somebody still makes
/// entries in it.
const REFILLS_MAX: u32 = 16;

/// Removes a file, or a directory with everything below it; what is not there is fine. Follows no link and
/// enters no other file system (`EXDEV`). Safe to repeat after a failure, and beside another removal.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match remove(path) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(io::Error::new(io::Error::from(e).kind(), format!("cannot remove {}: {e}", path.display()))),
    }
}

fn remove(path: &Path) -> nix::Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = match open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ENOTDIR | Errno::ELOOP) => return unlink(path),
        Err(e) => return Err(e),
    };
    let mut top = Top { fd, moved: 0 };
    for _ in 0..REFILLS_MAX {
        // What moved to the top during one round is the next round's: n levels are n rounds of few entries.
        while top.round()? {}
        match unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOTEMPTY) => {}
            removed => return removed,
        }
    }
    Err(Errno::ENOTEMPTY)
}

/// The top of the tree, to which its deeper directories move.
struct Top {
    fd: OwnedFd,
    /// The name of the next directory that moves here.
    moved: u64,
}

impl Top {
    /// Removes every entry that one listing finds; false: there was none. A round that achieves nothing is
    /// an error, or there would be no end.
    fn round(&mut self) -> nix::Result<bool> {
        let (mut found, mut achieved) = (false, false);
        let top = self.fd.try_clone().map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        for_each_entry(top.as_fd(), |name, kind| {
            found = true;
            if kind == Some(Type::Directory) || !unlinked(top.as_fd(), name)? {
                self.lift_children(name)?;
                match unlinkat(&top, name, UnlinkatFlags::RemoveDir) {
                    Err(Errno::ENOTEMPTY) => return Ok(()), // filled meanwhile: the next round's
                    removed => gone_is_fine(removed)?,
                }
            }
            achieved = true;
            Ok(())
        })?;
        if found && !achieved { Err(Errno::ENOTEMPTY) } else { Ok(found) }
    }

    /// Unlinks the files of one directory at the top and moves its directories beside it.
    fn lift_children(&mut self, name: &CStr) -> nix::Result<()> {
        let how = OpenHow::new()
            .flags(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
        let dir = match openat2(&self.fd, name, how) {
            Ok(dir) => dir,
            Err(Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e),
        };
        for_each_entry(dir.as_fd(), |child, kind| {
            if kind == Some(Type::Directory) || !unlinked(dir.as_fd(), child)? {
                self.lift(dir.as_fd(), child)?;
            }
            Ok(())
        })
    }

    /// The top's own names are the tenant's: one that is taken is passed over.
    fn lift(&mut self, from: BorrowedFd<'_>, child: &CStr) -> nix::Result<()> {
        loop {
            let name = self.moved.to_string();
            self.moved += 1;
            match renameat(from, child, &self.fd, name.as_str()) {
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                moved => return gone_is_fine(moved),
            }
        }
    }
}

fn for_each_entry(
    dir: BorrowedFd<'_>,
    mut entry: impl FnMut(&CStr, Option<Type>) -> nix::Result<()>,
) -> nix::Result<()> {
    let mut listing = Dir::openat(dir, ".", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for found in listing.iter() {
        let found = found?;
        let name = found.file_name();
        if name != c"." && name != c".." {
            entry(name, found.file_type())?;
        }
    }
    Ok(())
}

/// False: it is a directory.
fn unlinked(dir: BorrowedFd<'_>, name: &CStr) -> nix::Result<bool> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => Ok(false),
        removed => gone_is_fine(removed).map(|()| true),
    }
}

/// Another removal of the same tree was quicker.
fn gone_is_fine(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Deeper than any path can say, and than a thread's stack or descriptors would go.
    const LEVELS: usize = 20_000;

    fn chain(at: &Path, levels: usize) {
        fs::create_dir(at).unwrap();
        let mut dir = open(at, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        for _ in 0..levels {
            nix::sys::stat::mkdirat(&dir, "d", Mode::S_IRWXU).unwrap();
            dir = nix::fcntl::openat(&dir, "d", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        }
        nix::fcntl::openat(&dir, "file", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRUSR).unwrap();
    }

    #[test]
    fn depth_costs_neither_stack_nor_descriptors() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap(); // on a disk it takes a minute
        let tree = dir.path().join("tree");
        chain(&tree, LEVELS);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        remove_tree(&tree).unwrap();
    }

    #[test]
    fn names_that_moved_directories_get_may_be_taken() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        for (kept, below) in [("0", "x/y/z"), ("1", "0/1/2"), ("long", "a/b/c")] {
            fs::create_dir_all(tree.join(kept).join(below)).unwrap();
            fs::write(tree.join(kept).join("file"), "").unwrap();
        }
        fs::write(tree.join("2"), "a file").unwrap();
        fs::create_dir(tree.join("closed")).unwrap();
        fs::set_permissions(tree.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
        remove_tree(&tree).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(outside.join("kept")).unwrap();
        fs::create_dir_all(tree.join("deep")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        symlink(&outside, tree.join("deep/link")).unwrap();
        symlink(&outside, dir.path().join("itself")).unwrap();
        remove_tree(&tree).unwrap();
        remove_tree(&dir.path().join("itself")).unwrap();
        assert!(outside.join("kept").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
