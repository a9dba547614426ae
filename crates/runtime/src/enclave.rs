//! The namespaces in which an ordinary user's server is root: of users, mounts and networks.
//!
//! ```text
//! keeper                     the user's process, outside; owns the listening sockets
//!  ├ dunlin __enclave        holds the namespaces, does nothing else; outlives the keeper, as machines do
//!  ├ slirp4netns             carries what leaves the enclave's network, as the user's own connections
//!  └ dunlin __serve          joins the enclave; there it is root, and so are supervisors
//! ```
//!
//! In the enclave 0 is the user, and from 1 on are the ids that /etc/subuid and /etc/subgid grant, which are the machines'.
//! So a machine's root is neither the user nor anybody else on the computer. A file in the data directory says which
//! namespaces these are; as long as any process is in them, the next keeper finds them by it.

mod egress;

pub use egress::{Egress, end_egress, tool};

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::net::firewall::find_program;
use crate::{UID_RANGE, sys};

/// First argument of the process that holds the namespaces.
pub const PERSONALITY: &str = "__enclave";
/// Name servers as the enclave sees them; bound over its /etc/resolv.conf.
const RESOLV_CONF: &str = "resolv.conf";
const RECORD: &str = "enclave";
const NONE: Option<&str> = None;
/// That of users first: it gives the right to join the others.
const KINDS: [(&str, libc::c_int); 3] =
    [("user", libc::CLONE_NEWUSER), ("mnt", libc::CLONE_NEWNS), ("net", libc::CLONE_NEWNET)];

/// What a table of `name:first:count` grants a user: the first range that a machine fits into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    pub first: u32,
}

/// Ids of users and of groups.
pub fn granted(user: &str) -> Option<(Granted, Granted)> {
    let of = |file: &str| range(&fs::read_to_string(file).unwrap_or_default(), user);
    Some((of("/etc/subuid")?, of("/etc/subgid")?))
}

fn range(table: &str, user: &str) -> Option<Granted> {
    table.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let (first, count) = rest.split_once(':')?;
        let count: u32 = count.trim().parse().ok()?;
        (name == user && count >= UID_RANGE).then_some(Granted { first: first.parse().ok()? })
    })
}

pub struct Enclave {
    namespaces: [OwnedFd; 3],
}

impl Enclave {
    /// That of a server whose `run` directory this is; made if no process is in one.
    pub fn find_or_make(run: &Path) -> io::Result<Self> {
        match Self::find(run)? {
            Some(found) => Ok(found),
            None => Self::make(run),
        }
    }

    /// By the record, and by any process that is in all of its namespaces.
    pub fn find(run: &Path) -> io::Result<Option<Self>> {
        let recorded = match fs::read_to_string(run.join(RECORD)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        let mut opened = members(&recorded)?.into_iter().filter_map(|pid| open(pid).ok());
        // Ended between looking and opening, its number may be somebody else's: what was opened counts.
        Ok(opened.find(|opened| describe_open(opened).is_ok_and(|found| found == recorded)).map(|namespaces| Self { namespaces }))
    }

    fn make(run: &Path) -> io::Result<Self> {
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid())?.ok_or_else(|| io::Error::other("this user has no name"))?;
        let (uids, gids) = granted(&user.name).ok_or_else(|| io::Error::other("no user ids are granted to this user"))?;
        match fs::remove_file(run.join(RECORD)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        write_resolv_conf(run, None)?;
        let mut holder = Command::new("/proc/self/exe")
            .arg0("dunlin-enclave")
            .arg(PERSONALITY)
            .arg(run)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .process_group(0)
            .spawn()?;
        match Self::prepare(&mut holder, run, [("newuidmap", user.uid.as_raw(), uids), ("newgidmap", user.gid.as_raw(), gids)]) {
            Ok(made) => Ok(made),
            Err(e) => {
                let _ = holder.kill(); // it may have ended by itself
                let _ = holder.wait();
                Err(e)
            }
        }
    }

    fn prepare(holder: &mut Child, run: &Path, maps: [(&str, u32, Granted); 2]) -> io::Result<Self> {
        let pid = i32::try_from(holder.id()).map_err(io::Error::other)?;
        let gone = || io::Error::other("the process that holds the namespaces has no streams");
        let mut orders = holder.stdin.take().ok_or_else(gone)?;
        let mut words = BufReader::new(holder.stdout.take().ok_or_else(gone)?.take(4096));
        heard(&mut words, "unshared")?;
        for (program, own, granted) in maps {
            let path = find_program(program).ok_or_else(|| io::Error::other(format!("{program} is not installed")))?;
            let ids = ["0", &own.to_string(), "1", "1", &granted.first.to_string(), &UID_RANGE.to_string()].map(str::to_owned);
            let output = Command::new(path).arg(pid.to_string()).args(ids).stdin(Stdio::null()).output()?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(io::Error::other(format!("{program} refused: {}", said.trim())));
            }
        }
        orders.write_all(b"m")?;
        heard(&mut words, "ready")?;
        let namespaces = open(pid)?;
        // Renamed into place: a record names namespaces that are whole.
        let new = run.join(format!("{RECORD}.new"));
        fs::write(&new, describe_open(&namespaces)?)?;
        fs::rename(new, run.join(RECORD))?;
        Ok(Self { namespaces })
    }

    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        self.namespaces.each_ref().map(AsFd::as_fd)
    }

    /// Ends every process that is in it, and with them the namespaces.
    pub fn end(self, run: &Path) -> io::Result<()> {
        end_egress(run)?;
        let recorded = fs::read_to_string(run.join(RECORD))?;
        for pid in members(&recorded)? {
            if pid != nix::unistd::getpid().as_raw() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL); // gone
            }
        }
        fs::remove_file(run.join(RECORD))
    }
}

/// Joins the namespaces of these descriptors. The caller has one thread.
pub fn enter(namespaces: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    let there = fs::metadata(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&namespaces[0])))?.ino();
    if fs::metadata("/proc/self/ns/user")?.ino() == there {
        return Ok(()); // the kernel refuses to join again
    }
    for (namespace, (_, kind)) in namespaces.into_iter().zip(KINDS) {
        sys::setns(namespace, kind)?;
    }
    sys::become_user(0, 0, &[])
}

fn heard(words: &mut impl BufRead, wanted: &str) -> io::Result<()> {
    let mut line = String::new();
    words.read_line(&mut line)?;
    match line.trim_end() {
        line if line == wanted => Ok(()),
        "" => Err(io::Error::other("the process that holds the namespaces ended without a word")),
        other => Err(io::Error::other(other.to_owned())),
    }
}

fn open(pid: i32) -> io::Result<[OwnedFd; 3]> {
    let of = |kind: usize| File::open(format!("/proc/{pid}/ns/{}", KINDS[kind].0)).map(OwnedFd::from);
    Ok([of(0)?, of(1)?, of(2)?])
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn describe_open(namespaces: &[OwnedFd; 3]) -> io::Result<String> {
    let mut text = boot()?;
    for namespace in namespaces {
        text.push_str(&format!(" {}", File::from(namespace.try_clone()?).metadata()?.ino()));
    }
    Ok(text)
}

/// Processes that are in all of these.
fn members(recorded: &str) -> io::Result<Vec<i32>> {
    let boot = boot()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let inode = |kind: &str| fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|meta| meta.ino());
        let inodes: io::Result<Vec<u64>> = KINDS.iter().map(|(kind, _)| inode(kind)).collect();
        let Ok(inodes) = inodes else { continue }; // somebody else's, or it has ended
        if recorded == format!("{boot} {} {} {}", inodes[0], inodes[1], inodes[2]) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// In place: the enclave has the file itself bound over its own.
fn write_resolv_conf(run: &Path, egress: Option<&Egress>) -> io::Result<()> {
    let text = match egress {
        Some(egress) => format!("nameserver {}\n", egress.resolver),
        None => "# there is no way out of this network\n".to_owned(),
    };
    let path = run.join(RESOLV_CONF);
    if fs::read_to_string(&path).is_ok_and(|found| found == text) { Ok(()) } else { fs::write(path, text) }
}

/// Starts what carries connections out of the enclave, if it is there and does not run; says whether it does.
pub fn connect(enclave: &Enclave, run: &Path) -> io::Result<Option<Egress>> {
    let egress = egress::ensure(enclave, run)?;
    write_resolv_conf(run, egress.as_ref())?;
    Ok(egress)
}

/// The personality that holds the namespaces. Its argument is the server's `run` directory.
pub fn enclave_main(run: Option<String>) -> ! {
    let say = |text: &str| {
        let mut stdout = io::stdout().lock();
        let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush()); // nobody waits any more
    };
    let prepared = run.map(PathBuf::from).ok_or_else(|| io::Error::other("no directory was named")).and_then(|run| {
        nix::unistd::setsid().ok(); // the keeper made it a leader already
        nix::sys::prctl::set_name(c"dunlin-enclave")?;
        sys::close_all_but(3, &[])?;
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
            .map_err(|e| io::Error::other(format!("no user namespace can be made: {e}")))?;
        say("unshared");
        io::stdin().read_exact(&mut [0])?;
        sys::become_user(0, 0, &[])?;
        // What is mounted outside later is seen here too, and nothing of here outside.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
        let conf = Path::new("/etc/resolv.conf");
        if conf.exists() {
            mount(Some(&run.join(RESOLV_CONF)), conf, NONE, MsFlags::MS_BIND, NONE)?;
        }
        crate::net::raise_loopback().map_err(io::Error::other)
    });
    if let Err(error) = prepared {
        say(&format!("the enclave cannot be made: {error}"));
        std::process::exit(1);
    }
    say("ready");
    let quiet = File::options().read(true).write(true).open("/dev/null");
    if let Ok(null) = quiet {
        for number in 0..3 {
            let _ = sys::dup_to(null.as_fd(), number); // a closed pipe is as good
        }
    }
    loop {
        nix::unistd::pause();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granted_ids_are_a_range_of_the_user_that_is_large_enough() {
        let table = "ann:100000:65535\nbob:165536:65536\nann:300000:131072\nann:x\nannabel:1:999999\n";
        for (user, expected) in [("ann", Some(300_000)), ("bob", Some(165_536)), ("eve", None)] {
            assert_eq!(range(table, user).map(|granted| granted.first), expected, "{user}");
        }
    }

    #[test]
    fn a_record_of_another_boot_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Enclave::find(dir.path()).unwrap().is_none());
        fs::write(dir.path().join(RECORD), "another-boot 1 2 3").unwrap();
        assert!(Enclave::find(dir.path()).unwrap().is_none());
    }
}
