//! Base images from Debian packages. Needs root, mmdebstrap and a Debian mirror; takes about half a minute.

mod common;

use common::*;
use dunlin_registry::{ContentStore, Images, Kind, bootstrap};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn mounts_below(dir: &std::path::Path) -> usize {
    std::fs::read_to_string("/proc/mounts").unwrap().matches(dir.to_str().unwrap()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn debian_is_made_once_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    let work = dir.path().join("work");
    let make = || {
        let (store, work) = (store.clone(), work.clone());
        move || {
            let mut said = Vec::new();
            bootstrap(Kind::Debian, &store, &work, |line| said.push(line.to_owned())).unwrap();
            said
        }
    };
    tokio::task::spawn_blocking(make()).await.unwrap();
    assert_eq!(tokio::task::spawn_blocking(make()).await.unwrap(), ["debian: already there"]);
    assert_eq!(mounts_below(dir.path()), 0);
    let digest = store.resolve_tag(&repo("library/debian"), "12").unwrap().unwrap();
    let images = Images::open(dir.path().join("images"), store).unwrap();
    let record = images.ensure(&digest).await.unwrap();
    assert_eq!(record.config.labels["org.dunlin.origin"], "debian-packages");
    let root = record.layers[0].to_str().unwrap().to_owned();
    assert!(run_well("chroot", &[&root, "cat", "/etc/debian_version"]).await.starts_with("12."));
    for absent in ["var/lib/apt/lists/lock", "etc/resolv.conf", "usr/share/man/man1", "etc/dpkg/dpkg.cfg.d/99mmdebstrap"] {
        assert!(!record.layers[0].join(absent).exists(), "{absent}");
    }
}

/// The process that makes an image is killed in the middle: nothing of it stays mounted or running.
#[test]
fn a_kill_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let inner = "DUNLIN_TEST_BOOTSTRAP_DIR";
    if let Some(dir) = std::env::var_os(inner) {
        let dir = std::path::PathBuf::from(dir);
        let store = ContentStore::open(dir.join("registry")).unwrap();
        bootstrap(Kind::Debian, &store, &dir.join("work"), |_| ()).unwrap();
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["a_kill_leaves_nothing_behind", "--exact"])
        .env(inner, dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let mentions = || {
        let name = dir.path().to_str().unwrap().to_owned();
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let path = entry.ok()?.path();
            let line = std::fs::read(path.join("cmdline")).ok()?;
            String::from_utf8_lossy(&line).contains(&name).then_some(path)
        });
        processes.count()
    };
    wait("packages are being unpacked", &|| dir.path().join("work/debian/root/usr/bin").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    wait("every process has gone", &|| mentions() == 0);
    assert_eq!(mounts_below(dir.path()), 0);
}
