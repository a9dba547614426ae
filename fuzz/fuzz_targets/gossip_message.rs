//! What any peer may send: it is read or refused, and what was read says the same when it is written again.
#![no_main]

use dunlin_gossip::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some(message)) = Message::decode(bytes) {
        let written = message.encode();
        let again = Message::decode(&written).expect("what was written is read").expect("its kind is known");
        assert_eq!(again.encode(), written);
    }
});
