//! The host's tools, run in a mount and process namespace of their own that ends with this process: whatever
//! they mount goes with it, also after a kill.

use super::BootstrapError;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

const LAST_LINES: usize = 20;
/// A line of output is cut here.
const MAX_LINE_BYTES: u64 = 16 * 1024;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Documentation, manuals and translations stay out, licences stay in; the file is part of the image, so that
/// what is installed later follows it too.
const DPKG_CONFIG: &str = "force-unsafe-io
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
path-exclude=/usr/share/lintian/*
";

/// What differs from one run to the next, or is only a cache.
const CLEAN: &str = "
rm -rf var/lib/apt/lists/* var/cache/apt/* var/cache/ldconfig/* var/cache/debconf/*-old var/log/* tmp/* run/*
rm -rf usr/share/doc-base/* var/lib/dpkg/*-old
";

const DEBIAN: &str = r#"
root="$1"; packages="$2"; dpkg_config="$3"; clean="$4"; authorities="$5"
# mmdebstrap leaves no fsync behind that anybody waits for, and the essential hooks place our rules first.
export DUNLIN_DPKG_CONFIG="$dpkg_config"
mmdebstrap --mode=root --variant=minbase --format=directory --include="$packages" \
    --aptopt='APT::Install-Recommends "false"' \
    --setup-hook='mkdir -p "$1/etc/dpkg/dpkg.cfg.d" && printf %s "$DUNLIN_DPKG_CONFIG" > "$1/etc/dpkg/dpkg.cfg.d/dunlin"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    bookworm "$root"
cd "$root"
rm -f etc/dpkg/dpkg.cfg.d/99mmdebstrap etc/apt/apt.conf.d/99mmdebstrap etc/hostname etc/resolv.conf
printf 'APT::Install-Recommends "false";\nAcquire::Languages "none";\n' > etc/apt/apt.conf.d/dunlin
: > etc/machine-id
mkdir -p usr/local/share/ca-certificates
for authority in "$authorities"/*.crt; do
    if [ -f "$authority" ]; then install -m 644 "$authority" usr/local/share/ca-certificates/; fi
done
chroot . env -i PATH="$PATH" LC_ALL=C.UTF-8 update-ca-certificates
eval "$clean"
"#;

const ON_DEBIAN: &str = r#"
work="$1"; packages="$2"; finish="$3"; version="$4"; clean="$5"
cd "$work"
mkdir -p upper inner root
chmod 755 upper
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=inner root
mount -t proc proc root/proc
mount -t tmpfs -o mode=1777 tmpfs root/tmp
mount -t tmpfs -o mode=755 tmpfs root/run
mount -t tmpfs -o mode=755 tmpfs root/dev
for node in null zero full random urandom; do : > root/dev/$node; mount --bind /dev/$node root/dev/$node; done
ln -s /proc/self/fd root/dev/fd
# apt finds its mirror with the host's resolver; neither of the two files is to stay.
cat /etc/resolv.conf > root/run/resolv.conf
ln -s ../run/resolv.conf root/etc/resolv.conf
printf '#!/bin/sh\nexit 101\n' > root/usr/sbin/policy-rc.d
chmod 755 root/usr/sbin/policy-rc.d
chroot root env -i PATH="$PATH" DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root ${http_proxy:+http_proxy="$http_proxy"} \
    sh -eu -c "apt-get -q update
apt-get -q -y install --no-install-recommends $packages
$finish"
chroot root env -i PATH="$PATH" sh -eu -c "$version" > version
rm -f root/usr/sbin/policy-rc.d root/etc/resolv.conf
umount root/dev/null root/dev/zero root/dev/full root/dev/random root/dev/urandom
umount root/dev root/run root/tmp root/proc
cd root
eval "$clean"
rm -rf root/.npm root/.cache
cd ..
umount root
"#;

pub(super) fn check_tools() -> Result<(), BootstrapError> {
    if !rustix::process::geteuid().is_root() {
        return Err(BootstrapError::NotRoot);
    }
    for tool in ["mmdebstrap", "unshare", "setpriv", "chroot", "mount"] {
        if !PATH.split(':').any(|dir| Path::new(dir).join(tool).is_file()) {
            return Err(BootstrapError::Missing(tool));
        }
    }
    Ok(())
}

pub(super) fn run_debian(root: &Path, packages: &str, progress: &mut dyn FnMut(&str)) -> Result<(), BootstrapError> {
    let root = root.to_string_lossy();
    run("installing Debian", DEBIAN, &[&root, packages, DPKG_CONFIG, CLEAN, super::LOCAL_AUTHORITIES], progress)
}

/// `work` has the base in `lower`; leaves the difference in `upper` and the version in `version`.
pub(super) fn run_on_debian(work: &Path, packages: &str, finish: &str, version: &str, progress: &mut dyn FnMut(&str)) -> Result<(), BootstrapError> {
    let work = work.to_string_lossy();
    run("installing the packages", ON_DEBIAN, &[&work, packages, finish, version, CLEAN], progress)
}

pub(super) fn version_of(root: &Path, command: &str) -> Result<String, BootstrapError> {
    let output = Command::new("chroot").arg(root).args(["sh", "-eu", "-c", command]).env_clear().env("PATH", PATH).output();
    let output = output.map_err(BootstrapError::io("run chroot"))?;
    if !output.status.success() {
        let last_lines = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(BootstrapError::Failed { what: "asking for the version".into(), last_lines });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn run(what: &str, script: &str, args: &[&str], progress: &mut dyn FnMut(&str)) -> Result<(), BootstrapError> {
    let mut command = Command::new("setpriv");
    // setpriv, not unshare, is what dies with us; the first process of the namespace dies with unshare, and with
    // it all the others and every mount.
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]);
    command.args(["sh", "-eu", "-c"]).arg(format!("exec 2>&1\nmount -t proc proc /proc\n{script}")).arg("sh").args(args);
    command.env_clear().env("PATH", PATH).env("LC_ALL", "C.UTF-8").env("TMPDIR", "/tmp");
    command.env("SOURCE_DATE_EPOCH", super::SOURCE_DATE_EPOCH.to_string());
    for name in ["http_proxy", "https_proxy", "no_proxy"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(BootstrapError::io("run setpriv"))?;
    let mut last_lines = VecDeque::with_capacity(LAST_LINES);
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        loop {
            line.clear();
            match output.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(BootstrapError::io("read what the tools say")(e));
                }
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            progress(&text);
            if last_lines.len() == LAST_LINES {
                last_lines.pop_front();
            }
            last_lines.push_back(text);
        }
    }
    let status = child.wait().map_err(BootstrapError::io("wait for the tools"))?;
    if !status.success() {
        let last_lines = last_lines.into_iter().collect::<Vec<_>>().join("\n");
        return Err(BootstrapError::Failed { what: format!("{what} ({status})"), last_lines });
    }
    Ok(())
}
