//! Taking a checkpoint.
//!
//! ```text
//!   Freeze ──► (with a GPU: Discover ──► Lock ──► Hold ──► CudaCheckpoint ──► CleanResidue ──► Freeze) ──┐
//!     │                          a guardian's work, which undoes it when it fails                        │
//!     │          ┌───────────────────────────────────────────────────────────────────────────────────────┘
//!     │  (SaveMemory ──► Swap) ──► SaveShm ──► Dump (──► MoveMemory) ──► Publish ──┐
//!     │          │         │          │         │            │              │      └► (with a GPU: CudaRestore ──► Unlock) ──► Release
//!     │          │         │          │         │            │              │                 ├ continue: thawed if it ran
//!     └──────────┴─────────┴──────────┴─────────┴────────────┴──────────────┘                 └ exit: CRIU has killed it
//!                          │ failure
//!                          ▼
//!     the draft is removed, GPU and freezer are as before: the container goes on as it was
//! ```
//!
//! A container that goes on does so as soon as CRIU has dumped it: CudaRestore, Unlock and Release come before Publish, and
//! MoveMemory and most of Publish, which need its images only, go on beside them. One that ends is not killed before all that
//! there is of it is published.
//!
//! containerd has paused the container, as a rule, and resumes it after the answer. One that runs is frozen here, so that
//! what is saved beside the processes fits them. Either way Freeze looks for processes that were caught in the middle
//! of a `vfork`, which cannot be dumped, and lets the container run for another moment if there are any.
//!
//! It is an operation like others: `State`, `Kill` and `Wait` are answered meanwhile. Where nobody waits for the answer
//! any more (containerd's deadline has passed), a container that containerd paused for the checkpoint would stay paused
//! for ever, because the same deadline keeps containerd from resuming it: it is resumed here.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cgroup::Cgroup;
use containerd_shim_protos::events::task::TaskCheckpointed;
use gpu::{Guardian, Staging};
use reaper::{Child, Reaper};
use runtime::{Caller, CheckpointRequest, OciRuntime, Phase, Review, Timeline};

use super::big_memory::BigMemory;
use super::{Actor, NodeStore, Status};
use crate::error::{CheckpointError, CheckpointFailure, TaskError};
use checkpoint::{CheckpointOptions, DeviceNode, Draft, LogFolder, Manifest, SavedGpus, Shm};

/// CRIU's name for its log of a dump.
const LOG: &str = "dump.log";
/// How long after a pause a checkpoint still counts as what the pause was made for. containerd saves a writable layer
/// in between.
const PAUSED_FOR_IT: Duration = Duration::from_secs(60);
/// How long the driver may take to move what is on the GPUs to memory or back. It moves 1.8 GB/s at worst (cuda.md),
/// and a node has some hundred GB.
pub(super) const GPU: Duration = Duration::from_secs(600);
/// A killed process is gone in milliseconds, unless it has much memory to give back.
const END: Duration = Duration::from_secs(30);

impl Actor {
    /// Saves the container as `wishes` says.
    pub(crate) fn checkpoint(
        &mut self,
        wishes: CheckpointOptions,
        caller: Caller,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        let paused = match self.init.status {
            Status::Running if self.init_ended.is_none() => false,
            Status::Paused => true,
            Status::Running => return Err(self.wrong_state("checkpoint", "", Status::Stopped)),
            status => return Err(self.wrong_state("checkpoint", "", status)),
        };
        let (Some(child), Some(cgroup)) = (self.init.child.clone(), self.cgroup.clone()) else {
            return Err(self.wrong_state("checkpoint", "", self.init.status));
        };
        let paused_for_it = paused && self.paused_at.is_some_and(|at| at.elapsed() < PAUSED_FOR_IT);
        let resume = self.resume();
        self.freezer.lend();
        let work = Work {
            id: self.id.clone(),
            namespace: self.context.namespace.clone(),
            logs: self.context.logs.clone(),
            bundle: self.bundle.clone(),
            runtime: Arc::clone(&self.runtime),
            runtime_name: self.runtime_name.clone(),
            child,
            resident: cgroup.anonymous_memory(),
            cgroup,
            shm: self.shm.clone(),
            devices: self.devices.clone(),
            reaper: self.context.reaper.clone(),
            store: self.context.store.clone(),
            paused,
            timeline: Timeline::start(Phase::Freeze),
            wishes,
            caller: caller.clone(),
        };
        Ok(async move {
            let folder = work.wishes.folder.to_string_lossy().into_owned();
            let done = work.run().await;
            // Whether or not it was taken: who paused the container for it cannot resume it.
            let resumed = match resume {
                Ok(resume) if paused_for_it && caller.is_gone() => Some(resume.await),
                _ => None,
            };
            move |actor: &mut Self| {
                actor.take_freezer_back();
                if let Some(resumed) = resumed {
                    tracing::warn!("container {}: resumed, since nobody waits for its checkpoint any more", actor.id);
                    if let Err(error) = resumed(actor) {
                        tracing::error!("container {} stays paused: {}", actor.id, crate::error::chain(&error));
                    }
                }
                done?;
                let container_id = actor.id.clone();
                let checkpointed = TaskCheckpointed { container_id, checkpoint: folder, ..TaskCheckpointed::default() };
                actor.context.events.publish(checkpointed);
                Ok(())
            }
        })
    }
}

/// One checkpoint of one container.
pub(super) struct Work {
    pub(super) id: String,
    pub(super) namespace: String,
    logs: PathBuf,
    bundle: PathBuf,
    pub(super) runtime: Arc<dyn OciRuntime>,
    pub(super) runtime_name: String,
    pub(super) child: Child,
    pub(super) cgroup: Cgroup,
    /// Bytes of memory that it has, in no file.
    pub(super) resident: Option<u64>,
    shm: Option<Shm>,
    devices: Vec<DeviceNode>,
    /// The container was paused before.
    pub(super) paused: bool,
    pub(super) reaper: Reaper,
    pub(super) store: NodeStore,
    pub(super) timeline: Timeline,
    pub(super) wishes: CheckpointOptions,
    caller: Caller,
}

/// What has become of the container meanwhile.
#[derive(Default)]
struct Fate {
    /// Who has its GPU state to give back.
    guardian: Option<Guardian>,
    /// CRIU has killed it: the images are all that is left.
    killed: bool,
}

impl Work {
    async fn run(self) -> Result<(), TaskError> {
        let mut fate = Fate::default();
        let taken = self.take(&mut fate).await;
        let phase = self.timeline.current();
        let settled = self.settle(taken.is_ok(), fate).await;
        if let (Err(_), Err(error)) = (&taken, &settled) {
            tracing::error!("container {} is not as it was: {}", self.id, crate::error::chain(error));
        }
        if taken.is_err() {
            self.timeline.enter(phase);
        }
        match taken.and(settled) {
            Ok(()) => {
                tracing::info!("container {} is checkpointed: {}", self.id, self.timeline);
                Ok(())
            }
            Err(source) => {
                let phase = self.timeline.current();
                Err(TaskError::Checkpoint(Box::new(CheckpointError { container: self.id, phase, source })))
            }
        }
    }

    async fn take(&self, fate: &mut Fate) -> Result<(), CheckpointFailure> {
        let CheckpointOptions { folder, work, exit, allow, .. } = &self.wishes;
        let at = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointFailure::File { action, path, source }
        };
        let draft = Draft::begin(folder).map_err(at("use the folder", folder))?;
        let log = LogFolder::make(&self.logs, work.as_deref(), &self.namespace, &self.id, LOG);
        let log = log.map_err(at("make a folder for the log of", folder))?;
        let (cgroup, paused) = (self.cgroup.clone(), self.paused);
        blocking(move || cgroup.freeze_at_rest(paused)).await?.map_err(CheckpointFailure::Cgroup)?;
        let (gpu, staging) = self.suspend(&mut fate.guardian).await?;
        let mut memory = BigMemory::save(self, staging, fate.guardian.as_mut()).await?;
        if let Some(shm) = self.shm.clone() {
            self.timeline.enter(Phase::SaveShm);
            let images = draft.folder().to_owned();
            blocking(move || shm.save(&images)).await?.map_err(at("save /dev/shm in", draft.folder()))?;
        }
        self.timeline.enter(Phase::Dump);
        let (review, reviewer) = Review::new();
        let request = CheckpointRequest {
            id: self.id.clone(),
            init: self.child.pid(),
            images: draft.folder().to_owned(),
            work: log.path().to_owned(),
            leave_running: !exit,
            allow: *allow,
            caller: self.caller.clone(),
            external_files: memory.as_ref().map(BigMemory::files).unwrap_or_default(),
            review: memory.is_some().then_some(review),
        };
        let dump = async {
            let dumped = self.runtime.checkpoint(request).await;
            let settled = if dumped.is_ok() && !exit {
                let settled = self.settle(true, std::mem::take(fate)).await;
                self.timeline.enter(Phase::Publish);
                settled
            } else {
                Ok(())
            };
            (dumped, settled)
        };
        // What goes on beside the container's own way has a timeline of its own.
        let timeline = if *exit { self.timeline.clone() } else { Timeline::start(Phase::MoveMemory) };
        let ((dumped, settled), published) = match &mut memory {
            Some(memory) => {
                let publish = memory.publish(self, draft.folder().to_owned(), gpu.as_ref(), reviewer, &timeline);
                tokio::join!(dump, publish)
            }
            None => (dump.await, Ok(None)),
        };
        if (dumped.is_err() || settled.is_err())
            && let (Some(memory), Ok(Some(published))) = (&mut memory, &published)
        {
            memory.withdraw(self, published).await;
        }
        if let Err(error) = dumped {
            // Where containerd's own shim leaves it, and its users look for it.
            if let Err(error) = std::fs::copy(log.path().join(LOG), self.bundle.join("criu-dump.log")) {
                tracing::debug!("container {}: no log of the failed dump: {error}", self.id);
            }
            // A refusal of the images is what the dump failed for.
            return Err(published.err().unwrap_or_else(|| error.into()));
        }
        fate.killed = *exit;
        settled?;
        let moved = published.inspect_err(|_| self.timeline.enter(timeline.current()))?;
        self.timeline.enter(Phase::Publish);
        let runtime_name = self.runtime_name.clone();
        let manifest = Manifest::new(&self.id, runtime_name, *allow, gpu, moved.clone(), self.resident, &self.timeline);
        let written = manifest.write(draft.folder());
        let published = match written {
            Ok(()) => draft.publish(),
            Err(error) if *exit => {
                let folder = draft.keep();
                return Err(at("finish the checkpoint, which is all that is left of the container, in", &folder)(
                    error,
                ));
            }
            Err(error) => Err(error),
        };
        if let Err(error) = published {
            // Of one that has ended it is all that there is.
            if let (Some(memory), Some(moved), false) = (&mut memory, &moved, *exit) {
                memory.withdraw(self, moved).await;
            }
            return Err(at("publish the checkpoint in", folder)(error));
        }
        log.remove();
        Ok(())
    }

    /// Moves what is on GPUs to the memory of the frozen container, and leaves that frozen.
    async fn suspend(
        &self,
        guardian: &mut Option<Guardian>,
    ) -> Result<(Option<SavedGpus>, Vec<Staging>), CheckpointFailure> {
        let cgroup = self.cgroup.clone();
        let uses_gpu = move || Ok(cgroup.pids()?.into_iter().any(cuda::process::touches_gpu));
        if !blocking(uses_gpu).await?.map_err(CheckpointFailure::Cgroup)? {
            return Ok((None, Vec::new()));
        }
        let mut suspending = Guardian::start(&self.reaper)?;
        let init = self.child.pid();
        let mut suspended = suspending.suspend(init, self.paused, self.wishes.patience, GPU, &self.timeline).await?;
        *guardian = Some(suspending);
        for pid in suspended.leave_out_execs(init) {
            tracing::warn!("process {pid} was started by an exec and is not saved; it goes on if the container does");
        }
        let staging = std::mem::take(&mut suspended.staging);
        Ok((SavedGpus::of(suspended, &self.devices, init), staging))
    }

    /// Lets the container go as it was, or waits for its end.
    async fn settle(&self, taken: bool, fate: Fate) -> Result<(), CheckpointFailure> {
        let Fate { guardian, killed } = fate;
        if let Some(mut guardian) = guardian {
            if killed {
                guardian.dismiss();
            } else {
                guardian.resume(self.child.pid(), self.paused, Vec::new(), GPU, &self.timeline).await?;
            }
        }
        if taken {
            self.timeline.enter(Phase::Release);
        }
        let (cgroup, paused) = (self.cgroup.clone(), self.paused);
        let put_back = move || match (paused && !killed, cgroup.is_frozen()?) {
            // A runtime that fails may leave it so.
            (true, false) if !taken => cgroup.freeze(),
            // What CRIU has killed dies only then.
            (false, true) => cgroup.thaw(),
            _ => Ok(()),
        };
        blocking(put_back).await?.map_err(CheckpointFailure::Cgroup)?;
        if killed && tokio::time::timeout(END, self.child.wait()).await.is_err() {
            return Err(CheckpointFailure::DoesNotEnd { pid: self.child.pid() });
        }
        Ok(())
    }
}

/// Runs what waits for files or for the kernel.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, CheckpointFailure> {
    tokio::task::spawn_blocking(work).await.map_err(CheckpointFailure::CutOff)
}
