//! Durations, sizes and the names of machine sizes, spelled as in Fly's files.

use crate::machine::{CpuKind, Guest};

/// Longest duration that means anything here: a week.
pub(super) const MAX_DURATION_MS: u64 = 7 * 24 * 3600 * 1000;
/// Smallest and largest machine, in MB.
pub const MEMORY_MB: std::ops::RangeInclusive<u32> = 32..=1024 * 1024;
/// Most swap of a machine.
pub const MAX_SWAP_MB: u32 = 64 * 1024;
/// Fewest and most CPUs of a machine.
pub const CPUS: std::ops::RangeInclusive<u32> = 1..=256;

/// A machine size under the name that Fly gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestSize {
    pub name: &'static str,
    pub cpu_kind: CpuKind,
    pub cpus: u32,
    pub memory_mb: u32,
}

const fn size(name: &'static str, cpu_kind: CpuKind, cpus: u32, memory_mb: u32) -> GuestSize {
    GuestSize { name, cpu_kind, cpus, memory_mb }
}

/// Every named size, smallest first within its kind.
pub const GUEST_SIZES: &[GuestSize] = &[
    size("shared-cpu-1x", CpuKind::Shared, 1, 256),
    size("shared-cpu-2x", CpuKind::Shared, 2, 512),
    size("shared-cpu-4x", CpuKind::Shared, 4, 1024),
    size("shared-cpu-8x", CpuKind::Shared, 8, 2048),
    size("performance-1x", CpuKind::Performance, 1, 2048),
    size("performance-2x", CpuKind::Performance, 2, 4096),
    size("performance-4x", CpuKind::Performance, 4, 8192),
    size("performance-8x", CpuKind::Performance, 8, 16_384),
    size("performance-16x", CpuKind::Performance, 16, 32_768),
];

impl GuestSize {
    /// The size of that name.
    pub fn named(name: &str) -> Option<&'static GuestSize> {
        GUEST_SIZES.iter().find(|size| size.name == name)
    }

    /// The machine that it describes.
    pub fn guest(&self) -> Guest {
        Guest { cpu_kind: self.cpu_kind, cpus: self.cpus, memory_mb: self.memory_mb }
    }
}

/// Milliseconds of `10s`, `1h30m`, `1.5s`, `500ms`; `None` without a unit, when negative or over a week.
pub fn parse_duration_ms(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() || rest.len() > 64 {
        return None;
    }
    let mut nanoseconds: u128 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit_ns: u128 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        nanoseconds = nanoseconds.checked_add(decimal_times(number, unit_ns)?)?;
        rest = tail;
    }
    let ms = u64::try_from(nanoseconds / 1_000_000).ok()?;
    (ms <= MAX_DURATION_MS).then_some(ms)
}

/// The shortest spelling that [`parse_duration_ms`] reads back.
pub fn format_duration_ms(ms: u64) -> String {
    for (unit_ms, unit) in [(3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
        if ms >= unit_ms && ms.is_multiple_of(unit_ms) {
            return format!("{}{unit}", ms / unit_ms);
        }
    }
    format!("{ms}ms")
}

/// Whole MB of `1gb`, `512MB`, `1.5g`, `1024` (MB); `None` when it is not a whole number of MB.
pub fn parse_size_mb(text: &str) -> Option<u32> {
    let text = text.trim().to_ascii_lowercase();
    if text.len() > 32 {
        return None;
    }
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let unit_kb: u128 = match unit.trim() {
        "k" | "kb" | "kib" => 1,
        "" | "m" | "mb" | "mib" => 1024,
        "g" | "gb" | "gib" => 1024 * 1024,
        "t" | "tb" | "tib" => 1024 * 1024 * 1024,
        _ => return None,
    };
    let kb = decimal_times(number, unit_kb)?;
    if !kb.is_multiple_of(1024) {
        return None;
    }
    u32::try_from(kb / 1024).ok()
}

/// `1gb`, `512mb`: the spelling that [`parse_size_mb`] reads back.
pub fn format_size_mb(mb: u32) -> String {
    if mb >= 1024 && mb.is_multiple_of(1024) { format!("{}gb", mb / 1024) } else { format!("{mb}mb") }
}

/// `number` (digits with at most one point) times `unit`, rounded down; `None` when it is no number.
fn decimal_times(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 9 {
        return None;
    }
    let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u64>().ok().map(u128::from) };
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    digits(whole)?.checked_mul(unit)?.checked_add(digits(fraction)?.checked_mul(unit)? / scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations() {
        let check = |text: &str, expected: Option<u64>| assert_eq!(parse_duration_ms(text), expected, "{text}");
        check("10s", Some(10_000));
        check("2m", Some(120_000));
        check("1h30m", Some(5_400_000));
        check("1.5s", Some(1_500));
        check("250ms", Some(250));
        check("0", Some(0));
        check("10", None);
        check("s", None);
        check("-1s", None);
        check("1d", None);
        check("", None);
        check("1..5s", None);
        check("99999999h", None);
        check("99999999999999999999999s", None);
    }

    #[test]
    fn sizes() {
        let check = |text: &str, expected: Option<u32>| assert_eq!(parse_size_mb(text), expected, "{text}");
        check("1gb", Some(1024));
        check("512", Some(512));
        check("512MB", Some(512));
        check("1.5g", Some(1536));
        check("2048kb", Some(2));
        check("1kb", None);
        check("1pb", None);
        check("gb", None);
        check("-1gb", None);
        check("99999999999tb", None);
    }

    proptest! {
        #[test]
        fn durations_read_back(ms in 0..MAX_DURATION_MS) {
            prop_assert_eq!(parse_duration_ms(&format_duration_ms(ms)), Some(ms));
        }
        #[test]
        fn sizes_read_back(mb in 0..10_000_000u32) {
            prop_assert_eq!(parse_size_mb(&format_size_mb(mb)), Some(mb));
        }
        #[test]
        fn any_text_is_survived(text in ".{0,80}") {
            let _ = parse_duration_ms(&text);
            let _ = parse_size_mb(&text);
        }
    }
}
