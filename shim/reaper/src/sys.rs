//! Polling a descriptor that this crate owns.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a pidfd with tokio's reactor, for its process's exit.
pub(crate) fn pollable(pidfd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: register wants the descriptor to stay open, and to stay the same file, until the AsyncFd is dropped.
    // The AsyncFd owns a reference to the OwnedFd, which nobody can close or replace while any reference is left.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)
}
