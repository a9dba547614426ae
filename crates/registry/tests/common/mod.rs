//! A registry on a loopback port, handmade images, and the tools that push and pull.
#![allow(dead_code)] // each test file uses a part of it

use dunlin_registry::{Access, ContentStore, Credentials, Denied, Digest, RegistryState, Repo, router};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

pub const TOKEN: &str = "secret-token";

/// May do everything with the token, except in repositories whose name starts with `private`.
pub fn authorize(credentials: &Credentials, repo: &str, access: Access) -> Result<(), Denied> {
    let token = match credentials {
        Credentials::Anonymous => return Err(Denied::Unauthenticated("log in".into())),
        Credentials::Basic { password, .. } => password,
        Credentials::Bearer(token) => token,
    };
    if token != TOKEN {
        return Err(Denied::Unauthenticated("that token is wrong".into()));
    }
    if repo.starts_with("private") && access != Access::Login {
        return Err(Denied::Forbidden(format!("not your repository: {repo}")));
    }
    Ok(())
}

pub async fn serve(store: &ContentStore) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let state = RegistryState { store: store.clone(), authorize: Arc::new(authorize), service: "test".into() };
    tokio::spawn(async move { axum::serve(listener, router(state)).await });
    addr
}

pub async fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(args);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

pub async fn run_well(program: &str, args: &[&str]) -> String {
    let output = run(program, args).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

pub fn repo(name: &str) -> Repo {
    name.parse().unwrap()
}

/// A tar archive: (path, kind, link or content, mode).
pub fn archive(entries: &[(&str, tar::EntryType, &str, u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, kind, content, mode) in entries {
        add(&mut builder, path, *kind, content, *mode);
    }
    builder.into_inner().unwrap()
}

/// Writes the path as it is, which the library would refuse to for a hostile one.
pub fn add(builder: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, content: &str, mode: u32) {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(12);
    header.set_gid(34);
    header.set_mtime(1_600_000_000);
    let is_link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
    if is_link {
        header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
    }
    let body = if is_link { "" } else { content };
    header.set_size(body.len() as u64);
    header.set_cksum();
    builder.append(&header, body.as_bytes()).unwrap();
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Keeps an image of these layers: (blob, what it unpacks to).
pub fn image(store: &ContentStore, name: &str, layers: &[(Vec<u8>, Digest)], tag: Option<&str>) -> Digest {
    let repo = repo(name);
    let diff_ids: Vec<&Digest> = layers.iter().map(|(_, diff_id)| diff_id).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {"User": "12:34", "Entrypoint": ["/run"], "Cmd": null, "Env": ["A=b"], "WorkingDir": "/srv",
            "StopSignal": "SIGINT", "ExposedPorts": {"8080/tcp": {}}, "Labels": {"x": "y"}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string();
    let (config_digest, _) = store.put_blob(&repo, config.as_bytes(), None).unwrap();
    let layers: Vec<_> = layers
        .iter()
        .map(|(blob, _)| {
            let (digest, size) = store.put_blob(&repo, &blob[..], None).unwrap();
            serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size})
        })
        .collect();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
        "layers": layers,
    });
    store.put_manifest(&repo, media_type, manifest.to_string().as_bytes(), tag).unwrap()
}

/// One layer with a file, gzip.
pub fn small_image(store: &ContentStore, name: &str, tag: Option<&str>) -> Digest {
    let plain = archive(&[("etc/", tar::EntryType::Directory, "", 0o755), ("etc/motd", tar::EntryType::Regular, "hello", 0o644)]);
    image(store, name, &[(gzip(&plain), Digest::of(&plain))], tag)
}

pub fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
