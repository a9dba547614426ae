//! What the fuzzer (`fuzz/`) sends through: what strangers push and pull.

use crate::digest::Repo;
use crate::manifest::{Manifest, Reference, is_known_media_type, parse_config};
use crate::unpack::{Owners, Packed, unpack_layer};
use std::fs::{self, File};
use std::path::Path;

/// Manifests, indexes, configurations, and names of images.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let _ = (manifest.blobs().count(), manifest.for_this_platform(), manifest.platforms(), manifest.is_index_shaped());
    }
    let _ = parse_config(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = (Reference::parse(text), is_known_media_type(text));
        if let Ok(repo) = text.parse::<Repo>() {
            assert_eq!(repo.as_str(), text);
        }
    }
}

/// A layer, into a folder that has a neighbour: nothing but the folder may change.
///
/// # Panics
/// When something else did, or where the disk fails.
pub fn layer(bytes: &[u8], dir: &Path) {
    let (target, neighbour, blob) = (dir.join("target"), dir.join("neighbour"), dir.join("blob"));
    fs::create_dir_all(&target).expect("a folder");
    fs::create_dir_all(&neighbour).expect("a folder");
    fs::write(neighbour.join("file"), "as it was").expect("a file");
    fs::write(&blob, bytes).expect("a file");
    let packed = Packed {
        blob: File::open(&blob).expect("it is there"),
        compressed_bytes: bytes.len() as u64,
        media_type: "application/vnd.oci.image.layer.v1.tar",
    };
    let _ = unpack_layer(packed, &target, None, Owners::default());
    let names = |dir: &Path| fs::read_dir(dir).expect("it is there").count();
    assert_eq!((names(dir), names(&neighbour)), (3, 1), "something was made outside");
    assert_eq!(fs::read(neighbour.join("file")).expect("it is there"), b"as it was");
    fs::remove_dir_all(&target).expect("what was unpacked can be removed");
}
