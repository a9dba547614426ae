//! Turning a forked child into the tenant's process: the one place where privileges are given up, used
//! by the machine's first process and by every exec.

use crate::seccomp::Filters;
use crate::spec::{ProcessSpec, Profile};
use crate::sys;
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE.
const TENANT_CAPABILITIES: u64 = bits(&[0, 1, 3, 4, 5, 6, 7, 10]);
/// Those, and SETPCAP, SYS_CHROOT, SETFCAP: each needed by buildah.
const BUILDER_CAPABILITIES: u64 = bits(&[0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31]);
const LAST_CAPABILITY: libc::c_ulong = 63;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// An /etc/passwd or /etc/group of an image is not read beyond this.
const MAX_ACCOUNT_FILE: u64 = 1 << 20;

const fn bits(numbers: &[u32]) -> u64 {
    let (mut set, mut i) = (0, 0);
    while i < numbers.len() {
        set |= 1 << numbers[i];
        i += 1;
    }
    set
}

/// Who the process will be, resolved inside the machine's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Everything irreversible before the program runs: bounding set, no-new-privileges, filters.
/// Called by pid 1 of the machine, so that all processes inherit it, and by each exec.
pub(crate) fn confine(profile: Profile, filters: &Filters) -> io::Result<()> {
    let keep = capabilities(profile);
    for capability in 0..=LAST_CAPABILITY {
        if keep & (1 << capability) == 0 {
            // The kernel knows fewer than 64: it says EINVAL for the rest.
            match sys::prctl(libc::PR_CAPBSET_DROP, capability) {
                Err(e) if e.raw_os_error() != Some(libc::EINVAL) => return Err(e),
                _ => {}
            }
        }
    }
    // SAFETY-relevant order: no-new-privileges first, or loading a filter needs a capability.
    nix::sys::prctl::set_no_new_privs()?;
    sys::set_capabilities(keep, keep)?;
    filters.load().map_err(io::Error::other)
}

/// No core files in the machine's root; descriptors as many as the host lets us give, but not so many
/// that programs which close all of them one by one take minutes.
pub(crate) fn limits() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const MOST_DESCRIPTORS: u64 = 1 << 20;
    const USUAL_DESCRIPTORS: u64 = 1 << 16;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let hard = hard.min(MOST_DESCRIPTORS);
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(USUAL_DESCRIPTORS), hard)?;
    Ok(())
}

/// A machine is not as dear to the host as its supervisor, whose score it inherits. Written by a process
/// that has the host's capabilities: only their word is also the lowest score that the machine may give itself.
pub(crate) fn usual_oom_score(pid: libc::pid_t) {
    // Refused only where the host's own processes have a higher score, which then is the machine's too.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
}

fn capabilities(profile: Profile) -> u64 {
    match profile {
        Profile::Tenant => TENANT_CAPABILITIES,
        Profile::Builder => BUILDER_CAPABILITIES,
    }
}

/// In a confined child: becomes the user, enters the directory, runs the program. Returns only on failure.
pub(crate) fn run_program(process: &ProcessSpec, identity: &Identity, env: &[CString]) -> io::Error {
    match prepare(process, identity) {
        Err(e) => e,
        Ok((program, argv)) => {
            let e = sys::exec(&program, &argv, env);
            let hint = match e.raw_os_error() {
                Some(libc::ENOENT) => ": the program is there, its interpreter or loader is not",
                Some(libc::ENOEXEC) => ": built for another processor, or a script without #! line",
                _ => "",
            };
            context(e, &format!("exec: {:?}{hint}", program.to_string_lossy()))
        }
    }
}

fn prepare(process: &ProcessSpec, identity: &Identity) -> io::Result<(CString, Vec<CString>)> {
    let dir = if process.working_dir.is_empty() { "/" } else { &process.working_dir };
    fs::create_dir_all(dir).map_err(|e| context(e, &format!("working directory {dir}")))?;
    sys::become_user(identity.uid, identity.gid, &identity.groups)?;
    std::env::set_current_dir(dir)
        .and_then(|()| sys::working_directory_is_below_root())
        .map_err(|e| context(e, &format!("working directory {dir}")))?;
    let path = process.env.iter().rev().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, value)| value);
    let name = process.command.first().ok_or_else(|| io::Error::other("the image names no command to run"))?;
    let program = find_program(name, path)?;
    let argv = process.command.iter().map(|arg| c_string(arg)).collect::<io::Result<_>>()?;
    sys::reset_signals();
    sys::block_signals(false)?;
    Ok((sys::c_path(&program)?, argv))
}

/// The environment as the kernel takes it, with HOME and PATH where the image sets none.
pub(crate) fn environment(process: &ProcessSpec, identity: &Identity) -> io::Result<Vec<CString>> {
    let mut env: Vec<(&str, &str)> = process.env.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOME", identity.home.as_str())] {
        if !env.iter().any(|(existing, _)| *existing == name) {
            env.push((name, value));
        }
    }
    env.into_iter().map(|(name, value)| c_string(&format!("{name}={value}"))).collect()
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::other("a command or variable contains a NUL character"))
}

fn context(e: io::Error, what: &str) -> io::Error {
    io::Error::new(e.kind(), format!("{what}: {e}"))
}

fn find_program(name: &str, path: &str) -> io::Result<PathBuf> {
    if name.contains('/') {
        let found = Path::new(name);
        return match fs::metadata(found) {
            Ok(_) => Ok(found.to_owned()),
            Err(e) => Err(context(e, &format!("exec: {name:?}"))),
        };
    }
    let found = path.split(':').map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name)).find(|program| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(program).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    });
    found.ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("exec: {name:?}: not found in $PATH ({path})"))
    })
}

/// Resolves `user`, `uid`, `user:group` or `uid:gid` against the image's own account files.
pub(crate) fn resolve_user(user: &str, root: &Path) -> io::Result<Identity> {
    let passwd = read_accounts(&root.join("etc/passwd"));
    let group = read_accounts(&root.join("etc/group"));
    let (name, group_name) = match user.split_once(':') {
        Some((name, group_name)) => (name, Some(group_name)),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6 && (fields[0] == name || name.parse::<u32>().is_ok() && fields[2] == name)
    });
    let (uid, mut gid, home, account) = match (&entry, name.parse::<u32>()) {
        (Some(fields), _) => (
            number(fields[2], "passwd")?,
            number(fields[3], "passwd")?,
            fields[5].to_owned(),
            Some(fields[0].to_owned()),
        ),
        (None, Ok(uid)) => (uid, 0, "/".to_owned(), None),
        (None, Err(_)) => return Err(io::Error::other(format!("the image has no user {name:?} in /etc/passwd"))),
    };
    let mut groups = Vec::new();
    match group_name {
        Some(wanted) => gid = find_group(&group, wanted)?,
        None => {
            for line in group.lines() {
                let fields: Vec<_> = line.split(':').collect();
                let member = account.as_deref().is_some_and(|account| {
                    fields.get(3).is_some_and(|members| members.split(',').any(|member| member == account))
                });
                if member && let Ok(extra) = number(fields[2], "group") {
                    groups.push(extra);
                }
            }
        }
    }
    if uid >= crate::spec::UID_RANGE || gid >= crate::spec::UID_RANGE {
        return Err(io::Error::other(format!("user {user:?} is outside the machine's {} ids", crate::spec::UID_RANGE)));
    }
    groups.retain(|gid| *gid < crate::spec::UID_RANGE);
    groups.truncate(64);
    let home = if home.is_empty() { "/".to_owned() } else { home };
    Ok(Identity { uid, gid, groups, home })
}

fn find_group(group: &str, wanted: &str) -> io::Result<u32> {
    if let Ok(gid) = wanted.parse() {
        return Ok(gid);
    }
    let line = group.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == wanted);
    match line {
        Some(fields) if fields.len() >= 3 => number(fields[2], "group"),
        _ => Err(io::Error::other(format!("the image has no group {wanted:?} in /etc/group"))),
    }
}

fn number(text: &str, file: &str) -> io::Result<u32> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} in the image's /etc/{file} is not a number")))
}

/// A missing file is an image without accounts, and so is one that is no file: nobody would ever write to a
/// pipe that a tenant put there.
fn read_accounts(path: &Path) -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut text = Vec::new();
    let opened = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|meta| meta.is_file())
    {
        let _ = file.take(MAX_ACCOUNT_FILE).read_to_end(&mut text); // what could be read counts
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_resolved_in_the_image() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
            .unwrap();
        fs::write(root.path().join("etc/group"), "root:x:0:\napp:x:1001:\nvideo:x:44:app,other\n").unwrap();
        let check = |user: &str| resolve_user(user, root.path()).map(|i| (i.uid, i.gid, i.groups, i.home));
        assert_eq!(check("").unwrap(), (0, 0, vec![], "/root".into()));
        assert_eq!(check("app").unwrap(), (1000, 1001, vec![44], "/home/app".into()));
        assert_eq!(check("1000").unwrap(), (1000, 1001, vec![44], "/home/app".into()));
        assert_eq!(check("app:video").unwrap(), (1000, 44, vec![], "/home/app".into()));
        assert_eq!(check("4242:7").unwrap(), (4242, 7, vec![], "/".into()));
        assert!(check("nobody-here").is_err());
        assert!(check("app:no-group").is_err());
        assert!(check("70000").is_err(), "outside the range");
    }

    #[test]
    fn a_missing_program_says_where_it_was_looked_for() {
        let error = find_program("surely-not-here", "/usr/bin:/bin").unwrap_err().to_string();
        assert!(error.contains("surely-not-here") && error.contains("/usr/bin:/bin"), "{error}");
    }
}
