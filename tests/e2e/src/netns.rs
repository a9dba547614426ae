//! Network namespaces: each a computer as far as the network goes. Nothing of this computer's own network changes.

use crate::{processes, text};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Names of all namespaces that tests make; the process id follows, so that runs do not meet.
const PREFIX: &str = "dunlin-e2e-";
/// What was killed with -9 is gone in this time.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// Removed at its drop, with all that lives in it.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// `what` is for people who look.
    pub fn make(what: &str) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        remove_those_of_dead_runs();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{what}", std::process::id());
        ok(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// The program inside, with the process id of the command: nothing stays between.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    pub fn ip(&self, args: &[&str]) {
        ok(self.command("ip").args(args));
    }

    pub fn nft(&self, args: &[&str]) {
        ok(self.command("nft").args(args));
    }

    /// A thread inside; those that it makes are inside too.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let inside = File::open(self.path()).unwrap();
        thread::spawn(move || {
            move_into_link_name_space(inside.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        })
    }

    /// Whether the process lives inside.
    pub fn has(&self, pid: u32) -> bool {
        inode(&self.path()).is_some_and(|inside| inode(Path::new(&format!("/proc/{pid}/ns/net"))) == Some(inside))
    }

    /// Ends at once all that lives inside and all that comes from that: machines have namespaces of their own.
    pub fn kill_all(&self) {
        kill_all_of(&self.path());
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.kill_all();
        let removed = Command::new("ip").args(["netns", "del", &self.name]).output().unwrap();
        if !removed.status.success() {
            eprintln!("the namespace {} stays: {}", self.name, text(&removed)); // the next run removes it
        }
    }
}

/// Links two namespaces; each gives its end a name.
pub fn link(one: &Namespace, its: &str, other: &Namespace, others: &str) {
    one.ip(&["link", "add", its, "type", "veth", "peer", "name", others, "netns", &other.name]);
    one.ip(&["link", "set", its, "up"]);
    other.ip(&["link", "set", others, "up"]);
}

fn ok(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
}

fn remove_those_of_dead_runs() {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            kill_all_of(&entry.path());
            let _ = Command::new("ip").args(["netns", "del", &name]).status(); // another run removes it too
        }
    }
}

fn kill_all_of(namespace: &Path) {
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        let living = living_in(namespace);
        if living.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            eprintln!("they do not die: {living:?} of {}", namespace.display());
            return;
        }
        let pids = living.iter().map(u32::to_string);
        let _ = Command::new("kill").arg("-KILL").args(pids).output(); // some are gone by then
        thread::sleep(Duration::from_millis(10));
    }
}

/// Parents first, so that nobody restarts a child: processes inside, and those that come from them.
fn living_in(namespace: &Path) -> Vec<u32> {
    let Some(own) = inode(namespace) else { return vec![] };
    let inside = |pid: u32| inode(Path::new(&format!("/proc/{pid}/ns/net"))) == Some(own);
    let me = std::process::id();
    let all: BTreeMap<u32, u32> = processes().into_iter().filter_map(|(pid, _)| Some((pid, parent(pid)?))).collect();
    let mut found: BTreeSet<u32> = all.keys().copied().filter(|pid| *pid != me && inside(*pid)).collect();
    let mut ordered: Vec<u32> = found.iter().copied().collect();
    let mut next = 0;
    while next < ordered.len() {
        let children = all.iter().filter(|(pid, parent)| **parent == ordered[next] && !found.contains(pid));
        let children: Vec<u32> = children.map(|(pid, _)| *pid).collect();
        found.extend(&children);
        ordered.extend(children);
        next += 1;
    }
    ordered
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|file| file.ino())
}

/// `None`: it has ended, or nobody has waited for it yet.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z")
}
