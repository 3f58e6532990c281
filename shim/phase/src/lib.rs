//! The steps of a checkpoint and of a restore, named in errors, traces and timelines; and the only
//! printer of errors.

#![deny(unsafe_code)]

mod cancel;
mod chain;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use cancel::{Cancel, Cancelled};
use serde::{Deserialize, Serialize};

pub use chain::chain;

/// A step of a checkpoint or of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Checkpoint: the search for processes with CUDA, in the thawed container.
    Discover,
    /// Checkpoint: the driver finishes the running GPU work and starts no more.
    Lock,
    /// Checkpoint: the threads of the CUDA processes are held.
    Hold,
    /// Checkpoint: the driver moves the state on the GPUs to the memory of the processes.
    CudaCheckpoint,
    /// Checkpoint: the container is frozen.
    Freeze,
    /// Checkpoint: the contents of a /dev/shm from outside are saved.
    SaveShm,
    /// Checkpoint: staging memory is copied to the node store.
    SaveMemory,
    /// Both: files take the place of staging memory.
    Remap,
    /// Checkpoint: CRIU writes the processes to images.
    Dump,
    /// Checkpoint: big memory is moved from the images to the node store.
    MoveMemory,
    /// Checkpoint: the images become the checkpoint.
    Publish,
    /// Both: the driver moves the state back to the GPUs.
    CudaRestore,
    /// Both: the driver lets the processes use CUDA again.
    Unlock,
    /// Checkpoint: the container goes on, or ends.
    Release,
    /// Restore: the checkpoint is read and compared with the container.
    Inspect,
    /// Restore: the snapshot is pulled from a registry.
    Pull,
    /// Restore: the contents of /dev/shm are put back.
    LoadShm,
    /// Restore: standard input and output, mount points, and the runtime's state are made.
    Prepare,
    /// Restore: the cgroup is made.
    Cgroup,
    /// Restore: CRIU makes the processes again.
    Restore,
    /// Restore: the hooks of the container run.
    Hooks,
    /// Restore: big memory is filled into the processes.
    Fill,
    /// Restore: the processes run and the container takes its place.
    Resume,
}

impl Phase {
    /// Returns the phase's name in files and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Discover => "discover",
            Self::Lock => "lock",
            Self::Hold => "hold",
            Self::CudaCheckpoint => "cuda-checkpoint",
            Self::CudaRestore => "cuda-restore",
            Self::Unlock => "unlock",
            Self::Freeze => "freeze",
            Self::SaveShm => "save-shm",
            Self::SaveMemory => "save-memory",
            Self::Remap => "remap",
            Self::Dump => "dump",
            Self::MoveMemory => "move-memory",
            Self::Publish => "publish",
            Self::Release => "release",
            Self::Inspect => "inspect",
            Self::Pull => "pull",
            Self::LoadShm => "load-shm",
            Self::Prepare => "prepare",
            Self::Cgroup => "cgroup",
            Self::Restore => "restore",
            Self::Hooks => "hooks",
            Self::Fill => "fill",
            Self::Resume => "resume",
        }
    }
}

/// Prints the phase as a clause after "failed while".
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Discover => "looking for its CUDA processes",
            Self::Lock => "locking its CUDA processes",
            Self::Hold => "holding the threads of its CUDA processes",
            Self::CudaCheckpoint => "moving its GPU state to memory",
            Self::CudaRestore => "moving its GPU state back to the GPU",
            Self::Unlock => "unlocking its CUDA processes",
            Self::Freeze => "freezing it",
            Self::SaveShm => "saving its /dev/shm",
            Self::SaveMemory => "saving its GPU memory",
            Self::Remap => "putting files in the place of its GPU state in memory",
            Self::Dump => "dumping its processes",
            Self::MoveMemory => "moving its memory out of the images",
            Self::Publish => "publishing the images",
            Self::Release => "letting it go",
            Self::Inspect => "inspecting the checkpoint",
            Self::Pull => "pulling its snapshot",
            Self::LoadShm => "filling its /dev/shm",
            Self::Prepare => "preparing its mounts and state",
            Self::Cgroup => "making its cgroup",
            Self::Restore => "restoring its processes",
            Self::Hooks => "running its hooks",
            Self::Fill => "filling its memory",
            Self::Resume => "resuming its processes",
        })
    }
}

/// Start times of the phases of one operation. Clones share the same timeline.
#[derive(Clone)]
pub struct Timeline {
    began: Arc<Mutex<Vec<(Phase, Instant)>>>,
    /// Called at the start of each phase.
    observer: Option<Observer>,
}

/// Code to run at the start of each phase.
pub type Observer = Arc<dyn Fn(Phase) + Send + Sync>;

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timeline({self})")
    }
}

impl Timeline {
    /// Returns a timeline with its first phase starting now.
    #[must_use]
    pub fn start(first: Phase) -> Self {
        Self { began: Arc::new(Mutex::new(vec![(first, Instant::now())])), observer: None }
    }

    /// Returns the same timeline, with `observer` called for each later phase.
    #[must_use]
    pub fn observed(self, observer: Observer) -> Self {
        Self { observer: Some(observer), ..self }
    }

    fn began(&self) -> std::sync::MutexGuard<'_, Vec<(Phase, Instant)>> {
        self.began.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the next phase; does nothing if that phase is already the current one.
    pub fn enter(&self, phase: Phase) {
        let mut began = self.began();
        if began.last().is_none_or(|(last, _)| *last != phase) {
            tracing::debug!(phase = phase.name(), "a phase begins");
            began.push((phase, Instant::now()));
            drop(began);
            if let Some(observer) = &self.observer {
                observer(phase);
            }
        }
    }

    /// Returns the latest phase.
    #[must_use]
    pub fn current(&self) -> Phase {
        // A timeline starts with a phase.
        self.began().last().map_or(Phase::Inspect, |(phase, _)| *phase)
    }

    /// Returns each phase with its duration; the last one until now.
    #[must_use]
    pub fn phases(&self) -> Vec<(Phase, Duration)> {
        let began = self.began();
        let ends = began.iter().skip(1).map(|(_, begin)| *begin).chain([Instant::now()]);
        began.iter().zip(ends).map(|((phase, begin), end)| (*phase, end - *begin)).collect()
    }
}

/// Prints `freeze 0.001 s, dump 0.120 s`.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (phase, duration)) in self.phases().into_iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{} {:.3} s", phase.name(), duration.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_without_gaps() {
        let timeline = Timeline::start(Phase::Freeze);
        timeline.clone().enter(Phase::Dump);
        timeline.enter(Phase::Dump);
        timeline.enter(Phase::Release);
        let phases: Vec<Phase> = timeline.phases().into_iter().map(|(phase, _)| phase).collect();
        assert_eq!(phases, [Phase::Freeze, Phase::Dump, Phase::Release]);
        assert_eq!(timeline.current(), Phase::Release);
        assert!(timeline.to_string().starts_with("freeze 0."), "{timeline}");
    }
}
