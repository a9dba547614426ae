//! The machine's root file system, in two halves: the supervisor, root on the host, makes the overlay
//! in a private mount namespace; the machine's first process, root in its own user namespace only,
//! adds /proc, /sys and /dev and pivots into it. No mount is ever visible on the host.

use crate::guest_files;
use crate::layer::{Mounting, PASSING_DIR};
use crate::remove::remove_tree;
use crate::spec::{Bind, Ids, Profile, Rootfs, SupervisorSpec, TempDir, TempStorage, UID_RANGE};
use crate::sys;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

/// Size of /dev/shm and of a builder's root.
const SHM_OPTIONS: &str = "mode=1777,size=64m";
const BUILDER_ROOT_BYTES: u64 = 4 << 30;
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];
/// Hidden: they tell of the host or take its orders.
const MASKED: &[&str] = &[
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Where the root is mounted, below the machine's `mnt`.
const ROOT: &str = "root";
/// Where the writable layer is mounted, below `mnt` too, and temporary directories with a number behind it.
const WRITABLE: &str = "w";
const TEMPORARY: &str = "t";
/// Where the files of secrets are made, below `mnt` too.
const FILES: &str = "f";
/// The overlay's upper directory and its work space, in the writable layer. Versions before had them in the machine's
/// directory.
const WRITTEN: [&str; 2] = ["upper", "work"];
const NONE: Option<&str> = None;

/// The mount namespace that the supervisor came from.
pub(crate) struct HostMounts(File);

impl HostMounts {
    /// In the supervisor: leaves for a private mount namespace, in which the machine's root is made.
    pub(crate) fn leave() -> io::Result<Self> {
        let host = File::open("/proc/self/ns/mnt")?;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        Ok(Self(host))
    }

    /// Back again, once the machine has its root: a namespace that stays would hold on to every mount that
    /// the host had at this moment, and keep volumes and disks busy that the host has long unmounted.
    pub(crate) fn come_back(self) -> io::Result<()> {
        Ok(nix::sched::setns(self.0, nix::sched::CloneFlags::CLONE_NEWNS)?)
    }
}

/// What is mounted beside the other work of a start.
pub(crate) struct Begun {
    mnt: PathBuf,
    /// `None`: the root needs none.
    writable: Option<Mounting>,
    temporary: Vec<Mounting>,
    /// For files that are in memory only.
    files: Option<PathBuf>,
}

/// In the supervisor, with mounts of its own: begins with what takes longest.
pub(crate) fn begin(spec: &SupervisorSpec) -> io::Result<Begun> {
    DirBuilder::new().recursive(true).mode(0o700).create(&spec.machine_dir)?; // a further container's is new
    let mnt = make_dir(&spec.machine_dir, "mnt", 0)?;
    mount(Some("tmpfs"), &mnt, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=711,size=1m"))?;
    let begin = |name: &str, layer: &crate::layer::WritableLayer| layer.begin(&make_dir(&mnt, name, 0)?, &spec.machine_dir);
    let writable = match &spec.rootfs {
        Rootfs::Layers { writable, .. } => Some(begin(WRITABLE, writable)?),
        Rootfs::HostUsr => None,
    };
    let mut temporary = Vec::new();
    for (i, dir) in spec.temp_dirs.iter().enumerate() {
        let name = format!("{TEMPORARY}{i}");
        match &dir.storage {
            TempStorage::Disk(layer) => temporary.push(begin(&name, layer)?),
            TempStorage::Memory { size_bytes } => {
                // A file takes a page at least, an empty one some memory of the kernel's that counts too.
                let options = format!("mode=711,size={size_bytes},nr_inodes={}", size_bytes / 4096 + 16);
                let at = make_dir(&mnt, &name, 0)?;
                mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))?;
            }
        }
    }
    let in_memory = spec.files.iter().any(|file| !file.on_disk);
    let files = in_memory.then(|| unswapped(&make_dir(&mnt, FILES, 0)?, spec.uid_base)).transpose()?;
    Ok(Begun { mnt, writable, temporary, files })
}

/// A tmpfs that is never swapped, whatever the machine's memory is, for its root to write to. The kernel lets only who is root
/// of the computer have that, from 6.4 on; elsewhere it is one that is swapped as the machine's memory is.
fn unswapped(at: &Path, uid_base: u32) -> io::Result<PathBuf> {
    let options = format!("mode=700,uid={uid_base},gid={uid_base}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let tmpfs = |options: &str| mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options));
    match tmpfs(&format!("{options},noswap")) {
        Err(Errno::EINVAL) => tmpfs(&options)?,
        mounted => mounted?,
    }
    Ok(at.to_owned())
}

/// The root, and the devices of what a machine's program writes to beside its volumes.
pub(crate) struct Assembled {
    pub root: PathBuf,
    pub devices: Vec<File>,
    /// Attached nowhere: see `guest_files`.
    pub files: Option<OwnedFd>,
}

/// Then mounts the root under `<machine dir>/mnt/root`.
pub(crate) fn assemble(spec: &SupervisorSpec, begun: Begun, user_namespace: BorrowedFd<'_>) -> io::Result<Assembled> {
    let Begun { mnt, writable, temporary, files } = begun;
    // The machine's root passes through here before it pivots.
    let root = make_dir(&mnt, ROOT, spec.uid_base)?;
    let writable = writable.map(Mounting::finish).transpose()?;
    match (&spec.rootfs, &writable) {
        (Rootfs::Layers { image, .. }, Some(writable)) => {
            overlay(image, &writable.at, &mnt, &root, spec, user_namespace)?;
        }
        (Rootfs::Layers { .. }, None) => return Err(io::Error::other("the root has no writable layer")),
        (Rootfs::HostUsr, _) => host_usr(spec, &root)?,
    }
    for bind in &spec.binds {
        bind_into(&root, bind, spec.profile, spec.uid_base)?;
    }
    for volume in &spec.volumes {
        volume_into(&root, volume, spec, user_namespace)?;
    }
    let temporary = temporary.into_iter().map(Mounting::finish).collect::<io::Result<Vec<_>>>()?;
    for (i, dir) in spec.temp_dirs.iter().enumerate() {
        temporary_into(&root, dir, &mnt.join(format!("{TEMPORARY}{i}")), spec.uid_base)?;
    }
    let devices = writable.into_iter().chain(temporary).filter_map(|mounted| mounted.device).collect();
    let files = files.map(|at| sys::detached_mount(&at, sys::Attributes::default(), None)).transpose()?;
    Ok(Assembled { root, devices, files })
}

/// The image's layers with a writable one above them, at `root`; all are below `mnt`.
fn overlay(
    layers: &[PathBuf],
    writable: &Path,
    mnt: &Path,
    root: &Path,
    spec: &SupervisorSpec,
    user_namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    if layers.is_empty() {
        return Err(io::Error::other("the image has no layers"));
    }
    let [upper, work] = WRITTEN;
    for dir in [upper, work] {
        make_dir(writable, dir, spec.uid_base)?;
    }
    let inside = writable.strip_prefix(mnt).map_err(io::Error::other)?.display();
    let mut names = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        // One letter: the kernel's option page holds 4 KiB, and images have up to 127 layers.
        let target = make_dir(mnt, format!("l{i}"), 0)?;
        sys::detached_mount(layer, sys::Attributes::default(), mapped(spec, user_namespace))
            .and_then(|tree| sys::attach_mount(&tree, File::open(&target)?.as_fd()))
            .map_err(|e| io::Error::new(e.kind(), format!("id-mapped mount of layer {}: {e}", layer.display())))?;
        names.push(format!("l{i}"));
    }
    names.reverse(); // overlayfs wants the topmost first
    // Relative directories keep the options short, and free of commas and colons of the data directory.
    let mut options = format!("lowerdir={},upperdir={inside}/{upper},workdir={inside}/{work}", names.join(":"));
    if spec.ids != Ids::Own {
        options.push_str(",userxattr"); // others are for who is root outside of every user namespace
    }
    std::env::set_current_dir(mnt)?;
    let mounted = mount(Some("overlay"), root, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()));
    std::env::set_current_dir("/")?;
    mounted.map_err(|e| io::Error::other(format!("overlay of {} layers: {e}", layers.len())))
}

/// Where files have the ids that machines see, they are mapped to the machine's.
fn mapped<'a>(spec: &SupervisorSpec, user_namespace: BorrowedFd<'a>) -> Option<BorrowedFd<'a>> {
    (spec.ids == Ids::Own).then_some(user_namespace)
}

/// Removes what an attempt wrote where its writable layers are plain directories, or one of a version before wrote to its root.
pub(crate) fn remove_written(machine_dir: &Path) -> io::Result<()> {
    WRITTEN.iter().chain([&PASSING_DIR]).try_for_each(|dir| remove_tree(&machine_dir.join(dir)))
}

/// A builder's root: the host's programs, read-only, and nothing else of the host.
fn host_usr(spec: &SupervisorSpec, root: &Path) -> io::Result<()> {
    let base = spec.uid_base;
    let options = format!("mode=755,uid={base},gid={base},size={BUILDER_ROOT_BYTES}");
    // Without `nodev`, as with a builder's other writable mounts: see `bind_into`.
    mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
    for dir in ["usr", "etc", "proc", "sys", "dev", "run", "tmp", "var", "root", "home"] {
        make_dir(root, dir, base)?;
    }
    for dir in ["var/tmp", "var/lib", "var/cache", "etc/containers", "etc/ssl"] {
        make_dir(root, dir, base)?;
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        if fs::symlink_metadata(Path::new("/").join(link)).is_ok_and(|meta| meta.is_symlink()) {
            symlink(format!("usr/{link}"), root.join(link))?;
        } else if Path::new("/").join(link).is_dir() {
            let bind = Bind { source: Path::new("/").join(link), target: Path::new("/").join(link), readonly: true };
            bind_into(root, &bind, spec.profile, base)?;
        }
    }
    for (source, target) in [("/usr", "/usr"), ("/etc/ssl/certs", "/etc/ssl/certs"), ("/etc/alternatives", "/etc/alternatives")] {
        if Path::new(source).exists() {
            bind_into(root, &Bind { source: source.into(), target: target.into(), readonly: true }, spec.profile, base)?;
        }
    }
    let files: [(&str, &str); 4] = [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/subuid", "root:1:65535\n"),
        ("etc/subgid", "root:1:65535\n"),
    ];
    for (name, content) in files {
        write_file(&root.join(name), content.as_bytes(), base, 0o644)?;
    }
    Ok(())
}

/// Binds inside the root; the target is made when it is missing. Sources are paths of the host, targets
/// go through the image, whose links must not lead out of it: see [`place`].
///
/// What a mount forbids is locked in a user namespace, and a builder's tools bind from there for the mounts
/// of a `RUN` (secrets, caches) with other flags, which the kernel refuses. Nothing is lost: nobody in a user
/// namespace makes device nodes, and a set-user-id program there becomes one of the machine's own users.
fn bind_into(root: &Path, bind: &Bind, profile: Profile, uid_base: u32) -> io::Result<()> {
    let explain = |e: io::Error| {
        io::Error::new(e.kind(), format!("bind of {} at {}: {e}", bind.source.display(), bind.target.display()))
    };
    let forbidding = sys::NO_SUID_MOUNT | sys::NO_DEVICES_MOUNT;
    let attributes = match (bind.readonly, profile) {
        (true, _) => sys::Attributes { set: forbidding | sys::READ_ONLY_MOUNT, clear: 0 },
        (false, Profile::Builder) => sys::Attributes { set: 0, clear: forbidding },
        (false, Profile::Tenant) => sys::Attributes { set: forbidding, clear: 0 },
    };
    let tree = sys::detached_mount(&bind.source, attributes, None).map_err(explain)?;
    let target = place(root, &bind.target, bind.source.is_dir(), uid_base, ResolveFlag::empty()).map_err(explain)?;
    sys::attach_mount(&tree, target.as_fd()).map_err(explain)
}

/// Files on a volume have the ids that the machine sees, not those of its range: the next machine has another range.
fn volume_into(root: &Path, volume: &Bind, spec: &SupervisorSpec, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let explain = |e: io::Error| io::Error::new(e.kind(), format!("the volume at {}: {e}", volume.target.display()));
    let read_only = if volume.readonly { sys::READ_ONLY_MOUNT } else { 0 };
    let attributes = sys::Attributes { set: sys::NO_SUID_MOUNT | sys::NO_DEVICES_MOUNT | read_only, clear: 0 };
    let tree = sys::detached_mount(&volume.source, attributes, mapped(spec, user_namespace)).map_err(explain)?;
    let target = place(root, &volume.target, true, spec.uid_base, ResolveFlag::empty()).map_err(explain)?;
    sys::attach_mount(&tree, target.as_fd()).map_err(explain)
}

/// A directory of its own on what was mounted at `from`: the file system's own (`lost+found`) stays out of sight.
fn temporary_into(root: &Path, dir: &TempDir, from: &Path, uid_base: u32) -> io::Result<()> {
    let explain = |e: io::Error| io::Error::new(e.kind(), format!("the temporary directory {}: {e}", dir.target.display()));
    let source = make_dir(from, WRITTEN[0], uid_base)?;
    fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    let attributes = sys::Attributes { set: sys::NO_SUID_MOUNT | sys::NO_DEVICES_MOUNT, clear: 0 };
    let tree = sys::detached_mount(&source, attributes, None).map_err(explain)?;
    let target = place(root, &dir.target, true, uid_base, ResolveFlag::empty()).map_err(explain)?;
    sys::attach_mount(&tree, target.as_fd()).map_err(explain)
}

/// Opens a path inside the root as if the root were `/`, by these rules too; what is missing of it is made.
pub(crate) fn place(
    root: &Path,
    target: &Path,
    directory: bool,
    owner: u32,
    rules: ResolveFlag,
) -> io::Result<OwnedFd> {
    let root = openat(AT_FDCWD, root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | rules);
    let mut names = target.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    let (mut at, mut path) = (root.try_clone()?, PathBuf::new());
    let mut name = names.next().ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        let next = names.next();
        path.push(name);
        at = match openat2(&root, &path, how) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => {
                if next.is_some() || directory {
                    mkdirat(&at, name, Mode::from_bits_truncate(0o755))?;
                } else {
                    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                    drop(openat(&at, name, flags, Mode::from_bits_truncate(0o644))?);
                }
                let (user, group) = (Uid::from_raw(owner), Gid::from_raw(owner));
                fchownat(&at, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
                openat2(&root, &path, how)?
            }
            Err(e) => return Err(e.into()),
        };
        let is_directory = nix::sys::stat::fstat(&at)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
        match next {
            _ if !is_directory && (next.is_some() || directory) => {
                let what = format!("the image has something else than a directory at /{}; take it out of the image", path.display());
                return Err(io::Error::other(what));
            }
            Some(following) => name = following,
            None => return Ok(at),
        }
    }
}

fn write_file(path: &Path, content: &[u8], uid_base: u32, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    chown(path, Some(uid_base), Some(uid_base))
}

/// Makes a directory owned by `owner`, if it is not there.
fn make_dir(parent: &Path, name: impl AsRef<Path>, owner: u32) -> io::Result<PathBuf> {
    let path = parent.join(name);
    match DirBuilder::new().mode(0o755).create(&path) {
        Ok(()) => chown(&path, Some(owner), Some(owner))?,
        // A layer that is kept may be from an attempt that was killed between the two.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            if owner != 0 && fs::symlink_metadata(&path)?.uid() == 0 {
                chown(&path, Some(owner), Some(owner))?;
            }
        }
        Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
    Ok(path)
}

/// In the machine's first process, with the root as its working directory and in a mount namespace of its own: a mount
/// that this namespace may pivot to, as the working directory.
pub(crate) fn reach() -> io::Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("."), ".", NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
    // From underneath the new mount onto it.
    std::env::set_current_dir(Path::new("..").join(ROOT))
}

/// In the same process, root of the machine's ids now: mounts what belongs to its namespaces and
/// pivots to the working directory.
pub(crate) fn enter(spec: &SupervisorSpec, files: Option<OwnedFd>) -> io::Result<()> {
    let step = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for dir in ["proc", "sys", "dev"] {
        match fs::symlink_metadata(dir) {
            Ok(found) if found.is_dir() => {}
            // A link would lead out of the root that is not left yet, and what is mounted there would not be where
            // it is masked.
            Ok(_) => return Err(io::Error::other(format!("the image has something else than a directory at /{dir}"))),
            Err(_) => fs::create_dir(dir).map_err(|e| step(dir, e))?,
        }
    }
    mount(Some("proc"), "proc", Some("proc"), plain, NONE).map_err(|e| step("/proc", e.into()))?;
    mount(Some("sysfs"), "sys", Some("sysfs"), plain | MsFlags::MS_RDONLY, NONE)
        .map_err(|e| step("/sys", e.into()))?;
    devices(Path::new("dev"), spec.profile).map_err(|e| step("/dev", e))?;
    nix::unistd::pivot_root(".", ".").map_err(|e| step("pivot_root", e.into()))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(|e| step("leaving the host's root", e.into()))?;
    std::env::set_current_dir("/")?;
    network_files(spec).map_err(|e| step("/etc", e))?;
    guest_files::write(spec, files)?;
    sysctls();
    mask(spec.profile).map_err(|e| step("masking", e))
}

fn devices(dev: &Path, profile: Profile) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), dev, Some("tmpfs"), flags, Some("mode=755,size=64k"))?;
    for name in DEVICES {
        fs::write(dev.join(name), "")?;
        mount(Some(&Path::new("/dev").join(name)), &dev.join(name), NONE, MsFlags::MS_BIND, NONE)?;
    }
    for dir in ["pts", "shm", "mqueue"] {
        fs::create_dir(dev.join(dir))?;
    }
    mount(Some("devpts"), &dev.join("pts"), Some("devpts"), flags, Some("newinstance,ptmxmode=0666,mode=620,gid=5"))?;
    let plain = flags | MsFlags::MS_NODEV;
    // A builder's tools keep the secrets of a `RUN` there and bind from it: see `bind_into`.
    let shared_memory = if profile == Profile::Builder { MsFlags::MS_NODEV } else { plain };
    mount(Some("shm"), &dev.join("shm"), Some("tmpfs"), shared_memory, Some(SHM_OPTIONS))?;
    mount(Some("mqueue"), &dev.join("mqueue"), Some("mqueue"), plain, NONE)?;
    for (target, link) in [
        ("pts/ptmx", "ptmx"), ("/proc/self/fd", "fd"), ("/proc/self/fd/0", "stdin"), ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        symlink(target, dev.join(link))?;
    }
    Ok(())
}

/// After the pivot: whatever links the image has, they end inside it.
fn network_files(spec: &SupervisorSpec) -> io::Result<()> {
    fs::create_dir_all("/etc")?;
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
    if let Some(address) = spec.address {
        hosts.push_str(&format!("{address} {} fly-local-6pn\n", spec.hostname));
    }
    for (name, content) in
        [("resolv.conf", &spec.resolv_conf), ("hosts", &hosts), ("hostname", &format!("{}\n", spec.hostname))]
    {
        let path = Path::new("/etc").join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::write(&path, content)?;
    }
    Ok(())
}

/// Comforts of the network namespace; a kernel without them works too.
fn sysctls() {
    let last = UID_RANGE - 1;
    for (name, value) in [("ping_group_range", format!("0 {last}")), ("ip_unprivileged_port_start", "0".into())] {
        let _ = fs::write(Path::new("/proc/sys/net/ipv4").join(name), value);
    }
}

fn mask(profile: Profile) -> io::Result<()> {
    for path in MASKED.iter().map(Path::new).filter(|path| path.exists()) {
        if path.is_dir() {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0"))?;
        } else {
            mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE)?;
        }
    }
    if profile == Profile::Builder {
        // buildah writes to its own network namespace's settings; it has no others to reach.
        return Ok(());
    }
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    for path in READ_ONLY.iter().map(Path::new).filter(|path| path.exists()) {
        mount(Some(path), path, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        mount(NONE, path, NONE, flags, NONE)?;
    }
    Ok(())
}
