//! Real clients against the registry, through the edge.

use dunlin_e2e::*;
use std::path::Path;
use std::process::{Command, Output};

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

fn ok(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(output.status.success(), "{program} {}\n{}", args.join(" "), text(&output));
    text(&output)
}

/// Log in, push and pull with skopeo, podman and buildah; deploy what was pushed; and what a token may not.
#[test]
fn people_push_and_pull_with_their_own_tools() {
    let server = Server::start();
    server.ok(&["apps", "create", "pushed"]);
    server.ok(&["apps", "create", "other"]);
    let token = server.ok(&["tokens", "create", "--verb", "pull,push", "--app", "pushed"]).trim().to_owned();
    let registry = format!("localhost:{}", server.https);
    let certs = server.dir().join("certs");
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::copy(server.data().join("ca/ca.pem"), certs.join("ca.crt")).unwrap();
    let (certs, auth) = (certs.to_str().unwrap().to_owned(), server.dir().join("auth.json"));
    let auth = auth.to_str().unwrap().to_owned();
    let credentials = format!("anybody:{token}");

    // Something small to push, made without any registry.
    let layout = server.dir().join("layout");
    let root = server.dir().join("root");
    make_image(&root, &layout);
    let layout = format!("oci:{}:hello", layout.display());
    let at = |name: &str| format!("docker://{registry}/{name}");
    let with = |args: &[&str]| ok("skopeo", args);
    with(&["copy", "--dest-cert-dir", &certs, "--dest-creds", &credentials, &layout, &at("pushed:one")]);
    let inspected = with(&["inspect", "--cert-dir", &certs, "--creds", &credentials, &at("pushed:one")]);
    assert!(inspected.contains("sha256:"), "{inspected}");
    let back = format!("dir:{}", server.dir().join("back").display());
    with(&["copy", "--src-cert-dir", &certs, "--src-creds", &credentials, &at("pushed:one"), &back]);

    let storage = server.dir().join("storage");
    let storage = ["--root", storage.to_str().unwrap(), "--runroot", &format!("{}/run", server.dir().display()), "--storage-driver", "vfs"].map(str::to_owned);
    let podman = |args: &[&str]| {
        let all: Vec<&str> = storage.iter().map(String::as_str).chain(args.iter().copied()).collect();
        ok("podman", &all)
    };
    podman(&["login", "--cert-dir", &certs, "--authfile", &auth, "-u", "anybody", "-p", &token, &registry]);
    podman(&["pull", "--cert-dir", &certs, "--authfile", &auth, &format!("{registry}/pushed:one")]);
    podman(&["tag", &format!("{registry}/pushed:one"), &format!("{registry}/pushed:two")]);
    podman(&["push", "--cert-dir", &certs, "--authfile", &auth, &format!("{registry}/pushed:two")]);
    let buildah = |args: &[&str]| {
        let all: Vec<&str> = storage.iter().map(String::as_str).chain(args.iter().copied()).collect();
        ok("buildah", &all)
    };
    buildah(&["push", "--cert-dir", &certs, "--authfile", &auth, &format!("{registry}/pushed:two"), &at("pushed:three")]);
    let tags = with(&["list-tags", "--cert-dir", &certs, "--creds", &credentials, &at("pushed")]);
    assert!(["one", "two", "three"].iter().all(|tag| tags.contains(tag)), "{tags}");

    let foreign = run("skopeo", &["copy", "--dest-cert-dir", &certs, "--dest-creds", &credentials, &layout, &at("other:one")]);
    assert!(!foreign.status.success(), "a token of one app pushed to another");
    let nobody = run("skopeo", &["inspect", "--cert-dir", &certs, "--no-creds", &at("pushed:one")]);
    assert!(!nobody.status.success(), "nobody in particular pulled");
    let wrong = run("skopeo", &["inspect", "--cert-dir", &certs, "--creds", "anybody:dunlin_v1.e30.AAAA", &at("pushed:one")]);
    assert!(!wrong.status.success());

    let config = "app = \"pushed\"\n[processes]\napp = \"sleep 1000\"\n";
    let dir = server.source("pushed", &[("dunlin.toml", config)]);
    server.ok_in(&dir, &["deploy", "--image", "pushed:two"]);
    let machine = server.machines("pushed")[0].clone();
    assert_eq!(server.ok(&["machine", "exec", &machine, "--", "cat", "/hello"]), "hello from a pushed image\n");
}

/// The same with Docker's own engine, whose client is another one.
#[test]
fn docker_pushes_and_pulls() {
    let server = Server::start();
    server.ok(&["apps", "create", "pushed"]);
    let token = server.ok(&["tokens", "create", "--verb", "pull,push", "--app", "pushed"]).trim().to_owned();
    let registry = format!("localhost:{}", server.https);
    let image = format!("{registry}/pushed:docker");
    let root = server.dir().join("root");
    make_image(&root, &server.dir().join("layout"));
    let tar = server.dir().join("root.tar");
    ok("tar", &["-C", root.to_str().unwrap(), "-cf", tar.to_str().unwrap(), "."]);

    let docker = Docker::start();
    docker.ok(&["import", tar.to_str().unwrap(), &image]);
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &image]);
    docker.ok(&["login", "-u", "anybody", "-p", &token, &registry]);
    docker.ok(&["push", &image]);
    docker.ok(&["rmi", "--force", &id]);
    docker.ok(&["pull", &image]);
    assert_eq!(docker.ok(&["image", "inspect", "--format", "{{.Id}}", &image]), id);

    let config = "app = \"pushed\"\n[processes]\napp = \"/bin/busybox sleep 1000\"\n";
    let dir = server.source("pushed", &[("dunlin.toml", config)]);
    server.ok_in(&dir, &["deploy", "--image", "pushed:docker"]);
    let machine = server.machines("pushed")[0].clone();
    assert_eq!(server.ok(&["machine", "exec", &machine, "--", "/bin/busybox", "cat", "/hello"]), "hello from a pushed image\n");
}

/// An image of another registry is pulled into the app's repository.
#[test]
fn images_of_other_registries_are_pulled() {
    let server = Server::start();
    server.expect_log("request failed"); // the image that is not there, at the end
    let data = server.dir().join("upstream");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = server.dir().join("upstream.yml");
    std::fs::write(&config, format!("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n", data.display())).unwrap();
    let mut upstream = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let layout = server.dir().join("layout");
    make_image(&server.dir().join("root"), &layout);
    let copy = || run("skopeo", &["copy", "--dest-tls-verify=false", &format!("oci:{}:hello", layout.display()), &format!("docker://127.0.0.1:{port}/team/thing:1")]);
    assert!(until(|| copy().status.success()), "{}", text(&copy()));
    server.ok(&["apps", "create", "pulled"]);
    let dir = server.source("pulled", &[("dunlin.toml", "app = \"pulled\"\n[processes]\napp = \"sleep 1000\"\n")]);
    server.ok_in(&dir, &["deploy", "--image", &format!("127.0.0.1:{port}/team/thing:1")]);
    upstream.kill().unwrap();
    upstream.wait().unwrap();
    // The copy is the app's own now: the upstream is not needed any more.
    server.ok(&["scale", "count", "2", "--app", "pulled"]);
    let missing = format!("127.0.0.1:{port}/team/thing:2");
    server.fails_in(&dir, &["deploy", "--image", &missing], 1, &["127.0.0.1"]);
}

/// busybox and one file, as an OCI layout.
fn make_image(root: &Path, layout: &Path) {
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "sleep", "cat"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("hello"), "hello from a pushed image\n").unwrap();
    let layer = layout.parent().unwrap().join("layer.tar");
    ok("tar", &["-C", root.to_str().unwrap(), "-cf", layer.to_str().unwrap(), "."]);
    let sha = |path: &Path| ok("sha256sum", &[path.to_str().unwrap()]).split(' ').next().unwrap().to_owned();
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let temporary = layout.join("new");
        std::fs::write(&temporary, bytes).unwrap();
        let digest = sha(&temporary);
        std::fs::rename(&temporary, blobs.join(&digest)).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let (layer, layer_len) = put(&std::fs::read(&layer).unwrap());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sleep", "1000"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [layer] }
    });
    let (config, config_len) = put(config.to_string().as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_len },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_len }]
    });
    let (manifest, manifest_len) = put(manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_len,
            "annotations": { "org.opencontainers.image.ref.name": "hello" } }]
    });
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}
