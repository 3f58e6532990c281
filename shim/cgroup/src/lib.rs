//! A container's cgroup, v1 or v2, asked directly.

use std::io;
use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::process::Signal;

/// What went wrong with a cgroup file.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file could not be read or written.
    #[error("cannot {action} {path}")]
    File {
        /// "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Where the processes of one container are accounted.
#[derive(Clone, Debug)]
pub struct Cgroup {}

impl Cgroup {
    /// The cgroup that a process is in now.
    ///
    /// # Errors
    /// When the process has ended, or /proc cannot be read.
    pub fn of_process(_pid: i32) -> Result<Self, CgroupError> {
        Ok(Self {})
    }

    /// Every process in it and in the cgroups below it.
    ///
    /// # Errors
    /// When the cgroup's files cannot be read; a cgroup that is gone has no processes.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        Ok(vec![])
    }

    /// Sends every process in it a signal. With SIGKILL none that is forking can get away, and a frozen cgroup is
    /// thawed, so that they die.
    ///
    /// # Errors
    /// When the cgroup's files cannot be read or written.
    pub fn signal_all(&self, _signal: Signal) -> Result<(), CgroupError> {
        Ok(())
    }

    /// Thaws it, if it is frozen.
    ///
    /// # Errors
    /// When the freezer's file cannot be written.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        Ok(())
    }

    /// Its statistics as `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn metrics(&self) -> Result<Any, CgroupError> {
        Ok(Any::new())
    }

    /// How many of its processes the kernel killed for want of memory so far.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        0
    }

    /// Starts watching for out-of-memory kills.
    ///
    /// # Errors
    /// When the kernel does not offer notifications for it.
    pub fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        Ok(OomWatch {})
    }
}

/// Tells of out-of-memory kills.
#[derive(Debug)]
pub struct OomWatch {}

impl OomWatch {
    /// Waits for the next notification; the caller asks [`Cgroup::oom_kills`] what happened. `None` when the cgroup
    /// is gone.
    pub async fn next(&mut self) -> Option<()> {
        None
    }
}
