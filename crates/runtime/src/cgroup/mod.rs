//! Control groups of machines: limits, membership, killing, usage, on v1, hybrid and pure v2 hosts.
//!
//! `Cgroups::detect` reads the mount table once in the agent and writes down, per controller, where it lives; nothing
//! is guessed afterwards. The value is serializable, so that a supervisor gets it within its spec and never detects on
//! its own. This module never decides limits and never touches a cgroup outside of its own root (besides moving the
//! service's own processes into a leaf, which pure v2 asks for). Tested against the kernel in `tests/cgroup.rs`.

mod cpus;
mod detect;
mod list;
mod machine;
mod processes;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use cpus::CpuSet;
pub use machine::MachineCgroup;
pub use processes::{PID_MAX, PID_MAX_WANTED, ProcessRoom, raise_pid_max};

/// Longest name of a cgroup directory that this module makes.
const NAME_MAX_BYTES: usize = 64;
/// More children than this beneath one root means that something leaks; `list` then refuses to go on.
const LIST_MAX: usize = 65_536;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host's set-up lacks something that machines need; the text says what and how to get it.
    #[error("the host's cgroups cannot be used: {0}")]
    Unusable(String),
    #[error("{0:?} is no cgroup name: 1 to 64 of a-z 0-9 . _ - are, not starting with a dot")]
    BadName(String),
    #[error("cgroup {0} exists already; open and remove it first")]
    AlreadyExists(String),
    #[error("cgroup {0} does not exist")]
    NotFound(String),
    #[error("cannot {op} {path}")]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    #[error("cgroup {name} still holds processes {pids:?} after {waited_ms} ms of killing")]
    StillAlive { name: String, pids: Vec<i32>, waited_ms: u64 },
    #[error("cgroup {name} did not freeze within {waited_ms} ms")]
    NotFrozen { name: String, waited_ms: u64 },
}

pub type Result<T> = std::result::Result<T, CgroupError>;

/// How the host mounts its cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// Only v1 hierarchies.
    V1,
    /// v1 hierarchies hold controllers, and a v2 tree exists beside them.
    Hybrid,
    /// Only the v2 tree.
    V2,
    /// None that this server may use.
    None,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::V1 => "cgroup v1",
            Layout::Hybrid => "cgroup v1 with a v2 tree (hybrid)",
            Layout::V2 => "cgroup v2",
            Layout::None => "no control groups",
        })
    }
}

/// What a machine may use. Zero means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Thousandths of one processor.
    pub cpu_millis: u32,
    pub memory_bytes: u64,
    pub pids: u32,
    /// Its share where processors are scarce, beside others' in thousandths of one; 0 = `cpu_millis`.
    #[serde(default)]
    pub cpu_weight_millis: u32,
    /// Beyond the memory; without a limit of memory it means nothing.
    #[serde(default)]
    pub swap_bytes: u64,
}

impl Limits {
    pub const NONE: Limits =
        Limits { cpu_millis: 0, memory_bytes: 0, pids: 0, cpu_weight_millis: 0, swap_bytes: 0 };
}

/// What a machine uses now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time since the cgroup was made.
    pub cpu_usec: u64,
    /// Working set: memory in use less page cache that the kernel may drop at once.
    pub memory_bytes: u64,
    pub pids: u64,
}

/// One mounted hierarchy and our root directory inside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hierarchy {
    /// Controllers that are to be driven here; for v1 also `name=systemd`.
    pub(crate) controllers: Vec<String>,
    pub(crate) unified: bool,
    /// Directory that holds our machines' directories.
    pub(crate) root: PathBuf,
}

/// Where this server instance's cgroups live. Made by `detect`, handed to supervisors by value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroups {
    layout: Layout,
    hierarchies: Vec<Hierarchy>,
    /// Where there are none: the directory of lists of processes, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lists: Option<Lists>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Lists {
    dir: PathBuf,
    why: String,
}

impl Cgroups {
    /// Reads the mount table, makes `root_name` in every hierarchy and enables the controllers for its children.
    /// Pure v2 beneath a delegated systemd service moves the service's processes into the leaf `agent`. Safe to run
    /// again; machines that exist are left alone.
    pub fn detect(root_name: &str) -> Result<Self> {
        check_name(root_name)?;
        detect::detect(root_name)
    }

    /// What `detect` would find, for `dunlin doctor`; makes and changes nothing, so machines cannot be made with it.
    pub fn look(root_name: &str) -> Result<Self> {
        check_name(root_name)?;
        detect::look(root_name)
    }

    /// Instead of control groups, lists of processes in a directory: see `list`.
    pub fn none(dir: &Path, why: &str) -> Result<Self> {
        let dir = list::prepare(dir).map_err(|source| CgroupError::Io { op: "prepare", path: dir.to_owned(), source })?;
        Ok(Self { layout: Layout::None, hierarchies: vec![], lists: Some(Lists { dir, why: why.to_owned() }) })
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// One line for people: the layout and where each controller is.
    pub fn describe(&self) -> String {
        if let Some(lists) = &self.lists {
            return format!("none: {}", lists.why);
        }
        let places: Vec<String> = self
            .hierarchies
            .iter()
            .map(|hierarchy| {
                let what = if hierarchy.controllers.is_empty() { "no controllers".to_owned() } else { hierarchy.controllers.join(",") };
                format!("{what} at {}", hierarchy.root.display())
            })
            .collect();
        format!("{}: {}", self.layout, places.join("; "))
    }

    /// A machine's cgroup: with limits, and on v1 with no devices but the harmless ones.
    pub fn create(&self, name: &str, limits: &Limits) -> Result<MachineCgroup> {
        let cgroup = self.create_plain(name)?;
        let limited = cgroup.deny_devices().and_then(|()| cgroup.set_limits(limits));
        if let Err(error) = limited {
            cgroup.remove()?;
            return Err(error);
        }
        Ok(cgroup)
    }

    /// A cgroup without limits, for the supervisors. They hold secrets, so none of it is swapped.
    pub fn create_plain(&self, name: &str) -> Result<MachineCgroup> {
        check_name(name)?;
        let cgroup = MachineCgroup::create(name, &self.hierarchies, self.list_of(name))?;
        if let Err(error) = cgroup.keep_from_swap() {
            cgroup.remove()?;
            return Err(error);
        }
        Ok(cgroup)
    }

    /// The cgroup as it is, also when some of its directories are missing (a crash between two `mkdir`s).
    pub fn open(&self, name: &str) -> Result<MachineCgroup> {
        check_name(name)?;
        MachineCgroup::open(name, &self.hierarchies, self.list_of(name))
    }

    fn list_of(&self, name: &str) -> Option<list::List> {
        self.lists.as_ref().map(|lists| list::List::of(&lists.dir, name))
    }

    /// Moving a process between control groups waits until no processor is within a fork: an RCU grace period, some
    /// 10 ms on an idle computer, unless another move ended a moment ago. This one, of the calling process to where it
    /// is, changes nothing: called before a supervisor is started, it lets the wait pass beside the other work. Where
    /// there is no v2 tree, nothing is done, and nothing but the time is lost.
    pub fn hasten_moves(&self) {
        if matches!(self.layout, Layout::Hybrid | Layout::V2)
            && let Err(error) = detect::move_nowhere()
        {
            tracing::debug!(%error, "moves between control groups are not hastened");
        }
    }

    /// All names beneath the root in any hierarchy, sorted.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut names = std::collections::BTreeSet::new();
        if let Some(lists) = &self.lists {
            let found = list::names(&lists.dir);
            names.extend(found.map_err(|source| CgroupError::Io { op: "list", path: lists.dir.clone(), source })?);
        }
        for hierarchy in &self.hierarchies {
            for dir in child_dirs(&hierarchy.root)? {
                if let Some(name) = dir.file_name().and_then(|name| name.to_str()) {
                    names.insert(name.to_owned());
                }
            }
        }
        Ok(names.into_iter().collect())
    }

    /// Gives the calling process a control group beside the machines' with several times the weight of all of them, where
    /// it may have one: on v1, and on v2 below a delegated service.
    pub fn favour_server(&self) -> Result<()> {
        detect::favour_server(&self.hierarchies)
    }

    /// Removes the roots themselves. They must have no children.
    pub fn remove_root(&self) -> Result<()> {
        if let Some(Lists { dir, .. }) = &self.lists {
            return match std::fs::remove_dir(dir) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(CgroupError::Io { op: "remove", path: dir.clone(), source })
                }
                _ => Ok(()),
            };
        }
        detect::remove_server(&self.hierarchies);
        for hierarchy in &self.hierarchies {
            machine::remove_dir(&hierarchy.root)?;
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<()> {
    let bytes = name.as_bytes();
    let fits = !bytes.is_empty()
        && bytes.len() <= NAME_MAX_BYTES
        && bytes[0] != b'.'
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(b));
    if fits { Ok(()) } else { Err(CgroupError::BadName(name.chars().take(NAME_MAX_BYTES).collect())) }
}

/// Directories directly beneath `dir`; none when `dir` is gone.
fn child_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(source) => return Err(CgroupError::Io { op: "list", path: dir.to_owned(), source }),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if is_gone(&error) => break,
            Err(source) => return Err(CgroupError::Io { op: "list", path: dir.to_owned(), source }),
        };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if dirs.len() == LIST_MAX {
                return Err(CgroupError::Unusable(format!("{} has over {LIST_MAX} children", dir.display())));
            }
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}

/// A cgroup directory that was removed meanwhile answers ENOENT, or ENODEV for an already open file.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

pub(crate) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| CgroupError::Io { op: "read", path: path.to_owned(), source })
}

pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    write_raw(path, value).map_err(|source| CgroupError::Io { op: "write", path: path.to_owned(), source })
}

/// One `write` call: cgroup files take a whole value at once, and a file that is missing must not be created.
fn write_raw(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    std::fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_root() {
        for good in ["m1", "dunlin-a", "s-1482e7a9d01c5f", "a.b_c"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "a/b", "A", "ä", "a b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
