//! Writing a pack.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use crate::checksum::{CHECKSUM_BYTES, Checksum, ZERO_CHUNK};
use crate::error::SaveError;
use crate::pack::{CHUNK, CHUNK_BYTES, MAX_CHUNKS, Trailer};
use crate::units;

/// A pack that is being written. By one thread: writes to one file wait for each other in the kernel.
///
/// Space is not allocated ahead: filesystems with delayed allocation reserve it at each write, so that a full disk is
/// told then, and lay the file out when they know its length; on tmpfs allocating zeroes every page once more.
#[derive(Debug)]
pub(crate) struct PackWriter {
    path: PathBuf,
    file: File,
    data: u64,
    checksums: Vec<Checksum>,
}

impl PackWriter {
    /// Makes the file, which must not exist, for its owner alone.
    pub(crate) fn create(path: PathBuf) -> Result<Self, SaveError> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| SaveError::Create { path: path.clone(), source })?;
        Ok(Self { path, file, data: 0, checksums: Vec::new() })
    }

    /// Bytes of memory so far.
    pub(crate) fn data_length(&self) -> u64 {
        self.data
    }

    /// Appends chunks, whose checksums are these. Only the last chunk of the pack may be shorter.
    pub(crate) fn append(
        &mut self,
        bytes: &[u8],
        checksums: impl IntoIterator<Item = Checksum>,
    ) -> Result<(), SaveError> {
        self.checksums.extend(checksums);
        self.file.write_all_at(bytes, self.data).map_err(|source| SaveError::write(self.path.clone(), source))?;
        self.data += units::wide(bytes.len());
        let chunks = units::bytes(self.data.div_ceil(CHUNK));
        debug_assert!(self.checksums.len() == chunks && chunks <= MAX_CHUNKS, "one checksum for each of 4096 chunks");
        Ok(())
    }

    /// Appends chunks of zeros, as a hole in the file.
    pub(crate) fn append_zeros(&mut self, chunks: usize) {
        self.checksums.extend(std::iter::repeat_n(*ZERO_CHUNK, chunks));
        self.data += units::wide(chunks * CHUNK_BYTES);
    }

    /// Writes checksums and trailer. Returns where the pack is, and its bytes of memory.
    pub(crate) fn finish(self) -> Result<(PathBuf, u64), SaveError> {
        let mut end = Vec::with_capacity(self.checksums.len() * CHECKSUM_BYTES + Trailer::BYTES);
        end.extend(self.checksums.iter().flat_map(|checksum| checksum.to_bytes()));
        let trailer = Trailer { data: self.data, table: Checksum::of(&end) };
        end.extend(trailer.encode());
        match self.file.write_all_at(&end, self.data) {
            Ok(()) => Ok((self.path, self.data)),
            Err(source) => Err(SaveError::write(self.path, source)),
        }
    }
}
