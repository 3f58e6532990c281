//! The open files of all processes, read whole, changed in memory, and written at once.

use std::io;
use std::path::{Path, PathBuf};

use crate::devices::{FILES, FILES_START, write};
use crate::format::{ImageError, damaged};
use crate::rewrite::RewriteError;
use crate::wire::{MAX_ENTRY, Reader};

/// Most bytes of all open files together: a million files have some hundred million.
const MAX_BYTES: usize = 1 << 30;

/// The open files in a directory of images. Changes are in memory until [`Self::write`].
#[derive(Debug)]
pub struct OpenFiles {
    pub(crate) images: PathBuf,
    /// The file that was read, for messages.
    pub(crate) path: PathBuf,
    pub(crate) entries: Vec<Vec<u8>>,
    pub(crate) is_changed: bool,
    /// Names of images that no open file has any more.
    pub(crate) unused: Vec<String>,
}

impl OpenFiles {
    /// Reads the open files.
    ///
    /// # Errors
    /// Fails if the file is damaged, or cannot be read.
    pub fn read(images: &Path) -> Result<Self, ImageError> {
        let path = images.join(FILES);
        let mut reader = Reader::open(&path, &FILES_START)?;
        let (mut entries, mut bytes) = (vec![], 0);
        while let Some(entry) = reader.entry(MAX_ENTRY)? {
            bytes += entry.len() + size_of::<Vec<u8>>();
            if bytes > MAX_BYTES {
                return Err(damaged(&path, "it is too long"));
            }
            entries.push(entry);
        }
        Ok(Self { images: images.to_owned(), path, entries, is_changed: false, unused: vec![] })
    }

    /// Returns whether there is anything to write.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.is_changed
    }

    /// Writes the open files into a directory of the same images, and removes images without a use there.
    ///
    /// # Errors
    /// Fails if a file cannot be written or removed. The images are useless then.
    pub fn write(self, images: &Path) -> Result<(), RewriteError> {
        if !self.is_changed {
            return Ok(());
        }
        write(&images.join(FILES), &FILES_START, &self.entries)?;
        for name in self.unused {
            let path = images.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RewriteError::File { action: "remove", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
