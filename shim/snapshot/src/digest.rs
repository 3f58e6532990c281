//! Digests: SHA-256 only, so that a digest is always a safe file name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest, written `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Digest([u8; 32]);

/// Failure to read a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not sha256: and 64 lower-case hexadecimal digits")]
pub struct DigestError {
    /// The given text, at most 100 characters.
    pub given: String,
}

const PREFIX: &str = "sha256:";

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// 64 hexadecimal digits: the name of the blob's file.
    #[must_use]
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut hex, byte| {
            // Writing to a string does not fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }

    /// Reads the result of [`Digest::hex`].
    ///
    /// # Errors
    /// Anything but 64 lower-case hexadecimal digits.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let error = || DigestError { given: hex.chars().take(100).collect() };
        if hex.len() != 64 {
            return Err(error());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let (high, low) = nibble(pair[0]).zip(nibble(pair[1])).ok_or_else(error)?;
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }

    /// The first 12 hexadecimal digits, as shown to people.
    #[must_use]
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }
}

/// A finished SHA-256 computation.
impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(given: &str) -> Result<Self, DigestError> {
        let error = || DigestError { given: given.chars().take(100).collect() };
        Self::from_hex(given.strip_prefix(PREFIX).ok_or_else(error)?).map_err(|_| error())
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(given: String) -> Result<Self, DigestError> {
        given.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl From<Digest> for oci_spec::image::Digest {
    fn from(digest: Digest) -> Self {
        Self::try_from(digest.to_string()).expect("sha256: and 64 lower-case hexadecimal digits are an OCI digest")
    }
}

impl TryFrom<&oci_spec::image::Digest> for Digest {
    type Error = DigestError;

    fn try_from(digest: &oci_spec::image::Digest) -> Result<Self, DigestError> {
        digest.as_ref().parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_is_written_as_it_is_read() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(EMPTY.parse::<Digest>().unwrap(), Digest::of(b""));
        assert_eq!(Digest::of(b"").short(), "e3b0c44298fc");
        let oci = oci_spec::image::Digest::from(Digest::of(b""));
        assert_eq!(Digest::try_from(&oci).unwrap(), Digest::of(b""));
        let json = serde_json::to_string(&Digest::of(b"")).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), Digest::of(b""));
    }

    #[test]
    fn nothing_else_becomes_a_path() {
        let long = format!("{EMPTY}0");
        let upper = EMPTY.replace('e', "E");
        let dots = format!("sha256:{}", "../".repeat(21) + "x");
        let wide = format!("sha256:{}", "\u{e9}".repeat(32));
        for given in ["", "sha256:", "sha512:ab", &EMPTY[..70], &EMPTY[7..], &long, &upper, &dots, &wide] {
            assert!(given.parse::<Digest>().is_err(), "{given}");
        }
    }
}
