//! Pauses by the calendar: what ends on a date is looked at soon after a clock was set or a computer has slept, which time that
//! merely passes would not show.

use crate::now_ms;
use std::time::Duration;
use tokio::time::{Instant, sleep};

const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Until so long has passed, by the computer's clock, set back or forth as it may be, or by time itself.
pub async fn pause(long: Duration) {
    pause_by(now_ms, long).await;
}

async fn pause_by(clock: impl Fn() -> u64, long: Duration) {
    let (began, began_ms) = (Instant::now(), clock());
    while let Some(left) = long.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
        if clock().abs_diff(began_ms) >= long.as_millis() as u64 {
            return;
        }
        sleep(left.min(LOOK_EVERY)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{LOOK_EVERY, pause_by};
    use std::time::Duration;
    use tokio::time::Instant;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_set_ends_a_pause_and_one_that_stands_does_not_hold_it_up() {
        let began = Instant::now();
        let steady = || began.elapsed().as_millis() as u64;
        pause_by(steady, HOUR).await;
        assert_eq!(began.elapsed(), HOUR);

        let began = Instant::now();
        pause_by(|| 5, HOUR).await;
        assert_eq!(began.elapsed(), HOUR);

        for set_to in [0, 100_000_000_000] {
            let began = Instant::now();
            pause_by(|| if began.elapsed() < HOUR / 2 { 10_000_000_000 } else { set_to }, HOUR).await;
            assert!(began.elapsed() <= HOUR / 2 + LOOK_EVERY, "{:?}", began.elapsed());
        }
    }
}
