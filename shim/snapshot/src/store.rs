//! The store: folders, lock, and reading.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;

use crate::folder::{FileError, Folder, Lock, unless_missing};
use crate::index::{Index, IndexError};
use crate::manifest::{DOCUMENT_LIMIT, ManifestError};
use crate::{Digest, Manifest};

/// Default folder of a node's snapshots.
pub const DEFAULT_ROOT: &str = "/var/lib/gpusnap";

const INDEX: &str = "index.json";
const LAYOUT: &str = "oci-layout";
pub(crate) const LAYOUT_CONTENT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const LOCK: &str = "lock";
/// File that keeps room for a smaller index, so that snapshots can be removed on a full disk.
const RESERVE: &str = "reserve";
/// Size of the reserve in bytes: an index of 500 snapshots.
const RESERVE_SIZE: u64 = 256 << 10;
/// Entries of a store, and of a new file system.
const KNOWN: [&str; 11] = [
    INDEX,
    RESERVE,
    "index.json.new",
    LAYOUT,
    "oci-layout.new",
    LOCK,
    "blobs",
    "drafts",
    "partial",
    "uses",
    "lost+found",
];

/// Guarantee that a published snapshot survives a crash of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Only config, manifest and index are flushed. A crash of the machine within about half a
    /// minute may leave layers missing or short. Opening such a snapshot detects that by size;
    /// earlier snapshots and all names survive.
    #[default]
    Process,
    /// Layers are flushed before the index names them, at the speed of the disk: half a minute for
    /// 30 GB at 1 GB/s.
    Machine,
}

/// A store of snapshots. Clones share the store, as do other processes with the same root.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) folders: Arc<Folders>,
    pub(crate) durability: Durability,
}

#[derive(Debug)]
pub(crate) struct Folders {
    pub(crate) root: Folder,
    pub(crate) blobs: Folder,
    pub(crate) drafts: Folder,
    pub(crate) partial: Folder,
    pub(crate) uses: Folder,
}

/// Failure to open a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file or a folder of the store cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder has an entry unknown to stores.
    #[error("{} is no store: it has {found:?} in it", path.display())]
    NotAStore {
        /// The folder.
        path: PathBuf,
        /// The entry.
        found: String,
    },
    /// The folder is not a store, and a reader makes none.
    #[error("{} is no store", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
    },
    /// The folder belongs to another user, able to change what is restored.
    #[error("{} belongs to user {owner}", path.display())]
    Owner {
        /// The folder.
        path: PathBuf,
        /// The owner's user id.
        owner: u32,
    },
    /// The store had snapshots, and the index is missing.
    #[error("{} is damaged: it has no {missing}", path.display())]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// The missing file.
        missing: &'static str,
    },
    /// The folder is not an OCI image layout of a known version.
    #[error("{} is of a version that this gpusnap does not know", path.display())]
    Layout {
        /// The path of `oci-layout`.
        path: PathBuf,
    },
}

/// Failure to read the store's index, or a snapshot's manifest or config.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The index is damaged.
    #[error("{} is damaged", path.display())]
    Index {
        /// The path of the index.
        path: PathBuf,
        /// The damage.
        #[source]
        source: IndexError,
    },
    /// A manifest or a config does not match the digest.
    #[error("{digest} is damaged: digest mismatch")]
    Digest {
        /// The expected digest.
        digest: Digest,
    },
    /// The manifest is not a snapshot's, or belongs to a later version.
    #[error("{digest} is not a usable snapshot")]
    Manifest {
        /// The manifest.
        digest: Digest,
        /// The cause.
        #[source]
        source: ManifestError,
    },
    /// The config is damaged or belongs to a later version.
    #[error("{digest} is not a usable snapshot")]
    Config {
        /// The manifest.
        digest: Digest,
        /// The cause.
        #[source]
        source: crate::ConfigError,
    },
}

impl Store {
    /// Opens the store at `root`, and makes a missing one. Only the owner can enter the folder.
    ///
    /// # Errors
    /// A folder of other content or of another user, a damaged store, and errors of the file
    /// system.
    pub fn open(root: &Path) -> Result<Self, OpenError> {
        let at = |action| FileError::new(action, root);
        let root = std::path::absolute(root).map_err(at("find"))?;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(at("make"))?;
        let folder = Folder::open(&root).map_err(at("open"))?;
        for found in folder.names().map_err(at("read"))? {
            if !KNOWN.iter().any(|known| found == OsStr::new(known)) {
                return Err(OpenError::NotAStore { path: root, found: found.to_string_lossy().into_owned() });
            }
        }
        let metadata = check_owner(&root)?;
        // The top of a file system made for the store is open to all.
        if metadata.mode() & 0o777 != 0o700 {
            let closed = std::fs::Permissions::from_mode(0o700);
            std::fs::set_permissions(&root, closed).map_err(at("close to others"))?;
        }
        let _lock = lock(&folder, FlockOperation::LockExclusive)?;
        initialise(&folder)?;
        let folders = Folders::of(folder)?;
        folders.keep_reserve();
        Ok(Self { folders: Arc::new(folders), durability: Durability::default() })
    }

    /// Opens the store at `root` for reading: no file is made, and no permissions are changed.
    ///
    /// # Errors
    /// No store, a damaged one, one of another user, and errors of the file system.
    pub fn open_to_read(root: &Path) -> Result<Self, OpenError> {
        let at = |action| FileError::new(action, root);
        let root = std::path::absolute(root).map_err(at("find"))?;
        let missing = || OpenError::Missing { path: root.clone() };
        let folder = unless_missing(Folder::open(&root)).map_err(at("open"))?.ok_or_else(missing)?;
        let layout = unless_missing(folder.read(LAYOUT, 4096)).map_err(at("read"))?.ok_or_else(missing)?;
        check_layout(&folder, &layout)?;
        check_owner(&root)?;
        if unless_missing(folder.file(INDEX)).map_err(at("read"))?.is_none() {
            return Err(OpenError::Damaged { path: root, missing: INDEX });
        }
        Ok(Self { folders: Arc::new(Folders::of(folder)?), durability: Durability::default() })
    }

    /// The same store, with this durability for publications.
    #[must_use]
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.folders.root.path()
    }

    /// Size in bytes of a blob; `None` if it is missing. Transfers skip the blobs that are in the
    /// store.
    ///
    /// # Errors
    /// The blob cannot be examined, or is not a regular file.
    pub fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, FileError> {
        self.folders.blob_size(*digest)
    }
}

/// Checks the owner: another user could change what is restored.
fn check_owner(root: &Path) -> Result<std::fs::Metadata, OpenError> {
    let metadata = std::fs::metadata(root).map_err(FileError::new("look at", root))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(OpenError::Owner { path: root.to_owned(), owner: metadata.uid() });
    }
    Ok(metadata)
}

fn check_layout(folder: &Folder, layout: &[u8]) -> Result<(), OpenError> {
    let known = serde_json::from_slice::<oci_spec::image::OciLayout>(layout)
        .is_ok_and(|layout| layout.image_layout_version().starts_with("1."));
    if known { Ok(()) } else { Err(OpenError::Layout { path: folder.join(LAYOUT) }) }
}

/// Makes the missing parts of a new store, also after a crash.
fn initialise(folder: &Folder) -> Result<(), OpenError> {
    let path = |name: &str| folder.join(name);
    let layout = unless_missing(folder.read(LAYOUT, 4096)).map_err(FileError::new("read", path(LAYOUT)))?;
    let has_index = unless_missing(folder.file(INDEX)).map_err(FileError::new("open", path(INDEX)))?.is_some();
    for name in ["blobs", "blobs/sha256", "drafts", "partial", "uses"] {
        folder.make(name).map_err(FileError::new("make", path(name)))?;
    }
    if let Some(layout) = layout {
        if !has_index {
            return Err(OpenError::Damaged { path: folder.path().into(), missing: INDEX });
        }
        return check_layout(folder, &layout);
    }
    if !has_index {
        let blobs = folder.sub("blobs/sha256").and_then(|blobs| blobs.names());
        if !blobs.map_err(FileError::new("read", path("blobs/sha256")))?.is_empty() {
            return Err(OpenError::Damaged { path: folder.path().into(), missing: INDEX });
        }
        let empty = Index::empty().to_bytes().expect("an empty index is small JSON");
        folder.replace(INDEX, &empty).map_err(FileError::new("write", path(INDEX)))?;
    }
    // Last step: from now on the index is never missing.
    folder.replace(LAYOUT, LAYOUT_CONTENT).map_err(FileError::new("write", path(LAYOUT)))?;
    Ok(())
}

fn lock(root: &Folder, operation: FlockOperation) -> Result<Lock<File>, FileError> {
    let path = || root.join(LOCK);
    let file = root.lockable(LOCK).map_err(FileError::new("open", path()))?;
    Lock::wait(file, operation).map_err(FileError::new("lock", path()))
}

impl Folders {
    /// Opens the folders of a complete store.
    fn of(root: Folder) -> Result<Self, FileError> {
        let sub = |name| root.sub(name).map_err(FileError::new("open", root.join(name)));
        let (blobs, drafts, partial, uses) = (sub("blobs/sha256")?, sub("drafts")?, sub("partial")?, sub("uses")?);
        Ok(Self { root, blobs, drafts, partial, uses })
    }

    /// Waits for the store's lock. `LockShared`: all that the index names stays; `LockExclusive`:
    /// the index may be replaced. The lock is held for renames and small reads only, never while
    /// bytes of layers are moved.
    pub(crate) fn lock(&self, operation: FlockOperation) -> Result<Lock<File>, FileError> {
        lock(&self.root, operation)
    }

    pub(crate) fn index(&self) -> Result<Index, ReadError> {
        let path = self.root.join(INDEX);
        let bytes = self.root.read(INDEX, DOCUMENT_LIMIT).map_err(FileError::new("read", &path))?;
        Index::parse(&bytes).map_err(|source| ReadError::Index { path, source })
    }

    /// Replaces the index. Requires the exclusive lock. With `with_reserve`, a full disk costs the
    /// reserve.
    pub(crate) fn write_index(&self, index: &Index, with_reserve: bool) -> Result<(), ReadError> {
        let path = self.root.join(INDEX);
        let bytes = index.to_bytes().map_err(|source| ReadError::Index { path: path.clone(), source })?;
        match self.root.replace(INDEX, &bytes) {
            Err(full) if with_reserve && full.kind() == io::ErrorKind::StorageFull => {
                unless_missing(self.root.unlink(RESERVE)).map_err(FileError::new("free", self.root.join(RESERVE)))?;
                self.root.replace(INDEX, &bytes)
            }
            result => result,
        }
        .map_err(FileError::new("write", path))?;
        Ok(())
    }

    /// Makes the reserve if it is missing. A failure is ignored: a full disk cannot be relieved
    /// then, and no remedy exists.
    pub(crate) fn keep_reserve(&self) {
        let make = || -> io::Result<()> {
            let file = self.root.create(RESERVE)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_SIZE)?;
            Ok(())
        };
        match make() {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                tracing::debug!("no room is kept for the index: {error}");
                let _ = self.root.unlink(RESERVE);
            }
            _ => {}
        }
    }

    /// The bytes of a small blob, checked against the digest.
    pub(crate) fn document(&self, digest: Digest) -> Result<Vec<u8>, ReadError> {
        let path = self.blobs.join(digest.hex());
        let bytes = self.blobs.read(digest.hex(), DOCUMENT_LIMIT).map_err(FileError::new("read", path))?;
        if Digest::of(&bytes) != digest {
            return Err(ReadError::Digest { digest });
        }
        Ok(bytes)
    }

    pub(crate) fn manifest(&self, digest: Digest) -> Result<Manifest, ReadError> {
        Manifest::parse(&self.document(digest)?).map_err(|source| ReadError::Manifest { digest, source })
    }

    pub(crate) fn config(&self, manifest: &Manifest) -> Result<crate::Config, ReadError> {
        let bytes = self.document(manifest.config().digest)?;
        crate::Config::parse(&bytes).map_err(|source| ReadError::Config { digest: manifest.digest(), source })
    }

    pub(crate) fn blob(&self, digest: Digest) -> Result<File, FileError> {
        self.blobs.file(digest.hex()).map_err(FileError::new("open", self.blobs.join(digest.hex())))
    }

    pub(crate) fn blob_size(&self, digest: Digest) -> Result<Option<u64>, FileError> {
        let size = || -> io::Result<Option<u64>> {
            Ok(match unless_missing(self.blobs.file(digest.hex()))? {
                Some(file) => Some(file.metadata()?.len()),
                None => None,
            })
        };
        size().map_err(FileError::new("look at", self.blobs.join(digest.hex())))
    }
}
