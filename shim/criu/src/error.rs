//! Why an operation failed.

use std::fmt;
use std::io;
use std::path::PathBuf;

use reaper::Exit;
use thiserror::Error;

use crate::notify::{BoxError, Stage};
use crate::version::Version;

/// Why a dump failed. The tree runs on as before, and no image file is left.
#[derive(Debug, Error)]
pub enum DumpError {
    /// A directory of the request cannot be used.
    #[error("cannot {action} {path} to dump process {pid}")]
    Directory {
        /// The root of the tree.
        pid: i32,
        /// What was tried.
        action: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory holds an image already, which CRIU would overwrite file by file.
    #[error("cannot dump process {pid} to {path}: it holds a checkpoint already")]
    Occupied {
        /// The root of the tree.
        pid: i32,
        /// The images directory.
        path: PathBuf,
    },
    /// CRIU did not do it.
    #[error("cannot dump process {pid}")]
    Criu {
        /// The root of the tree.
        pid: i32,
        /// Why.
        source: CallError,
    },
}

/// Why a restore failed. No process of the tree is left.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A directory of the request cannot be used.
    #[error("cannot {action} {path} to restore from {images}")]
    Directory {
        /// The images directory.
        images: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory holds no image that could be restored.
    #[error("cannot restore")]
    Image(#[source] images::ImageError),
    /// Images without some of their memory cannot be made ready for CRIU.
    #[error("cannot restore")]
    Unmark(#[source] images::RewriteError),
    /// CRIU did not do it.
    #[error("cannot restore from {images}")]
    Criu {
        /// The images directory.
        images: PathBuf,
        /// Why.
        source: CallError,
    },
}

/// Why a run of criu came to nothing.
#[derive(Debug, Error)]
pub enum CallError {
    /// There is no such program.
    #[error("criu is not installed: there is no {path}")]
    NotInstalled {
        /// What was looked for; in PATH if it is a bare name.
        path: PathBuf,
    },
    /// The program could not be started.
    #[error("cannot start {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It failed, and is older than [`crate::MINIMUM`].
    #[error("criu is {found}, and {needed} is needed")]
    TooOld {
        /// What is installed.
        found: Version,
        /// What is needed.
        needed: Version,
    },
    /// It ended without an answer.
    #[error("criu {}{}{}", ended(exit), after(stage.as_ref()), said(errors, log.as_ref()))]
    Died {
        /// How.
        exit: Exit,
        /// The last stage that it had reached.
        stage: Option<Stage>,
        /// What it had said of errors.
        errors: Vec<String>,
        /// Where its log is kept, if it wrote one.
        log: Option<PathBuf>,
    },
    /// It answered that it failed.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// A callback failed.
    #[error("{stage} failed")]
    Notify {
        /// The stage that was refused.
        stage: Stage,
        /// The callback's own error.
        source: BoxError,
    },
    /// What was to be done between criu's start and the request failed.
    #[error("cannot prepare criu")]
    Started {
        /// The callback's own error.
        source: BoxError,
    },
    /// The conversation broke down.
    #[error("criu cannot be talked to: {action}{}", after(stage.as_ref()))]
    Protocol {
        /// What was tried.
        action: &'static str,
        /// The last stage that it had reached.
        stage: Option<Stage>,
        /// Why.
        source: io::Error,
    },
}

/// CRIU's own account of a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// What it comes to, if the cause is a well-known one.
    pub cause: Option<String>,
    /// The first error lines of the log, without those that are in every log.
    pub errors: Vec<String>,
    /// `cr_errno` of the answer, an errno value.
    pub errno: Option<i32>,
    /// `cr_errmsg` of the answer: the first error line of all, harmless or not.
    pub message: Option<String>,
    /// Where the log is kept, if CRIU wrote one.
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

/// What a checkpoint or restore would not work without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// criu is older than [`crate::MINIMUM`].
    Version {
        /// What was found.
        found: Version,
        /// What is needed.
        needed: Version,
    },
    /// The kernel or the machine lacks something: a line of `criu check`.
    Kernel(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version { found, needed } => write!(f, "criu is {found}, and {needed} is needed"),
            Self::Kernel(line) => f.write_str(line),
        }
    }
}

/// Why checkpoint and restore would not work here.
#[derive(Debug, Error)]
pub enum PreflightError {
    /// criu could not be asked.
    #[error("cannot ask criu what it can do")]
    Criu(#[from] CallError),
    /// Something is missing; each thing is one line.
    #[error("checkpoint and restore do not work here: {}", missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Missing {
        /// What; not empty.
        missing: Vec<Missing>,
    },
}
