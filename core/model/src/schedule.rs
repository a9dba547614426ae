//! When the clock starts a machine, in UTC: every hour, day, week or month, or by a cron expression.
//!
//! A closed grammar of our own, because a machine's host evaluates it for any tenant: every expression is bounded when
//! it is read, and one whose time never comes is refused.

use crate::MachineId;
use crate::calendar::civil;
use crate::hash::fnv1a;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

const MAX_BYTES: usize = 128;
const SECOND_MS: u64 = 1000;
const MINUTE_MS: u64 = 60 * SECOND_MS;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
const MINUTES_A_DAY: u64 = 24 * 60;
/// Every month has them.
const DAYS_OF_ANY_MONTH: u64 = 28;
/// 29 February on a given day of the week comes after forty years at the latest.
const LONGEST_GAP_DAYS: u64 = 41 * 366;
/// 2000-01-01: in the years from there to the longest gap, everything happens that ever does.
const SOME_TIME_MS: u64 = 946_684_800_000;
const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Written as `hourly`, `daily`, `weekly`, `monthly` or five fields of cron.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Cron(Cron),
}

/// A cron expression: for each field, one bit a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cron {
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Both kinds of days are restricted: then one is enough, as cron has always had it.
    any_day: bool,
}

/// Why a text is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSchedule(String);

impl Schedule {
    /// The first time after `after_ms`. Words mean a time of the machine's own in each hour, day, week or month, so that
    /// not all begin in the same second.
    pub fn next(&self, machine: &MachineId, after_ms: u64) -> Option<u64> {
        let own = |period_ms: u64| (fnv1a(machine.as_str().bytes()) % (period_ms / SECOND_MS)) * SECOND_MS;
        match self {
            Self::Hourly => Some(next_of(HOUR_MS, own(HOUR_MS), after_ms)),
            Self::Daily => Some(next_of(DAY_MS, own(DAY_MS), after_ms)),
            Self::Weekly => Some(next_of(7 * DAY_MS, own(7 * DAY_MS), after_ms)),
            Self::Monthly => Some(next_monthly(own(DAYS_OF_ANY_MONTH * DAY_MS), after_ms)),
            Self::Cron(cron) => cron.next(after_ms),
        }
    }
}

fn next_of(period_ms: u64, offset_ms: u64, after_ms: u64) -> u64 {
    let at_ms = after_ms - after_ms % period_ms + offset_ms;
    if at_ms > after_ms { at_ms } else { at_ms + period_ms }
}

fn next_monthly(offset_ms: u64, after_ms: u64) -> u64 {
    let first_of = |day: u64| day - (civil(day).2 - 1);
    let first = first_of(after_ms / DAY_MS);
    let at_ms = first * DAY_MS + offset_ms;
    if at_ms > after_ms { at_ms } else { first_of(first + 31) * DAY_MS + offset_ms }
}

impl Cron {
    fn next(&self, after_ms: u64) -> Option<u64> {
        let minute = after_ms / MINUTE_MS + 1;
        let (first, mut from) = (minute / MINUTES_A_DAY, minute % MINUTES_A_DAY);
        for day in first..=first + LONGEST_GAP_DAYS {
            if self.has_day(day) {
                let minute = (from..MINUTES_A_DAY).find(|minute| has(self.hours, minute / 60) && has(self.minutes, minute % 60));
                if let Some(minute) = minute {
                    return Some((day * MINUTES_A_DAY + minute) * MINUTE_MS);
                }
            }
            from = 0;
        }
        None
    }

    /// Of a day since 1970, which began on a Thursday.
    fn has_day(&self, day: u64) -> bool {
        let (_, month, day_of_month) = civil(day);
        let (of_month, of_week) = (has(self.days, day_of_month), has(self.weekdays, (day + 4) % 7));
        has(self.months, month) && if self.any_day { of_month || of_week } else { of_month && of_week }
    }
}

fn has(bits: u64, value: u64) -> bool {
    (bits >> value) & 1 == 1
}

impl FromStr for Schedule {
    type Err = InvalidSchedule;

    fn from_str(text: &str) -> Result<Self, InvalidSchedule> {
        if text.len() > MAX_BYTES {
            return Err(InvalidSchedule(format!("it is longer than {MAX_BYTES} bytes")));
        }
        Ok(match text {
            "hourly" => Self::Hourly,
            "daily" => Self::Daily,
            "weekly" => Self::Weekly,
            "monthly" => Self::Monthly,
            _ => Self::Cron(cron(text).map_err(InvalidSchedule)?),
        })
    }
}

fn cron(text: &str) -> Result<Cron, String> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [minutes, hours, days, months, weekdays] = words[..] else {
        return Err(format!(
            "{text:?} is neither hourly, daily, weekly nor monthly, nor the five fields of cron (minute, hour, day, month, weekday)"
        ));
    };
    let of_week = field("weekday", weekdays, 0..=7, WEEKDAYS)?;
    let cron = Cron {
        text: words.join(" "),
        minutes: field("minute", minutes, 0..=59, &[])?,
        hours: field("hour", hours, 0..=23, &[])?,
        days: field("day", days, 1..=31, &[])?,
        months: field("month", months, 1..=12, MONTHS)?,
        weekdays: of_week | (of_week >> 7), // Sunday has two numbers
        any_day: !days.starts_with('*') && !weekdays.starts_with('*'),
    };
    match cron.next(SOME_TIME_MS) {
        Some(_) => Ok(cron),
        None => Err(format!("{text:?} never comes")),
    }
}

/// A list of values, ranges and steps. `names` count from the first value.
fn field(name: &str, text: &str, range: RangeInclusive<u64>, names: &[&str]) -> Result<u64, String> {
    let (first, last) = (*range.start(), *range.end());
    let wrong = |part: &str| format!("{part:?} is no {name}: use {first} to {last}, lists, ranges and steps such as 1,5 or 1-5 or */5");
    let value = |part: &str| {
        let named = names.iter().position(|known| known.eq_ignore_ascii_case(part)).map(|at| at as u64 + first);
        let digits = (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        let value = named.or_else(|| part.parse().ok().filter(|_| digits)).filter(|value| range.contains(value));
        value.ok_or_else(|| wrong(part))
    };
    let mut bits = 0;
    for item in text.split(',') {
        let (values, step) = match item.split_once('/') {
            Some((values, step)) => (values, Some(step)),
            None => (item, None),
        };
        let (from, to) = match values.split_once('-') {
            Some((from, to)) => (value(from)?, value(to)?),
            None if values == "*" => (first, last),
            None => (value(values)?, if step.is_some() { last } else { value(values)? }),
        };
        let step = match step {
            None => 1,
            Some(text) => text.parse().ok().filter(|step| (1..=last).contains(step)).ok_or_else(|| wrong(item))?,
        };
        if from > to {
            return Err(wrong(item));
        }
        bits |= (from..=to).step_by(step as usize).fold(0, |bits, value| bits | (1 << value));
    }
    Ok(bits)
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Cron(cron) => &cron.text,
        })
    }
}

impl TryFrom<String> for Schedule {
    type Error = InvalidSchedule;
    fn try_from(text: String) -> Result<Self, InvalidSchedule> {
        text.parse()
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(year: u64, month: u64, day: u64, hour: u64, minute: u64) -> u64 {
        let day = (0..60_000).find(|n| civil(*n) == (year, month, day)).expect("a day");
        day * DAY_MS + hour * HOUR_MS + minute * MINUTE_MS
    }

    /// Times after noon of Wednesday, 2026-01-14.
    fn check(text: &str, expected: &[(u64, u64, u64, u64, u64)]) {
        let (schedule, id) = (text.parse::<Schedule>().unwrap(), MachineId::from_random([1; 7]));
        assert_eq!(schedule.to_string(), text);
        let mut at = ms(2026, 1, 14, 12, 0);
        for (year, month, day, hour, minute) in expected {
            at = schedule.next(&id, at).unwrap();
            assert_eq!(at, ms(*year, *month, *day, *hour, *minute), "{text}");
        }
    }

    #[test]
    fn cron_means_what_it_says() {
        check("* * * * *", &[(2026, 1, 14, 12, 1), (2026, 1, 14, 12, 2)]);
        check("*/20 * * * *", &[(2026, 1, 14, 12, 20), (2026, 1, 14, 12, 40), (2026, 1, 14, 13, 0)]);
        check("0 12 * * *", &[(2026, 1, 15, 12, 0), (2026, 1, 16, 12, 0)]);
        check("30 4 1,15 * *", &[(2026, 1, 15, 4, 30), (2026, 2, 1, 4, 30)]);
        check("0 0 * * 1-5", &[(2026, 1, 15, 0, 0), (2026, 1, 16, 0, 0), (2026, 1, 19, 0, 0)]);
        check("0 0 * * Sun", &[(2026, 1, 18, 0, 0), (2026, 1, 25, 0, 0)]);
        check("0 0 * * 7", &[(2026, 1, 18, 0, 0)]);
        check("5/25 23 * * *", &[(2026, 1, 14, 23, 5), (2026, 1, 14, 23, 30), (2026, 1, 14, 23, 55), (2026, 1, 15, 23, 5)]);
        check("0 0 31 * *", &[(2026, 1, 31, 0, 0), (2026, 3, 31, 0, 0)]);
        check("0 0 29 feb *", &[(2028, 2, 29, 0, 0), (2032, 2, 29, 0, 0)]);
        // Either kind of day where both are restricted, both where one begins with a star.
        check("0 0 20 * fri", &[(2026, 1, 16, 0, 0), (2026, 1, 20, 0, 0), (2026, 1, 23, 0, 0)]);
        check("0 0 */10 * fri", &[(2026, 5, 1, 0, 0), (2026, 7, 31, 0, 0)]);
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_its_reason() {
        let check = |text: &str, says: &str| {
            let error = text.parse::<Schedule>().expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        };
        check("", "neither hourly");
        check("yearly", "neither hourly");
        check("* * * *", "neither hourly");
        check("* * * * * *", "neither hourly");
        check("@daily", "neither hourly");
        check("60 * * * *", "\"60\" is no minute: use 0 to 59");
        check("* 24 * * *", "is no hour");
        check("* * 0 * *", "is no day");
        check("* * * 13 *", "is no month");
        check("* * * * 8", "is no weekday");
        check("* * * * frida", "is no weekday");
        check("*/0 * * * *", "is no minute");
        check("*/99999999999999999999 * * * *", "is no minute");
        check("5-1 * * * *", "\"5-1\" is no minute");
        check("1,,2 * * * *", "is no minute");
        check("+1 * * * *", "is no minute");
        check("-1 * * * *", "is no minute");
        check("0 0 30 2 *", "never comes");
        check(&"1,".repeat(100), "longer than");
    }

    /// As it is kept and sent.
    #[test]
    fn it_is_a_text() {
        for text in ["hourly", "daily", "weekly", "monthly", "0 4 * * mon"] {
            let schedule: Schedule = serde_json::from_value(serde_json::json!(text)).unwrap();
            assert_eq!(serde_json::to_value(&schedule).unwrap(), text);
        }
        assert!(serde_json::from_value::<Schedule>(serde_json::json!("often")).is_err());
    }

    #[test]
    fn machines_do_not_all_begin_at_once() {
        for schedule in [Schedule::Hourly, Schedule::Daily, Schedule::Weekly, Schedule::Monthly] {
            let times = (0..100).map(|n| schedule.next(&MachineId::from_random([n; 7]), SOME_TIME_MS));
            let times: std::collections::BTreeSet<_> = times.collect();
            assert!(times.len() > 80, "{schedule}: {}", times.len());
        }
    }

    proptest! {
        /// Against the plain reading of the grammar, minute for minute.
        #[test]
        fn none_is_missed_and_none_comes_too_early(
            after_ms in SOME_TIME_MS..SOME_TIME_MS + 100 * 366 * DAY_MS,
            minute in 0u64..60, hour in 0u64..24, weekday in 0u64..7,
        ) {
            let schedule: Schedule = format!("{minute} {hour},{} * * {weekday}", (hour + 7) % 24).parse().unwrap();
            let at = schedule.next(&MachineId::from_random([0; 7]), after_ms).unwrap();
            let is_due = |ms: u64| {
                let of_day = ms / MINUTE_MS % MINUTES_A_DAY;
                of_day % 60 == minute && [hour, (hour + 7) % 24].contains(&(of_day / 60)) && (ms / DAY_MS + 4) % 7 == weekday
            };
            prop_assert!(at > after_ms && at.is_multiple_of(MINUTE_MS) && is_due(at));
            let first = after_ms / MINUTE_MS + 1;
            prop_assert!(!(first..at / MINUTE_MS).any(|minute| is_due(minute * MINUTE_MS)));
        }

        #[test]
        fn words_come_once_in_each_period(id in any::<[u8; 7]>(), after_ms in SOME_TIME_MS..SOME_TIME_MS + 100 * 366 * DAY_MS) {
            let id = MachineId::from_random(id);
            for (schedule, at_most_days) in [(Schedule::Hourly, 1), (Schedule::Daily, 1), (Schedule::Weekly, 7), (Schedule::Monthly, 31)] {
                let first = schedule.next(&id, after_ms).unwrap();
                let second = schedule.next(&id, first).unwrap();
                prop_assert!(first > after_ms && first <= after_ms + at_most_days * DAY_MS, "{schedule}");
                prop_assert!(second > first && second <= first + at_most_days * DAY_MS, "{schedule}");
                let period = |ms: u64| match schedule {
                    Schedule::Monthly => civil(ms / DAY_MS).1,
                    Schedule::Hourly => ms / HOUR_MS,
                    Schedule::Weekly => ms / (7 * DAY_MS),
                    _ => ms / DAY_MS,
                };
                prop_assert_ne!(period(first), period(second), "{}", schedule);
                prop_assert_eq!(schedule.next(&id, first - 1), Some(first));
            }
        }
    }
}
