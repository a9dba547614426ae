//! `cargo xtask test --vm`: the tests of the Linux side on Debian's cloud kernel with pure control groups v2, in QEMU.
//!
//! A root file system is made from Debian packages once; the test binaries come on a second disk, at the paths that
//! they were compiled for. QEMU emulates, so that it runs anywhere (a KVM that opens and then hangs is not rare in clouds);
//! everything takes some ten times as long.

use crate::{lane, packages, sh};
use anyhow::{Context, bail};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const INIT: &str = include_str!("vm.sh");
const SUITE: &str = "bookworm";
const PACKAGES: &str =
    "linux-image-cloud-amd64,busybox-static,cryptsetup-bin,e2fsprogs,iproute2,iptables,kmod,nftables,procps,python3,libcap2-bin";
/// Free space of the disks beside their files: what volumes reserve, which takes up nothing here until it is written.
const ROOM_MB: u64 = 16 * 1024;
const MEMORY_MB: u32 = 3072;
/// Nothing hangs for longer than this. On two cores that others use too it takes some six minutes.
const PATIENCE_S: &str = "900";
const RESULT: &str = "vm-result: ";
/// Crates whose tests need a kernel, by their directories, and which of their tests: all, or those with this in their names.
const TESTED: &[(&str, &str)] = &[("crates/runtime", ""), ("crates/host", "volumes::")];

pub fn is_possible() -> bool {
    packages::are_there(packages::For::Vm) || Path::new("/usr/bin/apt-get").exists()
}

/// Gives the names of the tests that passed only alone, see [`lane`].
pub fn run() -> anyhow::Result<Vec<String>> {
    packages::ensure(packages::For::Vm)?;
    let home = sh::target_dir().join("vm");
    fs::create_dir_all(&home)?;
    let root = root_disk(&home)?;
    let tests = tests_disk(&home)?;
    println!("booting Debian's cloud kernel in QEMU");
    let mut qemu = Command::new("timeout")
        .args([PATIENCE_S, "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-smp", "2"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", &MEMORY_MB.to_string(), "-serial", "stdio"])
        .arg("-kernel").arg(home.join("vmlinuz"))
        .arg("-initrd").arg(home.join("initrd.img"))
        .args(["-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/vm-init"])
        .arg("-drive").arg(drive(&root, ",snapshot=on"))
        .arg("-drive").arg(drive(&tests, ",snapshot=on"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("QEMU could not be started")?;
    let (mut result, mut failed) = (None, Vec::new());
    for line in BufReader::new(qemu.stdout.take().context("QEMU has no output")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("  {}", line.trim_end());
        std::io::stdout().flush()?;
        if let Some(code) = line.trim_end().strip_prefix(RESULT) {
            result = Some(code == "0");
        }
        failed.extend(lane::failed_test(&line).map(str::to_owned));
    }
    qemu.wait()?;
    match result {
        Some(true) => Ok(failed),
        Some(false) => bail!("tests failed in the virtual machine; the lines above say which"),
        None => bail!("the virtual machine ended before its tests did"),
    }
}

fn drive(disk: &Path, options: &str) -> String {
    format!("file={},format=raw,if=virtio{options}", disk.display())
}

/// Debian with the kernel and what the tests call, made once for each list of packages.
fn root_disk(home: &Path) -> anyhow::Result<PathBuf> {
    let disk = home.join("root.ext4");
    let made_of = format!("{SUITE} {PACKAGES}\n{INIT}");
    let stamp = home.join("root.stamp");
    if fs::read_to_string(&stamp).is_ok_and(|made| made == made_of) && disk.exists() {
        return Ok(disk);
    }
    let tree = home.join("root");
    remove(&tree)?;
    println!("making a root file system from Debian packages");
    sh::run(
        Command::new("mmdebstrap")
            .args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"])
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(format!("--include={PACKAGES}"))
            .arg(SUITE)
            .arg(&tree),
    )?;
    for name in ["vmlinuz", "initrd.img"] {
        fs::copy(tree.join(name), home.join(name)).with_context(|| format!("the kernel's package left no {name}"))?;
    }
    fs::write(tree.join("vm-init"), INIT)?;
    sh::run(Command::new("chmod").arg("755").arg(tree.join("vm-init")))?;
    make_disk(&tree, &disk)?;
    remove(&tree)?;
    fs::write(stamp, made_of)?;
    Ok(disk)
}

/// The test binaries and the programs that they start.
fn tests_disk(home: &Path) -> anyhow::Result<PathBuf> {
    let stage = home.join("tests");
    remove(&stage)?;
    fs::create_dir_all(&stage)?;
    let target = sh::target_dir();
    let mut list = String::new();
    // With all others, as they were built before: with fewer, their dependencies would have other features.
    let messages = sh::output(sh::cargo().args([
        "test", "--workspace", "--exclude", "dunlin-e2e", "--lib", "--bins", "--tests", "--no-run", "--message-format=json-render-diagnostics",
        "--quiet",
    ]))?;
    for message in messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
        let Some(binary) = message["executable"].as_str().map(Path::new) else { continue };
        let dir = message["manifest_path"].as_str().map(Path::new).and_then(Path::parent).context("a binary has no package")?;
        let Some((_, only)) = TESTED.iter().find(|(tested, _)| sh::root().join(tested) == dir) else { continue };
        let within = binary.strip_prefix(&target).context("a binary lies outside of the target directory")?;
        let staged = stage.join("target").join(within);
        fs::create_dir_all(staged.parent().context("a binary has no folder")?)?;
        sh::run(Command::new("strip").arg("-o").arg(&staged).arg(binary))?;
        if message["profile"]["test"].as_bool() == Some(true) {
            list.push_str(&format!("{} {} {} {only}\n", target.display(), dir.display(), within.display()));
        }
    }
    fs::write(stage.join("list"), list)?;
    let disk = home.join("tests.ext4");
    make_disk(&stage, &disk)?;
    Ok(disk)
}

fn make_disk(tree: &Path, disk: &Path) -> anyhow::Result<()> {
    let used = sh::output(Command::new("du").args(["-sm"]).arg(tree))?;
    let used: u64 = used.split_whitespace().next().and_then(|mb| mb.parse().ok()).context("du said no number")?;
    let _ = fs::remove_file(disk); // there may be none
    let size = format!("{}M", used + used / 4 + ROOM_MB);
    sh::run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(tree).arg(disk).arg(size))
}

fn remove(tree: &Path) -> anyhow::Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("{} cannot be removed", tree.display()))?;
    }
    Ok(())
}
