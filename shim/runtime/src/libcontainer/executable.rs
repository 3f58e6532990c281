//! This process's own executable, in a form safe for containers.
//!
//! The helper and its clones enter a container before becoming the user's program. A container that
//! opens `/proc/PID/exe` then has our executable open, and could write to the file once no process
//! runs it: root on the host (CVE-2019-5736). So helpers run from a detached, read-only mount of
//! the file. `/proc/PID/exe` leads to the file through that mount, which refuses writes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{CWD, MemfdFlags, SealFlags};
use rustix::mount::OpenTreeFlags;

use super::sys;

const OWN: &str = "/proc/self/exe";

/// Made once per process. The descriptor keeps the mount, attached to no mount namespace.
static PROTECTED: Mutex<Option<Protected>> = Mutex::new(None);

/// An executable file without write access.
#[derive(Debug)]
pub(super) struct Protected(OwnedFd);

impl Protected {
    /// Returns this process's own executable.
    pub(super) fn own() -> io::Result<Self> {
        let mut cached = PROTECTED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(protected) = &*cached {
            return protected.try_clone();
        }
        let protected = clone_mount(Path::new(OWN)).or_else(|error| {
            // mount_setattr is missing before Linux 5.12.
            tracing::debug!(%error, "cannot clone the mount of the executable: running helpers from a copy");
            copy(Path::new(OWN))
        })?;
        let result = protected.try_clone();
        *cached = Some(protected);
        result
    }

    fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Returns a path for executing the file, valid in this process and in a child until its exec.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

impl AsFd for Protected {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn clone_mount(file: &Path) -> io::Result<Protected> {
    let tree = rustix::mount::open_tree(CWD, file, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    sys::add_mount_attributes(tree.as_fd(), false, libc::MOUNT_ATTR_RDONLY)?;
    Ok(Protected(tree))
}

fn copy(file: &Path) -> io::Result<Protected> {
    let memory = rustix::fs::memfd_create("gpusnap", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut memory = File::from(memory);
    io::copy(&mut File::open(file)?, &mut memory)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SEAL | SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK)?;
    // A file open for writing cannot be executed, sealed or not.
    let read_only = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd()))?;
    Ok(Protected(read_only.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    // Not the test's own executable: a running file cannot be written anyway.
    fn file() -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"program").unwrap();
        file
    }

    fn write(protected: &Protected) -> io::Result<()> {
        File::options().write(true).open(protected.path())?.write_all(b"evil")
    }

    #[test]
    fn a_clone_of_the_mount_cannot_be_written() {
        let file = file();
        let protected = match clone_mount(file.path()) {
            Ok(protected) => protected,
            Err(error) => return eprintln!("skipped: mounts cannot be cloned here: {error}"),
        };
        assert_eq!(write(&protected).unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        std::fs::write(file.path(), "the file itself still can").unwrap();
    }

    #[test]
    fn a_copy_is_whole_and_cannot_be_written() {
        let file = file();
        let protected = copy(file.path()).unwrap();
        assert_eq!(write(&protected).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let mut content = String::new();
        File::open(protected.path()).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "program");
    }

    #[test]
    fn this_executable_can_be_protected_and_read() {
        let protected = Protected::own().unwrap();
        assert_eq!(std::fs::metadata(protected.path()).unwrap().len(), std::fs::metadata(OWN).unwrap().len());
    }
}
