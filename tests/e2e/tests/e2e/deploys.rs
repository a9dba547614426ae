//! Releases: rolling, gated, returned, rolled back; and what the exit code says.

use dunlin_e2e::*;
use std::fs;
use std::path::{Path, PathBuf};

/// The usual app with two machines; returns the source's directory.
pub fn two_machines(server: &Server) -> PathBuf {
    let dir = server.source("web", PYTHON);
    config(&dir, "1", "");
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&dir, &["deploy"]);
    server.ok(&["scale", "count", "2", "--app", "web"]);
    assert_eq!(server.machines("web").len(), 2);
    dir
}

/// Writes the configuration of a release; further lines go below `[env]`. One that will not become healthy
/// is not waited for as long.
pub fn config(dir: &Path, release: &str, more: &str) {
    let wait = if more.is_empty() { "2m" } else { "15s" };
    let text = format!(
        "app = \"web\"\n[http_service]\ninternal_port = 8080\n[[http_service.checks]]\npath = \"/health\"\ninterval = \"1s\"\n\
         timeout = \"2s\"\ngrace_period = \"5s\"\n[deploy]\nwait_timeout = \"{wait}\"\n[env]\nRELEASE = \"{release}\"\n{more}\n"
    );
    fs::write(dir.join("dunlin.toml"), text).unwrap();
}

/// The image of the current release, so that a deploy need not build.
pub fn image(server: &Server) -> String {
    let status = server.json(&["status", "--app", "web"]);
    let image = status["release"]["image"].as_str().unwrap();
    format!("web@{}", image.rsplit('@').next().unwrap())
}

#[test]
fn a_deploy_with_two_machines_refuses_nobody() {
    let server = Server::start();
    let dir = two_machines(&server);
    let probe = Probe::start("web", server.http, 2);
    fs::write(dir.join("app.py"), APP_PY.replace("\"release \" + release", "\"release \" + release + \" of new code\"")).unwrap();
    config(&dir, "2", "");
    server.ok_in(&dir, &["deploy"]);
    server.ok(&["rollback", "--app", "web"]);
    let seen = probe.stop();
    assert!(seen.refused.is_empty() && seen.cut.is_empty() && seen.bad.is_empty(), "{seen:?}");
    assert_eq!(seen.bodies, ["release 1", "release 2 of new code"], "in this order, and nothing else");
    assert_eq!(server.get("web", "/").1, "release 1");
    let releases = server.json(&["releases", "--app", "web"]);
    let versions: Vec<_> = releases.as_array().unwrap().iter().map(|r| (r["version"].as_u64().unwrap(), r["status"].clone())).collect();
    assert_eq!(versions[0].0, 4, "{versions:?}");
}

#[test]
fn a_sick_release_goes_back_by_itself_and_says_why() {
    let server = Server::start();
    let dir = two_machines(&server);
    for text in ["plan failed", "failed"] {
        server.expect_log(text);
    }
    let probe = Probe::start("web", server.http, 2);
    config(&dir, "2", "BEHAVE = \"sick\"");
    let said = server.fails_in(&dir, &["deploy", "--image", &image(&server)], 3, &["500", "the cache is cold", "v2 runs again"]);
    assert!(said.contains("hint:"), "{said}");
    let seen = probe.stop();
    assert!(seen.refused.is_empty() && seen.cut.is_empty() && seen.bad.is_empty(), "{seen:?}");
    assert_eq!(seen.bodies, ["release 1"], "nobody was answered by the sick one");
    for machine in server.machine_list("web") {
        assert_eq!(machine["state"], "started");
    }
    config(&dir, "4", "BEHAVE = \"exits\"");
    server.fails_in(&dir, &["deploy", "--image", &image(&server)], 3, &["cannot find the database", "exit"]);
    assert_eq!(server.get("web", "/"), (200, "release 1".into()));
}

/// The client is only an onlooker.
#[test]
fn a_killed_client_changes_nothing() {
    let server = Server::start();
    let dir = two_machines(&server);
    config(&dir, "2", "");
    let image = image(&server);
    let before = server.json(&["releases", "--app", "web"]).as_array().unwrap().len();
    let mut client = server.cli(&dir, &["deploy", "--image", &image]).spawn().unwrap();
    server.until("the release is written", || server.json(&["releases", "--app", "web"]).as_array().unwrap().len() > before);
    client.kill().unwrap();
    client.wait().unwrap();
    server.until("the release is live", || {
        let releases = server.json(&["releases", "--app", "web"]);
        releases[0]["status"] == "succeeded"
    });
    assert_eq!(server.get("web", "/"), (200, "release 2".into()));
    let detached = server.ok_in(&dir, &["deploy", "--image", &image, "--detach"]);
    assert!(detached.contains("release v"), "{detached}");
}

#[test]
fn an_unchanged_deploy_changes_no_machine_and_scale_does_what_it_says() {
    let server = Server::start();
    let dir = two_machines(&server);
    let before: Vec<_> = server.machine_list("web").iter().map(|m| (m["id"].clone(), m["instance_id"].clone())).collect();
    server.ok_in(&dir, &["deploy"]);
    let after: Vec<_> = server.machine_list("web").iter().map(|m| (m["id"].clone(), m["instance_id"].clone())).collect();
    assert_eq!(before, after);
    server.ok(&["scale", "count", "4", "--app", "web"]);
    assert_eq!(server.machines("web").len(), 4);
    let probe = Probe::start("web", server.http, 2);
    server.ok(&["scale", "count", "1", "--app", "web"]);
    let seen = probe.stop();
    assert_eq!(server.machines("web").len(), 1);
    assert!(seen.refused.is_empty() && seen.cut.is_empty() && seen.bad.is_empty(), "{seen:?}");
    assert!(server.ok(&["scale", "show", "--app", "web"]).contains('1'));
}
