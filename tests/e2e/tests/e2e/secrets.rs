//! Secrets reach the program and nothing else.

use crate::deploys::two_machines;
use dunlin_e2e::*;
use std::io::Write;
use std::process::{Command, Stdio};

const CANARY: &str = "canary-7f3a91c2";

#[test]
fn a_secret_is_in_the_programs_environment_and_nowhere_else() {
    let mut server = Server::start();
    two_machines(&server);
    let set = |args: &[&str], input: &str| {
        let mut child = server.cli(server.dir(), args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    };
    set(&["secrets", "set", "KEY=-", "--app", "web"], CANARY);
    set(&["secrets", "import", "--app", "web"], &format!("# of the shop\nOTHER=\"{CANARY}-2\"\n"));
    assert_eq!(server.get("web", "/env/KEY").1, CANARY);
    assert_eq!(server.get("web", "/env/OTHER").1, format!("{CANARY}-2"));
    let list = server.ok(&["secrets", "list", "--app", "web", "--json"]);
    assert!(list.contains("KEY") && !list.contains(CANARY), "{list}");
    check_nowhere(&server, "while it runs");
    server.kill_server();
    server.wait_ready();
    let machine = server.machines("web")[0].clone();
    server.ok(&["machine", "restart", &machine]);
    check_nowhere(&server, "after a kill and a restart");
    server.stop();
    check_nowhere(&server, "with the server stopped");
    server.boot();
    server.fails(&["secrets", "unset", "KEY", "KYE", "--app", "web"], 1, &["no secret KYE", "secrets list"]);
    server.ok(&["secrets", "unset", "KEY", "--app", "web"]);
    assert_eq!(server.get("web", "/env/KEY").1, "(unset)");
    let mode = Command::new("stat").args(["-c", "%a"]).arg(server.data().join("control/master.key")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&mode.stdout).trim(), "600");
}

/// Files of the data directory, the server's log, and the command line and file descriptors of processes.
fn check_nowhere(server: &Server, when: &str) {
    let grep = |path: &std::path::Path| {
        let found = Command::new("grep").args(["-rlaF", CANARY, "--devices=skip"]).arg(path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "", "{when}");
    };
    grep(&server.data());
    assert!(!server.log().contains(CANARY), "{when}: in the server's log");
    for (pid, line) in processes() {
        assert!(!line.contains(CANARY), "{when}: on the command line of {pid}: {line}");
    }
    let logs = text(&server.dunlin(&["logs", "--app", "web"]));
    assert!(!logs.contains(CANARY), "{when}: {logs}");
}

/// Stored now, brought to the machines by the next release.
#[test]
fn staged_secrets_wait_for_the_next_release() {
    let server = Server::start();
    let dir = two_machines(&server);
    server.ok(&["secrets", "set", "COLOUR=green", "--stage", "--app", "web"]);
    let machine = server.machines("web")[0].clone();
    server.ok(&["machine", "restart", &machine]);
    assert_eq!(server.get("web", "/env/COLOUR").1, "(unset)", "a restart is no release");
    server.ok_in(&dir, &["deploy"]);
    assert_eq!(server.get("web", "/env/COLOUR").1, "green");
    server.ok(&["secrets", "set", "COLOUR=red", "--app", "web"]);
    assert_eq!(server.get("web", "/env/COLOUR").1, "red");
    server.ok(&["rollback", "--app", "web"]);
    assert_eq!(server.get("web", "/env/COLOUR").1, "green", "a rollback brings its secrets back");
}
