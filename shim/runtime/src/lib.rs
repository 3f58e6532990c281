//! OCI runtimes behind one trait.
//!
//! [`OciRuntime`] is what the shim asks of a runtime. Two implement it: [`libcontainer`], which is part of this binary
//! and runs each step in a re-executed single-threaded helper, and [`command`], which drives runc or a command line
//! like it (crun, nvidia-container-runtime). Which of them a container has is decided once, when it is created, and
//! kept in its bundle ([`Choice`]); nothing falls back to the other.
//!
//! What the kernel can be asked directly, without a runtime, is in the crate `cgroup`: who is in the container, signals
//! to all of them, its statistics and its out-of-memory events.

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

pub use checkpoint::{Allow, CheckpointRequest, Privileges, RestoreRequest, Review, Tcp};
pub use choice::{Choice, Kind};
pub use error::{Operation, RuntimeError};
pub use phase::{Cancel, Phase, Timeline};
pub use spec::process_from_json;

/// Standard input and output of a process that a runtime is about to start.
#[derive(Debug)]
pub enum ProcessIo {
    /// These become its descriptors 0, 1 and 2.
    Fds {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// The runtime makes a pseudo-terminal in the container's devpts and sends its master, as one SCM_RIGHTS message,
    /// to the listening unix socket at this path.
    Terminal {
        /// Path of the socket; short enough for `sun_path`.
        console_socket: PathBuf,
    },
}

/// What `create` needs beside the bundle's config.json.
#[derive(Debug)]
pub struct CreateRequest {
    /// Container id.
    pub id: String,
    /// Absolute path of the bundle, with config.json and the mounted rootfs.
    pub bundle: PathBuf,
    /// Where the init process's standard input and output go.
    pub io: ProcessIo,
    /// Use MS_MOVE instead of pivot_root (for a rootfs on a ramdisk).
    pub no_pivot_root: bool,
    /// Do not make a session keyring of its own for the container.
    pub no_new_keyring: bool,
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
    /// What to run and as whom.
    pub process: Process,
    /// Where its standard input and output go.
    pub io: ProcessIo,
}

/// What the shim needs of an OCI runtime. Every call is one whole operation: when it fails, what it had begun is
/// undone. Calls for one container must not overlap; calls for different containers may.
#[async_trait]
pub trait OciRuntime: Debug + Send + Sync {
    /// Makes the container, up to a process that waits to become the user's; returns that process, which is a child
    /// of this process and watched from before it can be lost.
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

    /// Removes the container: what still runs in it is killed, then its cgroup and the runtime's own state go, and the
    /// poststop hooks run. A container that the runtime does not know is no error: there is nothing to remove.
    async fn delete(&self, id: &str) -> Result<(), RuntimeError>;

    /// Saves the processes of a running or paused container as CRIU images, which any of these runtimes restores. When
    /// it fails, and when the container is left running, the container is as before: paused if it was. Otherwise its
    /// init is killed; what the runtime keeps of it goes with [`delete`](Self::delete).
    ///
    /// Files of a failed checkpoint may be left in the images directory; the log is kept.
    async fn checkpoint(&self, request: CheckpointRequest) -> Result<(), RuntimeError>;

    /// Makes a container from images, in place of [`create`](Self::create) and [`start`](Self::start); returns its
    /// init, which runs. When it fails, nothing is left of the container, and it can be tried again.
    async fn restore(&self, request: RestoreRequest) -> Result<Child, RuntimeError>;

    /// The container's cgroup: the place that was made for it. Processes of the container, its init too, can have moved
    /// to cgroups below. `init` is who is asked for where the runtime keeps no note.
    fn cgroup(&self, id: &str, init: HostPid) -> Result<Cgroup, RuntimeError> {
        Cgroup::of_process(init).map_err(|error| RuntimeError::Cgroup {
            runtime: "this runtime".into(),
            container: id.into(),
            message: phase::chain(&error),
        })
    }

    /// Whether CRIU is driven by this process: then images can be changed before a checkpoint is done, and a restored
    /// container can be had before anything of it has run.
    fn drives_criu(&self) -> bool;

    /// What the runtime supports, as the OCI runtime specification describes it.
    async fn features(&self) -> Result<Features, RuntimeError>;
}
