//! Failures of Task requests, and the only mapping to ttrpc statuses.

use std::path::PathBuf;

use cgroup::CgroupError;
use containerd_shim_protos::ttrpc::{self, Code};
use phase::Phase;
use role::Failure;
use runtime::RuntimeError;

use crate::container::Status;
use crate::options::OptionsError;

/// Failure of a request.
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
        source: crate::rootfs::RootfsError,
    },
    #[error("cannot connect standard input and output of {process}")]
    Stdio {
        process: String,
        #[source]
        source: crate::stdio::StdioError,
    },
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("checkpoint of container {container} failed while {phase}{}", told(owed.as_deref()))]
    Checkpoint {
        container: String,
        phase: Phase,
        owed: Option<String>,
        #[source]
        source: Failure,
    },
    #[error("restore of container {container} from {images} failed while {phase}")]
    Restore {
        container: String,
        images: PathBuf,
        phase: Phase,
        #[source]
        source: Box<RestoreError>,
    },
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

/// Failure of a restore. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error(transparent)]
    Session(Failure),
    #[error("cannot connect its standard input and output")]
    Stdio(#[source] crate::stdio::StdioError),
    #[error("cannot find the cgroup of the restored container")]
    Cgroup(#[source] RuntimeError),
}

/// Returns the clause of a message about the steps owed to a container.
fn told(owed: Option<&str>) -> String {
    owed.map_or_else(String::new, |owed| {
        format!(" (the container is not as it was, and gpusnap tries again until it is or the container ends: {owed})")
    })
}

/// Fault of a bundle.
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
    /// Returns the code for which containerd's clients test; see docs/behaviour.md.
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
            | Self::Checkpoint { .. }
            | Self::Restore { .. }
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
