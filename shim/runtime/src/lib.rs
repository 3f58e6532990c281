//! OCI runtimes behind one trait.
//!
//! [`OciRuntime`] is the shim's view of a runtime, with two implementations. [`libcontainer`] is
//! part of this binary and runs each step in a re-executed single-threaded helper. [`command`]
//! drives runc or a command line like runc's (crun, nvidia-container-runtime). A container's
//! runtime is chosen once, at the creation, and kept in the bundle ([`Choice`]); nothing falls back
//! to the other.
//!
//! Requests to the kernel without a runtime are in the crate `cgroup`: list of the container's
//! processes, signals to all of them, statistics and out-of-memory events.

mod checkpoint;
mod choice;
pub mod command;
mod error;
pub mod libcontainer;
mod spec;

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use cgroup::Cgroup;
use oci_spec::runtime::{Features, LinuxResources, Process};
use proc::HostPid;
use reaper::Child;
use serde::{Deserialize, Serialize};

pub use checkpoint::{Allow, CheckpointRequest, Privileges, RestoreRequest, Review, Tcp};
pub use choice::{Choice, Kind};
pub use error::{Operation, RuntimeError};
pub use phase::{Cancel, Phase, Timeline};
pub use spec::process_from_json;

/// Standard input and output for a process about to start.
#[derive(Debug)]
pub enum ProcessIo {
    /// Descriptors 0, 1 and 2 of the process.
    Fds {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// The runtime makes a pseudo-terminal in the container's devpts. The runtime sends the master,
    /// as one SCM_RIGHTS message, to the listening unix socket at this path.
    Terminal {
        /// Path of the socket; short enough for `sun_path`.
        console_socket: PathBuf,
    },
}

/// Arguments of `create` beside the bundle's config.json.
#[derive(Debug)]
pub struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Absolute path of the bundle, with config.json and the mounted rootfs.
    pub bundle: PathBuf,
    /// Standard input and output of the init process.
    pub io: ProcessIo,
    /// Use MS_MOVE instead of pivot_root (for a rootfs on a ramdisk).
    pub no_pivot_root: bool,
    /// Do not make a session keyring for the container.
    pub no_new_keyring: bool,
    /// Preparation for a checkpoint; only by the embedded runtime.
    pub prepare: Prepare,
}

/// Preparation of a container at its creation, so that it can be saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prepare {
    /// The container is what its specification says.
    #[default]
    Nothing,
    /// A filter refuses system calls that make what CRIU cannot save, as a kernel without them does.
    Seccomp,
}

impl Prepare {
    /// Variable of the shim's environment with a preparation.
    pub const VARIABLE: &str = "GPUSNAP_PREPARE";

    /// Returns the name of a preparation: in annotations, runtime options and the environment.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "none",
            Self::Seccomp => "seccomp",
        }
    }

    /// Returns the preparation of a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Nothing, Self::Seccomp].into_iter().find(|prepare| prepare.name() == name)
    }
}

/// A process to start in a running container.
#[derive(Debug)]
pub struct ExecRequest {
    /// Container id.
    pub id: String,
    /// Id of the new process, for messages and file names.
    pub exec_id: String,
    /// Absolute path of the container's bundle.
    pub bundle: PathBuf,
    /// Program and user.
    pub process: Process,
    /// Standard input and output of the new process.
    pub io: ProcessIo,
    /// Preparation of the container.
    pub prepare: Prepare,
}

/// An OCI runtime, as used by the shim. Every call is one whole operation: a failure undoes what
/// has begun. Calls for one container must not overlap; calls for different containers may.
#[async_trait]
pub trait OciRuntime: Debug + Send + Sync {
    /// Makes the container, up to a process that waits to become the user's; returns the process, a
    /// child of this process, watched from the birth on.
    async fn create(&self, request: CreateRequest) -> Result<Child, RuntimeError>;

    /// Lets a created container run the user's program.
    async fn start(&self, id: &str) -> Result<(), RuntimeError>;

    /// Starts a further process in a running container.
    async fn exec(&self, request: ExecRequest) -> Result<Child, RuntimeError>;

    /// Freezes all processes of the container.
    async fn pause(&self, id: &str) -> Result<(), RuntimeError>;

    /// Thaws a paused container.
    async fn resume(&self, id: &str) -> Result<(), RuntimeError>;

    /// Changes the limits of a container.
    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), RuntimeError>;

    /// Removes the container: kills the remaining processes, then removes the cgroup and the
    /// runtime's own state, and runs the poststop hooks. An unknown container is no error: there is
    /// nothing to remove.
    async fn delete(&self, id: &str) -> Result<(), RuntimeError>;

    /// Saves the processes of a running or paused container as CRIU images, restorable by each of
    /// these runtimes. After a failure, or if left running, the container is as before: paused if
    /// paused before. Otherwise init is killed; the runtime's state goes with
    /// [`delete`](Self::delete).
    ///
    /// Files of a failed checkpoint may be left in the images directory; the log is kept.
    async fn checkpoint(&self, request: CheckpointRequest) -> Result<(), RuntimeError>;

    /// Makes a container from images, in place of [`create`](Self::create) and
    /// [`start`](Self::start); returns the running init. A failure leaves nothing of the container,
    /// and the restore can be tried again.
    async fn restore(&self, request: RestoreRequest) -> Result<Child, RuntimeError>;

    /// Returns the container's cgroup: the cgroup of its creation. Processes of the container, init
    /// too, may have moved to cgroups below. `init` is looked up if the runtime keeps no note.
    fn cgroup(&self, id: &str, init: HostPid) -> Result<Cgroup, RuntimeError> {
        Cgroup::of_process(init).map_err(|error| RuntimeError::Cgroup {
            runtime: "this runtime".into(),
            container: id.into(),
            message: phase::chain(&error),
        })
    }

    /// Returns whether this process drives CRIU: then images can be changed before the end of a
    /// checkpoint, and a restored container is available before any code inside has run.
    fn drives_criu(&self) -> bool;

    /// Returns the runtime's features, as in the OCI runtime specification.
    async fn features(&self) -> Result<Features, RuntimeError>;
}
