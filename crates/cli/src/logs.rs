//! `logs`.

use crate::args::LogsArgs;
use crate::config_file::app_name;
use crate::{CliError, Exit, Session, ui};
use dunlin_api::LogLine;
use std::time::{SystemTime, UNIX_EPOCH};

pub async fn logs(session: &Session, args: LogsArgs) -> Result<Exit, CliError> {
    let app = app_name(&args.target)?;
    let mut path = format!("/v1/apps/{app}/logs?follow={}", args.follow);
    // Without a number the server gives the newest, or everything since a time.
    if let Some(tail) = args.tail {
        path.push_str(&format!("&tail={tail}"));
    }
    if let Some(machine) = &args.machine {
        path.push_str(&format!("&machine={machine}"));
    }
    if let Some(since) = &args.since {
        path.push_str(&format!("&since_ms={}", now_ms().saturating_sub(parse_time(since)?)));
    }
    let mut lines = session.client.lines(&path).await?;
    while let Some(line) = lines.next::<LogLine>().await? {
        if session.json {
            ui::print_line(&serde_json::to_string(&line).unwrap_or_default());
        } else {
            let program = if line.program.is_empty() { String::new() } else { format!("{}: ", line.program) };
            ui::print_line(&format!("{} {} {:6} {program}{}", utc(line.at_ms), line.machine, line.stream, line.line));
        }
    }
    Ok(Exit::Ok)
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// `90`, `30s`, `10m`, `2h`, `1d` as milliseconds; a bare number is seconds.
pub(crate) fn parse_time(text: &str) -> Result<u64, CliError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &text[digits.len()..] {
        "" | "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    match (digits.parse::<u64>(), unit_ms) {
        (Ok(n), Some(unit_ms)) => Ok(n.saturating_mul(unit_ms)),
        _ => Err(CliError::usage(format!("{text:?} is not a time")).hint("for example 30s, 10m, 2h or 1d")),
    }
}

/// `2026-01-31T23:59:59.123Z`, by the civil-from-days rule (Howard Hinnant, "chrono-compatible
/// low-level date algorithms").
fn utc(ms: u64) -> String {
    let (days, in_day) = ((ms / 86_400_000) as i64, ms % 86_400_000);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s, ms) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60, in_day % 1000);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(1_767_225_599_999), "2025-12-31T23:59:59.999Z");
    }

    #[test]
    fn spans_have_units() {
        assert_eq!(parse_time("90").unwrap(), 90_000);
        assert_eq!(parse_time("10m").unwrap(), 600_000);
        assert!(parse_time("soon").is_err());
        assert!(parse_time("5w").is_err());
    }
}
