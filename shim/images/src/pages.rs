//! Pagemaps: the pages of a process's memory in the images, and their places. Present pages lie in
//! `pages-N.img` one after the other, in the pagemap's order, without gaps.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use proc::ContainerPid;

use crate::format::{COMMON_MAGIC, ImageError, PAGEMAP_MAGIC, damaged};
use crate::wire::{Field, MAX_ENTRY, Reader, Value, fields};

pub(crate) const MAGIC: [u32; 2] = [COMMON_MAGIC, PAGEMAP_MAGIC];

/// `PE_PRESENT` in criu/include/pagemap.h: the pages are in the file of pages.
const PRESENT: u64 = 1 << 2;
/// Most pieces of a process's memory, beyond any real number; 64 bytes each here.
const MAX_EXTENTS: usize = 1 << 24;

/// Numbers of the fields in images/pagemap.proto.
pub(crate) const PAGES_ID: u32 = 1;
const ADDRESS: u32 = 1;
const OLD_COUNT: u32 = 2;
const IN_PARENT: u32 = 3;
const FLAGS: u32 = 4;
const COUNT: u32 = 5;

/// An entry of a pagemap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    /// In bytes.
    pub(crate) length: u64,
    /// The pages are in the file of pages, neither in a parent's nor left to a lazy restore.
    pub(crate) present: bool,
    /// The length is in the wider of the two fields.
    counts: bool,
}

impl Entry {
    fn of(path: &Path, message: &[u8]) -> Result<Self, ImageError> {
        let (mut address, mut count, mut long_count, mut in_parent, mut flags) = (0, 0, None, false, None);
        fields(path, message, |Field { number, value, .. }| {
            let Value::Number(value) = value else { return Ok(()) };
            match number {
                ADDRESS => address = value,
                OLD_COUNT => count = value,
                IN_PARENT => in_parent = value != 0,
                FLAGS => flags = Some(value),
                COUNT => long_count = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        let length = long_count.unwrap_or(count).checked_mul(page_size());
        let length = length.filter(|length| address.checked_add(*length).is_some());
        Ok(Self {
            address,
            length: length.ok_or_else(|| damaged(path, "an entry is beyond all memory"))?,
            present: !in_parent && flags.is_none_or(|flags| flags & PRESENT != 0),
            counts: long_count.is_some(),
        })
    }

    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.length)
    }

    /// Returns the changes to the message that restrict it to a piece of the memory.
    pub(crate) fn piece(&self, address: u64, length: u64) -> [(u32, u64); 2] {
        let count = length / page_size();
        [(ADDRESS, address), (if self.counts { COUNT } else { OLD_COUNT }, count)]
    }
}

/// A contiguous piece of memory in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) address: u64,
    pub(crate) length: u64,
    /// Offset in the file of pages.
    pub(crate) offset: u64,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.length)
    }

    /// Returns the part between two addresses.
    pub(crate) fn within(&self, start: u64, end: u64) -> Option<Self> {
        let (from, to) = (self.address.max(start), self.end().min(end));
        let length = to.checked_sub(from).filter(|length| *length > 0)?;
        Some(Self { address: from, length, offset: self.offset.saturating_add(from - self.address) })
    }
}

/// Reader of a pagemap.
pub(crate) struct Pagemap<'a> {
    path: &'a Path,
    reader: Reader<'a>,
    /// Number in the name of the file of pages.
    pub(crate) pages_id: u64,
    /// First entry, with that number.
    pub(crate) head: Vec<u8>,
    /// End address of the last entry.
    reached: u64,
}

impl<'a> Pagemap<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self, ImageError> {
        let mut reader = Reader::open(path, &MAGIC)?;
        let head = reader.entry(MAX_ENTRY)?.unwrap_or_default();
        let mut pages_id = 0;
        fields(path, &head, |Field { number, value, .. }| {
            if let (PAGES_ID, Value::Number(value)) = (number, value) {
                pages_id = value;
            }
            Ok(())
        })?;
        Ok(Self { path, reader, pages_id, head, reached: 0 })
    }

    /// Returns the next entry, with its message.
    pub(crate) fn next(&mut self) -> Result<Option<(Entry, Vec<u8>)>, ImageError> {
        let Some(message) = self.reader.entry(MAX_ENTRY)? else { return Ok(None) };
        Ok(Some((Entry::of(self.path, &message)?, message)))
    }

    /// Returns the next entry; fails unless above all entries before.
    pub(crate) fn next_in_order(&mut self) -> Result<Option<(Entry, Vec<u8>)>, ImageError> {
        let next = self.next()?;
        if let Some((entry, _)) = &next {
            if entry.address < self.reached || entry.address % page_size() != 0 {
                return Err(damaged(self.path, "its entries are not in order"));
            }
            self.reached = entry.end();
        }
        Ok(next)
    }

    /// Returns all present memory, ascending, in maximal pieces.
    pub(crate) fn extents(mut self) -> Result<Vec<Extent>, ImageError> {
        let mut extents: Vec<Extent> = vec![];
        let mut offset = 0_u64;
        while let Some((Entry { address, length, present, .. }, _)) = self.next_in_order()? {
            if !present || length == 0 {
                continue;
            }
            match extents.last_mut() {
                Some(last) if last.end() == address => last.length = last.length.saturating_add(length),
                _ => extents.push(Extent { address, length, offset }),
            }
            if extents.len() > MAX_EXTENTS {
                return Err(damaged(self.path, "it has too many entries"));
            }
            offset = offset.saturating_add(length);
        }
        Ok(extents)
    }
}

pub(crate) fn page_size() -> u64 {
    u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX)
}

pub(crate) fn pagemap_path(images: &Path, pid: ContainerPid) -> PathBuf {
    images.join(format!("pagemap-{pid}.img"))
}

pub(crate) fn pages_path(images: &Path, id: u64) -> PathBuf {
    images.join(format!("pages-{id}.img"))
}

/// Returns the pagemaps of processes and of shared memory in a directory.
pub(crate) fn pagemaps(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let failed = |source| ImageError::Read { path: directory.to_owned(), source };
    let mut found = vec![];
    for file in std::fs::read_dir(directory).map_err(failed)? {
        let path = file.map_err(failed)?.path();
        let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
        if name.starts_with(b"pagemap-") && name.ends_with(b".img") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Checks the lengths of the files of memory against the images. CRIU's restorer waits forever for
/// pages missing from a cut-off file (criu/pie/restorer.c goes on after a short read of nothing).
///
/// # Errors
/// Fails if a file is shorter, or cannot be read.
pub fn check_pages(directory: &Path) -> Result<(), ImageError> {
    let mut wanted = BTreeMap::<u64, u64>::new();
    for path in pagemaps(directory)? {
        let mut pagemap = Pagemap::open(&path)?;
        let sum = wanted.entry(pagemap.pages_id).or_default();
        while let Some((entry, _)) = pagemap.next()? {
            if entry.present {
                *sum = sum.saturating_add(entry.length);
            }
        }
    }
    for (id, length) in wanted {
        let path = pages_path(directory, id);
        // Nothing is stored for a task without private pages.
        let found = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound && length == 0 => 0,
            Err(source) => return Err(ImageError::Read { path, source }),
        };
        if found < length {
            return Err(damaged(&path, "it is cut off"));
        }
    }
    Ok(())
}
