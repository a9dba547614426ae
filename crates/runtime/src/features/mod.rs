//! What this host can do for machines, found out by trying: `dunlin doctor` prints it, the server refuses to start
//! when something required is missing.
//!
//! Each check says what was found, what is lost without it and what to do. Checks try the true thing where that leaves
//! nothing behind: mounts in a mount namespace of their own, interfaces and rules in a network namespace of their own.
//! They change nothing on the host, besides a directory in the data directory that is gone afterwards.

mod abilities;
mod mounts;
mod ordinary;

pub use abilities::{Abilities, Ability, EGRESS_RESOLVER, in_user_namespace};
pub use ordinary::of_an_ordinary_user;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::cgroup::{Cgroups, PID_MAX, PID_MAX_WANTED, ProcessRoom};
use crate::net::firewall::{Firewall, find_program};
use crate::net::{self};
use crate::sys;
use crate::volume;

/// Id-mapped lower layers under overlayfs came with this kernel.
const KERNEL_MIN: (u32, u32) = (5, 19);
/// Below this a server fills up with its first images.
const DISK_FREE_MIN_BYTES: u64 = 5 << 30;
/// A check that hangs (a dead network mount as data directory, say) must not hang the server's start.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const GIB: u64 = 1 << 30;

/// One finding about the host.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct FeatureCheck {
    pub name: &'static str,
    /// The server does not start without it.
    pub required: bool,
    pub ok: bool,
    /// What is there, or why it is not.
    pub found: String,
    pub cost_if_missing: &'static str,
    /// What to do about it; empty when it is fine.
    pub fix: String,
}

impl FeatureCheck {
    /// For who asked for what depends on it.
    pub fn refusal(&self, what: &str) -> String {
        format!("this server cannot {what}, because {}; {}", self.found, self.fix)
    }
}

/// Outcome of one check: what was found, or what went wrong and what to do.
type Outcome = Result<String, (String, String)>;

fn missing(found: impl Into<String>, fix: impl Into<String>) -> Outcome {
    Err((found.into(), fix.into()))
}

/// All checks, in the order that a person should mend them. Takes some tens of milliseconds; blocking.
pub fn check_all(data_dir: &Path) -> Vec<FeatureCheck> {
    let mut checks = Vec::new();
    let mut add = |name, required, cost_if_missing, outcome: Outcome| {
        let (ok, found, fix) = match outcome {
            Ok(found) => (true, found, String::new()),
            Err((found, fix)) => (false, found, fix),
        };
        checks.push(FeatureCheck { name, required, ok, found, cost_if_missing, fix });
    };
    let near = nearest_existing(data_dir);
    // Who is root of a user namespace only goes without some of it: see `Abilities`.
    let whole = !in_user_namespace();
    add("root", true, "no machine can run", privileges());
    add("kernel", true, "layers cannot be shared between machines", kernel());
    add("user namespaces", true, "no machine can run", mounts::user_namespaces());
    let (overlay, idmap) = off_thread({
        let near = near.clone();
        move || mounts::overlay_and_idmap(&near)
    })
    .unwrap_or_else(|why| (missing(why.clone(), ""), missing(why, "")));
    add("overlayfs", true, "no machine can run", overlay);
    add("id-mapped mounts", whole, "no machine can run: its files would belong to others", idmap);
    add("cgroups", whole, "machines cannot be limited, measured or ended for sure", cgroups());
    add("processes", false, "a few machines that run out of control leave none to the others", processes());
    add("seccomp", true, "machines would see every system call", seccomp());
    add("veth", true, "machines have no network", off_thread(veth).unwrap_or_else(|why| missing(why, "")));
    add("nft", true, "machines have no network: nothing would keep them apart", off_thread(nft).unwrap_or_else(|why| missing(why, "")));
    add("ip_forward", true, "machines do not reach the internet", ip_forward());
    add("resolvers", false, "names do not resolve in machines", resolvers());
    add("free disk", false, "images and builds fail soon", free_disk(&near));
    add("loop devices", false, "builds have no cache and volumes no size limit", loop_devices());
    add("mkfs.ext4", false, "builds have no cache and volumes no size limit", program("mkfs.ext4", "apt-get install e2fsprogs"));
    let encryption = volume::look().or_else(|lacking| missing(lacking.what, lacking.fix));
    add("encryption", false, "volumes are not encrypted on the disk", encryption);
    add("buildah", false, "Dockerfiles are not built; images can still be deployed", program("buildah", "apt-get install buildah"));
    add("oom priority", false, "under memory pressure the server may be ended before machines are", oom_priority());
    if !whole {
        checks.extend(abilities::egress_check());
        for cost in abilities::costs() {
            checks.retain(|check| check.name != cost.name);
            checks.push(cost);
        }
    }
    checks
}

/// The first directory at or above `path` that exists, since checks come before the data directory is made.
fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

/// Runs a check that moves its thread into other namespaces, so on a thread that ends with it.
fn off_thread<T: Send + 'static>(check: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("feature-check".to_owned())
        .spawn(move || {
            let _nobody_waits_any_more = tell.send(check());
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    told.recv_timeout(CHECK_TIMEOUT).map_err(|_| format!("no answer within {} s", CHECK_TIMEOUT.as_secs()))
}

fn privileges() -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return missing(format!("user {}", nix::unistd::geteuid()), "run as root: sudo dunlin server");
    }
    let lacking: Vec<&str> = [(CAP_SYS_ADMIN, "CAP_SYS_ADMIN"), (CAP_NET_ADMIN, "CAP_NET_ADMIN")]
        .into_iter()
        .filter(|(number, _)| !has_capability(*number))
        .map(|(_, name)| name)
        .collect();
    if lacking.is_empty() && in_user_namespace() {
        return match abilities::enough_ids() {
            Ok(()) => Ok("root of a user namespace, with the capabilities and the ids that machines need".to_owned()),
            Err(why) => missing(why, "grant more in /etc/subuid and /etc/subgid"),
        };
    }
    if lacking.is_empty() {
        return Ok("root with the capabilities that machines need".to_owned());
    }
    missing(format!("root without {}", lacking.join(" and ")), "run outside of a container, or in one with --privileged")
}

fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|mask| mask >> number & 1 == 1)
}

fn kernel() -> Outcome {
    let (major, minor) = KERNEL_MIN;
    let fix = format!("install a kernel of at least {major}.{minor}");
    let release = match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => return missing(format!("unknown: {error}"), fix),
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL_MIN { Ok(format!("Linux {release}")) } else { missing(format!("Linux {release}"), fix) }
}

fn cgroups() -> Outcome {
    if in_user_namespace() {
        return ordinary::delegated(Path::new("/sys/fs/cgroup"));
    }
    match Cgroups::look("dunlin-check") {
        Ok(cgroups) => Ok(cgroups.layout().to_string()),
        Err(error) => missing(error.to_string(), "boot with systemd.unified_cgroup_hierarchy=1"),
    }
}

/// Of the whole computer: machines have less than all, but all of them share it.
fn processes() -> Outcome {
    let room = match ProcessRoom::look() {
        Ok(room) => room,
        Err(error) => return missing(format!("unknown: {error}"), "mount /proc"),
    };
    let found = format!("{} on this computer, {} of them for machines", room.computer, room.machines);
    let pid_max = sys::number_in(PID_MAX).unwrap_or(0);
    match std::fs::OpenOptions::new().write(true).open(PID_MAX) {
        _ if pid_max >= PID_MAX_WANTED => Ok(found),
        Ok(_) => Ok(format!("{found}; the server asks for more")),
        Err(error) => missing(
            format!("{found}, and more cannot be asked for: {error}"),
            format!("outside of this container, as root: sysctl -w kernel.pid_max={PID_MAX_WANTED}"),
        ),
    }
}

fn seccomp() -> Outcome {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads one `u32` from the pointer.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if result == 0 {
        return Ok("filters that end a process are available".to_owned());
    }
    missing(format!("not available: {}", std::io::Error::last_os_error()), "use a kernel with CONFIG_SECCOMP_FILTER")
}

fn own_network() -> Result<(), (String, String)> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|error| (format!("no network namespace: {error}"), "use a kernel with CONFIG_NET_NS".to_owned()))
}

/// Runs on a thread of its own, whose namespaces end with it.
fn veth() -> Outcome {
    own_network()?;
    match net::probe_veth() {
        Ok(()) => Ok("a pair can be made".to_owned()),
        Err(error) => missing(chain(&error), "modprobe veth"),
    }
}

/// Applies the true table in an empty network namespace, which ends with the thread.
fn nft() -> Outcome {
    own_network()?;
    let prefix = "10.201.0.0/16".parse::<net::firewall::Ipv4Prefix>().map_err(|error| (error, String::new()))?;
    let applied = Firewall::new("dunlin_check", prefix, Vec::new()).and_then(|firewall| firewall.apply(&[]));
    match applied {
        Ok(_) => Ok("the machines' table can be set".to_owned()),
        Err(error) => missing(chain(&error), "apt-get install nftables; modprobe nf_tables"),
    }
}

fn ip_forward() -> Outcome {
    let key = "/proc/sys/net/ipv4/ip_forward";
    let writable = || std::fs::OpenOptions::new().write(true).open(key);
    match (std::fs::read_to_string(key), writable()) {
        (Ok(value), _) if value.trim() == "1" => Ok("on".to_owned()),
        (Ok(_), Ok(_)) => Ok("off; the server turns it on and off again".to_owned()),
        (Ok(_), Err(error)) => missing(format!("off, and cannot be set: {error}"), "sysctl -w net.ipv4.ip_forward=1"),
        (Err(error), _) => missing(format!("unknown: {error}"), "mount /proc"),
    }
}

fn resolvers() -> Outcome {
    match net::resolvers() {
        Ok(found) => {
            let servers: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
            Ok(format!("{} from {}", servers.join(", "), found.source.display()))
        }
        Err(error) => missing(chain(&error), "name an IPv4 server in /etc/resolv.conf that is not on loopback"),
    }
}

fn free_disk(near: &Path) -> Outcome {
    match nix::sys::statvfs::statvfs(near) {
        Ok(found) => {
            #[allow(clippy::unnecessary_cast)] // other targets have narrower fields
            let free = found.blocks_available() as u64 * found.fragment_size() as u64;
            let text = format!("{} GiB free at {}", free / GIB, near.display());
            if free >= DISK_FREE_MIN_BYTES {
                Ok(text)
            } else {
                missing(text, format!("free at least {} GiB, or put the data directory on a larger disk", DISK_FREE_MIN_BYTES / GIB))
            }
        }
        Err(error) => missing(format!("unknown at {}: {error}", near.display()), "make the data directory reachable"),
    }
}

fn loop_devices() -> Outcome {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control") {
        Ok(_) => Ok("/dev/loop-control opens".to_owned()),
        Err(error) => missing(format!("/dev/loop-control: {error}"), "modprobe loop"),
    }
}

fn program(name: &str, fix: &str) -> Outcome {
    match find_program(name) {
        Some(path) => Ok(path.display().to_string()),
        None => missing("not found", fix),
    }
}

fn oom_priority() -> Outcome {
    if has_capability(CAP_SYS_RESOURCE) && !in_user_namespace() {
        return Ok("may be set".to_owned());
    }
    missing("cannot be raised: CAP_SYS_RESOURCE of the computer is missing", "run outside of a container, or add that capability")
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn c_path(path: &Path) -> std::io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_says_something_useful_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let checks = check_all(&dir.path().join("not/made/yet"));
        for check in &checks {
            assert!(!check.found.is_empty() && !check.cost_if_missing.is_empty(), "{check:?}");
            assert_eq!(check.ok, check.fix.is_empty(), "{check:?}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        let mut names: Vec<&str> = checks.iter().map(|check| check.name).collect();
        names.dedup();
        assert_eq!(names.len(), checks.len());
    }

    /// The machines that develop and test Dunlin run machines, so all that is required must be there.
    #[test]
    fn what_is_required_is_found_where_the_other_tests_run() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let lacking: Vec<FeatureCheck> =
            check_all(dir.path()).into_iter().filter(|check| check.required && !check.ok).collect();
        assert!(lacking.is_empty(), "{lacking:#?}");
    }
}
