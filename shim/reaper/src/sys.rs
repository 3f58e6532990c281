//! Polling a descriptor that this crate owns, and limits set between fork and exec.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a pidfd with tokio's reactor, for its process's exit.
pub(crate) fn pollable(pidfd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: register wants the descriptor to stay open, and to stay the same file, until the AsyncFd is dropped.
    // The AsyncFd owns a reference to the OwnedFd, which nobody can close or replace while any reference is left.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Runs the program under this limit on open descriptors.
pub(crate) fn limit_descriptors(command: &mut Command, limit: Rlimit) {
    let set = move || Ok(setrlimit(Resource::Nofile, limit.clone())?);
    // SAFETY: between fork and exec the closure only copies two numbers and calls prlimit; it neither allocates nor
    // takes a lock.
    unsafe { command.pre_exec(set) };
}
