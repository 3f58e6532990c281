//! Requests for a checkpoint and for a restore, the same for every runtime.

use std::fmt;
use std::path::PathBuf;

use criu::BoxError;
use phase::Cancel;
use proc::HostPid;
use serde::{Deserialize, Serialize};

use crate::{ProcessIo, Timeline};

/// Treatment of established TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tcp {
    /// Connections of the container with itself are kept, others closed in the restored container.
    #[default]
    Auto,
    /// Established connections make a checkpoint fail.
    Refuse,
    /// Connections are saved, and go on if the restored container has the same addresses.
    Keep,
    /// Connections are closed in the restored container.
    Close,
}

/// Permission for contents that cannot be restored, or not on every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// Established TCP connections.
    pub tcp: Tcp,
    /// Connections by unix sockets to the outside. Closed in the restored container.
    pub external_unix_sockets: bool,
    /// A session or terminal with a leader outside the container.
    pub shell_job: bool,
}

/// Limit for the rights of restored processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Privileges {
    /// At most the rights in the specification of the new container. The restore fails if the
    /// images have more.
    #[default]
    Container,
    /// The rights at the time of the checkpoint.
    Snapshot,
}

/// Request to save a container.
#[derive(Debug)]
pub struct CheckpointRequest {
    /// Container id.
    pub id: String,
    /// The container's init process, in this process's pid namespace.
    pub init: HostPid,
    /// An existing directory for the images, still empty.
    pub images: PathBuf,
    /// An existing directory for CRIU's log, `dump.log`.
    pub work: PathBuf,
    /// True: the container goes on. False: the processes are killed once the images are complete.
    pub leave_running: bool,
    /// Contents allowed in the images. With [`Tcp::Auto`] the images can be restored only after
    /// [`images::OpenFiles::close_outside`].
    pub allow: Allow,
    /// Checked before the container goes on or ends: a cancelled checkpoint fails.
    pub cancel: Cancel,
    /// Mapped files outside the container. Like `review`, only for a runtime that [drives CRIU
    /// here](crate::OciRuntime::drives_criu).
    pub external_files: Vec<PathBuf>,
    /// Memory that processes share and that is saved elsewhere. Like `review`, only for a runtime
    /// that drives CRIU here.
    pub sparse: Vec<criu::Sparse>,
    /// Accept descriptors and mappings of the NVIDIA driver's devices. Only after
    /// [`images::replace_devices`] the images can be restored then.
    pub devices: bool,
    /// Run before the container goes on or ends.
    pub review: Option<Review>,
}

/// Request to make a container from a checkpoint.
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
    /// New standard input and output of the init process.
    pub io: ProcessIo,
    /// Use MS_MOVE instead of pivot_root (for a rootfs on a ramdisk).
    pub no_pivot_root: bool,
    /// Leave the cgroup frozen at the end of the restore. A runtime unable to freeze before the
    /// processes run does so right after.
    pub frozen: bool,
    /// The caller fills memory missing from the images before the processes run. Only for a runtime
    /// that [drives CRIU here](crate::OciRuntime::drives_criu).
    pub cut: bool,
    /// Contents allowed in the images.
    pub allow: Allow,
    /// Rights of the processes. Only for a runtime that [drives CRIU
    /// here](crate::OciRuntime::drives_criu).
    pub privileges: Privileges,
    /// Record of the phases.
    pub timeline: Timeline,
    /// Checked before the processes run: a cancelled restore fails.
    pub cancel: Cancel,
}

/// Work on complete images while the container still stands still. The work may change or refuse
/// the images.
pub struct Review(Box<dyn FnOnce() -> Result<(), BoxError> + Send>);

impl Review {
    /// Returns a review that runs `work`. `work` may block: the thread behind CRIU has nothing else
    /// to do.
    #[must_use]
    pub fn new(work: impl FnOnce() -> Result<(), BoxError> + Send + 'static) -> Self {
        Self(Box::new(work))
    }

    /// Runs the work.
    ///
    /// # Errors
    /// Fails if the images are refused: the container goes on.
    pub fn run(self) -> Result<(), BoxError> {
        (self.0)()
    }
}

impl fmt::Debug for Review {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Review")
    }
}
