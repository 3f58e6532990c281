//! A tree of files that others change: reached from the descriptor of its top.

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
    /// Opens the tree whose top is at a path that the caller trusts.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { top: rustix::fs::openat(CWD, path, flags, Mode::empty())? })
    }

    pub(super) fn is_empty(&self) -> io::Result<bool> {
        Ok(names(&self.top)?.is_empty())
    }

    /// Opens a folder in it, over no link and no mount. The empty path is its top.
    pub(super) fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let inside =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        loop {
            match rustix::fs::openat2(&self.top, path, flags, Mode::empty(), inside) {
                // Again: a rename elsewhere made it uncertain that nothing leads out.
                Err(Errno::INTR | Errno::AGAIN) => {}
                opened => return Ok(opened?),
            }
        }
    }
}

/// The names in an open folder.
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

/// An entry of a folder, pinned: neither followed, if it is a link, nor opened, if it is a device.
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

    /// Opens it, which has to be a regular file, for reading.
    pub(super) fn file(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(CWD, here(&self.fd), flags, Mode::empty())?))
    }

    /// Reads where it leads, which has to be a link.
    pub(super) fn target(&self) -> io::Result<OsString> {
        let target = rustix::fs::readlinkat(&self.fd, "", Vec::new())?;
        Ok(OsStr::from_bytes(target.to_bytes()).to_owned())
    }

    /// Gives it another owner, and then, unless it is a link, other permissions.
    pub(super) fn own(&self, uid: u32, gid: u32, mode: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(&self.fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        if let Some(mode) = mode {
            // By the descriptor: for one that is not open for reading there is no other way.
            rustix::fs::chmodat(CWD, here(&self.fd), Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        Ok(())
    }

    /// Gives it a further name.
    pub(super) fn link(&self, folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::linkat(CWD, here(&self.fd), folder, name, AtFlags::SYMLINK_FOLLOW)?)
    }
}

/// The path of an open descriptor, which leads to it whatever has become of its name.
fn here(fd: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
