//! The buffer that a thread copies through.

use std::ops::{Deref, DerefMut};

use crate::pack::{CHUNK_BYTES, PAGE};
use crate::units;

/// Bytes of a buffer. What was read is still in a core's second level cache when it is hashed and written. More is
/// worse than that: for one write of 1 MiB the page cache looks for as much contiguous memory, and took twice the time
/// of four of 256 KiB on ext4, one of 2 MiB five times. Fewer bytes cost more system calls.
pub(crate) const SIZE: usize = 4 * CHUNK_BYTES;

/// [`SIZE`] bytes that begin at a page, as direct reads need it.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    begin: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        let page = units::bytes(PAGE);
        let bytes = vec![0; SIZE + page];
        // Says usize::MAX if it cannot tell, which no real machine does; direct reads then fall back to others.
        let begin = bytes.as_ptr().align_offset(page).min(page);
        Self { bytes, begin }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.begin..self.begin + SIZE]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.begin..self.begin + SIZE]
    }
}
