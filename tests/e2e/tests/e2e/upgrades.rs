//! The binary is exchanged under load, and an exchange that fails is taken back.

use crate::deploys::two_machines;
use dunlin_e2e::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

fn inode(path: impl AsRef<Path>) -> u64 {
    fs::metadata(path).unwrap().ino()
}

#[test]
fn an_upgrade_under_load_is_proven_or_taken_back() {
    let mut server = Server::prepare();
    let path = server.with_own_binary();
    server.boot();
    two_machines(&server);
    let supervisors = |server: &Server| -> Vec<_> { server.machines("web").iter().map(|m| server.supervisor_pid(m)).collect() };
    let before = supervisors(&server);
    let probe = Probe::start("web", server.http, 2);

    let newer = server.dir().join("dunlin-next");
    fs::copy(binary(), &newer).unwrap();
    let first = inode(&path);
    let said = server.ok(&["upgrade", newer.to_str().unwrap()]);
    assert!(said.contains("the server runs dunlin "), "{said}");
    let second = inode(&path);
    assert_ne!(first, second);
    let runs = |server: &Server| inode(format!("/proc/{}/exe", server.server_pid().unwrap()));
    assert_eq!(runs(&server), second, "the server runs the new one");

    // It can say what it is, and nothing else.
    let bad = server.dir().join("dunlin-bad");
    fs::write(&bad, "#!/bin/sh\n[ \"$1\" = version ] && exec echo dunlin 99\nexit 3\n").unwrap();
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o755)).unwrap();
    for said in ["the upgrade failed; going back", "the binary that failed was moved"] {
        server.expect_log(said);
    }
    server.fails(&["upgrade", bad.to_str().unwrap()], 1, &["did not work", "dunlin.failed", "exit status: 3"]);
    server.wait_ready();
    assert_eq!(fs::read(&path).unwrap(), fs::read(binary()).unwrap(), "the one before stands at its path again");
    assert_eq!(fs::read(server.dir().join("dunlin.failed")).unwrap(), fs::read(&bad).unwrap());

    // Not even run: nothing changes.
    fs::write(&bad, "no program").unwrap();
    server.fails(&["upgrade", bad.to_str().unwrap()], 1, &["cannot be run"]);

    let seen = probe.stop();
    assert!(seen.refused.is_empty() && seen.cut.is_empty() && seen.bad.is_empty(), "{seen:?}");
    assert!(seen.good > 0);
    assert_eq!(supervisors(&server), before, "machines live on");
    // The one that went back to is what a crash starts again.
    server.kill_server();
    server.wait_ready();
    assert_eq!(server.get("web", "/").0, 200);
}
