//! Watches: every change of a prefix, in order, at the watcher's own speed.

use crate::read::{Readers, events};
use crate::{Event, WatchError};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How much of the history a watcher reads ahead.
const READ_AHEAD_BYTES: usize = 1024 * 1024;

/// Made by [`Store::watch`](crate::Store::watch).
pub struct Watch {
    pub(crate) readers: Arc<Readers>,
    pub(crate) revisions: watch::Receiver<u64>,
    pub(crate) prefix: String,
    /// Everything up to here has been read from the history.
    pub(crate) after: u64,
    pub(crate) ahead: VecDeque<Vec<Event>>,
    /// Nothing at all for this long is not believed.
    pub(crate) silence: Duration,
}

impl Watch {
    /// The changes of the next revision that changed the prefix; waits for one, for no longer than the watch's
    /// deadline: then it is [`WatchError::Silent`], and the caller lists again and watches from there. Nothing is
    /// lost when the future is dropped, and nothing by an error of silence.
    pub async fn next(&mut self) -> Result<Vec<Event>, WatchError> {
        let until = tokio::time::Instant::now() + self.silence;
        loop {
            if let Some(batch) = self.ahead.pop_front() {
                return Ok(batch);
            }
            // Before reading, so that a commit during the read rings again.
            let newest = *self.revisions.borrow_and_update();
            let (prefix, after) = (self.prefix.clone(), self.after);
            let (batches, read_to) = self
                .readers
                .read(move |conn| events(conn, &prefix, after, READ_AHEAD_BYTES))
                .await?;
            self.after = read_to;
            self.ahead = batches.into();
            if self.ahead.is_empty() && read_to >= newest {
                let rung = tokio::time::timeout_at(until, self.revisions.changed()).await;
                rung.map_err(|_| WatchError::Silent { after: self.after, silence: self.silence })?.map_err(|_| WatchError::Closed)?;
            }
        }
    }
}
