//! The form of CRIU's images: names of files, magic numbers, and what can be wrong with them.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The file that makes a directory an image: written last, and read first.
pub const INVENTORY: &str = "inventory.img";
/// The plugin that an inventory names when memory was cut from its images.
pub const MARK: &str = "gpusnap";
pub(crate) const PSTREE: &str = "pstree.img";
pub(crate) const STATS: &str = "stats-dump";

/// criu/include/magic.h.
pub(crate) const INVENTORY_MAGIC: u32 = 0x5831_3116;
pub(crate) const COMMON_MAGIC: u32 = 0x5456_4319;
pub(crate) const SERVICE_MAGIC: u32 = 0x5510_5940;
pub(crate) const PSTREE_MAGIC: u32 = 0x5027_3030;
pub(crate) const STATS_MAGIC: u32 = 0x5709_3306;
pub(crate) const PAGEMAP_MAGIC: u32 = 0x5608_4025;
pub(crate) const MM_MAGIC: u32 = 0x5749_2820;
pub(crate) const CORE_MAGIC: u32 = 0x5505_3847;

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

pub(crate) fn damaged(path: &Path, what: &'static str) -> ImageError {
    ImageError::Damaged { path: path.to_owned(), what }
}
