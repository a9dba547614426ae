//! What a server has in the kernel and on its disk, name by name, so that what is left behind has a name too.

use crate::{Server, processes, text};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Deeper than any path that a server makes in control groups.
const MAX_DEPTH: usize = 8;

/// Where to look for what is one server's. Learned from a machine that runs: several servers share a computer.
pub struct Place {
    data: PathBuf,
    keeper: u32,
    /// The name of its control groups and of its firewall's table.
    instance: String,
    /// Of its machines' interfaces.
    group: String,
    prefix: String,
}

/// Kinds of things, and the names of those that there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census(BTreeMap<&'static str, BTreeSet<String>>);

impl Place {
    pub fn of(server: &Server, running: &str) -> Self {
        let supervisor = server.supervisor_pid(running).expect("the machine runs");
        let groups = fs::read_to_string(format!("/proc/{supervisor}/cgroup")).unwrap();
        let instance = groups.split('/').find(|part| part.starts_with("dunlin")).expect("a control group of the server");
        let group = fs::read_to_string(format!("/sys/class/net/{}/netdev_group", interface(running))).unwrap();
        Self {
            data: server.data(),
            keeper: server.keeper_pid(),
            instance: instance.trim().to_owned(),
            group: group.trim().to_owned(),
            prefix: server.address_prefix(),
        }
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub fn group(&self) -> &str {
        &self.group
    }

    /// One of those of a machine that runs; there is one in each hierarchy.
    pub fn machines_control_group(&self, machine: &str) -> PathBuf {
        let name = format!("m-{machine}");
        self.control_groups().into_iter().find(|path| path.ends_with(&name)).expect("the machine runs")
    }

    pub fn count(&self) -> Census {
        let mut kinds = BTreeMap::new();
        let inside = self.processes();
        kinds.insert("mounts", self.mounts());
        kinds.insert("control groups", self.control_groups().iter().map(|path| path.display().to_string()).collect());
        kinds.insert("processes", inside.iter().filter_map(|pid| named(*pid)).collect());
        kinds.insert("namespaces", self.namespaces(&inside));
        kinds.insert("interfaces", self.interfaces());
        kinds.insert("routes", self.routes());
        kinds.insert("firewall entries", self.firewall());
        kinds.insert("loop devices", self.loop_devices());
        kinds.insert("files", self.files());
        kinds.insert("descriptors of the keeper", entries(&format!("/proc/{}/fd", self.keeper)));
        kinds.insert("threads of the keeper", (1..=entries(&format!("/proc/{}/task", self.keeper)).len()).map(|n| n.to_string()).collect());
        Census(kinds)
    }

    fn mounts(&self) -> BTreeSet<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let at = |line: &str| line.split(' ').nth(4).unwrap_or_default().to_owned();
        table.lines().map(at).filter(|at| Path::new(at).starts_with(&self.data)).collect()
    }

    /// Directories of all hierarchies that are this server's.
    fn control_groups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        walk(Path::new("/sys/fs/cgroup"), MAX_DEPTH, &mut |path| {
            if path.components().any(|part| part.as_os_str() == self.instance.as_str()) {
                found.push(path.to_owned());
            }
        });
        found
    }

    /// Of machines and supervisors; the server itself is in none of the groups that are machines'.
    fn processes(&self) -> BTreeSet<u32> {
        let of_machines = |path: &&PathBuf| path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with("m-") || name.starts_with("s-")
        });
        let groups = self.control_groups();
        let listed = groups.iter().filter(of_machines).filter_map(|path| fs::read_to_string(path.join("cgroup.procs")).ok());
        listed.flat_map(|text| text.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()).collect()
    }

    /// Those of machines, and those that somebody keeps by a descriptor or a mount.
    fn namespaces(&self, inside: &BTreeSet<u32>) -> BTreeSet<String> {
        let ours = links("/proc/self/ns");
        let held = processes().into_iter().filter(|(pid, line)| *pid == self.keeper || line.contains(self.data.to_str().unwrap()));
        let held = held.flat_map(|(pid, _)| links(&format!("/proc/{pid}/fd")));
        let of_machines = inside.iter().flat_map(|pid| links(&format!("/proc/{pid}/ns")));
        of_machines.chain(held.filter(|link| link.contains(":[") && !link.starts_with("pipe") && !link.starts_with("socket") && !link.starts_with("anon")))
            .filter(|link| !ours.contains(link))
            .collect()
    }

    fn interfaces(&self) -> BTreeSet<String> {
        let is_ours = |name: &String| {
            let group = fs::read_to_string(format!("/sys/class/net/{name}/netdev_group"));
            group.is_ok_and(|group| group.trim() == self.group)
        };
        entries("/sys/class/net").into_iter().filter(is_ours).collect()
    }

    fn routes(&self) -> BTreeSet<String> {
        lines(Command::new("ip").args(["-4", "route", "show", "table", "all"])).into_iter().filter(|line| line.contains(&self.prefix)).collect()
    }

    fn firewall(&self) -> BTreeSet<String> {
        let text = lines(Command::new("nft").args(["-s", "list", "ruleset"])).join("\n");
        let tables = text.split("\ntable ").filter(|table| table.lines().next().is_some_and(|head| head.contains(&self.instance)));
        tables.flat_map(|table| table.split(['\n', ',']).map(|entry| entry.trim().to_owned()).collect::<Vec<_>>()).collect()
    }

    fn loop_devices(&self) -> BTreeSet<String> {
        let backing = |name: &String| fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok();
        let files = entries("/sys/block").into_iter().filter_map(|name| backing(&name).map(|file| file.trim().to_owned()));
        files.filter(|file| Path::new(file).starts_with(&self.data)).collect()
    }

    /// Of machines and volumes, besides what programs print.
    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for dir in ["machines", "volumes", "run"] {
            walk_files(&self.data.join(dir), MAX_DEPTH, &mut |path| {
                if !path.components().any(|part| part.as_os_str() == "log") {
                    found.insert(path.display().to_string());
                }
            });
        }
        found
    }
}

impl Census {
    /// What differs, one line each; nothing: they are the same.
    pub fn changes_to(&self, later: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (kind, before) in &self.0 {
            let after = &later.0[kind];
            changes.extend(after.difference(before).map(|name| format!("{kind}: {name} is left")));
            changes.extend(before.difference(after).map(|name| format!("{kind}: {name} is gone")));
        }
        changes
    }

    pub fn summary(&self) -> String {
        let counts: Vec<String> = self.0.iter().map(|(kind, names)| format!("{} {kind}", names.len())).collect();
        counts.join(", ")
    }

    pub fn kinds(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }
}

/// The name of a machine's interface on the host.
pub fn interface(machine: &str) -> String {
    format!("dl{}", &machine[..12])
}

/// Processes with exactly this command line, and the machine in whose control group each is.
pub fn running(command: &str) -> Vec<(u32, String)> {
    let all = processes().into_iter().filter(|(_, line)| line == command);
    all.filter_map(|(pid, _)| {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let machine = groups.split(['/', '\n']).find_map(|part| part.strip_prefix("m-")).unwrap_or("no machine");
        Some((pid, machine.to_owned()))
    })
    .collect()
}

fn named(pid: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(format!("{pid} {}", String::from_utf8_lossy(&line).replace('\0', " ").trim_end()))
}

fn entries(dir: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn links(dir: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned())).collect()
}

fn lines(command: &mut Command) -> Vec<String> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

fn walk(dir: &Path, depth: usize, see: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            see(&entry.path());
            walk(&entry.path(), depth - 1, see);
        }
    }
}

fn walk_files(dir: &Path, depth: usize, see: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        see(&entry.path());
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk_files(&entry.path(), depth - 1, see);
        }
    }
}
