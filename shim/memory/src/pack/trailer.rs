//! The end of a pack, which says how to read the rest.

use crate::checksum::{CHECKSUM_BYTES, Checksum};
use crate::pack::{CHUNK, MAX_PACK_DATA, PAGE};
use crate::units;

const MAGIC: [u8; 8] = *b"GPUSNAPK";
const VERSION: u32 = 1;

/// The last 64 bytes of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub(crate) data: u64,
    pub(crate) table: Checksum,
}

/// Why bytes are no trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrailerError {
    /// What is wrong.
    Damaged(&'static str),
    /// It is of this other version.
    Version(u32),
}

impl Trailer {
    /// Its length.
    pub const BYTES: usize = 64;

    /// Reads the trailer of a file of `length` bytes. Everything in it is checked against that length and the caps.
    ///
    /// # Errors
    /// When any byte is not as a writer would have it.
    pub fn parse(bytes: &[u8; Self::BYTES], length: u64) -> Result<Self, TrailerError> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]));
        if bytes[..8] != MAGIC {
            return Err(TrailerError::Damaged("it does not end as one"));
        }
        if half(8) != VERSION {
            return Err(TrailerError::Version(half(8)));
        }
        let data = word(16);
        if u64::from(half(12)) != CHUNK || data == 0 || data > MAX_PACK_DATA || !data.is_multiple_of(PAGE) {
            return Err(TrailerError::Damaged("its trailer is not valid"));
        }
        let chunks = data.div_ceil(CHUNK);
        let whole = data + chunks * units::wide(CHECKSUM_BYTES) + units::wide(Self::BYTES);
        if word(24) != chunks || length != whole {
            return Err(TrailerError::Damaged("its length is not what its trailer says"));
        }
        if bytes[48..].iter().any(|byte| *byte != 0) {
            return Err(TrailerError::Damaged("its trailer is not valid"));
        }
        let table = Checksum::from_bytes(std::array::from_fn(|index| bytes[32 + index]));
        Ok(Self { data, table })
    }

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let chunks = self.data.div_ceil(CHUNK);
        let chunk = u32::try_from(CHUNK).expect("64 KiB fit in 32 bits");
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&chunk.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_le_bytes());
        bytes[24..32].copy_from_slice(&chunks.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.table.to_bytes());
        bytes
    }

    /// How many chunks the pack has.
    pub(crate) fn chunks(&self) -> usize {
        units::bytes(self.data.div_ceil(CHUNK))
    }
}
