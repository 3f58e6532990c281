//! Drafts: folders in which a snapshot is written before anybody else can see it.
//!
//! The maker of a draft holds the draft's lock. The lock goes with the maker, and an unlocked draft
//! is garbage.

use std::ffi::{OsStr, OsString};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::folder::{FileError, Folder, Lock, unless_missing};
use crate::store::Folders;
use crate::{Digest, Store};

/// A private folder in the store. A dropped draft is removed with all its files.
#[derive(Debug)]
pub struct Draft {
    pub(crate) store: Store,
    folder: Lock<Folder>,
    name: OsString,
}

impl Store {
    /// Begins a draft.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn draft(&self) -> Result<Draft, FileError> {
        let drafts = &self.folders.drafts;
        loop {
            let made = tempfile::Builder::new()
                .prefix("")
                .rand_bytes(16)
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(drafts.path());
            let path = made.map_err(FileError::new("make a draft in", drafts.path()))?.keep();
            let name = path.file_name().unwrap_or_default().to_owned();
            // An unlocked draft may have been removed as garbage.
            let locked = || -> io::Result<Option<Lock<Folder>>> {
                let Some(folder) = unless_missing(drafts.sub(&name))? else { return Ok(None) };
                let folder = Lock::wait(folder, FlockOperation::LockExclusive)?;
                Ok(unless_missing(drafts.sub(&name))?.is_some().then_some(folder))
            };
            if let Some(folder) = locked().map_err(FileError::new("lock", path))? {
                return Ok(Draft { store: self.clone(), folder, name });
            }
        }
    }
}

impl Draft {
    /// The folder to write to. Close all files in it for writing before the publication.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.files().path()
    }

    pub(crate) fn files(&self) -> &Folder {
        self.folder.file()
    }

    /// The draft's store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Links a blob of this size from the store into the draft, under its hexadecimal digest. The
    /// blob is thus kept until the publication, whatever is removed meanwhile. Returns whether the
    /// store has the blob.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn reuse(&self, digest: &Digest, size: u64) -> Result<bool, FileError> {
        let folders = &self.store.folders;
        let name = digest.hex();
        let link = || -> io::Result<bool> {
            match unless_missing(folders.blobs.link(&name, self.files(), &name)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            // The blob may be linked from an earlier call, and gone from the store since.
            let Some(file) = unless_missing(self.files().file(&name))? else { return Ok(false) };
            let fits = file.metadata()?.len() == size;
            if !fits {
                self.files().unlink(&name)?;
            }
            Ok(fits)
        };
        link().map_err(FileError::new("share", folders.blobs.join(&name)))
    }

    /// The path within the draft of a relative or an absolute path.
    pub(crate) fn inner<'a>(&self, path: &'a Path) -> &'a Path {
        path.strip_prefix(self.folder()).unwrap_or(path)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove_folder(&self.store.folders.drafts, &self.name) {
            tracing::warn!("the draft {} is left: {error}", self.folder().display());
        }
    }
}

/// Removes a folder and all its files. Links are not followed: the standard library sees to that.
fn remove_folder(drafts: &Folder, name: &OsStr) -> io::Result<()> {
    unless_missing(std::fs::remove_dir_all(drafts.join(name))).map(drop)
}

/// Removes the drafts of dead makers; returns the number.
pub(crate) fn collect(folders: &Arc<Folders>) -> Result<usize, FileError> {
    let drafts = &folders.drafts;
    let mut removed = 0;
    for name in drafts.names().map_err(FileError::new("read", drafts.path()))? {
        let path = drafts.join(&name);
        let mut collect = || -> io::Result<()> {
            let Some(folder) = unless_missing(drafts.sub(&name))? else { return Ok(()) };
            if let Some(_lock) = Lock::attempt(folder, FlockOperation::NonBlockingLockExclusive)? {
                remove_folder(drafts, &name)?;
                removed += 1;
            }
            Ok(())
        };
        match collect() {
            // A file, a link, a fifo: never made by a store.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOTDIR | Errno::LOOP)) => {
                unless_missing(drafts.unlink(&name)).map_err(FileError::new("remove", path))?;
                removed += 1;
            }
            result => result.map_err(FileError::new("remove", path))?,
        }
    }
    Ok(removed)
}

/// Blobs to be deleted. The blobs are first moved away, in no time, and deleted after the store's
/// lock has been released.
#[derive(Debug)]
pub(crate) struct Trash {
    folders: Arc<Folders>,
    draft: Option<Draft>,
}

impl Trash {
    pub(crate) fn new(store: &Store) -> Self {
        // A full disk may have no room for a folder: blobs are then deleted at once.
        Self { folders: Arc::clone(&store.folders), draft: store.draft().ok() }
    }

    /// Takes a blob. Requires the store's exclusive lock, and an index that no longer names the
    /// blob.
    pub(crate) fn take(&self, digest: Digest) -> Result<(), FileError> {
        let (blobs, name) = (&self.folders.blobs, digest.hex());
        let moved = self.draft.as_ref().map(|draft| blobs.rename(&name, draft.files(), &name));
        let done = match moved {
            Some(Ok(())) => Ok(Some(())),
            _ => unless_missing(blobs.unlink(&name)),
        };
        done.map(drop).map_err(FileError::new("remove", blobs.join(name)))
    }
}
