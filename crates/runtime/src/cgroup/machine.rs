//! One cgroup, spread over all hierarchies of the host.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::list::List;
use super::{CgroupError, Hierarchy, Limits, Result, Usage, child_dirs, detect, is_gone, read, write};

/// Scheduler period; quota and period of 100 ms are the kernel's and everybody's default.
const CPU_PERIOD_USEC: u64 = 100_000;
/// The kernel refuses smaller quotas.
const CPU_QUOTA_MIN_USEC: u64 = 1_000;
/// How deep sub-cgroups may nest: sessions are one level, a machine that makes its own gets a few more.
const DEPTH_MAX: usize = 16;
/// `cgroup.kill` usually empties a cgroup in this time; before it, freezing and killing would only be noise.
const KILL_FILE_GRACE: Duration = Duration::from_millis(15);
/// A v1 freezer that does not reach FROZEN in this time is thawed and tried again, as a task may be stuck half-way.
const FREEZE_TRY: Duration = Duration::from_millis(20);
/// Polling: from quick to gentle.
const PAUSE_MIN: Duration = Duration::from_micros(200);
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// Descriptors of processes that are held at once while killing.
const KILL_CHUNK: usize = 128;
/// The kernel may still hold a directory for a moment after its last process ended.
const REMOVE_WAIT: Duration = Duration::from_millis(500);
/// Device nodes that every Linux container has: null, zero, full, random, urandom, tty, ptmx and pts. Making nodes is
/// allowed, opening others is not, as runc has it.
const DEVICES_V1: [&str; 10] = [
    "c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm",
    "c 136:* rwm",
];

/// A cgroup of a machine, a supervisor or one exec session.
#[derive(Debug, Clone)]
pub struct MachineCgroup {
    name: String,
    /// Directories that belong to this cgroup.
    dirs: Vec<Dir>,
    /// Directories of the machine around a session: a process joins them, but the session neither kills in nor removes
    /// them.
    around: Vec<Dir>,
    /// Stands for it where there are no control groups.
    list: Option<List>,
}

#[derive(Debug, Clone)]
struct Dir {
    controllers: Vec<String>,
    unified: bool,
    path: PathBuf,
}

impl MachineCgroup {
    pub(super) fn create(name: &str, hierarchies: &[Hierarchy], list: Option<List>) -> Result<Self> {
        let cgroup = MachineCgroup { name: name.to_owned(), dirs: dirs_of(name, hierarchies), around: Vec::new(), list };
        if cgroup.dirs.iter().any(|dir| dir.path.exists()) || cgroup.list.as_ref().is_some_and(List::exists) {
            return Err(CgroupError::AlreadyExists(name.to_owned()));
        }
        match cgroup.make_dirs() {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                cgroup.remove()?;
                Err(error)
            }
        }
    }

    pub(super) fn open(name: &str, hierarchies: &[Hierarchy], list: Option<List>) -> Result<Self> {
        let mut dirs = dirs_of(name, hierarchies);
        dirs.retain(|dir| dir.path.exists());
        if dirs.is_empty() && !list.as_ref().is_some_and(List::exists) {
            return Err(CgroupError::NotFound(name.to_owned()));
        }
        Ok(MachineCgroup { name: name.to_owned(), dirs, around: Vec::new(), list })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A sub-cgroup for one exec session, so that ending it takes all its processes, `setsid`'d ones too.
    pub fn session(&self, name: &str) -> Result<MachineCgroup> {
        super::check_name(name)?;
        let (below, around): (Vec<Dir>, Vec<Dir>) =
            self.dirs.iter().cloned().partition(|dir| dir.unified || dir.controllers.iter().any(|c| c == "freezer"));
        let dirs = below
            .into_iter()
            .map(|dir| Dir { path: dir.path.join(name), controllers: Vec::new(), unified: dir.unified })
            .collect();
        let list = self.list.as_ref().map(|list| list.session(name));
        let session = MachineCgroup { name: format!("{}/{name}", self.name), dirs, around, list };
        match session.make_dirs() {
            Ok(()) => Ok(session),
            Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                Err(CgroupError::AlreadyExists(session.name))
            }
            Err(error) => {
                session.remove()?;
                Err(error)
            }
        }
    }

    /// Moves a process (0: the caller) into every hierarchy.
    pub fn add(&self, pid: i32) -> Result<()> {
        for dir in self.joined() {
            write(&dir.path.join("cgroup.procs"), &pid.to_string())?;
        }
        self.list.as_ref().map_or(Ok(()), |list| list.add(pid).map_err(list_error("write", list)))
    }

    /// Whether there are no control groups, so that processes which join by themselves, through
    /// [`open_procs`](Self::open_procs), have to be told from others by a time namespace.
    pub(crate) fn is_list(&self) -> bool {
        self.list.is_some()
    }

    /// All processes of this time namespace, which the caller keeps open.
    pub(crate) fn add_time_namespace(&self, inode: u64) -> Result<()> {
        self.list.as_ref().map_or(Ok(()), |list| list.add_time_namespace(inode).map_err(list_error("write", list)))
    }

    /// Every `cgroup.procs`, opened for writing: a child that can no longer see the host's files writes `0` into each.
    pub fn open_procs(&self) -> Result<Vec<OwnedFd>> {
        self.joined()
            .map(|dir| {
                let path = dir.path.join("cgroup.procs");
                match OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(&path) {
                    Ok(file) => Ok(OwnedFd::from(file)),
                    Err(source) => Err(CgroupError::Io { op: "open", path, source }),
                }
            })
            .collect()
    }

    fn joined(&self) -> impl Iterator<Item = &Dir> {
        self.dirs.iter().chain(&self.around)
    }

    fn make_dirs(&self) -> Result<()> {
        if let Some(list) = &self.list {
            list.create().map_err(list_error("make", list))?;
        }
        for dir in &self.dirs {
            std::fs::create_dir(&dir.path)
                .map_err(|source| CgroupError::Io { op: "make", path: dir.path.clone(), source })?;
            if !dir.unified && dir.controllers.iter().any(|name| name == "cpuset") {
                detect::inherit_cpuset(&dir.path)?;
            }
        }
        Ok(())
    }

    pub(super) fn deny_devices(&self) -> Result<()> {
        // Pure v2 has no such file. There the machine is kept from devices by its user namespace (it cannot make nodes)
        // and by `nodev` mounts.
        let Some(dir) = self.v1("devices") else { return Ok(()) };
        write(&dir.join("devices.deny"), "a")?;
        for rule in DEVICES_V1 {
            write(&dir.join("devices.allow"), rule)?;
        }
        Ok(())
    }

    /// Where there are no control groups nothing is limited; the server said so when it started.
    pub fn set_limits(&self, limits: &Limits) -> Result<()> {
        if self.list.is_some() {
            return Ok(());
        }
        self.limit_cpu(limits)?;
        self.limit_memory(limits.memory_bytes, limits.swap_bytes)?;
        let pids = if limits.pids == 0 { "max".to_owned() } else { limits.pids.to_string() };
        write(&self.controller("pids")?.0.join("pids.max"), &pids)
    }

    /// Of all limits that of processor time alone.
    pub(crate) fn set_cpu_limit(&self, limits: &Limits) -> Result<()> {
        if self.list.is_some() { Ok(()) } else { self.limit_cpu(limits) }
    }

    /// None of its memory goes to the host's swap. On v1 that is not for sure where the whole host lacks memory.
    pub(super) fn keep_from_swap(&self) -> Result<()> {
        let Ok((dir, unified)) = self.controller("memory") else { return Ok(()) };
        let file = dir.join(if unified { "memory.swap.max" } else { "memory.swappiness" });
        if file.exists() { write(&file, "0") } else { Ok(()) } // a kernel without swap has no such file
    }

    fn limit_cpu(&self, limits: &Limits) -> Result<()> {
        let (dir, unified) = self.controller("cpu")?;
        let millis = limits.cpu_millis;
        let weight = if limits.cpu_weight_millis == 0 { millis } else { limits.cpu_weight_millis };
        let quota = (u64::from(millis) * CPU_PERIOD_USEC / 1000).max(CPU_QUOTA_MIN_USEC);
        if unified {
            let (max, weight) = if millis == 0 {
                (format!("max {CPU_PERIOD_USEC}"), 100)
            } else {
                (format!("{quota} {CPU_PERIOD_USEC}"), (weight / 10).clamp(1, 10_000))
            };
            write(&dir.join("cpu.max"), &max)?;
            return write(&dir.join("cpu.weight"), &weight.to_string());
        }
        let (quota, shares) = if millis == 0 {
            ("-1".to_owned(), 1024)
        } else {
            (quota.to_string(), (u64::from(weight) * 1024 / 1000).clamp(2, 262_144))
        };
        write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_USEC.to_string())?;
        write(&dir.join("cpu.cfs_quota_us"), &quota)?;
        write(&dir.join("cpu.shares"), &shares.to_string())
    }

    /// Limits memory, and swap beyond it to what was asked for, so that a machine's size means the same on every host.
    fn limit_memory(&self, bytes: u64, swap_bytes: u64) -> Result<()> {
        let (dir, unified) = self.controller("memory")?;
        if unified {
            let max = if bytes == 0 { "max".to_owned() } else { bytes.to_string() };
            write(&dir.join("memory.max"), &max)?;
            let swap = dir.join("memory.swap.max");
            return match (swap.exists(), swap_bytes) {
                (true, _) if bytes == 0 => write(&swap, "max"),
                (true, _) => write(&swap, &swap_bytes.to_string()),
                (false, 0) => Ok(()),
                (false, _) => Err(no_swap_accounting()),
            };
        }
        let value = if bytes == 0 { "-1".to_owned() } else { bytes.to_string() };
        let memory = dir.join("memory.limit_in_bytes");
        let with_swap = dir.join("memory.memsw.limit_in_bytes");
        if !with_swap.exists() {
            if swap_bytes > 0 {
                return Err(no_swap_accounting());
            }
            self.keep_from_swap()?;
            return write(&memory, &value);
        }
        let both = if bytes == 0 { value.clone() } else { bytes.saturating_add(swap_bytes).to_string() };
        // The limit with swap may never be the smaller one: growing needs it first, shrinking needs it last.
        match write(&memory, &value) {
            Ok(()) => write(&with_swap, &both),
            Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                write(&with_swap, &both)?;
                write(&memory, &value)
            }
            Err(error) => Err(error),
        }
    }

    /// How often the kernel ended a process here for want of memory.
    pub fn oom_kills(&self) -> Result<u64> {
        let (dir, unified) = self.controller("memory")?;
        let file = dir.join(if unified { "memory.events" } else { "memory.oom_control" });
        keyed(&file, "oom_kill")
    }

    pub fn usage(&self) -> Result<Usage> {
        let cpu_usec = match self.v1("cpuacct") {
            Some(dir) => number(&dir.join("cpuacct.usage"))? / 1000,
            None => keyed(&self.unified()?.join("cpu.stat"), "usage_usec")?,
        };
        let (dir, unified) = self.controller("memory")?;
        let (used, cache) = if unified { ("memory.current", "inactive_file") } else { ("memory.usage_in_bytes", "total_inactive_file") };
        let memory_bytes = number(&dir.join(used))?.saturating_sub(keyed(&dir.join("memory.stat"), cache)?);
        let pids = number(&self.controller("pids")?.0.join("pids.current"))?;
        Ok(Usage { cpu_usec, memory_bytes, pids })
    }

    /// Stops all processes in place; on return none of them runs.
    pub fn freeze(&self, deadline: Duration) -> Result<()> {
        if self.list.is_some() {
            return Err(CgroupError::Unusable("without control groups no machine can be suspended".to_owned()));
        }
        let start = Instant::now();
        let mut pause = Pause::new();
        loop {
            if self.try_freeze(FREEZE_TRY.min(deadline))? {
                return Ok(());
            }
            if start.elapsed() >= deadline {
                self.thaw()?;
                return Err(CgroupError::NotFrozen { name: self.name.clone(), waited_ms: millis(deadline) });
            }
            self.thaw()?;
            pause.wait();
        }
    }

    pub fn thaw(&self) -> Result<()> {
        if self.list.is_some() {
            return Ok(());
        }
        match self.freezer()? {
            (dir, true) => write(&dir.join("cgroup.freeze"), "0"),
            (dir, false) => write(&dir.join("freezer.state"), "THAWED"),
        }
    }

    pub fn is_frozen(&self) -> Result<bool> {
        if self.list.is_some() {
            return Ok(false);
        }
        match self.freezer()? {
            (dir, true) => Ok(keyed(&dir.join("cgroup.events"), "frozen")? == 1),
            (dir, false) => Ok(read(&dir.join("freezer.state"))?.trim() == "FROZEN"),
        }
    }

    fn try_freeze(&self, wait: Duration) -> Result<bool> {
        match self.freezer()? {
            (dir, true) => write(&dir.join("cgroup.freeze"), "1")?,
            (dir, false) => write(&dir.join("freezer.state"), "FROZEN")?,
        }
        let start = Instant::now();
        let mut pause = Pause::new();
        while !self.is_frozen()? {
            if start.elapsed() >= wait {
                return Ok(false);
            }
            pause.wait();
        }
        Ok(true)
    }

    /// SIGKILLs everything in here and below until nothing is left, forks or not, frozen or not.
    pub fn kill_until_empty(&self, deadline: Duration) -> Result<()> {
        let start = Instant::now();
        let has_kill_file = self.write_kill_file()?;
        if has_kill_file {
            // A v1 freezer holds even SIGKILL back.
            self.thaw_if_there()?;
        }
        let mut pause = Pause::new();
        loop {
            if self.is_empty()? {
                // An empty but frozen cgroup would freeze whoever enters next.
                return self.thaw_if_there();
            }
            if start.elapsed() >= deadline {
                let pids = self.procs()?;
                return Err(CgroupError::StillAlive { name: self.name.clone(), pids, waited_ms: millis(deadline) });
            }
            if !has_kill_file || start.elapsed() >= KILL_FILE_GRACE {
                self.kill_round()?;
                self.write_kill_file()?;
            }
            pause.wait();
        }
    }

    /// A creation or a removal that was cut off leaves a part of the directories: without a freezer nothing is
    /// frozen.
    fn thaw_if_there(&self) -> Result<()> {
        match self.thaw() {
            Err(CgroupError::Io { source, .. }) if is_gone(&source) => Ok(()),
            Err(CgroupError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    /// Kills through the v2 tree, which also catches processes that are just being forked. False: this kernel cannot.
    fn write_kill_file(&self) -> Result<bool> {
        let Some(dir) = self.dirs.iter().find(|dir| dir.unified) else { return Ok(false) };
        match super::write_raw(&dir.path.join("cgroup.kill"), "1") {
            Ok(()) => Ok(true),
            Err(error) if is_gone(&error) => Ok(false),
            Err(source) => Err(CgroupError::Io { op: "write", path: dir.path.join("cgroup.kill"), source }),
        }
    }

    /// Freeze so that nobody forks away, SIGKILL each, thaw so that they die. Not reaching frozen is no error here,
    /// and neither is having no freezer: the next round catches what slipped.
    fn kill_round(&self) -> Result<()> {
        let frozen = match self.try_freeze(FREEZE_TRY) {
            Err(CgroupError::NotFound(_)) => Ok(false),
            tried => tried,
        };
        let killed = self.procs().and_then(|pids| {
            for chunk in pids.chunks(KILL_CHUNK) {
                self.kill_members(chunk)?;
            }
            Ok(())
        });
        self.thaw_if_there()?;
        killed.and(frozen.map(|_| ()))
    }

    /// Holds each process by descriptor and looks again whether it is ours before killing it: a number alone may
    /// belong to somebody else by now.
    fn kill_members(&self, pids: &[i32]) -> Result<()> {
        let held: Vec<(i32, OwnedFd)> = pids.iter().filter_map(|pid| Some((*pid, pidfd_open(*pid)?))).collect();
        let still: HashSet<i32> = self.procs()?.into_iter().collect();
        for (pid, pidfd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            if let Err(error) = pidfd_kill(pidfd)
                && error.raw_os_error() != Some(libc::ESRCH)
            {
                tracing::warn!(pid, %error, cgroup = %self.name, "cannot kill a process of a cgroup");
            }
        }
        Ok(())
    }

    /// All processes in here and below, in any hierarchy.
    pub fn procs(&self) -> Result<Vec<i32>> {
        let mut pids = std::collections::BTreeSet::new();
        for dir in &self.dirs {
            collect_procs(&dir.path, 0, &mut pids)?;
        }
        if let Some(list) = &self.list {
            pids.extend(list.procs().map_err(list_error("read", list))?);
        }
        // 0 stands for a process that this pid namespace cannot see.
        pids.remove(&0);
        Ok(pids.into_iter().collect())
    }

    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.procs()?.is_empty())
    }

    /// Removes the directories with all sub-cgroups. They must hold no processes; what is gone already is fine.
    pub fn remove(&self) -> Result<()> {
        for dir in &self.dirs {
            remove_tree(&dir.path, 0)?;
        }
        self.list.as_ref().map_or(Ok(()), |list| list.remove().map_err(list_error("remove", list)))
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        self.joined()
            .find(|dir| !dir.unified && dir.controllers.iter().any(|name| name == controller))
            .map(|dir| dir.path.as_path())
    }

    fn unified(&self) -> Result<&Path> {
        self.dirs
            .iter()
            .find(|dir| dir.unified)
            .map(|dir| dir.path.as_path())
            .ok_or_else(|| CgroupError::NotFound(format!("{} (v2 tree)", self.name)))
    }

    /// Where a controller is driven, and whether with v2's files.
    pub(super) fn controller(&self, name: &str) -> Result<(&Path, bool)> {
        self.joined()
            .find(|dir| dir.controllers.iter().any(|c| c == name))
            .map(|dir| (dir.path.as_path(), dir.unified))
            .ok_or_else(|| CgroupError::NotFound(format!("{} ({name} controller)", self.name)))
    }

    fn freezer(&self) -> Result<(&Path, bool)> {
        // A session's directories have no controllers of their own, but the v1 one is in the freezer hierarchy.
        if let Some(dir) = self.dirs.iter().find(|dir| !dir.unified && dir.path.join("freezer.state").exists()) {
            return Ok((&dir.path, false));
        }
        Ok((self.unified()?, true))
    }
}

fn list_error(op: &'static str, list: &List) -> impl FnOnce(io::Error) -> CgroupError {
    let path = list.path().to_owned();
    move |source| CgroupError::Io { op, path, source }
}

/// Without it a machine could fill the host's swap: it gets none rather than all.
fn no_swap_accounting() -> CgroupError {
    CgroupError::Unusable(
        "the kernel does not account swap, so no machine can have swap_size_mb; start it with swapaccount=1, or take \
         swap_size_mb out of the app's configuration"
            .into(),
    )
}

fn dirs_of(name: &str, hierarchies: &[Hierarchy]) -> Vec<Dir> {
    hierarchies
        .iter()
        .map(|hierarchy| Dir {
            controllers: hierarchy.controllers.clone(),
            unified: hierarchy.unified,
            path: hierarchy.root.join(name),
        })
        .collect()
}

fn collect_procs(dir: &Path, depth: usize, pids: &mut std::collections::BTreeSet<i32>) -> Result<()> {
    let text = match std::fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(()),
        // A threaded v2 child lists its processes in the nearest domain above, which was read already.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        Err(source) => return Err(CgroupError::Io { op: "read", path: dir.join("cgroup.procs"), source }),
    };
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    if depth == DEPTH_MAX {
        return Err(CgroupError::Unusable(format!("{} is nested deeper than {DEPTH_MAX}", dir.display())));
    }
    for child in child_dirs(dir)? {
        collect_procs(&child, depth + 1, pids)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path, depth: usize) -> Result<()> {
    if depth == DEPTH_MAX {
        return Err(CgroupError::Unusable(format!("{} is nested deeper than {DEPTH_MAX}", dir.display())));
    }
    for child in child_dirs(dir)? {
        remove_tree(&child, depth + 1)?;
    }
    remove_dir(dir)
}

/// `rmdir` that waits out the moment in which the kernel still counts ended processes.
pub(super) fn remove_dir(dir: &Path) -> Result<()> {
    let start = Instant::now();
    let mut pause = Pause::new();
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < REMOVE_WAIT => pause.wait(),
            Err(source) => return Err(CgroupError::Io { op: "remove", path: dir.to_owned(), source }),
        }
    }
}

fn number(path: &Path) -> Result<u64> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| malformed(path, &text))
}

/// The value behind `key` in a file of `key value` lines.
fn keyed(path: &Path, key: &str) -> Result<u64> {
    let text = read(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
        .ok_or_else(|| malformed(path, &text))
}

fn malformed(path: &Path, text: &str) -> CgroupError {
    let start: String = text.chars().take(80).collect();
    CgroupError::Unusable(format!("{} does not hold the expected number but {start:?}", path.display()))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn pidfd_open(pid: i32) -> Option<OwnedFd> {
    // SAFETY: plain integers go in; a result that is not negative is a descriptor that only we own.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        i32::try_from(fd).ok().filter(|fd| *fd >= 0).map(|fd| OwnedFd::from_raw_fd(fd))
    }
}

fn pidfd_kill(pidfd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, and a null siginfo asks for the plain signal.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits that double from 0.2 ms to 10 ms; the caller holds the deadline.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Pause(PAUSE_MIN)
    }

    fn wait(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain files with the names of v2 stand in for the kernel: this shows what is written, not that it works.
    #[test]
    fn a_supervisor_on_v2_has_no_swap_and_keeps_none_when_it_is_limited() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in ["cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "pids.max"] {
            std::fs::write(dir.path().join(name), "").expect("write");
        }
        let controllers = ["cpu", "memory", "pids"].map(str::to_owned).to_vec();
        let dirs = vec![Dir { controllers, unified: true, path: dir.path().to_owned() }];
        let cgroup = MachineCgroup { name: "s1".to_owned(), dirs, around: Vec::new(), list: None };
        cgroup.keep_from_swap().expect("keep");
        cgroup.set_cpu_limit(&Limits { cpu_millis: 250, ..Limits::NONE }).expect("limit");
        let written = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("read");
        assert_eq!((written("memory.swap.max"), written("cpu.max")), ("0".to_owned(), "25000 100000".to_owned()));
    }

    #[test]
    fn v2_limits_and_usage_use_the_v2_files() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = |name: &str, value: &str| std::fs::write(dir.path().join(name), value).expect("write");
        for name in ["cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "pids.max"] {
            file(name, "");
        }
        file("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        file("memory.current", "1000\n");
        file("memory.stat", "anon 5\ninactive_file 300\n");
        file("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n");
        file("pids.current", "7\n");
        let controllers = ["cpu", "memory", "pids"].map(str::to_owned).to_vec();
        let dirs = vec![Dir { controllers, unified: true, path: dir.path().to_owned() }];
        let cgroup = MachineCgroup { name: "m1".to_owned(), dirs, around: Vec::new(), list: None };
        let written = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("read");

        cgroup.set_limits(&Limits { cpu_millis: 1500, memory_bytes: 4096, pids: 9, ..Limits::NONE }).expect("limit");
        assert_eq!(written("cpu.max"), "150000 100000");
        assert_eq!((written("memory.max"), written("memory.swap.max")), ("4096".to_owned(), "0".to_owned()));
        assert_eq!((written("pids.max"), written("cpu.weight")), ("9".to_owned(), "150".to_owned()));
        for name in ["cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "pids.max"] {
            file(name, "");
        }
        let weighed = Limits { cpu_millis: 1500, cpu_weight_millis: 60, memory_bytes: 4096, swap_bytes: 8192, ..Limits::NONE };
        cgroup.set_limits(&weighed).expect("limit");
        assert_eq!((written("cpu.weight"), written("cpu.max")), ("6".to_owned(), "150000 100000".to_owned()));
        assert_eq!((written("memory.max"), written("memory.swap.max")), ("4096".to_owned(), "8192".to_owned()));
        for name in ["cpu.max", "memory.max", "memory.swap.max", "pids.max"] {
            file(name, "");
        }
        cgroup.set_limits(&Limits::NONE).expect("lift");
        assert_eq!((written("cpu.max"), written("memory.max")), ("max 100000".to_owned(), "max".to_owned()));
        assert_eq!((written("memory.swap.max"), written("pids.max")), ("max".to_owned(), "max".to_owned()));
        assert_eq!(cgroup.usage().expect("usage"), Usage { cpu_usec: 1500, memory_bytes: 700, pids: 7 });
        assert_eq!(cgroup.oom_kills().expect("count"), 2);
    }
}
