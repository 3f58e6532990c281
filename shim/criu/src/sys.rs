//! Work in a child between fork and exec.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::LinkNameSpaceType;

/// Closes every descriptor from `first` on when `command` executes its program. Descriptors given
/// to this process without `O_CLOEXEC` would end up in a dumped or restored tree, or keep pipes
/// open.
///
/// Called after all placements of descriptors below `first`.
pub(crate) fn close_from(command: &mut Command, first: u32) {
    let close = move || {
        // SAFETY: close_range with CLOEXEC takes numbers only, and marks descriptors of this
        // process, which has one thread and is about to execute another program. No code uses the
        // descriptors after that.
        let done = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Kernels before 5.11. Rust opens files with O_CLOEXEC there too.
            Some(libc::ENOSYS | libc::EINVAL) => Ok(()),
            _ => Err(error),
        }
    };
    // SAFETY: the closure runs in the forked child. It makes one system call, and allocates and locks nothing.
    unsafe { command.pre_exec(close) };
}

/// Lets `command` execute its program in a network namespace.
pub(crate) fn enter_network(command: &mut Command, namespace: OwnedFd) {
    let enter = move || {
        let network = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), network).map_err(io::Error::from)
    };
    // SAFETY: the closure runs in the forked child. It makes one system call on a descriptor that
    // it owns, and allocates and locks nothing.
    unsafe { command.pre_exec(enter) };
}

#[cfg(test)]
pub(crate) const DATA: i32 = libc::SEEK_DATA;
#[cfg(test)]
pub(crate) const HOLE: i32 = libc::SEEK_HOLE;

/// Calls the C library's `lseek`, as criu does.
#[cfg(test)]
pub(crate) fn seek(file: &std::fs::File, offset: u64, whence: i32) -> Result<u64, rustix::io::Errno> {
    use std::os::fd::AsRawFd;
    let offset = i64::try_from(offset).unwrap();
    // SAFETY: lseek takes numbers only.
    let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| rustix::io::Errno::from_io_error(&io::Error::last_os_error()).unwrap())
}

/// Returns descriptor `fd`, open since this process's start.
#[cfg(test)]
pub(crate) fn inherited(fd: std::os::fd::RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: only the test that plays criu calls this, once, for a descriptor given at its start.
    // Nothing else in that process knows the number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
