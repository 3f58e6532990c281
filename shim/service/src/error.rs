//! What a Task request can fail with, and the one place where that becomes a ttrpc status.

use std::path::PathBuf;

use bulk::BulkError;
use cgroup::CgroupError;
use containerd_shim_protos::ttrpc::{self, Code};
use gpu::CudaError;
use runtime::{Phase, RuntimeError};

use crate::container::Status;
use crate::options::OptionsError;

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    #[error("container {container} is not known to this shim")]
    NoContainer { container: String },
    #[error("container {container} has no exec process {exec}")]
    NoProcess { container: String, exec: String },
    #[error("container {container} already exists")]
    ContainerExists { container: String },
    #[error("exec process {exec} of container {container} already exists")]
    ExecExists { container: String, exec: String },
    #[error("cannot {action} {process} while it is {status}")]
    WrongState { action: &'static str, process: String, status: Status },
    #[error("{process}: process already finished")]
    Finished { process: String },
    #[error("request for container {container} carries an unusable {field}: {message}")]
    BadRequest { container: String, field: &'static str, message: String },
    #[error("cannot use the bundle of container {container}")]
    Bundle {
        container: String,
        #[source]
        source: BundleError,
    },
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("cannot mount the rootfs of container {container} on {target}")]
    Mount {
        container: String,
        target: PathBuf,
        #[source]
        source: containerd_shim::Error,
    },
    #[error("cannot connect standard input and output of {process}")]
    Stdio {
        process: String,
        #[source]
        source: crate::stdio::StdioError,
    },
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Checkpoint(Box<CheckpointError>),
    #[error(transparent)]
    Restore(Box<RestoreError>),
    #[error("cannot {action} {process}")]
    Signal {
        action: &'static str,
        process: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot {action} the cgroup of container {container}")]
    Cgroup {
        action: &'static str,
        container: String,
        #[source]
        source: CgroupError,
    },
    #[error("the shim's work on container {container} was cut off")]
    Gone { container: String },
}

/// Why a checkpoint was not taken, and what was being done.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint of container {container} failed while {phase}")]
pub(crate) struct CheckpointError {
    pub(crate) container: String,
    pub(crate) phase: Phase,
    #[source]
    pub(crate) source: CheckpointFailure,
}

/// Why a step of a checkpoint failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckpointFailure {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot freeze or thaw it")]
    Cgroup(#[source] CgroupError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Memory(#[from] BulkError),
    #[error("the container has a name that a snapshot cannot have")]
    Name(#[from] snapshot::NameError),
    #[error("its init, process {pid}, is saved and killed, but does not end")]
    DoesNotEnd { pid: i32 },
    #[error("the work was cut off")]
    CutOff(#[source] tokio::task::JoinError),
}

/// Why a container was not restored, and what was being done. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
#[error("restore of container {container} from {images} failed while {phase}")]
pub(crate) struct RestoreError {
    pub(crate) container: String,
    pub(crate) images: PathBuf,
    pub(crate) phase: Phase,
    #[source]
    pub(crate) source: RestoreFailure,
}

/// Why a step of a restore failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreFailure {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Image(#[from] images::ImageError),
    #[error("the container has an annotation that is not understood: {0}")]
    Annotation(String),
    #[error("cannot connect its standard input and output")]
    Stdio(#[source] crate::stdio::StdioError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot find its cgroup")]
    Cgroup(#[source] CgroupError),
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Memory(#[from] BulkError),
    #[error("its big memory is not in the images, and its runtime fills none: use libcontainer (no BinaryName)")]
    Fill,
    #[error("there is GPU state of process {pid}, which was not restored")]
    Gone { pid: i32 },
    #[error("the checkpoint does not fit this node: {0}")]
    Node(String),
    #[error("the work was cut off")]
    CutOff(#[source] tokio::task::JoinError),
}

/// What was wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a valid OCI runtime configuration")]
    Spec {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl From<checkpoint::RequestError> for TaskError {
    fn from(error: checkpoint::RequestError) -> Self {
        let checkpoint::RequestError { container, field, message } = error;
        Self::BadRequest { container, field, message }
    }
}

impl TaskError {
    /// The codes that containerd's clients test for; see docs/behaviour.md.
    fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. } | Self::NoProcess { .. } | Self::Finished { .. } => Code::NOT_FOUND,
            Self::ContainerExists { .. } | Self::ExecExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::BadRequest { .. } | Self::Options(_) => Code::INVALID_ARGUMENT,
            Self::Bundle { .. }
            | Self::Mount { .. }
            | Self::Stdio { .. }
            | Self::Runtime(_)
            | Self::Checkpoint(_)
            | Self::Restore(_)
            | Self::Signal { .. }
            | Self::Cgroup { .. }
            | Self::Gone { .. } => Code::UNKNOWN,
        }
    }
}

pub(crate) use phase::chain;

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_chain_is_told_once() {
        let error = TaskError::Bundle {
            container: "c1".into(),
            source: BundleError::File {
                action: "read",
                path: "/b/config.json".into(),
                source: std::io::Error::from(std::io::ErrorKind::NotFound),
            },
        };
        assert_eq!(
            chain(&error),
            "cannot use the bundle of container c1: cannot read /b/config.json: entity not found"
        );
    }

    #[test]
    fn clients_can_tell_errors_apart_by_code() {
        let code = |error: TaskError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => status.code.enum_value().unwrap(),
            other => panic!("{other}"),
        };
        assert_eq!(code(TaskError::NoContainer { container: "a".into() }), Code::NOT_FOUND);
        assert_eq!(code(TaskError::Finished { process: "a".into() }), Code::NOT_FOUND);
        assert_eq!(code(TaskError::ContainerExists { container: "a".into() }), Code::ALREADY_EXISTS);
        let wrong = TaskError::WrongState { action: "exec in", process: "a".into(), status: Status::Paused };
        assert_eq!(code(wrong), Code::FAILED_PRECONDITION);
    }
}
