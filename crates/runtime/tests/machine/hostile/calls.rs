//! System calls, one after the other. Arguments are such that on the host they end in another error, or harmlessly.

use super::*;

/// In a machine these are refused before the kernel looks at them.
#[rustfmt::skip]
const REFUSED: &[(&str, i64, &str, Host)] = &[
    // Mounts, and ways to other roots.
    ("mount", libc::SYS_mount, r#"["none", "/no/such/place", "tmpfs", 0, 0]"#, Host::Says("ENOENT")),
    ("umount2", libc::SYS_umount2, r#"["/no/such/place", 0]"#, Host::Says("ENOENT")),
    ("pivot_root", libc::SYS_pivot_root, r#"["/no/such/place", "/no/such/place"]"#, Host::Says("ENOENT")),
    ("chroot", libc::SYS_chroot, r#"["/"]"#, Host::Says("done")),
    ("open_tree", libc::SYS_open_tree, r#"[-1, "x", 0]"#, Host::Further),
    ("move_mount", libc::SYS_move_mount, r#"[-1, "x", -1, "x", 0]"#, Host::Further),
    ("fsopen", libc::SYS_fsopen, r#"["no-such-file-system", 0]"#, Host::Says("ENODEV")),
    ("fsconfig", libc::SYS_fsconfig, "[-1, 0, 0, 0, 0]", Host::Further),
    ("fsmount", libc::SYS_fsmount, "[-1, 0, 0]", Host::Further),
    ("fspick", libc::SYS_fspick, r#"[-1, "x", 0]"#, Host::Further),
    ("mount_setattr", libc::SYS_mount_setattr, r#"[-1, "x", 0, 0, 0]"#, Host::Further),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, "[-1, 0, 0]", Host::Further),
    ("name_to_handle_at", libc::SYS_name_to_handle_at, r#"[-1, "x", 0, 0, 0]"#, Host::Further),
    // Namespaces: in one of his own a tenant would have every capability, and with them the parts of the kernel
    // that only the host's root used to reach.
    ("setns", libc::SYS_setns, "[-1, 0]", Host::Says("EBADF")),
    ("unshare user", libc::SYS_unshare, "[268435456]", Host::Says("done")),
    ("unshare mount", libc::SYS_unshare, "[131072]", Host::Says("done")),
    ("unshare net", libc::SYS_unshare, "[1073741824]", Host::Says("done")),
    ("unshare cgroup", libc::SYS_unshare, "[33554432]", Host::Says("done")),
    ("unshare pid", libc::SYS_unshare, "[536870912]", Host::Says("done")),
    ("unshare time", libc::SYS_unshare, "[128]", Host::Further),
    ("unshare user and cgroup", libc::SYS_unshare, "[301989888]", Host::Says("done")),
    ("clone user", libc::SYS_clone, "[268435473, 0, 0, 0, 0]", Host::Says("done")),
    ("clone net", libc::SYS_clone, "[1073741841, 0, 0, 0, 0]", Host::Says("done")),
    ("clone pid", libc::SYS_clone, "[536870929, 0, 0, 0, 0]", Host::Says("done")),
    // Other processes.
    ("ptrace", libc::SYS_ptrace, "[0, 0, 0, 0]", Host::Says("done")),
    ("process_vm_readv", libc::SYS_process_vm_readv, "[1, 0, 0, 0, 0, 0]", Host::Says("done")),
    ("process_vm_writev", libc::SYS_process_vm_writev, "[1, 0, 0, 0, 0, 0]", Host::Says("done")),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, "[-1, 0, 0]", Host::Further),
    ("kcmp", libc::SYS_kcmp, "[-1, -1, 0, 0, 0]", Host::Says("ESRCH")),
    // Key rings: they have no namespace.
    ("keyctl session", libc::SYS_keyctl, "[0, -3, 0]", Host::Further),
    ("add_key", libc::SYS_add_key, r#"["no-such-type", "x", 0, 0, -3]"#, Host::Further),
    ("request_key", libc::SYS_request_key, r#"["no-such-type", "x", 0, 0]"#, Host::Further),
    // Large parts of the kernel that most programs do without.
    ("bpf", libc::SYS_bpf, "[9999, 0, 0]", Host::Further),
    ("perf_event_open", libc::SYS_perf_event_open, "[0, 0, -1, -1, 0]", Host::Further),
    ("userfaultfd", libc::SYS_userfaultfd, "[0]", Host::Further),
    ("io_uring_setup", libc::SYS_io_uring_setup, "[1, 0]", Host::Further),
    ("io_uring_enter", libc::SYS_io_uring_enter, "[-1, 0, 0, 0, 0, 0]", Host::Further),
    ("io_uring_register", libc::SYS_io_uring_register, "[-1, 0, 0, 0]", Host::Further),
    ("fanotify_init", libc::SYS_fanotify_init, "[-1, 0]", Host::Further),
    // The computer itself.
    ("init_module", libc::SYS_init_module, r#"["x", 1, ""]"#, Host::Further),
    ("finit_module", libc::SYS_finit_module, r#"[-1, "", 0]"#, Host::Further),
    ("delete_module", libc::SYS_delete_module, r#"["no_such_module", 0]"#, Host::Further),
    ("kexec_load", libc::SYS_kexec_load, "[0, 0, 0, 65535]", Host::Further),
    ("reboot", libc::SYS_reboot, "[0, 0, 0, 0]", Host::Further),
    ("swapon", libc::SYS_swapon, r#"["/no/such/place", 0]"#, Host::Further),
    ("swapoff", libc::SYS_swapoff, r#"["/no/such/place"]"#, Host::Further),
    ("acct", libc::SYS_acct, r#"["/no/such/place"]"#, Host::Further),
    ("quotactl", libc::SYS_quotactl, r#"[0, "/no/such/place", 0, 0]"#, Host::Further),
    ("settimeofday", libc::SYS_settimeofday, "[1, 0]", Host::Further),
    ("clock_settime", libc::SYS_clock_settime, "[0, 1]", Host::Further),
    ("sethostname", libc::SYS_sethostname, "[1, 4]", Host::Says("EFAULT")),
    ("setdomainname", libc::SYS_setdomainname, "[1, 4]", Host::Says("EFAULT")),
    ("syslog", libc::SYS_syslog, "[10, 0, 0]", Host::Says("done")),
    ("personality without address randomisation", libc::SYS_personality, "[262144]", Host::Says("done")),
    // Devices, and characters pushed into somebody's terminal.
    ("mknod char", libc::SYS_mknodat, r#"[-100, "/no/such/place", 8630, 259]"#, Host::Says("ENOENT")),
    ("mknod block", libc::SYS_mknodat, r#"[-100, "/no/such/place", 25014, 1792]"#, Host::Says("ENOENT")),
    ("ioctl TIOCSTI", libc::SYS_ioctl, "[-1, 21522, 0]", Host::Says("EBADF")),
    ("ioctl TIOCLINUX", libc::SYS_ioctl, "[-1, 21532, 0]", Host::Says("EBADF")),
    // Sockets that see or say more than a machine's own packets.
    ("socket packet", libc::SYS_socket, "[17, 3, 0]", Host::Says("done")),
    ("socket raw", libc::SYS_socket, "[2, 3, 1]", Host::Says("done")),
    ("socket raw with own header", libc::SYS_socket, "[2, 3, 255]", Host::Says("done")),
    ("socket raw IPv6", libc::SYS_socket, "[10, 3, 58]", Host::Further),
    ("socket vsock", libc::SYS_socket, "[40, 1, 0]", Host::Further),
    ("socket alg", libc::SYS_socket, "[38, 5, 0]", Host::Further),
    ("socket key", libc::SYS_socket, "[15, 3, 2]", Host::Further),
    ("socket xdp", libc::SYS_socket, "[44, 3, 0]", Host::Further),
    ("socket bluetooth", libc::SYS_socket, "[31, 3, 1]", Host::Further),
    ("socket SCTP", libc::SYS_socket, "[2, 1, 132]", Host::Further),
    ("socket DCCP", libc::SYS_socket, "[2, 6, 33]", Host::Further),
    ("socket TIPC", libc::SYS_socket, "[30, 5, 0]", Host::Further),
    ("socketpair TIPC", libc::SYS_socketpair, r#"[30, 5, 0, "room for"]"#, Host::Further),
    ("socketpair TCP", libc::SYS_socketpair, r#"[2, 1, 0, "room for"]"#, Host::Says("ENOTSUP")),
    ("socketpair netlink", libc::SYS_socketpair, r#"[16, 3, 0, "room for"]"#, Host::Says("ENOTSUP")),
    ("netlink netfilter", libc::SYS_socket, "[16, 3, 12]", Host::Says("done")),
    ("netlink xfrm", libc::SYS_socket, "[16, 3, 6]", Host::Further),
    ("netlink generic", libc::SYS_socket, "[16, 3, 16]", Host::Says("done")),
    ("netlink crypto", libc::SYS_socket, "[16, 3, 21]", Host::Further),
    // A better place in the queues than the host gives.
    ("real-time priority", libc::SYS_sched_setscheduler, "[0, 1, \"\\u0001\\u0000\\u0000\\u0000\"]", Host::Says("done")),
    ("real-time input and output", libc::SYS_ioprio_set, "[1, 0, 8192]", Host::Says("done")),
    ("prctl PR_SET_MM", libc::SYS_prctl, "[35, 1, 0, 0, 0]", Host::Untried),
];

/// Newer than the list of what is allowed, or so odd that nobody misses them: a C library tries another way.
#[rustfmt::skip]
const UNKNOWN: &[(&str, i64, &str, Host)] = &[
    // Its flags are in memory, where a filter cannot look.
    ("clone3", libc::SYS_clone3, "[0, 0]", Host::Says("EINVAL")),
    ("memfd_secret", libc::SYS_memfd_secret, "[0]", Host::Further),
    ("kexec_file_load", libc::SYS_kexec_file_load, "[-1, -1, 0, 0, 0]", Host::Further),
    ("adjtimex", libc::SYS_adjtimex, "[1]", Host::Further),
    ("clock_adjtime", libc::SYS_clock_adjtime, "[0, 1]", Host::Further),
    ("move_pages", libc::SYS_move_pages, "[0, 0, 0, 0, 0, 0]", Host::Further),
    ("process_madvise", libc::SYS_process_madvise, "[-1, 0, 0, 0, 0]", Host::Further),
];

fn table(calls: &[(&str, i64, &str, Host)], inside: &'static str) -> Vec<Attempt> {
    let one = |(name, number, arguments, host): &(&str, i64, &str, Host)| {
        let arguments: Vec<Value> = serde_json::from_str(arguments).unwrap();
        let passed: Vec<Value> = std::iter::once(json!(number)).chain(arguments).collect();
        let host = match host {
            Host::Says(text) => Host::Says(text),
            Host::Further => Host::Further,
            Host::Untried => Host::Untried,
        };
        attempt(*name, "syscall", passed.into(), inside, host)
    };
    calls.iter().map(one).collect()
}

#[test]
fn calls_that_escapes_are_made_of_are_refused() {
    let mut attempts = table(REFUSED, "EPERM");
    attempts.extend(table(UNKNOWN, "ENOSYS"));
    let pair = json!([libc::SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, "room for"]);
    attempts.push(attempt("socketpair, as everybody needs it", "syscall", pair, "done", Host::Says("done")));
    attempts.push(attempt("nice", "syscall", json!([libc::SYS_setpriority, 0, 0, -20]), "EACCES", Host::Says("done")));
    check(&World::new(), "ab01", &attempts);
}

/// The same calls have other numbers to a 32-bit program, and third ones to one of the x32 kind.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_doors_for_32_bit_programs_are_closed() {
    // getpid by `int 0x80`: mov eax, 20; int 0x80; ret
    let old = "b814000000cd80c3";
    let x32 = |number: i64| 0x4000_0000 + number;
    let attempts = [
        attempt("int 0x80", "machine_code", json!([old]), "SIGSYS", Host::Further),
        attempt("x32 mount", "syscall", json!([x32(libc::SYS_mount), "x", "x", "x", 0, 0]), "ENOSYS", Host::Further),
        attempt("x32 unshare", "syscall", json!([x32(libc::SYS_unshare), 0x1000_0000]), "ENOSYS", Host::Further),
    ];
    check(&World::new(), "ab02", &attempts);
}
