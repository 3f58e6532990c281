//! Errors of a session.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use cgroup::CgroupError;
use gpu::SessionError as GpuError;
use phase::{Cancelled, Phase};
use proc::HostPid;
use role::Failure;
use runtime::RuntimeError;
use serde::{Deserialize, Serialize};

/// A checkpoint or restore that failed: the phase, the cause, and what could not be put back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("failed while {phase}")]
pub struct Failed {
    /// The phase that failed.
    pub phase: Phase,
    /// The cause.
    #[source]
    pub cause: Failure,
    /// State that the container has not got back yet, in words. The session goes on to try.
    pub owed: Option<String>,
}

/// The cause of a failure, inside a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A file could not be used.
    #[error("cannot {action} {path}")]
    File {
        /// "write", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The freezer failed.
    #[error("cannot freeze or thaw it")]
    Freezer(#[source] CgroupError),
    /// The container's cgroup could not be found or read.
    #[error("cannot use its cgroup")]
    Cgroup(#[source] CgroupError),
    /// The runtime or CRIU failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// GPU state could not be moved.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Memory could not be moved.
    #[error(transparent)]
    Memory(#[from] Failure),
    /// The images cannot be restored from.
    #[error(transparent)]
    Folder(#[from] checkpoint::FolderError),
    /// The container has an id or namespace that names no snapshot.
    #[error("the container has a name that a snapshot cannot have")]
    Name(#[from] snapshot::NameError),
    /// The images cannot be read.
    #[error(transparent)]
    Damaged(#[from] images::ImageError),
    /// The images could not be rewritten.
    #[error("cannot rewrite devices and sockets in the images")]
    Images(#[from] images::RewriteError),
    /// The client, a Kill or a Delete ended the operation.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// Init survived its end.
    #[error("its init, process {pid}, is saved and killed, but does not end")]
    DoesNotEnd {
        /// Pid of init.
        pid: HostPid,
    },
    /// An annotation is malformed.
    #[error("the container has an annotation that is not understood: {0}")]
    Annotation(String),
    /// The runtime cannot put memory back.
    #[error("its big memory is not in the images, and its runtime fills none: use libcontainer (no BinaryName)")]
    Fill,
    /// The node differs from the one that was saved.
    #[error("the checkpoint does not fit this node: {0}")]
    Node(String),
    /// A part of the session ended without a result.
    #[error("{0} ended without a result: this is a bug of gpusnap")]
    Bug(&'static str),
}

/// The end of a session without a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lost {
    /// The process died.
    #[error("its session died: {how}")]
    Died { how: String },
    /// A phase took too long.
    #[error("its session was killed: the phase had not ended after {} s", limit.as_secs())]
    Late { limit: Duration },
    /// The session did not end after it was cancelled.
    #[error("its session was killed: {} s after it was cancelled ({reason}) it had not ended", limit.as_secs())]
    Deaf { reason: String, limit: Duration },
}
