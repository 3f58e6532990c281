//! What a checkpoint and a restore are asked for with, whichever runtime does them.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use cgroup::{Cgroup, CgroupError};
use criu::BoxError;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

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
    /// Its init process, in this process's pid namespace.
    pub init: i32,
    /// An existing directory for the images, which holds none yet.
    pub images: PathBuf,
    /// An existing directory for CRIU's log, `dump.log`.
    pub work: PathBuf,
    /// The container goes on. Otherwise its processes are killed once the images are whole.
    pub leave_running: bool,
    /// What is no reason to fail.
    pub allow: Allow,
    /// Who waits for it: a container that is to be ended is not if nobody does.
    pub caller: Caller,
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
    /// Told of the phases.
    pub timeline: Timeline,
}

/// A runtime's side of a [`Reviewer`].
#[derive(Debug)]
pub struct Review {
    whole: oneshot::Sender<()>,
    verdict: oneshot::Receiver<Result<(), BoxError>>,
}

/// Who looks at the images when they are whole, while the container still stands still, and may change or refuse them.
#[derive(Debug)]
pub struct Reviewer {
    whole: oneshot::Receiver<()>,
    verdict: oneshot::Sender<Result<(), BoxError>>,
}

impl Review {
    /// Both sides.
    #[must_use]
    pub fn new() -> (Self, Reviewer) {
        let ((whole, is_whole), (verdict, answer)) = (oneshot::channel(), oneshot::channel());
        (Self { whole, verdict: answer }, Reviewer { whole: is_whole, verdict })
    }

    /// Says that the images are whole, and waits for what becomes of them.
    pub(crate) async fn ask(self) -> Result<(), BoxError> {
        let gone = || "nobody looks at the images any more: the container goes on".into();
        if self.whole.send(()).is_err() {
            return Err(gone());
        }
        self.verdict.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Reviewer {
    /// Waits until the images are whole; false if they never will be.
    pub async fn images_are_whole(&mut self) -> bool {
        (&mut self.whole).await.is_ok()
    }

    /// Lets the checkpoint succeed, or fail with a reason.
    pub fn decide(self, verdict: Result<(), BoxError>) {
        // A runtime that does not listen any more has failed already.
        drop(self.verdict.send(verdict));
    }
}

/// Knows whether somebody waits for an operation.
#[derive(Clone, Debug)]
pub struct Caller(Weak<()>);

/// Kept by who waits for an operation, as long as he does.
#[derive(Debug)]
pub struct Waiting {
    _alive: Arc<()>,
}

impl Caller {
    /// A caller, there until the second is dropped.
    #[must_use]
    pub fn new() -> (Self, Waiting) {
        let alive = Arc::new(());
        (Self(Arc::downgrade(&alive)), Waiting { _alive: alive })
    }

    /// Nobody waits any more.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Freezes the cgroup of a restored tree, without those who made the tree there: they are moved to where another process is.
pub(crate) fn freeze_around(makers: &[i32], root: i32, beside: i32) -> Result<(), CgroupError> {
    let cgroup = Cgroup::of_process(root)?;
    for maker in makers {
        cgroup.expel(*maker, beside)?;
    }
    cgroup.freeze()
}
