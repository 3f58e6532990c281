//! A snapshot in use, safe from removal.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW};

use crate::folder::{FileError, Lock};
use crate::index::Index;
use crate::store::{Folders, ReadError};
use crate::{Config, Digest, Layer, Manifest, Name, Reference, Store};

/// A snapshot in use.
#[derive(Debug)]
pub struct Snapshot {
    folders: Arc<Folders>,
    names: Vec<Name>,
    manifest: Manifest,
    config: Config,
    /// Shared lock that marks the snapshot as in use.
    _use: Lock<File>,
}

/// Failure to find one snapshot for a reference.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No snapshot has the name or digest.
    #[error("there is no snapshot {reference}")]
    Missing {
        /// The reference.
        reference: Reference,
    },
    /// Several digests begin with the prefix.
    #[error("{prefix} is the beginning of {count} snapshots' digests")]
    Ambiguous {
        /// The prefix.
        prefix: String,
        /// The number of snapshots.
        count: usize,
    },
}

/// Failure to open a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no such snapshot.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The index, the manifest or the config is damaged, or of a later version.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A layer is gone.
    #[error("the snapshot {snapshot} is damaged: {blob} is missing")]
    Missing {
        /// The snapshot.
        snapshot: Digest,
        /// The layer.
        blob: Digest,
    },
    /// A layer has another size than in the manifest.
    #[error("the snapshot {snapshot} is damaged: {blob} has {found} bytes, where the manifest says {expected}")]
    Size {
        /// The snapshot.
        snapshot: Digest,
        /// The layer.
        blob: Digest,
        /// The layer's size in bytes.
        found: u64,
        /// The size in the manifest.
        expected: u64,
    },
}

impl Store {
    /// Opens a snapshot for use, and notes the time of use. The digests of the manifest and the
    /// config are checked. Layers are checked by size only; their bytes are not read.
    ///
    /// # Errors
    /// No such snapshot, a damaged one, or one of a later version.
    pub fn open_snapshot(&self, reference: &Reference) -> Result<Snapshot, SnapshotError> {
        let folders = &self.folders;
        let (digest, names, snapshot_use) = {
            let _lock = folders.lock(FlockOperation::LockShared)?;
            let index = folders.index()?;
            let digest = resolve(&index, reference)?;
            (digest, index.names_of(digest), Snapshot::begin_use(folders, digest)?)
        };
        let manifest = folders.manifest(digest)?;
        let config = folders.config(&manifest)?;
        for layer in manifest.layers() {
            let expected = layer.size;
            match folders.blob_size(layer.digest)? {
                Some(found) if found == expected => {}
                Some(found) => {
                    return Err(SnapshotError::Size { snapshot: digest, blob: layer.digest, found, expected });
                }
                None => return Err(SnapshotError::Missing { snapshot: digest, blob: layer.digest }),
            }
        }
        Ok(Snapshot::new(Arc::clone(folders), names, manifest, config, snapshot_use))
    }
}

impl Store {
    /// Gives a snapshot a further name. Another snapshot with the same name loses the name.
    ///
    /// # Errors
    /// No such snapshot, a damaged one, or a damaged index; errors of the file system.
    pub fn tag(&self, reference: &Reference, name: &Name) -> Result<Digest, SnapshotError> {
        let folders = &self.folders;
        let _lock = folders.lock(FlockOperation::LockExclusive)?;
        let mut index = folders.index()?;
        let digest = resolve(&index, reference)?;
        index.add(&folders.manifest(digest)?, Some(name));
        folders.write_index(&index, false)?;
        Ok(digest)
    }
}

/// Finds the snapshot of a reference.
pub(crate) fn resolve(index: &Index, reference: &Reference) -> Result<Digest, ResolveError> {
    let missing = || ResolveError::Missing { reference: reference.clone() };
    match reference {
        Reference::Name(name) => index.named(name).ok_or_else(missing),
        Reference::Digest(digest) if index.contains(*digest) => Ok(*digest),
        Reference::Digest(_) => Err(missing()),
        Reference::Prefix(prefix) => {
            let found: BTreeSet<Digest> = index.entries().map(|entry| entry.digest).collect();
            let found: Vec<Digest> = found.into_iter().filter(|digest| digest.hex().starts_with(prefix)).collect();
            match found[..] {
                [digest] => Ok(digest),
                [] => Err(missing()),
                _ => Err(ResolveError::Ambiguous { prefix: prefix.clone(), count: found.len() }),
            }
        }
    }
}

/// Marks a snapshot as in use until the file is closed. Requires the store's lock.
pub(crate) fn hold(folders: &Folders, digest: Digest) -> Result<Lock<File>, FileError> {
    let held = Lock::wait(use_file(folders, digest)?, FlockOperation::LockShared);
    held.map_err(FileError::new("lock", folders.uses.join(digest.hex())))
}

/// The record of use: a lock on the file marks a snapshot as in use, and the file's time is the
/// last use.
pub(crate) fn use_file(folders: &Folders, digest: Digest) -> Result<File, FileError> {
    folders.uses.lockable(digest.hex()).map_err(FileError::new("open", folders.uses.join(digest.hex())))
}

impl Snapshot {
    pub(crate) fn new(
        folders: Arc<Folders>,
        names: Vec<Name>,
        manifest: Manifest,
        config: Config,
        r#use: Lock<File>,
    ) -> Self {
        Self { folders, names, manifest, config, _use: r#use }
    }

    /// Marks a snapshot as in use until the file is closed, and notes the time. Requires the
    /// store's lock.
    pub(crate) fn begin_use(folders: &Folders, digest: Digest) -> Result<Lock<File>, FileError> {
        let held = hold(folders, digest)?;
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        let touched = rustix::fs::futimens(held.file(), &times);
        touched.map_err(|error| FileError::new("touch", folders.uses.join(digest.hex()))(error.into()))?;
        Ok(held)
    }

    /// The digest of the manifest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.manifest.digest()
    }

    /// The names at the time of opening.
    #[must_use]
    pub fn names(&self) -> &[Name] {
        &self.names
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The snapshot's origin.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The layers of a media type, in the order of the manifest.
    pub fn layers_of<'a>(&'a self, media_type: &'a str) -> impl Iterator<Item = &'a Layer> {
        self.manifest.layers().iter().filter(move |layer| layer.media_type == media_type)
    }

    /// The path of a blob. Never change the file.
    #[must_use]
    pub fn path(&self, blob: &Digest) -> PathBuf {
        self.folders.blobs.join(blob.hex())
    }

    /// A layer's file, open for reading.
    ///
    /// # Errors
    /// The file is missing or not a regular file.
    pub fn open(&self, layer: &Layer) -> Result<File, FileError> {
        self.folders.blob(layer.digest)
    }
}
