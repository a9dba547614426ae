//! Other people's clients of the Machines API.

use dunlin_e2e::*;
use std::path::Path;
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
