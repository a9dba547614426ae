//! Volumes of machines, on the host that keeps them.

use crate::setup::{PATIENCE, World};
use dunlin_api::{CommandKind, HostApi, Refusal, VolumeEncryption};
use dunlin_model::volume::{VolumeRow, VolumeSource};
use dunlin_model::{MachineId, MachineState, SnapshotId, VolumeId};
use serde_json::json;
use std::path::PathBuf;

/// Encrypted wherever they can be, so that all that is said here holds for those as well.
fn is_encrypted() -> bool {
    dunlin_runtime::volume::look().is_ok()
}

/// Of the file of a volume of so many GiB.
fn file_bytes(size_gb: u64) -> u64 {
    (size_gb << 30) + if is_encrypted() { dunlin_runtime::volume::HEADER_BYTES } else { 0 }
}

fn volume(world: &mut World, n: u8, size_gb: u32, source: Option<VolumeSource>) -> VolumeId {
    let row = row(n, size_gb, source);
    let id = row.id.clone();
    world.config.volumes.insert(id.clone(), row);
    world.publish();
    id
}

fn row(n: u8, size_gb: u32, source: Option<VolumeSource>) -> VolumeRow {
    let id = VolumeId::from_random([n; 8]);
    VolumeRow {
        id,
        name: "data".into(),
        org: "personal".parse().unwrap(),
        app: "web".parse().unwrap(),
        host: "h1".parse().unwrap(),
        region: "local".parse().unwrap(),
        size_gb,
        created_at_ms: 0,
        snapshot_retention: 5,
        auto_backup: false,
        encrypted: is_encrypted(),
        source,
    }
}

fn with(id: &VolumeId) -> impl FnOnce(&mut serde_json::Value) {
    move |spec| spec["mounts"] = json!([{ "volume": id, "name": "data", "path": "/data" }])
}

fn dir(world: &World, id: &VolumeId) -> PathBuf {
    world.dir.path().join("volumes").join(id.as_str())
}

fn printed(world: &World, id: &MachineId, line: &str) {
    world.until(&format!("{id} prints {line}"), || world.printed(id).contains(&line.to_owned()).then_some(()));
}

fn mounts(of: &std::path::Path) -> usize {
    std::fs::read_to_string("/proc/self/mounts").unwrap().matches(of.to_str().unwrap()).count()
}

pub fn a_volume_outlives_its_machines_and_goes_with_its_tombstone() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    let first = world.ended(1, "echo kept > /data/file", with(&id));
    world.until("it lets go", || (mounts(&dir(&world, &id)) == 0).then_some(()));
    let second = world.started(2, "cat /data/file; id -u; echo more >> /data/file; exec sleep 1000", with(&id));
    printed(&world, &second, "kept");
    // One machine at a time: it waits, and the volume comes free with the end of the other.
    let third = world.created(3, "cat /data/file; exec sleep 1000", with(&id));
    world.command(&third, CommandKind::Start).unwrap();
    world.destroy(&second);
    world.destroy(&first);
    printed(&world, &third, "more");
    // Without a row and without a tombstone it stays.
    let row = world.config.volumes.remove(&id).unwrap();
    world.publish();
    world.destroy(&third);
    world.until("it lets go", || (mounts(&dir(&world, &id)) == 0).then_some(()));
    assert!(dir(&world, &id).join("data.ext4").exists());
    world.config.volume_tombstones.insert(id.clone(), row.host);
    world.publish();
    world.until("its files are gone", || (!dir(&world, &id).exists()).then_some(()));
}

fn is_open(id: &VolumeId) -> bool {
    let blocks = std::fs::read_dir("/sys/block").unwrap().flatten();
    let names = blocks.filter_map(|entry| std::fs::read_to_string(entry.path().join("dm/name")).ok());
    names.into_iter().any(|name| name.trim_end() == format!("dunlin-{id}"))
}

/// Where it can be encrypted; elsewhere there is none, and it is said why.
pub fn what_is_to_be_encrypted_is_so_or_is_not_made() {
    let mut world = World::new();
    // From the beginning: the host makes what it hears of.
    let row = VolumeRow { encrypted: true, ..row(1, 1, None) };
    let id = row.id.clone();
    world.config.volumes.insert(id.clone(), row);
    world.publish();
    let offer = world.block_on(world.host().volume_encryption()).unwrap();
    let made = world.block_on(world.host().volume(&id, 1));
    let VolumeEncryption::Offered = offer else {
        let VolumeEncryption::Lacking { what, fix } = offer else { unreachable!() };
        assert!(!is_encrypted() && !what.is_empty() && !fix.is_empty(), "{what}; {fix}");
        let why = made.unwrap_err().to_string();
        assert!(why.contains("cryptsetup"), "{why}");
        assert!(!dir(&world, &id).join("data.ext4").exists());
        return;
    };
    let status = made.unwrap();
    assert_eq!(status.blocks * status.block_size, 1 << 30, "the header takes nothing from the tenant");
    assert!(!is_open(&id), "while nobody has it, nobody reads it");
    let sealed = std::fs::read_to_string(dir(&world, &id).join("key")).unwrap();
    let key = world.host_config().key.open(&format!("volume/{id}"), &sealed).unwrap();
    assert_eq!(key.len(), 32);
    let machine = world.started(1, "echo 'nobody else reads this' > /data/file; /bin/busybox sync; echo up; exec sleep 1000", with(&id));
    printed(&world, &machine, "up");
    assert!(is_open(&id));
    let (file, canary) = (dir(&world, &id).join("data.ext4"), b"nobody else reads this");
    let beginning = &mut vec![0; 64 << 20];
    std::io::Read::read_exact(&mut std::fs::File::open(&file).unwrap(), beginning).unwrap();
    assert!(!beginning.windows(canary.len()).any(|window| window == canary));

    // A copy has a key file of its own, which opens nothing under another name.
    let forked = volume(&mut world, 2, 1, Some(VolumeSource { volume: id.clone(), snapshot: None }));
    let other = world.ended(2, "cat /data/file", with(&forked));
    assert_eq!(world.printed(&other), ["nobody else reads this"]);
    world.until("it lets go", || (!is_open(&forked)).then_some(()));
    let kept = std::fs::read_to_string(dir(&world, &forked).join("key")).unwrap();
    std::fs::write(dir(&world, &forked).join("key"), &sealed).unwrap();
    let why = world.block_on(world.host().volume(&forked, 1)).unwrap_err().to_string();
    assert!(why.contains("cannot be opened") && why.contains("sealed"), "{why}");
    std::fs::remove_file(dir(&world, &forked).join("key")).unwrap();
    let why = world.block_on(world.host().volume(&forked, 1)).unwrap_err().to_string();
    assert!(why.contains("is gone, without which nobody reads it"), "{why}");
    std::fs::write(dir(&world, &forked).join("key"), kept).unwrap();

    // An agent that starts again finds it open, and its machine writing.
    world.stop_host();
    world.start_host();
    world.wait_for(&machine, MachineState::Started);
    assert!(is_open(&id));
    world.destroy(&machine);
    world.until("it is closed", || (!is_open(&id)).then_some(()));
    let host = world.config.volumes.remove(&id).unwrap().host;
    let image = std::fs::File::open(&file).unwrap();
    world.config.volume_tombstones.insert(id.clone(), host);
    world.publish();
    world.until("its files are gone", || (!dir(&world, &id).exists()).then_some(()));
    let header = &mut [1; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&image, header, 0).unwrap();
    assert_eq!(header, &[0; 4096], "who holds the file still holds nothing that a key opens");
}

pub fn a_volume_survives_the_ends_of_agents_and_supervisors() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    let script = "echo attempt >> /data/log; sync; echo up; exec sleep 1000";
    let again = |spec: &mut serde_json::Value| {
        with(&id)(spec);
        spec["restart"] = json!({ "policy": "always", "max_retries": 0 });
    };
    let machine = world.started(1, &script.replace("sync", "/bin/busybox sync"), again);
    printed(&world, &machine, "up");
    world.stop_host();
    assert_eq!(mounts(&dir(&world, &id)), 1, "the machine lives on, and so does its volume");
    world.start_host();
    world.wait_for(&machine, MachineState::Started);
    let lines = |world: &World| {
        let log = dir(world, &id).join("mnt/log");
        std::fs::read_to_string(log).unwrap_or_default().lines().count()
    };
    assert_eq!(lines(&world), 1);
    let supervisor = dunlin_runtime::lock_holder(&world.machine_dir(&machine)).unwrap().expect("it lives");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    world.until("the next attempt writes to it", || (lines(&world) == 2).then_some(()));
    assert_eq!(mounts(&dir(&world, &id)), 1);
    world.destroy(&machine);
    world.until("it lets go", || (mounts(&dir(&world, &id)) == 0).then_some(()));
}

pub fn a_full_volume_is_its_tenants_problem_and_grows() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    // Most of it is taken without writing it, which an emulated processor that encrypts would do for minutes.
    let script = "[ -e /data/big ] || { /bin/busybox fallocate -l 900M /data/big; dd if=/dev/zero of=/data/more bs=1M; }; echo full; exec sleep 1000";
    let machine = world.started(1, script, with(&id));
    printed(&world, &machine, "full");
    let status = world.block_on(world.host().volume(&id, 1)).unwrap();
    assert!(status.blocks_avail * status.block_size < 8 << 20, "{status:?}");
    assert!(world.printed(&machine).iter().any(|line| line.contains("No space left")), "{:?}", world.printed(&machine));

    world.config.volumes.get_mut(&id).unwrap().size_gb = 2;
    world.publish();
    let grown = world.until("it has its new size", || {
        let length = std::fs::metadata(dir(&world, &id).join("data.ext4")).unwrap().len();
        (length == file_bytes(2)).then(|| world.block_on(world.host().volume(&id, 1)).unwrap())
    });
    let larger = |status: dunlin_api::VolumeStatus| status.blocks_avail * status.block_size > 900 << 20;
    // Where the kernel does not let this process resize, the next start does.
    assert_eq!(larger(grown), !grown.needs_restart, "{grown:?}");
    world.command(&machine, CommandKind::Restart { signal: None, timeout_ms: None }).unwrap();
    world.until("it runs again", || (world.printed(&machine).iter().filter(|line| *line == "full").count() == 2).then_some(()));
    world.wait_for(&machine, MachineState::Started);
    let status = world.block_on(world.host().volume(&id, 2)).unwrap();
    assert!(larger(status) && !status.needs_restart, "{status:?}");
}

pub fn snapshots_are_restored_and_volumes_forked() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    let script = "echo one > /data/file; echo up; while [ ! -e /data/go ]; do sleep 0.1; done; echo two > /data/file; /bin/busybox sync; echo done; exec sleep 1000";
    let machine = world.started(1, script, with(&id));
    printed(&world, &machine, "up");
    let snapshot = SnapshotId::from_random([7; 8]);
    let made = world.block_on(world.host().snapshot(&id, &snapshot)).unwrap();
    assert!(made.size > 0 && made.size < made.volume_size, "{made:?}");
    assert_eq!(world.block_on(world.host().snapshot(&id, &snapshot)).unwrap(), made, "a repeat makes no other");
    std::fs::write(dir(&world, &id).join("mnt/go"), "").unwrap();
    printed(&world, &machine, "done");
    let restored = volume(&mut world, 2, 1, Some(VolumeSource { volume: id.clone(), snapshot: Some(snapshot) }));
    let forked = volume(&mut world, 3, 2, Some(VolumeSource { volume: id.clone(), snapshot: None }));
    let old = world.ended(2, "cat /data/file", with(&restored));
    let new = world.ended(3, "cat /data/file", with(&forked));
    assert_eq!((world.printed(&old), world.printed(&new)), (vec!["one".to_owned()], vec!["two".to_owned()]));
    let listed = world.block_on(world.host().snapshots(&id)).unwrap();
    assert_eq!(listed, [made]);
    let gone = VolumeId::from_random([9; 8]);
    assert_eq!(world.block_on(world.host().volume(&gone, 1)), Err(Refusal::NoSuchVolume(gone)));
}

/// A volume whose files are lost does not begin anew and empty.
pub fn lost_files_are_said_to_be_lost() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    world.block_on(world.host().volume(&id, 1)).unwrap();
    std::fs::remove_file(dir(&world, &id).join("data.ext4")).unwrap();
    let machine = world.assign(1, "true", with(&id));
    let fact = world.wait_for(&machine, MachineState::Failed);
    assert!(fact.problem.is_some_and(|problem| problem.contains("are gone")), "within {PATIENCE:?}");
    assert!(!dir(&world, &id).join("data.ext4").exists());
}

/// One a day, by the host itself; what is damaged is not restored.
pub fn a_snapshot_is_made_each_day_and_is_what_it_was() {
    let mut world = World::new();
    let id = volume(&mut world, 1, 1, None);
    let machine = world.ended(1, "echo kept > /data/file", with(&id));
    assert_eq!(world.block_on(world.host().snapshots(&id)).unwrap(), []);
    // It was made in 1970, so that one is due.
    world.config.volumes.get_mut(&id).unwrap().auto_backup = true;
    world.publish();
    world.stop_host();
    world.start_host();
    let made = world.until("the snapshot of the day", || {
        world.block_on(world.host().snapshots(&id)).unwrap().pop()
    });
    assert!(made.scheduled && made.digest.starts_with("sha256:") && made.retention_days == 5, "{made:?}");
    world.stop_host();
    world.start_host();
    let asked = world.block_on(world.host().snapshot(&id, &SnapshotId::from_random([8; 8]))).unwrap();
    assert_eq!(world.block_on(world.host().snapshots(&id)).unwrap().len(), 2, "one a day, and the one that was asked for");
    assert_eq!(asked.digest, made.digest, "nothing was written in between");
    let restored = volume(&mut world, 2, 1, Some(VolumeSource { volume: id.clone(), snapshot: Some(made.id.clone()) }));
    let other = world.ended(2, "cat /data/file", with(&restored));
    assert_eq!(world.printed(&other), ["kept"]);
    let file = dir(&world, &id).join(format!("snapshots/{}.ext4", made.id));
    let damaged = std::fs::File::options().write(true).open(&file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&damaged, b"rot", 1 << 20).unwrap();
    let refused = volume(&mut world, 3, 1, Some(VolumeSource { volume: id.clone(), snapshot: Some(made.id) }));
    let why = world.block_on(world.host().volume(&refused, 1)).unwrap_err();
    assert!(format!("{why}").contains("damaged"), "{why}");
    world.destroy(&machine);
}
