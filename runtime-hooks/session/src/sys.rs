//! Descriptors that a session is started with.

use std::os::fd::{FromRawFd, OwnedFd};

/// First descriptor after the standard streams.
pub(crate) const FIRST: i32 = 3;

/// Takes the three descriptors from [`FIRST`] on. To be called once, first thing in a process that was started with them.
pub(crate) fn take_streams() -> [OwnedFd; 3] {
    [FIRST, FIRST + 1, FIRST + 2].map(|fd| {
        // SAFETY: the starter of the session has put these descriptors in place. Nothing in this process knows their
        // numbers yet, and this function is called once.
        unsafe { OwnedFd::from_raw_fd(fd) }
    })
}
