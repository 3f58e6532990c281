//! Sizes and times for people.

use std::time::{Duration, SystemTime};

const BYTES: [(&str, u64); 4] = [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];
const SECONDS: [(&str, u64); 5] = [("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];

/// A size with three digits.
pub(crate) fn bytes(bytes: u64) -> String {
    let Some((name, unit)) = BYTES.into_iter().find(|(_, unit)| bytes >= *unit) else { return format!("{bytes} B") };
    let (whole, tenths) = (bytes / unit, bytes % unit * 10 / unit);
    if whole < 100 { format!("{whole}.{tenths} {name}") } else { format!("{whole} {name}") }
}

/// Age of a time, in the largest unit.
pub(crate) fn age(time: SystemTime) -> String {
    let past = SystemTime::now().duration_since(time).unwrap_or_default().as_secs();
    let unit = SECONDS.into_iter().find(|(_, unit)| past >= *unit);
    unit.map_or_else(|| "now".to_owned(), |(name, unit)| format!("{}{name} ago", past / unit))
}

/// Reads an age: `90s`, `30m`, `12h`, `7d`, `2w`.
pub(crate) fn parse_age(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is not an age: write 90s, 30m, 12h, 7d or 2w");
    let found = SECONDS.into_iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)));
    let (number, unit) = found.ok_or_else(error)?;
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (size, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (28_800_000_000, "28.8 GB"),
            (268_435_456, "268 MB"),
            (u64::MAX, "18446744 TB"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn ages_have_a_unit() {
        assert_eq!(parse_age("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_age("2w"), Ok(Duration::from_secs(1_209_600)));
        for text in ["", "s", "7", "-1d", "1y", "99999999999999999w"] {
            assert!(parse_age(text).is_err(), "{text}");
        }
    }
}
