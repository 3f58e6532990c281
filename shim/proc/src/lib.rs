//! The only reader of `/proc`.
//!
//! A process number has a type: [`HostPid`] in the pid namespace of the shim, [`ContainerPid`] in
//! the container's own. Only the kernel converts one into the other ([`ProcessIds::of`]).
//!
//! All functions look at one moment: the process can end, and the pid be reused, right after. Code
//! that keeps a pid over time keeps a [`ProcessHandle`], or an [`Identity`] in files.

mod children;
mod handle;
mod maps;
mod pid;
mod stat;
mod status;
mod thread;
mod wait;

use std::io;

pub use children::{children, kill_descendants, kill_tree};
pub use handle::{Identity, ProcessHandle};
pub use maps::{Mapping, Range, mappings};
pub use pid::{ContainerPid, HostPid, ProcessIds};
pub use stat::Stat;
pub use status::{Capabilities, Seccomp, Status};
pub use thread::{Thread, living, thread_name, threads, tids};
pub use wait::Wait;

/// Returns whether an error of `/proc`, or of a signal, means that the process has gone.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Returns the name of a process (`comm`), at most 15 bytes; bytes outside UTF-8 are replaced.
///
/// # Errors
/// Fails if there is no such process.
pub fn name(pid: HostPid) -> io::Result<String> {
    thread_name(pid, pid.raw())
}

fn malformed(pid: HostPid, file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/{file} is not as expected"))
}

fn trimmed(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    text.strip_suffix('\n').map(str::to_owned).unwrap_or(text)
}
