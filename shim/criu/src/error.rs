//! Failures of operations.

use std::fmt;
use std::io;
use std::path::PathBuf;

use reaper::Exit;
use thiserror::Error;

use crate::notify::{BoxError, Stage};
use crate::version::Version;

/// Failure of a dump. The tree runs on as before, and no image file is left.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A directory of the request cannot be used.
    #[error("cannot {action} {path} to dump process {pid}")]
    Directory {
        /// The root of the tree.
        pid: i32,
        /// Action on the path.
        action: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Reason from the system.
        source: io::Error,
    },
    /// The directory already holds an image; CRIU would overwrite file by file.
    #[error("cannot dump process {pid} to {path}: it holds a checkpoint already")]
    Occupied {
        /// The root of the tree.
        pid: i32,
        /// The images directory.
        path: PathBuf,
    },
    /// CRIU failed.
    #[error("cannot dump process {pid}")]
    Criu {
        /// The root of the tree.
        pid: i32,
        /// Reason of the failure.
        source: CallError,
    },
}

/// Failure of a restore. No process of the tree is left.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A directory of the request cannot be used.
    #[error("cannot {action} {path} to restore from {images}")]
    Directory {
        /// The images directory.
        images: PathBuf,
        /// Action on the path.
        action: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Reason from the system.
        source: io::Error,
    },
    /// The directory holds no restorable image.
    #[error("cannot restore")]
    Image(#[source] images::ImageError),
    /// Images with missing memory cannot be prepared for CRIU.
    #[error("cannot restore")]
    Unmark(#[source] images::RewriteError),
    /// CRIU failed.
    #[error("cannot restore from {images}")]
    Criu {
        /// The images directory.
        images: PathBuf,
        /// Reason of the failure.
        source: CallError,
    },
}

/// Failure of a run of criu.
#[derive(Debug, Error)]
pub enum CallError {
    /// There is no such program.
    #[error("criu is not installed: there is no {path}")]
    NotInstalled {
        /// The path tried; in PATH for a bare name.
        path: PathBuf,
    },
    /// The program could not be started.
    #[error("cannot start {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// Reason from the system.
        source: io::Error,
    },
    /// criu failed, and is older than [`crate::MINIMUM`].
    #[error("criu is {found}, and {needed} is needed")]
    TooOld {
        /// Installed version.
        found: Version,
        /// Needed version.
        needed: Version,
    },
    /// criu ended without an answer.
    #[error("criu {}{}{}", ended(exit), after(stage.as_ref()), said(errors, log.as_ref()))]
    Died {
        /// Exit of criu.
        exit: Exit,
        /// Last stage reached.
        stage: Option<Stage>,
        /// Errors in criu's log or output.
        errors: Vec<String>,
        /// Path of the log, if criu wrote one.
        log: Option<PathBuf>,
    },
    /// criu reported a failure.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// A callback failed.
    #[error("{stage} failed")]
    Notify {
        /// Stage refused.
        stage: Stage,
        /// The callback's own error.
        source: BoxError,
    },
    /// Work between criu's start and the request failed.
    #[error("cannot prepare criu")]
    Started {
        /// The callback's own error.
        source: BoxError,
    },
    /// Communication with criu failed.
    #[error("communication with criu failed: {action}{}", after(stage.as_ref()))]
    Protocol {
        /// Action that failed.
        action: &'static str,
        /// Last stage reached.
        stage: Option<Stage>,
        /// Reason from the system.
        source: io::Error,
    },
}

/// CRIU's own account of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// Explanation of a well-known cause.
    pub cause: Option<String>,
    /// The first error lines of the log, without lines common to every log.
    pub errors: Vec<String>,
    /// `cr_errno` of the answer, an errno value.
    pub errno: Option<i32>,
    /// `cr_errmsg` of the answer: the very first error line, harmless or not.
    pub message: Option<String>,
    /// Path of the log, if CRIU wrote one.
    pub log: Option<PathBuf>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.cause, self.errors.is_empty(), &self.message) {
            (Some(cause), _, _) => write!(f, "{cause}")?,
            (None, false, _) => write!(f, "criu failed")?,
            (None, true, Some(message)) => write!(f, "criu failed: {}", message.trim())?,
            (None, true, None) => write!(f, "criu failed without saying why")?,
        }
        if let Some(errno) = self.errno {
            write!(f, " ({})", io::Error::from_raw_os_error(errno))?;
        }
        f.write_str(&said(&self.errors, self.log.as_ref()))
    }
}

fn said(errors: &[String], log: Option<&PathBuf>) -> String {
    let errors = if errors.is_empty() { String::new() } else { format!(": {}", errors.join("; ")) };
    log.map_or_else(|| errors.clone(), |log| format!("{errors} (log: {})", log.display()))
}

fn after(stage: Option<&Stage>) -> String {
    stage.map_or_else(|| " before its first stage".to_owned(), |stage| format!(" after {stage}"))
}

fn ended(exit: &Exit) -> String {
    // The reaper counts as shells do: 128 and the signal. criu itself exits with 0, 1 or 255.
    match exit.code {
        0 => "ended without an answer".to_owned(),
        code @ 129..=192 => format!("was killed by signal {}", code - 128),
        code => format!("ended with code {code} and without an answer"),
    }
}
