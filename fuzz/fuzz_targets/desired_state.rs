//! Entries of desired state: what is understood is written as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_cluster::fuzzing::config(bytes));
