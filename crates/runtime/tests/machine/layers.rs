//! What machines write to: how much of it there is, how long it lasts, and what is left of it.

use crate::setup::*;
use dunlin_runtime::layer::{ready_kept, template};
use dunlin_runtime::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;

/// Loop devices that have a file below the test's directory.
fn devices(world: &World) -> Vec<String> {
    let dir = world.dir.path().to_str().unwrap();
    let entries = fs::read_dir("/sys/block").unwrap().flatten();
    let files = entries.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    files.filter(|file| file.contains(dir)).collect()
}

fn freed(world: &World) {
    until("the loop devices are free", || devices(world).is_empty().then_some(()));
}

#[test]
fn what_passes_is_gone_with_its_machine_whoever_is_killed() {
    let world = World::new();
    let machine = world.run(world.spec("af10", "echo > /mine; exec sleep 1000"));
    until("written", || (machine.exec("ls /mine").1 == 0).then_some(()));
    assert_eq!(devices(&world).len(), 1);
    let supervisor = lock_holder(machine.dir()).unwrap().unwrap();
    kill(Pid::from_raw(supervisor), Signal::SIGKILL).unwrap();
    until("the lock is free", || lock_holder(machine.dir()).unwrap().is_none().then_some(()));
    cleanup(machine.dir(), "af10", &world.cgroups, None).unwrap();
    freed(&world);
    let left: Vec<_> = fs::read_dir(machine.dir()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| ["lock", "exit", "log", "mnt"].iter().any(|known| name == known)), "{left:?}");
    // Nor does a supervisor that is killed on its way leave any.
    for (i, point) in ["supervisor.before-make", "supervisor.before-join", "supervisor.before-announce"].iter().enumerate() {
        let id = format!("af1{}", i + 1);
        let spec = SupervisorSpec { kill_at: Some((*point).to_owned()), ..world.spec(&id, "sleep 1000") };
        assert!(spawn(&world.exe, &spec).is_err());
        until("the lock is free", || lock_holder(&spec.machine_dir).unwrap().is_none().then_some(()));
        cleanup(&spec.machine_dir, &id, &world.cgroups, None).unwrap();
        freed(&world);
    }
}

#[test]
fn what_is_kept_is_found_again_and_grows() {
    let world = World::new();
    let templates = world.dir.path().join("layers");
    let file = world.dir.path().join("machines/af20/kept/root.ext4");
    let kept = |attempt, script: &str, size_bytes| {
        ready_kept(&file, &templates, size_bytes).unwrap();
        let mut spec = SupervisorSpec { attempt, ..world.spec("af20", script) };
        let Rootfs::Layers { writable, .. } = &mut spec.rootfs else { panic!("a root of layers") };
        *writable = layer::WritableLayer::Kept { file: file.clone() };
        world.run(spec)
    };
    let blocks = "busybox df -k / | busybox tail -n 1 | busybox awk '{print $2}'";
    let first = kept(1, &format!("echo one > /etc/mine; busybox chown 1000 /etc/mine; {blocks}"), ROOTFS_BYTES);
    assert_eq!(first.exit().exit_code, Some(0));
    let small: u64 = first.log()[0].parse().unwrap();
    drop(first);
    let second = kept(2, &format!("cat /etc/mine; busybox stat -c %u /etc/mine; {blocks}; exec sleep 1000"), 2 * ROOTFS_BYTES);
    until("printed", || (second.log().len() == 1 + 3).then_some(()));
    let log = second.log().split_off(1);
    assert_eq!(log[..2], ["one", "1000"]);
    assert!(log[2].parse::<u64>().unwrap() > small * 3 / 2, "{log:?}, {small} before");
    // It was in use, and is whole after a kill of all.
    second.client().kill().unwrap();
    second.exit();
    drop(second);
    let third = kept(3, "cat /etc/mine", ROOTFS_BYTES);
    assert_eq!((third.exit().exit_code, third.log().last().map(String::as_str)), (Some(0), Some("one")));
    drop(third);
    freed(&world);
}

#[test]
fn temporary_directories_are_empty_bounded_and_everybodys() {
    let world = World::new();
    let small = template(&world.dir.path().join("layers"), 16 << 20, false).unwrap();
    let with_dirs = |attempt, script: &str| {
        let mut spec = SupervisorSpec { attempt, ..world.spec("af30", script) };
        let dir = |target: &str, storage| TempDir { target: target.into(), storage };
        spec.temp_dirs = vec![
            dir("/cache", TempStorage::Memory { size_bytes: 8 << 20 }),
            dir("/var/work", TempStorage::Disk(layer::WritableLayer::Passing { template: small.clone() })),
        ];
        spec.process.user = "app".into();
        world.run(spec)
    };
    let fill = "for d in /cache /var/work; do ls $d; dd if=/dev/zero of=$d/fill bs=64k 2>/dev/null; busybox stat -c %s $d/fill; done";
    let first = with_dirs(1, fill);
    assert_eq!(first.exit().exit_code, Some(0));
    let sizes: Vec<u64> = first.log().iter().map(|line| line.parse().unwrap()).collect();
    assert!(sizes[0] == 8 << 20 && (8 << 20..=16 << 20).contains(&sizes[1]), "{sizes:?}");
    let before = first.log().len();
    drop(first);
    let second = with_dirs(2, "ls /cache /var/work; busybox mkfifo /var/work/p && echo made; i=0; while true > /cache/$i; do i=$((i+1)); done 2>/dev/null; echo $i; exec sleep 1000");
    let number = |log: Vec<String>| log.iter().find_map(|line| line.parse::<u64>().ok());
    let files = until("printed", || number(second.log().split_off(before)));
    assert!(!second.log().iter().any(|line| line == "fill"), "{:?}", second.log());
    assert!((1000..4096).contains(&files), "{files}");
    let mounts = second.exec("cat /proc/self/mounts").0;
    for path in [" /cache ", " /var/work "] {
        let line = mounts.lines().find(|line| line.contains(path)).unwrap();
        assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
    }
}

/// What a start costs of it, in steps. Prints; asserts nothing of time.
#[test]
#[ignore = "a measurement"]
fn how_long_a_start_takes() {
    let world = World::new();
    let mut times = Vec::new();
    for i in 0..40 {
        let began = std::time::Instant::now();
        let machine = world.run(world.spec(&format!("af4{i}"), "exec sleep 1000"));
        times.push(began.elapsed());
        drop(machine);
    }
    times.sort();
    println!("spawn: p50 {:?}, p90 {:?}", times[20], times[36]);
}
