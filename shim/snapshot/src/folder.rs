//! Files below a folder, reached without following a link: what lies there may have been put there by anybody.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};

/// Something could not be done with a file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// What could not be done, as it fits behind "cannot".
    pub action: &'static str,
    /// The file.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self { action, path, source }
    }

    /// The file is not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Something is about to change on the disk. Tests die here.
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

/// Below the folder, and over no link.
fn inside() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

impl Folder {
    /// Opens a folder at a path that the caller trusts.
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
                // Again: a rename elsewhere made it uncertain that nothing leads out.
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Opens a regular file for reading.
    pub(crate) fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        // Not blocking, lest somebody has put a fifo there.
        let file = File::from(self.resolve(name.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        Ok(file)
    }

    /// Reads a small file; one of more than `limit` bytes is an error.
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

    /// Makes a file that was not there, for root alone.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> io::Result<File> {
        step();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        Ok(File::from(self.resolve(name.as_ref(), flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Opens a file that is there for its lock and its times, and makes it if it is not.
    pub(crate) fn lockable(&self, name: impl AsRef<Path>) -> io::Result<File> {
        step();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
        Ok(File::from(self.resolve(name.as_ref(), flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Makes a new file with this content, on the disk before this returns. What is left of it after a failure goes.
    pub(crate) fn write_new(&self, name: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.create(&name)?;
        step();
        file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| {
            let _ = self.unlink(&name);
        })
    }

    /// Puts a file with this content in the place of what was there, at once or not at all. One writer at a time.
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

    /// Makes a folder for root alone, unless it is there.
    pub(crate) fn make(&self, name: &str) -> io::Result<()> {
        step();
        match rustix::fs::mkdirat(&self.fd, name, Mode::RWXU) {
            Err(Errno::EXIST) => Ok(()),
            result => Ok(result?),
        }
    }

    /// What is in it.
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

    /// Its entries are on the disk before this returns.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| rustix::fs::fsync(&self.fd))?)
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// None for what is not there.
pub(crate) fn unless_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A lock on a file, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Lock<F: AsFd>(F);

impl<F: AsFd> Lock<F> {
    /// Waits for it.
    pub(crate) fn wait(file: F, operation: FlockOperation) -> io::Result<Self> {
        retry_on_intr(|| rustix::fs::flock(&file, operation))?;
        Ok(Self(file))
    }

    /// Takes it unless somebody else has it.
    pub(crate) fn attempt(file: F, operation: FlockOperation) -> io::Result<Option<Self>> {
        match retry_on_intr(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The file that is locked.
    pub(crate) fn file(&self) -> &F {
        &self.0
    }
}

impl<F: AsFd> Drop for Lock<F> {
    fn drop(&mut self) {
        // Closing is not enough: a process that was forked in this instant has a copy until it runs its program.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}
