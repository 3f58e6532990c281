//! What can go wrong when a runtime is asked for something.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// What a runtime was asked to do.
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

/// Why a runtime did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime ran and said no; `message` is what it said.
    #[error("{runtime} {operation} of container {container} failed: {message}")]
    Refused {
        /// Which runtime.
        runtime: String,
        /// What was asked of it.
        operation: Operation,
        /// Container id; empty for [`Operation::Features`].
        container: String,
        /// The runtime's own words, on one line.
        message: String,
    },
    /// The runtime's program cannot be run.
    #[error("cannot run {binary:?} to {operation} container {container}")]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// What was to be asked of it.
        operation: Operation,
        /// Container id.
        container: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The runtime's program ended without an answer, or with one that makes no sense.
    #[error("{runtime} {operation} of container {container} gave no usable answer: {message}")]
    Answer {
        /// Which runtime.
        runtime: String,
        /// What was asked of it.
        operation: Operation,
        /// Container id.
        container: String,
        /// What was wrong with it.
        message: String,
    },
    /// The container's cgroup is not known.
    #[error("{runtime} does not know the cgroup of container {container}: {message}")]
    Cgroup {
        /// Which runtime.
        runtime: String,
        /// Container id.
        container: String,
        /// What was looked at, and what was wrong with it.
        message: String,
    },
    /// CRIU did not dump the container.
    #[error(transparent)]
    Dump(#[from] criu::DumpError),
    /// CRIU did not restore the container.
    #[error(transparent)]
    CriuRestore(#[from] criu::RestoreError),
    /// A file of ours around the call could not be read or written.
    #[error("cannot {action} {path} to {operation} container {container}")]
    File {
        /// "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// During what.
        operation: Operation,
        /// Container id.
        container: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
