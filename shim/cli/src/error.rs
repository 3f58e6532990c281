//! Errors of commands: snapshot, cause, remedy, and exit code.

use std::path::PathBuf;

use registry::{PullError, PushError, RegistryError, TargetError};
use snapshot::{
    ExportError, ImportError, NameError, OpenError, PublishError, ReadError, ReferenceError, RemoveError, ResolveError,
    SnapshotError,
};

/// Failure of a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error("cannot use the store {}", store.display())]
    Open { store: PathBuf, source: OpenError },
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("cannot list the store")]
    List { source: ReadError },
    #[error("cannot {action} {snapshot}")]
    Snapshot { action: &'static str, snapshot: String, source: Box<SnapshotError> },
    #[error("cannot inspect {snapshot}: its segment table is damaged: {what}")]
    Segments { snapshot: String, what: String },
    #[error("{snapshot} was not removed")]
    Remove { snapshot: String, source: RemoveError },
    #[error("the store was not pruned")]
    Prune { source: RemoveError },
    #[error("{snapshot} was not pushed to {target}")]
    Push { snapshot: String, target: String, source: Box<PushError> },
    #[error("{target} was not pulled")]
    Pull { target: String, source: Box<PullError> },
    #[error("{snapshot} was not exported")]
    Export { snapshot: String, source: Box<ExportError> },
    #[error("nothing was imported from {file}")]
    Import { file: String, source: Box<ImportError> },
    #[error("{count} {} damaged: remove the snapshots concerned with `gpusnap rm`, and pull or take them again",
        if *count == 1 { "thing is" } else { "things are" })]
    Damaged { count: usize },
    #[error("refusing to write an archive to a terminal: name a file, or redirect the output")]
    Terminal,
    #[error("{what} was interrupted: {next}")]
    Interrupted { what: String, next: &'static str },
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
}

/// Advice about an interrupted transfer.
pub(crate) const AGAIN: &str = "the same command goes on from there";

/// Exit codes, as in `gpusnap --help`.
pub(crate) const FAILED: u8 = 1;
const MISUSED: u8 = 2;
const MISSING: u8 = 3;
const DAMAGED: u8 = 4;
const IN_USE: u8 = 5;
const INTERRUPTED: u8 = 130;

impl CliError {
    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Reference(_) | Self::Name(_) | Self::Target(_) | Self::Terminal => MISUSED,
            Self::Open { source: OpenError::Damaged { .. }, .. } | Self::Damaged { .. } | Self::Segments { .. } => {
                DAMAGED
            }
            Self::List { source } => read_code(source),
            Self::Snapshot { source, .. } => snapshot_code(source),
            Self::Remove { source, .. } | Self::Prune { source } => remove_code(source),
            Self::Push { source, .. } => match **source {
                PushError::Registry(RegistryError::Damaged { .. }) => DAMAGED,
                _ => FAILED,
            },
            Self::Pull { source, .. } => match **source {
                PullError::Registry(RegistryError::NotFound { .. }) => MISSING,
                PullError::Registry(RegistryError::Wrong { .. }) => DAMAGED,
                _ => FAILED,
            },
            Self::Export { source, .. } => match **source {
                ExportError::Damaged { .. } => DAMAGED,
                _ => FAILED,
            },
            Self::Import { source, .. } => match **source {
                ImportError::Digest { .. } | ImportError::CutOff { .. } | ImportError::Missing { .. } => DAMAGED,
                ImportError::Publish(PublishError::Missing { .. } | PublishError::Size { .. }) => DAMAGED,
                _ => FAILED,
            },
            Self::Interrupted { .. } => INTERRUPTED,
            _ => FAILED,
        }
    }

    /// The next step, if the message has none.
    fn advice(&self) -> Option<&'static str> {
        match (self, self.code()) {
            (Self::Remove { .. }, IN_USE) => Some("try again later, or with --wait"),
            (Self::Snapshot { .. } | Self::Remove { .. }, MISSING) => Some("see `gpusnap ls`"),
            (Self::Snapshot { .. } | Self::Segments { .. } | Self::List { .. } | Self::Export { .. }, DAMAGED) => {
                Some("`gpusnap verify` lists all damage")
            }
            (Self::Pull { source, .. }, _) => match &**source {
                PullError::Registry(error) if is_passing(error) => Some(AGAIN),
                _ => None,
            },
            (Self::Push { source, .. }, _) => match &**source {
                PushError::Registry(error) if is_passing(error) => Some(AGAIN),
                _ => None,
            },
            _ => None,
        }
    }

    /// The error on one line: the failure, the cause, and the next step.
    pub(crate) fn line(&self) -> String {
        let mut line = format!("gpusnap: {}", chain(self));
        if let Some(advice) = self.advice() {
            line += &format!("; {advice}");
        }
        line.replace(|c: char| c.is_control(), " ")
    }
}

pub(crate) use phase::chain;

/// Returns whether a retry may succeed.
fn is_passing(error: &RegistryError) -> bool {
    match error {
        RegistryError::Status { status, .. } => matches!(status, 408 | 429 | 500..),
        RegistryError::Connection { .. } | RegistryError::Stalled { .. } | RegistryError::Short { .. } => true,
        _ => false,
    }
}

fn read_code(error: &ReadError) -> u8 {
    if matches!(error, ReadError::Index { .. } | ReadError::Digest { .. }) { DAMAGED } else { FAILED }
}

fn snapshot_code(error: &SnapshotError) -> u8 {
    match error {
        SnapshotError::Resolve(ResolveError::Missing { .. }) => MISSING,
        SnapshotError::Missing { .. } | SnapshotError::Size { .. } => DAMAGED,
        SnapshotError::Read(error) => read_code(error),
        _ => FAILED,
    }
}

fn remove_code(error: &RemoveError) -> u8 {
    match error {
        RemoveError::Resolve(ResolveError::Missing { .. }) => MISSING,
        RemoveError::InUse { .. } => IN_USE,
        RemoveError::Read(error) => read_code(error),
        _ => FAILED,
    }
}
