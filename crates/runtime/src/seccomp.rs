//! System calls that a machine's processes may make: an allow list, stricter than the usual container
//! default (no mounts, namespaces, key rings, BPF, perf, userfaultfd, io_uring, handles).
//!
//! Two filters are stacked, and the kernel obeys the stricter. The first allows by name and answers
//! ENOSYS otherwise, so that C libraries fall back from calls that are newer than this list (and from
//! `clone3`, whose flags a filter cannot see, to `clone`). The second answers EPERM to what is
//! dangerous, and to some arguments of allowed calls: namespaces, devices, odd sockets, injection
//! into terminals.

use crate::spec::Profile;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NEW_NAMESPACE_FLAGS: [u64; 8] =
    [0x80, 0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
/// PER_LINUX, PER_LINUX32, the question for the current one; not those that weaken address randomisation.
const PERSONALITIES: [u64; 3] = [0x0, 0x8, 0xffff_ffff];
const SOCKET_FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// Routes and addresses, `ss`, audit (which the kernel turns off in a user namespace, and programs like useradd take a
/// refusal to open for a fault), device events. Not netfilter, xfrm, crypto, generic and others: much code that only
/// the host's root has a use for.
const NETLINK_PROTOCOLS: [i32; 4] =
    [libc::NETLINK_ROUTE, libc::NETLINK_SOCK_DIAG, libc::NETLINK_AUDIT, libc::NETLINK_KOBJECT_UEVENT];
/// What asks for others (SCTP, DCCP, L2TP) makes the host load a module for it.
const INTERNET_PROTOCOLS: [i32; 6] = [
    0, libc::IPPROTO_ICMP, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_ICMPV6, libc::IPPROTO_MPTCP,
];
/// Push characters into a terminal that somebody else types at.
const TERMINAL_INJECTION: [u64; 2] = [libc::TIOCSTI, libc::TIOCLINUX];

/// Compiled filters, in the order of loading.
pub(crate) struct Filters(Vec<BpfProgram>);

impl Filters {
    /// Compiled before the process that loads them is cloned.
    pub fn compile(profile: Profile) -> Result<Self, seccompiler::BackendError> {
        Ok(Self(vec![allow_list(profile)?, refusals(profile)?]))
    }

    /// For this process and all that it becomes or forks. Needs no-new-privileges.
    pub fn load(&self) -> Result<(), seccompiler::Error> {
        self.0.iter().try_for_each(|program| seccompiler::apply_filter(program))
    }
}

fn arch() -> TargetArch {
    if cfg!(target_arch = "aarch64") { TargetArch::aarch64 } else { TargetArch::x86_64 }
}

fn allow_list(profile: Profile) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: Rules = ALLOWED.iter().map(|number| (*number, vec![])).collect();
    if profile == Profile::Builder {
        rules.extend(BUILDER_TOO.iter().map(|number| (*number, vec![])));
    }
    let enosys = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, enosys, SeccompAction::Allow, arch())?.try_into()
}

fn refusals(profile: Profile) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: Rules = REFUSED.iter().map(|number| (*number, vec![])).collect();
    rules.insert(libc::SYS_socket, odd_sockets()?);
    // TIPC has pairs too, and asking for one loads its module.
    rules.insert(libc::SYS_socketpair, vec![none_of(0, &[libc::AF_UNIX as u64])?]);
    rules.insert(libc::SYS_personality, vec![none_of(0, &PERSONALITIES)?]);
    let injections = TERMINAL_INJECTION.iter().map(|request| one_of(1, Op::Eq, *request));
    rules.insert(libc::SYS_ioctl, injections.collect::<Result<_, _>>()?);
    if profile == Profile::Tenant {
        rules.extend(BUILDER_TOO.iter().map(|number| (*number, vec![])));
        let namespaces = NEW_NAMESPACE_FLAGS.iter().map(|flag| one_of(0, Op::MaskedEq(*flag), *flag));
        rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
        // Named pipes and sockets are files like others; devices are not.
        let file_type = u64::from(libc::S_IFMT);
        for (call, argument) in NODE_CALLS {
            let kinds = [libc::S_IFCHR, libc::S_IFBLK].map(u64::from);
            let devices = kinds.iter().map(|kind| one_of(*argument, Op::MaskedEq(file_type), *kind));
            rules.insert(*call, devices.collect::<Result<_, _>>()?);
        }
    }
    let eperm = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, eperm, arch())?.try_into()
}

fn odd_sockets() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let within = |family: i32, protocols: &[i32]| {
        let mut conditions = vec![Condition::new(0, Len::Dword, Op::Eq, family as u64)?];
        conditions.extend(differs(2, &protocols.iter().map(|number| *number as u64).collect::<Vec<_>>())?);
        SeccompRule::new(conditions)
    };
    Ok(vec![
        none_of(0, &SOCKET_FAMILIES.map(|family| family as u64))?,
        within(libc::AF_NETLINK, &NETLINK_PROTOCOLS)?,
        within(libc::AF_INET, &INTERNET_PROTOCOLS)?,
        within(libc::AF_INET6, &INTERNET_PROTOCOLS)?,
    ])
}

/// Matches if the argument is none of the values.
fn none_of(argument: u8, values: &[u64]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(differs(argument, values)?)
}

fn differs(argument: u8, values: &[u64]) -> Result<Vec<Condition>, seccompiler::BackendError> {
    values.iter().map(|value| Condition::new(argument, Len::Dword, Op::Ne, *value)).collect()
}

fn one_of(argument: u8, op: Op, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![Condition::new(argument, Len::Dword, op, value)?])
}

/// Make file system nodes; with the number of the argument that says of which kind.
const NODE_CALLS: &[(i64, u8)] = &[
    (libc::SYS_mknodat, 2),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mknod, 1),
];

/// Needed by buildah with chroot isolation.
const BUILDER_TOO: &[i64] = &[libc::SYS_mount, libc::SYS_umount2, libc::SYS_unshare, libc::SYS_chroot];

/// Known and refused to everybody: EPERM says "you may not", where ENOSYS would say "try another way".
#[rustfmt::skip]
const REFUSED: &[i64] = &[
    libc::SYS_setns, libc::SYS_pivot_root, libc::SYS_ptrace, libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev, libc::SYS_pidfd_getfd, libc::SYS_kcmp, libc::SYS_bpf,
    libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at,
    libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key, libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter, libc::SYS_io_uring_register, libc::SYS_open_tree, libc::SYS_move_mount,
    libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick, libc::SYS_mount_setattr,
    libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_kexec_load,
    libc::SYS_reboot, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_acct, libc::SYS_quotactl,
    libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_sethostname, libc::SYS_setdomainname,
    libc::SYS_syslog, libc::SYS_vhangup, libc::SYS_fanotify_init, libc::SYS_lookup_dcookie,
];

#[rustfmt::skip]
const ALLOWED: &[i64] = &[
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_bind, libc::SYS_brk, libc::SYS_capget, libc::SYS_capset,
    libc::SYS_chdir, libc::SYS_clock_getres, libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_clone, libc::SYS_close,
    libc::SYS_close_range, libc::SYS_connect, libc::SYS_copy_file_range, libc::SYS_dup, libc::SYS_dup3,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2, libc::SYS_execve, libc::SYS_execveat, libc::SYS_exit, libc::SYS_exit_group,
    libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_fadvise64, libc::SYS_fallocate, libc::SYS_fchdir,
    libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchmodat2, libc::SYS_fchown, libc::SYS_fchownat, libc::SYS_fcntl,
    libc::SYS_fdatasync, libc::SYS_fgetxattr, libc::SYS_flistxattr, libc::SYS_flock, libc::SYS_fremovexattr,
    libc::SYS_fsetxattr, libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_fsync, libc::SYS_ftruncate,
    libc::SYS_futex, libc::SYS_futex_waitv, libc::SYS_get_mempolicy, libc::SYS_get_robust_list,
    libc::SYS_getcpu, libc::SYS_getcwd, libc::SYS_getdents64, libc::SYS_getegid, libc::SYS_geteuid,
    libc::SYS_getgid, libc::SYS_getgroups, libc::SYS_getitimer, libc::SYS_getpeername, libc::SYS_getpgid,
    libc::SYS_getpid, libc::SYS_getppid, libc::SYS_getpriority, libc::SYS_getrandom, libc::SYS_getresgid,
    libc::SYS_getresuid, libc::SYS_getrlimit, libc::SYS_getrusage, libc::SYS_getsid, libc::SYS_getsockname,
    libc::SYS_getsockopt, libc::SYS_gettid, libc::SYS_gettimeofday, libc::SYS_getuid, libc::SYS_getxattr,
    libc::SYS_inotify_add_watch, libc::SYS_inotify_init1, libc::SYS_inotify_rm_watch, libc::SYS_ioctl,
    libc::SYS_ioprio_get, libc::SYS_ioprio_set, libc::SYS_kill, libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset, libc::SYS_landlock_restrict_self, libc::SYS_lgetxattr, libc::SYS_linkat,
    libc::SYS_listen, libc::SYS_listxattr, libc::SYS_llistxattr, libc::SYS_lremovexattr, libc::SYS_lseek,
    libc::SYS_lsetxattr, libc::SYS_madvise, libc::SYS_mbind, libc::SYS_membarrier, libc::SYS_memfd_create,
    libc::SYS_mincore, libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_mlock, libc::SYS_mlock2, libc::SYS_mlockall, libc::SYS_mmap,
    libc::SYS_mprotect, libc::SYS_mq_getsetattr, libc::SYS_mq_notify, libc::SYS_mq_open,
    libc::SYS_mq_timedreceive, libc::SYS_mq_timedsend, libc::SYS_mq_unlink, libc::SYS_mremap, libc::SYS_msgctl,
    libc::SYS_msgget, libc::SYS_msgrcv, libc::SYS_msgsnd, libc::SYS_msync, libc::SYS_munlock,
    libc::SYS_munlockall, libc::SYS_munmap, libc::SYS_nanosleep, libc::SYS_newfstatat, libc::SYS_openat,
    libc::SYS_openat2, libc::SYS_personality, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal, libc::SYS_pipe2, libc::SYS_pkey_alloc,
    libc::SYS_pkey_free, libc::SYS_pkey_mprotect, libc::SYS_ppoll, libc::SYS_prctl, libc::SYS_pread64,
    libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_prlimit64, libc::SYS_pselect6, libc::SYS_pwrite64,
    libc::SYS_pwritev, libc::SYS_pwritev2, libc::SYS_read, libc::SYS_readahead, libc::SYS_readlinkat,
    libc::SYS_readv, libc::SYS_recvfrom, libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_remap_file_pages,
    libc::SYS_removexattr, libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_restart_syscall, libc::SYS_rseq,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigpending, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn, libc::SYS_rt_sigsuspend, libc::SYS_rt_sigtimedwait, libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_get_priority_max, libc::SYS_sched_get_priority_min, libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr, libc::SYS_sched_getparam, libc::SYS_sched_getscheduler,
    libc::SYS_sched_rr_get_interval, libc::SYS_sched_setaffinity, libc::SYS_sched_setattr,
    libc::SYS_sched_setparam, libc::SYS_sched_setscheduler, libc::SYS_sched_yield, libc::SYS_seccomp,
    libc::SYS_semctl, libc::SYS_semget, libc::SYS_semop, libc::SYS_semtimedop, libc::SYS_sendfile,
    libc::SYS_sendmmsg, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_set_mempolicy,
    libc::SYS_set_robust_list, libc::SYS_set_tid_address, libc::SYS_setfsgid, libc::SYS_setfsuid,
    libc::SYS_setgid, libc::SYS_setgroups, libc::SYS_setitimer, libc::SYS_setpgid, libc::SYS_setpriority,
    libc::SYS_setregid, libc::SYS_setresgid, libc::SYS_setresuid, libc::SYS_setreuid, libc::SYS_setrlimit,
    libc::SYS_setsid, libc::SYS_setsockopt, libc::SYS_setuid, libc::SYS_setxattr, libc::SYS_shmat,
    libc::SYS_shmctl, libc::SYS_shmdt, libc::SYS_shmget, libc::SYS_shutdown, libc::SYS_sigaltstack,
    libc::SYS_signalfd4, libc::SYS_socket, libc::SYS_socketpair, libc::SYS_splice, libc::SYS_statfs, libc::SYS_statx,
    libc::SYS_symlinkat, libc::SYS_sync, libc::SYS_sync_file_range, libc::SYS_syncfs, libc::SYS_sysinfo,
    libc::SYS_tee, libc::SYS_tgkill, libc::SYS_timer_create, libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun, libc::SYS_timer_gettime, libc::SYS_timer_settime, libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime, libc::SYS_timerfd_settime, libc::SYS_times, libc::SYS_tkill, libc::SYS_truncate,
    libc::SYS_umask, libc::SYS_uname, libc::SYS_unlinkat, libc::SYS_utimensat, libc::SYS_vmsplice,
    libc::SYS_wait4, libc::SYS_waitid, libc::SYS_write, libc::SYS_writev,
    #[cfg(target_arch = "x86_64")] libc::SYS_access,
    #[cfg(target_arch = "x86_64")] libc::SYS_alarm,
    #[cfg(target_arch = "x86_64")] libc::SYS_arch_prctl,
    #[cfg(target_arch = "x86_64")] libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")] libc::SYS_chown,
    #[cfg(target_arch = "x86_64")] libc::SYS_creat,
    #[cfg(target_arch = "x86_64")] libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")] libc::SYS_epoll_create,
    #[cfg(target_arch = "x86_64")] libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")] libc::SYS_eventfd,
    #[cfg(target_arch = "x86_64")] libc::SYS_fork,
    #[cfg(target_arch = "x86_64")] libc::SYS_futimesat,
    #[cfg(target_arch = "x86_64")] libc::SYS_getdents,
    #[cfg(target_arch = "x86_64")] libc::SYS_getpgrp,
    #[cfg(target_arch = "x86_64")] libc::SYS_inotify_init,
    #[cfg(target_arch = "x86_64")] libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")] libc::SYS_link,
    #[cfg(target_arch = "x86_64")] libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")] libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")] libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")] libc::SYS_open,
    #[cfg(target_arch = "x86_64")] libc::SYS_pause,
    #[cfg(target_arch = "x86_64")] libc::SYS_pipe,
    #[cfg(target_arch = "x86_64")] libc::SYS_poll,
    #[cfg(target_arch = "x86_64")] libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")] libc::SYS_rename,
    #[cfg(target_arch = "x86_64")] libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")] libc::SYS_select,
    #[cfg(target_arch = "x86_64")] libc::SYS_signalfd,
    #[cfg(target_arch = "x86_64")] libc::SYS_stat,
    #[cfg(target_arch = "x86_64")] libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")] libc::SYS_time,
    #[cfg(target_arch = "x86_64")] libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")] libc::SYS_utime,
    #[cfg(target_arch = "x86_64")] libc::SYS_utimes,
    #[cfg(target_arch = "x86_64")] libc::SYS_vfork,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_escapes_are_made_of_is_not_on_the_list() {
        for number in [
            libc::SYS_mount, libc::SYS_umount2, libc::SYS_unshare, libc::SYS_setns, libc::SYS_pivot_root,
            libc::SYS_ptrace, libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd,
            libc::SYS_open_by_handle_at, libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key,
            libc::SYS_io_uring_setup, libc::SYS_open_tree, libc::SYS_move_mount, libc::SYS_fsopen,
            libc::SYS_init_module, libc::SYS_kexec_load, libc::SYS_process_vm_writev, libc::SYS_reboot,
        ] {
            assert!(!ALLOWED.contains(&number), "{number}");
            assert!(REFUSED.contains(&number) || BUILDER_TOO.contains(&number), "{number}");
        }
    }

    #[test]
    fn both_profiles_compile() {
        for profile in [Profile::Tenant, Profile::Builder] {
            assert_eq!(Filters::compile(profile).unwrap().0.len(), 2);
        }
    }
}
