//! Things that processes have and Rust's libraries do not offer.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A ring for asynchronous operations.
pub(crate) fn io_uring() -> io::Result<OwnedFd> {
    // `struct io_uring_params`: 120 bytes that may be zero.
    let mut parameters = [0_u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes at the address, which are there and are nobody else's.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Starts a child that is stopped by the parent's tracing it.
pub(crate) fn traced_child() {
    let mut command = Command::new("/bin/true");
    let ask = || {
        // SAFETY: TRACEME takes no address; the others are ignored.
        let done = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure runs in the forked child, makes one system call, and allocates and locks nothing.
    unsafe { command.pre_exec(ask) };
    // It stops when it executes its program. It is not waited for: the target is killed with it.
    let _ = command.spawn();
}
