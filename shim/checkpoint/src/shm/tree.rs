//! A tree of files changed by others, reached from the descriptor of the top.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;

/// An open tree.
#[derive(Debug)]
pub(super) struct Tree {
    top: OwnedFd,
}

impl Tree {
    /// Opens the tree at a trusted path.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { top: rustix::fs::openat(CWD, path, flags, Mode::empty())? })
    }

    pub(super) fn is_empty(&self) -> io::Result<bool> {
        Ok(names(&self.top)?.is_empty())
    }

    /// Opens a folder of the tree, through no link and no mount. The empty path is the top.
    pub(super) fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let inside =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        loop {
            match rustix::fs::openat2(&self.top, path, flags, Mode::empty(), inside) {
                // Try again: a rename elsewhere left open whether the path stays inside.
                Err(Errno::INTR | Errno::AGAIN) => {}
                opened => return Ok(opened?),
            }
        }
    }
}

/// Names in an open folder.
pub(super) fn names(folder: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let name = entry?;
        let name = OsStr::from_bytes(name.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// An entry of a folder, pinned by a descriptor: a link is not followed, and a device is not
/// opened.
#[derive(Debug)]
pub(super) struct Entry {
    fd: OwnedFd,
    pub(super) stat: Stat,
}

impl Entry {
    pub(super) fn at(folder: &OwnedFd, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(folder, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        Ok(Self { fd, stat })
    }

    /// Opens a regular file for reading.
    pub(super) fn file(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(CWD, here(&self.fd), flags, Mode::empty())?))
    }

    /// Reads the target of a link.
    pub(super) fn target(&self) -> io::Result<OsString> {
        let target = rustix::fs::readlinkat(&self.fd, "", Vec::new())?;
        Ok(OsStr::from_bytes(target.to_bytes()).to_owned())
    }

    /// Sets the owner, then the permissions unless the entry is a link.
    pub(super) fn own(&self, uid: u32, gid: u32, mode: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(&self.fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        if let Some(mode) = mode {
            // By the descriptor's path, the only way for a descriptor not open for reading.
            rustix::fs::chmodat(CWD, here(&self.fd), Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        Ok(())
    }

    /// Gives the entry a further name.
    pub(super) fn link(&self, folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::linkat(CWD, here(&self.fd), folder, name, AtFlags::SYMLINK_FOLLOW)?)
    }
}

/// The path of an open descriptor, valid whatever becomes of the file's name.
fn here(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
