//! Loop volumes on the running kernel, as root. Every mount is made on a thread with its own mount namespace.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dunlin_runtime::volume::{LoopVolume, VolumeError};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const DEADLINE: Duration = Duration::from_secs(10);
const SIZE: u64 = 32 << 20;

/// A temporary directory with a mount point, used on a thread whose mounts end with it.
fn in_private_mounts(work: impl FnOnce(&Path, &Path) + Send + 'static) {
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
