//! Pulling from Debian's docker-registry, from our own server, and from one that breaks off and lies.

mod common;

use common::*;
use dunlin_registry::{ContentStore, Digest, Images, Login, PullError, pull};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Upstream {
    child: Child,
    port: u16,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn docker_registry(dir: &std::path::Path) -> Upstream {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = dir.join("registry.yml");
    let mut file = std::fs::File::create(&config).unwrap();
    let root = dir.join("upstream");
    write!(file, "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n", root.display()).unwrap();
    let child = Command::new("docker-registry").arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let upstream = Upstream { child, port };
    let deadline = Instant::now() + Duration::from_secs(20);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(Instant::now() < deadline, "docker-registry does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    upstream
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_from_debians_registry() {
    let dir = tempfile::tempdir().unwrap();
    let ours = ContentStore::open(dir.path().join("ours")).unwrap();
    let source = ContentStore::open(dir.path().join("source")).unwrap();
    let digest = small_image(&source, "web", Some("v1"));
    let upstream = docker_registry(dir.path()).await;
    let addr = serve(&source).await;
    let from = format!("docker://{addr}/web:v1");
    let to = format!("docker://127.0.0.1:{}/lib/web:v1", upstream.port);
    let creds = format!("--src-creds=a:{TOKEN}");
    run_well("skopeo", &["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", &creds, &from, &to]).await;

    let reference = format!("localhost:{}/lib/web:v1", upstream.port);
    assert_eq!(pull(&ours, &repo("app"), &reference, None).await.unwrap(), digest);
    let images = Images::open(dir.path().join("images"), ours.clone()).unwrap();
    assert_eq!(text(&images.ensure(&digest).await.unwrap().layers[0].join("etc/motd")), "hello");
    // and from a server that wants a token, which is our own
    let reference = format!("{addr}/web@{digest}");
    let login = Login { user: "a".into(), password: TOKEN.into() };
    assert_eq!(pull(&ours, &repo("second"), &reference, Some(&login)).await.unwrap(), digest);
    let error = pull(&ours, &repo("third"), &reference, None).await.unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
    let error = pull(&ours, &repo("app"), &format!("localhost:{}/lib/web:v9", upstream.port), None).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound(_)), "{error}");
    let error = pull(&ours, &repo("app"), "localhost:1/web:v9", None).await.unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
}

/// Answers for one image; the layer breaks off in the middle at first, or is damaged.
async fn bad_registry(manifest: String, config: Vec<u8>, layer: Vec<u8>, damaged: Arc<AtomicU32>) -> (u16, Arc<AtomicU32>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let resumed = Arc::new(AtomicU32::new(0));
    let counter = resumed.clone();
    tokio::spawn(async move {
        let mut broke = false;
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 8192];
            let n = stream.read(&mut request).await.unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..n]).to_lowercase();
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let (body, kind) = if path.contains("/manifests/") {
                (manifest.clone().into_bytes(), "application/vnd.oci.image.manifest.v1+json")
            } else if path.ends_with(Digest::of(&config).as_str()) {
                (config.clone(), "application/octet-stream")
            } else {
                (layer.clone(), "application/octet-stream")
            };
            let from = request.split("range: bytes=").nth(1).and_then(|r| r.split('-').next()?.parse::<usize>().ok());
            let mut body = body;
            let is_layer = body == layer;
            if is_layer && damaged.load(Ordering::SeqCst) > 0 {
                let last = body.len() - 1;
                body[last] ^= 1;
            }
            let head = match from {
                Some(from) => {
                    counter.fetch_add(1, Ordering::SeqCst);
                    let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
                    body.drain(..from);
                    format!("HTTP/1.1 206 Partial Content\r\ncontent-range: {range}\r\ncontent-length: {}\r\n\r\n", body.len())
                }
                None => format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len()),
            };
            let sent = if is_layer && !broke && from.is_none() { body.len() / 2 } else { body.len() };
            broke |= sent < body.len();
            let _ = stream.write_all(head.as_bytes()).await;
            let _ = stream.write_all(&body[..sent]).await;
            let _ = stream.shutdown().await;
        }
    });
    (port, resumed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_off_layer_is_gone_on_with_and_a_damaged_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = ContentStore::open(dir.path().join("source")).unwrap();
    let plain = archive(&[("big", tar::EntryType::Regular, &"abc".repeat(1_000_000), 0o644)]);
    let digest = image(&source, "web", &[(plain.clone(), Digest::of(&plain))], None);
    let (_, manifest) = source.manifest(&repo("web"), &digest).unwrap();
    let manifest = String::from_utf8(manifest.to_vec()).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let config: Digest = parsed["config"]["digest"].as_str().unwrap().parse().unwrap();
    let config_path = source.dir().join("blobs").join(&config.hex()[..2]).join(config.hex());
    let config = std::fs::read(config_path).unwrap();
    let damaged = Arc::new(AtomicU32::new(0));
    let (port, resumed) = bad_registry(manifest, config, plain, damaged.clone()).await;
    let reference = format!("127.0.0.1:{port}/web:v1");
    let ours = ContentStore::open(dir.path().join("ours")).unwrap();
    assert_eq!(pull(&ours, &repo("app"), &reference, None).await.unwrap(), digest);
    assert!(resumed.load(Ordering::SeqCst) > 0, "it started again from nothing");

    damaged.store(1, Ordering::SeqCst);
    let error = pull(&ContentStore::open(dir.path().join("other")).unwrap(), &repo("app"), &reference, None).await.unwrap_err();
    assert!(matches!(error, PullError::Digest { .. }), "{error}");
}
