//! What goes: snapshots that are removed, garbage, and what a quota leaves no room for.

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

/// Blobs that nothing names are left alone for this long by default: tools that know nothing of the store's lock write blobs
/// first and the index last.
pub const GRACE: Duration = Duration::from_secs(3600);

/// A transfer that was broken off is left for another attempt for this long.
const PARTIAL_GRACE: Duration = Duration::from_secs(24 * 3600);

/// What if a snapshot that should go is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfInUse {
    /// It stays, and that is an error.
    Refuse,
    /// Wait until it is not, however long that takes.
    Wait,
}

/// What a prune takes.
#[derive(Clone, Copy, Debug)]
pub struct Prune {
    /// Blobs that nothing names go if they are older than this.
    pub grace: Duration,
    /// Snapshots without a name go if they were last used this long ago. None keeps them.
    pub unnamed: Option<Duration>,
}

/// What is gone.
#[derive(Debug, Default)]
pub struct Removed {
    /// Snapshots.
    pub snapshots: Vec<Digest>,
    /// Blobs.
    pub blobs: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// Drafts of makers that are gone.
    pub drafts: usize,
    /// What there was of blobs that came in part and were given up, in bytes.
    pub partial: u64,
    /// Snapshots that stayed because they are in use.
    pub in_use: Vec<Digest>,
    /// Manifests that cannot be read. As long as they are there nobody knows what they need, and no blob goes.
    pub unreadable: Vec<Digest>,
    /// What the blobs that are left take, in bytes.
    pub left: u64,
}

/// Something could not be removed. What is named is whole.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A file is out of reach.
    #[error(transparent)]
    File(#[from] FileError),
    /// The index is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no such snapshot.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// It is in use.
    #[error("the snapshot {digest} is in use")]
    InUse {
        /// The snapshot.
        digest: Digest,
    },
}

impl Store {
    /// Removes a snapshot, and the blobs that no other needs. Of one with several names that is asked for by name, only that
    /// name goes.
    ///
    /// # Errors
    /// No such snapshot, one in use, a damaged index, and what the file system refuses.
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
            // Not to keep it: who opens a snapshot waits for this lock while they have the store's.
            let path = self.folders.uses.join(digest.hex());
            drop(Lock::wait(file, FlockOperation::LockExclusive).map_err(FileError::new("lock", path))?);
        }
    }

    /// Removes garbage: drafts of makers that are gone, blobs that nothing names, and snapshots without a name if that is
    /// asked for. What is in use stays.
    ///
    /// # Errors
    /// A damaged index, and what the file system refuses.
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

    /// Removes garbage, and then snapshots that were not used for the longest time, until the blobs take at most this many
    /// bytes. What is in use stays, even if there is too much then: see [`Removed::left`].
    ///
    /// # Errors
    /// A damaged index, and what the file system refuses.
    pub fn enforce_quota(&self, bytes: u64) -> Result<Removed, RemoveError> {
        let drafts = collect(&self.folders)?;
        let mut sweep = Sweep::begin(self)?;
        // Removing snapshots frees nothing while nobody knows what an unreadable one needs.
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
    /// What is still needed.
    counts: BTreeMap<Digest, usize>,
    /// What was needed by what goes.
    freed: BTreeSet<Digest>,
    removed: Removed,
    /// Nobody uses what goes until it is gone.
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

    /// The snapshots, the one that was not used for the longest time first.
    fn by_last_use(&self) -> Vec<Digest> {
        // What other tools have put there without saying what it is may be an image.
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

    /// What nothing needs and is not spared: freed by what goes, or garbage that is old enough.
    fn goes(&self, digest: Digest, file: &BlobFile, grace: Option<Duration>) -> bool {
        let needed = self.counts.get(&digest).is_some_and(|count| *count > 0);
        let old = grace.is_some_and(|grace| is_older(Some(file.written), grace));
        !needed && (self.freed.contains(&digest) || old)
    }

    fn would_be_left(&self, grace: Duration) -> u64 {
        let left = self.files.iter().filter(|(digest, file)| !self.goes(**digest, file, Some(grace)));
        left.map(|(_, file)| file.size).sum()
    }

    /// Records of use that no snapshot has.
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

    /// Index first, then blobs: a crash leaves garbage and never a snapshot without its blobs.
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
        // Deleting gigabytes takes a while, for which nobody has to wait.
        drop(trash);
        folders.keep_reserve();
        Ok(Removed { blobs, bytes, left, unreadable, ..self.removed })
    }
}

/// When a snapshot was last used.
pub(crate) fn last_use(store: &Store, digest: Digest) -> Option<SystemTime> {
    std::fs::symlink_metadata(store.folders.uses.join(digest.hex())).ok()?.modified().ok()
}
