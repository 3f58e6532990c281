//! Starting a container from a checkpoint.
//!
//! ```text
//!   Inspect ─► (Pull) ─► LoadShm ─► Cgroup, Restore, Hooks by the runtime ─► Resume ─────────────────────────► Running
//!      │          │          │                   │                             │ frozen, with GPU or big memory:  ▲
//!      │          │          │                   │                             ├─► Fill ─► CudaRestore ─► Unlock ─┤
//!      │          │          │                   │                             └─► Fill of those without a GPU ───┘
//!      └──────────┴──────────┴──── failure or cancel: killed and removed, start can be tried again
//! ```
//!
//! The shim hears of the restored init before anything of it runs: it adopts the process, connects the streams, and says
//! `go-on`. Memory is filled meanwhile.

use std::cmp::Reverse;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use bulk::{Node, Restoring, Source};
use cgroup::Cgroup;
use checkpoint::{DeviceNode, Folder, LogFolder, Manifest, Network, SavedGpus, Shm};
use cuda::{Inventory, Pair};
use gpu::Keeper;
use images::{ImageError, OpenFiles, PrivateCopy};
use memory::Layout;
use phase::Phase;
use proc::{HostPid, ProcessIds};
use reaper::Child;
use role::Failure;
use runtime::{Allow, OciRuntime, ProcessIo, RestoreRequest, Tcp};
use rustix::process::Signal;
use snapshot::Scope;

use crate::error::{Failed, SessionError};
use crate::limits::GPU;
use crate::machine::Services;
use crate::network;
use crate::order::RestoreOrder;

/// CRIU's name for its log of a restore.
const LOG: &str = "restore.log";
/// Longest time for a process that the kernel counts as dead to be reaped.
const ENDING: Duration = Duration::from_secs(1);

/// Words between shim and session in the middle of a restore.
pub(crate) trait Shim {
    /// Says that CRIU has made init.
    fn restored(&mut self, init: HostPid);
    /// Waits until the shim has adopted init and connected its streams.
    fn wait_for_go_on(&mut self) -> Result<(), SessionError>;
}

/// Contents of a checkpoint that a restore has to know.
struct Inspected {
    allow: Allow,
    /// `None` without state on GPUs.
    gpu: Option<SavedGpus>,
    /// `None` if all memory is in the images.
    memory: Option<Source>,
    /// Bytes of memory that the container had, if that is known.
    resident: Option<u64>,
    /// Open files, changed for this node and this network; `None` in the format of very old CRIUs.
    files: Option<OpenFiles>,
}

/// One restore of one container.
pub(crate) struct Restore<'a> {
    services: &'a Services,
    order: &'a RestoreOrder,
    runtime: Arc<dyn OciRuntime>,
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> SessionError {
    let path = path.to_owned();
    move |source| SessionError::File { action, path, source }
}

impl<'a> Restore<'a> {
    pub(crate) fn new(services: &'a Services, order: &'a RestoreOrder) -> Self {
        Self { services, order, runtime: order.subject.runtime.runtime(&services.reaper) }
    }

    /// Makes the container. When that fails, nothing is left of it.
    pub(crate) fn run(&self, streams: Option<[OwnedFd; 3]>, shim: &mut dyn Shim) -> Result<(), Failed> {
        let mut init = None;
        let restored = self.restore(streams, shim, &mut init);
        restored.map_err(|cause| {
            let phase = self.services.timeline.current();
            if let Some(init) = init {
                self.remove(&init);
            }
            Failed { phase, cause: Failure::of(&cause), owed: None }
        })
    }

    /// Removes a container that its runtime has made, and that cannot be used.
    fn remove(&self, init: &Child) {
        let id = &self.order.subject.id;
        let removed = self.services.tokio.block_on(self.runtime.delete(id));
        if let Err(error) = removed {
            tracing::error!("a container that was not restored may be left behind: {}", phase::chain(&error));
        }
        // It may have ended by itself.
        let _ = init.signal(Signal::KILL);
    }

    fn restore(
        &self,
        streams: Option<[OwnedFd; 3]>,
        shim: &mut dyn Shim,
        made: &mut Option<Child>,
    ) -> Result<(), SessionError> {
        let (services, order) = (self.services, self.order);
        let images = order.images.as_path();
        let Inspected { allow, gpu, memory, resident, files } = self.inspect(images)?;
        if memory.is_some() && !self.runtime.drives_criu() {
            return Err(SessionError::Fill);
        }
        // The driver is loaded while the processes are being restored, and memory is read.
        let mut keeper = gpu.as_ref().map(|_| Keeper::new());
        let memory = memory.map(|source| self.open(&source)).transpose()?;
        services.cancel.check()?;
        let subject = &order.subject;
        let log = LogFolder::make(&subject.logs, order.work.as_deref(), &subject.namespace, &subject.id, LOG);
        let log = log.map_err(file("make a folder for the log of", images))?;
        // Removed when the container runs.
        let copy = files.map(|files| private(images, log.path(), files)).transpose()?.flatten();
        self.load_shm()?;
        services.cancel.check()?;
        services.timeline.enter(Phase::Prepare);
        let privileges = order.annotations.privileges();
        let privileges = privileges.map_err(|error| SessionError::Annotation(error.to_string()))?;
        let request = RestoreRequest {
            id: subject.id.clone(),
            bundle: subject.bundle.clone(),
            images: copy.as_ref().map_or(images, PrivateCopy::path).to_owned(),
            work: log.path().to_owned(),
            io: io(streams, order.console_socket.clone())?,
            no_pivot_root: order.no_pivot_root,
            frozen: gpu.is_some() || memory.is_some(),
            cut: memory.is_some(),
            allow,
            privileges,
            timeline: services.timeline.clone(),
            cancel: services.cancel.clone(),
        };
        // The driver is asked for its GPUs while CRIU works.
        let (restored, node) = std::thread::scope(|scope| {
            let node = keeper.as_mut().map(|keeper| scope.spawn(|| keeper.inventory()));
            let restored = services.tokio.block_on(self.runtime.restore(request));
            (restored, node.map(std::thread::ScopedJoinHandle::join))
        });
        let init = restored?;
        *made = Some(init.clone());
        shim.restored(init.process());
        let cgroup = self.join(&init)?;
        let node = node.transpose().map_err(|_| SessionError::Bug("the inventory of GPUs"))?.transpose()?;
        let pairs = match (&gpu, node) {
            (Some(gpu), Some(node)) => self.pairs(gpu, &node)?,
            _ => Vec::new(),
        };
        if let Some(cgroup) = &cgroup {
            let whole = Whole { keeper, gpu: gpu.as_ref(), memory, init: init.process(), pairs };
            self.resume(whole, cgroup, shim)?;
        } else {
            shim.wait_for_go_on()?;
        }
        let resident = resident_words(cgroup.as_ref(), resident);
        tracing::info!("container {} is restored: {}{resident}", subject.id, services.timeline);
        log.remove();
        Ok(())
    }

    fn open(&self, source: &Source) -> Result<Restoring, SessionError> {
        let (services, order) = (self.services, self.order);
        let timeline = services.timeline.clone();
        let node = self.node(source)?;
        let mut began = |phase| timeline.enter(phase);
        Ok(Restoring::open(source, &order.images, &node, &mut began, &services.cancel)?)
    }

    /// Returns the places to look for snapshots.
    fn node(&self, memory: &Source) -> Result<Node, SessionError> {
        let said = match memory {
            Source::Snapshot(pointer) => pointer.registry(),
            Source::Inline => None,
        };
        let (annotations, subject) = (&self.order.annotations, &self.order.subject);
        let registry = checkpoint::registry(annotations, subject.store.registry.as_deref(), said);
        let scope = Scope::new(&subject.namespace, annotations.pod_namespace())?;
        Ok(Node { store: subject.store.root.clone(), scope, registry })
    }

    fn load_shm(&self) -> Result<(), SessionError> {
        let images = &self.order.images;
        if let Some(shm) = &self.order.shm {
            self.services.timeline.enter(Phase::LoadShm);
            shm.load(images).map_err(file("fill /dev/shm from", images))?;
        } else if Shm::is_saved(images) {
            tracing::warn!("it has no /dev/shm for the contents in the checkpoint");
        }
        Ok(())
    }

    fn inspect(&self, images: &Path) -> Result<Inspected, SessionError> {
        let Folder { image, manifest } = Folder::inspect(images)?;
        let gpu = manifest.as_ref().and_then(Manifest::gpu).filter(|gpu| gpu.has_state()).cloned();
        let memory = manifest.as_ref().and_then(Manifest::memory).map(|memory| memory.source.clone());
        let resident = manifest.as_ref().and_then(Manifest::resident);
        let network = Network::of_bundle(&self.order.subject.bundle);
        let allow = checkpoint::allow(&image, manifest.as_ref(), &self.order.annotations, &network);
        let mut allow = allow.map_err(|error| SessionError::Annotation(error.to_string()))?;
        let mut files = match OpenFiles::read(images) {
            Err(ImageError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            files => Some(files?),
        };
        match (&mut files, allow.tcp) {
            // What the checkpoint says of itself is no permission.
            (Some(files), Tcp::Auto) => drop(files.close_outside()?),
            (Some(files), _) => files.close_ended()?,
            (None, Tcp::Auto) => allow.tcp = Tcp::Refuse,
            (None, _) => {}
        }
        if let Some(files) = &mut files {
            let old = manifest.as_ref().map(Manifest::addresses).unwrap_or_default();
            network::move_sockets(files, old, &network)?;
            self.replace_missing_devices(files)?;
        }
        Ok(Inspected { allow, gpu, memory, resident, files })
    }

    /// Replaces devices of the driver that the new container may not open, such as those of another GPU. Without any in the
    /// configuration a hook brings them, and nobody knows which.
    fn replace_missing_devices(&self, files: &mut OpenFiles) -> Result<(), SessionError> {
        let given: Vec<&Path> = self.order.devices.iter().map(DeviceNode::path).collect();
        if given.iter().any(|path| cuda::process::is_device(path)) {
            files.replace_missing_devices(&|path| !given.contains(&path))?;
        }
        Ok(())
    }

    /// Writes the pid file and returns the container's cgroup, or `None` if init has ended by now: the last step of its life
    /// may have been all that was left to do, and that is a restore as good as any.
    fn join(&self, init: &Child) -> Result<Option<Cgroup>, SessionError> {
        let pid_file = self.order.subject.bundle.join("init.pid");
        std::fs::write(&pid_file, init.pid().to_string()).map_err(file("write", &pid_file))?;
        let ended = || {
            let wait = async { tokio::time::timeout(ENDING, init.wait()).await };
            self.services.tokio.block_on(wait).is_ok()
        };
        match self.runtime.cgroup(&self.order.subject.id, init.process()) {
            // On version 1 the kernel says of a dead process that it is in no cgroup.
            Err(_) if ended() => Ok(None),
            found => Ok(found.map(Some)?),
        }
    }

    /// Returns the GPUs of this node that take the place of those that were.
    fn pairs(&self, gpu: &SavedGpus, node: &Inventory) -> Result<Vec<Pair>, SessionError> {
        gpu.pairs(node, &DeviceNode::gpu_minors(&self.order.devices)).map_err(SessionError::Node)
    }

    /// Gives the frozen processes their big memory and their GPU state back and lets them run.
    fn resume(&self, whole: Whole<'_>, cgroup: &Cgroup, shim: &mut dyn Shim) -> Result<(), SessionError> {
        let Whole { keeper, gpu, memory, init, pairs } = whole;
        let is_frozen = memory.is_some();
        let filling = memory.map(|memory| Filling::of(memory, gpu, cgroup)).transpose()?;
        let (Some(mut keeper), Some(_)) = (keeper, gpu) else {
            if let Some(filling) = filling {
                self.services.timeline.enter(Phase::Fill);
                filling.memory.fill(&filling.processes, filling.first, true, &|| ())?;
            }
            shim.wait_for_go_on()?;
            self.services.cancel.check()?;
            if is_frozen {
                cgroup.thaw().map_err(SessionError::Freezer)?;
            }
            return Ok(());
        };
        DeviceNode::make_missing(&self.order.devices, init).map_err(file("make the devices in", Path::new("/dev")))?;
        let Some(filling) = filling else {
            shim.wait_for_go_on()?;
            self.services.cancel.check()?;
            let timeline = self.services.timeline.clone();
            let mut began = |phase| timeline.enter(phase);
            keeper.resume_restored(cgroup, &Layout::default(), &pairs, GPU, &mut began, &mut || true)?;
            return Ok(());
        };
        self.resume_beside_fill(&mut keeper, filling, cgroup, &pairs, shim)
    }

    /// Fills the processes that have GPU state first. They get their state back while the others are filled, held until all
    /// have their memory.
    fn resume_beside_fill(
        &self,
        keeper: &mut Keeper,
        filling: Filling,
        cgroup: &Cgroup,
        pairs: &[Pair],
        shim: &mut dyn Shim,
    ) -> Result<(), SessionError> {
        let Filling { memory, processes, first, staging } = filling;
        let timeline = self.services.timeline.clone();
        timeline.enter(Phase::Fill);
        let is_apart = !staging.processes.is_empty();
        let (tell_first, first_filled) = mpsc::channel();
        let (tell_all, all_filled) = mpsc::channel();
        std::thread::scope(|scope| {
            let filler = scope.spawn(move || {
                let filled = memory.fill(&processes, first, !is_apart, &|| {
                    // The receiver waits for the first processes only.
                    let _ = tell_first.send(());
                });
                // The receiver is gone where the driver failed meanwhile.
                let _ = tell_all.send(filled.is_ok());
                filled
            });
            // The channel ends without a word when all is filled, or the fill has failed.
            let is_early = first_filled.recv().is_ok();
            let mut is_whole = || {
                let is_filled = all_filled.try_recv().unwrap_or_else(|_| {
                    timeline.enter(Phase::Fill);
                    all_filled.recv().unwrap_or(false)
                });
                is_filled && shim.wait_for_go_on().is_ok() && self.services.cancel.check().is_ok()
            };
            let mut began = |phase| timeline.enter(phase);
            let resumed = if is_early || is_apart {
                keeper.resume_restored(cgroup, &staging, pairs, GPU, &mut began, &mut is_whole).map(drop)
            } else if is_whole() {
                keeper.resume_restored(cgroup, &staging, pairs, GPU, &mut began, &mut || true).map(drop)
            } else {
                Ok(())
            };
            let filled = filler.join().unwrap_or_else(|_| Err(Failure::new("the thread that fills memory panicked")));
            filled?;
            self.services.cancel.check()?;
            Ok(resumed?)
        })
    }
}

/// A restored container that is frozen, and what it is to be given back.
struct Whole<'a> {
    keeper: Option<Keeper>,
    gpu: Option<&'a SavedGpus>,
    memory: Option<Restoring>,
    init: HostPid,
    pairs: Vec<Pair>,
}

/// Memory to be put into processes.
struct Filling {
    memory: Restoring,
    /// All processes, those with GPU state first.
    processes: Vec<ProcessIds>,
    /// Number of processes with GPU state.
    first: usize,
    /// Staging memory that is mapped from files. Empty if it is filled like the rest.
    staging: Layout,
}

impl Filling {
    fn of(memory: Restoring, gpu: Option<&SavedGpus>, cgroup: &Cgroup) -> Result<Self, SessionError> {
        let pids = cgroup.pids().map_err(SessionError::Cgroup)?.into_iter();
        let mut processes: Vec<ProcessIds> = pids.filter_map(|pid| ProcessIds::of(pid).ok()).collect();
        let staged = |of: &ProcessIds| gpu.and_then(|gpu| gpu.staged(of.container));
        processes.sort_by_key(|of| Reverse(staged(of)));
        let first = processes.iter().filter(|of| staged(of).is_some()).count();
        let staging = if gpu.is_some() { memory.staging(&processes)?.unwrap_or_default() } else { Layout::default() };
        Ok(Self { memory, processes, first, staging })
    }
}

/// Returns a copy of the images with changed open files, if any was changed.
fn private(images: &Path, work: &Path, files: OpenFiles) -> Result<Option<PrivateCopy>, SessionError> {
    if !files.is_changed() {
        return Ok(None);
    }
    let copy = PrivateCopy::of(images, work)?;
    files.write(copy.path())?;
    Ok(Some(copy))
}

fn io(streams: Option<[OwnedFd; 3]>, console_socket: Option<PathBuf>) -> Result<ProcessIo, SessionError> {
    match (streams, console_socket) {
        (_, Some(console_socket)) => Ok(ProcessIo::Terminal { console_socket }),
        (Some([stdin, stdout, stderr]), None) => Ok(ProcessIo::Fds { stdin, stdout, stderr }),
        (None, None) => Err(SessionError::Bug("the order of a restore without streams")),
    }
}

/// Returns `; 6925 MB of memory, 2098 MB when it was saved`, where that is known.
fn resident_words(cgroup: Option<&Cgroup>, then: Option<u64>) -> String {
    match (cgroup.and_then(Cgroup::anonymous_memory), then) {
        (Some(now), Some(then)) => {
            format!("; {} MB of memory, {} MB when it was saved", now / 1_000_000, then / 1_000_000)
        }
        _ => String::new(),
    }
}
