//! What another host may say on a stream: calls, answers, sessions.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dunlin_api::remote::fuzzing::stream(bytes));
