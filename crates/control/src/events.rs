//! What happened in a deploy: kept in memory for those who follow, and in the store so that a client
//! that comes back finds the same lines.
//!
//! The store holds no logs, and this is none: it is how one release came about, a row of bounded size that is written
//! with the steps that it tells of and goes with its release. What machines say stays on their hosts.

use dunlin_api::wire::DeployEvent;
use dunlin_model::AppName;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// Events of one release; later ones are dropped, except the last, which says how it ended.
const MAX_EVENTS: usize = 300;
/// Of one event's message and of each of its details.
const MAX_TEXT_BYTES: usize = 1024;
const MAX_DETAILS: usize = 40;
/// Of a whole history but for its end, as it is stored: a row of the store holds twice that, and the end has to fit.
const MAX_HISTORY_BYTES: usize = 128 * 1024;
/// Of one event as it is stored, where a control character takes six bytes.
const MAX_EVENT_BYTES: usize = 64 * 1024;
/// Releases whose events are kept in memory.
const MAX_HISTORIES: usize = 128;

type Key = (AppName, u32);
type History = Arc<Vec<DeployEvent>>;

/// The histories that somebody wrote or read lately.
#[derive(Default)]
pub(crate) struct Events {
    histories: Mutex<BTreeMap<Key, watch::Sender<History>>>,
}

impl Events {
    /// The history of a release, from memory, or from `stored` when memory has none.
    pub fn follow(&self, app: &AppName, release: u32, stored: impl FnOnce() -> Vec<DeployEvent>) -> watch::Receiver<History> {
        self.with(app, release, stored, watch::Sender::subscribe)
    }

    /// Appends, and returns the whole history for the store. Nothing follows an end.
    pub fn push(
        &self,
        event: DeployEvent,
        app: &AppName,
        stored: impl FnOnce() -> Vec<DeployEvent>,
    ) -> History {
        self.with(app, event.release, stored, |sender| {
            sender.send_if_modified(|history| {
                let ended = history.last().is_some_and(|last| last.ended.is_some());
                let event = bounded(event);
                let is_full = || {
                    history.len() >= MAX_EVENTS || stored_bytes(&**history) + stored_bytes(&event) > MAX_HISTORY_BYTES
                };
                if ended || event.ended.is_none() && is_full() {
                    return false;
                }
                Arc::make_mut(history).push(event);
                true
            });
            sender.borrow().clone()
        })
    }

    fn with<T>(
        &self,
        app: &AppName,
        release: u32,
        stored: impl FnOnce() -> Vec<DeployEvent>,
        act: impl FnOnce(&watch::Sender<History>) -> T,
    ) -> T {
        let mut histories = self.histories.lock().unwrap_or_else(|e| e.into_inner());
        if histories.len() >= MAX_HISTORIES {
            // Those that ended can be read from the store again.
            histories.retain(|_, sender| sender.borrow().last().is_none_or(|last| last.ended.is_none()));
        }
        let sender = histories
            .entry((app.clone(), release))
            .or_insert_with(|| watch::Sender::new(Arc::new(stored())));
        act(sender)
    }

    /// Forgets an app that was destroyed: a later one of the same name begins anew.
    pub fn forget(&self, app: &AppName) {
        self.histories.lock().unwrap_or_else(|e| e.into_inner()).retain(|(name, _), _| name != app);
    }
}

/// The event as it is kept.
pub(crate) fn bounded(mut event: DeployEvent) -> DeployEvent {
    event.message = cut(event.message);
    event.hint = event.hint.map(cut);
    event.details.truncate(MAX_DETAILS);
    event.details = event.details.into_iter().map(cut).collect();
    let mut bytes = stored_bytes(&event);
    while bytes > MAX_EVENT_BYTES
        && let Some(dropped) = event.details.pop()
    {
        bytes -= stored_bytes(&dropped);
    }
    event
}

fn stored_bytes(value: &impl serde::Serialize) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX, |json| json.len())
}

/// At most [`MAX_TEXT_BYTES`], cut at a character.
pub(crate) fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        let end = (0..=MAX_TEXT_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_model::desired::ReleaseStatus;

    fn event(message: &str, ended: Option<ReleaseStatus>) -> DeployEvent {
        DeployEvent {
            at_ms: 1,
            release: 1,
            message: message.into(),
            machine: None,
            ended,
            details: vec![],
            hint: None,
        }
    }

    #[test]
    fn the_end_is_kept_and_nothing_follows_it() {
        let events = Events::default();
        let app: AppName = "web".parse().unwrap();
        for n in 0..2 * MAX_EVENTS {
            events.push(event(&n.to_string(), None), &app, Vec::new);
        }
        let history = events.push(event("live", Some(ReleaseStatus::Succeeded)), &app, Vec::new);
        assert_eq!(history.len(), MAX_EVENTS + 1);
        assert_eq!(history.last().unwrap().message, "live");
        assert_eq!(events.push(event("late", None), &app, Vec::new).len(), MAX_EVENTS + 1);
    }

    #[test]
    fn a_history_with_its_end_fits_into_a_row() {
        let events = Events::default();
        let app: AppName = "web".parse().unwrap();
        // Nothing grows more when it is stored than control characters do.
        let worst = |ended| DeployEvent {
            details: vec!["\u{1b}".repeat(10_000); 100],
            hint: Some("\u{1b}".repeat(10_000)),
            ..event(&"\u{1b}".repeat(10_000), ended)
        };
        for _ in 0..10 {
            events.push(worst(None), &app, Vec::new);
        }
        let history = events.push(worst(Some(ReleaseStatus::Failed)), &app, Vec::new);
        assert!(history.last().unwrap().ended.is_some());
        assert!(stored_bytes(&*history) < dunlin_store::MAX_VALUE_BYTES, "{}", stored_bytes(&*history));
    }

    #[test]
    fn a_history_goes_on_from_what_was_stored() {
        let events = Events::default();
        let app: AppName = "web".parse().unwrap();
        let stored = || vec![event("before the restart", None)];
        let history = events.push(event("after", None), &app, stored);
        assert_eq!(history.iter().map(|e| e.message.as_str()).collect::<Vec<_>>(), ["before the restart", "after"]);
        assert_eq!(cut("ä".repeat(1000)).len(), MAX_TEXT_BYTES + '…'.len_utf8());
    }
}
