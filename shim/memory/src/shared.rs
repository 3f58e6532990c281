//! Memory that processes share: shared anonymous memory, files in memory (memfd), segments of System V.
//!
//! Such memory belongs to a file of the kernel's own, and comes to a process by a mapping. Whoever fills one mapping has
//! filled the memory of all processes that share it, and the memory is charged to the cgroup of the one process that it
//! was written through. So each piece of a file is saved as memory of one process, its **carrier**, at the address where
//! the carrier has it mapped, to be filled there as private memory is. Pieces that no process can write to stay where
//! they are: memory behind a descriptor alone, or sealed, or only read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops;
use std::os::unix::fs::MetadataExt;

use proc::{Mapping, ProcessIds, Range};
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;

use crate::layout::Regions;
use crate::pack::{CHUNK, MAX_PACK_DATA, PAGE};

/// Smaller files are not worth the way.
const LEAST_FILE: u64 = 1 << 20;

/// With more pieces of data than this, a file is left as it is.
const MOST_PIECES: usize = 1 << 20;

/// Memory that processes share, and the processes that carry it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Files with memory among [`Self::regions`].
    pub files: Vec<SharedFile>,
    /// The memory, each byte once, for [`crate::save_together`].
    pub regions: Vec<Regions>,
}

/// A file of the kernel's own with memory of processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFile {
    /// Device, as in `st_dev`.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Data that nobody carries, in bytes of the file: ascending, with holes or carried data between.
    pub left: Vec<ops::Range<u64>>,
}

/// A mapping of a file, or adjacent ones that go on in the file.
#[derive(Clone, Debug)]
struct Carrier {
    process: ProcessIds,
    address: u64,
    /// The mapped part of the file.
    part: ops::Range<u64>,
    /// First of the mappings.
    first: Range,
}

impl Shared {
    /// Finds the memory that processes share, which must stand still from here on until it is saved. Earlier processes of
    /// the list are preferred as carriers. Shorter pieces of data than `least` bytes are left.
    ///
    /// # Errors
    /// Fails if the device of shared memory cannot be found.
    pub fn find(processes: &[ProcessIds], least: u64) -> io::Result<Self> {
        let device = device()?;
        let mut files = BTreeMap::<u64, Vec<Carrier>>::new();
        for process in processes {
            // A process that has ended shares nothing.
            for mapping in proc::mappings(process.host).unwrap_or_default() {
                if mapping.device == device && mapping.is_shared_memory() {
                    add(files.entry(mapping.inode).or_default(), *process, &mapping);
                }
            }
        }
        let mut shared = Self::default();
        let mut pieces = BTreeMap::<usize, Vec<Range>>::new();
        for (inode, carriers) in files {
            // A file that cannot be looked at is left as it is.
            let Some(data) = data(device, inode, &carriers) else { continue };
            let (carried, left) = distribute(data, &carriers, least);
            if carried.is_empty() {
                continue;
            }
            shared.files.push(SharedFile { device, inode, left });
            for (process, range) in carried {
                let number = processes.iter().position(|ids| *ids == process).unwrap_or_default();
                pieces.entry(number).or_default().push(range);
            }
        }
        shared.regions = pieces.into_iter().flat_map(|(number, ranges)| packed(processes[number], ranges)).collect();
        Ok(shared)
    }

    /// Returns the bytes of the memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().flat_map(|of| &of.ranges).map(Range::len).sum()
    }
}

/// Returns the device of all shared memory that has no file system of its own.
fn device() -> io::Result<u64> {
    let file = File::from(rustix::fs::memfd_create("gpusnap", MemfdFlags::CLOEXEC)?);
    Ok(file.metadata()?.dev())
}

/// Adds a mapping to those of its file.
fn add(carriers: &mut Vec<Carrier>, process: ProcessIds, mapping: &Mapping) {
    let Mapping { range, offset, .. } = mapping;
    // The kernel maps no file beyond the largest offset.
    let part = *offset..offset.saturating_add(range.len());
    match carriers.last_mut() {
        Some(last)
            if last.process == process
                && last.part.end == part.start
                && last.address + (last.part.end - last.part.start) == range.start =>
        {
            last.part.end = part.end;
        }
        _ => carriers.push(Carrier { process, address: range.start, part, first: *range }),
    }
}

/// Returns the data of a file that is mapped, as whole pages; `None` for a file that is not worth it.
fn data(device: u64, inode: u64, carriers: &[Carrier]) -> Option<Vec<ops::Range<u64>>> {
    let Carrier { process, first, .. } = carriers.first()?;
    let file = File::open(process.host.path(&format!("map_files/{:x}-{:x}", first.start, first.end))).ok()?;
    let metadata = file.metadata().ok()?;
    if (metadata.dev(), metadata.ino()) != (device, inode) || metadata.len() < LEAST_FILE {
        return None;
    }
    let mut data: Vec<ops::Range<u64>> = Vec::new();
    let mut at = 0;
    while data.len() < MOST_PIECES {
        match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => {
                at = rustix::fs::seek(&file, SeekFrom::Hole(start)).ok()?;
                data.push(start / PAGE * PAGE..at.next_multiple_of(PAGE));
            }
            Err(Errno::NXIO) => return Some(data),
            Err(_) => return None,
        }
    }
    None
}

/// Gives each piece of data to the first that can carry it. Returns what is carried, as addresses of the carriers, and
/// what is left.
fn distribute(
    data: Vec<ops::Range<u64>>,
    carriers: &[Carrier],
    least: u64,
) -> (Vec<(ProcessIds, Range)>, Vec<ops::Range<u64>>) {
    let (mut carried, mut left) = (Vec::new(), data);
    for Carrier { process, address, part, .. } in carriers {
        if left.iter().all(|piece| piece.end - piece.start < least) {
            break;
        }
        let mut rest = Vec::new();
        for piece in left {
            let (start, end) = (piece.start.max(part.start), piece.end.min(part.end));
            // Whole chunks, as they are stored: the end of a piece may be left.
            let length = end.saturating_sub(start) / CHUNK * CHUNK;
            if length < least.max(CHUNK) {
                rest.push(piece);
                continue;
            }
            let begin = address + (start - part.start);
            carried.push((*process, Range { start: begin, end: begin + length }));
            let outside = [piece.start..start, start + length..piece.end];
            rest.extend(outside.into_iter().filter(|piece| !piece.is_empty()));
        }
        left = rest;
    }
    // Two carriers may have left what is adjacent.
    left.dedup_by(|next, piece| {
        let touch = piece.end == next.start;
        if touch {
            piece.end = next.end;
        }
        touch
    });
    (carried, left)
}

/// Cuts memory of a process so that each part makes one pack. Ranges are whole chunks.
fn packed(process: ProcessIds, ranges: Vec<Range>) -> Vec<Regions> {
    let mut packed: Vec<Regions> = Vec::new();
    let mut room = 0;
    for Range { mut start, end } in ranges {
        while start < end {
            if room == 0 {
                packed.push(Regions { process, ranges: Vec::new() });
                room = MAX_PACK_DATA;
            }
            let length = room.min(end - start);
            if let Some(last) = packed.last_mut() {
                last.ranges.push(Range { start, end: start + length });
            }
            room -= length;
            start += length;
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use proc::{ContainerPid, HostPid};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ids(pid: i32) -> ProcessIds {
        ProcessIds { host: HostPid::own(), container: ContainerPid::new(pid).unwrap() }
    }

    fn carrier(pid: i32, address: u64, part: ops::Range<u64>) -> Carrier {
        let first = Range { start: address, end: address + (part.end - part.start) };
        Carrier { process: ids(pid), address, part, first }
    }

    fn addresses(start: u64, length: u64) -> Range {
        Range { start, end: start + length }
    }

    #[test]
    fn each_piece_is_carried_once_by_the_first_process_that_maps_it() {
        let carriers = [carrier(1, 0x1000_0000, 0..4 * MIB), carrier(2, 0x9000_0000, 0..8 * MIB)];
        let data = MIB..6 * MIB;
        let (carried, left) = distribute(vec![data], &carriers, MIB);
        let first = (ids(1), addresses(0x1000_0000 + MIB, 3 * MIB));
        assert_eq!(carried, [first, (ids(2), addresses(0x9000_0000 + 4 * MIB, 2 * MIB))]);
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn what_nobody_maps_is_left_and_so_are_short_pieces_and_parts_of_chunks() {
        let carriers = [carrier(1, 0x1000_0000, 2 * MIB..4 * MIB)];
        let data = vec![0..3 * MIB + PAGE, 3 * MIB + 2 * PAGE..3 * MIB + CHUNK, 5 * MIB..6 * MIB];
        let (carried, left) = distribute(data, &carriers, CHUNK);
        assert_eq!(carried, [(ids(1), addresses(0x1000_0000, MIB))]);
        assert_eq!(left, [0..2 * MIB, 3 * MIB..3 * MIB + PAGE, 3 * MIB + 2 * PAGE..3 * MIB + CHUNK, 5 * MIB..6 * MIB]);
    }

    #[test]
    fn what_two_carriers_leave_is_one_piece() {
        let carriers = [carrier(1, 0x1000_0000, 0..MIB + PAGE), carrier(2, 0x9000_0000, MIB + PAGE..2 * MIB)];
        let data = 0..2 * MIB;
        let (carried, left) = distribute(vec![data], &carriers, MIB);
        assert_eq!(carried.len(), 1);
        let rest = MIB..2 * MIB;
        assert_eq!(left, std::slice::from_ref(&rest));
    }

    #[test]
    fn adjacent_mappings_of_adjacent_parts_are_one_carrier() {
        let line = |text: &str| Mapping::parse(text.as_bytes()).unwrap();
        let mut carriers = Vec::new();
        for mapping in [
            "10000000-10100000 rw-s 00000000 00:01 9 /dev/zero (deleted)",
            "10100000-10200000 rw-s 00100000 00:01 9 /dev/zero (deleted)",
            "10200000-10300000 rw-s 00100000 00:01 9 /dev/zero (deleted)",
        ] {
            add(&mut carriers, ids(1), &line(mapping));
        }
        let parts: Vec<_> = carriers.iter().map(|carrier| (carrier.address, carrier.part.clone())).collect();
        assert_eq!(parts, [(0x1000_0000, 0..2 * MIB), (0x1020_0000, MIB..2 * MIB)]);
    }

    #[test]
    fn ranges_share_packs_until_these_are_full() {
        let ranges = vec![addresses(0, 200 * MIB), addresses(1 << 30, 400 * MIB)];
        let packed = packed(ids(1), ranges);
        let lengths: Vec<Vec<u64>> =
            packed.iter().map(|of| of.ranges.iter().map(|range| range.len() / MIB).collect()).collect();
        assert_eq!(lengths, [vec![200, 56], vec![256], vec![88]]);
    }
}
