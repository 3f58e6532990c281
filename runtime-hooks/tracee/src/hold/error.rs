//! Why threads could not be held, or not be let go.

use std::fmt;
use std::io;

use cgroup::Cgroup;

use crate::process;

/// Why threads are not held. Those that were taken before stay so until they are let go.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// There is no such process, or it has ended.
    #[error("cannot hold process {pid}: it has ended")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// /proc does not tell its threads.
    #[error("cannot list the threads of process {pid}")]
    List {
        /// The process.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A thread has a tracer already: a debugger, strace, criu.
    #[error("cannot hold thread {tid} of process {pid}: process {tracer} ({name}) traces it")]
    Traced {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// The pid of the tracer.
        tracer: i32,
        /// The name of the tracer.
        name: String,
    },
    /// The kernel refused a request.
    #[error("cannot {action} thread {tid} of process {pid}")]
    Refused {
        /// "seize", "interrupt", ...
        action: &'static str,
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The deadline has passed, and a thread does not stand still yet.
    #[error("thread {tid} ({name}) of process {pid} does not stop: it is {waits}")]
    Moving {
        /// The process.
        pid: i32,
        /// The thread, the first of perhaps many.
        tid: i32,
        /// The thread's name.
        name: String,
        /// Activity of the thread instead.
        waits: Waits,
    },
}

/// Why threads are still held. A later try may let them go, and the end of the calling process does.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The kernel refused a request.
    #[error("cannot detach from thread {tid} of process {pid}")]
    Refused {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread that was taken never stood still, and only then can it be let go; or it is dying, and is not dead yet.
    #[error("cannot let go of thread {tid} ({name}) of process {pid} and {others} more: it is {waits}")]
    Moving {
        /// The process.
        pid: i32,
        /// The thread, the first one.
        tid: i32,
        /// The thread's name.
        name: String,
        /// Number of other threads like this one.
        others: usize,
        /// Activity of the thread.
        waits: Waits,
    },
}

/// Activity of a thread, as far as the kernel tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    /// Its state in proc_pid_stat(5): R, S, D, T, t, Z; `?` when it has gone.
    pub state: char,
    /// The kernel's function that it waits in; empty when it runs or the kernel does not tell.
    pub place: String,
    /// The number of the system call that it is in.
    pub syscall: Option<i64>,
    /// Whether its cgroup is frozen.
    pub frozen: bool,
}

impl Waits {
    pub(super) fn of(pid: i32, tid: i32) -> Self {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).unwrap_or_default();
        let place = read("wchan");
        Self {
            state: process::letter(pid, tid).map_or('?', char::from),
            place: if place == "0" { String::new() } else { place },
            frozen: Cgroup::of_process(pid).and_then(|cgroup| cgroup.stands_still()).unwrap_or(false),
            syscall: read("syscall").split_whitespace().next().and_then(|number| number.parse().ok()),
        }
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.frozen {
            return write!(f, "in a frozen cgroup");
        }
        write!(f, "in state {}", self.state)?;
        if !self.place.is_empty() {
            write!(f, ", waiting in {}", self.place)?;
        }
        match self.syscall {
            Some(number) if number >= 0 => write!(f, ", in system call {number}"),
            _ => Ok(()),
        }
    }
}
