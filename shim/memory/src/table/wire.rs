//! The table as bytes. docs/format.md has the layout.

use proc::ContainerPid;

use super::{Place, Process, Segment, SegmentTable, TableError};
use crate::checksum::{CHECKSUM_BYTES, Checksum};
use crate::units;

/// Bytes that an encoded table has at most: 11 million segments. Memory of 600 GB of which every second chunk is zero
/// stays below.
pub const MAX_TABLE: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"GPUSNAPT";
const VERSION: u32 = 1;
/// Stands for no pack.
const ZERO: u32 = u32::MAX;

const HEADER: usize = 24;
const PACK: usize = 4;
const PROCESS: usize = 8;
const SEGMENT: usize = 24;

/// Bytes yet to be read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TableError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(TableError::Damaged("it is cut off"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn half(&mut self) -> Result<u32, TableError> {
        self.take().map(u32::from_le_bytes)
    }

    fn word(&mut self) -> Result<u64, TableError> {
        self.take().map(u64::from_le_bytes)
    }

    /// A number of things of so many bytes at least, for which there are bytes left.
    fn count(&mut self, each: usize) -> Result<usize, TableError> {
        let count = usize::try_from(self.half()?).unwrap_or(usize::MAX);
        if count > self.0.len() / each { Err(TableError::Damaged("it is cut off")) } else { Ok(count) }
    }
}

impl SegmentTable {
    /// Reads a table.
    ///
    /// # Errors
    /// When it is damaged, too large, or says anything that is not valid.
    pub fn parse(bytes: &[u8]) -> Result<Self, TableError> {
        if units::wide(bytes.len()) > MAX_TABLE {
            return Err(TableError::TooLarge(units::wide(bytes.len())));
        }
        let mut reader = Reader(bytes);
        if reader.take()? != MAGIC {
            return Err(TableError::Damaged("it does not begin as one"));
        }
        let version = reader.half()?;
        if version != VERSION {
            return Err(TableError::Version(version));
        }
        let (rest, checksum) = reader.0.split_last_chunk().ok_or(TableError::Damaged("it is cut off"))?;
        if Checksum::of(&bytes[..bytes.len() - CHECKSUM_BYTES]) != Checksum::from_bytes(*checksum) {
            return Err(TableError::Damaged("its checksum is another"));
        }
        reader.0 = rest;
        if reader.half()? != 0 {
            return Err(TableError::Damaged("something is said that is not known"));
        }
        let packs = reader.count(PACK)?;
        let processes = reader.count(PROCESS)?;
        let packs = (0..packs).map(|_| reader.half().map(u64::from)).collect::<Result<_, _>>()?;
        let processes = (0..processes).map(|_| process(&mut reader)).collect::<Result<_, _>>()?;
        if !reader.0.is_empty() {
            return Err(TableError::Damaged("something follows it"));
        }
        let table = Self { packs, processes };
        table.check()?;
        Ok(table)
    }

    /// The table as bytes, at most [`MAX_TABLE`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // Counts and lengths of packs fit: the whole table is below the cap, and a pack below 256 MiB.
        let half = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = Vec::with_capacity(units::bytes(self.encoded_length()));
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(half(units::wide(self.packs.len())));
        bytes.extend(half(units::wide(self.processes.len())));
        bytes.extend(self.packs.iter().flat_map(|length| half(*length)));
        for Process { pid, segments } in &self.processes {
            bytes.extend(pid.raw().to_le_bytes());
            bytes.extend(half(units::wide(segments.len())));
            for segment in segments {
                let (index, offset) = match segment.place {
                    Place::Zero => (ZERO, 0),
                    Place::Pack { index, offset } => (index, offset),
                };
                bytes.extend(segment.address.to_le_bytes());
                bytes.extend(segment.length.to_le_bytes());
                bytes.extend(index.to_le_bytes());
                bytes.extend(half(offset));
            }
        }
        bytes.extend(Checksum::of(&bytes).to_bytes());
        bytes
    }

    pub(super) fn encoded_length(&self) -> u64 {
        let segments: usize = self.processes.iter().map(|process| process.segments.len()).sum();
        let fixed = HEADER + CHECKSUM_BYTES;
        units::wide(fixed + self.packs.len() * PACK + self.processes.len() * PROCESS + segments * SEGMENT)
    }
}

fn process(reader: &mut Reader<'_>) -> Result<Process, TableError> {
    let pid = i32::from_le_bytes(reader.take()?);
    let pid = ContainerPid::new(pid).ok_or(TableError::Process(pid))?;
    let segments = reader.count(SEGMENT)?;
    let segments = (0..segments).map(|_| segment(reader)).collect::<Result<_, _>>()?;
    Ok(Process { pid, segments })
}

fn segment(reader: &mut Reader<'_>) -> Result<Segment, TableError> {
    let address = reader.word()?;
    let length = reader.word()?;
    let place = match (reader.half()?, reader.half()?) {
        (ZERO, 0) => Place::Zero,
        (ZERO, _) => return Err(TableError::Damaged("something is said that is not known")),
        (index, offset) => Place::Pack { index, offset: offset.into() },
    };
    Ok(Segment { address, length, place })
}
