//! Listing of the store's contents.

use std::collections::BTreeMap;
use std::time::SystemTime;

use rustix::fs::FlockOperation;

use crate::folder::{FileError, Lock};
use crate::reach::{Reach, blob_files};
use crate::remove::last_use;
use crate::snapshot::use_file;
use crate::store::ReadError;
use crate::{Config, Digest, Manifest, ManifestError, Name, Store};

/// A snapshot of the store.
#[derive(Debug)]
pub struct Listed {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Names of the snapshot, oldest first.
    pub names: Vec<Name>,
    /// Time of the last use or of the publication.
    pub last_used: Option<SystemTime>,
    /// True if a process uses the snapshot now.
    pub in_use: bool,
    /// Size of all the snapshot's blobs in bytes, shared ones included.
    pub size: u64,
    /// Bytes that a removal would free.
    pub unique: u64,
    /// Manifest and config, or the reason for which they cannot be read.
    pub content: Result<(Manifest, Config), ReadError>,
}

/// Sizes of a store's contents, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All blobs.
    pub blobs: u64,
    /// Blobs that no entry needs.
    pub garbage: u64,
    /// Size of the snapshots if no blob were shared.
    pub unshared: u64,
}

impl Store {
    /// All snapshots, sorted by name; snapshots without a name come last.
    ///
    /// # Errors
    /// A damaged index, and errors of the file system. A damaged snapshot is listed.
    pub fn list(&self) -> Result<Vec<Listed>, ReadError> {
        let folders = &self.folders;
        // Exclusive: two listings at once would take each other for users of a snapshot.
        let _lock = folders.lock(FlockOperation::LockExclusive)?;
        let index = folders.index()?;
        let (reach, files) = (Reach::of(folders, &index), blob_files(folders)?);
        let counts = reach.counts();
        let size = |digest: &Digest| files.get(digest).map_or(0, |file| file.size);
        let mut listed: BTreeMap<Digest, Listed> = BTreeMap::new();
        for entry in index.entries() {
            let digest = entry.digest;
            if listed.contains_key(&digest) {
                continue;
            }
            let content = folders.manifest(digest).and_then(|manifest| {
                let config = folders.config(&manifest)?;
                Ok((manifest, config))
            });
            // An image stored by another tool.
            let foreign = matches!(&content, Err(ReadError::Manifest { source: ManifestError::Foreign { .. }, .. }));
            if foreign && !entry.certain {
                continue;
            }
            let path = folders.uses.join(digest.hex());
            let file = use_file(folders, digest)?;
            let free = Lock::attempt(file, FlockOperation::NonBlockingLockExclusive);
            let free = free.map_err(FileError::new("lock", path))?.is_some();
            let blobs = reach.trees.get(&digest);
            let of_its_own = |blob: &&Digest| counts.get(blob) == Some(&1);
            listed.insert(
                digest,
                Listed {
                    digest,
                    names: index.names_of(digest),
                    last_used: last_use(self, digest),
                    in_use: !free,
                    size: blobs.into_iter().flatten().map(size).sum(),
                    unique: blobs.into_iter().flatten().filter(of_its_own).map(size).sum(),
                    content,
                },
            );
        }
        let mut listed: Vec<Listed> = listed.into_values().collect();
        listed.sort_by(|a, b| (a.names.is_empty(), &a.names).cmp(&(b.names.is_empty(), &b.names)));
        Ok(listed)
    }

    /// Measures the store's contents.
    ///
    /// # Errors
    /// A damaged index, and errors of the file system.
    pub fn usage(&self) -> Result<Usage, ReadError> {
        let folders = &self.folders;
        let _lock = folders.lock(FlockOperation::LockShared)?;
        let (reach, files) = (Reach::of(folders, &folders.index()?), blob_files(folders)?);
        let counts = reach.counts();
        let mut usage = Usage::default();
        for (digest, file) in files {
            let count = counts.get(&digest).copied().unwrap_or_default();
            usage.blobs += file.size;
            usage.unshared += file.size * count as u64;
            if count == 0 {
                usage.garbage += file.size;
            }
        }
        Ok(usage)
    }
}
