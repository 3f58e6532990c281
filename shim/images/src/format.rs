//! Format of CRIU's images: names of files, magic numbers, and possible faults.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// File that makes a directory an image: written last, and read first.
pub const INVENTORY: &str = "inventory.img";
/// Plugin named by an inventory after memory was taken out of its images.
pub const MARK: &str = "gpusnap";
pub(crate) const PSTREE: &str = "pstree.img";

/// Numbers of criu/include/magic.h.
pub(crate) const INVENTORY_MAGIC: u32 = 0x5831_3116;
pub(crate) const COMMON_MAGIC: u32 = 0x5456_4319;
pub(crate) const PSTREE_MAGIC: u32 = 0x5027_3030;
pub(crate) const PAGEMAP_MAGIC: u32 = 0x5608_4025;
pub(crate) const MM_MAGIC: u32 = 0x5749_2820;
pub(crate) const CORE_MAGIC: u32 = 0x5505_3847;
pub(crate) const IDS_MAGIC: u32 = 0x5443_2030;
pub(crate) const FDINFO_MAGIC: u32 = 0x5621_3732;
pub(crate) const SECCOMP_MAGIC: u32 = 0x6441_3049;
pub(crate) const FILES_MAGIC: u32 = 0x5630_3138;

/// Fault of a directory of images.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The directory holds something else, or an incomplete dump.
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
        /// Reason from the system.
        source: io::Error,
    },
    /// A file does not match its name, or is cut off.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Fault of the file.
        what: &'static str,
    },
    /// The image has a version unknown to CRIU.
    #[error("{path} has version {version}, and CRIU knows 1 and 2")]
    Version {
        /// The inventory.
        path: PathBuf,
        /// Version found.
        version: u32,
    },
}

pub(crate) fn damaged(path: &Path, what: &'static str) -> ImageError {
    ImageError::Damaged { path: path.to_owned(), what }
}
