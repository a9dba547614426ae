//! Taking all there is of something that the kernel counts: the host and a neighbour must not notice.

use super::*;

/// Takes until the kernel refuses, says how many it got, and holds them.
const HOLD: &str = r#"
import ctypes, errno, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def inotify(i): return libc.inotify_init1(0)
def files(i): return libc.open(b"/", 0)
def timers(i):
    out = ctypes.c_long()
    return libc.timer_create(1, None, ctypes.byref(out))
def queues(i):
    os.umask(0)
    attributes = (ctypes.c_long * 8)(0, 10, 8192)
    return libc.mq_open(b"/q%d" % i, os.O_CREAT | os.O_RDWR, 0o666, attributes)
def processes(i):
    child = libc.fork()
    if child == 0:
        time.sleep(1000 if most > 1 else 0)
        os._exit(0)
    return child
take, most = {"inotify": inotify, "files": files, "timers": timers, "queues": queues, "processes": processes}[sys.argv[1]], int(sys.argv[2])
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
taken = 0
while taken < most and take(taken) != -1:
    taken += 1
print(taken, "all" if taken == most else errno.errorcode[ctypes.get_errno()], flush=True)
if most > 1: time.sleep(1000)
"#;

/// What a machine's greed must leave to others, who only want one.
#[test]
fn what_a_machine_takes_all_of_is_there_for_others() {
    let world = World::new();
    let hold = world.dir.path().join("hold.py");
    fs::write(&hold, HOLD).unwrap();
    let mut noticed = Vec::new();
    for (i, kind) in ["inotify", "timers", "queues", "files", "processes"].into_iter().enumerate() {
        let mut neighbour = python_spec(&world, &format!("ac1{i}"));
        fs::copy(&hold, world.dir.path().join("layer/hold.py")).unwrap();
        neighbour.uid_base = UID_BASE + UID_RANGE;
        let neighbour = world.run(neighbour);
        let mut greedy = python_spec(&world, &format!("ac0{i}"));
        greedy.process.command = [PYTHON, "/hold.py", kind, "2000000"].map(str::to_owned).into();
        let greedy = world.run(greedy);
        let taken = until("it has all", || greedy.log().first().cloned());
        let got = neighbour.exec(&format!("{PYTHON} /hold.py {kind} 1")).0;
        let here = Command::new(PYTHON).arg(&hold).args([kind, "1"]).output().unwrap();
        let here = String::from_utf8_lossy(&here.stdout).trim().to_owned();
        println!("{kind}: {taken}; the neighbour {got}, the host {here}");
        if (got.as_str(), here.as_str()) != ("1 all", "1 all") || taken.contains("all") {
            noticed.push(format!("{kind}: {taken}; the neighbour {got}, the host {here}"));
        }
    }
    assert!(noticed.is_empty(), "{noticed:#?}");
}

const BOMB: &str = "
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.001)
";

/// Forks as fast as it can, each child too, until the kernel has no more for it; then it is ended whole.
#[test]
fn a_fork_bomb_is_a_machines_own() {
    let world = World::new();
    let neighbour = world.run(world.spec("ac21", "sleep 1000"));
    let mut bomb = python_spec(&world, "ac20");
    bomb.process.command = [PYTHON, "-c", BOMB].map(str::to_owned).into();
    let bomb = world.run(bomb);
    let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("ac20")).unwrap();
    until("it has gone off", || (cgroup.usage().unwrap().pids >= 60).then_some(()));
    for _ in 0..20 {
        assert!(cgroup.usage().unwrap().pids <= 64);
        assert_eq!(neighbour.exec("echo well; true & wait").0, "well");
    }
    bomb.client().status().unwrap();
    bomb.client().kill().unwrap();
    bomb.exit();
    assert!(cgroup.is_empty().unwrap_or(true));
}

/// The kernel ends it, and it is told as what it was; a neighbour of the same size does not notice.
#[test]
fn memory_ends_whom_it_is_missing_to() {
    let world = World::new();
    let neighbour = world.run(world.spec("ac31", "sleep 1000"));
    let machine = world.run(world.spec("ac30", "busybox tail /dev/zero"));
    let exit = machine.exit();
    assert!(exit.oom_killed, "{exit:?}");
    // Memory that is no process's own, in files, counts too.
    let filler = world.run(world.spec("ac32", "while :; do dd if=/dev/zero of=/dev/shm/fill bs=1M count=60; cat /dev/shm/fill /dev/shm/fill | busybox tail -c 50000000 >/dev/null; done"));
    until("a process was ended for it", || {
        let cgroup = world.cgroups.open(&SupervisorSpec::machine_cgroup("ac32")).unwrap();
        (cgroup.oom_kills().unwrap() > 0).then_some(())
    });
    filler.client().status().unwrap();
    assert_eq!(neighbour.exec("echo well").0, "well");
    neighbour.client().status().unwrap();
}

/// All bytes, then all inodes, of its root file system: it is told that there are no more, and goes on.
#[test]
fn a_full_root_file_system_is_its_machines_own() {
    let world = World::new();
    let neighbour = world.run(SupervisorSpec { uid_base: UID_BASE + UID_RANGE, ..world.spec("ac41", "sleep 1000") });
    let greedy = world.run(world.spec(
        "ac40",
        "dd if=/dev/zero of=/fill bs=1M 2>&1 | busybox grep -o 'No space'; busybox stat -c %s /fill; \
         busybox rm /fill; busybox mkdir /many; i=0; while true > /many/$i; do i=$((i+1)); done 2>/dev/null; echo $i; \
         exec sleep 1000",
    ));
    until("it has all", || (greedy.log().len() == 3).then_some(()));
    let log = greedy.log();
    let (bytes, inodes): (u64, u64) = (log[1].parse().unwrap(), log[2].parse().unwrap());
    assert_eq!(log[0], "No space");
    assert!((ROOTFS_BYTES / 2..ROOTFS_BYTES).contains(&bytes), "{bytes}");
    assert!((1000..ROOTFS_BYTES / 2048).contains(&inodes), "{inodes}");
    assert_eq!(greedy.exec("true > /one-more || echo refused").0.lines().last(), Some("refused"));
    assert_eq!(neighbour.exec("dd if=/dev/zero of=/mine bs=1M count=8 2>/dev/null && true > /one-more && echo well").0, "well");
    fs::write(world.dir.path().join("host"), vec![1; 1 << 20]).unwrap();
    greedy.client().status().unwrap();
    // It can help itself.
    assert_eq!(greedy.exec("busybox rm -r /many && echo again > /one-more && cat /one-more").0, "again");
}
