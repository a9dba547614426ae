//! Where this server has no control groups: a file that names the first processes of what would be in one.
//!
//! Who is the first of a pid namespace stands for all in it, and takes all of them along when it ends: a machine is killed
//! as completely as by its control group. A command beside a machine's program is in the machine's pid namespace; it and all
//! that it starts are known by a time namespace of their own, which nobody in a machine may leave. Nothing is limited,
//! measured or frozen.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A machine has a few containers, a session one process.
const NAMED_MAX: usize = 4096;
/// Begins a line with a time namespace instead of a process.
const TIME: &str = "time";

#[derive(Debug, Clone)]
pub(super) struct List(PathBuf);

impl List {
    pub fn of(dir: &Path, name: &str) -> Self {
        Self(dir.join(name))
    }

    /// That of a session beside it.
    pub fn session(&self, name: &str) -> Self {
        let mut path = self.0.clone().into_os_string();
        path.push(".");
        path.push(name);
        Self(path.into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn exists(&self) -> bool {
        self.0.exists()
    }

    pub fn create(&self) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.0).map(drop)
    }

    /// 0: the caller.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        let pid = if pid == 0 { nix::unistd::getpid().as_raw() } else { pid };
        let Some(process) = Process::read(pid) else { return Ok(()) }; // it has ended
        // One write: a crash leaves a line or none.
        OpenOptions::new().append(true).open(&self.0)?.write_all(format!("{pid} {}\n", process.started).as_bytes())
    }

    /// All in this time namespace, which the caller keeps open: otherwise its number might become another's.
    pub fn add_time_namespace(&self, inode: u64) -> io::Result<()> {
        OpenOptions::new().append(true).open(&self.0)?.write_all(format!("{TIME} {inode}\n").as_bytes())
    }

    /// With those of its sessions.
    pub fn remove(&self) -> io::Result<()> {
        let (Some(dir), Some(name)) = (self.0.parent(), self.0.file_name().and_then(|name| name.to_str())) else { return Ok(()) };
        let is_below = |other: &str| other.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        for other in names(dir)?.into_iter().filter(|other| is_below(other)) {
            match fs::remove_file(dir.join(other)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// All living processes that it stands for.
    pub fn procs(&self) -> io::Result<BTreeSet<i32>> {
        let text = match fs::read_to_string(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let mut found = BTreeSet::new();
        let mut namespaces = BTreeSet::new();
        for line in text.lines().take(NAMED_MAX) {
            let Some((pid, started)) = line.split_once(' ') else { continue };
            let Ok(started) = started.parse::<u64>() else { continue };
            if pid == TIME {
                namespaces.insert(PathBuf::from(format!("time:[{started}]")));
            }
            let Ok(pid) = pid.parse::<i32>() else { continue };
            // The number of one that has ended may be somebody else's by now.
            if Process::read(pid).is_none_or(|process| process.started != started) {
                continue;
            }
            found.insert(pid);
            if is_first_of_a_namespace(pid) {
                namespaces.extend(namespace(pid, "pid"));
            }
        }
        if namespaces.is_empty() {
            return Ok(found);
        }
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let is_in = |kind: &str| namespace(pid, kind).is_some_and(|ns| namespaces.contains(&ns));
            if (is_in("pid") || is_in("time")) && Process::read(pid).is_some() {
                found.insert(pid);
            }
        }
        Ok(found)
    }
}

/// The directory of this boot's lists below `dir`, and no other: processes are known by number and time since the boot.
pub(super) fn prepare(dir: &Path) -> io::Result<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    fs::create_dir_all(dir.join(&boot))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name() != boot.as_str() {
            crate::remove::remove_tree(&entry.path())?;
        }
    }
    Ok(dir.join(boot))
}

/// All names beneath a directory of lists.
pub(super) fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries?,
    };
    let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
    Ok(names?.into_iter().filter(|name| super::check_name(name).is_ok()).collect())
}

/// One that has not ended, waited for or not.
struct Process {
    started: u64,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in brackets, and may have any bytes in it.
        let close = stat.iter().rposition(|b| *b == b')')?;
        let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        if matches!(*fields.first()?, "Z" | "X") {
            return None;
        }
        Some(Self { started: fields.get(19)?.parse().ok()? })
    }
}

fn namespace(pid: i32, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// Of one below ours.
fn is_first_of_a_namespace(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let numbers: Vec<&str> = numbers.split_whitespace().collect();
    numbers.len() > 1 && numbers.last() == Some(&"1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_number_that_somebody_else_has_is_nobody_here() {
        let dir = tempfile::tempdir().unwrap();
        let list = List::of(dir.path(), "m-1");
        list.create().unwrap();
        assert!(list.create().is_err(), "there is one already");
        fs::write(&list.0, format!("{} 1\n999999999 5\nnonsense\n", std::process::id())).unwrap();
        assert!(list.procs().unwrap().is_empty());
        list.add(0).unwrap();
        assert!(list.procs().unwrap().contains(&nix::unistd::getpid().as_raw()));
        assert_eq!(names(dir.path()).unwrap(), ["m-1"]);
        list.remove().unwrap();
        list.remove().unwrap();
        assert!(list.procs().unwrap().is_empty());
    }

    /// A first process stands for the children of its namespace, whatever session they are in.
    #[test]
    fn all_of_a_pid_namespace_are_found_and_end_with_its_first() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = super::super::Cgroups::none(dir.path(), "a test").unwrap();
        let machine = cgroups.create("m-2", &super::super::Limits::NONE).unwrap();
        let script = "setsid sleep 1000 & setsid setsid sleep 1000 & echo made; wait";
        let mut child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
        machine.add(children.trim().parse().unwrap()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while machine.procs().unwrap().len() < 3 {
            assert!(std::time::Instant::now() < deadline, "{:?}", machine.procs()); // the second of them is under way
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        machine.kill_until_empty(std::time::Duration::from_secs(10)).unwrap();
        assert!(machine.is_empty().unwrap());
        child.wait().unwrap();
        machine.remove().unwrap();
        assert!(cgroups.list().unwrap().is_empty());
    }
}
