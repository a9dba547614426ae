//! podman and buildah: they log in once, and exchange what they were given for a token at every push and pull.

mod common;

use common::*;
use dunlin_registry::{ContentStore, Images};
use std::path::Path;
use std::process::Output;

/// Everything that the clients keep is below this folder.
struct Clients<'a> {
    dir: &'a Path,
    registry: String,
}

impl Clients<'_> {
    async fn run(&self, program: &str, args: &[&str]) -> Output {
        let home = format!("HOME={}", self.dir.display());
        let runtime = format!("XDG_RUNTIME_DIR={}", self.dir.display());
        let auth = format!("REGISTRY_AUTH_FILE={}", self.dir.join("auth.json").display());
        let (root, runroot) = (self.dir.join("root"), self.dir.join("runroot"));
        let storage = ["--root", root.to_str().unwrap(), "--runroot", runroot.to_str().unwrap(), "--storage-driver", "vfs"];
        run("env", &[&[home.as_str(), &runtime, &auth, program], &storage[..], args].concat()).await
    }

    async fn well(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args).await;
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    async fn login(&self, program: &str, token: &str) -> bool {
        self.run(program, &["login", "--tls-verify=false", "-u", "any", "-p", token, &self.registry]).await.status.success()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_and_buildah_log_in_push_and_pull() {
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    let addr = serve(&store).await;
    let clients = Clients { dir: dir.path(), registry: addr.to_string() };
    let named = |image: &str| format!("{addr}/{image}");
    std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\nCOPY motd /etc/motd\nCMD [\"/run\"]\n").unwrap();
    std::fs::write(dir.path().join("motd"), "made by buildah").unwrap();
    let (web, api, private) = (named("web:v1"), named("api:v2"), named("private/x:1"));
    clients.well("buildah", &["build", "--isolation", "chroot", "-t", &web, dir.path().to_str().unwrap()]).await;

    // without a login, with a wrong one, with the right one
    let push = ["push", "--tls-verify=false", &web];
    assert!(!clients.run("buildah", &push).await.status.success());
    assert!(!clients.login("buildah", "wrong").await);
    assert!(clients.login("buildah", TOKEN).await);
    clients.well("buildah", &push).await;
    let digest = store.resolve_tag(&repo("web"), "v1").unwrap().expect("it was pushed");
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    let record = images.ensure(&digest).await.unwrap();
    assert_eq!(text(&record.layers[0].join("etc/motd")), "made by buildah");
    assert_eq!(record.config.cmd, ["/run"]);

    // podman pulls what buildah pushed, and pushes it elsewhere; not where it may not
    clients.well("buildah", &["rmi", "--all", "--force"]).await;
    assert!(clients.login("podman", TOKEN).await);
    clients.well("podman", &["pull", "--tls-verify=false", &web]).await;
    clients.well("podman", &["tag", &web, &api]).await;
    clients.well("podman", &["push", "--tls-verify=false", &api]).await;
    let copied = store.resolve_tag(&repo("api"), "v2").unwrap().expect("it was pushed");
    assert_eq!(text(&images.ensure(&copied).await.unwrap().layers[0].join("etc/motd")), "made by buildah");
    clients.well("podman", &["tag", &web, &private]).await;
    let refused = clients.run("podman", &["push", "--tls-verify=false", &private]).await;
    assert!(!refused.status.success() && store.tags(&repo("private/x")).unwrap().is_empty());
}
