//! Steps that a session has to undo.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use cuda::Pair;
use proc::HostPid;
use serde::{Deserialize, Serialize};

use super::{OnGpu, SessionError};

/// A step of a session that is to be undone.
///
/// A step is noted before it is made, so each may have been made or not: the driver and the kernel are asked. Steps are in
/// the reverse order of that in which they are undone, whatever the order in which they were made: what is held is let go
/// last, when it has its GPU state back and a container that was paused is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Threads of the process are held.
    Held(HostPid),
    /// The freezer is not as it is to be left.
    Freezer,
    /// The process was stopped by a signal, and was continued.
    Continued(HostPid),
    /// The driver starts no GPU work of the process.
    Locked(HostPid),
    /// The GPU state of the process is in its memory.
    Checkpointed(HostPid),
    /// The processes of the container have not been looked for.
    Unseen,
}

impl Step {
    /// Returns the process that it is about.
    #[must_use]
    pub fn pid(self) -> Option<HostPid> {
        match self {
            Self::Held(pid) | Self::Continued(pid) | Self::Locked(pid) | Self::Checkpointed(pid) => Some(pid),
            Self::Freezer | Self::Unseen => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(pid) => write!(f, "threads of process {pid} are held"),
            Self::Freezer => f.write_str("the freezer is not as it was"),
            Self::Continued(pid) => write!(f, "process {pid} runs and was stopped"),
            Self::Locked(pid) => write!(f, "process {pid} is locked"),
            Self::Checkpointed(pid) => write!(f, "the GPU state of process {pid} is not back"),
            Self::Unseen => f.write_str("the processes of the container cannot be listed"),
        }
    }
}

/// State that is still to be put back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Owed {
    /// The steps that are not undone.
    pub steps: Vec<Step>,
    /// The first failure of the last try to undo them.
    pub failure: Option<SessionError>,
}

impl Owed {
    /// Tells whether everything is back, or the processes are gone.
    #[must_use]
    pub fn is_paid(&self) -> bool {
        self.steps.is_empty()
    }
}

impl fmt::Display for Owed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps.iter().enumerate() {
            write!(f, "{}{step}", if index > 0 { ", " } else { "" })?;
        }
        match &self.failure {
            Some(failure) => write!(f, ": {failure}"),
            None => Ok(()),
        }
    }
}

/// The steps of a session, and how the container is to be left.
#[derive(Clone, Debug, Default)]
pub(crate) struct Undo {
    steps: BTreeSet<Step>,
    /// Leave the container frozen.
    pub(crate) frozen: bool,
    /// GPUs that take the place of others.
    pub(crate) pairs: Vec<Pair>,
    /// Longest time for the driver to move state.
    pub(crate) limit: Duration,
    /// The first failure of the last way back.
    pub(crate) failure: Option<SessionError>,
    /// Bytes that processes had on GPUs, as far as known.
    pub(crate) rooms: BTreeMap<HostPid, Vec<OnGpu>>,
}

impl Undo {
    pub(crate) fn aim(&mut self, frozen: bool, pairs: &[Pair], limit: Duration) {
        self.frozen = frozen;
        self.pairs = pairs.to_vec();
        self.limit = limit;
    }

    pub(crate) fn push(&mut self, step: Step) {
        self.steps.insert(step);
    }

    pub(crate) fn done(&mut self, step: Step) {
        self.steps.remove(&step);
    }

    pub(crate) fn has(&self, step: Step) -> bool {
        self.steps.contains(&step)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Returns the processes with such a step.
    pub(crate) fn pids(&self, step: fn(HostPid) -> Step) -> Vec<HostPid> {
        self.steps.iter().filter_map(|noted| noted.pid().filter(|pid| step(*pid) == *noted)).collect()
    }

    /// Forgets the steps of processes that are gone.
    pub(crate) fn forget(&mut self, mut is_gone: impl FnMut(HostPid) -> bool) {
        self.steps.retain(|step| !step.pid().is_some_and(&mut is_gone));
    }

    pub(crate) fn owed(&self) -> Owed {
        let failure = if self.steps.is_empty() { None } else { self.failure.clone() };
        Owed { steps: self.steps.iter().rev().copied().collect(), failure }
    }
}
