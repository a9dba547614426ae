//! What is read of manifests, indexes and image configurations; everything else passes through untouched.

use crate::digest::{Digest, is_tag};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The distribution specification asks for at least this much, and nobody needs more.
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// overlayfs takes 500 lower directories; Docker and everything that builds for it stops at 127.
pub(crate) const MAX_LAYERS: usize = 127;
/// An index names platforms and their attestations, not the world.
pub(crate) const MAX_INDEX_ENTRIES: usize = 1024;
/// Configurations are manifests' equals in size.
pub(crate) const MAX_CONFIG_BYTES: u64 = 4 << 20;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

pub(crate) fn is_known_media_type(text: &str) -> bool {
    [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX].contains(&text)
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub urls: Vec<String>,
}

impl Descriptor {
    /// Layers that live elsewhere by design; registries do not hold them.
    pub fn is_foreign(&self) -> bool {
        self.media_type.contains("nondistributable") || self.media_type.contains("foreign") || !self.urls.is_empty()
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(default)]
    pub variant: Option<String>,
}

/// An image manifest or an index: one shape, told apart by what it has.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    #[serde(default)]
    pub schema_version: u32,
    #[serde(default)]
    pub media_type: Option<String>,
    #[serde(default)]
    pub artifact_type: Option<String>,
    #[serde(default)]
    pub config: Option<Descriptor>,
    #[serde(default)]
    pub layers: Vec<Descriptor>,
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
    #[serde(default)]
    pub subject: Option<Descriptor>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses and checks the counts. The text says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(format!("the manifest has {} bytes; at most {MAX_MANIFEST_BYTES} are taken", bytes.len()));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| format!("the manifest is not valid: {e}"))?;
        if manifest.schema_version != 2 {
            return Err("only manifests of schema version 2 are taken; push with a newer client".into());
        }
        if manifest.layers.len() > MAX_LAYERS {
            return Err(format!("the image has {} layers; at most {MAX_LAYERS} are taken", manifest.layers.len()));
        }
        if manifest.manifests.len() > MAX_INDEX_ENTRIES {
            return Err(format!("the index has more than {MAX_INDEX_ENTRIES} entries"));
        }
        if manifest.config.is_none() && !manifest.is_index_shaped() {
            return Err("the manifest has neither a config nor manifests".into());
        }
        if manifest.config.is_some() && !manifest.manifests.is_empty() {
            // Two readers would take it for two different things.
            return Err("the manifest is an image and an index at once".into());
        }
        Ok(manifest)
    }

    pub fn is_index_shaped(&self) -> bool {
        !self.manifests.is_empty() || matches!(self.media_type.as_deref(), Some(OCI_INDEX | DOCKER_INDEX))
    }

    /// Blobs that must be in the repository: the config and the layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(self.layers.iter().filter(|layer| !layer.is_foreign()))
    }

    /// The entry of an index for this computer.
    pub fn for_this_platform(&self) -> Option<&Descriptor> {
        let architecture = architecture();
        let fits = |entry: &&Descriptor| {
            entry.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture)
        };
        let plain = |entry: &&Descriptor| {
            entry.platform.as_ref().is_some_and(|p| p.variant.as_deref().is_none_or(|v| v == "v8" || v == "v1"))
        };
        let found = self.manifests.iter().filter(fits).find(plain).or_else(|| self.manifests.iter().find(fits));
        // buildah and others write indexes of one entry without a platform
        found.or_else(|| match &self.manifests[..] {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        })
    }

    pub fn platforms(&self) -> String {
        let named = self.manifests.iter().filter_map(|entry| entry.platform.as_ref());
        let named: Vec<String> = named.take(20).map(|p| format!("{}/{}", p.os, p.architecture)).collect();
        named.join(", ")
    }
}

/// This computer's architecture, as images spell it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What of an image's configuration a machine honours.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct ImageConfig {
    pub user: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub stop_signal: Option<String>,
    /// `8080/tcp`
    pub exposed_ports: Vec<String>,
    pub volumes: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

/// The configuration and the digests of the unpacked layers, lowest first.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<(ImageConfig, Vec<Digest>), String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        config: Option<Config>,
        rootfs: Rootfs,
    }
    #[derive(Deserialize)]
    struct Rootfs {
        diff_ids: Vec<Digest>,
    }
    // `null` stands for empty in what Go programs write.
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "PascalCase", default)]
    struct Config {
        user: Option<String>,
        entrypoint: Option<Vec<String>>,
        cmd: Option<Vec<String>>,
        env: Option<Vec<String>>,
        working_dir: Option<String>,
        stop_signal: Option<String>,
        exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
        volumes: Option<BTreeMap<String, serde_json::Value>>,
        labels: Option<BTreeMap<String, Option<String>>>,
    }
    let file: File = serde_json::from_slice(bytes).map_err(|e| format!("the image's configuration is not valid: {e}"))?;
    let config = file.config.unwrap_or_default();
    let labels = config.labels.unwrap_or_default();
    let config = ImageConfig {
        user: config.user.unwrap_or_default(),
        entrypoint: config.entrypoint.unwrap_or_default(),
        cmd: config.cmd.unwrap_or_default(),
        env: config.env.unwrap_or_default(),
        working_dir: config.working_dir.unwrap_or_default(),
        stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
        exposed_ports: config.exposed_ports.unwrap_or_default().into_keys().collect(),
        volumes: config.volumes.unwrap_or_default().into_keys().collect(),
        labels: labels.into_iter().map(|(name, value)| (name, value.unwrap_or_default())).collect(),
    };
    Ok((config, file.rootfs.diff_ids))
}

/// A tag or a digest, as it stands in a path of the API.
pub(crate) enum Reference {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    pub fn parse(text: &str) -> Option<Self> {
        match text.parse() {
            Ok(digest) => Some(Self::Digest(digest)),
            Err(_) => is_tag(text).then(|| Self::Tag(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_gives_this_computers_image() {
        let digest = |c: &str| format!("sha256:{}", c.repeat(64));
        let entry = |c: &str, os: &str, architecture: &str| {
            serde_json::json!({"digest": digest(c), "size": 1, "mediaType": OCI_MANIFEST,
                "platform": {"os": os, "architecture": architecture}})
        };
        let own = architecture();
        let index = |entries: Vec<serde_json::Value>| {
            let text = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).to_string();
            Manifest::parse(text.as_bytes()).unwrap().for_this_platform().map(|d| d.digest.to_string())
        };
        let others = [entry("1", "windows", own), entry("2", "linux", "riscv64"), entry("3", "unknown", "unknown")];
        assert_eq!(index(others.to_vec()), None);
        assert_eq!(index([&others[..], &[entry("4", "linux", own)]].concat()), Some(digest("4")));
    }

    #[test]
    fn a_manifest_is_one_thing_and_of_bounded_size() {
        let refused = |text: &str, why: &str| {
            let error = Manifest::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused("{}", "schema version 2");
        refused(r#"{"schemaVersion":1}"#, "schema version 2");
        refused(r#"{"schemaVersion":2}"#, "neither");
        refused(&format!(r#"{{"schemaVersion":2,"x":"{}"}}"#, "a".repeat(MAX_MANIFEST_BYTES)), "at most");
        let entry = format!(r#"{{"digest":"sha256:{}","size":1}}"#, "0".repeat(64));
        refused(&format!(r#"{{"schemaVersion":2,"config":{entry},"manifests":[{entry}]}}"#), "at once");
        let layers = vec![entry.as_str(); MAX_LAYERS + 1].join(",");
        refused(&format!(r#"{{"schemaVersion":2,"config":{entry},"layers":[{layers}]}}"#), "layers");
    }
}
