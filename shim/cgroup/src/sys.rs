//! Polling a descriptor that this crate owns.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an event descriptor with tokio's reactor, to be read.
pub(crate) fn pollable(events: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: register wants the descriptor to stay open, and to stay the same file, until the AsyncFd is dropped.
    // The AsyncFd owns the OwnedFd, which nobody can close or replace while it is owned there.
    unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }.map_err(io::Error::from)
}
