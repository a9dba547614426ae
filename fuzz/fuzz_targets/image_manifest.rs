//! What strangers push and pull: manifests, configurations and names of images.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_registry::fuzzing::manifest(bytes));
