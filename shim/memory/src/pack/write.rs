//! Writing a pack.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::FallocateFlags;

use crate::checksum::{CHECKSUM_BYTES, Checksum, ZERO_CHUNK};
use crate::error::SaveError;
use crate::pack::{CHUNK, CHUNK_BYTES, MAX_CHUNKS, Trailer};
use crate::units;

/// Bytes for which space is allocated at a time, ahead of writing. It takes a quarter off the time of writing on ext4,
/// which otherwise reserves space block by block; on tmpfs it changes nothing.
const AHEAD: u64 = 32 << 20;

/// A pack that is being written. By one thread: writes to one file wait for each other in the kernel.
#[derive(Debug)]
pub(crate) struct PackWriter {
    path: PathBuf,
    file: File,
    data: u64,
    checksums: Vec<Checksum>,
    /// Up to where space is allocated; `None` where that is not possible.
    allocated: Option<u64>,
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
        Ok(Self { path, file, data: 0, checksums: Vec::new(), allocated: Some(0) })
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
        self.allocate(self.data + units::wide(bytes.len()));
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

    /// Sees to it that there is space up to `end`. A disk on which there is too little may still have room for what is
    /// written, and says so then.
    fn allocate(&mut self, end: u64) {
        if let Some(allocated) = self.allocated.filter(|allocated| *allocated < end) {
            let done = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, allocated, end + AHEAD - allocated);
            self.allocated = done.ok().map(|()| end + AHEAD);
        }
    }

    /// Writes checksums and trailer. Returns where the pack is, and its bytes of memory.
    pub(crate) fn finish(self) -> Result<(PathBuf, u64), SaveError> {
        let mut end = Vec::with_capacity(self.checksums.len() * CHECKSUM_BYTES + Trailer::BYTES);
        end.extend(self.checksums.iter().flat_map(|checksum| checksum.to_bytes()));
        let trailer = Trailer { data: self.data, table: Checksum::of(&end) };
        end.extend(trailer.encode());
        let written = self.file.write_all_at(&end, self.data);
        // Gives back what was allocated and not needed.
        let written = written.and_then(|()| self.file.set_len(self.data + units::wide(end.len())));
        match written {
            Ok(()) => Ok((self.path, self.data)),
            Err(source) => Err(SaveError::write(self.path, source)),
        }
    }
}
