//! Starting a container from a checkpoint.
//!
//! ```text
//!   Inspect ──► LoadShm ──► Prepare ──► (the runtime: Cgroup, Restore, Hooks) ──► Resume ─────────────────────────► Running
//!      │           │           │                       │                            │ frozen, with GPU or big memory:  ▲
//!      │           │           │                       │                            └► Fill ──► CudaRestore ──► Unlock ┤
//!      │           │           │                       │                               └── Fill of those without a GPU ┘
//!      └───────────┴───────────┴─────────── failure ───┴────────────────────────────────────┘
//!                                              ▼
//!                     nothing is left of it: Created, as before, and start can be tried again
//! ```
//!
//! Where the node lacks the snapshot that the checkpoint points to, it is pulled after Inspect (Pull).

use std::cmp::Reverse;
use std::future::{Future, ready};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulk::{Filled, Node, Restored, Saved, Source, Worker};
use cgroup::Cgroup;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::TaskStart;
use containerd_shim_protos::shim::oci::Options;
use cuda::Pair;
use gpu::{Guardian, Resumed, Swap};
use reaper::{Child, Reaper};
use runtime::{Allow, OciRuntime, Phase, RestoreRequest, Timeline};
use snapshot::Scope;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::big_memory::swap;
use super::checkpoint::GPU;
use super::create::undo;
use super::{Actor, NodeStore, Status};
use crate::error::{RestoreError, RestoreFailure, TaskError};
use crate::stdio::{Copies, Owner, Stdio};
use checkpoint::{
    Annotations, DeviceNode, Folder, LogFolder, Manifest, Network, SavedGpus, Shm, remove_if_containerds,
};

/// CRIU's name for its log of a restore.
const LOG: &str = "restore.log";
/// A process that the kernel counts as dead is reaped in no time, unless a tracer holds it.
const ENDING: Duration = Duration::from_secs(1);

/// What a container is to be made from.
#[derive(Clone, Debug)]
pub(super) struct FromCheckpoint {
    images: PathBuf,
    /// Where the client wants CRIU's log.
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
    /// A container that has no process until it is started.
    pub(crate) fn is_to_be_restored(&self) -> bool {
        self.checkpoint.is_some() && self.init.child.is_none()
    }

    /// The container's annotations about checkpoints.
    pub(crate) fn annotations(&self) -> Annotations {
        self.annotations.clone()
    }

    /// Makes the processes of a container that was created from a checkpoint.
    pub(crate) fn restore_init(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        let Some(checkpoint) = self.checkpoint.clone().filter(|_| self.is_to_be_restored()) else {
            return Err(self.wrong_state("restore", "", self.init.status));
        };
        let work = Work {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            logs: self.context.logs.clone(),
            runtime: Arc::clone(&self.runtime),
            reaper: self.context.reaper.clone(),
            owner: self.owner.clone(),
            stdio: self.init.stdio.clone(),
            shm: self.shm.clone(),
            annotations: self.annotations.clone(),
            store: self.context.store.clone(),
            devices: self.devices.clone(),
            timeline: Timeline::start(Phase::Inspect),
            checkpoint,
        };
        self.init.starting = true;
        Ok(async move {
            let restored = work.run().await;
            move |actor: &mut Self| {
                actor.init.starting = false;
                let restored = restored?;
                actor.init.status = Status::Running;
                actor.init.copies = Some(restored.copies);
                actor.init.child = Some(restored.child.clone());
                actor.oom_kills = restored.cgroup.as_ref().map_or(0, Cgroup::oom_kills);
                actor.cgroup = restored.cgroup;
                let (container_id, pid) = (actor.id.clone(), actor.init.pid());
                actor.context.events.publish(TaskStart { container_id, pid, ..TaskStart::default() });
                actor.watch("", restored.child);
                actor.watch_oom();
                Ok(pid)
            }
        })
    }

    /// Nothing will be restored from it any more.
    pub(super) fn forget_checkpoint(&mut self) {
        if let Some(checkpoint) = self.checkpoint.take() {
            remove_if_containerds(&checkpoint.images);
        }
    }
}

/// What a checkpoint says that a restore has to know.
struct Inspected {
    allow: Allow,
    /// None without state on GPUs.
    gpu: Option<SavedGpus>,
    /// None if all memory is in the images.
    memory: Option<Source>,
    /// Bytes of memory that the container had, if that is known.
    resident: Option<u64>,
}

/// What a frozen container is to be given back.
struct Resume<'a> {
    gpu: Option<&'a SavedGpus>,
    /// Staging memory that the guardian fills.
    staging: Option<Saved>,
    init: i32,
    pairs: Result<Vec<Pair>, RestoreFailure>,
}

struct Running {
    child: Child,
    copies: Copies,
    /// None if it has ended by now.
    cgroup: Option<Cgroup>,
    /// As [`Inspected::resident`].
    resident: Option<u64>,
}

impl Running {
    /// `; 6925 MB of memory, 2098 MB when it was saved`, where that is known.
    fn resident(&self) -> String {
        match (self.cgroup.as_ref().and_then(Cgroup::anonymous_memory), self.resident) {
            (Some(now), Some(then)) => {
                format!("; {} MB of memory, {} MB when it was saved", now / 1_000_000, then / 1_000_000)
            }
            _ => String::new(),
        }
    }
}

/// One restore of one container.
struct Work {
    id: String,
    bundle: PathBuf,
    logs: PathBuf,
    runtime: Arc<dyn OciRuntime>,
    reaper: Reaper,
    owner: Owner,
    stdio: Stdio,
    shm: Option<Shm>,
    annotations: Annotations,
    store: NodeStore,
    devices: Vec<DeviceNode>,
    timeline: Timeline,
    checkpoint: FromCheckpoint,
}

impl Work {
    async fn run(self) -> Result<Running, TaskError> {
        match self.restore().await {
            Ok(restored) => {
                let resident = restored.resident();
                tracing::info!("container {} is restored: {}{resident}", self.id, self.timeline);
                let images = self.checkpoint.images;
                // It may be large, and nobody waits for it.
                tokio::task::spawn_blocking(move || remove_if_containerds(&images));
                Ok(restored)
            }
            Err(source) => {
                let (images, phase) = (self.checkpoint.images, self.timeline.current());
                Err(TaskError::Restore(Box::new(RestoreError { container: self.id, images, phase, source })))
            }
        }
    }

    async fn restore(&self) -> Result<Running, RestoreFailure> {
        let images = self.checkpoint.images.as_path();
        let at = |action, path: &Path| {
            let path = path.to_owned();
            move |source| RestoreFailure::File { action, path, source }
        };
        let Inspected { allow, gpu, memory, resident } = self.inspect(images)?;
        if memory.is_some() && !self.runtime.drives_criu() {
            return Err(RestoreFailure::Fill);
        }
        // It loads the driver while the processes are being restored.
        let mut guardian = gpu.as_ref().map(|_| Guardian::start(&self.reaper)).transpose()?;
        // It reads memory meanwhile.
        let mut worker = memory.as_ref().map(|_| Worker::start(&self.reaper)).transpose()?;
        let mut staging = None;
        if let (Some(worker), Some(memory)) = (&mut worker, memory) {
            let node = self.node(&memory)?;
            staging = worker.open(memory, images.to_owned(), node, &self.timeline).await?.filter(|_| gpu.is_some());
        }
        let work = self.checkpoint.work.as_deref();
        let log = LogFolder::make(&self.logs, work, &self.owner.namespace, &self.id, LOG);
        let log = log.map_err(at("make a folder for the log of", images))?;
        if let Some(shm) = self.shm.clone() {
            self.timeline.enter(Phase::LoadShm);
            let from = images.to_owned();
            let loaded = tokio::task::spawn_blocking(move || shm.load(&from)).await.map_err(RestoreFailure::CutOff)?;
            loaded.map_err(at("fill /dev/shm from", images))?;
        } else if Shm::is_saved(images) {
            tracing::warn!("container {}: it has no /dev/shm for the contents in the checkpoint", self.id);
        }
        self.timeline.enter(Phase::Prepare);
        let (io, prepared) = self.stdio.prepare(&self.owner, &self.reaper).await.map_err(RestoreFailure::Stdio)?;
        let request = RestoreRequest {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            images: images.to_owned(),
            work: log.path().to_owned(),
            io,
            no_pivot_root: self.checkpoint.no_pivot_root,
            frozen: gpu.is_some() || worker.is_some(),
            cut: worker.is_some(),
            allow,
            timeline: self.timeline.clone(),
        };
        let pairs = async {
            match (&mut guardian, &gpu) {
                (Some(guardian), Some(gpu)) => self.pairs(guardian, gpu).await,
                _ => Ok(Vec::new()),
            }
        };
        let (child, pairs) = tokio::join!(self.runtime.restore(request), pairs);
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                prepared.abandon().await;
                return Err(error.into());
            }
        };
        let joined = match prepared.connect().await {
            Ok(copies) => {
                self.join(&child).await.map(|cgroup| Running { child: child.clone(), copies, cgroup, resident })
            }
            Err(error) => Err(RestoreFailure::Stdio(error)),
        };
        let resumed = match joined {
            Ok(restored) => {
                let resume = Resume { gpu: gpu.as_ref(), staging, init: child.pid(), pairs };
                self.resume(worker, guardian, restored.cgroup.as_ref(), resume).await.map(|()| restored)
            }
            Err(failure) => Err(failure),
        };
        match resumed {
            Ok(restored) => {
                log.remove();
                Ok(restored)
            }
            Err(failure) => {
                undo(&*self.runtime, &self.id, &child).await;
                Err(failure)
            }
        }
    }

    /// Where snapshots are looked for.
    fn node(&self, memory: &Source) -> Result<Node, RestoreFailure> {
        let said = match memory {
            Source::Snapshot(pointer) => pointer.registry(),
            Source::Inline => None,
        };
        let registry = checkpoint::registry(&self.annotations, self.store.registry.as_deref(), said);
        let scope = Scope::new(&self.owner.namespace, self.annotations.pod_namespace())?;
        Ok(Node { store: self.store.root.clone(), scope, registry })
    }

    /// Gives the frozen processes their big memory and their GPU state back and lets them run.
    async fn resume(
        &self,
        mut worker: Option<Worker>,
        guardian: Option<Guardian>,
        cgroup: Option<&Cgroup>,
        resume: Resume<'_>,
    ) -> Result<(), RestoreFailure> {
        let Resume { gpu, staging, init, pairs } = resume;
        let (filled, staging) = match (&mut worker, cgroup) {
            (Some(worker), Some(cgroup)) => self.fill(worker, cgroup, gpu, staging).await?,
            _ => (Filled::All, Swap::default()),
        };
        let Some(mut guardian) = guardian else {
            // With neither of them it runs already.
            if let (Some(_), Some(cgroup)) = (worker, cgroup) {
                cgroup.thaw().map_err(RestoreFailure::Cgroup)?;
            }
            return Ok(());
        };
        let resumed = async {
            let pairs = pairs?;
            DeviceNode::make_missing(&self.devices, init).map_err(|source| RestoreFailure::File {
                action: "make the devices in",
                path: "/dev".into(),
                source,
            })?;
            let timeline = &self.timeline;
            match &mut worker {
                Some(worker) if filled == Filled::First => {
                    self.resume_beside(&mut guardian, worker, init, staging, pairs).await
                }
                _ if staging.processes.is_empty() => Ok(guardian.resume(init, false, pairs, GPU, timeline).await?),
                _ => Ok(guardian.resume_unfilled(init, staging, pairs, GPU, ready(true), timeline).await?),
            }
        }
        .await;
        // Either way it has nothing more to do: what could not be resumed is removed.
        guardian.dismiss();
        resumed.map(drop)
    }

    /// Puts big memory into the frozen processes, those with a GPU first, but for staging memory that the guardian fills: that
    /// is returned.
    async fn fill(
        &self,
        worker: &mut Worker,
        cgroup: &Cgroup,
        gpu: Option<&SavedGpus>,
        staging: Option<Saved>,
    ) -> Result<(Filled, Swap), RestoreFailure> {
        let pids = cgroup.pids().map_err(RestoreFailure::Cgroup)?.into_iter();
        let mut processes: Vec<Restored> = pids
            .filter_map(|process| Some(Restored { pid: cuda::process::namespace_pid(process).ok()?, process }))
            .collect();
        let staged = |of: &Restored| gpu.and_then(|gpu| gpu.staged(of.pid));
        processes.sort_by_key(|of| Reverse(staged(of)));
        let first = processes.iter().filter(|of| staged(of).is_some()).count();
        let is_apart = staging.is_some();
        let mut staging = staging.unwrap_or_default();
        for saved in &mut staging.processes {
            let here = processes.iter().find(|of| of.pid == saved.process);
            saved.process = here.ok_or(RestoreFailure::Gone { pid: saved.process })?.process;
        }
        let filled = worker.fill(processes, first, !is_apart, &self.timeline).await?;
        Ok((filled, swap(staging)))
    }

    /// The same when those with a GPU are filled: they get their state back while the others are.
    async fn resume_beside(
        &self,
        guardian: &mut Guardian,
        worker: &mut Worker,
        init: i32,
        staging: Swap,
        pairs: Vec<Pair>,
    ) -> Result<Resumed, RestoreFailure> {
        let (say, mut said) = oneshot::channel();
        let rest = async {
            let filled = worker.fill_rest(&self.timeline).await;
            // Who does not hear it has failed.
            let _ = say.send(filled.is_ok());
            filled
        };
        let filled = async {
            match said.try_recv() {
                Err(TryRecvError::Empty) => {
                    self.timeline.enter(Phase::Fill);
                    said.await.unwrap_or(false)
                }
                said => said.unwrap_or(false),
            }
        };
        let resumed = guardian.resume_unfilled(init, staging, pairs, GPU, filled, &self.timeline);
        let (filled, resumed) = tokio::join!(rest, resumed);
        filled?;
        Ok(resumed?)
    }

    /// Which GPUs of this node take the place of those that were.
    async fn pairs(&self, guardian: &mut Guardian, gpu: &SavedGpus) -> Result<Vec<Pair>, RestoreFailure> {
        let node = guardian.inventory(&self.timeline).await?;
        gpu.pairs(&node, &DeviceNode::gpu_minors(&self.devices)).map_err(RestoreFailure::Node)
    }

    fn inspect(&self, images: &Path) -> Result<Inspected, RestoreFailure> {
        let Folder { image, manifest } = Folder::inspect(images)?;
        let gpu = manifest.as_ref().and_then(Manifest::gpu).filter(|gpu| gpu.has_state()).cloned();
        let memory = manifest.as_ref().and_then(Manifest::memory).map(|memory| memory.source.clone());
        let resident = manifest.as_ref().and_then(Manifest::resident);
        let network = Network::of_bundle(&self.bundle);
        let allow = checkpoint::allow(&image, manifest.as_ref(), &self.annotations, network);
        let allow = allow.map_err(|error| RestoreFailure::Annotation(error.to_string()))?;
        Ok(Inspected { allow, gpu, memory, resident })
    }

    async fn join(&self, child: &Child) -> Result<Option<Cgroup>, RestoreFailure> {
        let pid_file = self.bundle.join("init.pid");
        std::fs::write(&pid_file, child.pid().to_string()).map_err(|source| RestoreFailure::File {
            action: "write",
            path: pid_file,
            source,
        })?;
        // It may go on from the last step of its life: that is a restore as good as any.
        if child.exit().is_some() {
            return Ok(None);
        }
        match Cgroup::of_process(child.pid()) {
            // On version 1 the kernel says of a dead process that it is in no cgroup.
            Err(_) if tokio::time::timeout(ENDING, child.wait()).await.is_ok() => Ok(None),
            found => found.map(Some).map_err(RestoreFailure::Cgroup),
        }
    }
}
