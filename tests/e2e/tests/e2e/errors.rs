//! What goes wrong for people: each says what, why and what next, and loses nothing.

use crate::deploys::{config, image, two_machines};
use dunlin_e2e::*;
use std::fs;
use std::process::Command;

#[test]
fn a_source_that_is_nothing_we_know() {
    let server = Server::start();
    let dir = server.source("odd", &[("notes.txt", "hello")]);
    server.fails_in(&dir, &["launch", "--yes"], 2, &["nothing here is recognised", "Dockerfile"]);
    let empty = server.dir().join("empty");
    fs::create_dir(&empty).unwrap();
    server.fails_in(&empty, &["deploy"], 2, &["there is no dunlin.toml or fly.toml"]);
    server.fails_in(&empty, &["status"], 2, &["which app?"]);
    server.fails(&["status", "--app", "nobody"], 1, &["there is no app nobody", "request id"]);
    assert!(server.ok(&["apps", "list", "--json"]).trim() == "[]", "nothing was made");

    // What nobody understands is told to programs as everything else is.
    for (args, code) in [(&["apps", "lst"][..], 2), (&["status", "--app", "nobody"], 1), (&["cleanup"], 1)] {
        let output = server.dunlin(&[args, &["--json"]].concat());
        let said: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap_or_default();
        assert!(output.status.code() == Some(code) && said["exit_code"] == code && said["error"].is_string(), "{args:?}: {}", text(&output));
    }
    let settings = server.json(&["server", "--check-config"]);
    assert_eq!(settings["data_dir"].as_str(), server.data().to_str(), "{settings}");
    server.fails(&["scale", "memory", "512", "--app", "web"], 2, &["[[vm]]"]);
}

#[test]
fn a_configuration_with_mistakes() {
    let server = Server::start();
    let text = "app = \"web\"\n[http_service]\ninternal_port = 8080\nforce_http = true\n";
    let dir = server.source("bad", &[("dunlin.toml", text), ("Dockerfile", DOCKERFILE), ("app.py", APP_PY)]);
    server.fails_in(&dir, &["config", "validate"], 2, &["line 4", "force_http", "did you mean force_https?"]);
    server.fails_in(&dir, &["deploy"], 2, &["line 4"]);
    fs::write(dir.join("dunlin.toml"), "app = \"web\"\n[[statics]]\nguest_path = \"/x\"\nurl_prefix = \"/y\"\n").unwrap();
    server.fails_in(&dir, &["deploy"], 2, &["statics", "--ignore"]);
    fs::write(dir.join("dunlin.toml"), "app = \"web\"\n[http_service\n").unwrap();
    server.fails_in(&dir, &["config", "validate"], 2, &["dunlin.toml:2:", "unclosed table"]);
}

#[test]
fn an_app_that_does_not_listen_where_it_should() {
    let server = Server::start();
    for text in ["plan failed", "failed"] {
        server.expect_log(text);
    }
    let dir = server.source("web", PYTHON);
    config(&dir, "1", "BIND = \"127.0.0.1\"");
    server.ok(&["apps", "create", "web"]);
    server.fails_in(&dir, &["deploy"], 4, &["127.0.0.1:8080", "0.0.0.0"]);
    let image = latest_image(&server);
    config(&dir, "2", "LISTEN = \"9000\"");
    server.fails_in(&dir, &["deploy", "--image", &image], 4, &["9000", "8080"]);
    config(&dir, "3", "BEHAVE = \"exits\"");
    server.fails_in(&dir, &["deploy", "--image", &image], 4, &["cannot find the database", "exit"]);
    config(&dir, "4", "BEHAVE = \"eats\"");
    server.fails_in(&dir, &["deploy", "--image", &image], 4, &["memory"]);
    config(&dir, "5", "BEHAVE = \"sick\"");
    server.fails_in(&dir, &["deploy", "--image", &image], 4, &["500", "the cache is cold"]);
    config(&dir, "6", "");
    server.ok_in(&dir, &["deploy", "--image", &image]);
    assert_eq!(server.get("web", "/"), (200, "release 6".into()));
}

fn latest_image(server: &Server) -> String {
    let releases = server.json(&["releases", "--app", "web"]);
    format!("web@{}", releases[0]["image"].as_str().unwrap().rsplit('@').next().unwrap())
}

#[test]
fn builds_and_images_that_fail() {
    let server = Server::start();
    let dir = two_machines(&server);
    let good = image(&server);
    server.expect_log("request failed"); // a registry elsewhere that cannot be reached
    fs::write(dir.join("Dockerfile"), "FROM python:3.11-slim\nRUN echo about to fail && cat /no/such/file\n").unwrap();
    server.fails_in(&dir, &["deploy"], 1, &["RUN echo about to fail", "/no/such/file"]);
    fs::write(dir.join("Dockerfile"), "FROM node:99-none\n").unwrap();
    server.fails_in(&dir, &["deploy"], 1, &["node:99-none", "dunlin image bootstrap node"]);
    fs::remove_file(dir.join("Dockerfile")).unwrap();
    server.fails_in(&dir, &["deploy"], 1, &["Dockerfile"]);
    server.fails_in(&dir, &["deploy", "--image", "web:nope"], 1, &["web:nope", "not in the registry"]);
    let nothing = format!("web@sha256:{}", "0".repeat(64));
    server.fails_in(&dir, &["deploy", "--image", &nothing], 1, &["not in the registry"]);
    server.fails_in(&dir, &["deploy", "--image", "another:tag"], 1, &["another"]);
    assert_eq!(server.get("web", "/"), (200, "release 1".into()), "nothing was lost");
    assert_eq!(image(&server), good);
}

/// What is on disk is not what its name says: told at the unpacking, and a push repairs it.
#[test]
fn a_blob_that_rotted_on_disk() {
    let server = Server::start();
    let dir = two_machines(&server);
    for text in ["cannot be prepared", "plan failed", "failed", "digest"] {
        server.expect_log(text);
    }
    fs::write(dir.join("app.py"), format!("{APP_PY}# another layer\n")).unwrap();
    server.ok(&["apps", "create", "other"]);
    fs::write(dir.join("other.toml"), "app = \"other\"\n").unwrap();
    // Built and pushed but never unpacked.
    let output = server.dunlin_in(&dir, &["deploy", "--config", "other.toml", "--detach"]);
    assert!(output.status.success(), "{}", text(&output));
    server.until("other is live", || server.json(&["releases", "--app", "other"])[0]["status"] == "succeeded");
    server.ok(&["apps", "destroy", "other", "--yes"]);
    let wrong = curl_push_with_a_wrong_digest(&server);
    assert!(wrong.contains("DIGEST_INVALID"), "{wrong}");
}

/// A client whose bytes are others than it says.
fn curl_push_with_a_wrong_digest(server: &Server) -> String {
    let token = server.ok(&["tokens", "create", "--verb", "pull,push"]).trim().to_owned();
    let base = format!("http://registry.localhost:{}", server.http);
    let resolve = format!("registry.localhost:{}:127.0.0.1", server.http);
    let digest = format!("sha256:{}", "1".repeat(64));
    let url = format!("{base}/v2/web/blobs/uploads/?digest={digest}");
    let output = Command::new("curl")
        .args(["-sS", "--resolve", &resolve, "-X", "POST", "-u", &format!("any:{token}"), "--data-binary", "other bytes", &url])
        .args(["-H", "content-type: application/octet-stream"])
        .output()
        .unwrap();
    text(&output)
}

#[test]
fn names_tokens_and_servers_that_are_not_there() {
    let server = Server::start();
    server.ok(&["apps", "create", "web"]);
    server.fails(&["apps", "create", "web"], 1, &["the name web is taken", "request id"]);
    server.fails(&["apps", "create", "api"], 1, &["platform's own"]);
    let dir = tempfile::tempdir().unwrap();
    let nobody = Command::new(binary()).args(["apps", "list", "--data-dir"]).arg(dir.path()).output().unwrap();
    assert!(text(&nobody).contains("cannot reach the Dunlin server") && text(&nobody).contains("hint:"), "{}", text(&nobody));
    let json = Command::new(binary()).args(["apps", "list", "--json", "--data-dir"]).arg(dir.path()).output().unwrap();
    let error: serde_json::Value = serde_json::from_slice(&json.stderr).unwrap();
    assert!(error["error"].is_string() && error["hint"].is_string(), "{error}");
    let expired = expired_token(&server);
    let refused = Command::new(binary())
        .args(["--api", &format!("https://api.localhost:{}", server.https), "--ca"])
        .arg(server.data().join("ca/ca.pem"))
        .args(["--token", &expired, "apps", "list"])
        .output()
        .unwrap();
    assert!(text(&refused).contains("the token has expired"), "{}", text(&refused));
    let refused = Command::new(binary()).args(["--api", "http://example.org", "apps", "list"]).output().unwrap();
    assert!(text(&refused).contains("in clear"), "{}", text(&refused));
}

fn expired_token(server: &Server) -> String {
    let output = Command::new("curl")
        .args(["-sS", "--unix-socket"])
        .arg(server.data().join("run/api.sock"))
        .args(["-H", "content-type: application/json", "-d", r#"{"verbs":["read"],"expires_in_s":1}"#, "http://x/v1/tokens"])
        .output()
        .unwrap();
    let created: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let token = created["token"].as_str().unwrap().to_owned();
    std::thread::sleep(std::time::Duration::from_millis(1_100)); // its life, which is what is tested
    token
}

#[test]
fn not_root_and_a_kernel_that_lacks_something() {
    let dir = tempfile::tempdir().unwrap();
    let public = dir.path().join("dunlin");
    fs::copy(binary(), &public).unwrap();
    let mut open = fs::metadata(dir.path()).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o755);
    fs::set_permissions(dir.path(), open).unwrap();
    let as_nobody = |args: &[&str]| {
        Command::new("setpriv").args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&public).args(args).output().unwrap()
    };
    let server = as_nobody(&["server", "--data-dir", "/tmp/dunlin-nobody", "--http", "127.0.0.1:0", "--https", "127.0.0.1:0", "--cluster", "off"]);
    assert!(!server.status.success() && text(&server).contains("needs root") && text(&server).contains("sudo"), "{}", text(&server));
    // All of it at once: what is there, what is required, and what would cost something.
    for need in ["user namespaces: there", "usermod --add-subuids", "cgroups", "internet", "hint:"] {
        assert!(text(&server).contains(need), "no {need}: {}", text(&server));
    }
    let doctor = as_nobody(&["doctor", "--data-dir", "/tmp/dunlin-nobody"]);
    assert!(!doctor.status.success() && text(&doctor).contains("usermod --add-subuids"), "{}", text(&doctor));
    let running = Server::start();
    let cli = as_nobody(&["apps", "list", "--data-dir", running.data().to_str().unwrap()]);
    assert!(text(&cli).contains("sudo"), "{}", text(&cli));
    let lacking = Command::new("setpriv")
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .arg(&public)
        .args(["server", "--http", "127.0.0.1:0", "--https", "127.0.0.1:0", "--cluster", "off", "--data-dir"])
        .arg(dir.path().join("data"))
        .output()
        .unwrap();
    let said = text(&lacking);
    assert!(!lacking.status.success() && said.contains("CAP_SYS_ADMIN") && said.contains("no machine can run"), "{said}");
}
