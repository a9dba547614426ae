//! What a tenant's volume needs beyond a cache's: its blocks are its own from the beginning, it is checked before it is
//! mounted, it grows, and it is copied while it is used.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::{
    COMPLAINT_MAX, Encryption, HEADER_BYTES, LoopVolume, MountedVolume, Opened, Result, VolumeError, attach, bound, crypt, failed, format, name_it,
    user_of,
};
use crate::net::firewall::find_program;

const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;
/// Of a copy; also how much is compared at once.
const CHUNK_BYTES: usize = 1 << 20;
/// What ext4 keeps for itself: a fiftieth, or this.
const KEPT_BLOCKS_MAX: u64 = 4096;
/// Of sectors of 4096 bytes, as those of encrypted volumes are, no smaller blocks can be made.
const ENCRYPTED: &[&str] = &["-b", "4096"];
/// e2fsck's exit codes up to here leave a file system that is whole.
const FSCK_MENDED: i32 = 1;

/// How full a volume is, in blocks of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub block_size: u64,
    pub blocks: u64,
    pub blocks_free: u64,
    /// Of the free ones those that can be written to: the file system keeps a few for itself.
    pub blocks_avail: u64,
}

/// When a larger volume shows its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grown {
    Now,
    /// The kernel lets this process not resize a mounted file system (`CAP_SYS_RESOURCE` is missing): the next
    /// [`LoopVolume::ready`] does it.
    WhenMounted,
}

impl LoopVolume {
    /// As [`create`](Self::create), but takes all its blocks at once: what is written later never finds the disk of the
    /// host full, and who fills the volume fills nobody else's.
    pub fn create_reserved(path: &Path, size_bytes: u64) -> Result<Self> {
        let fill = |file: &File, path: &Path| {
            reserve(file, path, size_bytes)?;
            format(&[], path)
        };
        Self::build(path, size_bytes, fill).map(|()| Self { path: path.to_owned(), encryption: None })
    }

    /// The same, encrypted: the file system has the size, and the file [`HEADER_BYTES`] more.
    pub fn create_encrypted(path: &Path, size_bytes: u64, encryption: Encryption) -> Result<Self> {
        let fill = |file: &File, path: &Path| {
            reserve(file, path, size_bytes + HEADER_BYTES)?;
            let (device, held) = attach(file, path)?;
            encryption.format(&device)?;
            encryption.open(&device)?;
            drop(held); // the opened one keeps the device
            let opened = Opened::new(&encryption);
            format(ENCRYPTED, &opened.device)
        };
        crypt::close_unused(&encryption.name)?; // a crash left it
        Self::build(path, size_bytes, fill)?;
        Ok(Self { path: path.to_owned(), encryption: Some(encryption) })
    }

    /// A volume of its own that begins as a copy of the file `source`, at least `file_bytes` long. One of an encrypted volume
    /// is encrypted by the same key.
    pub fn create_copy(path: &Path, source: &Path, file_bytes: u64) -> Result<Self> {
        if path.exists() {
            return Err(VolumeError::AlreadyExists(path.to_owned()));
        }
        let unfinished = unfinished(path);
        let from = File::open(source).map_err(failed("open", source))?;
        let length = from.metadata().map_err(failed("look at", source))?.len();
        let make = || {
            let to = create_file(&unfinished)?;
            reserve(&to, &unfinished, length.max(file_bytes))?;
            copy(&from, &to, Compare::No).map_err(failed("copy", source))?;
            to.sync_all().map_err(failed("sync", &unfinished))?;
            name_it(&unfinished, path)
        };
        made_or_removed(make(), &unfinished).map(|()| Self { path: path.to_owned(), encryption: None })
    }

    /// A volume of its own, at least `file_bytes` long, that begins as what this one is in a moment. All its blocks are its own
    /// before anything is copied, and the copy goes straight into them. A mounted volume is given as `mounted`, as for
    /// [`snapshot`](Self::snapshot). `copied` is called while nobody writes to this one, and the other has no name yet.
    pub fn fork(&self, mounted: Option<&MountedVolume>, path: &Path, file_bytes: u64, copied: impl FnOnce()) -> Result<Self> {
        if path.exists() {
            return Err(VolumeError::AlreadyExists(path.to_owned()));
        }
        let unfinished = unfinished(path);
        let from = File::open(&self.path).map_err(failed("open", &self.path))?;
        let length = from.metadata().map_err(failed("look at", &self.path))?.len();
        let make = || {
            let to = create_file(&unfinished)?;
            reserve(&to, &unfinished, length.max(file_bytes))?;
            self.copy_at_rest((&from, mounted), (&to, &unfinished), copied)?;
            to.sync_all().map_err(failed("sync", &unfinished))?;
            name_it(&unfinished, path)
        };
        made_or_removed(make(), &unfinished).map(|()| Self { path: path.to_owned(), encryption: None })
    }

    /// What is copied first is copied while writers go on; then they wait while what differs is copied again.
    fn copy_at_rest(
        &self,
        (from, mounted): (&File, Option<&MountedVolume>),
        (to, to_path): (&File, &Path),
        copied: impl FnOnce(),
    ) -> Result<()> {
        copy(from, to, Compare::No).map_err(failed("copy", &self.path))?;
        to.sync_data().map_err(failed("sync", to_path))?;
        let frozen = mounted.map(MountedVolume::freeze).transpose()?;
        if frozen.is_some() {
            copy(from, to, Compare::Yes).map_err(failed("copy", &self.path))?;
        }
        copied();
        drop(frozen);
        Ok(())
    }

    /// As [`create_copy`](Self::create_copy), with no more blocks than hold data.
    pub(crate) fn create_sparse_copy(path: &Path, source: &Path) -> Result<Self> {
        let unfinished = unfinished(path);
        let from = File::open(source).map_err(failed("open", source))?;
        let make = || {
            let to = create_file(&unfinished)?;
            copy_data(&from, &to).map_err(failed("copy", source))?;
            to.sync_all().map_err(failed("sync", &unfinished))?;
            name_it(&unfinished, path)
        };
        made_or_removed(make(), &unfinished).map(|()| Self { path: path.to_owned(), encryption: None })
    }

    /// Makes the file longer if it is shorter; the file system follows in [`ready`](Self::ready).
    pub(crate) fn grow_sparse(&self, size_bytes: u64) -> Result<()> {
        let backing = self.open_alone()?;
        if backing.metadata().map_err(failed("look at", &self.path))?.len() < size_bytes {
            backing.set_len(size_bytes).map_err(failed("size", &self.path))?;
        }
        Ok(())
    }

    /// Writes a sparse copy of the volume to `path`, which gets its name once it is whole and on disk. A mounted
    /// volume is given as `mounted`: its writers wait while what changed during the copy is copied again.
    pub fn snapshot(&self, mounted: Option<&MountedVolume>, path: &Path) -> Result<u64> {
        let unfinished = unfinished(path);
        let from = File::open(&self.path).map_err(failed("open", &self.path))?;
        let length = from.metadata().map_err(failed("look at", &self.path))?.len();
        let make = || {
            let to = create_file(&unfinished)?;
            to.set_len(length).map_err(failed("size", &unfinished))?;
            self.copy_at_rest((&from, mounted), (&to, &unfinished), || {})?;
            to.sync_all().map_err(failed("sync", &unfinished))?;
            name_it(&unfinished, path)
        };
        made_or_removed(make(), &unfinished)?;
        let taken = std::fs::metadata(path).map_err(failed("look at", path))?;
        Ok(std::os::unix::fs::MetadataExt::blocks(&taken) * 512)
    }

    /// Mends what a crash left of an unmounted volume, and brings the file system to the size of its file.
    pub fn ready(&self) -> Result<()> {
        match &self.encryption {
            None => self.mend(&self.open_alone()?, &self.path),
            Some(encryption) => self.mend_opened(&self.opened(encryption)?),
        }
    }

    /// Whether the kernel has met errors in it, such as a full disk beneath it; [`ready`](Self::ready) mends the file system,
    /// and nobody those who have written to it then. Not of an encrypted volume.
    pub fn has_errors(&self) -> Result<bool> {
        let file = File::open(&self.path).map_err(failed("open", &self.path))?;
        Ok(Superblock::read(&file, &self.path)?.has_errors)
    }

    /// [`ready`](Self::ready), then [`mount`](Self::mount); an encrypted volume is opened once for both.
    pub fn mount_ready(&self, at: &Path) -> Result<MountedVolume> {
        let Some(encryption) = &self.encryption else {
            self.ready()?;
            return self.mount_plain(at);
        };
        let opened = self.opened(encryption)?;
        self.mend_opened(&opened)?;
        opened.mount(at)
    }

    fn mend_opened(&self, opened: &Opened<'_>) -> Result<()> {
        self.mend(&File::open(&opened.device).map_err(failed("open", &opened.device))?, &opened.device)
    }

    /// `at` is where the file system is: the file, or the device of an encrypted volume.
    fn mend(&self, fs: &File, at: &Path) -> Result<()> {
        self.fsck("-p", at)?;
        let Superblock { block_size, blocks, .. } = Superblock::read(fs, &self.path)?;
        if blocks * block_size + block_size <= self.size_bytes()? {
            self.fsck("-pf", at)?; // resize2fs wants it
            let resize = find_program("resize2fs").ok_or(VolumeError::NoTool("resize2fs"))?;
            let output = bound(&resize).arg(at).output().map_err(failed("run", &resize))?;
            if !output.status.success() {
                return Err(self.complaint("resize2fs", &output.stderr));
            }
        }
        Ok(())
    }

    /// Makes the file longer, and with it the file system if it is mounted; an unmounted one follows in
    /// [`ready`](Self::ready). A volume that is as large already stays as it is.
    pub fn grow(&self, mounted: Option<&MountedVolume>, size_bytes: u64) -> Result<Grown> {
        let backing = OpenOptions::new().read(true).write(true).open(&self.path).map_err(failed("open", &self.path))?;
        let before = backing.metadata().map_err(failed("look at", &self.path))?.len();
        let wanted = (size_bytes + self.header_bytes()).max(before);
        if before < wanted
            && let Err(error) = reserve(&backing, &self.path, wanted)
        {
            let _ = backing.set_len(before); // gives back what it got; the file system ends before it
            return Err(error);
        }
        let Some(mounted) = mounted else { return Ok(Grown::WhenMounted) };
        let device = user_of(&backing, &self.path)?.map_or_else(|| mounted.device.clone(), PathBuf::from);
        grow_device(&device)?;
        if let Some(encryption) = &self.encryption {
            encryption.resize()?;
        }
        mounted.grow_to(wanted - self.header_bytes())
    }

    /// From the file: exact for a volume that is not mounted. An encrypted one is opened for it.
    pub fn usage(&self) -> Result<Usage> {
        let Some(encryption) = &self.encryption else { return self.usage_at(&self.path) };
        self.usage_at(&self.opened(encryption)?.device)
    }

    fn usage_at(&self, at: &Path) -> Result<Usage> {
        let file = File::open(at).map_err(failed("open", at))?;
        let Superblock { block_size, blocks, blocks_free, .. } = Superblock::read(&file, &self.path)?;
        let kept = (blocks / 50).min(KEPT_BLOCKS_MAX);
        Ok(Usage { block_size, blocks, blocks_free, blocks_avail: blocks_free.saturating_sub(kept) })
    }

    /// Of the volume; its file may be longer.
    pub fn size_bytes(&self) -> Result<u64> {
        let length = std::fs::metadata(&self.path).map(|meta| meta.len()).map_err(failed("look at", &self.path))?;
        Ok(length.saturating_sub(self.header_bytes()))
    }

    fn header_bytes(&self) -> u64 {
        if self.encryption.is_some() { HEADER_BYTES } else { 0 }
    }

    fn fsck(&self, how: &str, at: &Path) -> Result<()> {
        let fsck = find_program("e2fsck").ok_or(VolumeError::NoTool("e2fsck"))?;
        let output = bound(&fsck).arg(how).arg(at).output().map_err(failed("run", &fsck))?;
        match output.status.code() {
            Some(code) if code <= FSCK_MENDED => Ok(()),
            _ => Err(self.complaint("e2fsck", &output.stdout)),
        }
    }

    fn complaint(&self, tool: &'static str, output: &[u8]) -> VolumeError {
        let output = String::from_utf8_lossy(output).chars().take(COMPLAINT_MAX).collect();
        VolumeError::Unsound { tool, path: self.path.clone(), output }
    }
}

impl MountedVolume {
    /// The volume that is mounted at `at`, if one is.
    pub fn find(at: &Path) -> Result<Option<Self>> {
        let table = Path::new("/proc/thread-self/mountinfo");
        let text = std::fs::read_to_string(table).map_err(failed("read", table))?;
        let line = text.lines().rev().find(|line| line.split(' ').nth(4).is_some_and(|field| unescape(field) == at.as_os_str()));
        let device = line.and_then(|line| line.split(" - ").nth(1)?.split(' ').nth(1));
        Ok(device.map(|device| Self { at: at.to_owned(), device: PathBuf::from(device) }))
    }

    pub fn usage(&self) -> Result<Usage> {
        let stat = nix::sys::statvfs::statvfs(&self.at).map_err(|error| failed("ask", &self.at)(error.into()))?;
        Ok(Usage { block_size: stat.fragment_size(), blocks: stat.blocks(), blocks_free: stat.blocks_free(), blocks_avail: stat.blocks_available() })
    }

    /// Whether the file system has grown to a file of this size.
    pub fn fills(&self, size_bytes: u64) -> Result<bool> {
        let device = File::open(&self.device).map_err(failed("open", &self.device))?;
        let Superblock { block_size, blocks, .. } = Superblock::read(&device, &self.device)?;
        Ok(blocks * block_size + block_size > size_bytes)
    }

    fn grow_to(&self, size_bytes: u64) -> Result<Grown> {
        let device = File::open(&self.device).map_err(failed("open", &self.device))?;
        let Superblock { block_size, .. } = Superblock::read(&device, &self.device)?;
        let blocks: u64 = size_bytes / block_size;
        let root = File::open(&self.at).map_err(failed("open", &self.at))?;
        // SAFETY: the kernel reads one number of 64 bits from the pointer, which is what it points to.
        if unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const blocks) } == 0 {
            return Ok(Grown::Now);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EPERM) {
            return Ok(Grown::WhenMounted);
        }
        Err(failed("resize the file system at", &self.at)(error))
    }

    /// Everything written is in the file, and nothing more is until the value is dropped.
    fn freeze(&self) -> Result<Frozen> {
        let root = File::open(&self.at).map_err(failed("open", &self.at))?;
        // SAFETY: the request's argument is not used.
        if unsafe { libc::ioctl(root.as_raw_fd(), FIFREEZE as _, 0) } < 0 {
            return Err(failed("freeze", &self.at)(io::Error::last_os_error()));
        }
        Ok(Frozen(root))
    }

    /// Ends a freeze that outlived who made it; most often there is none.
    pub fn thaw(&self) -> Result<()> {
        let root = File::open(&self.at).map_err(failed("open", &self.at))?;
        drop(Frozen(root));
        Ok(())
    }
}

/// A loop device, to the size of its file.
fn grow_device(device: &Path) -> Result<()> {
    let opened = OpenOptions::new().read(true).write(true).open(device).map_err(failed("open", device))?;
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(opened.as_raw_fd(), LOOP_SET_CAPACITY as _, 0) } {
        0 => Ok(()),
        _ => Err(failed("grow", device)(io::Error::last_os_error())),
    }
}

struct Frozen(File);

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: the request's argument is not used.
        unsafe { libc::ioctl(self.0.as_raw_fd(), FITHAW as _, 0) };
    }
}

/// What `mountinfo` writes for blanks in a path.
fn unescape(field: &str) -> std::ffi::OsString {
    let text = field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    text.into()
}

pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

pub(super) fn create_file(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map_err(failed("make", path))
}

/// What a failed try leaves is in the way of nobody, and takes up disk.
pub(super) fn made_or_removed(made: Result<()>, unfinished: &Path) -> Result<()> {
    if made.is_err() {
        let _ = std::fs::remove_file(unfinished); // the next try begins it anew
    }
    made
}

fn reserve(file: &File, path: &Path, size_bytes: u64) -> Result<()> {
    let length = libc::off_t::try_from(size_bytes).map_err(|_| VolumeError::BadSize(size_bytes))?;
    match fallocate(file.as_fd(), FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        Err(Errno::ENOSPC | Errno::EDQUOT) => Err(VolumeError::NoSpace { path: path.to_owned(), size_bytes }),
        Err(error) => Err(failed("reserve the blocks of", path)(error.into())),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Compare {
    No,
    /// Write only what differs.
    Yes,
}

/// Makes an empty file the same as `from`, in length and data; holes stay holes.
pub(crate) fn copy_data(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    copy(from, to, Compare::No)
}

/// Copies what is data in `from`; holes stay holes.
fn copy(from: &File, to: &File, compare: Compare) -> io::Result<()> {
    let end = from.metadata()?.len();
    let (mut buffer, mut present) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    while let Some(data) = seek(from, at, libc::SEEK_DATA)? {
        let data_end = seek(from, data, libc::SEEK_HOLE)?.unwrap_or(end);
        at = data;
        while at < data_end {
            let length = CHUNK_BYTES.min((data_end - at) as usize);
            let chunk = &mut buffer[..length];
            from.read_exact_at(chunk, at)?;
            let same = compare == Compare::Yes && {
                let present = &mut present[..length];
                to.read_exact_at(present, at)?;
                present == chunk
            };
            if !same {
                to.write_all_at(chunk, at)?;
            }
            at += length as u64;
        }
    }
    Ok(())
}

/// `None`: there is none behind `at`.
fn seek(file: &File, at: u64, what: libc::c_int) -> io::Result<Option<u64>> {
    let at = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: plain numbers and a descriptor that lives.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, what) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

/// The part of ext4's superblock that tells of sizes.
struct Superblock {
    block_size: u64,
    blocks: u64,
    blocks_free: u64,
    has_errors: bool,
}

impl Superblock {
    const AT: u64 = 1024;
    const MAGIC: u16 = 0xef53;
    const SIXTY_FOUR_BITS: u32 = 0x80;
    const ERRORS: u8 = 2;

    fn read(file: &File, path: &Path) -> Result<Self> {
        let mut bytes = [0; 1024];
        file.read_exact_at(&mut bytes, Self::AT).map_err(failed("read", path))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let magic = u16::from_le_bytes([bytes[0x38], bytes[0x39]]);
        let shift = word(0x18);
        if magic != Self::MAGIC || shift > 6 {
            return Err(failed("find ext4 in", path)(io::ErrorKind::InvalidData.into()));
        }
        let high = |at| if word(0x60) & Self::SIXTY_FOUR_BITS != 0 { u64::from(word(at)) << 32 } else { 0 };
        Ok(Self {
            block_size: 1024 << shift,
            blocks: u64::from(word(0x4)) | high(0x150),
            blocks_free: u64::from(word(0xc)) | high(0x158),
            has_errors: bytes[0x3a] & Self::ERRORS != 0,
        })
    }
}
