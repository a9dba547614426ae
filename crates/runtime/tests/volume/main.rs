//! Loop volumes on the running kernel, as root. Every mount is made on a thread with its own mount namespace.

mod encrypted;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use dunlin_runtime::volume::{Grown, LoopVolume, MountedVolume, VolumeError};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const DEADLINE: Duration = Duration::from_secs(10);
const SIZE: u64 = 32 << 20;

/// A temporary directory with a mount point, used on a thread whose mounts end with it. One at a time: whatever one test has
/// open in a mount, a tool that another one starts has open too until it is executed, and a mount with users stays.
fn in_private_mounts(work: impl FnOnce(&Path, &Path) + Send + 'static) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().expect("temporary directory");
    let (file, at) = (dir.path().join("volume.ext4"), dir.path().join("at"));
    std::fs::create_dir(&at).expect("mount point");
    let done = std::thread::spawn(move || {
        // A thread that has its own namespace needs its own root and working directory.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("mount namespace");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
        work(&file, &at);
    })
    .join();
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
}

fn is_free(device: &Path) -> bool {
    let name = device.file_name().expect("device name");
    !PathBuf::from("/sys/block").join(name).join("loop").exists()
}

fn wait_until_free(device: &Path) {
    let start = Instant::now();
    while !is_free(device) {
        assert!(start.elapsed() < DEADLINE, "{} still holds its file", device.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_is_known_that_the_kernel_met_errors() {
    in_private_mounts(|file, _| {
        let volume = LoopVolume::create(file, SIZE).expect("create");
        assert!(!volume.has_errors().expect("it is read"));
        let marked = std::process::Command::new("debugfs").args(["-w", "-R", "set_super_value state 2"]).arg(file).output().expect("debugfs");
        assert!(marked.status.success() && volume.has_errors().expect("it is read"), "{marked:?}");
        volume.ready().expect("it is mended");
        assert!(!volume.has_errors().expect("it is read"));
    });
}

#[test]
fn what_is_written_stays_and_the_size_holds() {
    in_private_mounts(|file, at| {
        let volume = LoopVolume::create(file, SIZE).expect("create");
        let mounted = volume.mount(at).expect("mount");
        std::fs::write(at.join("kept"), b"here").expect("write");
        let error = std::fs::write(at.join("big"), vec![1_u8; 64 << 20]).expect_err("more than fits");
        assert_eq!(error.raw_os_error(), Some(28), "{error}");
        let device = mounted.device().to_owned();
        let table = std::fs::read_to_string("/proc/thread-self/mounts").expect("mounts");
        let line = table.lines().find(|line| line.starts_with(device.to_str().expect("name"))).expect("mounted");
        assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
        mounted.unmount().expect("unmount");
        wait_until_free(&device);

        let again = LoopVolume::open(file).expect("open").mount(at).expect("mount again");
        assert_eq!(std::fs::read(at.join("kept")).expect("read"), b"here");
        let device = again.device().to_owned();
        again.unmount().expect("unmount");
        wait_until_free(&device);
    });
}

/// Whoever kills the process at any moment leaves a whole volume or none of that name.
#[test]
fn a_file_of_the_volumes_name_is_formatted() {
    in_private_mounts(|file, _| {
        // Half of one, from a process that was killed.
        std::fs::write(file.with_extension("ext4.new"), b"half").expect("write");
        let path = file.to_owned();
        let creation = std::thread::spawn(move || LoopVolume::create(&path, SIZE).expect("create"));
        while !file.exists() {
            std::hint::spin_loop();
        }
        let magic = std::fs::read(file).expect("read")[1080..1082].to_owned();
        creation.join().expect("create");
        assert_eq!(magic, 0xef53_u16.to_le_bytes(), "ext4's magic number");
        assert!(!file.with_extension("ext4.new").exists());
    });
}

#[test]
fn a_volume_is_mounted_once_and_not_unmounted_under_its_users() {
    in_private_mounts(|file, at| {
        let volume = LoopVolume::create(file, SIZE).expect("create");
        let mounted = volume.mount(at).expect("mount");
        let device = mounted.device().to_owned();
        let other = at.with_file_name("other");
        std::fs::create_dir(&other).expect("mount point");
        assert!(matches!(volume.mount(&other), Err(VolumeError::InUse { .. })));
        let user = std::fs::File::create(at.join("open")).expect("open");
        assert!(matches!(mounted.unmount(), Err(VolumeError::Busy(_))));
        drop(user);
        dunlin_runtime::volume::unmount(at).expect("unmount");
        wait_until_free(&device);
    });
}

#[test]
fn the_device_is_freed_with_the_namespace() {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    in_private_mounts(move |file, at| {
        let mounted = LoopVolume::create(file, SIZE).expect("create").mount(at).expect("mount");
        tell.send(mounted.device().to_owned()).expect("send");
    });
    wait_until_free(&told.recv().expect("device"));
}

#[test]
fn wrong_files_and_sizes_are_refused() {
    in_private_mounts(|file, at| {
        assert!(matches!(LoopVolume::create(file, 1), Err(VolumeError::BadSize(1))));
        assert!(!file.exists());
        assert!(matches!(LoopVolume::open(file), Err(VolumeError::NotFound(_))));
        std::fs::write(file, vec![0_u8; 1 << 20]).expect("write");
        assert!(matches!(LoopVolume::create(file, SIZE), Err(VolumeError::AlreadyExists(_))));
        let error = LoopVolume::open(file).expect("open").mount(at).expect_err("no file system");
        assert!(matches!(error, VolumeError::Io { op: "mount at", .. }), "{error}");
    });
}

fn fs_bytes(volume: &LoopVolume) -> u64 {
    let usage = volume.usage().expect("usage");
    usage.blocks * usage.block_size
}

/// The blocks are the volume's own before anything is written.
#[test]
fn a_reserved_volume_has_its_blocks_and_is_copied_with_what_is_in_it() {
    use std::os::unix::fs::MetadataExt;
    in_private_mounts(|file, at| {
        let volume = LoopVolume::create_reserved(file, SIZE).expect("create");
        assert!(std::fs::metadata(file).expect("look").blocks() * 512 >= SIZE, "blocks are reserved");
        let mounted = volume.mount(at).expect("mount");
        std::fs::write(at.join("kept"), vec![7_u8; 5 << 20]).expect("write");

        // While it is mounted, and what was written stands in no cache of the copy's.
        let snapshot = file.with_file_name("snapshot.ext4");
        let taken = volume.snapshot(Some(&mounted), &snapshot).expect("snapshot");
        assert!(taken < SIZE, "holes stay holes: {taken}");
        std::fs::write(at.join("kept"), b"changed later").expect("the freeze is over");
        mounted.unmount().expect("unmount");
        wait_until_unused(&volume);

        let other = file.with_file_name("other.ext4");
        let copy = LoopVolume::create_copy(&other, &snapshot, 2 * SIZE).expect("copy");
        copy.ready().expect("ready");
        assert_eq!(fs_bytes(&copy), 2 * SIZE, "a larger copy has a larger file system");
        let mounted = copy.mount(at).expect("mount the copy");
        assert_eq!(std::fs::read(at.join("kept")).expect("read"), vec![7_u8; 5 << 20]);
        mounted.unmount().expect("unmount");
    });
}

/// On a disk that has room for it, and not for a copy beside it.
#[test]
fn a_fork_takes_up_no_more_than_it_has() {
    in_private_mounts(|file, at| {
        let disk = LoopVolume::create(file, 5 * SIZE).expect("disk").mount(at).expect("mount");
        let inside = file.with_file_name("inside");
        std::fs::create_dir(&inside).expect("mount point");
        let source = LoopVolume::create_reserved(&at.join("source.ext4"), 2 * SIZE).expect("source");
        let mounted = source.mount(&inside).expect("mount");
        let kept = vec![7_u8; 48 << 20];
        std::fs::write(inside.join("kept"), &kept).expect("write");
        let free = nix::sys::statvfs::statvfs(at).expect("ask").blocks_available() * nix::sys::statvfs::statvfs(at).expect("ask").fragment_size();
        assert!((2 * SIZE..2 * SIZE + (48 << 20)).contains(&free), "{free}");
        let names = || {
            let mut names: Vec<_> = std::fs::read_dir(at).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
            names.sort();
            names
        };
        // One that does not fit leaves nothing behind, and its source writable.
        let too_large = source.fork(Some(&mounted), &at.join("large.ext4"), 4 * SIZE, || panic!("nothing is copied"));
        assert!(matches!(too_large, Err(VolumeError::NoSpace { .. })), "{too_large:?}");
        assert_eq!(names(), ["lost+found", "source.ext4"]);
        let mut whole = None;
        let fork = source.fork(Some(&mounted), &at.join("fork.ext4"), 2 * SIZE, || whole = Some(names())).expect("fork");
        assert_eq!(whole.expect("it was told"), ["fork.ext4.new", "lost+found", "source.ext4"], "it has no name before it is whole");
        assert_eq!(names(), ["fork.ext4", "lost+found", "source.ext4"]);
        assert!(matches!(source.fork(Some(&mounted), fork.path(), SIZE, || {}), Err(VolumeError::AlreadyExists(_))));
        std::fs::write(inside.join("kept"), b"changed later").expect("the freeze is over");
        mounted.unmount().expect("unmount");
        wait_until_unused(&source);
        let mounted = fork.mount_ready(&inside).expect("mount the fork");
        assert_eq!(std::fs::read(inside.join("kept")).expect("read"), kept);
        mounted.unmount().expect("unmount");
        wait_until_unused(&fork);
        disk.unmount().expect("unmount the disk");
    });
}

/// Ready refuses what something else holds, and what it cannot mend.
#[test]
fn a_volume_is_made_ready_only_when_nobody_has_it() {
    in_private_mounts(|file, at| {
        let volume = LoopVolume::create_reserved(file, SIZE).expect("create");
        let mounted = volume.mount(at).expect("mount");
        assert!(matches!(volume.ready(), Err(VolumeError::InUse { .. })));
        mounted.unmount().expect("unmount");
        wait_until_unused(&volume);
        volume.ready().expect("ready");
        std::fs::write(file, vec![0_u8; 1 << 20]).expect("overwrite");
        assert!(matches!(volume.ready(), Err(VolumeError::Unsound { tool: "e2fsck", .. })));
    });
}

/// With `CAP_SYS_RESOURCE` a mounted volume grows at once, without it when it is made ready again.
#[test]
fn a_volume_grows_and_keeps_what_it_has() {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let may = u64::from_str_radix(effective.trim(), 16).expect("a number") & (1 << 24) != 0;
    in_private_mounts(move |file, at| {
        let volume = LoopVolume::create_reserved(file, SIZE).expect("create");
        let mounted = volume.mount(at).expect("mount");
        std::fs::write(at.join("kept"), b"here").expect("write");
        let before = mounted.usage().expect("usage").blocks;
        let grown = volume.grow(Some(&mounted), 2 * SIZE).expect("grow");
        assert_eq!(grown, if may { Grown::Now } else { Grown::WhenMounted });
        assert_eq!(mounted.usage().expect("usage").blocks > before, may);
        mounted.unmount().expect("unmount");
        wait_until_unused(&volume);
        volume.ready().expect("ready");
        assert_eq!(fs_bytes(&volume), 2 * SIZE);
        let mounted = volume.mount(at).expect("mount again");
        assert_eq!(std::fs::read(at.join("kept")).expect("read"), b"here");
        std::fs::write(at.join("big"), vec![1_u8; 40 << 20]).expect("there is room for more than before");
        assert_eq!(MountedVolume::find(at).expect("find").expect("mounted").device(), mounted.device());
        mounted.unmount().expect("unmount");
        assert!(MountedVolume::find(at).expect("find").is_none());
    });
}

fn wait_until_unused(volume: &LoopVolume) {
    let start = Instant::now();
    while let Err(VolumeError::InUse { .. }) = volume.ready() {
        assert!(start.elapsed() < DEADLINE, "still in use");
        std::thread::sleep(Duration::from_millis(5));
    }
}
