//! Starting a container from a checkpoint: the shim's part. A session does the work (crate
//! `session`).
//!
//! ```text
//!   prepare the streams ─► session: processes made ─► init adopted, streams connected ─► session: memory, GPU ─► Running
//!            └──────────── failure, or cancelled by Kill, Delete, a client that is gone ────┴──► Created, as before
//! ```

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::checkpoint::{Annotations, remove_if_containerds};
use cgroup::Cgroup;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::TaskStart;
use containerd_shim_protos::shim::oci::Options;
use phase::Phase;
use reaper::{Child, Reaper};
use runtime::{OciRuntime, ProcessIo, RuntimeError};
use rustix::process::Signal;
use session::{Conductor, Failed, RestoreOrder, Stop};

use super::{Accounts, Actor, ProcessRef};
use crate::error::{RestoreError, TaskError};
use crate::stdio::{Copies, Owner, Stdio};

/// Longest time to reap a process dead for the kernel, unless a tracer holds it.
const ENDING: Duration = Duration::from_secs(1);

/// Checkpoint as the origin of a container.
#[derive(Clone, Debug)]
pub(super) struct FromCheckpoint {
    images: PathBuf,
    /// Folder for CRIU's log, as wanted by the client.
    work: Option<PathBuf>,
    no_pivot_root: bool,
}

impl FromCheckpoint {
    pub(super) fn of(request: &CreateTaskRequest, options: &Options) -> Option<Self> {
        let work = Some(&options.criu_work_path).filter(|path| !path.is_empty());
        (!request.checkpoint.is_empty()).then(|| Self {
            images: request.checkpoint.clone().into(),
            work: work.map(PathBuf::from),
            no_pivot_root: options.no_pivot_root,
        })
    }
}

impl Actor {
    /// Returns true for a container without a process before the start.
    pub(crate) fn is_to_be_restored(&self) -> bool {
        self.checkpoint.is_some() && self.init.child.is_none()
    }

    /// Returns the container's annotations about checkpoints.
    pub(crate) fn annotations(&self) -> Annotations {
        self.config.annotations.clone()
    }

    /// Restores the processes of a container created from a checkpoint. `stop` cancels the restore.
    pub(crate) fn restore_init(
        &mut self,
        stop: Stop,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        let Some(checkpoint) = self.checkpoint.clone().filter(|_| self.is_to_be_restored()) else {
            return Err(self.wrong_state("restore"));
        };
        let restore = Restore {
            order: RestoreOrder {
                subject: self.subject(),
                images: checkpoint.images,
                work: checkpoint.work,
                no_pivot_root: checkpoint.no_pivot_root,
                console_socket: None,
                shm: self.config.shm.clone(),
                annotations: self.config.annotations.clone(),
                devices: self.config.devices.clone(),
            },
            conductor: Arc::clone(&self.context.conductor),
            runtime: Arc::clone(&self.runtime),
            reaper: self.context.reaper.clone(),
            owner: self.owner.clone(),
            stdio: self.init.stdio.clone(),
        };
        self.init.starting();
        self.session = Some(stop.clone());
        Ok(async move {
            let restored = restore.run(stop).await;
            move |actor: &mut Self| {
                actor.session = None;
                let restored = restored.inspect_err(|_| actor.init.not_started())?;
                actor.init.started();
                actor.init.copies = Some(restored.copies);
                actor.init.child = Some(restored.child.clone());
                actor.accounts = restored.cgroup.map(Accounts::new);
                let (container_id, pid) = (actor.id.clone(), actor.init.pid());
                actor.context.events.publish(TaskStart { container_id, pid, ..TaskStart::default() });
                actor.watch(ProcessRef::Init, restored.child);
                actor.watch_oom();
                Ok(pid)
            }
        })
    }

    /// Forgets the checkpoint after its last use.
    pub(super) fn forget_checkpoint(&mut self) {
        if let Some(checkpoint) = self.checkpoint.take() {
            // The folder may be large, and nobody waits for the removal.
            tokio::task::spawn_blocking(move || remove_if_containerds(&checkpoint.images));
        }
    }
}

struct Running {
    child: Child,
    copies: Copies,
    /// `None` if the container has already ended.
    cgroup: Option<Cgroup>,
}

/// A single restore of a container.
struct Restore {
    order: RestoreOrder,
    conductor: Arc<dyn Conductor>,
    runtime: Arc<dyn OciRuntime>,
    reaper: Reaper,
    owner: Owner,
    stdio: Stdio,
}

impl Restore {
    async fn run(mut self, stop: Stop) -> Result<Running, TaskError> {
        let (container, images) = (self.order.subject.id.clone(), self.order.images.clone());
        let at = |phase, source| {
            let (container, images, source) = (container.clone(), images.clone(), Box::new(source));
            TaskError::Restore { container, images, phase, source }
        };
        let failed = |failed: Failed| at(failed.phase, RestoreError::Session(failed.cause));
        let stdio = |source| at(Phase::Prepare, RestoreError::Stdio(source));
        let (io, prepared) = self.stdio.prepare(&self.owner, &self.reaper).await.map_err(stdio)?;
        if let ProcessIo::Terminal { console_socket } = &io {
            self.order.console_socket = Some(console_socket.clone());
        }
        let restored = match self.conductor.restore(self.order, io, stop).await {
            Ok(restored) => restored,
            Err(error) => {
                prepared.abandon().await;
                return Err(failed(error));
            }
        };
        let child = restored.init().clone();
        let copies = match prepared.connect().await {
            Ok(copies) => copies,
            Err(error) => {
                restored.abandon("its standard input and output cannot be connected").await;
                child.wait().await;
                return Err(stdio(error));
            }
        };
        let cgroup = join(&*self.runtime, &container, &child).await;
        match (restored.go_on().await, cgroup) {
            (Ok(()), Ok(cgroup)) => {
                // The folder may be large, and nobody waits for the removal.
                tokio::task::spawn_blocking(move || remove_if_containerds(&images));
                Ok(Running { child, copies, cgroup })
            }
            (Ok(()), Err(source)) => {
                // The process may have ended before.
                let _ = child.signal(Signal::KILL);
                Err(at(Phase::Resume, RestoreError::Cgroup(source)))
            }
            (Err(error), _) => {
                child.wait().await;
                copies.shut_down().await;
                Err(failed(error))
            }
        }
    }
}

/// Returns the container's cgroup, or `None` if init has ended: the process's last step may have
/// been the only one left, and that restore has succeeded.
async fn join(runtime: &dyn OciRuntime, id: &str, child: &Child) -> Result<Option<Cgroup>, RuntimeError> {
    if child.exit().is_some() {
        return Ok(None);
    }
    match runtime.cgroup(id, child.process()) {
        // On version 1 the kernel puts a dead process in no cgroup.
        Err(_) if tokio::time::timeout(ENDING, child.wait()).await.is_ok() => Ok(None),
        found => found.map(Some),
    }
}
