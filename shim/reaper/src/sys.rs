//! Polling of an owned descriptor, and work in a child between fork and exec.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a pidfd with tokio's reactor, for the process's exit.
pub(crate) fn pollable(pidfd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: register wants the descriptor to stay open, and to stay the same file, until the
    // AsyncFd is dropped. The AsyncFd owns a reference to the OwnedFd, which nobody can close or
    // replace while any reference is left.
    unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Makes `command` run its program in a grandchild. The process between ends at once with code 0,
/// leaving the grandchild an orphan. The grandchild writes its pid to `tell_pid`, in native byte
/// order.
pub(crate) fn orphan(command: &mut Command, tell_pid: OwnedFd) {
    let fork = move || {
        // SAFETY: fork has no preconditions. Both copies make only calls that are safe after a fork
        // of a process with threads: write, getpid, _exit and Command's own steps before the exec.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let pid = std::process::id().to_ne_bytes();
                // SAFETY: the buffer has the given length, and the descriptor is open: the closure
                // owns it.
                let written = unsafe { libc::write(tell_pid.as_raw_fd(), pid.as_ptr().cast(), pid.len()) };
                if written == 4 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
            }
            // SAFETY: _exit has no preconditions, and runs no code of this process.
            _ => unsafe { libc::_exit(0) },
        }
    };
    // SAFETY: the closure allocates nothing and takes no lock; its calls are argued above.
    unsafe { command.pre_exec(fork) };
}

/// Makes `command` run its program under this limit on open descriptors.
pub(crate) fn limit_descriptors(command: &mut Command, limit: Rlimit) {
    let set = move || Ok(setrlimit(Resource::Nofile, limit)?);
    // SAFETY: between fork and exec the closure only copies two numbers and calls prlimit, without
    // allocation or lock.
    unsafe { command.pre_exec(set) };
}
