//! A layer: whatever it says, nothing but its own folder changes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;

/// In memory where that is to be had: a layer a millisecond.
static DIR: LazyLock<TempDir> =
    LazyLock::new(|| TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).expect("there is room for a folder"));

fuzz_target!(|bytes: &[u8]| dunlin_registry::fuzzing::layer(bytes, DIR.path()));
