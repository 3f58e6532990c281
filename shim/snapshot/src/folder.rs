//! Files below a folder, reached without following links: anybody may have put anything there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};

/// Failure of an operation on a file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// The failed operation, as it reads after "cannot".
    pub action: &'static str,
    /// The file.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self { action, path, source }
    }

    /// Returns whether the file does not exist.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Point before a change of the disk, at which tests kill the process.
#[cfg(test)]
use crate::tests::child::step;
#[cfg(not(test))]
fn step() {}

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    fd: OwnedFd,
}

/// Resolution below the folder only, and through no link.
fn inside() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

impl Folder {
    /// Opens a folder at a trusted path.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::openat(CWD, path, flags, Mode::empty()))?;
        Ok(Self { path: path.to_owned(), fd })
    }

    /// Opens a folder below this one.
    pub(crate) fn sub(&self, name: impl AsRef<Path>) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { path: self.path.join(&name), fd: self.resolve(name.as_ref(), flags, Mode::empty())? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    fn resolve(&self, name: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        loop {
            match rustix::fs::openat2(&self.fd, name, flags | OFlags::CLOEXEC, mode, inside()) {
                // Try again: a rename elsewhere left open whether the path stays inside.
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Opens a regular file for reading.
    pub(crate) fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        // Non-blocking, in case somebody has put a fifo there.
        let file = File::from(self.resolve(name.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        Ok(file)
    }

    /// Reads a small file; more than `limit` bytes are an error.
    pub(crate) fn read(&self, name: impl AsRef<Path>, limit: usize) -> io::Result<Vec<u8>> {
        let file = self.file(name)?;
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes"));
        if file.metadata()?.len() > limit as u64 {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > limit {
            return Err(too_large());
        }
        Ok(bytes)
    }

    /// Makes a new file, for root alone. An existing file is an error.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> io::Result<File> {
        step();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        Ok(File::from(self.resolve(name.as_ref(), flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Opens a file for its lock and times, and makes the file if it is missing.
    pub(crate) fn lockable(&self, name: impl AsRef<Path>) -> io::Result<File> {
        step();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
        Ok(File::from(self.resolve(name.as_ref(), flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Makes a new file with this content, and flushes the file to the disk. A failure leaves no
    /// file.
    pub(crate) fn write_new(&self, name: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.create(&name)?;
        step();
        file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| {
            let _ = self.unlink(&name);
        })
    }

    /// Replaces a file by one with this content, atomically. One writer at a time.
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = format!("{name}.new");
        unless_missing(self.unlink(&new))?;
        self.write_new(&new, bytes)?;
        self.rename(&new, self, name).inspect_err(|_| {
            let _ = self.unlink(&new);
        })
    }

    pub(crate) fn rename(&self, from: impl AsRef<Path>, folder: &Self, to: impl AsRef<Path>) -> io::Result<()> {
        step();
        Ok(rustix::fs::renameat(&self.fd, from.as_ref(), &folder.fd, to.as_ref())?)
    }

    pub(crate) fn link(&self, from: impl AsRef<Path>, folder: &Self, to: impl AsRef<Path>) -> io::Result<()> {
        step();
        Ok(rustix::fs::linkat(&self.fd, from.as_ref(), &folder.fd, to.as_ref(), AtFlags::empty())?)
    }

    pub(crate) fn unlink(&self, name: impl AsRef<Path>) -> io::Result<()> {
        step();
        Ok(rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::empty())?)
    }

    /// Makes a folder for root alone, if it is missing.
    pub(crate) fn make(&self, name: &str) -> io::Result<()> {
        step();
        match rustix::fs::mkdirat(&self.fd, name, Mode::RWXU) {
            Err(Errno::EXIST) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Names of the folder's entries.
    pub(crate) fn names(&self) -> io::Result<Vec<std::ffi::OsString>> {
        use std::os::unix::ffi::OsStrExt;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Flushes the folder's entries to the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fsync(&self.fd))?)
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Turns a missing file into `None`.
pub(crate) fn unless_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A lock on a file, held until dropped.
#[derive(Debug)]
pub(crate) struct Lock<F: AsFd>(F);

impl<F: AsFd> Lock<F> {
    /// Waits for the lock.
    pub(crate) fn wait(file: F, operation: FlockOperation) -> io::Result<Self> {
        retry_on_intr(|| rustix::fs::flock(&file, operation))?;
        Ok(Self(file))
    }

    /// Takes the lock if it is free.
    pub(crate) fn attempt(file: F, operation: FlockOperation) -> io::Result<Option<Self>> {
        match retry_on_intr(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The locked file.
    pub(crate) fn file(&self) -> &F {
        &self.0
    }
}

impl<F: AsFd> Drop for Lock<F> {
    fn drop(&mut self) {
        // Closing is not enough: a process forked just now has a copy until its exec.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}
