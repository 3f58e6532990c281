//! What a checkpoint and a restore are asked for with, whichever runtime does them.

use std::fmt;
use std::path::PathBuf;

use criu::BoxError;
use phase::Cancel;
use proc::HostPid;
use serde::{Deserialize, Serialize};

use crate::{ProcessIo, Timeline};

/// What is done about established TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tcp {
    /// They make a checkpoint fail.
    #[default]
    Refuse,
    /// They are saved, and go on where the restored container has the same addresses.
    Keep,
    /// They are closed in the restored container.
    Close,
}

/// What a checkpoint may contain although it cannot come back, or not everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// Established TCP connections.
    pub tcp: Tcp,
    /// Connections by unix sockets to the outside, which the restored container finds closed.
    pub external_unix_sockets: bool,
    /// A session or terminal whose leader is outside the container.
    pub shell_job: bool,
}

/// How much restored processes may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Privileges {
    /// No more than the specification of the new container gives. With more in the images the restore fails.
    #[default]
    Container,
    /// What they could do when they were saved.
    Snapshot,
}

/// A container to be saved.
#[derive(Debug)]
pub struct CheckpointRequest {
    /// Container id.
    pub id: String,
    /// Its init process.
    pub init: HostPid,
    /// An existing directory for the images, which holds none yet.
    pub images: PathBuf,
    /// An existing directory for CRIU's log, `dump.log`.
    pub work: PathBuf,
    /// The container goes on. Otherwise its processes are killed once the images are whole.
    pub leave_running: bool,
    /// What is no reason to fail.
    pub allow: Allow,
    /// Asked before the container goes on or ends: a cancelled checkpoint fails.
    pub cancel: Cancel,
    /// Files that processes have mapped and that are not part of the container. Only for a runtime that
    /// [drives CRIU here](crate::OciRuntime::drives_criu), as is the next.
    pub external_files: Vec<PathBuf>,
    /// Asked before the container goes on or ends.
    pub review: Option<Review>,
}

/// A container to be made from a checkpoint.
#[derive(Debug)]
pub struct RestoreRequest {
    /// Container id.
    pub id: String,
    /// Absolute path of the bundle, with config.json and the mounted rootfs.
    pub bundle: PathBuf,
    /// The directory with the images.
    pub images: PathBuf,
    /// An existing directory for CRIU's log, `restore.log`.
    pub work: PathBuf,
    /// Where the init process's standard input and output go, in place of those that it had.
    pub io: ProcessIo,
    /// Use MS_MOVE instead of pivot_root (for a rootfs on a ramdisk).
    pub no_pivot_root: bool,
    /// Leave its cgroup frozen when everything is restored. A runtime that cannot do so before the processes run does it
    /// right after.
    pub frozen: bool,
    /// Memory was cut from the images, and whoever asks fills it before the processes run. Only for a runtime that
    /// [drives CRIU here](crate::OciRuntime::drives_criu).
    pub cut: bool,
    /// What is no reason to fail.
    pub allow: Allow,
    /// What the processes may do. Only for a runtime that [drives CRIU here](crate::OciRuntime::drives_criu).
    pub privileges: Privileges,
    /// Told of the phases.
    pub timeline: Timeline,
    /// Asked before the processes run: a cancelled restore fails.
    pub cancel: Cancel,
}

/// Work on whole images, done while the container still stands still. The work may change the images, or refuse them.
pub struct Review(Box<dyn FnOnce() -> Result<(), BoxError> + Send>);

impl Review {
    /// Returns a review that runs `work`, which may block: the thread that drives CRIU has nothing else to do.
    #[must_use]
    pub fn new(work: impl FnOnce() -> Result<(), BoxError> + Send + 'static) -> Self {
        Self(Box::new(work))
    }

    /// Runs the work.
    ///
    /// # Errors
    /// When the images are refused: the container goes on.
    pub fn run(self) -> Result<(), BoxError> {
        (self.0)()
    }
}

impl fmt::Debug for Review {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Review")
    }
}
