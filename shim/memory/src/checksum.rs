//! What chunks are checked and compared by.

use std::sync::LazyLock;

use twox_hash::XxHash3_128;

use crate::pack::CHUNK_BYTES;

/// Bytes of a checksum in a file.
pub(crate) const CHECKSUM_BYTES: usize = 16;

/// XXH3-128 with seed 0. It finds damage, not forgery: packs are named by a cryptographic digest elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Checksum(u128);

/// That of a whole chunk of zeros.
pub(crate) static ZERO_CHUNK: LazyLock<Checksum> = LazyLock::new(|| Checksum::of(&[0; CHUNK_BYTES]));

static ZERO_PAGE: [u8; 4096] = [0; 4096];

impl Checksum {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_128::oneshot(bytes))
    }

    /// Those of chunks, the last of which may be shorter.
    pub(crate) fn of_chunks(bytes: &[u8]) -> impl Iterator<Item = Self> {
        bytes.chunks(CHUNK_BYTES).map(Self::of)
    }

    pub(crate) fn from_bytes(bytes: [u8; CHECKSUM_BYTES]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }

    pub(crate) fn to_bytes(self) -> [u8; CHECKSUM_BYTES] {
        self.0.to_le_bytes()
    }
}

/// Whether all bytes are zero. Compared page by page with one that stays in the nearest cache, by the C library's
/// vector code; most memory that is not zero is told by its first page.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZERO_PAGE.len()).all(|page| page == &ZERO_PAGE[..page.len()])
}
