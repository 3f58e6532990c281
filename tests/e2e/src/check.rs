//! Expectations and waits of tests.

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Limit of waits, long enough for a loaded two-core machine: only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(90);

/// Fails the test unless both sides are equal, and shows them.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr $(,)?) => {
        $crate::ensure_eq!($left, $right, "{} == {}", stringify!($left), stringify!($right))
    };
    ($left:expr, $right:expr, $($what:tt)+) => {
        // `match` keeps temporaries of both sides alive, as in the standard library's assert_eq.
        match (&$left, &$right) {
            (left, right) => {
                if *left != *right {
                    anyhow::bail!("{}\n  saw:      {left:?}\n  expected: {right:?}", format!($($what)+));
                }
            }
        }
    };
}

/// Fails the test unless the text contains the piece, and shows the text.
#[macro_export]
macro_rules! ensure_has {
    ($text:expr, $piece:expr) => {
        match (&$text, &$piece) {
            (text, piece) => {
                let (text, piece): (&str, &str) = (text.as_ref(), piece.as_ref());
                if !text.contains(piece) {
                    anyhow::bail!("{piece:?} is missing in: {text}");
                }
            }
        }
    };
}

/// Tries until the first success. An error means "not yet"; the last error is reported at the end
/// of the patience. Nothing here measures time: the clock only ends a wait that would last for
/// ever.
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(20);
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(last) if Instant::now() > end => {
                return Err(last).with_context(|| format!("waited {PATIENCE:?} in vain for: {what}"));
            }
            Err(_) => sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(300));
    }
}

/// Lower-case hexadecimal SHA-256, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The lines of a text, trimmed, without empty ones.
pub fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_that_of_sha256sum() {
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn eventually_returns_the_first_success() {
        let mut tries = 0;
        let got = eventually("three tries", || {
            tries += 1;
            anyhow::ensure!(tries == 3, "not yet");
            Ok(tries)
        });
        assert_eq!(got.unwrap(), 3);
    }

    #[test]
    fn ensure_eq_shows_both_sides() {
        let error = (|| {
            ensure_eq!(1, 2, "the answer");
            Ok::<_, anyhow::Error>(())
        })();
        let text = error.unwrap_err().to_string();
        assert!(text.contains("the answer") && text.contains("saw:      1") && text.contains("expected: 2"));
    }
}
