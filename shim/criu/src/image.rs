//! A look into a directory of CRIU images, for what is wanted before a restore and after a dump.
//!
//! Every image file is two magic numbers and then entries, each a length and a protobuf message (images/*.proto of
//! CRIU); the inventory has one magic number. Images are untrusted: sizes are capped, nothing but regular files is
//! read, and fields that are not known are skipped.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use protobuf::CodedInputStream;
use protobuf::rt::WireType;
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// The file that makes a directory an image: written last, and read first.
pub const INVENTORY: &str = "inventory.img";
const PSTREE: &str = "pstree.img";
const STATS: &str = "stats-dump";

/// criu/include/magic.h.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const COMMON_MAGIC: u32 = 0x5456_4319;
const SERVICE_MAGIC: u32 = 0x5510_5940;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const STATS_MAGIC: u32 = 0x5709_3306;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

/// `PE_PRESENT` in criu/include/pagemap.h: the pages are in the file of pages.
const PAGE_PRESENT: u64 = 1 << 2;

/// Versions of the images' form that CRIU knows: `CRTOOLS_IMAGES_V1` and `V1_1`.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;

/// The entries looked at are some ten to hundred bytes.
const MAX_ENTRY: u32 = 1 << 20;
/// CRIU has three plugins.
const MAX_PLUGINS: usize = 64;

/// What an image says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Version of the images' form, 1 or 2. Not CRIU's.
    pub version: u32,
    /// Plugins without which it cannot be restored. None from CRIU before 4.1, which does not say.
    pub plugins: Option<Vec<String>>,
    /// TCP connections were closed by the dump: a restore must allow that too.
    pub tcp_close: bool,
}

/// What a dump took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Until the tree was stopped, in microseconds.
    pub freezing_us: u64,
    /// How long the tree was stopped, in microseconds.
    pub frozen_us: u64,
    /// Reading memory, in microseconds.
    pub memory_dump_us: u64,
    /// Writing memory, in microseconds.
    pub memory_write_us: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages that are in the parent image already.
    pub pages_skipped_parent: u64,
    /// Pages stored, of private memory and of shared.
    pub pages_written: u64,
}

/// Why a directory is no image that can be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It is something else, or a dump that did not come to its end.
    #[error("{path} holds no checkpoint: there is no {INVENTORY}")]
    NotAnImage {
        /// The directory.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what its name says, or is cut off.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It was written in a form that CRIU does not know.
    #[error("{path} has version {version}, and CRIU knows 1 and 2")]
    Version {
        /// The inventory.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// Reads a directory's inventory.
///
/// # Errors
/// When it holds no image, or a damaged one.
pub fn inspect(directory: &Path) -> Result<Image, ImageError> {
    let path = directory.join(INVENTORY);
    let entry = match entry(&path, &[INVENTORY_MAGIC]) {
        Err(ImageError::Read { source, .. })
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Err(ImageError::NotAnImage { path: directory.to_owned() });
        }
        other => other?,
    };
    let mut image = Image::default();
    fields(&path, &entry, |number, value| {
        match (number, value) {
            (1, Value::Number(version)) => image.version = u32::try_from(version).unwrap_or(u32::MAX),
            (10, Value::Number(on)) => image.tcp_close = on != 0,
            (12, Value::Bytes(plugins)) => image.plugins = Some(plugin_names(&path, plugins)?),
            _ => {}
        }
        Ok(())
    })?;
    if !VERSIONS.contains(&image.version) {
        return Err(ImageError::Version { path, version: image.version });
    }
    Ok(image)
}

fn plugin_names(path: &Path, entry: &[u8]) -> Result<Vec<String>, ImageError> {
    let mut names = vec![];
    fields(path, entry, |number, value| {
        if let (12, Value::Bytes(name)) = (number, value) {
            if names.len() == MAX_PLUGINS {
                return Err(damaged(path, "it names too many plugins"));
            }
            names.push(String::from_utf8_lossy(name).into_owned());
        }
        Ok(())
    })?;
    Ok(names)
}

/// Reads `stats-dump`, which CRIU writes into the work directory of a dump. None if there is none.
///
/// # Errors
/// When it cannot be read or is damaged.
pub fn dump_stats(directory: &Path) -> Result<Option<DumpStats>, ImageError> {
    let path = directory.join(STATS);
    let entry = match entry(&path, &[SERVICE_MAGIC, STATS_MAGIC]) {
        Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut stats = None;
    fields(&path, &entry, |number, value| {
        if let (1, Value::Bytes(dump)) = (number, value) {
            stats = Some(dump_stats_of(&path, dump)?);
        }
        Ok(())
    })?;
    Ok(stats)
}

fn dump_stats_of(path: &Path, entry: &[u8]) -> Result<DumpStats, ImageError> {
    let mut stats = DumpStats::default();
    fields(path, entry, |number, value| {
        let Value::Number(value) = value else { return Ok(()) };
        match number {
            1 => stats.freezing_us = value,
            2 => stats.frozen_us = value,
            3 => stats.memory_dump_us = value,
            4 => stats.memory_write_us = value,
            5 => stats.pages_scanned = value,
            6 => stats.pages_skipped_parent = value,
            // Shared memory is counted apart.
            7 | 14 => stats.pages_written = stats.pages_written.saturating_add(value),
            _ => {}
        }
        Ok(())
    })?;
    Ok(stats)
}

/// Reads a directory's inventory, and checks what CRIU does not: that the files of memory are whole.
///
/// # Errors
/// When it holds no image, or a damaged one.
pub fn check(directory: &Path) -> Result<Image, ImageError> {
    let image = inspect(directory)?;
    check_pages(directory)?;
    Ok(image)
}

/// The pid that the root had in its own pid namespace.
pub(crate) fn root_pid(directory: &Path) -> Result<Option<i32>, ImageError> {
    let path = directory.join(PSTREE);
    let entry = entry(&path, &[COMMON_MAGIC, PSTREE_MAGIC])?;
    let mut pid = None;
    fields(&path, &entry, |number, value| {
        if let (1, Value::Number(value)) = (number, value) {
            pid = i32::try_from(value).ok();
        }
        Ok(())
    })?;
    Ok(pid)
}

/// Checks that the files of memory are as long as the images say. CRIU's restorer waits forever for pages that a file
/// that was cut off does not have (criu/pie/restorer.c goes on after a short read of nothing).
pub(crate) fn check_pages(directory: &Path) -> Result<(), ImageError> {
    let failed = |source| ImageError::Read { path: directory.to_owned(), source };
    let mut wanted = BTreeMap::<u64, u64>::new();
    for file in std::fs::read_dir(directory).map_err(failed)? {
        let path = file.map_err(failed)?.path();
        let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
        if name.starts_with(b"pagemap-") && name.ends_with(b".img") {
            let (id, pages) = pages_of(&path)?;
            let sum = wanted.entry(id).or_default();
            *sum = sum.saturating_add(pages);
        }
    }
    let size = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
    for (id, pages) in wanted {
        let path = directory.join(format!("pages-{id}.img"));
        // Nothing is stored of a task without pages of its own.
        let found = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound && pages == 0 => 0,
            Err(source) => return Err(ImageError::Read { path, source }),
        };
        if found < pages.saturating_mul(size) {
            return Err(damaged(&path, "it is cut off"));
        }
    }
    Ok(())
}

/// Which file of pages a pagemap refers to, and to how many pages in it.
fn pages_of(path: &Path) -> Result<(u64, u64), ImageError> {
    let mut file = BufReader::new(open(path)?);
    magic(path, &mut file, &[COMMON_MAGIC, PAGEMAP_MAGIC])?;
    let mut id = 0;
    fields(path, &next_entry(path, &mut file)?.unwrap_or_default(), |number, value| {
        if let (1, Value::Number(value)) = (number, value) {
            id = value;
        }
        Ok(())
    })?;
    let mut pages = 0_u64;
    while let Some(entry) = next_entry(path, &mut file)? {
        let (mut count, mut long_count, mut in_parent, mut flags) = (0, None, false, None);
        fields(path, &entry, |number, value| {
            match (number, value) {
                (2, Value::Number(value)) => count = value,
                (3, Value::Number(value)) => in_parent = value != 0,
                (4, Value::Number(value)) => flags = Some(value),
                (5, Value::Number(value)) => long_count = Some(value),
                _ => {}
            }
            Ok(())
        })?;
        let present = flags.map_or(!in_parent, |flags| flags & PAGE_PRESENT != 0);
        if present {
            pages = pages.saturating_add(long_count.unwrap_or(count));
        }
    }
    Ok((id, pages))
}

/// The first entry of an image file.
fn entry(path: &Path, expected: &[u32]) -> Result<Vec<u8>, ImageError> {
    let mut file = open(path)?;
    magic(path, &mut file, expected)?;
    next_entry(path, &mut file)?.ok_or_else(|| damaged(path, "it is cut off"))
}

fn open(path: &Path) -> Result<File, ImageError> {
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    // Not through a link, and without waiting for a fifo's other end.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let file = File::from(file);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(damaged(path, "it is not a regular file"));
    }
    Ok(file)
}

fn magic(path: &Path, file: &mut impl Read, expected: &[u32]) -> Result<(), ImageError> {
    for expected in expected {
        match word(path, file)? {
            Some(found) if found == *expected => {}
            Some(_) => return Err(damaged(path, "it does not begin as CRIU's files do")),
            None => return Err(damaged(path, "it is cut off")),
        }
    }
    Ok(())
}

/// None at the end of the file.
fn next_entry(path: &Path, file: &mut impl Read) -> Result<Option<Vec<u8>>, ImageError> {
    let Some(length) = word(path, file)? else { return Ok(None) };
    if length > MAX_ENTRY {
        return Err(damaged(path, "an entry is too long"));
    }
    let mut entry = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    file.read_exact(&mut entry).map_err(|error| short(path, error))?;
    Ok(Some(entry))
}

/// None at the end of the file.
fn word(path: &Path, file: &mut impl Read) -> Result<Option<u32>, ImageError> {
    let mut bytes = [0; 4];
    let read = file.read(&mut bytes).map_err(|source| ImageError::Read { path: path.to_owned(), source })?;
    if read == 0 {
        return Ok(None);
    }
    file.read_exact(&mut bytes[read..]).map_err(|error| short(path, error))?;
    Ok(Some(u32::from_le_bytes(bytes)))
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls `each` for the fields of a message that are numbers, strings or messages.
fn fields(
    path: &Path,
    entry: &[u8],
    mut each: impl FnMut(u32, Value<'_>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let broken = |_: protobuf::Error| damaged(path, "an entry is not a message");
    let mut input = CodedInputStream::from_bytes(entry);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(broken)? {
        let number = tag >> 3;
        match WireType::new(tag & 7) {
            Some(WireType::Varint) => each(number, Value::Number(input.read_uint64().map_err(broken)?))?,
            Some(WireType::LengthDelimited) => each(number, Value::Bytes(&input.read_bytes().map_err(broken)?))?,
            Some(wire_type) => input.skip_field(wire_type).map_err(broken)?,
            None => return Err(damaged(path, "an entry is not a message")),
        }
    }
    Ok(())
}

fn damaged(path: &Path, what: &'static str) -> ImageError {
    ImageError::Damaged { path: path.to_owned(), what }
}

fn short(path: &Path, source: io::Error) -> ImageError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => damaged(path, "it is cut off"),
        _ => ImageError::Read { path: path.to_owned(), source },
    }
}
