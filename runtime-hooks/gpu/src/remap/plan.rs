//! Choice of the pieces that are replaced: those that may be, and as many as a process has room for.

use std::cmp::Reverse;
use std::fs;

use super::{Piece, ProcessLayout, RemapError};
use tracee::process::{self, Range};

pub(super) const PAGE: u64 = 4096;

/// More mappings than this make everything slow that goes through them, a dump for one.
const MOST_PIECES: usize = 20_000;

/// Mappings that a kernel allows a process, where the kernel does not say: `DEFAULT_MAX_MAP_COUNT`.
const MAPPINGS: usize = 65_530;

/// The pieces that are replaced, those of a file one after the other, and what is left as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) pieces: Vec<Piece>,
    pub(super) left: Vec<Range>,
}

impl Plan {
    /// For a process that does not run. `files` is how many there are.
    pub(super) fn of(files: usize, process: &ProcessLayout) -> Result<Self, RemapError> {
        let pid = process.pid;
        let mut pieces = process.pieces.clone();
        pieces.sort_unstable_by_key(|piece| piece.address);
        check(pid, files, &pieces)?;
        let memory = process::anonymous_mappings(pid).map_err(RemapError::memory(pid))?;
        let is_memory = |piece: &&Piece| process::gained(&memory, &[piece.range()]).is_empty();
        if let Some(piece) = pieces.iter().find(|piece| !is_memory(piece)) {
            return Err(RemapError::Piece { pid, range: piece.range(), why: "it is not private anonymous memory" });
        }
        let mappings = process::mappings(pid).map_err(RemapError::memory(pid))?.len();
        Ok(Self::with_room(pieces, room(mappings)))
    }

    /// The largest pieces, as many as there is room for.
    fn with_room(mut pieces: Vec<Piece>, room: usize) -> Self {
        pieces.sort_by_key(|piece| (Reverse(piece.length), piece.address));
        let mut others: Vec<Range> = pieces.split_off(room.min(pieces.len())).iter().map(Piece::range).collect();
        others.sort_unstable();
        let mut left: Vec<Range> = Vec::new();
        for range in others {
            match left.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => left.push(range),
            }
        }
        pieces.sort_unstable_by_key(|piece| (piece.source.map(|source| source.file), piece.address));
        Self { pieces, left }
    }
}

fn check(pid: i32, files: usize, pieces: &[Piece]) -> Result<(), RemapError> {
    let mut end = 0;
    for piece in pieces {
        let offset = piece.source.map_or(0, |source| source.offset);
        let numbers = [piece.address, piece.length, offset];
        let why = if piece.length == 0 || numbers.iter().any(|number| !number.is_multiple_of(PAGE)) {
            Some("it is not whole pages")
        } else if numbers.iter().any(|number| *number >= 1 << 62) {
            Some("there are no such addresses")
        } else if piece.address < end {
            Some("it overlaps another")
        } else if piece.source.is_some_and(|source| source.file >= files) {
            Some("its file is not there")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(RemapError::Piece { pid, range: piece.range(), why });
        }
        end = piece.range().end;
    }
    Ok(())
}

/// Returns how many mappings can be replaced in a process that has so many. A replacement in the middle adds two.
fn room(mappings: usize) -> usize {
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|most| most.trim().parse().ok());
    (most.unwrap_or(MAPPINGS).saturating_sub(mappings) / 2).min(MOST_PIECES)
}

#[cfg(test)]
mod tests {
    use super::super::Source;
    use super::*;

    fn piece(address: u64, length: u64) -> Piece {
        Piece { address, length, source: Some(Source { file: 0, offset: 0 }) }
    }

    #[test]
    fn the_smallest_pieces_are_left_where_there_is_no_room() {
        let pieces = vec![piece(0x1000, 0x1000), piece(0x2000, 0x1000), piece(0x3000, 0x3000), piece(0x8000, 0x2000)];
        let plan = Plan::with_room(pieces.clone(), 2);
        assert_eq!(plan.pieces, [piece(0x3000, 0x3000), piece(0x8000, 0x2000)]);
        assert_eq!(plan.left, [Range { start: 0x1000, end: 0x3000 }]);
        assert_eq!(Plan::with_room(pieces, 4).left, []);
        assert!(room(0) > 1000);
        assert_eq!(room(usize::MAX), 0);
    }

    #[test]
    fn pieces_that_cannot_be_are_refused() {
        let wrong = [
            vec![piece(0x1000, 0)],
            vec![piece(0x1001, 0x1000)],
            vec![piece(0x1000, 0xfff)],
            vec![Piece { source: Some(Source { file: 0, offset: 1 }), ..piece(0x1000, 0x1000) }],
            vec![Piece { source: Some(Source { file: 1, offset: 0 }), ..piece(0x1000, 0x1000) }],
            vec![piece(0x1000, 0x2000), piece(0x2000, 0x1000)],
            vec![piece(u64::MAX - 0xfff, 0x1000)],
        ];
        for pieces in wrong {
            check(1, 1, &pieces).unwrap_err();
        }
        check(1, 1, &[piece(0x1000, 0x1000), piece(0x2000, 0x1000)]).unwrap();
    }
}
