//! What an ordinary user has of what machines need: looked up, and nothing of it tried on the host.
//!
//! With the required ones its server runs in namespaces where it is root (see `enclave`). Saying all of it at once spares
//! whoever tries to grant one after the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{FeatureCheck, Outcome, missing};
use crate::net::firewall::find_program;

/// That machines' control groups need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// For a process that is not root: what its server needs to be root of namespaces of its own, in the order in which it
/// needs them. What is not required costs something, which [`Abilities`](super::Abilities) tell.
pub fn of_an_ordinary_user() -> Vec<FeatureCheck> {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
    let checks: [(&'static str, bool, &'static str, Outcome); 5] = [
        ("user namespaces", true, "no machine can run", user_namespaces()),
        ("user ids", true, "all of a machine's users would be the same one", user_ids(user.as_deref())),
        ("newuidmap", true, "granted user ids cannot be used", super::program("newuidmap", "apt-get install uidmap")),
        ("cgroups", false, "machines cannot be limited, measured or suspended", delegated(Path::new("/sys/fs/cgroup"))),
        (
            "internet",
            false,
            "machines, builds and pulls of images reach nothing outside",
            super::program("slirp4netns", "apt-get install slirp4netns"),
        ),
    ];
    let made = checks.into_iter().map(|(name, required, cost_if_missing, outcome)| {
        let (ok, found, fix) = match outcome {
            Ok(found) => (true, found, String::new()),
            Err((found, fix)) => (false, found, fix),
        };
        FeatureCheck { name, required, ok, found, cost_if_missing, fix }
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
    if crate::enclave::granted(user).is_some() {
        return Ok("enough for machines, by /etc/subuid and /etc/subgid".to_owned());
    }
    missing(
        "/etc/subuid and /etc/subgid grant no range of 65536, which machines share",
        format!("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}, with numbers that nobody else has there"),
    )
}

pub(super) fn delegated(root: &Path) -> Outcome {
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

#[cfg(test)]
mod tests {
    use super::*;

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
