//! The server itself: settings, ports, restarts, roles, what it says of itself.

use crate::deploys::two_machines;
use dunlin_e2e::*;
use std::net::TcpListener;
use std::process::{Command, Stdio};

fn server_command(args: &[&str]) -> std::process::Output {
    Command::new(binary()).arg("server").args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn settings_are_validated_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    let good = server_command(&["--data-dir", data, "--domain", "example.org", "--check-config"]);
    assert!(good.status.success() && text(&good).contains("domain = \"example.org\""), "{}", text(&good));
    let bad = server_command(&["--data-dir", data, "--http", "80", "--region", "Not A Region", "--check-config"]);
    assert!(!bad.status.success());
    for part in ["http = \"80\"", "region = \"Not A Region\""] {
        assert!(text(&bad).contains(part), "{}", text(&bad));
    }
    let file = dir.path().join("server.toml");
    std::fs::write(&file, "domian = \"example.org\"\n").unwrap();
    let unknown = server_command(&["--config", file.to_str().unwrap(), "--check-config"]);
    assert!(text(&unknown).contains("domian") && text(&unknown).contains("line 1"), "{}", text(&unknown));
    std::fs::write(&file, "domain = \"file.example\"\nregion = \"ams\"\n").unwrap();
    let layers = Command::new(binary())
        .args(["server", "--config", file.to_str().unwrap(), "--region", "fra", "--check-config"])
        .env("DUNLIN_DOMAIN", "env.example")
        .output()
        .unwrap();
    assert!(text(&layers).contains("\"env.example\"") && text(&layers).contains("\"fra\""), "{}", text(&layers));
    assert!(!std::path::Path::new(data).exists(), "checking makes nothing");
}

#[test]
fn a_taken_port_is_told_with_who_has_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut server = Server::prepare();
    server.http = taken.local_addr().unwrap().port();
    let output = server.command().output().unwrap();
    let said = text(&output);
    let me = std::process::id().to_string();
    assert!(!output.status.success() && said.contains("already taken") && said.contains(&me) && said.contains("--http"), "{said}");
}

#[test]
fn two_servers_do_not_share_a_data_directory() {
    let server = Server::start();
    let second = server.command().output().unwrap();
    assert!(!second.status.success() && text(&second).contains("another server"), "{}", text(&second));
    assert!(server.dunlin(&["apps", "list"]).status.success());
}

/// Stop, upgrade, start: the machines never notice. And a signal restarts the server in between.
#[test]
fn a_restart_adopts_every_machine_and_refuses_nobody() {
    let mut server = Server::start();
    two_machines(&server);
    let pids = |server: &Server| -> Vec<_> { server.machines("web").iter().map(|m| server.supervisor_pid(m)).collect() };
    let before = pids(&server);
    let probe = Probe::start("web", server.http, 2);
    for _ in 0..3 {
        let old = server.server_pid();
        kill(server.keeper_pid(), "HUP");
        server.until("another server runs", || server.server_pid().is_some_and(|pid| Some(pid) != old));
        server.wait_ready();
    }
    let seen = probe.stop();
    assert!(seen.refused.is_empty() && seen.cut.is_empty() && seen.bad.is_empty(), "{seen:?}");
    server.stop();
    assert!(before.iter().flatten().all(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists()), "machines live on");
    server.boot();
    assert_eq!(pids(&server), before);
    assert_eq!(server.get("web", "/").0, 200);
}

/// Traffic, wakes and restarts of machines need no control plane, not even at the start.
#[test]
fn apps_go_on_without_control() {
    let mut server = Server::start();
    two_machines(&server);
    server.stop();
    server.flags = vec!["--role".into(), "host,proxy".into()];
    // There is no API to wait for.
    let mut keeper = server.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    server.until("it answers", || server.get("web", "/").0 == 200);
    assert_eq!(server.get_tls("web", "/").0, 200, "certificates come from the disk");
    let api = server.dunlin(&["apps", "list"]);
    assert!(!api.status.success() && text(&api).contains("without the control role"), "{}", text(&api));
    let died: Vec<u16> = (0..4).map(|_| server.get("web", "/die").0).collect();
    assert!(died.iter().all(|status| *status != 200), "{died:?}");
    server.until("machines came back by themselves", || server.get("web", "/").0 == 200);
    kill(keeper.id(), "TERM");
    keeper.wait().unwrap();
    server.flags.clear();
    server.boot();
    assert_eq!(server.machines("web").len(), 2);
}

#[test]
fn it_tells_how_it_is() {
    let server = Server::start();
    two_machines(&server);
    let socket = server.data().join("run/api.sock");
    let get = |path: &str| {
        let output = Command::new("curl").args(["-sS", "-w", "\n%{http_code}", "--unix-socket"]).arg(&socket).arg(format!("http://x{path}")).output().unwrap();
        text(&output)
    };
    assert!(get("/healthz").ends_with("200") && get("/readyz").ends_with("200"));
    server.get("web", "/");
    let metrics = get("/metrics");
    for name in ["dunlin_apps 1", "dunlin_host_machines{", "dunlin_proxy_answers_total{app=\"web\"", "process_resident_memory_bytes"] {
        assert!(metrics.contains(name), "no {name} in {metrics}");
    }
    let anybody = Command::new("curl")
        .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", &format!("http://127.0.0.1:{}/metrics", server.http), "-H", "host: api.localhost"])
        .output()
        .unwrap();
    assert_eq!(text(&anybody), "401");
    let version = server.json(&["version"]);
    assert!(version["version"].is_string());
    let doctor = Command::new(binary()).args(["doctor", "--json", "--data-dir"]).arg(server.data()).output().unwrap();
    let checks: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert!(checks.as_array().unwrap().iter().all(|check| check["ok"] == true || check["required"] == false), "{checks}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(!server.ok(&["completions", shell]).is_empty());
    }
}

/// From another computer: over TLS, with a token.
#[test]
fn the_api_is_reached_from_elsewhere_with_a_token() {
    let server = Server::start();
    server.ok(&["apps", "create", "seen"]);
    server.ok(&["apps", "create", "hidden"]);
    let token = server.ok(&["tokens", "create", "--verb", "read", "--app", "seen"]).trim().to_owned();
    let ca = server.data().join("ca/ca.pem");
    let api = format!("https://api.localhost:{}", server.https);
    let remote = |token: &str, args: &[&str]| {
        Command::new(binary())
            .args(["--api", &api, "--ca", ca.to_str().unwrap()])
            .args(args)
            .env("DUNLIN_TOKEN", token)
            .output()
            .unwrap()
    };
    let list = remote(&token, &["apps", "list"]);
    assert!(text(&list).contains("seen") && !text(&list).contains("hidden"), "{}", text(&list));
    let refused = remote(&token, &["apps", "create", "mine"]);
    assert!(!refused.status.success() && text(&refused).contains("does not allow") && text(&refused).contains("request id"), "{}", text(&refused));
    let wrong = remote("dunlin_v1.e30.AAAA", &["apps", "list"]);
    assert!(!wrong.status.success() && text(&wrong).contains("hint:"), "{}", text(&wrong));
    let untrusted = Command::new(binary()).args(["--api", &api, "apps", "list"]).env("DUNLIN_TOKEN", &token).output().unwrap();
    assert!(!untrusted.status.success(), "a certificate that nobody trusts was taken");
}
