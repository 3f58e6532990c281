//! The big memory of a checkpoint, which goes to the node's store instead of into CRIU's images.
//!
//! ```text
//!   (GPU state is in staging memory) ─► SaveMemory ─► Remap ─► SaveMemory ─► Dump ─► MoveMemory ─► Publish
//! ```
//!
//! Staging memory is saved first. Files with the same contents take its place, so that CRIU has nothing to dump there.
//! Memory that processes share is saved next, and CRIU is told that there is none ([`criu::Sparse`]). CRIU dumps all other
//! memory. What is big of that is moved out of the images afterwards.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulk::{Place, Publish, Published, Saving};
use cgroup::Cgroup;
use checkpoint::{MemoryPlace, SavedGpus};
use memory::{Regions, Shared, SharedFile};
use phase::{Phase, Timeline};
use proc::{HostPid, ProcessIds};
use role::Because;
use runtime::Prepare;
use snapshot::{Config, Host, Name, Scope};

use crate::error::SessionError;
use crate::order::CheckpointOrder;

/// The big memory of one checkpoint, saved as far as it can be before the dump.
pub(crate) struct BigMemory {
    pub(crate) saving: Saving,
    /// Files that processes have mapped in the place of staging memory.
    pub(crate) files: Vec<PathBuf>,
    /// Parts of the staging memory that are in memory all the same.
    pub(crate) left: Vec<Regions>,
    /// Files with saved memory that processes share.
    pub(crate) sparse: Vec<criu::Sparse>,
}

impl BigMemory {
    /// Begins a snapshot without any memory.
    pub(crate) fn begin(order: &CheckpointOrder) -> Result<Self, SessionError> {
        let store = &order.subject.store;
        let saving = Saving::begin(&store.root, store.quota)?;
        Ok(Self { saving, files: Vec::new(), left: Vec::new(), sparse: Vec::new() })
    }

    /// Saves memory that processes share. After a failure CRIU dumps it, which takes longer and is as good.
    pub(crate) fn save_shared(&mut self, shared: Shared) {
        let Shared { files, regions } = shared;
        match self.saving.save_shared(&regions) {
            Ok(()) => {
                let sparse = |SharedFile { device, inode, left }| criu::Sparse { device, inode, data: left };
                self.sparse = files.into_iter().map(sparse).collect();
            }
            Err(error) => tracing::warn!("its shared memory goes through the images: {}", phase::chain(&error)),
        }
    }
}

/// Returns the memory that processes of the container share. Those with staging memory carry it if they can: they are
/// filled first.
pub(crate) fn shared(cgroup: &Cgroup, init: HostPid, staging: &[Regions]) -> Result<Shared, SessionError> {
    let pids = cgroup.pids().map_err(SessionError::Cgroup)?.into_iter();
    // Processes that an exec has brought in are not saved.
    let mut processes: Vec<ProcessIds> =
        pids.filter(|pid| gpu::is_descendant(*pid, init)).filter_map(|pid| ProcessIds::of(pid).ok()).collect();
    processes.sort_by_key(|ids| (!staging.iter().any(|of| of.process == *ids), ids.container));
    Ok(Shared::find(&processes, bulk::LEAST_RUN).because("cannot look for shared memory")?)
}

/// A publication that waits for whole images. Owns everything that it needs, so that it can run beside the container.
pub(crate) struct Publication {
    saving: Saving,
    publish: Publish,
    timeline: Timeline,
}

impl Publication {
    /// Gathers what is known of the frozen container before the dump. `timeline` is told of the publication's phases.
    pub(crate) fn prepare(
        memory: BigMemory,
        order: &CheckpointOrder,
        machine: &Described<'_>,
        images: &Path,
        timeline: Timeline,
    ) -> Result<Self, SessionError> {
        let BigMemory { saving, left, .. } = memory;
        let config = config(order, machine)?;
        let place = match order.options.memory {
            MemoryPlace::Inline => Place::Inline,
            _ => {
                let registry = order.options.registry.clone().or_else(|| order.subject.store.registry.clone());
                Place::Store(name(order)?, registry)
            }
        };
        let keep_shared = would_not_fit_apart(machine.cgroup)?;
        let publish = Publish { images: images.to_owned(), place, left, keep_shared, config };
        Ok(Self { saving, publish, timeline })
    }

    /// Moves big memory out of the images and publishes everything. `None` if there is nothing big.
    pub(crate) fn run(mut self, before: &Timeline) -> Result<Option<Published>, SessionError> {
        let phase = |(phase, duration): (Phase, Duration)| snapshot::Step {
            phase: phase.name().to_owned(),
            seconds: duration.as_secs_f64(),
        };
        self.publish.config.phases = before.phases().into_iter().map(phase).collect();
        let timeline = self.timeline.clone();
        Ok(self.saving.publish(self.publish, &mut |phase| timeline.enter(phase))?)
    }
}

/// The container and the machine, as far as a snapshot describes them.
pub(crate) struct Described<'a> {
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) runtime_name: &'a str,
    pub(crate) criu: String,
    pub(crate) gpu: Option<&'a SavedGpus>,
    /// Bytes of memory that the container had, in no file.
    pub(crate) resident: Option<u64>,
}

/// Returns the bytes of private memory that the processes of a cgroup have.
pub(crate) fn resident(cgroup: &Cgroup) -> Result<u64, SessionError> {
    let pids = cgroup.pids().map_err(SessionError::Cgroup)?;
    // A process that has just ended has none.
    let of = |pid: HostPid| {
        let text = std::fs::read_to_string(pid.path("statm")).ok()?;
        let mut pages = text.split(' ').skip(1).map_while(|number| number.parse::<u64>().ok());
        Some(pages.next()?.saturating_sub(pages.next()?))
    };
    let pages: u64 = pids.into_iter().filter_map(of).sum();
    Ok(pages.saturating_mul(u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX)))
}

/// Returns whether the memory limit would be exceeded if each process had a copy of what it shares by forks.
fn would_not_fit_apart(cgroup: &Cgroup) -> Result<bool, SessionError> {
    let Some(left) = cgroup.memory_left() else { return Ok(false) };
    let pids = cgroup.pids().map_err(SessionError::Cgroup)?;
    let shared = |pid: HostPid| {
        let rollup = std::fs::read_to_string(pid.path("smaps_rollup")).ok()?;
        let kib = |key: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        Some(kib("Anonymous:")?.saturating_sub(kib("Pss_Anon:")?) << 10)
    };
    Ok(pids.into_iter().filter_map(shared).sum::<u64>() > left)
}

/// Returns a name unlike any other of the container: no snapshot takes the place of one that a folder points to. A session
/// and its successors name the same.
pub(crate) fn name(order: &CheckpointOrder) -> Result<Name, SessionError> {
    let scope = Scope::new(&order.subject.namespace, order.options.pod_namespace.as_deref())?;
    Ok(Name::new(scope, &format!("{}.{}", order.subject.id, order.began))?)
}

fn config(order: &CheckpointOrder, machine: &Described<'_>) -> Result<Config, SessionError> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut config = Config::new(created, &order.subject.id, machine.runtime_name, host(machine.criu.clone()));
    if order.subject.prepare != Prepare::Nothing {
        config.prepared.push(order.subject.prepare.name().to_owned());
    }
    config.sizes.resident = machine.resident.unwrap_or_default();
    if let Some(gpu) = machine.gpu {
        config.host.driver = Some(gpu.driver().to_owned());
        config.gpus = gpu.gpus().iter().map(snapshot_gpu).collect();
    }
    for pid in machine.cgroup.pids().map_err(SessionError::Cgroup)? {
        let (Ok(comm), Ok(ids)) = (proc::name(pid), ProcessIds::of(pid)) else { continue };
        let staged = machine.gpu.and_then(|gpu| gpu.staged(ids.container));
        let (gpu, staged) = (staged.is_some(), staged.unwrap_or(0));
        config.processes.push(snapshot::Process { pid: ids.container.raw(), comm, gpu, staged });
    }
    Ok(config)
}

fn snapshot_gpu(gpu: &cuda::Gpu) -> snapshot::Gpu {
    snapshot::Gpu { uuid: gpu.uuid.clone(), name: gpu.name.clone(), minor: gpu.minor, memory: gpu.memory }
}

/// Returns this machine, as a snapshot describes it.
fn host(criu: String) -> Host {
    let name = rustix::system::uname();
    let text = |text: &CStr| text.to_string_lossy().into_owned();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let mut cpu_features: Vec<String> =
        flags.into_iter().flat_map(|(_, flags)| flags.split_whitespace()).map(str::to_owned).collect();
    cpu_features.sort_unstable();
    Host { criu, kernel: text(name.release()), architecture: text(name.machine()), cpu_features, driver: None }
}
