//! What has to be done between fork and exec, and what was left open by an exec.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::Mode;

/// Gives the program the usual umask, 022, whatever this process has: runtimes make mount points in the container's
/// root with it, and users of a container under another umask would not get at them.
pub(super) fn set_umask(command: &mut Command) {
    let set = || {
        rustix::process::umask(Mode::from_raw_mode(0o022));
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls umask; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(set) };
}

/// A descriptor that this process was started with, at the number that it was told.
pub(super) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: it only asks for the flags of a number; what is not open is refused.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    if number <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is open, and nothing in this process owns it: it came with the exec, this process has opened nothing yet, and
    // it asks once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
