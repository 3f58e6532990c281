//! Failures of a runtime.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Operation of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Make a container.
    Create,
    /// Run a created container's program.
    Start,
    /// Start a further process.
    Exec,
    /// Freeze a container.
    Pause,
    /// Thaw a container.
    Resume,
    /// Change a container's limits.
    Update,
    /// Save a container's processes.
    Checkpoint,
    /// Make a container from saved processes.
    Restore,
    /// Remove a container.
    Delete,
    /// Describe the runtime.
    Features,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Exec => "exec",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Delete => "delete",
            Self::Features => "features",
        })
    }
}

/// Failure of a runtime's operation.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime ran and refused; `message` is the runtime's own.
    #[error("{runtime} {operation} of container {container} failed: {message}")]
    Refused {
        /// Name of the runtime.
        runtime: String,
        /// Operation requested.
        operation: Operation,
        /// Container id; empty for [`Operation::Features`].
        container: String,
        /// The runtime's own message, on one line.
        message: String,
    },
    /// The runtime's program cannot be run.
    #[error("cannot run {binary:?} to {operation} container {container}")]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// Operation requested.
        operation: Operation,
        /// Container id.
        container: String,
        /// Reason from the system.
        #[source]
        source: io::Error,
    },
    /// The runtime's program ended without an answer, or with an unusable one.
    #[error("{runtime} {operation} of container {container} gave no usable answer: {message}")]
    Answer {
        /// Name of the runtime.
        runtime: String,
        /// Operation requested.
        operation: Operation,
        /// Container id.
        container: String,
        /// Fault of the answer.
        message: String,
    },
    /// The container's cgroup is not known.
    #[error("{runtime} does not know the cgroup of container {container}: {message}")]
    Cgroup {
        /// Name of the runtime.
        runtime: String,
        /// Container id.
        container: String,
        /// Source of the cgroup, and the fault.
        message: String,
    },
    /// CRIU did not dump the container.
    #[error(transparent)]
    Dump(#[from] criu::DumpError),
    /// CRIU did not restore the container.
    #[error(transparent)]
    CriuRestore(#[from] criu::RestoreError),
    /// Our own file for the call could not be read or written.
    #[error("cannot {action} {path} to {operation} container {container}")]
    File {
        /// "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Operation during which the file was used.
        operation: Operation,
        /// Container id.
        container: String,
        /// Reason from the system.
        #[source]
        source: io::Error,
    },
}
