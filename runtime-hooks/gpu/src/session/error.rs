//! Reasons why GPU state was not moved.

use serde::{Deserialize, Serialize};

/// Reason why a session failed. Sources are words, because it crosses from one process to another.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionError {
    /// GPU work outlasted the deadline.
    #[error("{process} has had GPU work under way for {seconds:.0} s: try again when it is done, or allow more time")]
    Busy {
        /// Pid and name.
        process: String,
        /// Length of all tries.
        seconds: f64,
    },
    /// The driver refuses a process because of something that the process uses.
    #[error("the driver cannot {action} {process}: {reason}")]
    Unsupported {
        /// "lock" or "checkpoint".
        action: String,
        /// Pid and name.
        process: String,
        /// Reason, as far as it shows.
        reason: String,
    },
    /// A process computes on a part of a GPU.
    #[error(
        "{process} uses an instance of a divided GPU (MIG), which the driver cannot checkpoint: give it a whole GPU"
    )]
    Mig {
        /// Pid and name.
        process: String,
    },
    /// Two processes share memory of a GPU.
    #[error(
        "{process} shares GPU memory with another process by CUDA IPC: the driver could not bring either back, so nothing \
         was changed"
    )]
    Shared {
        /// Pid and name.
        process: String,
    },
    /// Somebody else checkpoints the process, or the driver gave the process up.
    #[error("{process} is {state} already, as the driver says, and not by this checkpoint")]
    State {
        /// Pid and name.
        process: String,
        /// The driver's word.
        state: String,
    },
    /// The driver refused a call, or did not answer.
    #[error("cannot {action} {process}: {why}")]
    Call {
        /// "lock", "checkpoint", ...
        action: String,
        /// Pid and name, and what state it is in.
        process: String,
        /// The driver's answer.
        why: String,
    },
    /// A process could not be held, freed or described.
    #[error("cannot {action} {process}: {why}")]
    Process {
        /// "hold", "clean", ...
        action: String,
        /// Pid and name.
        process: String,
        /// Reason.
        why: String,
    },
    /// The state on the GPUs would not fit into memory.
    #[error(
        "{gib:.1} GiB on the GPU have to be moved to memory, and {left:.1} GiB are left ({limit}): give it more memory"
    )]
    Memory {
        /// Size of the state.
        gib: f64,
        /// Memory that is left.
        left: f64,
        /// The container's limit or the machine.
        limit: String,
    },
    /// The size of the state on the GPUs is unknown, and the container's memory is limited.
    #[error(
        "nothing says whether the GPU state fits into memory: {why}, and the container's memory limit leaves {left:.1} GiB: \
         make NVML reachable (GPUSNAP_NVML), or lift the limit"
    )]
    MemoryUnknown {
        /// Reason why NVML does not say.
        why: String,
        /// Memory that is left.
        left: f64,
    },
    /// The state does not fit on its GPU any more.
    #[error("{needed:.1} GiB have to go back to {gpu}, where {free:.1} GiB are free ({who})")]
    GpuMemory {
        /// UUID.
        gpu: String,
        /// Size of the state.
        needed: f64,
        /// Memory that is free.
        free: f64,
        /// Users of the rest.
        who: String,
    },
    /// A process was in the middle of its start.
    #[error("{process} is about to use CUDA: try again when it does")]
    Starting {
        /// Pid and name.
        process: String,
    },
    /// New processes that use CUDA kept appearing.
    #[error("processes that use CUDA keep appearing in the container")]
    Restless,
    /// The container's cgroup could not be read, frozen or thawed.
    #[error("cannot {action} the container: {why}")]
    Container {
        /// "freeze", ...
        action: String,
        /// Reason.
        why: String,
    },
    /// The rest of a container's memory did not come.
    #[error("its memory could not be put back")]
    Unfilled,
    /// Nothing of the container can call the driver.
    #[error("{0}")]
    NoDriver(String),
    /// The session failed, and could not be undone wholly either.
    #[error("{failure}; and the GPU state could not be put back: {undoing}")]
    NotUndone {
        /// First failure.
        failure: Box<Self>,
        /// Failure of the way back.
        undoing: Box<Self>,
    },
}
