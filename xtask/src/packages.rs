//! System packages that the house needs, installed after saying which.

use crate::sh;
use anyhow::bail;
use std::process::Command;

/// (a file that shows that it is installed, Debian package, what for)
const RUN: &[(&str, &str, &str)] = &[
    ("/usr/bin/buildah", "buildah", "builds images, inside a machine"),
    ("/usr/sbin/nft", "nftables", "the firewall of machines"),
    ("/usr/bin/mmdebstrap", "mmdebstrap", "base images from Debian packages"),
    ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "signatures of Debian packages"),
    ("/sbin/mkfs.ext4", "e2fsprogs", "the builder's cache volume"),
    ("/usr/bin/curl", "curl", "to look at the demo"),
    ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates", "trust in other registries"),
    ("/usr/bin/cc", "gcc", "to build"),
    ("/usr/bin/cmake", "cmake", "to build the TLS library"),
];

const TEST: &[(&str, &str, &str)] = &[
    ("/usr/bin/skopeo", "skopeo", "a registry client in tests"),
    ("/usr/bin/podman", "podman", "a registry client in tests"),
    ("/usr/bin/docker-registry", "docker-registry", "another registry in tests"),
    ("/usr/sbin/runc", "runc", "the Docker engine in tests, and a peer"),
    ("/bin/ip", "iproute2", "network namespaces in tests"),
    ("/bin/busybox", "busybox-static", "a root file system in tests"),
    ("/usr/bin/setfattr", "attr", "extended attributes in tests"),
    ("/usr/bin/zstd", "zstd", "layers in tests"),
    ("/usr/bin/python3", "python3", "servers, and attempts to break out, in tests"),
    ("/usr/share/doc/python3-venv", "python3-venv", "a tool that tries the API, in tests"),
    ("/sbin/setcap", "libcap2-bin", "capabilities of files in tests"),
    ("/usr/bin/newuidmap", "uidmap", "a server of an ordinary user in tests"),
    ("/usr/bin/slirp4netns", "slirp4netns", "the way out of that server's network in tests"),
    ("/sbin/useradd", "passwd", "that user in tests"),
    ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "libfaketime", "clocks that tests set"),
    ("/usr/bin/npm", "npm", "another client of the API in tests"),
];

const BENCH: &[(&str, &str, &str)] = &[
    ("/usr/sbin/nginx", "nginx-light", "a peer"),
    ("/usr/sbin/haproxy", "haproxy", "a peer"),
    ("/usr/bin/wrk", "wrk", "load"),
    ("/usr/bin/h2load", "nghttp2-client", "load"),
];

const VM: &[(&str, &str, &str)] = &[
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86", "a machine with another kernel"),
    ("/usr/bin/strip", "binutils", "smaller disks of it"),
];

#[derive(Clone, Copy)]
pub enum For {
    Demo,
    Test,
    Bench,
    Flock,
    Vm,
    Fuzz,
}

/// libFuzzer is built from its source.
const FUZZ: &[Package] = &[("/usr/bin/c++", "g++", "builds libFuzzer")];

type Package = (&'static str, &'static str, &'static str);

fn missing(purpose: For) -> Vec<Package> {
    let wanted = match purpose {
        For::Demo => RUN.to_vec(),
        For::Test => [RUN, TEST].concat(),
        For::Bench => [RUN, TEST, BENCH].concat(),
        For::Flock => TEST.iter().filter(|(_, package, _)| *package == "iproute2").copied().collect(),
        For::Vm => [RUN, VM].concat(),
        For::Fuzz => FUZZ.to_vec(),
    };
    wanted.into_iter().filter(|(file, ..)| !exists(file)).collect()
}

pub fn are_there(purpose: For) -> bool {
    missing(purpose).is_empty()
}

/// Installs what is missing.
pub fn ensure(purpose: For) -> anyhow::Result<()> {
    let missing = missing(purpose);
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing system packages:");
    for (_, package, what_for) in &missing {
        println!("  {package:18} {what_for}");
    }
    if !exists("/usr/bin/apt-get") {
        bail!("this is not a Debian-like system; install the packages above by its own means, then run this again");
    }
    sh::run(Command::new("apt-get").args(["update", "-qq"]))?;
    sh::run(
        Command::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(missing.iter().map(|(_, package, _)| package))
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Debian keeps /bin and /usr/bin the same; either may be the link. Programs may come from elsewhere too.
fn exists(file: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let name = file.rsplit('/').next().unwrap_or(file);
    if file.contains("bin/") && std::env::split_paths(&path).any(|dir| dir.join(name).is_file()) {
        return true;
    }
    let other = if let Some(rest) = file.strip_prefix("/usr") { rest.to_owned() } else { format!("/usr{file}") };
    std::path::Path::new(file).exists() || std::path::Path::new(&other).exists()
}
