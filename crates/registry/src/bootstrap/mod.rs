//! Base images made from Debian packages, under the names people write: no other registry is needed.
//!
//! ```text
//! mmdebstrap -> rootfs -> layer "debian"            library/debian:12, ...
//! rootfs + overlay, apt-get install -> upper dir -> second layer   library/python:3.11, library/node:18, ...
//! ```
//! All that mounts runs in a private mount and process namespace that dies with us. A tag is only given when it
//! is true of the version that Debian has.

mod script;
mod write;

use crate::digest::{Digest, Repo};
use crate::manifest::{Manifest, OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST, architecture};
use crate::store::{ContentStore, StoreError};
use crate::unpack::{Owners, Packed, UnpackError, unpack_layer};
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;
use write::WrittenLayer;

/// Changed whenever what is made changes: images of another recipe are made again.
const RECIPE: &str = "2";
/// Authorities that this computer's operator added to Debian's. Images made here trust them too, or a build
/// behind a proxy that reads TLS would reach no package registry.
const LOCAL_AUTHORITIES: &str = "/usr/local/share/ca-certificates";
const RECIPE_ANNOTATION: &str = "org.dunlin.recipe";
const ORIGIN_LABEL: &str = "org.dunlin.origin";
const ORIGIN: &str = "debian-packages";
/// Time of everything that was made here and not by a package: Debian 12's day.
const SOURCE_DATE_EPOCH: i64 = 1_686_355_200;
const CREATED: &str = "2023-06-10T00:00:00Z";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error("{0} is not installed; it makes base images: `apt-get install mmdebstrap util-linux`")]
    Missing(&'static str),
    #[error("base images are made by root: run this with sudo")]
    NotRoot,
    #[error("{what} failed; its last lines:\n{last_lines}")]
    Failed { what: String, last_lines: String },
    #[error("Debian's {0}, which is not what the image's tags say")]
    Version(String),
    #[error("could not {what}")]
    Io { what: String, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

impl BootstrapError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What base images there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Debian,
    Python,
    Node,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Debian, Self::Python, Self::Node];

    /// `library/<name>:<tag>`, all of one image.
    pub fn references(self) -> &'static [&'static str] {
        match self {
            Self::Debian => &[
                "library/debian:bookworm",
                "library/debian:12",
                "library/debian:bookworm-slim",
                "library/debian:12-slim",
            ],
            Self::Python => &[
                "library/python:3.11",
                "library/python:3.11-slim",
                "library/python:3.11-bookworm",
                "library/python:3.11-slim-bookworm",
            ],
            Self::Node => &[
                "library/node:18",
                "library/node:18-slim",
                "library/node:18-bookworm",
                "library/node:18-bookworm-slim",
            ],
        }
    }

    /// Packages beside Debian's essential ones.
    fn packages(self) -> &'static str {
        match self {
            Self::Debian => "ca-certificates",
            Self::Python => "python3 python3-venv python3-pip",
            Self::Node => "nodejs npm",
        }
    }

    /// Runs in the new root, as `sh -eu`.
    fn finish(self) -> &'static str {
        match self {
            Self::Debian => "",
            // The image is the environment: pip may install into it, as in the upstream image.
            Self::Python => {
                "rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
                for name in python python3; do ln -sf /usr/bin/python3 /usr/local/bin/$name; done
                for name in pip pip3; do ln -sf /usr/bin/pip3 /usr/local/bin/$name; done
                ln -sf python3 /usr/bin/python
                python -c 'import ssl, venv, sqlite3'
                pip --version"
            }
            Self::Node => {
                "ln -sf /usr/bin/node /usr/local/bin/node
                node -e 'process.exit(0)'
                npm --version"
            }
        }
    }

    /// Prints the version that the tags speak of, and the start it must have.
    fn version(self) -> (&'static str, &'static str) {
        match self {
            Self::Debian => ("cat /etc/debian_version", "12."),
            Self::Python => ("python3 -c 'import platform; print(platform.python_version())'", "3.11."),
            Self::Node => ("node --version", "v18."),
        }
    }

    fn config(self) -> serde_json::Value {
        let mut env = vec![PATH];
        let cmd = match self {
            Self::Debian => "bash",
            Self::Python => {
                env.push("LANG=C.UTF-8");
                "python3"
            }
            Self::Node => "node",
        };
        serde_json::json!({ "Env": env, "Cmd": [cmd], "Labels": { ORIGIN_LABEL: ORIGIN } })
    }

    fn names(self) -> impl Iterator<Item = (Repo, &'static str)> {
        // The names above are constants, and a test parses them all.
        self.references().iter().filter_map(|reference| {
            let (repo, tag) = reference.split_once(':')?;
            Some((repo.parse().ok()?, tag))
        })
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| {
            format!("there is no base image {text:?}; there are debian, python and node")
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Debian => "debian",
            Self::Python => "python",
            Self::Node => "node",
        })
    }
}

/// Makes the image unless it is there. `work_dir` is for what is in the making; it is emptied.
pub fn bootstrap(kind: Kind, store: &ContentStore, work_dir: &Path, mut progress: impl FnMut(&str)) -> Result<(), BootstrapError> {
    make(kind, store, work_dir, &mut progress)
}

fn make(kind: Kind, store: &ContentStore, work_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<(), BootstrapError> {
    if existing(kind, store)?.is_some() {
        progress(&format!("{kind}: already there"));
        return Ok(());
    }
    script::check_tools()?;
    let layers = match kind {
        Kind::Debian => vec![make_debian(store, work_dir, progress)?],
        Kind::Python | Kind::Node => {
            make(Kind::Debian, store, work_dir, progress)?;
            let Some((_, base)) = existing(Kind::Debian, store)? else {
                return Err(StoreError::NotFound("the image library/debian:12".into()).into());
            };
            make_on_debian(kind, store, &base, work_dir, progress)?
        }
    };
    register(kind, store, &layers)?;
    progress(&format!("{kind}: ready as {}", kind.references().join(", ")));
    Ok(())
}

/// The image, if this recipe made it and every name of it is there.
fn existing(kind: Kind, store: &ContentStore) -> Result<Option<(Repo, Manifest)>, BootstrapError> {
    let mut found = None;
    let recipe = recipe()?;
    for (repo, tag) in kind.names() {
        let Some(digest) = store.resolve_tag(&repo, tag)? else { return Ok(None) };
        let bytes = match store.manifest(&repo, &digest) {
            Ok((_, bytes)) => bytes,
            Err(StoreError::NotFound(_) | StoreError::Damaged(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let manifest = Manifest::parse(&bytes).map_err(StoreError::Invalid)?;
        for blob in manifest.blobs() {
            if store.has_blob(&repo, &blob.digest)?.is_none() {
                return Ok(None);
            }
        }
        if manifest.annotations.get(RECIPE_ANNOTATION) != Some(&recipe) {
            return Ok(None);
        }
        found = Some((repo, manifest));
    }
    Ok(found)
}

/// The recipe and what it takes from this computer.
fn recipe() -> Result<String, BootstrapError> {
    let mut authorities = Vec::new();
    let read = |e| BootstrapError::io(format!("read {LOCAL_AUTHORITIES}"))(e);
    let listing = match fs::read_dir(LOCAL_AUTHORITIES) {
        Ok(listing) => listing,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(RECIPE.into()),
        Err(e) => return Err(read(e)),
    };
    for entry in listing {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|ext| ext == "crt") {
            authorities.push(Digest::of(&fs::read(&path).map_err(read)?).to_string());
        }
    }
    if authorities.is_empty() {
        return Ok(RECIPE.into());
    }
    authorities.sort();
    let all = Digest::of(authorities.concat().as_bytes());
    Ok(format!("{RECIPE} with local authorities {}", &all.hex()[..16]))
}

/// A folder that is gone when it is dropped.
struct Work<'a>(&'a Path);

impl<'a> Work<'a> {
    fn begin(dir: &'a Path) -> Result<Self, BootstrapError> {
        remove(dir)?;
        fs::create_dir_all(dir).map_err(BootstrapError::io(format!("make the folder {}", dir.display())))?;
        Ok(Self(dir))
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        if let Err(e) = remove(self.0) {
            tracing::warn!("{e}"); // emptied by the next run
        }
    }
}

fn remove(dir: &Path) -> Result<(), BootstrapError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(BootstrapError::io(format!("empty {}", dir.display()))(e)),
        _ => Ok(()),
    }
}

fn make_debian(store: &ContentStore, work_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<WrittenLayer, BootstrapError> {
    let dir = work_dir.join("debian");
    let work = Work::begin(&dir)?;
    let root = work.0.join("root");
    progress("debian: installing Debian 12's essential packages (about half a minute)");
    script::run_debian(&root, Kind::Debian.packages(), progress)?;
    check_version(Kind::Debian, &script::version_of(&root, Kind::Debian.version().0)?)?;
    progress("debian: writing the layer");
    let (repo, _) = first_name(Kind::Debian)?;
    write::write_layer(store, &repo, &root, SOURCE_DATE_EPOCH)
}

fn make_on_debian(kind: Kind, store: &ContentStore, base: &Manifest, work_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<Vec<WrittenLayer>, BootstrapError> {
    let dir = work_dir.join(kind.to_string());
    let work = Work::begin(&dir)?;
    let (debian, _) = first_name(Kind::Debian)?;
    let (repo, _) = first_name(kind)?;
    let lower = work.0.join("lower");
    fs::create_dir(&lower).map_err(BootstrapError::io("make a folder for the base"))?;
    let [layer] = &base.layers[..] else {
        return Err(StoreError::Invalid("the debian image has more than its one layer".into()).into());
    };
    let (blob, compressed_bytes) = store.open_blob(&layer.digest)?;
    let packed = Packed { blob, compressed_bytes, media_type: &layer.media_type };
    let Some(diff_id) = unpack_layer(packed, &lower, Some(&[]), Owners::default())? else {
        return Err(StoreError::Invalid("the debian image needs another below it".into()).into());
    };
    if !store.mount(&debian, &repo, &layer.digest)? {
        return Err(StoreError::NotFound("the layer of library/debian".into()).into());
    }
    let base = WrittenLayer { digest: layer.digest.clone(), size: layer.size, diff_id };
    progress(&format!("{kind}: installing {}", kind.packages()));
    script::run_on_debian(work.0, kind.packages(), kind.finish(), kind.version().0, progress)?;
    let version = fs::read_to_string(work.0.join("version")).map_err(BootstrapError::io("read the version that was installed"))?;
    check_version(kind, &version)?;
    progress(&format!("{kind}: writing the layer (version {})", version.trim()));
    Ok(vec![base, write::write_layer(store, &repo, &work.0.join("upper"), SOURCE_DATE_EPOCH)?])
}

fn check_version(kind: Kind, version: &str) -> Result<(), BootstrapError> {
    if version.trim().starts_with(kind.version().1) {
        return Ok(());
    }
    Err(BootstrapError::Version(format!("{kind} has the version {}", version.trim())))
}

fn first_name(kind: Kind) -> Result<(Repo, &'static str), BootstrapError> {
    let first = kind.names().next();
    first.ok_or_else(|| StoreError::Invalid(format!("the names of {kind}")).into())
}

fn register(kind: Kind, store: &ContentStore, layers: &[WrittenLayer]) -> Result<Digest, BootstrapError> {
    let (repo, _) = first_name(kind)?;
    let diff_ids: Vec<&Digest> = layers.iter().map(|layer| &layer.diff_id).collect();
    let config = serde_json::json!({
        "architecture": architecture(), "os": "linux", "created": CREATED, "config": kind.config(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": layers.iter().map(|_| serde_json::json!({"created": CREATED, "created_by": "Debian packages"})).collect::<Vec<_>>(),
    });
    let config = config.to_string();
    let (config_digest, _) = store.put_blob(&repo, config.as_bytes(), None)?;
    let described = layers.iter().map(|layer| {
        serde_json::json!({"mediaType": OCI_LAYER_GZIP, "digest": layer.digest, "size": layer.size})
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": { "mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len() },
        "layers": described.collect::<Vec<_>>(),
        "annotations": { RECIPE_ANNOTATION: recipe()?, ORIGIN_LABEL: ORIGIN },
    });
    let digest = store.put_manifest(&repo, OCI_MANIFEST, manifest.to_string().as_bytes(), None)?;
    for (repo, tag) in kind.names() {
        store.tag(&repo, tag, &digest)?;
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_and_every_kind_is_spelled() {
        for kind in Kind::ALL {
            assert_eq!(kind.names().count(), kind.references().len());
            assert!(kind.names().all(|(_, tag)| crate::is_tag(tag)));
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("ruby".parse::<Kind>().unwrap_err().contains("debian, python and node"));
    }
}
