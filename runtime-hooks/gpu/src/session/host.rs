//! Actions of a session on a machine. Tests put a fake in.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use cuda::{Answer, Call, CallFailure, Inventory};
use memory::{Layout, ProcessLayout};
use proc::{HostPid, ProcessIds, Range};

use super::SessionError;

/// The processes of the container, as the kernel shows them. A pid always means the process that had it when the container's
/// cgroup listed it first.
pub(crate) trait Processes {
    /// Lists all, in the pid namespace of this process.
    fn pids(&mut self) -> Result<Vec<HostPid>, SessionError>;
    /// Tells whether a process has ended, whoever has its pid now.
    fn is_gone(&mut self, pid: HostPid) -> bool;
    /// Tells whether the process has something of the driver's: mappings, descriptors, threads.
    fn touches_gpu(&mut self, pid: HostPid) -> bool;
    /// Tells whether the process has threads of the driver's.
    fn has_drivers_threads(&mut self, pid: HostPid) -> bool;
    /// Tells whether the process has loaded the driver's library, so that it may begin to use CUDA.
    fn has_drivers_library(&mut self, pid: HostPid) -> bool;
    /// Fails if a thread of the process is traced by another process, so that nothing here can hold it.
    fn refuse_traced(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// Returns the devices of the driver that the process has open or mapped.
    fn devices(&mut self, pid: HostPid) -> Devices;
    /// Returns who a process is, and what keeps it from answering, in words.
    fn describe(&mut self, pid: HostPid) -> String;
    /// Returns both pids of a process; None for one that has ended.
    fn ids(&mut self, pid: HostPid) -> Option<ProcessIds>;
    /// Returns anonymous memory of the process that came since it was asked first.
    fn staged(&mut self, pid: HostPid, is_first: bool) -> Vec<Range>;
    /// Returns where it has devices of the driver mapped: begin and end.
    fn mappings(&mut self, pid: HostPid) -> Vec<(u64, u64)>;
    /// Tells whether the driver's threads of it are stopped by a signal.
    fn is_stopped(&mut self, pid: HostPid) -> bool;
    /// Tells whether it is stopped by a signal, or will be as soon as it runs.
    fn is_stopping(&mut self, pid: HostPid) -> bool;
    /// Returns what the process uses that the driver is known to refuse.
    fn unsupported(&mut self, pid: HostPid) -> Unsupported;
}

/// Devices of the driver that a process has open or mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Devices {
    /// Paths in the process's view, by the numbers of descriptors.
    pub(crate) paths: BTreeMap<u32, PathBuf>,
    /// Number of mappings.
    pub(crate) mappings: usize,
}

impl Devices {
    pub(crate) fn is_empty(&self) -> bool {
        self.paths.is_empty() && self.mappings == 0
    }
}

/// Features that a process uses and the driver is known to refuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unsupported {
    /// It has loaded CUPTI: a profiler was used in it.
    pub(crate) cupti: bool,
    /// It has an instance of a divided GPU open.
    pub(crate) mig: bool,
    /// It is a client of the multi-process service.
    pub(crate) mps: bool,
    /// It has memory of another process's GPU allocations mapped.
    pub(crate) ipc: bool,
}

/// The driver of the node.
pub(crate) trait Driver {
    /// Makes all calls at once, and holds on to what is held meanwhile.
    fn calls(&mut self, calls: &[(HostPid, Call)], limit: Duration) -> Vec<Result<Answer, CallFailure>>;
    fn inventory(&mut self) -> Result<Inventory, CallFailure>;
}

/// The container's cgroup.
pub(crate) trait Freezer {
    fn freeze(&mut self) -> Result<(), SessionError>;
    /// Freezes at a moment when what is there can be dumped.
    fn freeze_at_rest(&mut self) -> Result<(), SessionError>;
    fn thaw(&mut self) -> Result<(), SessionError>;
    /// Tells whether somebody has frozen it.
    fn is_frozen(&mut self) -> bool;
    /// Returns the memory that the container may still use.
    fn memory_left(&mut self) -> Option<MemoryLeft>;
}

/// Memory that may still be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MemoryLeft {
    pub(crate) bytes: u64,
    /// The container's limit leaves no more, not the machine.
    pub(crate) is_limited: bool,
}

/// Threads that are held, and what they are made to do.
pub(crate) trait Tracer {
    /// Asks all threads but the driver's to halt, as soon as they can.
    fn hold(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// As [`Self::hold`], the driver's too.
    fn hold_whole(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// Returns whether a thread of a process, all whose threads but the driver's are held, stands in a call of the driver.
    fn is_in_driver(&mut self, pid: HostPid) -> bool;
    /// Waits until those that are held stand still.
    fn settle(&mut self, limit: Duration) -> Result<(), SessionError>;
    /// Lets all processes go but these.
    fn let_go(&mut self, keep: &[HostPid]) -> Result<(), SessionError>;
    /// Lets the driver's threads of a process run that is stopped by a signal, and nothing else of it.
    fn cont(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// Lets a process run that is stopped by a signal, whether or not its threads are held.
    fn cont_unheld(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// Stops it again.
    fn stop(&mut self, pid: HostPid) -> Result<(), SessionError>;
    /// Puts packs in the place of memory of a process that is held. Returns what was left as it is.
    fn remap(&mut self, packs: &[PathBuf], of: &ProcessLayout, limit: Duration) -> Result<Vec<Range>, SessionError>;
    /// Gives processes that are held the staging memory that was saved. It may go on beside calls of the driver, until the
    /// next.
    fn map_staging(&mut self, staging: &Layout, limit: Duration) -> Result<(), SessionError>;
    /// Waits until all of it is there, and what was saved.
    fn finish_staging(&mut self, limit: Duration) -> Result<(), SessionError>;
}

/// A machine, as far as one container reaches.
pub(crate) trait Host: Processes + Driver + Freezer + Tracer {
    fn sleep(&mut self, time: Duration);
}
