//! What the fuzzer (`fuzz/`) sends through: what another host may say on a stream.

use super::call::{Answer, Call, Head, Tell};
use super::frame::{self, Frame};
use super::{MAX_CALL_BYTES, MAX_SESSION_BYTES};

/// A stream as it comes: frames, and what is in them.
///
/// # Panics
/// When a frame that was read is written as another one.
pub fn stream(mut bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        while let Ok(read) = frame::read(&mut bytes, MAX_CALL_BYTES.min(MAX_SESSION_BYTES)).await {
            let mut written = Vec::new();
            frame::write(&mut written, &read).await.expect("memory takes it");
            assert_eq!(frame::read(&mut written.as_slice(), MAX_CALL_BYTES).await.expect("it is a frame"), read);
            if let Frame::Json(json) = read {
                content(&json);
            }
        }
    });
}

fn content(json: &[u8]) {
    if let Ok(head) = frame::parse::<Head>(json)
        && let Ok(call) = serde_json::from_value::<Call>(head.call)
    {
        assert!(call.patience(0) <= call.patience(0).max(std::time::Duration::from_secs(3600)));
        let again = Head::of(&call).expect("what was read is written");
        serde_json::from_value::<Call>(again.call).expect("what was written is read");
    }
    let _ = frame::parse::<Answer>(json).map(Answer::result);
    if let Ok(tell) = frame::parse::<Tell>(json) {
        let again = serde_json::to_vec(&tell).expect("what was read is written");
        assert_eq!(frame::parse::<Tell>(&again).expect("what was written is read"), tell);
    }
}
