//! Finds out how the host mounts its cgroups and prepares our root in them.

use std::io;
use std::path::{Path, PathBuf};

use super::{CgroupError, Cgroups, Hierarchy, Layout, Result, read, write};

/// Without these a machine cannot be limited, measured or ended for sure.
const NEEDED: [&str; 4] = ["cpu", "memory", "pids", "freezer"];
/// Enabled in a v2 tree where they are offered.
const WANTED_V2: [&str; 5] = ["cpu", "memory", "pids", "cpuset", "io"];
/// Words in a v1 mount's options that name controllers; the rest are mount options.
const KNOWN_V1: [&str; 14] = [
    "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "net_cls", "net_prio", "perf_event",
    "hugetlb", "rdma", "misc",
];
/// v1 hierarchies that a machine joins: those that we drive, and systemd's own (so that stopping the agent's service on
/// an old host does not take the machines along).
const JOINED_V1: [&str; 9] =
    ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "name=systemd"];
/// Leaf for the service's own processes: in v2 a cgroup with controllers for its children holds no processes itself.
const AGENT_LEAF: &str = "agent";
/// The server's weight beside that of all machines together. With less, what it has to do at once waits for the time
/// slices of machines that burn (4 ms at the worst hundredth, for 0.3 ms).
const SERVER_WEIGHT: u32 = 8;
/// Rounds of moving processes into the leaf; new ones may be forked while we move.
const MOVE_ROUNDS: usize = 16;

pub(super) fn detect(root_name: &str) -> Result<Cgroups> {
    let cgroups = look(root_name)?;
    prepare(&cgroups)?;
    Ok(cgroups)
}

/// What `detect` would use; makes and changes nothing.
pub(super) fn look(root_name: &str) -> Result<Cgroups> {
    let table = read(Path::new("/proc/self/mountinfo"))?;
    let mounts = parse_mountinfo(&table);
    let own = read(Path::new("/proc/self/cgroup"))?;
    plan(&mounts, root_name, |mount| delegated_dir(mount, &own))
}

/// One cgroup mount. `controllers` is `None` for v2.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CgroupMount {
    fs_root: String,
    at: PathBuf,
    controllers: Option<Vec<String>>,
}

fn parse_mountinfo(table: &str) -> Vec<CgroupMount> {
    let mut mounts: Vec<CgroupMount> = Vec::new();
    for line in table.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut before = before.split(' ');
        let (Some(fs_root), Some(at)) = (before.nth(3), before.next()) else { continue };
        let mut after = after.split(' ');
        let kind = after.next().unwrap_or_default();
        let options = after.nth(1).unwrap_or_default();
        let controllers = match kind {
            "cgroup2" => None,
            "cgroup" => Some(
                options
                    .split(',')
                    .filter(|word| KNOWN_V1.contains(word) || word.starts_with("name="))
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            ),
            _ => continue,
        };
        // The same hierarchy may be mounted twice; the first mount is the usual place.
        if !mounts.iter().any(|mount| mount.controllers == controllers) {
            mounts.push(CgroupMount { fs_root: unescape(fs_root), at: PathBuf::from(unescape(at)), controllers });
        }
    }
    mounts
}

/// Mount tables write space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'\\')
            .then(|| field.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn plan(
    mounts: &[CgroupMount],
    root_name: &str,
    delegated: impl Fn(&CgroupMount) -> Result<Option<PathBuf>>,
) -> Result<Cgroups> {
    let mut hierarchies = Vec::new();
    let mut on_v1: Vec<&str> = Vec::new();
    for mount in mounts {
        let Some(controllers) = &mount.controllers else { continue };
        let joined: Vec<String> =
            controllers.iter().filter(|name| JOINED_V1.contains(&name.as_str())).cloned().collect();
        if joined.is_empty() {
            continue;
        }
        on_v1.extend(controllers.iter().map(String::as_str));
        hierarchies.push(Hierarchy { controllers: joined, unified: false, root: mount.at.join(root_name) });
    }
    let unified = mounts.iter().find(|mount| mount.controllers.is_none());
    let drives_v1 = on_v1.iter().any(|name| !name.starts_with("name="));
    let layout = match (drives_v1, unified) {
        (true, None) => Layout::V1,
        (true, Some(_)) => Layout::Hybrid,
        (false, Some(_)) => Layout::V2,
        (false, None) => {
            return Err(CgroupError::Unusable(
                "no cgroup file system is mounted; mount one with: mount -t cgroup2 none /sys/fs/cgroup".to_owned(),
            ));
        }
    };
    if let Some(mount) = unified {
        let base = match layout {
            Layout::V2 => delegated(mount)?.unwrap_or_else(|| mount.at.clone()),
            _ => mount.at.clone(),
        };
        let offered = words(&base.join("cgroup.controllers"))?;
        let controllers =
            WANTED_V2.iter().filter(|name| offered.iter().any(|o| o == *name)).map(|name| (*name).to_owned()).collect();
        hierarchies.push(Hierarchy { controllers, unified: true, root: base.join(root_name) });
    }
    let cgroups = Cgroups { layout, hierarchies, lists: None };
    for name in NEEDED {
        let there = cgroups.hierarchies.iter().any(|hierarchy| {
            // Freezing and cpu times are part of the v2 core, not of a controller.
            (hierarchy.unified && name == "freezer") || hierarchy.controllers.iter().any(|c| c == name)
        });
        if !there {
            let hint = if name == "memory" { "; boot with cgroup_enable=memory" } else { "" };
            return Err(CgroupError::Unusable(format!(
                "the {name} controller is neither mounted as v1 nor offered by the v2 tree{hint} ({})",
                cgroups.describe()
            )));
        }
    }
    Ok(cgroups)
}

/// Our own cgroup in the v2 tree.
fn own_dir(mount: &CgroupMount, own_cgroups: &str) -> Option<PathBuf> {
    let own = own_cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // Without a cgroup namespace the path starts at the host's root although only a part of the tree is mounted.
    let own = if mount.fs_root == "/" { own } else { own.strip_prefix(mount.fs_root.as_str()).unwrap_or(own) };
    Some(mount.at.join(own.trim_start_matches('/')))
}

/// Moves this process to the v2 cgroup where it is.
pub(super) fn move_nowhere() -> Result<()> {
    let mounts = parse_mountinfo(&read(Path::new("/proc/self/mountinfo"))?);
    let own = read(Path::new("/proc/self/cgroup"))?;
    let dir = mounts.iter().filter(|mount| mount.controllers.is_none()).find_map(|mount| own_dir(mount, &own));
    dir.map_or(Ok(()), |dir| write(&dir.join("cgroup.procs"), "0"))
}

/// The nearest cgroup at or above our own that systemd marked as delegated to this service.
fn delegated_dir(mount: &CgroupMount, own_cgroups: &str) -> Result<Option<PathBuf>> {
    let Some(mut dir) = own_dir(mount, own_cgroups) else { return Ok(None) };
    while dir != mount.at && dir.starts_with(&mount.at) {
        if has_delegate_mark(&dir)? {
            return Ok(Some(dir));
        }
        dir.pop();
    }
    Ok(None)
}

fn has_delegate_mark(dir: &Path) -> Result<bool> {
    for name in [c"trusted.delegate", c"user.delegate"] {
        let path = c_path(dir)?;
        let mut value = [0_u8; 8];
        // SAFETY: both strings end in NUL, and the kernel writes at most `value.len()` bytes into `value`.
        let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        if len > 0 && value[0] == b'1' {
            return Ok(true);
        }
    }
    Ok(false)
}

fn c_path(path: &Path) -> Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|error| CgroupError::Io { op: "name", path: path.to_owned(), source: error.into() })
}

fn prepare(cgroups: &Cgroups) -> Result<()> {
    for hierarchy in &cgroups.hierarchies {
        let parent = hierarchy.root.parent().unwrap_or(Path::new("/"));
        if hierarchy.unified {
            enable_controllers(parent, &hierarchy.controllers)?;
        }
        match std::fs::create_dir(&hierarchy.root) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CgroupError::Io { op: "make", path: hierarchy.root.clone(), source }),
        }
        if hierarchy.unified {
            enable_controllers(&hierarchy.root, &hierarchy.controllers)?;
        } else if hierarchy.controllers.iter().any(|name| name == "cpuset") {
            inherit_cpuset(&hierarchy.root)?;
        }
    }
    Ok(())
}

/// Turns controllers on for the children of `dir`. When the kernel refuses because `dir` itself holds processes, they
/// move into its leaf `agent` first.
fn enable_controllers(dir: &Path, controllers: &[String]) -> Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let on = words(&file)?;
    for name in controllers.iter().filter(|name| !on.contains(name)) {
        let switch = format!("+{name}");
        match write(&file, &switch) {
            Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                move_processes_to_leaf(dir)?;
                write(&file, &switch)?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn move_processes_to_leaf(dir: &Path) -> Result<()> {
    let leaf = dir.join(AGENT_LEAF);
    match std::fs::create_dir(&leaf) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(CgroupError::Io { op: "make", path: leaf, source });
        }
        _ => {}
    }
    let target = leaf.join("cgroup.procs");
    for _ in 0..MOVE_ROUNDS {
        let pids = read(&dir.join("cgroup.procs"))?;
        if pids.trim().is_empty() {
            return Ok(());
        }
        for pid in pids.lines() {
            match write(&target, pid) {
                // It ended meanwhile.
                Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
    }
    Err(CgroupError::Unusable(format!("{} keeps getting new processes, so its controllers cannot be enabled", dir.display())))
}

/// Where a v1 hierarchy drives processors: the server's own directory, beside the machines' root.
fn server_dirs(hierarchies: &[Hierarchy]) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
    let v1 = hierarchies.iter().filter(|hierarchy| !hierarchy.unified && hierarchy.controllers.iter().any(|name| name == "cpu"));
    v1.filter_map(|hierarchy| {
        let name = hierarchy.root.file_name()?.to_str()?;
        Some((hierarchy, hierarchy.root.with_file_name(format!("{name}-server"))))
    })
}

pub(super) fn favour_server(hierarchies: &[Hierarchy]) -> Result<()> {
    for (hierarchy, dir) in server_dirs(hierarchies) {
        match std::fs::create_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CgroupError::Io { op: "make", path: dir, source });
            }
            _ => {}
        }
        if hierarchy.controllers.iter().any(|name| name == "cpuset") {
            inherit_cpuset(&dir)?;
        }
        write(&dir.join("cpu.shares"), &(SERVER_WEIGHT * 1024).to_string())?;
        write(&dir.join("cgroup.procs"), "0")?;
    }
    // A delegated service's own processes are in its leaf; elsewhere in a v2 tree the server has no place of its own.
    for hierarchy in hierarchies.iter().filter(|hierarchy| hierarchy.unified) {
        let leaf = hierarchy.root.with_file_name(AGENT_LEAF);
        for file in ["cpu.weight", "io.weight"].map(|file| leaf.join(file)).iter().filter(|file| file.exists()) {
            write(file, &(SERVER_WEIGHT * 100).to_string())?;
        }
        // It opens secrets.
        let swap = leaf.join("memory.swap.max");
        if swap.exists() {
            write(&swap, "0")?;
        }
    }
    Ok(())
}

/// The caller may be in it: then it stays for the next time.
pub(super) fn remove_server(hierarchies: &[Hierarchy]) {
    for (_, dir) in server_dirs(hierarchies) {
        let _ = std::fs::remove_dir(dir);
    }
}

/// A new v1 cpuset has no processors and no memory nodes, and lets nobody in until it has both.
pub(super) fn inherit_cpuset(dir: &Path) -> Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if read(&dir.join(file))?.trim().is_empty() {
            let from_parent = read(&parent.join(file))?;
            write(&dir.join(file), from_parent.trim())?;
        }
    }
    Ok(())
}

fn words(path: &Path) -> Result<Vec<String>> {
    Ok(read(path)?.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
33 32 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 32 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
35 32 0:30 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
36 32 0:31 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
37 32 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
38 32 0:32 / /mnt/again\\040here rw - cgroup cgroup rw,xattr,name=systemd
39 32 0:33 / /proc rw - proc proc rw
";

    fn not_delegated(_: &CgroupMount) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    /// A directory that looks like a v2 mount to `plan`.
    fn v2_tree(controllers: &str) -> (tempfile::TempDir, CgroupMount) {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("cgroup.controllers"), controllers).expect("write");
        let mount = CgroupMount { fs_root: "/".to_owned(), at: dir.path().to_owned(), controllers: None };
        (dir, mount)
    }

    #[test]
    fn a_v1_table_is_read_whole_and_once() {
        let mounts = parse_mountinfo(HYBRID);
        assert_eq!(mounts.len(), 5);
        let cgroups = plan(&mounts, "dunlin-x", not_delegated).expect("usable");
        assert_eq!(cgroups.layout(), Layout::V1);
        assert_eq!(cgroups.hierarchies[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!(cgroups.hierarchies[0].root, Path::new("/sys/fs/cgroup/cpu,cpuacct/dunlin-x"));
        assert!(cgroups.hierarchies.iter().any(|h| h.controllers == ["name=systemd"]));
    }

    #[test]
    fn a_v2_tree_beside_v1_is_hybrid() {
        let (_dir, mount) = v2_tree("hugetlb\n");
        let mut mounts = parse_mountinfo(HYBRID);
        mounts.push(mount);
        assert_eq!(plan(&mounts, "dunlin-x", not_delegated).expect("usable").layout(), Layout::Hybrid);
    }

    #[test]
    fn a_missing_controller_is_named() {
        let without_memory: String = HYBRID.lines().filter(|l| !l.contains("/memory ")).map(|l| format!("{l}\n")).collect();
        let error = plan(&parse_mountinfo(&without_memory), "dunlin-x", not_delegated).expect_err("unusable");
        assert!(error.to_string().contains("the memory controller"), "{error}");
        let error = plan(&[], "dunlin-x", not_delegated).expect_err("unusable");
        assert!(error.to_string().contains("no cgroup file system"), "{error}");
    }

    #[test]
    fn pure_v2_prefers_the_delegated_cgroup_and_enables_controllers_down_to_the_root() {
        let (dir, mount) = v2_tree("cpuset cpu io memory hugetlb pids rdma\n");
        let plain = plan(std::slice::from_ref(&mount), "dunlin-x", not_delegated).expect("usable");
        assert_eq!(plain.layout(), Layout::V2);
        assert_eq!(plain.hierarchies[0].root, dir.path().join("dunlin-x"));
        assert_eq!(plain.hierarchies[0].controllers, ["cpu", "memory", "pids", "cpuset", "io"]);

        let service = dir.path().join("system.slice/dunlin.service");
        std::fs::create_dir_all(&service).expect("make");
        std::fs::write(service.join("cgroup.controllers"), "cpu memory pids").expect("write");
        let inside = plan(&[mount], "dunlin-x", |_| Ok(Some(service.clone()))).expect("usable");
        assert_eq!(inside.hierarchies[0].root, service.join("dunlin-x"));
        assert_eq!(inside.hierarchies[0].controllers, ["cpu", "memory", "pids"]);
    }

    /// On the running kernel's v2 tree, with any controller that it offers and that wants no processes beside groups.
    #[test]
    fn processes_move_to_the_leaf_when_the_kernel_asks_for_it() {
        let table = read(Path::new("/proc/self/mountinfo")).expect("mounts");
        let mounts = parse_mountinfo(&table);
        let mount = mounts.iter().find(|mount| mount.controllers.is_none()).expect("a v2 tree is mounted");
        let offered = words(&mount.at.join("cgroup.controllers")).expect("controllers");
        let threaded = ["cpu", "cpuset", "perf_event", "pids"];
        let controller = offered.iter().find(|name| !threaded.contains(&name.as_str()));
        let controller = controller.expect("the v2 tree offers a controller").clone();
        let was_on = words(&mount.at.join("cgroup.subtree_control")).expect("read").contains(&controller);
        enable_controllers(&mount.at, std::slice::from_ref(&controller)).expect("enable at the root");

        let dir = mount.at.join(format!("dunlin-test-leaf-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("make");
        let mut child = std::process::Command::new("sleep").arg("300").spawn().expect("start");
        write(&dir.join("cgroup.procs"), &child.id().to_string()).expect("join");
        let enabled = enable_controllers(&dir, std::slice::from_ref(&controller));
        let moved = read(&dir.join("agent/cgroup.procs"));
        let again = enable_controllers(&dir, std::slice::from_ref(&controller));

        child.kill().expect("kill");
        child.wait().expect("wait");
        super::super::machine::remove_dir(&dir.join(AGENT_LEAF)).expect("remove");
        super::super::machine::remove_dir(&dir).expect("remove");
        if !was_on {
            write(&mount.at.join("cgroup.subtree_control"), &format!("-{controller}")).expect("disable");
        }
        enabled.expect("enable below");
        again.expect("enable twice");
        assert_eq!(moved.expect("read").trim(), child.id().to_string());
    }
}
