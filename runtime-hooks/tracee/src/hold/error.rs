//! Why threads could not be held, or not be let go.

use std::io;

use cgroup::Cgroup;
use proc::{HostPid, Wait};

/// Why threads are not held. Those that were taken before stay so until they are let go.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// There is no such process, or it has ended.
    #[error("cannot hold process {pid}: it has ended")]
    Gone {
        /// The process.
        pid: HostPid,
    },
    /// /proc does not tell its threads.
    #[error("cannot list the threads of process {pid}")]
    List {
        /// The process.
        pid: HostPid,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A thread has a tracer already: a debugger, strace, criu.
    #[error("cannot hold thread {tid} of process {pid}: process {tracer} ({name}) traces it")]
    Traced {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// The pid of the tracer.
        tracer: HostPid,
        /// The name of the tracer.
        name: String,
    },
    /// The kernel refused a request.
    #[error("cannot {action} thread {tid} of process {pid}")]
    Refused {
        /// "seize", "interrupt", ...
        action: &'static str,
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The deadline has passed, and a thread does not stand still yet.
    #[error("{wait}, and does not stop{reason}")]
    Moving {
        /// The thread, the first of perhaps many, and its activity instead.
        wait: Wait,
        /// Reason for the wait, as it fits behind the message; empty if none is known.
        reason: &'static str,
    },
}

/// Why threads are still held. A later try may let them go, and the end of the calling process does.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The kernel refused a request.
    #[error("cannot detach from thread {tid} of process {pid}")]
    Refused {
        /// The process.
        pid: HostPid,
        /// The thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread that was taken never stood still, and only then can it be let go; or it is dying, and is not dead yet.
    #[error("{wait}, and cannot be let go of, as {others} more{reason}")]
    Moving {
        /// The first of the threads, and its activity.
        wait: Wait,
        /// Number of other threads like this one.
        others: usize,
        /// Reason for the wait, as it fits behind the message; empty if none is known.
        reason: &'static str,
    },
}

/// Returns why threads of a process may be unable to stop, as it fits behind a message; empty if none is known.
pub(super) fn reason(pid: HostPid) -> &'static str {
    let frozen = Cgroup::of_process(pid).and_then(|cgroup| cgroup.stands_still());
    if frozen.unwrap_or(false) { ": it is in a frozen cgroup" } else { "" }
}
