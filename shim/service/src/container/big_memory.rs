//! The big memory of a checkpoint, which a worker keeps out of the images.
//!
//! ```text
//!   (GPU state is in staging memory) ──► SaveMemory ──► Swap ──► Dump: the images are whole ──► MoveMemory ──► Publish
//! ```
//!
//! Staging memory is saved first, and files with the same contents take its place, so that CRIU has nothing to dump there.
//! Other memory CRIU dumps as ever; what is big of it is moved out of the images afterwards. CRIU waits for that where it is to
//! kill the container: until it has succeeded the container can go on, nothing of it was touched.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use bulk::{Place, Publish, Published, Saved, SavedStaging, Worker};
use cgroup::Cgroup;
use criu::Criu;
use gpu::{CudaError, Guardian, Piece, Source, Swap, SwapProcess};
use runtime::{Reviewer, Timeline};
use snapshot::{Config, Host, Name, Scope};

use super::checkpoint::{GPU, Work};
use crate::error::CheckpointFailure;
use checkpoint::{MemoryPlace, SavedGpus};

/// The big memory of one checkpoint.
pub(super) struct BigMemory {
    worker: Worker,
    /// Files that processes have mapped in the place of staging memory.
    files: Vec<PathBuf>,
    /// What is in memory of it all the same, by pid in the process's own pid namespace.
    left: Vec<(i32, Range<u64>)>,
    host: Host,
}

impl BigMemory {
    /// Saves the staging memory of the frozen container and puts files in its place. None if nothing is to be kept out of the
    /// images. The guardian is needed where there is staging memory.
    pub(super) async fn save(
        work: &Work,
        staging: Vec<gpu::Staging>,
        guardian: Option<&mut Guardian>,
    ) -> Result<Option<Self>, CheckpointFailure> {
        if work.wishes.memory == MemoryPlace::Images || !work.runtime.drives_criu() {
            return Ok(None);
        }
        let staging: Vec<_> = staging.into_iter().filter(|of| !of.ranges.is_empty()).collect();
        if staging.is_empty() && resident(&work.cgroup)? < bulk::LEAST_MEMORY {
            return Ok(None);
        }
        let mut worker = Worker::start(&work.reaper)?;
        let criu = Criu::new(work.reaper.clone());
        let (begun, criu) =
            tokio::join!(worker.begin(&work.store.root, work.store.quota, &work.timeline), criu.version());
        begun?;
        // If it says nothing, the dump will fail for a better reason.
        let host = host(criu.map(|version| version.to_string()).unwrap_or_default());
        let mut memory = Self { worker, files: Vec::new(), left: Vec::new(), host };
        if let (Some(guardian), false) = (guardian, staging.is_empty()) {
            memory.swap(work, &staging, guardian).await?;
        }
        Ok(Some(memory))
    }

    async fn swap(
        &mut self,
        work: &Work,
        staging: &[gpu::Staging],
        guardian: &mut Guardian,
    ) -> Result<(), CheckpointFailure> {
        let ranges = |of: &gpu::Staging| of.ranges.iter().map(|range| range.start..range.end).collect();
        let to_save = |of: &gpu::Staging| bulk::Staging { process: of.pid, pid: of.namespace_pid, ranges: ranges(of) };
        let saved = self.worker.save(staging.iter().map(to_save).collect(), &work.timeline).await?;
        self.files.clone_from(&saved.files);
        let swapped = guardian.swap(work.child.pid(), work.paused, swap(saved), GPU, &work.timeline).await;
        let namespace_pid = |pid| staging.iter().find(|of| of.pid == pid).map_or(pid, |of| of.namespace_pid);
        match swapped {
            Ok(swapped) => {
                let left = swapped.processes.into_iter();
                let left = left.flat_map(|of| of.left.into_iter().map(move |range| (of.pid, range)));
                self.left = left.map(|(pid, range)| (namespace_pid(pid), range.start..range.end)).collect();
            }
            // Then CRIU dumps what is not in files, which takes longer and is as good.
            Err(CudaError::Session(error)) => {
                tracing::warn!("container {}: its GPU memory goes through the images: {error}", work.id);
                let all = staging.iter().flat_map(|of| of.ranges.iter().map(|range| (of.namespace_pid, range)));
                self.left = all.map(|(pid, range)| (pid, range.start..range.end)).collect();
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Files that CRIU has to be told of.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }

    /// Waits for the images and moves what is big out of them, while the container goes on if it is to. None if there is
    /// nothing, or the dump has failed.
    pub(super) async fn publish(
        &mut self,
        work: &Work,
        images: PathBuf,
        gpu: Option<&SavedGpus>,
        mut reviewer: Reviewer,
        timeline: &Timeline,
    ) -> Result<Option<Published>, CheckpointFailure> {
        if !reviewer.images_are_whole().await {
            return Ok(None);
        }
        let prepared = self.prepare(work, images, gpu);
        let refused = |error: &CheckpointFailure| Err(crate::error::chain(error).into());
        let publish = match prepared {
            Ok(publish) => publish,
            Err(error) => {
                reviewer.decide(refused(&error));
                return Err(error);
            }
        };
        if !work.wishes.exit {
            // Nothing more is needed of the container.
            reviewer.decide(Ok(()));
            return Ok(self.worker.publish(publish, timeline).await?);
        }
        let published = self.worker.publish(publish, timeline).await.map_err(CheckpointFailure::from);
        reviewer.decide(published.as_ref().map_or_else(refused, |_| Ok(())));
        published
    }

    /// What is to be published. The container stands still meanwhile.
    fn prepare(&self, work: &Work, images: PathBuf, gpu: Option<&SavedGpus>) -> Result<Publish, CheckpointFailure> {
        let config = config(work, self.host.clone(), gpu)?;
        let place = match work.wishes.memory {
            MemoryPlace::Inline => Place::Inline,
            _ => {
                let registry = work.wishes.registry.clone().or_else(|| work.store.registry.clone());
                Place::Store(name(work, config.created)?, registry)
            }
        };
        let keep_shared = would_not_fit_apart(&work.cgroup)?;
        Ok(Publish { images, place, left: self.left.clone(), keep_shared, config })
    }

    /// Removes what was published for a checkpoint that came to nothing all the same.
    pub(super) async fn withdraw(&mut self, work: &Work, published: &Published) {
        if let bulk::Source::Snapshot(pointer) = &published.source
            && let Err(error) = self.worker.withdraw(pointer.clone(), &work.timeline).await
        {
            tracing::warn!("container {}: {}", work.id, crate::error::chain(&error));
        }
    }
}

/// Bytes of private memory that the processes of a cgroup have.
fn resident(cgroup: &Cgroup) -> Result<u64, CheckpointFailure> {
    let pids = cgroup.pids().map_err(CheckpointFailure::Cgroup)?;
    // One that has just ended has none.
    let of = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        let mut pages = text.split(' ').skip(1).map_while(|number| number.parse::<u64>().ok());
        Some(pages.next()?.saturating_sub(pages.next()?))
    };
    let pages: u64 = pids.into_iter().filter_map(of).sum();
    Ok(pages.saturating_mul(u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX)))
}

/// Whether the processes have a memory limit that they would exceed if each had a copy of what they share by forks.
fn would_not_fit_apart(cgroup: &Cgroup) -> Result<bool, CheckpointFailure> {
    let Some(left) = cgroup.memory_left() else { return Ok(false) };
    let pids = cgroup.pids().map_err(CheckpointFailure::Cgroup)?;
    let shared = |pid: i32| {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let kib = |key: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        Some(kib("Anonymous:")?.saturating_sub(kib("Pss_Anon:")?) << 10)
    };
    Ok(pids.into_iter().filter_map(shared).sum::<u64>() > left)
}

pub(super) fn swap(saved: Saved) -> Swap {
    let piece = |piece: bulk::Piece| {
        let source = piece.source.map(|(file, offset)| Source { file, offset });
        Piece { address: piece.address, length: piece.length, source }
    };
    let process = |SavedStaging { process, pieces }| SwapProcess {
        pid: process,
        pieces: pieces.into_iter().map(piece).collect(),
    };
    Swap { files: saved.files, processes: saved.processes.into_iter().map(process).collect() }
}

/// Unlike any other of the container, so that none takes the place of one to which a folder points.
fn name(work: &Work, created: u64) -> Result<Name, CheckpointFailure> {
    let scope = Scope::new(&work.namespace, work.wishes.pod_namespace.as_deref())?;
    Ok(Name::new(scope, &format!("{}.{created}", work.id))?)
}

fn config(work: &Work, host: Host, gpu: Option<&SavedGpus>) -> Result<Config, CheckpointFailure> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let mut config = Config::new(created, &work.id, &work.runtime_name, host);
    let phase = |(phase, duration): (runtime::Phase, std::time::Duration)| snapshot::Step {
        phase: phase.name().to_owned(),
        seconds: duration.as_secs_f64(),
    };
    config.sizes.resident = work.resident.unwrap_or_default();
    config.phases = work.timeline.phases().into_iter().map(phase).collect();
    if let Some(gpu) = gpu {
        config.host.driver = Some(gpu.driver().to_owned());
        config.gpus = gpu.gpus().iter().map(snapshot_gpu).collect();
    }
    for process in work.cgroup.pids().map_err(CheckpointFailure::Cgroup)? {
        let Ok(comm) = std::fs::read_to_string(format!("/proc/{process}/comm")) else { continue };
        let pid = cuda::process::namespace_pid(process).unwrap_or(process);
        let staged = gpu.and_then(|gpu| gpu.staged(pid));
        let (comm, gpu, staged) = (comm.trim_end().to_owned(), staged.is_some(), staged.unwrap_or(0));
        config.processes.push(snapshot::Process { pid, comm, gpu, staged });
    }
    Ok(config)
}

fn snapshot_gpu(gpu: &cuda::Gpu) -> snapshot::Gpu {
    snapshot::Gpu { uuid: gpu.uuid.clone(), name: gpu.name.clone(), minor: gpu.minor, memory: gpu.memory }
}

/// This machine, as a snapshot tells of it.
fn host(criu: String) -> Host {
    let name = rustix::system::uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let mut cpu_features: Vec<String> =
        flags.into_iter().flat_map(|(_, flags)| flags.split_whitespace()).map(str::to_owned).collect();
    cpu_features.sort_unstable();
    Host { criu, kernel: text(name.release()), architecture: text(name.machine()), cpu_features, driver: None }
}
