//! What this server can do for machines, and what it cannot: found out once, before anything else, and asked by all that
//! depends on it. Root of the computer can do all of it. Who is root of a user namespace only (an ordinary user's server
//! is) can do less, and this says what, why, what that costs and what to do.

use std::net::Ipv4Addr;
use std::path::Path;

use super::FeatureCheck;
use crate::cgroup::{Cgroups, Result as CgroupResult};
use crate::spec::{Ids, UID_RANGE};

/// One thing that this server can do, or why it cannot and what follows.
pub type Ability = Result<(), FeatureCheck>;

#[derive(Debug, Clone)]
pub struct Abilities {
    pub ids: Ids,
    /// A range of user ids for each machine.
    pub own_ids: Ability,
    /// Control groups: what a machine uses is limited and measured, and it can be suspended.
    pub limits: Ability,
    /// File systems of a size: volumes, and root file systems that fill up by themselves.
    pub sizes: Ability,
    /// Machines, and this server, reach the internet.
    pub egress: Ability,
    /// Addresses of this computer that its network would not tell from the internet: machines are kept from them.
    pub outside: Vec<Ipv4Addr>,
    cgroups: Cgroups,
}

impl Abilities {
    /// Makes this server's control groups, where it may. `outside` are the addresses of this computer, where this process
    /// has another network than that.
    pub fn find(instance: &str, data_dir: &Path, outside: Vec<Ipv4Addr>) -> CgroupResult<Self> {
        if !in_user_namespace() {
            // All of it is required there, and its lack is told by the checks before.
            let cgroups = Cgroups::detect(instance)?;
            return Ok(Self { ids: Ids::Own, own_ids: Ok(()), limits: Ok(()), sizes: Ok(()), egress: Ok(()), outside, cgroups });
        }
        let (cgroups, limits) = match delegated().and_then(|()| Cgroups::detect(instance).map_err(|e| super::chain(&e))) {
            Ok(cgroups) => (cgroups, Ok(())),
            Err(why) => (Cgroups::none(&data_dir.join("run/processes"), &why)?, Err(no_limits(why))),
        };
        let (ids, own_ids, sizes) = (Ids::Shared { first: 1 }, Err(shared_ids()), Err(no_sizes()));
        Ok(Self { ids, own_ids, limits, sizes, egress: egress(), outside, cgroups })
    }

    pub fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    /// What this server cannot do.
    pub fn costs(&self) -> impl Iterator<Item = &FeatureCheck> {
        [&self.limits, &self.sizes, &self.own_ids, &self.egress].into_iter().filter_map(|ability| ability.as_ref().err())
    }
}

/// The same, for `dunlin doctor`, of one who is root of a user namespace only; makes nothing.
pub(super) fn costs() -> Vec<FeatureCheck> {
    let limits = delegated().err().map(no_limits);
    limits.into_iter().chain([no_sizes(), shared_ids()]).chain(egress().err()).collect()
}

/// What user-mode networks take packets from.
const TUN: &str = "/dev/net/tun";

fn lack(name: &'static str, found: String, cost_if_missing: &'static str, fix: String) -> FeatureCheck {
    FeatureCheck { name, required: false, ok: false, found, cost_if_missing, fix }
}

fn no_limits(why: String) -> FeatureCheck {
    lack(
        "cgroups",
        why,
        "machines are not limited in processor time and memory: each may take all that this user may, and the sizes that they ask \
         for are only counted; out of memory, the kernel ends whatever it chooses; no machine can be suspended",
        "run it with systemd-run --user --scope -p Delegate=yes dunlin server, on pure control groups v2, or as root".to_owned(),
    )
}

fn no_sizes() -> FeatureCheck {
    lack(
        "loop devices",
        "file systems in files are mounted by root of the computer only".to_owned(),
        "there are no volumes; root file systems, temporary directories and build caches have no size, and who fills one fills \
         the disk of the data directory",
        "give the data directory a file system of its own; for volumes run it as root".to_owned(),
    )
}

fn shared_ids() -> FeatureCheck {
    lack(
        "id-mapped mounts",
        "files are mapped to other ids by root of the computer only".to_owned(),
        "all machines have one range of user ids: a program that broke out of its machine could reach the files of the others, \
         though neither this user's nor anybody else's; they also share what the kernel counts by user, inotify \
         instances for example",
        "run it as root where machines of strangers have to be kept apart that far".to_owned(),
    )
}

/// That there is a way out is worth saying.
pub(super) fn egress_check() -> Option<FeatureCheck> {
    let found = "there is a way out of this server's network, as this user's own connections".to_owned();
    let cost_if_missing = "machines, builds and pulls of images reach nothing outside";
    egress().ok().map(|()| FeatureCheck { name: "internet", required: false, ok: true, found, cost_if_missing, fix: String::new() })
}

fn egress() -> Ability {
    let cost = "machines, builds and pulls of images reach nothing outside; requests still reach machines";
    let tun = std::fs::OpenOptions::new().read(true).write(true).open(TUN);
    let again = "then start the server again";
    let (found, fix) = match (crate::net::uplink_mtu(), crate::enclave::tool(), tun) {
        (Ok(Some(_)), ..) => return Ok(()),
        (Err(error), ..) => (super::chain(&error), "mount /proc".to_owned()),
        (_, None, _) => ("slirp4netns was not found".to_owned(), format!("apt-get install slirp4netns, {again}")),
        (_, _, Err(error)) => (format!("{TUN}: {error}"), format!("chmod 666 {TUN}, as most systems have it, {again}")),
        _ => ("slirp4netns does not run".to_owned(), format!("see run/egress.log in the data directory, {again}")),
    };
    Err(lack("internet", found, cost, fix))
}

/// Whether this process's root is not the computer's.
pub fn in_user_namespace() -> bool {
    mapped(&std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default()) < u64::from(u32::MAX)
}

/// Whether its user namespace has ids for itself and for machines.
pub(super) fn enough_ids() -> Result<(), String> {
    for file in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        let has = mapped(&std::fs::read_to_string(file).unwrap_or_default());
        if has < 1 + u64::from(UID_RANGE) {
            return Err(format!("{file} has {has} ids, and machines need {UID_RANGE} beside root's"));
        }
    }
    Ok(())
}

/// How many ids there are from 0 on without a gap.
fn mapped(table: &str) -> u64 {
    let mut ranges: Vec<(u64, u64)> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(str::parse::<u64>);
            let (first, _outside, count) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
            Some((first, count))
        })
        .collect();
    ranges.sort_unstable();
    ranges.iter().fold(0, |end, (first, count)| if *first <= end { end.max(first + count) } else { end })
}

/// Whether somebody gave this user control groups of its own.
pub(super) fn delegated() -> Result<(), String> {
    super::ordinary::delegated(Path::new("/sys/fs/cgroup")).map(drop).map_err(|(found, _)| found)
}

/// Where a user-mode network answers for names (see `enclave`).
pub const EGRESS_RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_counted_up_to_the_first_gap() {
        for (table, count) in [
            ("         0          0 4294967295\n", u64::from(u32::MAX)),
            ("0 1001 1\n1 100000 65536\n", 65_537),
            ("1 100000 65536\n0 1001 1\n", 65_537),
            ("0 1001 1\n2 100000 65536\n", 1),
            ("", 0),
        ] {
            assert_eq!(mapped(table), count, "{table:?}");
        }
    }

    #[test]
    fn what_is_lacking_says_why_and_what_to_do() {
        for check in [no_limits("x".into()), no_sizes(), shared_ids()] {
            assert!(!check.ok && !check.found.is_empty() && !check.cost_if_missing.is_empty() && !check.fix.is_empty());
        }
    }
}
