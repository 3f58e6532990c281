//! Limit on open descriptors: raised for this process, as it was for its children.

use std::io;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// Limit that this process was started with, once it is raised.
static ORIGINAL: OnceLock<Rlimit> = OnceLock::new();

/// Lets this process open as many descriptors as its hard limit allows.
///
/// A shim has some ten for each process of its pod, and service managers start containerd with a soft limit of 1024, for
/// programs that use `select`. Children of this process, and so its containers, keep the limit that it was started with.
///
/// # Errors
/// When the kernel refuses; the limit is as before then.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    ORIGINAL.get_or_init(|| limit);
    Ok(())
}

/// Has `command` run with the original limit.
pub(crate) fn restore_in(command: &mut Command) {
    if let Some(limit) = ORIGINAL.get() {
        sys::limit_descriptors(command, *limit);
    }
}
