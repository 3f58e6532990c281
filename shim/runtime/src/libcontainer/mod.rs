//! The runtime inside this binary: libcontainer, run in helper processes.
//!
//! libcontainer changes the process that calls it (its OOM score, its dumpable flag, its working directory) and clones
//! it without an exec, which only a single-threaded process survives. So each step that needs libcontainer runs in a
//! helper: this executable again, started with [`HELPER`] as its first argument.
//!
//! ```text
//!  shim ──spawn──► helper ──clone(CLONE_PARENT)──► intermediate ──clone(CLONE_PARENT)──► init
//!    │               │ joins no namespace             │ joins the cgroup,                  │ becomes the user's
//!    │◄─reply, exit──┘                                │ user and pid namespace; exits      │ program at start
//!    └── parent of all three: reaps them, and adopts init
//! ```
//!
//! libcontainer's builders leave gaps: they drop seccomp in further processes, signal by a pid that may be anybody's by
//! then, and write state in place. So the helper calls what lies below them, `container_main_process`, with a
//! specification that it has completed (`helper/adapt.rs`), finishes what libcontainer leaves undone
//! (`helper/fixup.rs`), and keeps libcontainer's state files itself.

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

/// First argument by which this binary knows that it is to be the helper.
pub const HELPER: &str = "libcontainer-helper";

pub use helper::{is_mapper, mapper_main};

/// How this runtime is called in messages.
const NAME: &str = "libcontainer";

/// Does one step of one container, in the process that was started for it. To be called by `main` before it starts a
/// thread, when the first argument is [`HELPER`].
#[must_use]
pub fn helper_main() -> ExitCode {
    helper::main()
}

/// libcontainer, run in helper processes.
///
/// A call that is dropped before it is done goes on in the background, so that it is done or undone as a whole.
#[derive(Debug)]
pub struct Libcontainer {
    client: Client,
}

impl Libcontainer {
    /// A runtime that keeps its containers' state below `root`, and makes their cgroups itself or has systemd do it.
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
