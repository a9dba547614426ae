//! A row of a member's log.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_cluster::fuzzing::row(bytes));
