//! A client's head and the body behind it: a machine must read what the edge has read.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_proxy::fuzzing::request(bytes));
