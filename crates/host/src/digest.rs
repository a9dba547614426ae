//! What a snapshot has, in one number that does not depend on which of its blocks are holes.
//!
//! SHA-256 over the file's length and then, for every block of 64 KiB that is not all zeroes, its offset and its bytes; numbers
//! are of 64 bits, little endian. So it takes as long as what is in the volume, not as the volume is large.

use rustix::fs::SeekFrom;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK_BYTES: u64 = 64 << 10;

pub fn of(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut sum = Sha256::new();
    sum.update(length.to_le_bytes());
    let mut block = vec![0; BLOCK_BYTES as usize];
    let mut at = 0;
    while let Some(data) = next_data(&file, at)? {
        at = data / BLOCK_BYTES * BLOCK_BYTES;
        let part = &mut block[..BLOCK_BYTES.min(length - at) as usize];
        file.read_exact_at(part, at)?;
        if part.iter().any(|byte| *byte != 0) {
            sum.update(at.to_le_bytes());
            sum.update(&part);
        }
        at += BLOCK_BYTES;
    }
    Ok(dunlin_registry::Digest::from_hasher(sum).into())
}

/// Where the next content is, at `at` or behind it.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_the_same_and_every_byte_counts() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, parts: &[(u64, &[u8])], length: u64| {
            let path = dir.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_len(length).unwrap();
            parts.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
            of(&path).unwrap()
        };
        let zeroes = vec![0; 300_000];
        let sparse = make("sparse", &[(1_000_000, b"x")], 5_000_001);
        assert_eq!(make("full", &[(0, &zeroes), (4_000_000, &zeroes), (1_000_000, b"x")], 5_000_001), sparse);
        assert_ne!(make("longer", &[(1_000_000, b"x")], 5_000_002), sparse);
        assert_ne!(make("moved", &[(1_000_001, b"x")], 5_000_001), sparse);
        assert_ne!(make("block", &[(1_000_000 + BLOCK_BYTES, b"x")], 5_000_001), sparse);
        assert!(sparse.starts_with("sha256:") && sparse.len() == 71, "{sparse}");
    }
}
