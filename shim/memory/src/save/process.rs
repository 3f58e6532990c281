//! Memory of processes that stand still.

use std::cmp::Reverse;
use std::path::PathBuf;
use std::sync::Arc;

use proc::{ContainerPid, ProcessIds, Range};

use super::{Draft, Saved, check_range};
use crate::buffer::{Buffer, SIZE};
use crate::checksum::{Checksum, is_zero};
use crate::control::Control;
use crate::error::SaveError;
use crate::layout::Regions;
use crate::pack::{CHUNK, CHUNK_BYTES, MAX_PACK_DATA, PackWriter};
use crate::remote::Remote;
use crate::table::{Place, Process, Segment, SegmentTable, push};
use crate::units;

/// Memory that becomes one pack at most.
struct Window {
    process: Arc<Remote>,
    pid: ContainerPid,
    ranges: Vec<Range>,
}

impl Window {
    fn length(&self) -> u64 {
        self.ranges.iter().map(Range::len).sum()
    }
}

/// What a window has become: segments whose pack has number 0, as nobody knows yet how many are before it.
struct Copied {
    segments: Vec<Segment>,
    pack: Option<(PathBuf, u64)>,
}

/// Saves memory of processes that are frozen or held: each 256 MiB of a range, counted from its begin, are one pack, unless they are all zero.
/// So a change of memory in one place leaves all other packs as they were.
///
/// Zero chunks are left out, but only in runs of `zero_run` bytes or more, or at the edges of a pack: a caller that maps
/// packs into processes keeps the number of mappings small with a larger number. Those that are stored are holes in the
/// file.
///
/// # Errors
/// When a process ends, its memory is not mapped, a disk is full, or it is cancelled. What was written stays. Nothing is
/// synced to the disk.
pub fn save_processes(
    targets: &[Regions],
    zero_run: u64,
    draft: &Draft,
    control: &Control,
) -> Result<Saved, SaveError> {
    save_windows(&windows(targets)?, zero_run, draft, control)
}

/// Saves memory of processes that are frozen or held: the ranges of each target follow one another in one pack, of at most
/// [`MAX_PACK_DATA`] bytes and of whole chunks each. No chunk of zeros is stored.
///
/// # Errors
/// As for [`save_processes`].
pub fn save_together(targets: &[Regions], draft: &Draft, control: &Control) -> Result<Saved, SaveError> {
    let mut windows = Vec::new();
    for Regions { process: ProcessIds { host, container }, ranges } in targets {
        let Some(first) = ranges.first() else { continue };
        let mut left = MAX_PACK_DATA;
        for Range { start, end } in ranges {
            let length = end.saturating_sub(*start);
            check_range(*container, *start, length)?;
            let fits = left.checked_sub(length).filter(|_| length.is_multiple_of(CHUNK));
            let range = SaveError::Range { pid: *container, address: *start, length };
            left = fits.ok_or(range)?;
        }
        let remote = Remote::open(*host, first.start).map_err(|error| SaveError::process(*host, error))?;
        windows.push(Window { process: Arc::new(remote), pid: *container, ranges: ranges.clone() });
    }
    save_windows(&windows, 0, draft, control)
}

fn save_windows(windows: &[Window], zero_run: u64, draft: &Draft, control: &Control) -> Result<Saved, SaveError> {
    // The largest first, so that no thread begins one when all others are about to end.
    let mut order: Vec<usize> = (0..windows.len()).collect();
    order.sort_by_key(|index| Reverse(windows[*index].length()));
    let zero_run = units::bytes(zero_run).div_ceil(CHUNK_BYTES);
    let mut copied = control.gather(order.len(), Buffer::new, |buffer, index| {
        let number = order[index];
        let copied = Copy::new(&windows[number], zero_run, draft.path(number)).run(buffer, control)?;
        Ok::<_, SaveError>((number, copied))
    })?;
    copied.sort_unstable_by_key(|(number, _)| *number);

    let mut packs = Vec::new();
    let mut lengths = Vec::new();
    let mut processes = Vec::new();
    for (window, (_, mut copied)) in windows.iter().zip(copied) {
        if let Some((path, length)) = copied.pack {
            let number = u32::try_from(packs.len()).unwrap_or(u32::MAX);
            for segment in &mut copied.segments {
                if let Place::Pack { index, .. } = &mut segment.place {
                    *index = number;
                }
            }
            packs.push(path);
            lengths.push(length);
        }
        processes.push(Process { pid: window.pid, segments: copied.segments });
    }
    Ok(Saved { packs, table: SegmentTable::new(lengths, processes)? })
}

fn windows(targets: &[Regions]) -> Result<Vec<Window>, SaveError> {
    let mut windows = Vec::new();
    for Regions { process: ProcessIds { host, container }, ranges } in targets {
        let Some(first) = ranges.first() else { continue };
        let remote = Remote::open(*host, first.start).map_err(|error| SaveError::process(*host, error))?;
        let remote = Arc::new(remote);
        for range in ranges {
            let end = check_range(*container, range.start, range.len())?;
            let mut address = range.start;
            while address < end {
                let length = MAX_PACK_DATA.min(end - address);
                let ranges = vec![Range { start: address, end: address + length }];
                windows.push(Window { process: Arc::clone(&remote), pid: *container, ranges });
                address += length;
            }
        }
    }
    Ok(windows)
}

/// The copy of one window.
struct Copy<'a> {
    window: &'a Window,
    /// Chunks of zeros in a row that are worth leaving out.
    zero_run: usize,
    /// Where its pack is to be.
    path: PathBuf,
    pack: Option<PackWriter>,
    segments: Vec<Segment>,
    /// Address of what comes next.
    at: u64,
    /// Bytes of zeros that come next, of which it is not known yet how long they go on.
    zeros: usize,
}

impl<'a> Copy<'a> {
    fn new(window: &'a Window, zero_run: usize, path: PathBuf) -> Self {
        Self { window, zero_run, path, pack: None, segments: Vec::new(), at: 0, zeros: 0 }
    }

    fn run(mut self, buffer: &mut Buffer, control: &Control) -> Result<Copied, SaveError> {
        let process = &self.window.process;
        for range in &self.window.ranges {
            self.at = range.start;
            for begin in (range.start..range.end).step_by(SIZE) {
                control.check()?;
                let bytes = &mut buffer[..SIZE.min(units::bytes(range.end - begin))];
                process.read(begin, bytes).map_err(|error| SaveError::process(process.pid(), error))?;
                self.take(bytes)?;
                control.add(units::wide(bytes.len()));
            }
            self.leave_out();
        }
        let pack = self.pack.map(PackWriter::finish).transpose()?;
        Ok(Copied { segments: self.segments, pack })
    }

    /// Takes what comes next in the window.
    fn take(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let zeros = run(rest, true);
            self.zeros += zeros;
            rest = &rest[zeros..];
            let (stored, after) = rest.split_at(run(rest, false));
            if !stored.is_empty() {
                self.settle_zeros();
                self.store(stored)?;
            }
            rest = after;
        }
        Ok(())
    }

    /// Decides about zeros, now that something follows.
    fn settle_zeros(&mut self) {
        let chunks = self.zeros / CHUNK_BYTES;
        match &mut self.pack {
            Some(pack) if chunks > 0 && chunks < self.zero_run => {
                let offset = pack.data_length();
                pack.append_zeros(chunks);
                self.say(self.zeros, Place::Pack { index: 0, offset });
                self.zeros = 0;
            }
            _ => self.leave_out(),
        }
    }

    fn leave_out(&mut self) {
        if self.zeros > 0 {
            self.say(self.zeros, Place::Zero);
            self.zeros = 0;
        }
    }

    fn store(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        let pack = match &mut self.pack {
            Some(pack) => pack,
            none => none.insert(PackWriter::create(self.path.clone())?),
        };
        let offset = pack.data_length();
        pack.append(bytes, Checksum::of_chunks(bytes))?;
        self.say(bytes.len(), Place::Pack { index: 0, offset });
        Ok(())
    }

    fn say(&mut self, length: usize, place: Place) {
        let length = units::wide(length);
        push(&mut self.segments, Segment { address: self.at, length, place });
        self.at += length;
    }
}

/// How many bytes at the begin are whole chunks that are all zero, or that are not.
fn run(bytes: &[u8], zero: bool) -> usize {
    bytes.chunks(CHUNK_BYTES).take_while(|chunk| is_zero(chunk) == zero).map(<[u8]>::len).sum()
}
