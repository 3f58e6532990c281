//! The runtime inside this binary: libcontainer, run in helper processes.
//!
//! libcontainer changes the calling process (OOM score, dumpable flag, working directory) and
//! clones without an exec, safe only in a single-threaded process. So each step with libcontainer
//! runs in a helper: this executable again, started with [`HELPER`] as its first argument.
//!
//! ```text
//!  shim ──spawn──► helper ──clone(CLONE_PARENT)──► intermediate ──clone(CLONE_PARENT)──► init
//!    │               │ joins no namespace             │ joins the cgroup,                  │ becomes the user's
//!    │◄─reply, exit──┘                                │ user and pid namespace; exits      │ program at start
//!    └── parent of all three: reaps them, and adopts init
//! ```
//!
//! libcontainer's builders have gaps: no seccomp in further processes, signals by a possibly reused
//! pid, state written in place. So the helper calls the layer below, `container_main_process`, with
//! a completed specification (`helper/adapt.rs`), finishes libcontainer's gaps (`helper/fixup.rs`),
//! and keeps libcontainer's state files.

mod capability;
mod checkpoint;
mod client;
mod executable;
mod features;
mod helper;
mod privileges;
mod protocol;
mod restore;
#[allow(unsafe_code)]
mod sys;

use std::path::PathBuf;
use std::process::ExitCode;

use async_trait::async_trait;
use cgroup::Cgroup;
use oci_spec::runtime::{Features, LinuxResources};
use proc::HostPid;
use reaper::{Child, Reaper};

use crate::{CheckpointRequest, CreateRequest, ExecRequest, OciRuntime, Operation, RestoreRequest, RuntimeError};
use client::Client;
use protocol::Step;

/// First argument that makes this binary the helper.
pub const HELPER: &str = "libcontainer-helper";

pub use helper::{is_mapper, mapper_main};

/// Name of this runtime in messages.
const NAME: &str = "libcontainer";

/// Runs one step of one container, in a process started for that step. `main` calls this before any
/// thread, if the first argument is [`HELPER`].
#[must_use]
pub fn helper_main() -> ExitCode {
    helper::main()
}

/// libcontainer, run in helper processes.
///
/// A call dropped too early goes on in the background: an operation is done or undone as a whole.
#[derive(Debug)]
pub struct Libcontainer {
    client: Client,
}

impl Libcontainer {
    /// Returns a runtime with state below `root`, and cgroups made directly or through systemd.
    #[must_use]
    pub fn new(reaper: Reaper, root: PathBuf, systemd_cgroup: bool) -> Self {
        Self { client: Client::new(reaper, root, systemd_cgroup) }
    }

    async fn simple(&self, operation: Operation, id: &str, step: Step) -> Result<(), RuntimeError> {
        self.client.run(operation, id, step).await
    }
}

#[async_trait]
impl OciRuntime for Libcontainer {
    async fn create(&self, request: CreateRequest) -> Result<Child, RuntimeError> {
        self.client.create(request).await
    }

    async fn start(&self, id: &str) -> Result<(), RuntimeError> {
        self.simple(Operation::Start, id, Step::Start).await
    }

    async fn exec(&self, request: ExecRequest) -> Result<Child, RuntimeError> {
        self.client.exec(request).await
    }

    async fn pause(&self, id: &str) -> Result<(), RuntimeError> {
        self.client.freezer(Operation::Pause, id, helper::pause).await
    }

    async fn resume(&self, id: &str) -> Result<(), RuntimeError> {
        self.client.freezer(Operation::Resume, id, helper::resume).await
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), RuntimeError> {
        self.simple(Operation::Update, id, Step::Update(Box::new(resources.clone()))).await
    }

    async fn checkpoint(&self, request: CheckpointRequest) -> Result<(), RuntimeError> {
        self.client.checkpoint(request).await
    }

    async fn restore(&self, request: RestoreRequest) -> Result<Child, RuntimeError> {
        self.client.restore(request).await
    }

    async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        self.simple(Operation::Delete, id, Step::Delete).await
    }

    fn cgroup(&self, id: &str, _init: HostPid) -> Result<Cgroup, RuntimeError> {
        self.client.cgroup(id)
    }

    fn drives_criu(&self) -> bool {
        true
    }

    async fn features(&self) -> Result<Features, RuntimeError> {
        Ok(features::features())
    }
}
