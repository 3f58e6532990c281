//! An image's statements about itself.

use std::io;
use std::path::Path;

use crate::format::{INVENTORY, INVENTORY_MAGIC, ImageError, MARK, damaged};
use crate::pages::check_pages;
use crate::tree;
use crate::wire::{Field, MAX_ENTRY, Value, fields, first_entry};

/// Versions of the image format known to CRIU: `CRTOOLS_IMAGES_V1` and `V1_1`.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;

/// Most plugins in an inventory. CRIU has three.
pub(crate) const MAX_PLUGINS: usize = 64;

/// Statements of an image about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Version of the image format, 1 or 2. Not CRIU's version.
    pub version: u32,
    /// Plugins needed for a restore. `None` from CRIU before 4.1, which does not record plugins.
    pub plugins: Option<Vec<String>>,
    /// The dump closed TCP connections: a restore must allow that too.
    pub tcp_close: bool,
}

/// Checks that every thread of the tree has a file. CRIU takes a missing file for an empty one. The
/// file's name is only in the log, at a level with lines for every page.
///
/// # Errors
/// Fails if a file is missing, or the tree cannot be read.
pub fn check_threads(directory: &Path) -> Result<(), ImageError> {
    for thread in tree::processes(directory)?.iter().flat_map(|process| &process.threads) {
        let path = tree::core_path(directory, *thread);
        if let Err(source) = path.metadata() {
            return Err(ImageError::Read { path, source });
        }
    }
    Ok(())
}

impl Image {
    /// Returns whether memory was taken out, to be filled after a restore.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.plugins.iter().flatten().any(|plugin| plugin == MARK)
    }
}

/// Reads a directory's inventory.
///
/// # Errors
/// Fails if the directory holds no image, or a damaged one.
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

/// Reads a directory's inventory, and checks a point beyond CRIU's checks: complete files of
/// memory.
///
/// # Errors
/// Fails if the directory holds no image, or a damaged one.
pub fn check(directory: &Path) -> Result<Image, ImageError> {
    let image = inspect(directory)?;
    check_pages(directory)?;
    Ok(image)
}
