//! Volumes of a fixed size: an ext4 file system in one sparse file, mounted by a loop device.
//!
//! ```no_run
//! # use std::path::Path;
//! # use dunlin_runtime::volume::LoopVolume;
//! let volume = LoopVolume::create(Path::new("cache.ext4"), 4 << 30)?;
//! let mounted = volume.mount(Path::new("/mnt"))?;
//! mounted.unmount()?;
//! # Ok::<(), dunlin_runtime::volume::VolumeError>(())
//! ```
//!
//! Owns the file and, while mounted, its loop device, which the kernel frees with the last unmount (also when the mount
//! namespace that holds it ends). Never mounts the same file twice. One that is encrypted has a device of device mapper
//! in between, which nobody frees but [`close`]. Tested in `tests/volume`, encryption where the kernel has dm-crypt.

mod crypt;
mod reserved;

pub use crypt::{Encryption, HEADER_BYTES, KEY_BYTES, Lacking, VolumeKey, close, forget, look, trial};
pub use reserved::{Grown, Usage};
pub(crate) use reserved::copy_data;

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags};

use crate::net::firewall::find_program;
use crate::sys;

/// Below this ext4 has no room for a journal.
pub const SIZE_MIN_BYTES: u64 = 16 << 20;
/// 8 TiB: above it ext4 in a file needs other options.
pub const SIZE_MAX_BYTES: u64 = 8 << 40;
/// Between asking for a free loop device and taking it somebody else may take it.
const TAKE_TRIES: usize = 32;
/// Characters of mkfs's complaint that go into an error.
const COMPLAINT_MAX: usize = 500;
const MOUNT_OPTIONS: &str = "errors=remount-ro";

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_DIRECT_IO: libc::c_ulong = 0x4C08;
/// The device lets go of the file with its last user.
const LO_FLAGS_AUTOCLEAR: u32 = 4;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume {0} exists already")]
    AlreadyExists(PathBuf),
    #[error("volume {0} does not exist")]
    NotFound(PathBuf),
    #[error("a volume has {SIZE_MIN_BYTES} to {SIZE_MAX_BYTES} bytes, not {0}")]
    BadSize(u64),
    #[error("volume {path} is in use by {device}; unmount it there first")]
    InUse { path: PathBuf, device: String },
    #[error("{0} is busy; end the processes that use it, then unmount again")]
    Busy(PathBuf),
    #[error("mkfs.ext4 is needed for volumes but was not found; install e2fsprogs")]
    NoMkfs,
    #[error("mkfs.ext4 could not format {path}: {output}")]
    Format { path: PathBuf, output: String },
    #[error("{0} is needed for volumes but was not found; install e2fsprogs")]
    NoTool(&'static str),
    #[error("cryptsetup is needed for encrypted volumes but was not found; install cryptsetup-bin")]
    NoCryptsetup,
    #[error("{tool} could not make {path} fit for use: {output}")]
    Unsound { tool: &'static str, path: PathBuf, output: String },
    #[error("the disk has no room for the {size_bytes} bytes of {path}; free some space, or ask for less")]
    NoSpace { path: PathBuf, size_bytes: u64 },
    #[error("cannot {op} {path}")]
    Io { op: &'static str, path: PathBuf, source: io::Error },
}

pub type Result<T> = std::result::Result<T, VolumeError>;

/// A formatted volume file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopVolume {
    path: PathBuf,
    encryption: Option<Encryption>,
}

/// A volume at its mount point. Dropping the value leaves it mounted.
#[derive(Debug)]
pub struct MountedVolume {
    at: PathBuf,
    device: PathBuf,
}

impl LoopVolume {
    /// Makes the file, which takes up disk only as it fills, and formats it. It gets its name once it is whole and
    /// on disk, so a file of that name always holds a file system. Callers make one volume once at a time.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self> {
        Self::create_as(path, size_bytes, &[])
    }

    /// The same with more options for mkfs.
    pub(crate) fn create_as(path: &Path, size_bytes: u64, options: &[&str]) -> Result<Self> {
        let sparse = |file: &File, path: &Path| {
            file.set_len(size_bytes).map_err(failed("size", path))?;
            format(options, path)
        };
        Self::build(path, size_bytes, sparse).map(|()| Self { path: path.to_owned(), encryption: None })
    }

    /// `fill` sizes the file and makes a file system of it.
    fn build(path: &Path, size_bytes: u64, fill: impl FnOnce(&File, &Path) -> Result<()>) -> Result<()> {
        if !(SIZE_MIN_BYTES..=SIZE_MAX_BYTES).contains(&size_bytes) {
            return Err(VolumeError::BadSize(size_bytes));
        }
        if path.exists() {
            return Err(VolumeError::AlreadyExists(path.to_owned()));
        }
        let unfinished = reserved::unfinished(path);
        // What a crash left of an earlier try is begun anew, as another file: a tool that outlived who started it may write
        // to the old one still.
        let _ = std::fs::remove_file(&unfinished); // there may be none
        let make = || {
            let file = reserved::create_file(&unfinished)?;
            fill(&file, &unfinished)?;
            file.sync_all().map_err(failed("sync", &unfinished))?;
            name_it(&unfinished, path)
        };
        reserved::made_or_removed(make(), &unfinished)
    }

    pub fn open(path: &Path) -> Result<Self> {
        match std::fs::metadata(path) {
            Ok(found) if found.is_file() => Ok(LoopVolume { path: path.to_owned(), encryption: None }),
            Ok(_) => Err(VolumeError::NotFound(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(VolumeError::NotFound(path.to_owned())),
            Err(source) => Err(failed("look at", path)(source)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same volume, which was made with this encryption.
    pub fn with_encryption(self, encryption: Option<Encryption>) -> Self {
        Self { encryption, ..self }
    }

    pub fn is_encrypted(&self) -> bool {
        self.encryption.is_some()
    }

    /// Mounts at a directory, in the mount namespace of the caller, without set-user-id programs and devices. A file system
    /// that is found broken takes no more writes.
    pub fn mount(&self, at: &Path) -> Result<MountedVolume> {
        match &self.encryption {
            None => self.mount_plain(at),
            Some(encryption) => self.opened(encryption)?.mount(at),
        }
    }

    fn mount_plain(&self, at: &Path) -> Result<MountedVolume> {
        let (device, held) = attach(&self.open_alone()?, &self.path)?;
        mount_device(&device, at, MsFlags::MS_NOSUID, MOUNT_OPTIONS)?;
        // From here the mount keeps the device; when mounting failed, closing it frees it.
        drop(held);
        Ok(MountedVolume { at: at.to_owned(), device })
    }

    /// The file, unless a loop device has it.
    pub(crate) fn open_alone(&self) -> Result<File> {
        let backing = OpenOptions::new().read(true).write(true).open(&self.path).map_err(failed("open", &self.path))?;
        match user_of(&backing, &self.path)? {
            Some(device) => Err(VolumeError::InUse { path: self.path.clone(), device }),
            None => Ok(backing),
        }
    }

    /// Opens an encrypted volume that nobody uses.
    fn opened<'a>(&self, encryption: &'a Encryption) -> Result<Opened<'a>> {
        let in_use = |error| match error {
            VolumeError::Busy(device) => VolumeError::InUse { path: self.path.clone(), device: device.display().to_string() },
            other => other,
        };
        close(&encryption.name).map_err(in_use)?; // a crash left it
        let (device, held) = attach(&self.open_alone()?, &self.path)?;
        encryption.open(&device).map_err(in_use)?;
        drop(held); // the opened one keeps the device
        Ok(Opened::new(encryption))
    }
}

/// An encrypted volume whose file system can be seen; it is closed with the value, unless it is mounted before.
struct Opened<'a> {
    encryption: &'a Encryption,
    device: PathBuf,
    is_mounted: bool,
}

impl<'a> Opened<'a> {
    fn new(encryption: &'a Encryption) -> Self {
        Self { encryption, device: encryption.device(), is_mounted: false }
    }

    fn mount(mut self, at: &Path) -> Result<MountedVolume> {
        mount_device(&self.device, at, MsFlags::MS_NOSUID, MOUNT_OPTIONS)?;
        self.is_mounted = true;
        Ok(MountedVolume { at: at.to_owned(), device: self.device.clone() })
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        if self.is_mounted {
            return;
        }
        if let Err(error) = crypt::close_unused(&self.encryption.name) {
            // Whoever opens the volume next tries again.
            tracing::warn!(device = %self.device.display(), %error, "an encrypted volume stays open");
        }
    }
}

pub(crate) fn mount_device(device: &Path, at: &Path, flags: MsFlags, options: &str) -> Result<()> {
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    nix::mount::mount(Some(device), at, Some("ext4"), flags, Some(options)).map_err(|error| failed("mount at", at)(error.into()))
}

impl MountedVolume {
    pub fn at(&self) -> &Path {
        &self.at
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    /// A plain one's device frees itself; that of an encrypted one is closed, unless somebody has the mount still.
    pub fn unmount(self) -> Result<()> {
        unmount(&self.at)?;
        match self.device.strip_prefix("/dev/mapper").ok().and_then(Path::to_str) {
            Some(name) => close(name),
            None => Ok(()),
        }
    }
}

/// Unmounts whatever is at `at`; a loop device frees itself.
pub fn unmount(at: &Path) -> Result<()> {
    match nix::mount::umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EBUSY) => Err(VolumeError::Busy(at.to_owned())),
        Err(error) => Err(failed("unmount", at)(error.into())),
    }
}

pub(crate) fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { op, path, source }
}

/// A tool that ends with whoever waits for it: one that outlived its server would write to a file system that the next
/// server has mounted.
fn bound(program: &Path) -> Command {
    let server = nix::unistd::getpid();
    let mut command = Command::new(program);
    let ends_with_it = move || {
        sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
        if nix::unistd::getppid() == server { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: two system calls, which allocate nothing.
    unsafe { command.pre_exec(ends_with_it) };
    command
}

fn name_it(unfinished: &Path, path: &Path) -> Result<()> {
    std::fs::rename(unfinished, path).map_err(failed("name", path))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync", dir))
}

fn format(options: &[&str], path: &Path) -> Result<()> {
    let mkfs = find_program("mkfs.ext4").ok_or(VolumeError::NoMkfs)?;
    // No blocks kept for root: who fills the volume is the machine's root. Tables are written on first use.
    let output = Command::new(&mkfs)
        .args(["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .args(options)
        .arg(path)
        .output()
        .map_err(failed("run", &mkfs))?;
    if output.status.success() {
        return Ok(());
    }
    let output = String::from_utf8_lossy(&output.stderr).chars().take(COMPLAINT_MAX).collect();
    Err(VolumeError::Format { path: path.to_owned(), output })
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo64 {
    const ZERO: LoopInfo64 = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// Takes a free loop device for the file. The descriptor keeps the device until a mount does.
pub(crate) fn attach(backing: &File, path: &Path) -> Result<(PathBuf, File)> {
    let control_path = Path::new("/dev/loop-control");
    let control =
        OpenOptions::new().read(true).write(true).open(control_path).map_err(failed("open", control_path))?;
    for _ in 0..TAKE_TRIES {
        // SAFETY: the request takes no argument and returns a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
        if number < 0 {
            return Err(failed("get a free device from", control_path)(io::Error::last_os_error()));
        }
        let device_path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open_device(&device_path, number)?;
        let mut info = LoopInfo64::ZERO;
        info.flags = LO_FLAGS_AUTOCLEAR;
        name_for_people(&mut info.file_name, path);
        let fd = u32::try_from(backing.as_raw_fd()).map_err(|error| failed("pass", path)(io::Error::other(error)))?;
        let config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
        // SAFETY: the kernel reads one `loop_config` from the pointer, which is what it points to.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
        if result == 0 {
            return Ok((device_path, device));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(failed("set up", &device_path)(error));
        }
    }
    Err(failed("take a device from", control_path)(io::Error::from_raw_os_error(libc::EBUSY)))
}

/// Past the host's page cache: the file system on the device has its own. Where the disk below does not allow it, all
/// goes through both.
pub(crate) fn bypass_cache(device: &File) -> io::Result<()> {
    let on: libc::c_ulong = 1;
    // SAFETY: the request takes a number.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_DIRECT_IO as _, on) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// devtmpfs has the node already; a /dev that somebody made by hand gets it here.
fn open_device(path: &Path, number: i32) -> Result<File> {
    let open = || OpenOptions::new().read(true).write(true).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let minor = u64::try_from(number).map_err(|error| failed("number", path)(io::Error::other(error)))?;
            let node = nix::sys::stat::makedev(7, minor);
            let (kind, mode) = (nix::sys::stat::SFlag::S_IFBLK, nix::sys::stat::Mode::from_bits_truncate(0o600));
            nix::sys::stat::mknod(path, kind, mode, node).map_err(|error| failed("make", path)(error.into()))?;
            open().map_err(failed("open", path))
        }
        other => other.map_err(failed("open", path)),
    }
}

/// What `losetup` shows: the end of the path, as the field is short.
fn name_for_people(field: &mut [u8; 64], path: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let name = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    let bytes = name.as_bytes();
    let end = &bytes[bytes.len().saturating_sub(field.len() - 1)..];
    field[..end.len()].copy_from_slice(end);
}

/// The loop device that has this file already: two of them would write the same file system twice.
fn user_of(backing: &File, path: &Path) -> Result<Option<String>> {
    let ours = backing.metadata().map_err(failed("look at", path))?;
    let blocks = Path::new("/sys/block");
    for entry in std::fs::read_dir(blocks).map_err(failed("list", blocks))? {
        let name = entry.map_err(failed("list", blocks))?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else { continue };
        // Devices that are free have no such directory; asking them would be an error each.
        if !blocks.join(name).join("loop").exists() {
            continue;
        }
        let Ok(device) = File::open(Path::new("/dev").join(name)) else { continue };
        let mut info = LoopInfo64::ZERO;
        // SAFETY: the kernel writes one `loop_info64` to the pointer, which is what it points to.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) };
        // The kernel packs device numbers its own way (12 bits of major above 20 of minor, or the old 8 and 8).
        if result == 0 && info.inode == ours.ino() && same_device(info.device, ours.dev()) {
            return Ok(Some(format!("/dev/{name}")));
        }
    }
    Ok(None)
}

fn same_device(kernel: u64, ours: u64) -> bool {
    let (major, minor) = (nix::sys::stat::major(ours), nix::sys::stat::minor(ours));
    let new = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
    kernel == new || kernel == (major << 20 | minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn long_paths_keep_their_end() {
        let mut field = [0; 64];
        name_for_people(&mut field, Path::new(&format!("/{}/cache.ext4", "x".repeat(100))));
        assert_eq!(field[63], 0);
        assert!(field.starts_with(b"xxx") && field[..63].ends_with(b"/cache.ext4"));
    }
}
