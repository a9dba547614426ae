//! What is said by somebody who would be a member.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_cluster::fuzzing::join(bytes));
