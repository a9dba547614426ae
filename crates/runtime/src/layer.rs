//! What a program writes to: an ext4 file system of a size of its own, in a sparse file on a loop device. It lies above
//! the image's layers, or is a temporary directory.
//!
//! Who fills one, by bytes or by inodes, has filled nobody else's. mkfs would be most of a machine's start, so a file
//! begins as a copy of a template, of which there is one a size. A child of the supervisor copies and mounts, beside
//! the supervisor's other work and in the same private mount namespace: no mount is ever visible on the host.
//!
//! What does not outlive its attempt has no name: with the last process of the machine the kernel lets go of mount,
//! loop device and file, whoever was killed before. See docs/decisions/what-a-machine-may-use.md.

use crate::remove::remove_tree;
use crate::features::chain;
use crate::sys;
use crate::volume::{self, LoopVolume, VolumeError, bypass_cache, copy_data, failed, mount_device};
use nix::mount::MsFlags;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Nobody reads it after a crash of the host, so it needs neither a journal nor the disk's word that all is written; it
/// does not grow.
const PASSING_FORMAT: &[&str] = &["-O", "^has_journal,^resize_inode"];
const PASSING_MOUNT: &str = "errors=remount-ro,noinit_itable,barrier=0";
/// A journal of 4 MiB, the smallest there is.
const KEPT_FORMAT: &[&str] = &["-J", "size=4"];
/// The tables of inodes are holes, which read as zeros: to write zeros would take up the disk.
const KEPT_MOUNT: &str = "errors=remount-ro,noinit_itable";
/// The mounts of the attempt before, and of a container before its next try, are gone within this.
const LET_GO: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);
const MOUNTED: &str = "mounted ";

/// Where the files of one layer come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WritableLayer {
    /// Begins as a copy of this template, and ends with the attempt.
    Passing { template: PathBuf },
    /// In this file: the next attempt finds what this one wrote.
    Kept { file: PathBuf },
    /// A directory of the machine's, where nobody mounts file systems of files: without a size, so that who fills it fills
    /// the disk. Ends with the attempt.
    Directory,
    /// Likewise, this one: the next attempt finds what this one wrote.
    KeptDirectory { dir: PathBuf },
}

/// Below a machine's directory: directories that end with its attempt.
pub(crate) const PASSING_DIR: &str = "written";

/// Makes the template for layers of a size, if it is not there. `dir` is the caller's alone.
pub fn template(dir: &Path, size_bytes: u64, kept: bool) -> volume::Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let options = if kept { KEPT_FORMAT } else { PASSING_FORMAT };
    let path = template_path(dir, size_bytes, kept);
    if !path.exists() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("make", dir))?;
        LoopVolume::create_as(&path, size_bytes, options)?;
    }
    Ok(path)
}

/// Where it is.
pub fn template_path(dir: &Path, size_bytes: u64, kept: bool) -> PathBuf {
    dir.join(format!("{}-{}.ext4", if kept { "kept" } else { "passing" }, size_bytes >> 20))
}

/// Makes the file of a kept layer if it is not there; mends and grows one that is. Nothing of the machine lives.
pub fn ready_kept(file: &Path, templates: &Path, size_bytes: u64) -> volume::Result<()> {
    if !file.exists() {
        let dir = file.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("make", dir))?;
        let template = template(templates, size_bytes, true)?;
        return LoopVolume::create_sparse_copy(file, &template).map(drop);
    }
    let layer = LoopVolume::open(file)?;
    once_let_go(|| layer.grow_sparse(size_bytes).and_then(|()| layer.ready()))
}

fn once_let_go<T>(act: impl Fn() -> volume::Result<T>) -> volume::Result<T> {
    let deadline = Instant::now() + LET_GO;
    loop {
        match act() {
            Err(VolumeError::InUse { .. }) if Instant::now() < deadline => std::thread::sleep(LOOK),
            done => return done,
        }
    }
}

/// A mount that is being made.
pub(crate) struct Mounting {
    at: PathBuf,
    child: Pid,
    report: PipeReader,
}

impl WritableLayer {
    /// Begins to mount it at a directory of the caller's, who is single-threaded and has mounts of its own. A file that
    /// passes is made in `scratch`.
    pub(crate) fn begin(&self, at: &Path, scratch: &Path) -> io::Result<Mounting> {
        let (report, mut answer) = io::pipe()?;
        let child = sys::clone_process(0)?;
        if child == 0 {
            // It is in no control group of the supervisor's yet: nothing of it is left once that is gone.
            let ends_with_it = sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            let mounted = ends_with_it.map_err(failed("tie the mounting to", at)).and_then(|()| self.mount(at, scratch));
            let said = match mounted {
                Ok(device) => format!("{MOUNTED}{}", device.unwrap_or_default().display()),
                Err(e) => chain(&e),
            };
            let _ = answer.write_all(said.as_bytes()); // who waits for it is gone: so is the mount, soon
            // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
            unsafe { libc::_exit(0) };
        }
        Ok(Mounting { at: at.to_owned(), child: Pid::from_raw(child), report })
    }

    /// Returns the device, where there is one.
    fn mount(&self, at: &Path, scratch: &Path) -> volume::Result<Option<PathBuf>> {
        let (file, path, options) = match self {
            Self::Directory => {
                // The name that it is mounted at is no other layer's of this root.
                let dir = scratch.join(PASSING_DIR).join(at.file_name().unwrap_or_default());
                remove_tree(&dir).map_err(failed("remove", &dir))?;
                return bind_directory(&dir, at).map(|()| None);
            }
            Self::KeptDirectory { dir } => return bind_directory(dir, at).map(|()| None),
            Self::Passing { template } => (copy_unnamed(template, scratch)?, scratch, PASSING_MOUNT),
            Self::Kept { file } => {
                let layer = LoopVolume::open(file)?;
                (once_let_go(|| layer.open_alone())?, file.as_path(), KEPT_MOUNT)
            }
        };
        let (device, held) = volume::attach(&file, path)?;
        mount_device(&device, at, MsFlags::empty(), options)?;
        drop(held); // the mount keeps it
        Ok(Some(device))
    }
}

fn bind_directory(dir: &Path, at: &Path) -> volume::Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(failed("make", dir))?;
    let none = None::<&str>;
    nix::mount::mount(Some(dir), at, none, MsFlags::MS_BIND, none).map_err(|e| failed("mount", dir)(e.into()))
}

/// A layer that is mounted, and its device, if it has one.
pub(crate) struct Mounted {
    pub at: PathBuf,
    pub device: Option<File>,
}

/// Has the devices' blocks go past the host's page cache, beside the caller, who is single-threaded and reaps its children:
/// the kernel lets a device rest until the disk has all that was written, and who uses it meanwhile waits too.
pub(crate) fn bypass_cache_of(devices: Vec<File>) -> io::Result<()> {
    if devices.is_empty() || sys::clone_process(0)? != 0 {
        return Ok(());
    }
    let keep: Vec<_> = devices.iter().map(AsRawFd::as_raw_fd).collect();
    let _ = sys::close_all_but(3, &keep); // the supervisor's, which it holds too
    for device in &devices {
        let _ = bypass_cache(device); // refused by some file systems, and no less right
    }
    // SAFETY: ends the child at once; destructors and buffers are the supervisor's.
    unsafe { libc::_exit(0) };
}

impl Mounting {
    /// Waits until it is mounted.
    pub(crate) fn finish(mut self) -> io::Result<Mounted> {
        let mut text = String::new();
        self.report.read_to_string(&mut text)?;
        if let Some(device) = text.strip_prefix(MOUNTED) {
            let device = (!device.is_empty()).then(|| File::open(device)).transpose()?;
            return Ok(Mounted { device, at: self.at }); // the child is reaped with the others
        }
        let status = waitpid(self.child, None);
        let why = match (text.is_empty(), status) {
            (true, Ok(WaitStatus::Signaled(_, signal, _))) => format!("ended by {signal}"),
            _ => text,
        };
        Err(io::Error::other(format!("its writable layer: {why}")))
    }
}

/// A file that is gone when nobody has it open any more.
fn copy_unnamed(template: &Path, scratch: &Path) -> volume::Result<File> {
    let from = File::open(template).map_err(failed("open", template))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    let to = options.open(scratch).map_err(failed("make a file in", scratch))?;
    copy_data(&from, &to).map_err(failed("copy", template))?;
    Ok(to)
}

/// Removes the kept layers in a directory but these: the others are of versions, or containers, that are over.
pub fn remove_other_kept(dir: &Path, these: &[PathBuf]) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if !these.contains(&path) {
            remove_tree(&path)?;
        }
    }
    Ok(())
}
