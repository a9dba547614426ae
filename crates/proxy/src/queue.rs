//! Requests that wait for a machine: how many may, for how long, and how they hear of a free place.

use crate::answer::fault;
use crate::listen::Edge;
use dunlin_model::AppName;
use dunlin_routing::{Reject, Route, WaitReason};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// For each app with requests that wait: how they hear that a place became free.
#[derive(Default)]
pub(crate) struct Queues(Mutex<HashMap<AppName, Arc<Notify>>>);

impl Queues {
    /// A request of the app gave its place back: one of those that wait looks again.
    pub fn freed(&self, app: &AppName) {
        if let Some(freed) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(app) {
            freed.notify_one();
        }
    }

    fn join(&self, app: &AppName) -> Arc<Notify> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(app.clone()).or_default().clone()
    }

    fn leave(&self, app: &AppName, freed: Arc<Notify>) {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Only under the lock are more of them made: this is the last one, beside the map's.
        if Arc::strong_count(&freed) <= 2 {
            queues.remove(app);
        }
    }
}

/// One place in the queue, of this edge and of the app.
pub(crate) struct Waiting {
    edge: Arc<Edge>,
    route: Option<Arc<Route>>,
    pub freed: Option<Arc<Notify>>,
}

impl Waiting {
    pub fn begin(edge: &Arc<Edge>, route: Option<&Arc<Route>>) -> Result<Self, Reject> {
        let full = || {
            let hint = "try again in a few seconds; `dunlin status` shows whether machines are coming up";
            fault(503, "PR12", "too many requests already wait for a machine", hint)
        };
        let take = |counter: &AtomicU32, limit: u32| {
            counter.fetch_update(Relaxed, Relaxed, |n| (n < limit).then(|| n + 1)).map_err(|_| full())
        };
        take(&edge.metrics.waiting, edge.limits.max_waiting)?;
        let mut waiting = Self { edge: edge.clone(), route: None, freed: None };
        if let Some(route) = route {
            take(&route.load.waiting, edge.limits.max_waiting_per_app)?;
            waiting.freed = Some(edge.queues.join(&route.app));
            waiting.route = Some(route.clone());
        }
        Ok(waiting)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.edge.metrics.waiting.fetch_sub(1, Relaxed);
        if let Some(route) = &self.route {
            route.load.waiting.fetch_sub(1, Relaxed);
            if let Some(freed) = self.freed.take() {
                self.edge.queues.leave(&route.app, freed);
            }
        }
    }
}

/// How long one request waits: for each reason its own time, for all together one.
#[derive(Default)]
pub(crate) struct Patience {
    /// The end of all waiting, set when the first begins.
    until: Option<Instant>,
    reason: Option<(WaitReason, Instant)>,
}

impl Patience {
    /// When the request is given up, whatever it waits for; the first question sets it.
    pub fn until(&mut self, edge: &Edge) -> Instant {
        *self.until.get_or_insert_with(|| Instant::now() + edge.limits.wait_timeout)
    }

    /// A machine at its limit may go to sleep and then boot: the boot has its full time.
    pub fn left(&mut self, reason: WaitReason, now: Instant, overall: Duration) -> Duration {
        let since = match self.reason {
            Some((before, since)) if before == reason => since,
            _ => now,
        };
        self.reason = Some((reason, since));
        let due = since + Duration::from_millis(reason.patience_ms());
        due.min(*self.until.get_or_insert(now + overall)).saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_begins_anew_with_another_reason_and_ends_once_for_all() {
        const S: Duration = Duration::from_secs(1);
        let (mut patience, start, overall) = (Patience::default(), Instant::now(), 45 * S);
        for (after, reason, left) in [
            (0, WaitReason::AtLimit, 5),
            (4, WaitReason::AtLimit, 1),
            (4, WaitReason::Coming, 30),
            (30, WaitReason::Coming, 4),
            (31, WaitReason::Unhealthy, 5),
            (36, WaitReason::Unhealthy, 0),
            (40, WaitReason::Coming, 5),
            (45, WaitReason::AtLimit, 0),
        ] {
            assert_eq!(patience.left(reason, start + after * S, overall), left * S, "{reason:?} after {after} s");
        }
    }
}
