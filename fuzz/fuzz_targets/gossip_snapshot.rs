//! What lies on the disk after anything that can happen to a disk.
#![no_main]

use dunlin_gossip::Snapshot;
use ed25519_dalek::SigningKey;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let cluster = SigningKey::from_bytes(&[1; 32]).verifying_key();
    let _ = Snapshot::decode(cluster, bytes);
    // Behind a sound checksum, too: damage that a digest does not see is not the reader's excuse.
    let mut sealed = bytes.to_vec();
    sealed.extend_from_slice(blake3::hash(bytes).as_bytes());
    let _ = Snapshot::decode(cluster, &sealed);
});
