//! Memory that is in files already: pages that CRIU wrote.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proc::ContainerPid;

use super::{Draft, Saved, check_range};
use crate::buffer::{Buffer, SIZE};
use crate::checksum::{Checksum, is_zero};
use crate::control::Control;
use crate::error::SaveError;
use crate::pack::{CHUNK, CHUNK_BYTES, MAX_CHUNKS, PackWriter};
use crate::table::{Place, Process, Segment, SegmentTable, push};
use crate::units;

/// Memory of a process that is in a file.
#[derive(Clone, Copy, Debug)]
pub struct FileSource<'a> {
    /// The file. Nobody writes to it meanwhile.
    pub file: &'a File,
    /// Where it is, for messages.
    pub path: &'a Path,
    /// Where in it the memory begins, in bytes.
    pub offset: u64,
    /// The process, for the table.
    pub pid: ContainerPid,
    /// Where the memory begins in the process; a page.
    pub address: u64,
    /// Its bytes; whole pages.
    pub length: u64,
}

/// A part of a source.
#[derive(Clone, Copy)]
struct Span {
    source: usize,
    /// Where in the source it begins, in bytes.
    begin: u64,
    length: usize,
}

/// At most a chunk of a source, with the checksum that it had when it was first read.
#[derive(Clone, Copy)]
struct Piece {
    span: Span,
    checksum: Checksum,
}

/// What a pack is made of, in the order of its data.
type Plan = Vec<Chunk>;

/// What a chunk is made of.
enum Chunk {
    /// A piece of its length.
    Whole(Piece),
    /// Shorter pieces, one after another, and zeros.
    Mixed(Vec<Piece>),
}

/// Saves memory from files. Memory that is stored already, in whichever process, is not stored again, and no zero chunk is.
///
/// Memory is cut where its addresses are multiples of [`CHUNK`], so that equal memory at the same address is found to be
/// equal even if there is more before it in one process. Pieces at the edges that are shorter share chunks.
///
/// Files are read twice, first for checksums, in the order of sources, then for what is to be written, one pack per
/// thread. Between, some 150 bytes are kept for each 64 KiB: 0.25 %.
///
/// Equal is what has the same XXH3-128: a program that sets out to make two chunks collide can damage its own snapshot, and
/// that only.
///
/// # Errors
/// When a file cannot be read or changes, memory of a process is there twice, a disk is full, or it is cancelled. What was
/// written stays. Nothing is synced to the disk.
pub fn save_files(sources: &[FileSource<'_>], draft: &Draft, control: &Control) -> Result<Saved, SaveError> {
    let parts = parts(sources)?;
    let looked = control.gather(parts.len(), Buffer::new, |buffer, index| {
        control.check()?;
        let looked = look(sources, &parts[index], buffer)?;
        control.add(units::wide(parts[index].length));
        Ok::<_, SaveError>(looked)
    })?;
    let mut layout = Layout::default();
    let mut processes = Vec::new();
    for (span, checksum) in looked.into_iter().flatten() {
        let FileSource { pid, address, .. } = sources[span.source];
        let place = checksum.map_or(Place::Zero, |checksum| layout.place(Piece { span, checksum }));
        let segment = Segment { address: address + span.begin, length: units::wide(span.length), place };
        match processes.last_mut() {
            Some(Process { pid: last, segments }) if *last == pid => push(segments, segment),
            _ => processes.push(Process { pid, segments: vec![segment] }),
        }
    }
    let written = control.gather(layout.plans.len(), Buffer::new, |buffer, index| {
        write(sources, &layout.plans[index], draft.path(index), buffer, control)
    })?;
    let (packs, lengths) = written.into_iter().unzip();
    Ok(Saved { packs, table: SegmentTable::new(lengths, processes)? })
}

/// Sources, cut so that each part fits a buffer and ends where a chunk does.
fn parts(sources: &[FileSource<'_>]) -> Result<Vec<Span>, SaveError> {
    let mut parts = Vec::new();
    for (source, FileSource { pid, address, length, offset, .. }) in sources.iter().enumerate() {
        let end = check_range(*pid, *address, *length)?;
        if offset.checked_add(*length).is_none() {
            return Err(SaveError::Range { pid: *pid, address: *address, length: *length });
        }
        let mut at = *address;
        while at < end {
            let next = (at / CHUNK * CHUNK + units::wide(SIZE)).min(end);
            parts.push(Span { source, begin: at - address, length: units::bytes(next - at) });
            at = next;
        }
    }
    Ok(parts)
}

/// Reads a part and cuts it into pieces; those that are zero have no checksum.
fn look(
    sources: &[FileSource<'_>],
    part: &Span,
    buffer: &mut Buffer,
) -> Result<Vec<(Span, Option<Checksum>)>, SaveError> {
    let bytes = &mut buffer[..part.length];
    read(sources, part, bytes)?;
    let mut looked = Vec::with_capacity(part.length / CHUNK_BYTES + 1);
    let mut at = 0;
    while at < part.length {
        let begin = part.begin + units::wide(at);
        let address = sources[part.source].address + begin;
        let length = units::bytes(CHUNK - address % CHUNK).min(part.length - at);
        let piece = &bytes[at..at + length];
        let checksum = (!is_zero(piece)).then(|| Checksum::of(piece));
        looked.push((Span { source: part.source, begin, length }, checksum));
        at += length;
    }
    Ok(looked)
}

fn read(sources: &[FileSource<'_>], span: &Span, bytes: &mut [u8]) -> Result<(), SaveError> {
    let FileSource { file, path, offset, pid, address, .. } = sources[span.source];
    file.read_exact_at(bytes, offset + span.begin).map_err(|source| SaveError::Source {
        pid,
        address: address + span.begin,
        path: path.to_owned(),
        source,
    })
}

/// Where pieces go, decided one after another.
#[derive(Default)]
struct Layout {
    plans: Vec<Plan>,
    known: HashMap<(Checksum, usize), Place>,
    /// The last chunk for short pieces: its pack, its number there, and how many bytes of it are taken.
    mixed: Option<(usize, usize, usize)>,
}

impl Layout {
    fn place(&mut self, piece: Piece) -> Place {
        let length = piece.span.length;
        if let Some(place) = self.known.get(&(piece.checksum, length)) {
            return *place;
        }
        let place = if length == CHUNK_BYTES {
            let (pack, chunk) = self.append(Chunk::Whole(piece));
            place(pack, chunk, 0)
        } else {
            self.place_short(piece)
        };
        self.known.insert((piece.checksum, length), place);
        place
    }

    fn place_short(&mut self, piece: Piece) -> Place {
        let length = piece.span.length;
        let (pack, chunk, taken) = match self.mixed {
            Some((pack, chunk, taken)) if taken + length <= CHUNK_BYTES => (pack, chunk, taken),
            _ => {
                let (pack, chunk) = self.append(Chunk::Mixed(Vec::new()));
                (pack, chunk, 0)
            }
        };
        if let Chunk::Mixed(pieces) = &mut self.plans[pack][chunk] {
            pieces.push(piece);
        }
        self.mixed = Some((pack, chunk, taken + length));
        place(pack, chunk, taken)
    }

    fn append(&mut self, chunk: Chunk) -> (usize, usize) {
        if self.plans.last().is_none_or(|plan| plan.len() == MAX_CHUNKS) {
            self.plans.push(Plan::new());
        }
        let pack = self.plans.len() - 1;
        self.plans[pack].push(chunk);
        (pack, self.plans[pack].len() - 1)
    }
}

fn place(pack: usize, chunk: usize, begin: usize) -> Place {
    // More packs than this do not fit into a table, which says so.
    let index = u32::try_from(pack).unwrap_or(u32::MAX);
    Place::Pack { index, offset: units::wide(chunk * CHUNK_BYTES + begin) }
}

/// Writes a pack.
fn write(
    sources: &[FileSource<'_>],
    plan: &Plan,
    path: PathBuf,
    buffer: &mut Buffer,
    control: &Control,
) -> Result<(PathBuf, u64), SaveError> {
    let mut pack = PackWriter::create(path)?;
    for chunks in plan.chunks(SIZE / CHUNK_BYTES) {
        control.check()?;
        let bytes = &mut buffer[..chunks.len() * CHUNK_BYTES];
        let parts = chunks.iter().zip(bytes.chunks_mut(CHUNK_BYTES));
        let checksums = parts.map(|(chunk, bytes)| compose(sources, chunk, bytes)).collect::<Result<Vec<_>, _>>()?;
        pack.append(bytes, checksums)?;
    }
    pack.finish()
}

/// Puts a chunk together.
fn compose(sources: &[FileSource<'_>], chunk: &Chunk, bytes: &mut [u8]) -> Result<Checksum, SaveError> {
    let pieces = match chunk {
        Chunk::Whole(piece) => return read_again(sources, piece, bytes),
        Chunk::Mixed(pieces) => pieces,
    };
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.span.length;
        read_again(sources, piece, &mut bytes[at..end])?;
        at = end;
    }
    bytes[at..].fill(0);
    Ok(Checksum::of(bytes))
}

/// Reads a piece, which must be what it was.
fn read_again(sources: &[FileSource<'_>], piece: &Piece, bytes: &mut [u8]) -> Result<Checksum, SaveError> {
    read(sources, &piece.span, bytes)?;
    if piece.checksum == Checksum::of(bytes) {
        return Ok(piece.checksum);
    }
    let FileSource { path, pid, address, .. } = sources[piece.span.source];
    Err(SaveError::Changed { pid, address: address + piece.span.begin, path: path.to_owned() })
}
