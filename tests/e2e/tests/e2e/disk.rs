//! A disk that fills up at every place where something is written.

use crate::deploys::{config, image};
use dunlin_e2e::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// Enough for the base images, a builder's cache and one app; little enough to be filled in a moment.
const DISK: &str = "2400M";

/// A data directory on a file system of its own.
struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    fn mount(dir: &TempDir) -> Self {
        let (file, at) = (dir.path().join("disk.ext4"), dir.path().join("disk"));
        fs::create_dir(&at).unwrap();
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output().unwrap();
            assert!(output.status.success(), "{program}: {}", text(&output));
        };
        run("truncate", &["-s", DISK, file.to_str().unwrap()]);
        run("mkfs.ext4", &["-q", "-F", "-m", "0", file.to_str().unwrap()]);
        run("mount", &["-o", "loop", file.to_str().unwrap(), at.to_str().unwrap()]);
        Self { at }
    }

    /// Takes all space but about `leave` bytes.
    fn fill(&self, leave: u64) {
        let free = || -> u64 {
            let output = Command::new("df").args(["--output=avail", "-B1"]).arg(&self.at).output().unwrap();
            text(&output).lines().nth(1).unwrap().trim().parse().unwrap()
        };
        // In small pieces: what df shows is not all to be had by one file, and the server writes meanwhile.
        for n in 0.. {
            let left = free();
            let piece = (left.saturating_sub(leave) / 2).max(4096);
            let filler = self.at.join(format!("filler-{n}"));
            let filled = Command::new("fallocate").args(["-l", &piece.to_string()]).arg(filler).stderr(Stdio::null()).status().unwrap();
            if !filled.success() && piece <= 1 << 20 || left <= leave + (1 << 20) && leave > 0 || n > 60 {
                return;
            }
        }
    }

    fn free(&self) {
        for entry in fs::read_dir(&self.at).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("filler-") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status(); // the directory says if it is still busy
        // The server's scratch directory went before the mount did: what it could not remove goes now.
        let _ = fs::remove_dir(&self.at).and_then(|()| self.at.parent().map_or(Ok(()), fs::remove_dir));
    }
}

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    let dir = tempfile::Builder::new().prefix("dunlin-e2e-").tempdir().unwrap();
    let disk = SmallDisk::mount(&dir);
    let data = disk.at.join("data");
    let mut server = Server::prepare_in(dir, data, &["-a"]);
    for text in ["disk is full", "No space left", "cannot be prepared", "failed", "nothing was done", "free some space", "StorageFull", "could not"] {
        server.expect_log(text);
    }
    server.boot();
    let app = server.source("web", PYTHON);
    config(&app, "1", "");
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&app, &["deploy"]);
    let good = image(&server);

    // While a build's context and layers are written, and while the image is pushed.
    big_file(&app, 300);
    disk.fill(32 << 20);
    let said = text(&server.dunlin_in(&app, &["deploy"]));
    assert!(said.contains("disk is full") || said.contains("no space left") || said.contains("No space left"), "{said}");
    assert!(said.contains("hint:"), "{said}");
    assert_eq!(server.get("web", "/"), (200, "release 1".into()));

    // The store, the journal and the logs. What was acknowledged before is there, what cannot be kept is refused.
    disk.free();
    disk.fill(0);
    let machine = server.machines("web")[0].clone();
    for _ in 0..50 {
        server.get("web", "/print");
    }
    let refused = server.dunlin(&["apps", "create", "another"]);
    if !refused.status.success() {
        assert!(text(&refused).contains("disk"), "{}", text(&refused));
    }
    server.kill_server();
    server.until("it answers", || server.get("web", "/").0 == 200);
    disk.free();
    server.wait_ready();
    fs::remove_file(app.join("big")).unwrap();
    fs::write(app.join("Dockerfile"), DOCKERFILE).unwrap();
    config(&app, "2", "");
    server.ok_in(&app, &["deploy", "--image", &good]);
    assert_eq!(server.get("web", "/"), (200, "release 2".into()));
    server.ok(&["machine", "restart", &machine]);
    server.ok_in(&app, &["deploy"]);
    server.stop();
    let cleaned = Command::new(binary()).args(["cleanup", "--data-dir"]).arg(server.data()).output().unwrap();
    assert!(cleaned.status.success(), "{}", text(&cleaned));
    drop(server);
    drop(disk);
}

/// Bytes that do not compress.
fn big_file(app: &Path, mib: usize) {
    let mut bytes = vec![0u8; mib << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    fs::write(app.join("big"), bytes).unwrap();
    let dockerfile = DOCKERFILE.replace("COPY app.py", "COPY big /big\nCOPY app.py");
    fs::write(app.join("Dockerfile"), dockerfile).unwrap();
}
