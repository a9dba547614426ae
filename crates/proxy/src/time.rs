//! Time and signals as one core sees them.

use dunlin_model::calendar::civil;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, Sleep};

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// One timer for all that a connection waits for, one thing after the other. Moving its end to a later time
/// costs nothing: the timer is set anew only when it goes off too early, or has to go off earlier.
pub(crate) struct Watchdog {
    due: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Watchdog {
    pub fn new(due: Instant) -> Self {
        Self { due, timer: Box::pin(tokio::time::sleep_until(due)) }
    }

    pub fn set(&mut self, due: Instant) {
        self.due = due;
        if due < self.timer.deadline() {
            self.timer.as_mut().reset(due);
        }
    }

    /// Ready when the end has come. Wakes the task then.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if self.due <= Instant::now() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(self.due);
        }
    }
}

/// The date in answers, made once a second.
#[derive(Default)]
pub(crate) struct Clock {
    second: Cell<u64>,
    date: RefCell<String>,
}

impl Clock {
    /// As `Sun, 06 Nov 1994 08:49:37 GMT`, of a time in milliseconds.
    pub fn with_date<R>(&self, now_ms: u64, with: impl FnOnce(&str) -> R) -> R {
        let second = now_ms / 1000;
        if self.second.replace(second) != second {
            *self.date.borrow_mut() = http_date(second);
        }
        with(&self.date.borrow())
    }
}

fn http_date(second: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (day, of_day) = (second / 86_400, second % 86_400);
    let ((year, month, date), weekday) = (civil(day), DAYS[(day % 7) as usize]);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{weekday}, {date:02} {} {year:04} {hour:02}:{minute:02}:{second:02} GMT", MONTHS[month as usize - 1])
}

/// Rings once, for all connections of a core. Each leaves its waker for as long as it lives, so that waiting
/// costs nothing a request.
#[derive(Default)]
pub(crate) struct Bell {
    has_rung: Cell<bool>,
    wakers: RefCell<Vec<Option<Waker>>>,
    free: RefCell<Vec<usize>>,
}

impl Bell {
    pub fn ring(&self) {
        self.has_rung.set(true);
        self.wakers.borrow_mut().iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    pub fn has_rung(&self) -> bool {
        self.has_rung.get()
    }

    /// Wakes this task when the bell rings, until the answer is dropped.
    pub fn listen(&self, waker: &Waker) -> Listening<'_> {
        let mut wakers = self.wakers.borrow_mut();
        let place = self.free.borrow_mut().pop().unwrap_or_else(|| {
            wakers.push(None);
            wakers.len() - 1
        });
        wakers[place] = Some(waker.clone());
        Listening { bell: self, place }
    }
}

pub(crate) struct Listening<'a> {
    bell: &'a Bell,
    place: usize,
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.bell.wakers.borrow_mut()[self.place] = None;
        self.bell.free.borrow_mut().push(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::time::Duration;

    #[test]
    fn dates_are_as_http_writes_them() {
        for (second, date) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (1_709_208_000, "Thu, 29 Feb 2024 12:00:00 GMT"),
        ] {
            assert_eq!(http_date(second), date);
        }
        let clock = Clock::default();
        clock.with_date(784_111_777_999, |date| assert_eq!(date, "Sun, 06 Nov 1994 08:49:37 GMT"));
        clock.with_date(784_111_778_000, |date| assert_eq!(date, "Sun, 06 Nov 1994 08:49:38 GMT"));
    }

    struct Count(AtomicU32);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn the_bell_wakes_whoever_still_listens() {
        let (bell, count) = (Bell::default(), Arc::new(Count(AtomicU32::new(0))));
        let waker = Waker::from(count.clone());
        let (one, other) = (bell.listen(&waker), bell.listen(&waker));
        drop(one);
        let third = bell.listen(&waker);
        assert_eq!(bell.wakers.borrow().len(), 2, "places are used again");
        drop(other);
        bell.ring();
        assert_eq!(count.0.load(SeqCst), 1);
        assert!(bell.has_rung());
        drop(third);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watchdog_goes_off_at_its_last_end() {
        const S: Duration = Duration::from_secs(1);
        let start = Instant::now();
        let mut dog = Watchdog::new(start + 5 * S);
        dog.set(start + 9 * S);
        std::future::poll_fn(|cx| dog.poll(cx)).await;
        assert_eq!(start.elapsed(), 9 * S);
        dog.set(start + 60 * S);
        dog.set(start + 12 * S);
        std::future::poll_fn(|cx| dog.poll(cx)).await;
        assert_eq!(start.elapsed(), 12 * S);
    }
}
