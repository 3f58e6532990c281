//! Removal of snapshots, of garbage, and of all that exceeds a quota.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use crate::draft::{Trash, collect};
use crate::folder::{FileError, Lock, unless_missing};
use crate::index::{Entry, Index};
use crate::reach::{BlobFile, Reach, blob_files};
use crate::snapshot::{resolve, use_file};
use crate::store::ReadError;
use crate::{Digest, Reference, ResolveError, Store};

/// Default age below which blobs without an entry are spared: tools that ignore the store's lock
/// write blobs first and the index last.
pub const GRACE: Duration = Duration::from_secs(3600);

/// Age below which an interrupted transfer is kept for another attempt.
const PARTIAL_GRACE: Duration = Duration::from_secs(24 * 3600);

/// Treatment of a snapshot in use that is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfInUse {
    /// The removal fails.
    Refuse,
    /// The removal waits for the end of the use, however long that takes.
    Wait,
}

/// Limits of a prune.
#[derive(Clone, Copy, Debug)]
pub struct Prune {
    /// Blobs without an entry are removed if older than this.
    pub grace: Duration,
    /// Snapshots without a name are removed if last used this long ago. `None` keeps them.
    pub unnamed: Option<Duration>,
}

/// Result of a removal.
#[derive(Debug, Default)]
pub struct Removed {
    /// Removed snapshots.
    pub snapshots: Vec<Digest>,
    /// Number of removed blobs.
    pub blobs: usize,
    /// Size of the removed blobs in bytes.
    pub bytes: u64,
    /// Number of removed drafts of dead makers.
    pub drafts: usize,
    /// Bytes of abandoned partial blobs.
    pub partial: u64,
    /// Snapshots kept because they are in use.
    pub in_use: Vec<Digest>,
    /// Manifests that cannot be read. While there is one, nobody knows its blobs, and no blob is
    /// removed.
    pub unreadable: Vec<Digest>,
    /// Size of the remaining blobs, in bytes.
    pub left: u64,
}

/// Failure of a removal. All snapshots with an entry are whole.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The index is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no such snapshot.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The snapshot is in use.
    #[error("the snapshot {digest} is in use")]
    InUse {
        /// The snapshot.
        digest: Digest,
    },
}

impl Store {
    /// Removes a snapshot, and the blobs that no other snapshot needs. If a reference by name finds
    /// a snapshot with several names, only that name is removed.
    ///
    /// # Errors
    /// No such snapshot, a snapshot in use, a damaged index, and errors of the file system.
    pub fn remove(&self, reference: &Reference, if_in_use: IfInUse) -> Result<Removed, RemoveError> {
        loop {
            let mut sweep = Sweep::begin(self)?;
            let digest = resolve(&sweep.index, reference)?;
            if let Reference::Name(name) = reference
                && sweep.index.names_of(digest).len() > 1
            {
                sweep.index.take_name(name);
                sweep.changed = true;
                return sweep.finish(None);
            }
            if sweep.take(digest)? {
                return sweep.finish(None);
            }
            if if_in_use == IfInUse::Refuse {
                return Err(RemoveError::InUse { digest });
            }
            let file = use_file(&self.folders, digest)?;
            drop(sweep);
            // Let the lock go at once: a process that opens a snapshot waits for it while holding
            // the store's.
            let path = self.folders.uses.join(digest.hex());
            drop(Lock::wait(file, FlockOperation::LockExclusive).map_err(FileError::new("lock", path))?);
        }
    }

    /// Removes garbage: drafts of dead makers, blobs without an entry, and unnamed snapshots on
    /// request. Snapshots in use stay.
    ///
    /// # Errors
    /// A damaged index, and errors of the file system.
    pub fn prune(&self, prune: Prune) -> Result<Removed, RemoveError> {
        let drafts = collect(&self.folders)?;
        let mut sweep = Sweep::begin(self)?;
        if let Some(age) = prune.unnamed {
            for digest in sweep.by_last_use() {
                if sweep.index.names_of(digest).is_empty() && is_older(sweep.last_use(digest), age) {
                    sweep.take_or_note(digest)?;
                }
            }
        }
        sweep.remove_uses_of_none()?;
        let mut removed = sweep.finish(Some(prune.grace))?;
        removed.drafts = drafts;
        removed.partial = crate::partial::collect(&self.folders, prune.grace)?;
        Ok(removed)
    }

    /// Removes garbage, then the least recently used snapshots, until the blobs take at most
    /// `bytes`. Snapshots in use stay, even beyond the quota: see [`Removed::left`].
    ///
    /// # Errors
    /// A damaged index, and errors of the file system.
    pub fn enforce_quota(&self, bytes: u64) -> Result<Removed, RemoveError> {
        let drafts = collect(&self.folders)?;
        let mut sweep = Sweep::begin(self)?;
        // An unreadable manifest may need any blob, so that removing snapshots frees nothing.
        if sweep.reach.unreadable.is_empty() {
            for digest in sweep.by_last_use() {
                if sweep.would_be_left(GRACE) <= bytes {
                    break;
                }
                sweep.take_or_note(digest)?;
            }
        }
        let mut removed = sweep.finish(Some(GRACE))?;
        removed.drafts = drafts;
        removed.partial = crate::partial::collect(&self.folders, PARTIAL_GRACE)?;
        Ok(removed)
    }
}

fn is_older(time: Option<SystemTime>, age: Duration) -> bool {
    // A time in the future is not old.
    time.is_none_or(|time| SystemTime::now().duration_since(time).is_ok_and(|past| past >= age))
}

/// A removal in progress, with the store's lock.
struct Sweep<'a> {
    store: &'a Store,
    index: Index,
    changed: bool,
    reach: Reach,
    files: BTreeMap<Digest, BlobFile>,
    /// Number of entries that need each blob.
    counts: BTreeMap<Digest, usize>,
    /// Blobs that removed snapshots needed.
    freed: BTreeSet<Digest>,
    removed: Removed,
    /// Locks of the removed snapshots: nobody opens one before its end.
    uses: Vec<Lock<File>>,
    /// The store's lock.
    lock: Lock<File>,
}

impl<'a> Sweep<'a> {
    fn begin(store: &'a Store) -> Result<Self, RemoveError> {
        let folders = &store.folders;
        let lock = folders.lock(FlockOperation::LockExclusive)?;
        let index = folders.index()?;
        let reach = Reach::of(folders, &index);
        let (files, counts) = (blob_files(folders)?, reach.counts());
        Ok(Self {
            store,
            index,
            changed: false,
            reach,
            files,
            counts,
            freed: BTreeSet::new(),
            removed: Removed::default(),
            uses: Vec::new(),
            lock,
        })
    }

    fn last_use(&self, digest: Digest) -> Option<SystemTime> {
        last_use(self.store, digest)
    }

    /// All snapshots, the least recently used first.
    fn by_last_use(&self) -> Vec<Digest> {
        // An entry of another tool without an artifact type may be an image.
        let is_snapshot = |entry: &Entry| entry.certain || self.store.folders.manifest(entry.digest).is_ok();
        let snapshots: BTreeSet<Digest> = self.index.entries().filter(is_snapshot).map(|entry| entry.digest).collect();
        let mut snapshots: Vec<Digest> = snapshots.into_iter().collect();
        snapshots.sort_by_cached_key(|digest| self.last_use(*digest));
        snapshots
    }

    /// Takes a snapshot, unless it is in use.
    fn take(&mut self, digest: Digest) -> Result<bool, RemoveError> {
        let path = self.store.folders.uses.join(digest.hex());
        let file = use_file(&self.store.folders, digest)?;
        let free = Lock::attempt(file, FlockOperation::NonBlockingLockExclusive);
        let Some(lock) = free.map_err(FileError::new("lock", path))? else { return Ok(false) };
        self.uses.push(lock);
        self.index.remove(digest);
        self.changed = true;
        self.reach.unreadable.remove(&digest);
        for blob in self.reach.trees.remove(&digest).unwrap_or_default() {
            if let Some(count) = self.counts.get_mut(&blob) {
                *count -= 1;
            }
            self.freed.insert(blob);
        }
        self.removed.snapshots.push(digest);
        Ok(true)
    }

    fn take_or_note(&mut self, digest: Digest) -> Result<(), RemoveError> {
        if !self.take(digest)? {
            self.removed.in_use.push(digest);
        }
        Ok(())
    }

    /// Returns whether a blob goes: not needed, and either freed by a removed snapshot or old
    /// garbage.
    fn goes(&self, digest: Digest, file: &BlobFile, grace: Option<Duration>) -> bool {
        let needed = self.counts.get(&digest).is_some_and(|count| *count > 0);
        let old = grace.is_some_and(|grace| is_older(Some(file.written), grace));
        !needed && (self.freed.contains(&digest) || old)
    }

    fn would_be_left(&self, grace: Duration) -> u64 {
        let left = self.files.iter().filter(|(digest, file)| !self.goes(**digest, file, Some(grace)));
        left.map(|(_, file)| file.size).sum()
    }

    /// Removes the records of use without a snapshot.
    fn remove_uses_of_none(&self) -> Result<(), RemoveError> {
        let uses = &self.store.folders.uses;
        for name in uses.names().map_err(FileError::new("read", uses.path()))? {
            let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
            if digest.is_some_and(|digest| !self.index.contains(digest)) {
                unless_missing(uses.unlink(&name)).map_err(FileError::new("remove", uses.join(&name)))?;
            }
        }
        Ok(())
    }

    /// Writes the index, then removes blobs: a crash leaves garbage and never a snapshot without
    /// its blobs.
    fn finish(self, grace: Option<Duration>) -> Result<Removed, RemoveError> {
        let folders = &self.store.folders;
        if self.changed {
            folders.write_index(&self.index, true)?;
        }
        let trash = Trash::new(self.store);
        let unreadable: Vec<Digest> = self.reach.unreadable.keys().copied().collect();
        let (mut left, mut blobs, mut bytes) = (0, 0, 0);
        for (digest, file) in &self.files {
            if !unreadable.is_empty() || !self.goes(*digest, file, grace) {
                left += file.size;
                continue;
            }
            trash.take(*digest)?;
            blobs += 1;
            bytes += file.size;
        }
        for digest in &self.removed.snapshots {
            let (uses, name) = (&folders.uses, digest.hex());
            unless_missing(uses.unlink(&name)).map_err(FileError::new("remove", uses.join(name)))?;
        }
        drop(self.lock);
        // Deleting gigabytes takes a while: nobody has to wait for the lock.
        drop(trash);
        folders.keep_reserve();
        Ok(Removed { blobs, bytes, left, unreadable, ..self.removed })
    }
}

/// Time of a snapshot's last use.
pub(crate) fn last_use(store: &Store, digest: Digest) -> Option<SystemTime> {
    std::fs::symlink_metadata(store.folders.uses.join(digest.hex())).ok()?.modified().ok()
}
