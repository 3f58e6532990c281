//! Choice of the segments that are replaced: those that may be, and as many as a process has room for.

use std::cmp::Reverse;
use std::fs;

use memory::{ProcessLayout, Segment};
use proc::{HostPid, Range};
use tracee::process;

use super::{RemapError, pack_of};

pub(super) const PAGE: u64 = 4096;

/// More mappings than this make everything slow that goes through them, a dump for one.
const MOST_SEGMENTS: usize = 20_000;

/// Mappings that a kernel allows a process, where the kernel does not say: `DEFAULT_MAX_MAP_COUNT`.
const MAPPINGS: usize = 65_530;

/// The segments that are replaced, those of a file one after the other, and what is left as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) segments: Vec<Segment>,
    pub(super) left: Vec<Range>,
}

impl Plan {
    /// For a process that does not run. `packs` is how many there are.
    pub(super) fn of(packs: usize, of: &ProcessLayout) -> Result<Self, RemapError> {
        let pid = of.process.host;
        let mut segments = of.segments.clone();
        segments.sort_unstable_by_key(|segment| segment.address);
        check(pid, packs, &segments)?;
        let memory = process::anonymous_mappings(pid).map_err(RemapError::memory(pid))?;
        let is_memory = |segment: &&Segment| process::gained(&memory, &[segment.range()]).is_empty();
        if let Some(segment) = segments.iter().find(|segment| !is_memory(segment)) {
            return Err(RemapError::Segment { pid, range: segment.range(), why: "it is not private anonymous memory" });
        }
        let mappings = proc::mappings(pid).map_err(RemapError::memory(pid))?.len();
        Ok(Self::with_room(segments, room(mappings)))
    }

    /// The largest segments, as many as there is room for.
    fn with_room(mut segments: Vec<Segment>, room: usize) -> Self {
        segments.sort_by_key(|segment| (Reverse(segment.length), segment.address));
        let mut others: Vec<Range> = segments.split_off(room.min(segments.len())).iter().map(Segment::range).collect();
        others.sort_unstable();
        let mut left: Vec<Range> = Vec::new();
        for range in others {
            match left.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => left.push(range),
            }
        }
        segments.sort_unstable_by_key(|segment| (pack_of(segment), segment.address));
        Self { segments, left }
    }
}

fn check(pid: HostPid, packs: usize, segments: &[Segment]) -> Result<(), RemapError> {
    let mut end = 0;
    for segment in segments {
        let offset = segment.stored().map_or(0, |(_, offset)| offset);
        let numbers = [segment.address, segment.length, offset];
        let why = if segment.length == 0 || numbers.iter().any(|number| !number.is_multiple_of(PAGE)) {
            Some("it is not whole pages")
        } else if numbers.iter().any(|number| *number >= 1 << 62) {
            Some("there are no such addresses")
        } else if segment.address < end {
            Some("it overlaps another")
        } else if pack_of(segment).is_some_and(|pack| pack >= packs) {
            Some("its file is not there")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(RemapError::Segment { pid, range: segment.range(), why });
        }
        end = segment.range().end;
    }
    Ok(())
}

/// Returns how many mappings can be replaced in a process that has so many. A replacement in the middle adds two.
fn room(mappings: usize) -> usize {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|most| most.trim().parse().ok());
    (most.unwrap_or(MAPPINGS).saturating_sub(mappings) / 2).min(MOST_SEGMENTS)
}

#[cfg(test)]
mod tests {
    use memory::Place;

    use super::*;

    fn segment(address: u64, length: u64) -> Segment {
        Segment { address, length, place: Place::Pack { index: 0, offset: 0 } }
    }

    #[test]
    fn the_smallest_pieces_are_left_where_there_is_no_room() {
        let segments =
            vec![segment(0x1000, 0x1000), segment(0x2000, 0x1000), segment(0x3000, 0x3000), segment(0x8000, 0x2000)];
        let plan = Plan::with_room(segments.clone(), 2);
        assert_eq!(plan.segments, [segment(0x3000, 0x3000), segment(0x8000, 0x2000)]);
        assert_eq!(plan.left, [Range { start: 0x1000, end: 0x3000 }]);
        assert_eq!(Plan::with_room(segments, 4).left, []);
        assert!(room(0) > 1000);
        assert_eq!(room(usize::MAX), 0);
    }

    #[test]
    fn pieces_that_cannot_be_are_refused() {
        let wrong = [
            vec![segment(0x1000, 0)],
            vec![segment(0x1001, 0x1000)],
            vec![segment(0x1000, 0xfff)],
            vec![Segment { place: Place::Pack { index: 0, offset: 1 }, ..segment(0x1000, 0x1000) }],
            vec![Segment { place: Place::Pack { index: 1, offset: 0 }, ..segment(0x1000, 0x1000) }],
            vec![segment(0x1000, 0x2000), segment(0x2000, 0x1000)],
            vec![segment(u64::MAX - 0xfff, 0x1000)],
        ];
        for segments in wrong {
            check(HostPid::own(), 1, &segments).unwrap_err();
        }
        check(HostPid::own(), 1, &[segment(0x1000, 0x1000), segment(0x2000, 0x1000)]).unwrap();
    }
}
