//! Which memory of which process is where.

mod wire;

use proc::{ContainerPid, Range};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::pack::{MAX_PACK_DATA, PAGE};
pub use wire::MAX_TABLE;

/// Above the user's part of the address space on all architectures, five-level page tables included.
const END_OF_MEMORY: u64 = 1 << 56;

/// Which memory of which process is where in a list of packs.
///
/// Always valid: processes in the order of their pids, segments in the order of their addresses, of whole pages, none
/// over another, all within their packs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentTable {
    packs: Vec<u64>,
    processes: Vec<Process>,
}

/// The memory of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its pid in its own pid namespace.
    pub pid: ContainerPid,
    /// Its memory, as far as it was saved.
    pub segments: Vec<Segment>,
}

/// Contiguous memory that is contiguous in a pack too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Where it begins in the process.
    pub address: u64,
    /// Its bytes.
    pub length: u64,
    /// Where its bytes are.
    pub place: Place,
}

/// Where the bytes of a segment are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// Nowhere: they are all zero.
    Zero,
    /// In a pack.
    Pack {
        /// Number of the pack, from 0.
        index: u32,
        /// Where in its data, in bytes.
        offset: u64,
    },
}

/// What a table amounts to, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// All memory of all processes.
    pub memory: u64,
    /// Of it, what is zero and not stored.
    pub zero: u64,
    /// Of it, what is stored already for other memory.
    pub shared: u64,
    /// Data of all packs.
    pub stored: u64,
}

/// Why something is no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TableError {
    /// It is something else, or cut off.
    #[error("no table of memory segments: {0}")]
    Damaged(&'static str),
    /// It is of a later version of the format.
    #[error("a table of memory segments of version {0}, and only 1 is known")]
    Version(u32),
    /// It would be larger than what is read back.
    #[error("a table of {0} bytes is too large")]
    TooLarge(u64),
    /// A pack has an impossible length.
    #[error("pack {index} cannot have {length} bytes of memory")]
    Pack {
        /// Its number, from 0.
        index: usize,
        /// The length.
        length: u64,
    },
    /// A pid that is none, or is there twice.
    #[error("process {0} is none, or not in order")]
    Process(i32),
    /// A segment that is not of whole pages, not in the address space, over another, or out of its pack.
    #[error("{length} bytes at {address:#x} of process {pid} are not valid memory")]
    Segment {
        /// The process.
        pid: ContainerPid,
        /// Where the segment begins.
        address: u64,
        /// Its length.
        length: u64,
    },
}

impl Segment {
    /// Where it ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.length
    }

    /// Returns its addresses.
    #[must_use]
    pub fn range(&self) -> Range {
        Range { start: self.address, end: self.address.saturating_add(self.length) }
    }

    /// Returns the number of the pack that has its bytes, and the offset in the pack's data; None for zeros.
    #[must_use]
    pub fn stored(&self) -> Option<(usize, u64)> {
        match self.place {
            Place::Zero => None,
            // A number that is no usize is none of a pack.
            Place::Pack { index, offset } => Some((usize::try_from(index).unwrap_or(usize::MAX), offset)),
        }
    }

    /// Makes this one longer by one that goes on where it ends, in memory and in its pack.
    fn join(&mut self, next: &Segment) -> bool {
        let joins = match (self.place, next.place) {
            (Place::Zero, Place::Zero) => true,
            (Place::Pack { index, offset }, Place::Pack { index: other, offset: at }) => {
                index == other && offset + self.length == at
            }
            _ => false,
        };
        let joins = joins && self.end() == next.address;
        if joins {
            self.length += next.length;
        }
        joins
    }
}

/// Adds a segment to others, in one with the last if it goes on there.
pub(crate) fn push(segments: &mut Vec<Segment>, next: Segment) {
    if !segments.last_mut().is_some_and(|last| last.join(&next)) {
        segments.push(next);
    }
}

impl SegmentTable {
    /// Makes a table of packs, given by their bytes of data, and memory in any order.
    ///
    /// # Errors
    /// When memory is there twice, is not of whole pages, or is not within its pack; when the table is too large.
    pub fn new(packs: Vec<u64>, processes: Vec<Process>) -> Result<Self, TableError> {
        let mut sorted: Vec<Process> = Vec::with_capacity(processes.len());
        let mut processes = processes;
        processes.sort_by_key(|process| process.pid);
        for process in processes {
            match sorted.last_mut() {
                Some(last) if last.pid == process.pid => last.segments.extend(process.segments),
                _ => sorted.push(process),
            }
        }
        for process in &mut sorted {
            process.segments.sort_by_key(|segment| segment.address);
        }
        let mut table = Self { packs, processes: sorted };
        // Before segments are joined: their sums are not known to be numbers yet.
        table.check()?;
        for process in &mut table.processes {
            let mut joined = Vec::new();
            for segment in &process.segments {
                push(&mut joined, *segment);
            }
            process.segments = joined;
        }
        let length = table.encoded_length();
        if length > MAX_TABLE { Err(TableError::TooLarge(length)) } else { Ok(table) }
    }

    /// Both tables in one; the packs of the other come after those of this one.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn merge(self, other: Self) -> Result<Self, TableError> {
        let shift = u32::try_from(self.packs.len()).map_err(|_| TableError::Damaged("too many packs"))?;
        let mut packs = self.packs;
        let mut processes = self.processes;
        packs.extend(other.packs);
        if u32::try_from(packs.len()).is_err() {
            return Err(TableError::Damaged("too many packs"));
        }
        processes.extend(other.processes.into_iter().map(|mut process| {
            for segment in &mut process.segments {
                if let Place::Pack { index, .. } = &mut segment.place {
                    *index += shift;
                }
            }
            process
        }));
        Self::new(packs, processes)
    }

    /// Bytes of data of each pack.
    #[must_use]
    pub fn packs(&self) -> &[u64] {
        &self.packs
    }

    /// All processes, in the order of their pids.
    #[must_use]
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// The memory of one process, in the order of addresses; none if nothing of it was saved.
    #[must_use]
    pub fn segments(&self, pid: ContainerPid) -> &[Segment] {
        let found = self.processes.binary_search_by_key(&pid, |process| process.pid);
        found.map_or(&[], |index| &self.processes[index].segments)
    }

    /// What it amounts to.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let mut statistics = Statistics { stored: self.packs.iter().sum(), ..Statistics::default() };
        let mut stored = Vec::new();
        for segment in self.processes.iter().flat_map(|process| &process.segments) {
            // Of an untrusted table with very many processes, this may be more than there are numbers.
            statistics.memory = statistics.memory.saturating_add(segment.length);
            match segment.place {
                Place::Zero => statistics.zero = statistics.zero.saturating_add(segment.length),
                Place::Pack { index, offset } => stored.push((index, offset, offset + segment.length)),
            }
        }
        stored.sort_unstable();
        let mut reached = (0, 0);
        for (index, begin, end) in stored {
            let before = if reached.0 == index { reached.1 } else { 0 };
            statistics.shared += before.min(end).saturating_sub(begin);
            reached = (index, before.max(end));
        }
        statistics
    }

    fn check(&self) -> Result<(), TableError> {
        for (index, length) in self.packs.iter().copied().enumerate() {
            if length == 0 || length > MAX_PACK_DATA || !length.is_multiple_of(PAGE) {
                return Err(TableError::Pack { index, length });
            }
        }
        let mut last = None;
        for Process { pid, segments } in &self.processes {
            if Some(*pid) <= last {
                return Err(TableError::Process(pid.raw()));
            }
            last = Some(*pid);
            let mut end = 0;
            for segment in segments {
                end = self.end_of(segment).filter(|_| segment.address >= end).ok_or(TableError::Segment {
                    pid: *pid,
                    address: segment.address,
                    length: segment.length,
                })?;
            }
        }
        Ok(())
    }

    /// Where a segment ends in memory, if it is valid by itself.
    fn end_of(&self, segment: &Segment) -> Option<u64> {
        let Segment { address, length, place } = *segment;
        let pages = length > 0 && length.is_multiple_of(PAGE) && address.is_multiple_of(PAGE);
        let stored = match place {
            Place::Zero => true,
            Place::Pack { index, offset } => {
                let pack = self.packs.get(usize::try_from(index).ok()?)?;
                offset.is_multiple_of(PAGE) && offset.checked_add(length)? <= *pack
            }
        };
        address.checked_add(length).filter(|end| pages && stored && *end <= END_OF_MEMORY)
    }
}
