//! Descriptors that an exec has left open.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Returns a descriptor that this process was started with, by its number.
///
/// # Errors
/// Nothing is open under that number, or the number is one of the standard streams.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl only asks for the flags of a number; what is not open is refused.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    if number <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is open and came with the exec. Nothing in this process owns it: this process has opened
    // nothing yet, and asks once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
