//! Encrypted volumes, where the kernel has dm-crypt; where it lacks, that they are refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dunlin_runtime::volume::{
    Encryption, Grown, HEADER_BYTES, LoopVolume, MountedVolume, VolumeError, VolumeKey, close, forget, look, trial,
};

use crate::{SIZE, in_private_mounts, wait_until_free};

const CANARY: &[u8] = b"what nobody else may read";

/// Runs `work` where volumes can be encrypted. The lane that is known to have what it takes must find it.
fn where_possible(work: impl FnOnce(&Path, &Path) + Send + 'static) {
    in_private_mounts(|file, at| match look() {
        Ok(_) => work(file, at),
        Err(lacking) => {
            assert!(std::env::var_os("DUNLIN_TEST_DM_CRYPT").is_none(), "{lacking:?}");
            refused(file);
        }
    });
}

fn refused(file: &Path) {
    let lacking = trial(file.parent().expect("a directory")).expect_err("it was looked for, and not found");
    assert!(!lacking.what.is_empty() && !lacking.fix.is_empty(), "{lacking:?}");
    let error = LoopVolume::create_encrypted(file, SIZE, encryption("refused")).expect_err("nothing encrypts here");
    let says = error.to_string();
    assert!(matches!(error, VolumeError::NoCryptsetup | VolumeError::Unsound { tool: "cryptsetup", .. }), "{says}");
    assert!(!file.exists() && !file.with_extension("ext4.new").exists(), "nothing stays of it");
}

/// A name that no other test, and no other run of this one, has.
fn encryption(of: &str) -> Encryption {
    Encryption { name: format!("dunlin-test-{}-{of}", std::process::id()), key: VolumeKey::random().expect("random bytes") }
}

fn named(encryption: &Encryption, of: &str) -> Encryption {
    Encryption { name: format!("{}-{of}", encryption.name), key: encryption.key.clone() }
}

fn has(file: &Path, bytes: &[u8]) -> bool {
    std::fs::read(file).expect("read").windows(bytes.len()).any(|window| window == bytes)
}

fn is_open(encryption: &Encryption) -> bool {
    let blocks = std::fs::read_dir("/sys/block").expect("list").flatten();
    let names = blocks.filter_map(|entry| std::fs::read_to_string(entry.path().join("dm/name")).ok());
    names.into_iter().any(|name| name.trim_end() == encryption.name)
}

fn fs_bytes(mounted: &MountedVolume) -> u64 {
    let usage = mounted.usage().expect("usage");
    usage.blocks * usage.block_size
}

#[test]
fn a_trial_says_what_a_volume_would() {
    where_possible(|file, _| {
        let dir = file.parent().expect("a directory");
        let before = std::fs::read_dir(dir).expect("list").count();
        trial(dir).expect("what was found works");
        assert_eq!(std::fs::read_dir(dir).expect("list").count(), before, "it leaves nothing");
    });
}

#[test]
fn what_is_written_is_in_clear_nowhere_on_the_disk() {
    where_possible(|file, at| {
        let secret = encryption("clear");
        let volume = LoopVolume::create_encrypted(file, SIZE, secret.clone()).expect("create");
        assert!(!is_open(&secret), "it is open while it is used");
        assert_eq!(volume.size_bytes().expect("size"), SIZE);
        assert_eq!(std::fs::metadata(file).expect("look").len(), SIZE + HEADER_BYTES);
        let usage = volume.usage().expect("usage");
        assert_eq!(usage.blocks * usage.block_size, SIZE, "the header takes nothing from the tenant");
        let mounted = volume.mount_ready(at).expect("mount");
        std::fs::write(at.join("kept"), CANARY.repeat(1000)).expect("write");
        let table = std::fs::read_to_string("/proc/thread-self/mounts").expect("mounts");
        let line = table.lines().find(|line| line.contains(&secret.name)).expect("mounted");
        assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
        mounted.unmount().expect("unmount");
        assert!(!is_open(&secret));

        assert!(!has(file, CANARY) && !has(file, secret.key.bytes()), "neither data nor key");
        let magic = &std::fs::read(file).expect("read")[..6];
        assert_eq!(magic, b"LUKS\xba\xbe");
        let stranger = Encryption { key: VolumeKey::random().expect("random bytes"), ..secret.clone() };
        let error = volume.clone().with_encryption(Some(stranger)).mount_ready(at).expect_err("another key");
        assert!(matches!(error, VolumeError::Unsound { tool: "cryptsetup", .. }), "{error}");
        let mounted = volume.mount_ready(at).expect("mount again");
        assert_eq!(std::fs::read(at.join("kept")).expect("read"), CANARY.repeat(1000));
        mounted.unmount().expect("unmount");

        forget(file).expect("forget");
        let error = volume.mount_ready(at).expect_err("its header is gone");
        assert!(matches!(error, VolumeError::Unsound { tool: "cryptsetup", .. }), "{error}");
    });
}

#[test]
fn one_user_at_a_time_and_a_crash_leaves_none() {
    where_possible(|file, at| {
        let secret = encryption("user");
        let volume = LoopVolume::create_encrypted(file, SIZE, secret.clone()).expect("create");
        let mounted = volume.mount_ready(at).expect("mount");
        assert!(matches!(volume.ready(), Err(VolumeError::InUse { .. })));
        assert!(matches!(close(&secret.name), Err(VolumeError::Busy(_))), "not under who uses it");
        let found = MountedVolume::find(at).expect("find").expect("mounted");
        assert_eq!(found.device(), mounted.device());
        let user = File::create(at.join("open")).expect("open");
        assert!(matches!(found.unmount(), Err(VolumeError::Busy(_))));
        drop(user);

        // Who is killed between the two leaves the device without its mount, and another one mounts it all the same.
        dunlin_runtime::volume::unmount(at).expect("unmount");
        assert!(is_open(&secret));
        let mounted = volume.mount_ready(at).expect("mount what was left open");
        mounted.unmount().expect("unmount");
        assert!(!is_open(&secret));

        // What was never finished is begun anew.
        let other = file.with_file_name("other.ext4");
        std::fs::write(other.with_extension("ext4.new"), b"half").expect("write");
        let secret = named(&secret, "other");
        LoopVolume::create_encrypted(&other, SIZE, secret.clone()).expect("create").mount_ready(at).expect("mount");
        dunlin_runtime::volume::unmount(at).expect("unmount");
        std::fs::remove_file(&other).expect("remove");
        let again = LoopVolume::create_encrypted(&other, SIZE, secret.clone()).expect("create under a name that is open still");
        again.mount_ready(at).expect("mount").unmount().expect("unmount");
    });
}

/// The mount ends with its namespace, as with a server that is killed and has its own; the device does not.
#[test]
fn what_a_namespace_leaves_open_is_closed_by_the_next() {
    where_possible(|file, at| {
        let secret = encryption("namespace");
        let volume = LoopVolume::create_encrypted(file, SIZE, secret.clone()).expect("create");
        let (volume, there) = (volume.clone(), at.to_owned());
        let mount = {
            let volume = volume.clone();
            move || {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS | nix::sched::CloneFlags::CLONE_NEWNS).expect("namespace");
                volume.mount_ready(&there).expect("mount");
                std::fs::write(there.join("kept"), CANARY).expect("write");
            }
        };
        std::thread::spawn(mount).join().expect("the thread ends");
        assert!(MountedVolume::find(at).expect("find").is_none());
        let start = std::time::Instant::now();
        let mounted = loop {
            match volume.mount_ready(at) {
                Err(VolumeError::InUse { .. }) if start.elapsed() < crate::DEADLINE => std::thread::yield_now(),
                mounted => break mounted.expect("mount"),
            }
        };
        assert_eq!(std::fs::read(at.join("kept")).expect("read"), CANARY);
        mounted.unmount().expect("unmount");
        assert!(!is_open(&secret));
    });
}

/// A copy is ciphertext of the same key, made while the volume is written to, and has a life of its own.
#[test]
fn it_grows_and_is_copied_while_it_is_used() {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let may = u64::from_str_radix(effective.trim(), 16).expect("a number") & (1 << 24) != 0;
    where_possible(move |file, at| {
        let secret = encryption("copied");
        let volume = LoopVolume::create_encrypted(file, SIZE, secret.clone()).expect("create");
        let mounted = volume.mount_ready(at).expect("mount");
        std::fs::write(at.join("kept"), CANARY).expect("write");
        let grown = volume.grow(Some(&mounted), 2 * SIZE).expect("grow");
        assert_eq!(grown, if may { Grown::Now } else { Grown::WhenMounted });
        assert_eq!((mounted.fills(2 * SIZE).expect("fills"), fs_bytes(&mounted) > SIZE), (may, may));
        let snapshot = file.with_file_name("snapshot.ext4");
        let taken = volume.snapshot(Some(&mounted), &snapshot).expect("snapshot");
        assert!(taken < 2 * SIZE, "what was never written is not copied: {taken}");
        std::fs::write(at.join("kept"), b"changed later").expect("the freeze is over");
        assert!(!has(&snapshot, CANARY));
        // As a power cut would leave it.
        let cut = file.with_file_name("cut.ext4");
        File::open(at.join("kept")).and_then(|file| file.sync_all()).expect("sync");
        std::fs::copy(file, &cut).expect("copy");

        let larger = file.with_file_name("larger.ext4");
        let copy = LoopVolume::create_copy(&larger, &snapshot, 3 * SIZE + HEADER_BYTES).expect("copy");
        let copy = copy.with_encryption(Some(named(&secret, "larger")));
        let beside = at.with_file_name("beside");
        std::fs::create_dir(&beside).expect("mount point");
        let second = copy.mount_ready(&beside).expect("mount beside what it is of");
        assert_eq!(std::fs::read(beside.join("kept")).expect("read"), CANARY);
        assert!(fs_bytes(&second) > 2 * SIZE, "a larger copy has a larger file system");
        second.unmount().expect("unmount");
        let cut = LoopVolume::open(&cut).expect("open").with_encryption(Some(named(&secret, "cut")));
        let second = cut.mount_ready(&beside).expect("mended and mounted");
        assert_eq!(std::fs::read(beside.join("kept")).expect("read"), b"changed later");
        second.unmount().expect("unmount");

        let device = mounted.device().to_owned();
        mounted.unmount().expect("unmount");
        assert!(!device.exists());
        let mounted = volume.mount_ready(at).expect("mount");
        assert!(fs_bytes(&mounted) > SIZE + SIZE / 2, "by now it has its size in any case");
        mounted.unmount().expect("unmount");
        volume.grow(None, 4 * SIZE).expect("grow");
        volume.ready().expect("ready");
        assert_eq!(volume.usage().map(|usage| usage.blocks * usage.block_size).expect("usage"), 4 * SIZE);
        let damaged = File::options().write(true).open(file).expect("open");
        damaged.write_all_at(&[0; 1 << 20], HEADER_BYTES).expect("overwrite");
        assert!(matches!(volume.ready(), Err(VolumeError::Unsound { tool: "e2fsck", .. })));
        assert!(!is_open(&secret), "nor does one that cannot be mended stay open");
    });
}

/// The others are as they were.
#[test]
fn a_plain_volume_needs_nothing_of_it() {
    in_private_mounts(|file, at| {
        let volume = LoopVolume::create_reserved(file, SIZE).expect("create");
        let mounted = volume.mount_ready(at).expect("mount");
        let device = mounted.device().to_owned();
        assert!(device.starts_with("/dev") && !device.starts_with("/dev/mapper"), "{}", device.display());
        mounted.unmount().expect("unmount");
        wait_until_free(&device);
        close("dunlin-test-of-no-volume").expect("there is none");
    });
}
