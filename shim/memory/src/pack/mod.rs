//! One file of a pack: chunks of memory, their checksums, and a trailer. docs/format.md has the layout.

mod trailer;
mod verify;
mod write;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::checksum::{CHECKSUM_BYTES, Checksum};
use crate::error::PackError;
use crate::units;
pub use trailer::{Trailer, TrailerError};
pub use verify::verify;
pub(crate) use write::PackWriter;

/// Bytes of a page: what addresses and lengths are multiples of.
pub const PAGE: u64 = 4096;

/// Bytes of a chunk: what has one checksum, and is stored or left out as a whole.
pub const CHUNK: u64 = 65536;

/// Bytes of memory that a pack has at most.
pub const MAX_PACK_DATA: u64 = 256 << 20;

/// How far apart pages are, in bytes, of which one that is in the page cache stands for those behind it.
const SAMPLES: usize = 4 << 20;

/// Of linux/magic.h.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// [`CHUNK`] as memory counts.
pub(crate) const CHUNK_BYTES: usize = 65536;

const _: () = assert!(CHUNK_BYTES as u64 == CHUNK && MAX_PACK_DATA.is_multiple_of(CHUNK));

/// Chunks that a pack has at most.
pub(crate) const MAX_CHUNKS: usize = 4096;

/// A pack whose frame has been checked: that the file is whole, and the checksums are those that were written. Its
/// chunks are checked when they are read.
#[derive(Debug)]
pub struct Pack {
    path: PathBuf,
    file: File,
    data: u64,
    checksums: Vec<Checksum>,
}

impl Pack {
    /// Opens a pack. A symbolic link is refused.
    ///
    /// # Errors
    /// When it cannot be read, or is no whole pack.
    pub fn open(path: &Path) -> Result<Self, PackError> {
        // A fifo in its place must not block.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| PackError::Read { path: path.to_owned(), source: errno.into() })?;
        Self::from_file(path.to_owned(), File::from(file))
    }

    /// Takes an open file, whose path is wanted for messages only.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn from_file(path: PathBuf, file: File) -> Result<Self, PackError> {
        let read = |source| PackError::Read { path: path.clone(), source };
        let damaged = |what| PackError::Damaged { path: path.clone(), what };
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(damaged("it is no regular file"));
        }
        let Some(at) = metadata.len().checked_sub(units::wide(Trailer::BYTES)) else {
            return Err(damaged("it is too short"));
        };
        let mut bytes = [0; Trailer::BYTES];
        file.read_exact_at(&mut bytes, at).map_err(read)?;
        let trailer = Trailer::parse(&bytes, metadata.len()).map_err(|error| match error {
            TrailerError::Damaged(what) => damaged(what),
            TrailerError::Version(version) => PackError::Version { path: path.clone(), version },
        })?;
        // At most 64 KiB: the trailer's numbers agree with the file's length and with the caps.
        let mut table = vec![0; trailer.chunks() * CHECKSUM_BYTES];
        file.read_exact_at(&mut table, trailer.data).map_err(read)?;
        if Checksum::of(&table) != trailer.table {
            return Err(damaged("its checksums are not those that were written"));
        }
        let (checksums, _) = table.as_chunks();
        let checksums = checksums.iter().map(|bytes| Checksum::from_bytes(*bytes)).collect();
        Ok(Self { path, file, data: trailer.data, checksums })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, of which the first [`Self::data_length`] bytes are memory.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of memory in it: whole pages, at most 256 MiB.
    #[must_use]
    pub fn data_length(&self) -> u64 {
        self.data
    }

    /// Number of the first chunk of `bytes`, which begin at a chunk, that is not what was written.
    pub(crate) fn damaged(&self, first: usize, bytes: &[u8]) -> Option<usize> {
        let expected = self.checksums.get(first..).unwrap_or_default().iter().copied().map(Some);
        let found = Checksum::of_chunks(bytes);
        let wrong = found.zip(expected.chain(std::iter::repeat(None))).position(|(is, was)| was != Some(is));
        wrong.map(|wrong| first + wrong)
    }

    /// Whether all of it is in memory, as far as single pages tell, so that nobody has to wait who reads it page by page.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        // Which has no page cache to ask.
        let is_tmpfs = rustix::fs::fstatfs(&self.file).is_ok_and(|of| of.f_type == TMPFS_MAGIC);
        let mut page = [0; 1];
        let mut samples = (0..self.data_length()).step_by(SAMPLES);
        is_tmpfs || samples.all(|offset| self.read_cached(&mut page, offset) == page.len())
    }

    /// Reads what the page cache has of a range, without waiting for a disk. Bytes read, which may be none.
    pub(crate) fn read_cached(&self, bytes: &mut [u8], offset: u64) -> usize {
        let mut buffers = [io::IoSliceMut::new(bytes)];
        rustix::io::preadv2(&self.file, &mut buffers, offset, rustix::io::ReadWriteFlags::NOWAIT).unwrap_or(0)
    }
}
