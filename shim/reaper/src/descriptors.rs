//! Limit on open descriptors: raised for this process, unchanged for children.

use std::io;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// Limit at this process's start, recorded at the raise.
static ORIGINAL: OnceLock<Rlimit> = OnceLock::new();

/// Raises this process's limit on open descriptors to the hard limit.
///
/// A shim has some ten descriptors for each process of its pod. Service managers start containerd
/// with a soft limit of 1024, for programs that use `select`. Children of this process, and so
/// containers, keep the limit of this process's start.
///
/// # Errors
/// Fails if the kernel refuses; the limit is unchanged then.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    ORIGINAL.get_or_init(|| limit);
    Ok(())
}

/// Gives the original limit to `command`'s program.
pub(crate) fn restore_in(command: &mut Command) {
    if let Some(limit) = ORIGINAL.get() {
        sys::limit_descriptors(command, *limit);
    }
}
