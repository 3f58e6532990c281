//! Runtimes with runc's command line: runc itself, crun, nvidia-container-runtime.
//!
//! Each operation is one call of the program:
//!
//! ```text
//!  runc --root ROOT --log SCRATCH/log.json --log-format json [--systemd-cgroup] create --bundle B --pid-file ... ID
//!         │                                  │
//!         │ forks init and ends              └─► why it failed: the last error in there
//!         ▼
//!       init, an orphan ──► this process, a subreaper, which has an adoption open since before the call
//! ```
//!
//! For create and exec the container's process inherits the program's descriptors 0, 1 and 2. So
//! the program's standard error is not read then. runc always logs an error and repeats it there:
//! the owner of the descriptors reads the error after a failed create or exec.

mod call;
mod cgroup;
mod checkpoint;
mod log;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ::cgroup::Cgroup;
use async_trait::async_trait;
use oci_spec::runtime::{Features, LinuxResources};
use proc::HostPid;
use reaper::{Child, Reaper};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::{
    CheckpointRequest, CreateRequest, ExecRequest, OciRuntime, Operation, ProcessIo, RestoreRequest, RuntimeError,
};
use call::Call;

/// A program with runc's command line.
///
/// A call dropped too early goes on in the background: an operation is done or undone as a whole.
#[derive(Clone, Debug)]
pub struct Command {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reaper: Reaper,
    binary: PathBuf,
    root: PathBuf,
    systemd_cgroup: bool,
}

impl Command {
    /// Returns a runtime for the program `binary`, a path or a name in `PATH`. The runtime keeps
    /// containers' state below `root`, and makes cgroups directly or through systemd.
    #[must_use]
    pub fn new(reaper: Reaper, binary: PathBuf, root: PathBuf, systemd_cgroup: bool) -> Self {
        Self { inner: Arc::new(Inner { reaper, binary, root, systemd_cgroup }) }
    }

    fn call<'a>(&'a self, operation: Operation, container: &'a str) -> Call<'a> {
        let Inner { reaper, binary, root, systemd_cgroup } = &*self.inner;
        Call { reaper, binary, root, systemd_cgroup: *systemd_cgroup, operation, container }
    }

    /// Runs `work` to its end even after the caller has gone: half an operation would leave half a
    /// container.
    async fn detached<T, F>(
        &self,
        operation: Operation,
        id: &str,
        work: impl FnOnce(Self, String) -> F,
    ) -> Result<T, RuntimeError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, RuntimeError>> + Send + 'static,
    {
        match tokio::spawn(work(self.clone(), id.to_owned())).await {
            Ok(result) => result,
            Err(error) => Err(self.call(operation, id).answer(format!("the call was given up: {error}"))),
        }
    }

    /// Runs an operation without further arguments.
    async fn simple(&self, operation: Operation, id: &str) -> Result<(), RuntimeError> {
        self.detached(operation, id, async move |command, id| {
            let call = command.call(operation, &id);
            let scratch = call.scratch()?;
            call.run(&scratch, vec![operation.to_string().into(), id.clone().into()]).await
        })
        .await
    }

    /// Freezes the container. runc may give up and leave a frozen container, thawed here.
    async fn pause_now(&self, id: &str) -> Result<(), RuntimeError> {
        let call = self.call(Operation::Pause, id);
        let cgroup = self.noted_cgroup(id).filter(|cgroup| !cgroup.is_frozen().unwrap_or(true));
        let scratch = call.scratch()?;
        let paused = call.run(&scratch, vec!["pause".into(), id.into()]).await;
        if let (Err(_), Some(cgroup)) = (&paused, cgroup)
            && let Err(error) = cgroup.thaw()
        {
            tracing::error!(container = id, "cannot undo a pause: {}", phase::chain(&error));
        }
        paused
    }

    async fn create_now(&self, request: CreateRequest) -> Result<Child, RuntimeError> {
        let CreateRequest { id, bundle, io, no_pivot_root, no_new_keyring, prepare: _ } = request;
        let call = self.call(Operation::Create, &id);
        // Checked here too, not only by the runtime: an existing container must not be undone
        // below.
        if self.knows(&call)? {
            return Err(call.refused(format!("container with id {id} exists already")));
        }
        let scratch = call.scratch()?;
        let mut arguments: Vec<OsString> = vec!["create".into(), "--bundle".into(), bundle.into()];
        if no_pivot_root {
            arguments.push("--no-pivot".into());
        }
        if no_new_keyring {
            arguments.push("--no-new-keyring".into());
        }
        let result = call.process(&scratch, arguments, io, None).await;
        if result.is_err()
            && let Err(error) = self.delete_now(&id).await
        {
            tracing::error!(container = id, %error, "cannot undo the creation of a container");
        }
        result
    }

    async fn exec_now(&self, request: ExecRequest) -> Result<Child, RuntimeError> {
        let ExecRequest { id, exec_id: _, bundle: _, mut process, io, prepare: _ } = request;
        let call = self.call(Operation::Exec, &id);
        let scratch = call.scratch()?;
        // Runtimes refuse a terminal without a socket, and a socket without a terminal, with
        // obscure messages.
        process.set_terminal(Some(matches!(io, ProcessIo::Terminal { .. })));
        let file = scratch.write_json(&call, "process.json", &process)?;
        call.process(&scratch, vec!["exec".into(), "--detach".into(), "--process".into(), file.into()], io, None).await
    }

    async fn delete_now(&self, id: &str) -> Result<(), RuntimeError> {
        let call = self.call(Operation::Delete, id);
        // containerd cleans up after every shim, even long after the container's deletion.
        if !self.knows(&call)? {
            return Ok(());
        }
        release_rootfs(&call)?;
        // Before the runtime's notes are gone.
        let cgroup = self.noted_cgroup(id);
        let deleted = self.delete_known(&call, id).await;
        if let (Ok(()), Some(cgroup)) = (&deleted, cgroup) {
            self.remove_rest(id, cgroup).await;
        }
        deleted
    }

    async fn delete_known(&self, call: &Call<'_>, id: &str) -> Result<(), RuntimeError> {
        let mut refused = Ok(());
        // Without force first: runc's force sleeps 100 ms even for an ended process.
        for arguments in [&["delete"][..], &["delete", "--force"]] {
            let scratch = call.scratch()?;
            let arguments = arguments.iter().copied().chain([id]).map(OsString::from).collect();
            match call.run(&scratch, arguments).await {
                // The state goes last: any failure after that is a poststop hook's, and must not
                // count. Messages differ between runtimes, so none is compared; crun even dies of a
                // hook that does not read its input.
                Err(error) if !self.knows(call)? => {
                    tracing::warn!(container = id, %error, "the runtime failed, but the container is deleted");
                    return Ok(());
                }
                Ok(()) => return Ok(()),
                Err(error) => refused = Err(error),
            }
        }
        refused
    }

    /// Returns whether the runtime has a container of this id: a folder of that name, in all of
    /// these runtimes.
    fn knows(&self, call: &Call<'_>) -> Result<bool, RuntimeError> {
        let state = self.inner.root.join(call.container);
        match std::fs::symlink_metadata(&state) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(call.file("read", state, source)),
        }
    }
}

/// Unmounts the container's root, left in the state folder by a runtime killed during a restore:
/// the runtime's delete would remove that folder with everything inside.
fn release_rootfs(call: &Call<'_>) -> Result<(), RuntimeError> {
    let mount = call.root.join(call.container).join("criu-root");
    match rustix::mount::unmount(&mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => {
            tracing::warn!(path = %mount.display(), "unmounting a mount of a dead runtime");
            Ok(())
        }
        // No such folder, or nothing mounted there.
        Err(Errno::NOENT | Errno::INVAL) => Ok(()),
        Err(error) => Err(call.file("unmount", mount, error.into())),
    }
}

#[async_trait]
impl OciRuntime for Command {
    async fn create(&self, request: CreateRequest) -> Result<Child, RuntimeError> {
        let id = request.id.clone();
        self.detached(Operation::Create, &id, async move |command, _| command.create_now(request).await).await
    }

    async fn start(&self, id: &str) -> Result<(), RuntimeError> {
        self.simple(Operation::Start, id).await
    }

    async fn exec(&self, request: ExecRequest) -> Result<Child, RuntimeError> {
        let id = request.id.clone();
        self.detached(Operation::Exec, &id, async move |command, _| command.exec_now(request).await).await
    }

    async fn pause(&self, id: &str) -> Result<(), RuntimeError> {
        self.detached(Operation::Pause, id, async move |command, id| command.pause_now(&id).await).await
    }

    async fn resume(&self, id: &str) -> Result<(), RuntimeError> {
        self.simple(Operation::Resume, id).await
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), RuntimeError> {
        let resources = resources.clone();
        self.detached(Operation::Update, id, async move |command, id| {
            let call = command.call(Operation::Update, &id);
            let scratch = call.scratch()?;
            let file = scratch.write_json(&call, "resources.json", &resources)?;
            call.run(&scratch, vec!["update".into(), "--resources".into(), file.into(), id.clone().into()]).await
        })
        .await
    }

    async fn checkpoint(&self, request: CheckpointRequest) -> Result<(), RuntimeError> {
        let id = request.id.clone();
        self.detached(Operation::Checkpoint, &id, async move |command, _| command.checkpoint_now(request).await).await
    }

    async fn restore(&self, request: RestoreRequest) -> Result<Child, RuntimeError> {
        let id = request.id.clone();
        self.detached(Operation::Restore, &id, async move |command, _| command.restore_now(request).await).await
    }

    async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        self.detached(Operation::Delete, id, async move |command, id| command.delete_now(&id).await).await
    }

    fn cgroup(&self, id: &str, init: HostPid) -> Result<Cgroup, RuntimeError> {
        self.cgroup_now(id, init)
    }

    fn drives_criu(&self) -> bool {
        false
    }

    async fn features(&self) -> Result<Features, RuntimeError> {
        self.detached(Operation::Features, "", async move |command, _| {
            let call = command.call(Operation::Features, "");
            let scratch = call.scratch()?;
            call.run(&scratch, vec!["features".into()]).await?;
            let output = scratch.output(&call)?;
            serde_json::from_slice(&output)
                .map_err(|error| call.answer(format!("the output is no list of features: {error}")))
        })
        .await
    }
}
