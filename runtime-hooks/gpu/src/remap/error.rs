//! Why files did not take the place of memory.

use std::io;
use std::path::{Path, PathBuf};

use proc::{HostPid, Range};
use tracee::inject::InjectError;

/// Why files did not, or not wholly, take the place of a process's memory. It has its data in any case.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemapError {
    /// A segment is not what it has to be.
    #[error("cannot replace {range} of process {pid}: {why}")]
    Segment { pid: HostPid, range: Range, why: &'static str },
    /// The memory has something else than what is to take its place.
    #[error("the memory of process {pid} at {address:#x} is not what was saved")]
    Differs { pid: HostPid, address: u64 },
    /// Its mappings or its memory cannot be read.
    #[error("cannot read the memory of process {pid}")]
    Memory {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    /// A file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A call could not be made in it.
    #[error("cannot make calls in process {pid}")]
    Inject {
        pid: HostPid,
        #[source]
        source: InjectError,
    },
    /// A call failed that gives it a file.
    #[error("cannot {action} process {pid}")]
    Call {
        action: &'static str,
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    /// A mapping was refused.
    #[error("cannot map anything at {range} of process {pid}")]
    Map {
        pid: HostPid,
        range: Range,
        #[source]
        source: io::Error,
    },
}

impl RemapError {
    pub(super) fn memory(pid: HostPid) -> impl Fn(io::Error) -> Self {
        move |source| Self::Memory { pid, source }
    }

    pub(super) fn file(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::File { path: path.to_owned(), source }
    }

    pub(super) fn inject(pid: HostPid) -> impl Fn(InjectError) -> Self {
        move |source| Self::Inject { pid, source }
    }
}
