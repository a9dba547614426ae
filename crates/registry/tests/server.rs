//! The server with the clients people have, and the rules that clients do not test.

mod common;

use common::*;
use dunlin_registry::{ContentStore, Digest, Images, StoreError};
use std::time::Duration;

fn store() -> (tempfile::TempDir, ContentStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    (dir, store)
}

/// (status, head, body) by curl.
async fn curl(args: &[&str]) -> (u16, String, String) {
    let args = [&["-s", "-i", "--max-time", "20"], args].concat();
    let said = run_well("curl", &args).await;
    let said = said.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&said).to_owned();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_pushes_and_pulls() {
    let (dir, store) = store();
    let addr = serve(&store).await;
    let digest = small_image(&store, "web", Some("v1"));
    let creds = format!("any:{TOKEN}");
    let ours = |name: &str| format!("docker://127.0.0.1:{}/{name}", addr.port());
    let layout = format!("dir:{}", dir.path().join("out").display());
    let insecure = ["--src-tls-verify=false", "--dest-tls-verify=false", "--insecure-policy"];
    let copy = |from: String, to: String, extra: Vec<String>| async move {
        let mut args = vec!["--insecure-policy".to_owned(), "copy".to_owned()];
        args.extend(insecure[..2].iter().map(|s| s.to_string()));
        args.extend(extra);
        args.extend([from, to]);
        run("skopeo", &args.iter().map(String::as_str).collect::<Vec<_>>()).await
    };
    let with = |side: &str| vec![format!("--{side}-creds={creds}")];
    let output = copy(ours("web:v1"), layout.clone(), with("src")).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = copy(layout.clone(), ours("api:v2"), with("dest")).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(store.resolve_tag(&repo("api"), "v2").unwrap(), Some(digest.clone()));
    // Docker's formats come in as well
    let docker = [with("dest"), vec!["--format=v2s2".into()]].concat();
    let output = copy(layout.clone(), ours("api:docker"), docker).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let docker = store.resolve_tag(&repo("api"), "docker").unwrap().unwrap();
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    let record = images.ensure(&docker).await.unwrap();
    assert_eq!(text(&record.layers[0].join("etc/motd")), "hello");

    let output = copy(layout.clone(), ours("private/x:1"), with("dest")).await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("403"), "{output:?}");
    let output = copy(layout, ours("api:3"), vec!["--dest-creds=any:wrong".into()]).await;
    assert!(!output.status.success());
    assert_eq!(store.tags(&repo("api")).unwrap(), ["docker", "v2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_in_every_way() {
    let (_dir, store) = store();
    let base = format!("http://{}/v2", serve(&store).await);
    let auth = format!("Authorization: Bearer {TOKEN}");
    let digest = Digest::of(b"hello world");
    let begin = format!("{base}/web/blobs/uploads/");
    // monolithic, one request
    let url = format!("{begin}?digest={digest}");
    assert_eq!(curl(&["-H", &auth, "-X", "POST", "--data-binary", "hello world", &url]).await.0, 201);
    // what one repository has, another does not see, whoever knows the digest
    let seen = |name: &str| format!("{base}/{name}/blobs/{digest}");
    assert_eq!(curl(&["-H", &auth, "-I", &seen("web")]).await.0, 200);
    assert_eq!(curl(&["-H", &auth, "-I", &seen("other")]).await.0, 404);
    // a mount needs the right to both
    let mount = |to: &str, from: &str| format!("{base}/{to}/blobs/uploads/?mount={digest}&from={from}");
    assert_eq!(curl(&["-H", &auth, "-X", "POST", &mount("private", "web")]).await.0, 403);
    store.put_blob(&repo("private"), &b"theirs"[..], None).unwrap();
    let theirs = format!("{base}/web/blobs/uploads/?mount={}&from=private", Digest::of(b"theirs"));
    assert_eq!(curl(&["-H", &auth, "-X", "POST", &theirs]).await.0, 202);
    assert_eq!(store.has_blob(&repo("web"), &Digest::of(b"theirs")).unwrap(), None);
    assert_eq!(curl(&["-H", &auth, "-X", "POST", &mount("other", "web")]).await.0, 201);
    assert_eq!(curl(&["-H", &auth, "-I", &seen("other")]).await.0, 200);
    // a part of it
    let (status, head, body) = curl(&["-H", &auth, "-r", "6-8", &seen("web")]).await;
    assert_eq!((status, body.as_str()), (206, "wor"), "{head}");
    assert!(head.contains("content-range: bytes 6-8/11"), "{head}");
    assert_eq!(curl(&["-H", &auth, "-r", "11-", &seen("web")]).await.0, 416);
    // chunks, in order and only so
    let (status, head, _) = curl(&["-H", &auth, "-X", "POST", &begin]).await;
    assert_eq!(status, 202);
    let location = head.lines().find_map(|line| line.strip_prefix("location: ")).unwrap();
    let location = format!("{}{location}", base.strip_suffix("/v2").unwrap());
    let chunk = |range: &'static str, data: &'static str| {
        let (auth, location) = (auth.clone(), location.clone());
        async move { curl(&["-H", &auth, "-X", "PATCH", "-H", &format!("Content-Range: {range}"), "--data-binary", data, &location]).await }
    };
    assert_eq!(chunk("0-4", "chunk").await.0, 202);
    assert_eq!(chunk("9-10", "xx").await.0, 416);
    let (status, head, _) = chunk("5-7", "ed!").await;
    assert!(status == 202 && head.contains("range: 0-7"), "{head}");
    let (status, head, _) = curl(&["-H", &auth, &location]).await;
    assert!(status == 204 && head.contains("range: 0-7"), "{head}");
    let wrong = format!("{location}?digest={digest}");
    let (status, _, body) = curl(&["-H", &auth, "-X", "PUT", &wrong]).await;
    assert!(status == 400 && body.contains("DIGEST_INVALID"), "{body}");
    // an oversized manifest stops at the limit, a manifest of missing blobs is none
    let big = tempfile::NamedTempFile::new().unwrap();
    big.as_file().set_len((4 << 20) + 1).unwrap();
    let data = format!("@{}", big.path().display());
    let kind = "Content-Type: application/vnd.oci.image.manifest.v1+json";
    let url = format!("{base}/web/manifests/v1");
    assert_eq!(curl(&["-H", &auth, "-H", kind, "-X", "PUT", "--data-binary", &data, &url]).await.0, 413);
    let missing = format!(r#"{{"schemaVersion":2,"config":{{"digest":"{}","size":1}},"layers":[]}}"#, Digest::of(b"?"));
    let (status, _, body) = curl(&["-H", &auth, "-H", kind, "-X", "PUT", "--data-binary", &missing, &url]).await;
    assert!(status == 404 && body.contains("MANIFEST_BLOB_UNKNOWN"), "{body}");
    // who does not say who they are is told where to; in the words of the proxy in front
    let (status, head, _) = curl(&["-H", "X-Forwarded-Host: registry.example.org", "-H", "X-Forwarded-Proto: https", &url]).await;
    let challenge = r#"bearer realm="https://registry.example.org/v2/token",service="test",scope="repository:web:pull""#;
    assert!(status == 401 && head.contains(challenge), "{head}");
    assert_eq!(curl(&["-u", &format!("me:{TOKEN}"), &format!("{base}/token")]).await.0, 200);
    assert_eq!(curl(&["-u", "me:wrong", &format!("{base}/token")]).await.0, 401);
    assert_eq!(curl(&["-u", &format!("me:{TOKEN}"), &format!("{base}/_catalog")]).await.0, 404);
}

#[test]
fn collection_takes_only_what_nothing_holds() {
    let (_dir, store) = store();
    let tagged = small_image(&store, "web", Some("v1"));
    let plain = archive(&[("k", tar::EntryType::Regular, "kept", 0o644)]);
    let kept = image(&store, "web", &[(plain.clone(), Digest::of(&plain))], None);
    let plain = archive(&[("g", tar::EntryType::Regular, "gone", 0o644)]);
    let gone = image(&store, "web", &[(plain.clone(), Digest::of(&plain))], None);
    // the young stay
    assert_eq!(store.gc(&[]).unwrap().blobs_removed, 0);
    let done = store.gc_older_than(std::slice::from_ref(&kept), Duration::ZERO).unwrap();
    assert_eq!((done.manifests_removed, done.blobs_removed), (1, 3));
    assert!(store.has_manifest(&repo("web"), &tagged).unwrap() && store.has_manifest(&repo("web"), &kept).unwrap());
    assert!(!store.has_manifest(&repo("web"), &gone).unwrap());
    store.copy_image(&repo("web"), &repo("copy"), &tagged).unwrap();
    store.tag(&repo("copy"), "v1", &tagged).unwrap();
    store.delete_repo(&repo("web")).unwrap();
    store.gc_older_than(&[], Duration::ZERO).unwrap();
    assert!(store.manifest(&repo("copy"), &tagged).is_ok());
    assert!(matches!(store.manifest(&repo("web"), &tagged), Err(StoreError::NotFound(_))));
    assert_eq!(ContentStore::open(store.dir()).unwrap().resolve_tag(&repo("copy"), "v1").unwrap(), Some(tagged));
}

/// What a release runs survives that its manifest is deleted over the API.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_manifest_that_is_in_use_keeps_its_content_and_its_layers() {
    let (dir, store) = store();
    let digest = small_image(&store, "web", Some("v1"));
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    let record = images.ensure(&digest).await.unwrap();
    let url = format!("http://{}/v2/web/manifests/{digest}", serve(&store).await);
    let auth = format!("Authorization: Bearer {TOKEN}");
    assert_eq!(curl(&["-H", &auth, "-X", "DELETE", &url]).await.0, 202);
    let keep = std::slice::from_ref(&digest);
    assert_eq!(store.gc_older_than(keep, Duration::ZERO).unwrap().blobs_removed, 0);
    assert_eq!(images.gc(keep).await.unwrap(), 0);
    assert_eq!(text(&record.layers[0].join("etc/motd")), "hello");
    assert_eq!(images.ensure(&digest).await.unwrap(), record);

    // with the content gone as well, nobody knows what may be removed: nothing is
    store.gc_older_than(&[], Duration::ZERO).unwrap();
    let error = images.gc(keep).await.unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    assert!(record.layers[0].exists());
}

/// A disk that gives back something else: whoever finds out makes room, and a push repairs it.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_content_is_repaired_by_pushing() {
    let (dir, store) = store();
    let base = format!("http://{}/v2/web", serve(&store).await);
    let auth = format!("Authorization: Bearer {TOKEN}");
    let plain = archive(&[("etc/motd", tar::EntryType::Regular, "hello", 0o644)]);
    let layer = gzip(&plain);
    let build = || image(&store, "web", &[(layer.clone(), Digest::of(&plain))], Some("v1"));
    let digest = build();
    let blob = Digest::of(&layer);
    let path = |digest: &Digest| store.dir().join("blobs").join(&digest.hex()[..2]).join(digest.hex());
    let damage = |digest: &Digest, at: usize| {
        let mut bytes = std::fs::read(path(digest)).unwrap();
        bytes[at] ^= 0x40;
        std::fs::write(path(digest), bytes).unwrap();
    };
    let there = |what: String| {
        let (auth, url) = (auth.clone(), format!("{base}/{what}"));
        async move { curl(&["-H", &auth, "-I", &url]).await.0 }
    };
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();

    // found by unpacking
    damage(&blob, layer.len() - 20);
    let week = std::time::SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    let age = |path: &std::path::Path| std::fs::File::options().write(true).open(path).unwrap().set_modified(week).unwrap();
    age(&path(&blob));
    assert_eq!(there(format!("blobs/{blob}")).await, 200, "nobody read it yet");
    let error = images.ensure(&digest).await.unwrap_err().to_string();
    assert!(error.contains("damaged on the disk"), "{error}");
    assert_eq!(there(format!("blobs/{blob}")).await, 404, "so that a client sends it again");
    let aside = store.dir().join("damaged").join(blob.hex());
    store.gc(&[]).unwrap();
    assert!(aside.is_file(), "a person may look at it");
    age(&aside);
    store.gc(&[]).unwrap();
    assert!(!aside.exists());
    assert_eq!(build(), digest);
    assert_eq!(text(&images.ensure(&digest).await.unwrap().layers[0].join("etc/motd")), "hello");

    // found by a client that pulls
    damage(&blob, 20);
    let url = format!("{base}/blobs/{blob}");
    let broken = run("curl", &["-s", "-o", "/dev/null", "--max-time", "20", "-H", &auth, &url]).await;
    assert!(!broken.status.success(), "it got damaged content");
    assert_eq!(there(format!("blobs/{blob}")).await, 404);

    // a client that does not ask first repairs it as well
    assert_eq!(build(), digest);
    damage(&blob, 20);
    assert_eq!(build(), digest);
    assert_eq!(Digest::of(&std::fs::read(path(&blob)).unwrap()), blob);

    // and a manifest
    damage(&digest, 5);
    assert_eq!(there(format!("manifests/{digest}")).await, 404);
    assert!(!store.has_manifest(&repo("web"), &digest).unwrap());
    assert_eq!(build(), digest);
    assert_eq!(there(format!("manifests/{digest}")).await, 200);
}

/// A file system of 2 MiB; unmounted with the test.
struct Small(std::path::PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(dir.path()).status().unwrap();
    assert!(mounted.success());
    let small = Small(dir.path().to_owned());
    let store = ContentStore::open(dir.path().join("registry")).unwrap();
    let digest = small_image(&store, "web", Some("v1"));
    let large: Vec<u8> = (0..4_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let error = store.put_blob(&repo("web"), &large[..], None).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(store.resolve_tag(&repo("web"), "v1").unwrap(), Some(digest.clone()));

    let base = serve(&store).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &large).unwrap();
    let url = format!("http://{base}/v2/web/blobs/uploads/?digest={}", Digest::of(&large));
    let data = format!("@{}", file.path().display());
    let (status, _, body) = curl(&["-u", &format!("me:{TOKEN}"), "-H", "Expect:", "-X", "POST", "--data-binary", &data, &url]).await;
    assert!(status == 507 && body.contains("full"), "{status} {body}");
    // unpacking to where there is no room
    let images = Images::open(dir.path().join("images"), store.clone()).unwrap();
    let plain = archive(&[("big", tar::EntryType::Regular, &"a".repeat(3 << 20), 0o644)]);
    let big = image(&store, "web", &[(gzip(&plain), Digest::of(&plain))], None);
    let error = images.ensure(&big).await.unwrap_err();
    assert!(matches!(error, dunlin_registry::UnpackError::Full { .. }), "{error}");
    assert_eq!(text(&images.ensure(&digest).await.unwrap().layers[0].join("etc/motd")), "hello");
    drop(small);
}
