//! Contents of a container's `/dev/shm` from outside: a pod's, or a volume in memory.
//!
//! CRIU takes such a mount for external and does not save the files in it, although processes map
//! them. A restore without the files fails, or finds empty ones. A `/dev/shm` of the container
//! alone is left to CRIU.
//!
//! Other containers of the pod run on meanwhile, and may be hostile: they may exchange a folder for
//! a link while this process, root on the host, looks at it. So the kernel never resolves a path
//! freely. Every folder is opened below the descriptor of the top, through no link and no mount;
//! every entry by its name in an open folder. A new entry is changed by its descriptor.

mod load;
mod save;
#[cfg(test)]
mod tests;
mod tree;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::StatFs;
use serde::{Deserialize, Serialize};

use tree::Tree;

/// Name of the archive among the images.
pub(crate) const FILE: &str = "dev-shm.tar";
const PLACE: &str = "/dev/shm";
/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;

/// A folder of the host that serves as a container's /dev/shm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shm {
    folder: PathBuf,
}

impl Shm {
    /// Finds the folder among `mounts`, given as destination and source of each bind mount. `None`
    /// if the folder is not in memory, and so stays, or is the host's own.
    pub fn find<'a>(mounts: impl Iterator<Item = (&'a Path, &'a Path)>) -> Option<Self> {
        let (_, source) = mounts.filter(|(destination, _)| is_place(destination)).last()?;
        let is_tmpfs = rustix::fs::statfs(source).is_ok_and(|StatFs { f_type, .. }| f_type == TMPFS);
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let is_hosts = device(source) == device(Path::new(PLACE));
        (is_tmpfs && !is_hosts).then(|| Self { folder: source.to_owned() })
    }

    /// Archives the contents among the images; nothing if the folder is empty. Files that vanish or
    /// change their kind meanwhile are left out.
    ///
    /// # Errors
    /// A file that cannot be read or written; folders nested deeper than the longest path.
    pub fn save(&self, images: &Path) -> io::Result<()> {
        let tree = Tree::open(&self.folder)?;
        if tree.is_empty()? {
            return Ok(());
        }
        let file = File::options().write(true).create_new(true).mode(0o600).open(images.join(FILE))?;
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
        save::save(&tree, &mut archive)?;
        archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error).map(drop)
    }

    /// Restores saved contents. An existing file is another container's, or newer, and stays.
    ///
    /// # Errors
    /// A file that cannot be read or made; an archive that is damaged or leads outside the folder.
    pub fn load(&self, images: &Path) -> io::Result<()> {
        // Through no link, and without waiting for a fifo's other end: anybody may have made the
        // checkpoint.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match File::options().read(true).custom_flags(flags).open(images.join(FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        load::load(&Tree::open(&self.folder)?, &file)
    }

    /// Returns whether a checkpoint has such contents.
    #[must_use]
    pub fn is_saved(images: &Path) -> bool {
        images.join(FILE).exists()
    }
}

fn is_place(path: &Path) -> bool {
    path.components().eq(Path::new(PLACE).components())
}
