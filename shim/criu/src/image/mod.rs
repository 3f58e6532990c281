//! A look into a directory of CRIU images, for what is wanted before a restore and after a dump.
//!
//! Every image file is two magic numbers and then entries, each a length and a protobuf message (images/*.proto of
//! CRIU); the inventory has one magic number. Images are untrusted: sizes are capped, nothing but regular files is
//! read, and fields that are not known are skipped.

pub mod memory;
mod pages;
mod rewrite;
mod sharing;
mod vma;
pub(crate) mod wire;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub(crate) use crate::image::pages::check_pages;
use crate::image::wire::{Field, MAX_ENTRY, Value, fields, first_entry};

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
const MM_MAGIC: u32 = 0x5749_2820;
const CORE_MAGIC: u32 = 0x5505_3847;

/// Versions of the images' form that CRIU knows: `CRTOOLS_IMAGES_V1` and `V1_1`.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;

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

/// Looks whether every thread of the tree is there. CRIU takes a file that is missing for an empty one, and says which only
/// among the lines of its log that nobody wants for each page.
///
/// # Errors
/// When one is not, or the tree cannot be read.
pub fn check_threads(directory: &Path) -> Result<(), ImageError> {
    for thread in memory::processes(directory)?.iter().flat_map(|process| &process.threads) {
        let path = memory::core_path(directory, *thread);
        if let Err(source) = path.metadata() {
            return Err(ImageError::Read { path, source });
        }
    }
    Ok(())
}

/// Reads a directory's inventory.
///
/// # Errors
/// When it holds no image, or a damaged one.
pub fn inspect(directory: &Path) -> Result<Image, ImageError> {
    let path = directory.join(INVENTORY);
    let entry = match first_entry(&path, &[INVENTORY_MAGIC], MAX_ENTRY) {
        Err(ImageError::Read { source, .. })
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Err(ImageError::NotAnImage { path: directory.to_owned() });
        }
        other => other?,
    };
    let mut image = Image::default();
    fields(&path, &entry, |Field { number, value, .. }| {
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
    fields(path, entry, |Field { number, value, .. }| {
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
    let entry = match first_entry(&path, &[SERVICE_MAGIC, STATS_MAGIC], MAX_ENTRY) {
        Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut stats = None;
    fields(&path, &entry, |Field { number, value, .. }| {
        if let (1, Value::Bytes(dump)) = (number, value) {
            stats = Some(dump_stats_of(&path, dump)?);
        }
        Ok(())
    })?;
    Ok(stats)
}

fn dump_stats_of(path: &Path, entry: &[u8]) -> Result<DumpStats, ImageError> {
    let mut stats = DumpStats::default();
    fields(path, entry, |Field { number, value, .. }| {
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
    let entry = first_entry(&path, &[COMMON_MAGIC, PSTREE_MAGIC], MAX_ENTRY)?;
    let mut pid = None;
    fields(&path, &entry, |Field { number, value, .. }| {
        if let (1, Value::Number(value)) = (number, value) {
            pid = i32::try_from(value).ok();
        }
        Ok(())
    })?;
    Ok(pid)
}

fn damaged(path: &Path, what: &'static str) -> ImageError {
    ImageError::Damaged { path: path.to_owned(), what }
}
