//! File copies out of a machine: headers that the machine writes, read on the person's side.
#![no_main]

use dunlin_model::transfer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(length) = bytes.first_chunk::<4>() {
        let _ = transfer::length(*length);
    }
    if let Ok(entry) = transfer::decode(bytes) {
        let written = transfer::encode(&entry).expect("what was read is written");
        let header = &written[written.len().min(transfer::LENGTH_BYTES)..];
        assert_eq!(transfer::decode(header).expect("what was written is read"), entry);
    }
});
