//! Apps of every family, launched from their source with dependencies from their registries.

use dunlin_e2e::*;
use std::fs;

/// Launches a source without any configuration and returns the server that runs it.
fn launch(server: &Server, name: &str, files: &[(&str, &str)], seen: &str) {
    let dir = server.source(name, files);
    let manifest = server.ok_in(&dir, &["launch", "--manifest", "--json"]);
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["proposal"]["name"], seen);
    assert!(manifest["proposal"]["evidence"].as_array().is_some_and(|evidence| !evidence.is_empty()));
    assert!(!dir.join("dunlin.toml").exists(), "--manifest changes nothing");
    let urls = server.ok_in(&dir, &["launch", "--yes"]);
    assert!(urls.contains(&format!("http://{name}.localhost:{}", server.http)), "{urls}");
    assert!(dir.join("dunlin.toml").exists());
    server.ok_in(&dir, &["config", "validate"]);
}

#[test]
fn a_flask_app_from_source() {
    let server = Server::start();
    let app = "from flask import Flask\napp = Flask(__name__)\n@app.get('/')\ndef index():\n    return 'flask says hello'\n";
    launch(&server, "hello-flask", &[("requirements.txt", "flask>=3\n"), ("app.py", app)], "Flask");
    assert_eq!(server.get("hello-flask", "/"), (200, "flask says hello".into()));
    assert_eq!(server.get_tls("hello-flask", "/"), (200, "flask says hello".into()));
    assert_eq!(server.get("hello-flask", "/nowhere").0, 404);
}

#[test]
fn a_fastapi_app_with_a_websocket() {
    let server = Server::start();
    let app = r#"
from fastapi import FastAPI, WebSocket
app = FastAPI()

@app.get("/")
def index():
    return {"fast": True}

@app.websocket("/ws")
async def echo(socket: WebSocket):
    await socket.accept()
    while True:
        await socket.send_text("echo " + await socket.receive_text())
"#;
    let files = [("requirements.txt", "fastapi\nuvicorn[standard]\n"), ("main.py", app)];
    launch(&server, "hello-fast", &files, "FastAPI");
    assert_eq!(server.get("hello-fast", "/"), (200, "{\"fast\":true}".into()));
    assert_eq!(websocket_echo("hello-fast", server.http, "/ws", "dunlin"), "echo dunlin");
}

#[test]
fn an_express_app_and_a_static_site() {
    let server = Server::start();
    let package = r#"{ "name": "x", "scripts": { "start": "node server.js" }, "dependencies": { "express": "^4.19.2" } }"#;
    let app = "const app = require('express')();\napp.get('/', (q, r) => r.send('express says hello'));\napp.listen(process.env.PORT || 3000);\n";
    launch(&server, "hello-express", &[("package.json", package), ("server.js", app)], "Node.js (express)");
    assert_eq!(server.get("hello-express", "/"), (200, "express says hello".into()));
    assert_eq!(server.get_tls("hello-express", "/").0, 200);

    let site = [("index.html", "<h1>static says hello</h1>"), ("css/site.css", "h1 {}"), (".env", "PASSWORD=hunter2")];
    launch(&server, "hello-static", &site, "static site");
    assert_eq!(server.get("hello-static", "/"), (200, "<h1>static says hello</h1>".into()));
    assert_eq!(server.get("hello-static", "/css/site.css").0, 200);
    assert_eq!(server.get("hello-static", "/.env").0, 404, "what .dockerignore names is not served");
}

/// A Dockerfile of the app's own, a fly.toml and a Procfile are used as they are.
#[test]
fn existing_files_are_used_as_they_are() {
    let server = Server::start();
    let fly = "app = 'from-fly'\nprimary_region = 'iad'\n\n[env]\n  RELEASE = 'of fly'\n\n[http_service]\n  internal_port = 8080\n  \
        force_https = true\n  auto_stop_machines = 'stop'\n  auto_start_machines = true\n  min_machines_running = 0\n  \
        processes = ['app']\n\n[[vm]]\n  memory = '256mb'\n  cpu_kind = 'shared'\n  cpus = 1\n";
    let dir = server.source("anything", &[("app.py", APP_PY), ("Dockerfile", DOCKERFILE), ("fly.toml", fly)]);
    server.ok_in(&dir, &["launch", "--yes"]);
    assert_eq!(fs::read_to_string(dir.join("fly.toml")).unwrap(), fly);
    assert!(!dir.join("dunlin.toml").exists());
    assert_eq!(server.get_tls("from-fly", "/"), (200, "release of fly".into()));
    let (status, _) = server.get("from-fly", "/");
    assert!(status == 301 || status == 308, "force_https: {status}");

    let procfile = "web: python3 -u app.py\nworker: python3 -u -c \"import time; print('worker is up', flush=True); time.sleep(3600)\"\n";
    let files = [("app.py", APP_PY), ("requirements.txt", ""), ("Procfile", procfile)];
    let dir = server.source("from-procfile", &files);
    server.ok_in(&dir, &["launch", "--yes"]);
    assert_eq!(server.get("from-procfile", "/"), (200, "release 1".into()));
    server.until("the worker prints", || server.ok(&["logs", "--app", "from-procfile"]).contains("worker is up"));
    let groups: Vec<_> = server.machine_list("from-procfile").iter().map(|m| m["process_group"].clone()).collect();
    assert_eq!(groups.len(), 2, "{groups:?}");
}

/// decisions.md: Debian's buildah lets this Dockerfile write to the root of whoever runs it.
#[test]
fn a_build_reaches_nothing_of_the_host() {
    let server = Server::start();
    let marker = format!("dunlin-cve-{}", std::process::id());
    let base = "FROM debian:12-slim\nRUN ln -s / /link\n";
    let dir = server.source("cve-base", &[("Dockerfile", base)]);
    server.ok(&["apps", "create", "cve"]);
    // The attack needs its base image by name: both stages are one Dockerfile.
    let attack = format!(
        "FROM debian:12-slim AS base\nRUN ln -s / /link\nFROM debian:12-slim\n\
         RUN --mount=type=bind,from=base,source=/link,target=/mnt,rw touch /mnt/{marker}; ls /mnt; cat /mnt/etc/hostname; true\n\
         CMD [\"true\"]\n"
    );
    fs::write(dir.join("Dockerfile"), attack).unwrap();
    fs::write(dir.join("dunlin.toml"), "app = \"cve\"\n").unwrap();
    let output = server.dunlin_in(&dir, &["deploy"]);
    assert!(!std::path::Path::new("/").join(&marker).exists(), "the build wrote to the host's root:\n{}", text(&output));
    let hostname = fs::read_to_string("/etc/hostname").unwrap_or_default();
    assert!(hostname.trim().is_empty() || !text(&output).contains(hostname.trim()), "it read the host's files: {}", text(&output));
    server.expect_log("release v1 failed"); // its program ends at once
    server.expect_log("plan failed");
}

#[test]
fn build_arguments_and_secrets_and_targets() {
    let server = Server::start();
    let dockerfile = "FROM debian:12-slim AS small\nARG COLOUR=none\nRUN echo \"colour is $COLOUR\"\n\
        RUN --mount=type=secret,id=KEY echo \"secret has $(wc -c < /run/secrets/KEY) bytes\" && grep -q '^canary-.*-of-build$' /run/secrets/KEY\n\
        RUN --mount=type=cache,target=/var/cache/thing --mount=type=tmpfs,target=/scratch touch /var/cache/thing/kept /scratch/gone\n\
        RUN env | grep -c of-build && exit 1; true\nCMD [\"sleep\", \"1000\"]\nFROM small\nRUN false\n";
    let config = "app = \"args\"\n[build]\n  [build.args]\n  COLOUR = \"red\"\n";
    let dir = server.source("args", &[("Dockerfile", dockerfile), ("dunlin.toml", config), (".dockerignore", "ignored\n"), ("ignored", "x")]);
    server.ok(&["apps", "create", "args"]);
    fs::write(server.dir().join("key"), "canary-9d1e-of-build").unwrap();
    let secret = format!("KEY=@{}", server.dir().join("key").display());
    let args = ["deploy", "--build-arg", "COLOUR=green", "--build-secret", &secret, "--build-target", "small"];
    let output = server.dunlin_in(&dir, &args);
    assert!(output.status.success(), "{}\n{}", text(&output), server.log());
    assert!(text(&output).contains("colour is green") && text(&output).contains("secret has 20 bytes"), "{}", text(&output));
    fs::remove_file(server.dir().join("key")).unwrap();
    let found = std::process::Command::new("grep").args(["-rla", "canary-9d1e-of-build"]).arg(server.data()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "a build secret is on disk");
}
