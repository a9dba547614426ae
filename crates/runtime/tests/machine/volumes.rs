//! Volumes in machines.

use crate::setup::*;
use dunlin_runtime::volume::{LoopVolume, MountedVolume, VolumeError};
use dunlin_runtime::*;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

struct Kept {
    volume: LoopVolume,
    at: PathBuf,
}

impl Kept {
    fn new(world: &World) -> Self {
        let at = world.dir.path().join("at");
        fs::create_dir(&at).unwrap();
        Self { volume: LoopVolume::create_reserved(&world.dir.path().join("volume.ext4"), 32 << 20).unwrap(), at }
    }

    fn mount(&self) -> MountedVolume {
        until("a volume that nobody has", || match self.volume.ready().and_then(|()| self.volume.mount(&self.at)) {
            Err(VolumeError::InUse { .. }) => None,
            mounted => Some(mounted.unwrap()),
        })
    }

    fn bind(&self, target: &str) -> Vec<Bind> {
        vec![Bind { source: self.at.clone(), target: target.into(), readonly: false }]
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = dunlin_runtime::volume::unmount(&self.at); // usually not mounted
    }
}

#[test]
fn what_one_machine_writes_the_next_one_owns() {
    let world = World::new();
    let kept = Kept::new(&world);
    let mounted = kept.mount();
    let script = "echo mine > /data/file && busybox chown 1000:1000 /data/file && busybox chmod 4700 /data/file && busybox sync";
    let first = world.run(SupervisorSpec { volumes: kept.bind("/data"), ..world.spec("aa31", script) });
    assert_eq!(first.exit().exit_code, Some(0));
    assert_eq!(fs::metadata(kept.at.join("file")).unwrap().uid(), 1000, "the machine's id, not the range's");
    drop(first);
    mounted.unmount().unwrap();

    let mounted = kept.mount();
    let script = "cat /data/file; busybox stat -c %u:%g /data/file; busybox grep ' /data ' /proc/mounts; \
                  busybox mknod /data/null c 1 3; echo mknod=$?";
    let spec = SupervisorSpec { volumes: kept.bind("/data"), uid_base: UID_BASE + 2 * UID_RANGE, ..world.spec("aa32", script) };
    let second = world.run(spec);
    assert_eq!(second.exit().exit_code, Some(0));
    let log = second.log();
    assert!(log.contains(&"mine".to_owned()) && log.contains(&"1000:1000".to_owned()), "{log:?}");
    let line = log.iter().find(|line| line.contains(" /data ")).expect("mounted");
    assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
    assert!(log.contains(&"mknod=1".to_owned()), "{log:?}");
    drop(second);
    mounted.unmount().unwrap();
}

/// The end of a supervisor by `kill -9` leaves nothing that holds the volume.
#[test]
fn a_volume_is_free_once_its_machine_is_cleaned_up() {
    let world = World::new();
    let kept = Kept::new(&world);
    let mounted = kept.mount();
    let script = "echo kept > /data/file; busybox sync; echo up; exec sleep 1000";
    let machine = world.run(SupervisorSpec { volumes: kept.bind("/data"), ..world.spec("aa33", script) });
    until("up", || machine.log().contains(&"up".to_owned()).then_some(()));
    assert!(matches!(kept.volume.ready(), Err(VolumeError::InUse { .. })), "one mount at a time");
    let supervisor = lock_holder(machine.dir()).unwrap().expect("a supervisor");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(supervisor), nix::sys::signal::Signal::SIGKILL).unwrap();
    drop(machine); // cleans up
    mounted.unmount().unwrap();
    let mounted = kept.mount();
    assert_eq!(fs::read_to_string(kept.at.join("file")).unwrap(), "kept\n");
    mounted.unmount().unwrap();
}

/// Links of the image lead nowhere but into it.
#[test]
fn a_mounts_destination_stays_in_the_machine() {
    let world = World::new();
    let kept = Kept::new(&world);
    std::os::unix::fs::symlink("/../../../../../../tmp", world.dir.path().join("layer/out")).unwrap();
    let mounted = kept.mount();
    let machine = world.run(SupervisorSpec { volumes: kept.bind("/out/deep/data"), ..world.spec("aa34", "ls -d /tmp/deep/data") });
    assert_eq!(machine.exit().exit_code, Some(0));
    assert!(!std::path::Path::new("/tmp/deep").exists());
    drop(machine);
    mounted.unmount().unwrap();
}
