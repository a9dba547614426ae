//! An ordinary user of this computer, who may have a server of their own.

use crate::processes;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// Made for one test, with ids of its own in /etc/subuid and /etc/subgid, and removed with it.
pub struct User {
    name: String,
    pub uid: u32,
    pub gid: u32,
}

impl User {
    pub fn make() -> Self {
        let name = format!("dunlin-e2e-{}", std::process::id());
        // udev gives it to everybody; without udev it is root's alone.
        let opened = Command::new("chmod").args(["666", "/dev/net/tun"]).status().unwrap();
        assert!(opened.success(), "user-mode networks need /dev/net/tun");
        let made = Command::new("useradd").args(["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", &name]).status();
        assert!(made.unwrap().success(), "useradd {name}");
        let number = |flag: &str| {
            let output = Command::new("id").args([flag, &name]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
        };
        let user = Self { uid: number("-u"), gid: number("-g"), name };
        assert!(user.first_granted() > 0, "useradd granted {} no ids; see SUB_UID_COUNT in /etc/login.defs", user.name);
        user
    }

    /// The first id beyond its own that it may give to others.
    pub fn first_granted(&self) -> u32 {
        let table = fs::read_to_string("/etc/subuid").unwrap();
        let line = table.lines().find_map(|line| line.strip_prefix(&format!("{}:", self.name)));
        line.and_then(|line| line.split(':').next()?.parse().ok()).unwrap_or(0)
    }

    /// Whose a process is on this computer.
    pub fn of(pid: u32) -> Option<u32> {
        Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
    }

    /// What runs as this user, or with an id that it was granted.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let granted = self.first_granted()..self.first_granted() + 65_536;
        let is_ours = |pid: u32| Self::of(pid).is_some_and(|uid| uid == self.uid || granted.contains(&uid));
        processes().into_iter().filter(|(pid, line)| is_ours(*pid) && !line.is_empty()).collect()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            crate::kill(pid, "KILL"); // of a test that failed: others are gone
        }
        let _ = Command::new("userdel").arg("--force").arg(&self.name).status(); // told by the next one, if it has its name
    }
}
