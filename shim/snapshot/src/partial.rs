//! Blobs received in pieces. A partial blob outlives its process; the next process continues the
//! transfer.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use crate::draft::Draft;
use crate::folder::{FileError, Folder, Lock, unless_missing};
use crate::store::Folders;
use crate::{Digest, Store};

/// A blob received in part, or not yet begun. One process at a time has it; a drop keeps the bytes.
#[derive(Debug)]
pub struct Partial {
    file: Lock<File>,
    path: PathBuf,
    digest: Digest,
}

impl Store {
    /// Continues with a blob of an earlier process. `None` if another process has the blob.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn partial(&self, digest: &Digest) -> Result<Option<Partial>, FileError> {
        let (folder, name) = (&self.folders.partial, digest.hex());
        let path = folder.join(&name);
        let take_up = || -> io::Result<Option<Lock<File>>> {
            loop {
                let file = folder.lockable(&name)?;
                if !file.metadata()?.is_file() {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
                }
                let Some(file) = Lock::attempt(file, FlockOperation::NonBlockingLockExclusive)? else {
                    return Ok(None);
                };
                // The earlier owner of the lock may have published the file: never write to such a
                // file.
                if is_at(file.file(), folder, &name)? {
                    return Ok(Some(file));
                }
            }
        };
        let file = take_up().map_err(FileError::new("take up", &path))?;
        Ok(file.map(|file| Partial { file, path, digest: *digest }))
    }
}

impl Store {
    /// Bytes of a blob left by an earlier process.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn partial_size(&self, digest: &Digest) -> Result<u64, FileError> {
        let (folder, name) = (&self.folders.partial, digest.hex());
        let size = unless_missing(folder.file(&name).and_then(|file| Ok(file.metadata()?.len())));
        size.map(Option::unwrap_or_default).map_err(FileError::new("look at", folder.join(&name)))
    }

    /// Free bytes of the store's file system.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn free_space(&self) -> Result<u64, FileError> {
        let free =
            rustix::fs::fstatvfs(&self.folders.root).map(|system| system.f_bavail.saturating_mul(system.f_frsize));
        free.map_err(|error| FileError::new("look at", self.root())(error.into()))
    }
}

impl Partial {
    /// The path of the blob.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Bytes received so far.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn received(&self) -> Result<u64, FileError> {
        self.file.file().metadata().map(|metadata| metadata.len()).map_err(FileError::new("look at", &self.path))
    }

    /// The file, for reading and writing; all copies share one position.
    ///
    /// # Errors
    /// Too many open files.
    pub fn file(&self) -> Result<File, FileError> {
        self.file.file().try_clone().map_err(FileError::new("open", &self.path))
    }
}

impl Draft {
    /// Moves a complete, verified blob into the draft for the publication. Returns the path in the
    /// draft.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn take(&self, partial: Partial) -> Result<PathBuf, FileError> {
        let Partial { file, path, digest } = partial;
        let name = digest.hex();
        let moved = self.store.folders.partial.rename(&name, self.files(), &name);
        moved.map_err(FileError::new("move to a draft", path))?;
        // Release the lock after the move: until then it keeps others away.
        drop(file);
        Ok(PathBuf::from(name))
    }
}

/// Removes blobs without progress for `grace`; returns the number of bytes.
pub(crate) fn collect(folders: &Folders, grace: Duration) -> Result<u64, FileError> {
    let folder = &folders.partial;
    let mut freed = 0;
    for name in folder.names().map_err(FileError::new("read", folder.path()))? {
        let mut collect = || -> io::Result<()> {
            let Some(file) = unless_missing(folder.file(&name))? else { return Ok(()) };
            let metadata = file.metadata()?;
            // A time in the future would never grow old.
            let age = SystemTime::now().duration_since(metadata.modified()?).unwrap_or(Duration::MAX);
            if age < grace {
                return Ok(());
            }
            let Some(file) = Lock::attempt(file, FlockOperation::NonBlockingLockExclusive)? else { return Ok(()) };
            if is_at(file.file(), folder, &name)? {
                folder.unlink(&name)?;
                freed += metadata.len();
            }
            Ok(())
        };
        collect().map_err(FileError::new("remove", folder.join(&name)))?;
    }
    Ok(freed)
}

/// Returns whether the open file is still the one of this name.
fn is_at(file: &File, folder: &Folder, name: impl AsRef<std::path::Path>) -> io::Result<bool> {
    let here = rustix::fs::fstat(file)?;
    let there = unless_missing(folder.file(name).and_then(|file| Ok(rustix::fs::fstat(&file)?)))?;
    Ok(there.is_some_and(|there| (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_partial_blob_is_found_by_the_next_process_and_by_one_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let digest = Digest::of(b"all of it");
        let partial = store.partial(&digest).unwrap().unwrap();
        partial.file().unwrap().write_all(b"all ").unwrap();
        let other = Store::open(root.path()).unwrap();
        assert!(other.partial(&digest).unwrap().is_none(), "one at a time");
        drop(partial);
        let partial = other.partial(&digest).unwrap().unwrap();
        assert_eq!(partial.received().unwrap(), 4);
        let mut there = String::new();
        partial.file().unwrap().read_to_string(&mut there).unwrap();
        assert_eq!(there, "all ");
    }

    #[test]
    fn who_waited_for_a_blob_that_was_published_meanwhile_gets_a_new_file() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let digest = Digest::of(b"x");
        let partial = store.partial(&digest).unwrap().unwrap();
        let draft = store.draft().unwrap();
        let path = draft.take(partial).unwrap();
        let kept = File::open(draft.folder().join(&path)).unwrap();
        let partial = store.partial(&digest).unwrap().unwrap();
        assert!(!is_at(&kept, &store.folders.partial, digest.hex()).unwrap());
        partial.file().unwrap().write_all(b"new").unwrap();
        assert_eq!(kept.metadata().unwrap().len(), 0);
    }

    #[test]
    fn what_was_given_up_is_collected_and_what_is_in_use_is_not() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let (old, used) = (Digest::of(b"old"), Digest::of(b"used"));
        store.partial(&old).unwrap().unwrap().file().unwrap().write_all(b"ol").unwrap();
        let in_use = store.partial(&used).unwrap().unwrap();
        assert_eq!(collect(&store.folders, Duration::from_secs(3600)).unwrap(), 0);
        assert_eq!(collect(&store.folders, Duration::ZERO).unwrap(), 2);
        assert!(in_use.path().exists());
        assert!(!store.folders.partial.join(old.hex()).exists());
    }
}
