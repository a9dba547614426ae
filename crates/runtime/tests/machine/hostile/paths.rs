//! Files by which the kernel, the host and its processes are told what to do, or tell of themselves.

use super::*;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

/// Told by these, the kernel runs a program as the host's root, or does something to everybody.
#[rustfmt::skip]
const ORDERS: &[&str] = &[
    "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/panic_on_oom",
    "/proc/sys/vm/overcommit_memory", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_nonlocal_bind",
    "/proc/sys/kernel/hotplug", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity",
    "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state",
    "/sys/devices/system/cpu/cpu0/uevent",
];

/// They tell of the host, of its memory above all.
#[rustfmt::skip]
const TALES: &[(&str, &str)] = &[
    ("/proc/kcore", "empty"), ("/proc/keys", "empty"), ("/proc/timer_list", "empty"), ("/proc/interrupts", "empty"),
    ("/proc/kmsg", "EACCES"), ("/proc/kpagecount", "EACCES"), ("/proc/slabinfo", "EACCES"), ("/proc/vmallocinfo", "EACCES"),
];

#[test]
fn what_the_kernel_obeys_is_read_only() {
    let there: Vec<_> = ORDERS.iter().filter(|path| Path::new(path).exists()).collect();
    let before: Vec<_> = there.iter().map(|path| fs::read(path).ok()).collect();
    let attempts: Vec<Attempt> = there
        .iter()
        .flat_map(|path| {
            // The mount is read-only, and the file is not the machine's.
            let inside = "EROFS|EACCES";
            let writable = attempt(format!("open {path}"), "open_to_write", json!([path]), inside, Host::Says("done"));
            [writable, attempt(format!("write {path}"), "write", json!([path, "|/evil"]), inside, Host::Untried)]
        })
        .collect();
    assert!(attempts.len() > 10, "this kernel has hardly any of them");
    check(&World::new(), "ab03", &attempts);
    let after: Vec<_> = there.iter().map(|path| fs::read(path).ok()).collect();
    assert_eq!(before, after, "the host's settings changed");
}

#[test]
fn the_kernel_tells_no_tales() {
    let mut attempts: Vec<Attempt> = TALES
        .iter()
        .filter(|(path, _)| Path::new(path).exists())
        .map(|(path, inside)| attempt(*path, "read", json!([path]), inside, Host::Untried))
        .collect();
    assert!(attempts.len() >= 4, "this kernel has hardly any of them");
    // No control groups to steer by, `release_agent` among them, and nothing that firmware says.
    for dir in ["/sys/fs/cgroup", "/sys/firmware", "/sys/kernel/debug", "/sys/kernel/security", "/sys/fs/bpf"] {
        if Path::new(dir).exists() {
            attempts.push(attempt(dir, "listing", json!([dir]), "empty", Host::Untried));
        }
    }
    let devices = "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero";
    attempts.push(attempt("/dev", "listing", json!(["/dev"]), devices, Host::Further));
    let world = World::new();
    check(&world, "ab04", &attempts);
    let machine = world.run(python_spec(&world, "ab05"));
    let addresses = machine.exec("busybox awk '$1 !~ /^0+$/' /proc/kallsyms | busybox wc -l").0;
    assert_eq!(addresses, "0", "addresses of the kernel");
    let mounts = machine.exec("cat /proc/self/mountinfo").0;
    for kind in [" cgroup ", " cgroup2 ", " debugfs ", " tracefs ", " bpf ", " securityfs ", "shared:", "master:"] {
        assert!(!mounts.contains(kind), "{kind}: {mounts}");
    }
}

#[test]
fn the_first_process_shows_nothing_of_itself() {
    let of = |pid: &str, name: &str| format!("/proc/{pid}/{name}");
    let mut attempts = Vec::new();
    for name in ["mem", "environ", "maps", "auxv", "stack", "syscall"] {
        attempts.push(attempt(name, "read", json!([of("1", name)]), "EACCES", Host::Untried));
    }
    for name in ["exe", "root", "cwd", "ns/mnt", "ns/user", "ns/net"] {
        attempts.push(attempt(name, "readlink", json!([of("1", name)]), "EACCES", Host::Untried));
        attempts.push(attempt(format!("own {name}"), "readlink", json!([of("self", name)]), "done", Host::Says("done")));
    }
    attempts.push(attempt("fd", "listing", json!(["/proc/1/fd"]), "EACCES", Host::Further));
    attempts.push(attempt("oom_score_adj", "write", json!(["/proc/1/oom_score_adj", "-1000"]), "EACCES", Host::Untried));
    attempts.push(attempt("own oom_score_adj", "write", json!(["/proc/self/oom_score_adj", "-1"]), "EACCES", Host::Untried));
    check(&World::new(), "ab06", &attempts);
}

#[test]
fn sockets_of_the_host_without_a_file_are_not_there() {
    let name = format!("dunlin-test-{}", std::process::id());
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let attempts = [attempt("connect", "connect_abstract", json!([name]), "ECONNREFUSED", Host::Says("done"))];
    let world = World::new();
    check(&world, "ab07", &attempts);
    let machine = world.run(python_spec(&world, "ab08"));
    assert_eq!(machine.exec("busybox grep -c dunlin-test /proc/net/unix").0, "0");
    assert!(fs::read_to_string("/proc/net/unix").unwrap().contains(&name));
}
