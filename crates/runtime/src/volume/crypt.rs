//! Volumes that are encrypted on the disk: LUKS2 on the loop device, made and opened by `cryptsetup`.
//!
//! The file is [`HEADER_BYTES`] longer than the file system in it. While it is mounted, or looked at, device mapper has a
//! device of the volume's name (`/dev/mapper/<name>`), which keeps the loop device. A process that is killed leaves it; so
//! whoever needs the volume next takes it away first, unless somebody uses it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::{COMPLAINT_MAX, Result, VolumeError, attach, failed};
use crate::features::chain;
use crate::net::firewall::find_program;

/// In front of the file system: what `cryptsetup` takes for two copies of its table and the key slots, by default. Written
/// down, so that another version of it takes no more.
pub const HEADER_BYTES: u64 = 16 << 20;
const SECTOR_BYTES: u64 = 512;
pub const KEY_BYTES: usize = 32;
const TOOL: &str = "cryptsetup";
const INSTALL: &str = "apt-get install cryptsetup-bin";
/// `cryptsetup` ends so when a device is there already, or somebody uses it.
const BUSY: i32 = 5;
/// Who only looks at new devices (udev does) has let go of one within this, and the kernel of the loop device below.
const LET_GO: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(10);
/// Blocks of the trial's file system: enough for a table of device mapper, too few for anything else.
const TRIAL_BYTES: u64 = 1 << 20;
/// Zeroes are written in pieces of so many.
const WIPE_BYTES: usize = 1 << 20;

/// What opens a volume. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct VolumeKey(Zeroizing<[u8; KEY_BYTES]>);

impl VolumeKey {
    pub fn random() -> io::Result<Self> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        File::open("/dev/urandom")?.read_exact(&mut *key)?;
        Ok(Self(key))
    }

    /// `None`: it is not as long as a key.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(Zeroizing::new(bytes.try_into().ok()?)))
    }

    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VolumeKey(..)")
    }
}

/// How a volume is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encryption {
    /// Of the device that device mapper has while the volume is open; no other volume of this computer has it.
    pub name: String,
    pub key: VolumeKey,
}

impl Encryption {
    pub(super) fn device(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// Makes an empty encrypted volume of a device. The key is random, and nobody guesses 256 bits however cheap a guess is:
    /// so the derivation that makes guesses at passwords dear, and costs a second and a gigabyte at each start of a
    /// machine, is the cheapest that there is.
    pub(super) fn format(&self, device: &Path) -> Result<()> {
        let offset = (HEADER_BYTES / SECTOR_BYTES).to_string();
        let mut command = tool()?;
        command.args(["luksFormat", "--type", "luks2", "--batch-mode", "--key-file", "-"]);
        command.args(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha256"]);
        command.args(["--cipher", "aes-xts-plain64", "--key-size", "512", "--sector-size", "4096", "--offset", &offset]);
        run(command.arg(device), device, Some(&self.key))
    }

    /// Opens the volume that is on a device.
    pub(super) fn open(&self, device: &Path) -> Result<()> {
        load_module();
        let mut command = tool()?;
        command.args(["open", "--type", "luks2", "--batch-mode", "--key-file", "-"]);
        run(command.arg(device).arg(&self.name), device, Some(&self.key))
    }

    /// Brings the open volume to the size of the device below.
    pub(super) fn resize(&self) -> Result<()> {
        let mut command = tool()?;
        command.args(["resize", "--batch-mode", "--key-file", "-", &self.name]);
        run(&mut command, &self.device(), Some(&self.key))
    }
}

/// Takes away the device of a volume that is not mounted any more; `Ok` if there is none. `Busy`: somebody uses it.
pub fn close(name: &str) -> Result<()> {
    let Some(below) = is_open(name)? else { return Ok(()) };
    let deadline = Instant::now() + LET_GO;
    let mut command = tool()?;
    run(command.args(["close", name]), &Path::new("/dev/mapper").join(name), None)?;
    // The kernel gives the loop device free a moment later, and until then it looks as if somebody had the file.
    let lets_go = |device: &PathBuf| !device.join("loop").exists();
    while !below.iter().all(lets_go) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// As [`close`], for a device that was only opened to look at it: who else looks at new devices is waited for.
pub(super) fn close_unused(name: &str) -> Result<()> {
    let deadline = Instant::now() + LET_GO;
    loop {
        match close(name) {
            Err(VolumeError::Busy(_)) if Instant::now() < deadline => std::thread::sleep(LOOK),
            done => return done,
        }
    }
}

/// The devices below the one of this name, as `/sys/block` has them. `None`: there is no such name.
fn is_open(name: &str) -> Result<Option<Vec<PathBuf>>> {
    let blocks = Path::new("/sys/block");
    for entry in std::fs::read_dir(blocks).map_err(failed("list", blocks))? {
        let entry = entry.map_err(failed("list", blocks))?;
        if !entry.file_name().to_string_lossy().starts_with("dm-") {
            continue;
        }
        let dir = entry.path();
        // Devices come and go while they are listed.
        if std::fs::read_to_string(dir.join("dm/name")).is_ok_and(|found| found.trim_end() == name) {
            let below = std::fs::read_dir(dir.join("slaves")).into_iter().flatten().flatten();
            return Ok(Some(below.map(|entry| blocks.join(entry.file_name())).collect()));
        }
    }
    Ok(None)
}

/// Makes what is in an encrypted volume's file, or in a copy of it, unreadable for whoever has the key.
pub fn forget(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path).map_err(failed("open", path))?;
    let end = file.metadata().map_err(failed("look at", path))?.len().min(HEADER_BYTES);
    let (zeroes, mut at) = (vec![0; WIPE_BYTES], 0);
    while at < end {
        let length = (end - at).min(WIPE_BYTES as u64);
        file.write_all_at(&zeroes[..length as usize], at).map_err(failed("wipe", path))?;
        at += length;
    }
    file.sync_all().map_err(failed("sync", path))
}

/// Why volumes cannot be encrypted on this computer, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    pub what: String,
    pub fix: String,
}

fn lacking<T>(what: impl Into<String>, fix: impl Into<String>) -> std::result::Result<T, Lacking> {
    Err(Lacking { what: what.into(), fix: fix.into() })
}

/// Looks for what encryption needs. Changes nothing, so it does not know whether the kernel will have it.
pub fn look() -> std::result::Result<String, Lacking> {
    let Some(tool) = find_program(TOOL) else { return lacking("cryptsetup is not installed", INSTALL) };
    let found = |how| Ok(format!("{} and dm-crypt, {how}", tool.display()));
    if Path::new("/sys/module/dm_crypt").exists() {
        return found("which is loaded");
    }
    let release = nix::sys::utsname::uname().map(|name| name.release().to_owned()).unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release);
    let has = |list: &str| std::fs::read_to_string(modules.join(list)).is_ok_and(|text| text.contains("/dm-crypt.ko"));
    if has("modules.builtin") {
        return found("which the kernel has built in");
    }
    if has("modules.dep") {
        return found("which the kernel can load");
    }
    lacking("the kernel has no dm-crypt module", "modprobe dm_crypt; where there is no such module, boot a kernel that has it")
}

/// Makes, opens and closes an encrypted volume in a file of `dir` that has no name. Takes some tenths of a second.
pub fn trial(dir: &Path) -> std::result::Result<(), Lacking> {
    look()?;
    let tried = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let file = options.open(dir).map_err(failed("make a file in", dir))?;
        file.set_len(HEADER_BYTES + TRIAL_BYTES).map_err(failed("size a file in", dir))?;
        let key = VolumeKey::random().map_err(failed("make a key for", dir))?;
        let encryption = Encryption { name: format!("dunlin-trial-{}", std::process::id()), key };
        close_unused(&encryption.name)?;
        let (device, held) = attach(&file, dir)?;
        encryption.format(&device)?;
        encryption.open(&device)?;
        drop(held);
        close_unused(&encryption.name)
    };
    let fix = "run the server where it may use device mapper: outside of a container, on a kernel with dm-crypt";
    tried().or_else(|error: VolumeError| lacking(format!("a trial of dm-crypt failed: {}", chain(&error)), fix))
}

/// Device mapper does not ask for it everywhere: without udev its control device is only there once the module is.
fn load_module() {
    if Path::new("/sys/module/dm_crypt").exists() && Path::new("/dev/mapper/control").exists() {
        return;
    }
    if let Some(modprobe) = find_program("modprobe") {
        // A kernel that has it built in has nothing to load; where it lacks, what comes next says so.
        let _ = Command::new(modprobe).args(["-q", "dm_crypt"]).stdin(Stdio::null()).output();
    }
}

fn tool() -> Result<Command> {
    find_program(TOOL).map(Command::new).ok_or(VolumeError::NoCryptsetup)
}

/// The key goes through a pipe: it is on no disk and in nobody's list of processes.
fn run(command: &mut Command, device: &Path, key: Option<&VolumeKey>) -> Result<()> {
    let stdin = if key.is_some() { Stdio::piped() } else { Stdio::null() };
    command.env("LC_ALL", "C").stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed("run cryptsetup for", device))?;
    if let (Some(mut stdin), Some(key)) = (child.stdin.take(), key) {
        // One that has ended before it read the key says why.
        let _ = stdin.write_all(key.bytes());
    }
    let output = child.wait_with_output().map_err(failed("run cryptsetup for", device))?;
    match output.status.code() {
        Some(0) => Ok(()),
        Some(BUSY) => Err(VolumeError::Busy(device.to_owned())),
        _ => {
            let output = String::from_utf8_lossy(&output.stderr).trim().chars().take(COMPLAINT_MAX).collect();
            Err(VolumeError::Unsound { tool: TOOL, path: device.to_owned(), output })
        }
    }
}
