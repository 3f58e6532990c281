//! Sizes as people write them.

/// Reads a size: `500M`, `1.5TB`, `100GiB`, or bytes.
///
/// # Errors
/// The fault, in words.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is not a size: write 500M, 1.5T or 100GiB");
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let exponent = match unit.chars().next().map(|first| first.to_ascii_uppercase()) {
        None | Some('B') => 0,
        Some('K') => 1,
        Some('M') => 2,
        Some('G') => 3,
        Some('T') => 4,
        Some(_) => return Err(error()),
    };
    let unit: u64 = match unit.get(1..).unwrap_or_default().to_ascii_uppercase().as_str() {
        "" | "B" => 1000_u64.pow(exponent),
        "IB" => 1024_u64.pow(exponent),
        _ => return Err(error()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| error())?;
    let mut sum = whole.checked_mul(unit).ok_or_else(error)?;
    let mut place = unit;
    for digit in fraction.chars() {
        place /= 10;
        sum = sum.checked_add(u64::from(digit.to_digit(10).ok_or_else(error)?) * place).ok_or_else(error)?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_either_kind_of_unit() {
        for (text, size) in [
            ("0", 0),
            ("12", 12),
            ("500M", 500_000_000),
            ("1.25kB", 1250),
            ("2GiB", 2 << 30),
            ("1.5t", 1_500_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "M", "-1", "1.x", "1X", "1MX", "99999999999T", "1 G", "\u{e9}"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
