//! Functions common to the targets.

use sha2::{Digest as _, Sha256};
use twox_hash::XxHash3_128;

/// Splits an input into parts: each a byte for the kind, two bytes of length, and as many bytes, or
/// the rest. Any bytes are such an input, and a mutation in one part leaves the others in place.
pub fn parts(mut data: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let ([kind, low, high], rest) = data.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (part, rest) = rest.split_at(length);
        data = rest;
        Some((*kind, part))
    })
}

/// Splits bytes into pieces, each after two bytes of length.
pub fn pieces(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = data.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (piece, rest) = rest.split_at(length);
        data = rest;
        Some(piece)
    })
}

/// The checksum of packs and tables, computed apart from the fuzzed crate.
#[must_use]
pub fn checksum(bytes: &[u8]) -> [u8; 16] {
    XxHash3_128::oneshot(bytes).to_le_bytes()
}

/// The hexadecimal digits of a SHA-256 digest.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
