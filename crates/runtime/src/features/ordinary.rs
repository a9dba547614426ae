//! What an ordinary user has of what machines need: looked up, and nothing of it tried on the host.
//!
//! The server does not run without root, because of the last two: whatever else is granted, they are not. Saying all of it
//! at once spares whoever tries to grant one after the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{CAP_NET_ADMIN, CAP_SYS_ADMIN, FeatureCheck, Outcome, has_capability, missing};
use crate::net::firewall::find_program;

/// That machines' control groups need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// For a process that is not root, in the order in which a machine would need them.
pub fn of_an_ordinary_user() -> Vec<FeatureCheck> {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
    let checks: [(&'static str, &'static str, Outcome); 5] = [
        ("user namespaces", "no machine can run", user_namespaces()),
        ("user ids", "all of a machine's users would be the same one", user_ids(user.as_deref())),
        ("cgroups", "machines cannot be limited, measured or ended for sure", delegated(Path::new("/sys/fs/cgroup"))),
        ("mounts", "machines of one image cannot share its layers, and there are no volumes", mounts()),
        ("network", "nothing reaches a machine, and nothing keeps machines apart", network()),
    ];
    let made = checks.into_iter().map(|(name, cost_if_missing, outcome)| {
        let (ok, found, fix) = match outcome {
            Ok(found) => (true, found, String::new()),
            Err((found, fix)) => (false, found, fix),
        };
        FeatureCheck { name, required: true, ok, found, cost_if_missing, fix }
    });
    made.collect()
}

/// A process with several threads cannot make one for itself.
fn user_namespaces() -> Outcome {
    let Some(unshare) = find_program("unshare") else {
        return missing("unknown: unshare was not found", "apt-get install util-linux");
    };
    let tried = Command::new(unshare).args(["--user", "--map-root-user", "true"]).stdin(Stdio::null()).output();
    match tried {
        Ok(output) if output.status.success() => Ok("can be made".to_owned()),
        Ok(output) => missing(
            format!("cannot be made: {}", String::from_utf8_lossy(&output.stderr).trim()),
            "sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=65536; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        Err(error) => missing(format!("unknown: {error}"), "apt-get install util-linux"),
    }
}

fn user_ids(user: Option<&str>) -> Outcome {
    let Some(user) = user else { return missing("the user has no name", "give it one in /etc/passwd") };
    let granted = |file: &str| ranges(&fs::read_to_string(file).unwrap_or_default(), user);
    let machines = granted("/etc/subuid").min(granted("/etc/subgid")) / crate::UID_RANGE;
    if machines > 0 {
        return Ok(format!("enough for {machines} machines, by /etc/subuid and /etc/subgid"));
    }
    missing("/etc/subuid and /etc/subgid grant less than the 65536 of one machine", format!("usermod --add-subuids 100000-6653599 --add-subgids 100000-6653599 {user}"))
}

/// How many ids a table of `name:first:count` grants.
fn ranges(table: &str, user: &str) -> u32 {
    let of = |line: &str| -> Option<u32> {
        let (name, rest) = line.split_once(':')?;
        if name != user { None } else { rest.split_once(':')?.1.trim().parse().ok() }
    };
    table.lines().filter_map(of).fold(0, u32::saturating_add)
}

fn delegated(root: &Path) -> Outcome {
    let fix = "systemd-run --user --scope -p Delegate=yes dunlin server, on pure control groups v2";
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::")) else {
        return missing("there is no control group v2 of this process", fix);
    };
    let dir: PathBuf = root.join(own.trim_start_matches('/'));
    let controllers = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let lacking: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !controllers.split_whitespace().any(|has| has == *name)).collect();
    if !lacking.is_empty() {
        return missing(format!("{} has no controllers {}", dir.display(), lacking.join(", ")), fix);
    }
    match nix::unistd::access(&dir.join("cgroup.procs"), nix::unistd::AccessFlags::W_OK) {
        Ok(()) => Ok(format!("{} is delegated", dir.display())),
        Err(error) => missing(format!("{} is not delegated: {error}", dir.display()), fix),
    }
}

fn mounts() -> Outcome {
    if has_capability(CAP_SYS_ADMIN) {
        return Ok("id-mapped layers and loop devices may be mounted".to_owned());
    }
    missing("id-mapped layers and loop devices are mounted by who has CAP_SYS_ADMIN on the host", "run as root: no setting grants it to others")
}

fn network() -> Outcome {
    if has_capability(CAP_NET_ADMIN) {
        return Ok("interfaces, routes and firewall rules may be made".to_owned());
    }
    missing("interfaces, routes and firewall rules are made by who has CAP_NET_ADMIN on the host", "run as root: no setting grants it to others")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granted_ids_are_those_of_the_user() {
        let table = "ann:100000:65536\nbob:165536:65536\nann:300000:131072\nann:x\nannabel:1:999999\n";
        for (user, expected) in [("ann", 3 * 65536), ("bob", 65536), ("eve", 0)] {
            assert_eq!(ranges(table, user), expected, "{user}");
        }
    }

    #[test]
    fn a_group_that_is_not_there_is_not_delegated() {
        let dir = tempfile::tempdir().unwrap();
        let (found, fix) = delegated(dir.path()).unwrap_err();
        assert!(!found.is_empty() && fix.contains("Delegate"), "{found} {fix}");
    }

    #[test]
    fn every_finding_says_what_it_costs_and_what_to_do() {
        for check in of_an_ordinary_user() {
            assert!(!check.found.is_empty() && !check.cost_if_missing.is_empty(), "{check:?}");
            assert_eq!(check.ok, check.fix.is_empty(), "{check:?}");
        }
    }
}
