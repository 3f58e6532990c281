//! Processes of this binary in another role: the session of a checkpoint, the callers of the GPU
//! driver.
//!
//! ```text
//!   starter ── Role::command ──► the same binary, first argument: the role's name
//!      │ ◄──── a socket on standard input: one JSON value a line, both ways ────► enter()
//!      │ ◄──── a pipe on standard error: one JSON line for each log record ────── (children of a role inherit the pipe)
//!      └── forward(): the record in the starter's log, with role, pid and container
//! ```
//!
//! Both sides are the same file, so the protocols have no versions. A role logs its own panic.

#![deny(unsafe_code)]

mod failure;
mod log;
mod wire;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

pub use failure::{Because, Failure};
pub use log::{forward, log_pipe};
pub use wire::{Wire, send};

/// A role of this binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// First argument of the process, and its name in `ps` and in logs. At most 15 bytes long.
    pub name: &'static str,
}

impl Role {
    /// Returns the command that runs `program`, this binary, in the role: with `socket` for
    /// messages, and `log` for log records.
    #[must_use]
    pub fn command(self, program: &Path, socket: OwnedFd, log: OwnedFd) -> Command {
        let mut command = Command::new(program);
        // A separate process group: signals to the starter's group must not reach the role.
        command.arg(self.name).process_group(0).stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(log);
        command.env(log::LEVEL_VARIABLE, ::log::max_level().as_str());
        command
    }

    /// Gives this process the role's name and log. Returns the socket to the starter.
    ///
    /// # Errors
    /// Fails if standard input is no socket, or cannot be shared.
    pub fn enter(self) -> io::Result<UnixStream> {
        // A program started by /proc/self/exe has the name exe.
        if let Ok(name) = CString::new(self.name) {
            let _ = rustix::thread::set_name(&name);
        }
        log::install(self.name);
        Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
    }
}
