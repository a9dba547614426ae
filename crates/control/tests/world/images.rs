//! Images as builds push them.

use dunlin_registry::ContentStore;

/// An image without layers, another one for each tag; its digest.
pub fn push_image(content: &ContentStore, repo: &str, tag: &str) -> String {
    let repo = repo.parse().unwrap();
    let config = format!("{{\"config\":{{\"Labels\":{{\"tag\":\"{tag}\"}}}}}}");
    let (digest, size) = content.put_blob(&repo, config.as_bytes(), None).unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type, "layers": [],
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest.as_str(), "size": size },
    });
    content.put_manifest(&repo, media_type, manifest.to_string().as_bytes(), Some(tag)).unwrap().as_str().to_owned()
}
