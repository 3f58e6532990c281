//! A container's cgroup, v1 or v2, asked directly.
//!
//! A runtime is slow to ask and can be busy; what the kernel knows by itself is read here: who is in the container, its
//! statistics, its out-of-memory kills. Signals to everyone in it go from here too.
//!
//! On v1 a container has a directory in each hierarchy, and in principle different processes in each. For processes,
//! signals and freezing, one hierarchy decides, the same for all three ([`Cgroup::pids`]).

mod expel;
mod file;
mod freezer;
mod locate;
mod memory;
mod oom;
mod place;
mod process;
mod remove;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;
mod v1;
mod v2;
mod vfork;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::process::Signal;

use locate::Places;
pub use oom::OomWatch;
pub use place::{Membership, Place};
use proc::{HostPid, Wait};
use serde::{Deserialize, Serialize};

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
    /// The process is in no cgroup of its own: only in the root ones, or in such as no mount leads to.
    #[error("process {pid} has no cgroup of its own")]
    None {
        /// The process.
        pid: HostPid,
    },
    /// The caller is in the cgroup itself, and would have frozen or killed itself.
    #[error("this process is itself in the cgroup {path}")]
    Own {
        /// The cgroup's directory.
        path: PathBuf,
    },
    /// The processes could not all be brought to a halt, or all be signalled: some kept appearing.
    #[error("cannot {action} every process in {path}")]
    Unfinished {
        /// "freeze", "signal"
        action: &'static str,
        /// The cgroup's directory.
        path: PathBuf,
    },
    /// A thread waits uninterruptibly, for a dead file system say, so that the cgroup could not be frozen.
    #[error("cannot freeze every process in {path}: {wait}: try again when that wait is over")]
    Uninterruptible {
        /// The thread.
        wait: Box<Wait>,
        /// The cgroup's directory.
        path: PathBuf,
    },
    /// A process stands in the middle of a `vfork`, whenever it is looked at.
    #[error("process {pid} waits for a child that it has vforked, and is never at rest")]
    Vfork {
        /// The process.
        pid: HostPid,
    },
    /// The cgroup is still there after a minute of attempts to remove it.
    #[error("the cgroup {path} does not go: processes {pids:?} are in it")]
    Busy {
        /// The directory, which may be below the one that was to be removed.
        path: PathBuf,
        /// Processes in the cgroup.
        pids: Vec<HostPid>,
        /// Answer of the kernel.
        #[source]
        source: io::Error,
    },
    /// The path of a specification is none of a cgroup.
    #[error("the cgroup path {path} {why}")]
    Path {
        /// The path.
        path: PathBuf,
        /// Fault of the path, as it fits behind it.
        why: &'static str,
    },
    /// Cgroups were to be made by systemd on a machine with cgroup v1.
    #[error("cgroups by systemd need cgroup v2 in this runtime; use runc on this node")]
    SystemdV1,
    /// The kernel offers no notification of out-of-memory kills here: there is no memory controller.
    #[error("no memory controller for the cgroup {path}")]
    NoMemoryController {
        /// One of the cgroup's directories.
        path: PathBuf,
    },
    /// The metrics could not be put into their message.
    #[error("cannot encode the metrics of the cgroup {path}")]
    Encode {
        /// One of the cgroup's directories.
        path: PathBuf,
        /// Why not.
        #[source]
        source: containerd_shim_protos::protobuf::Error,
    },
}

/// The cgroup of one container. The value stays valid when the processes end, and while the cgroup's
/// directories are there it can be asked. Another process that sees the same hierarchies can be given it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    hierarchy: Hierarchy,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Hierarchy {
    V1(v1::Directories),
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroup that a process is in now. Of a container's process that is the container's only as long as nothing of
    /// the container has run: later it may have moved to a cgroup below. See [`Place`].
    ///
    /// # Errors
    /// When the process has ended, it has no cgroup but the root, or /proc cannot be read.
    pub fn of_process(pid: HostPid) -> Result<Self, CgroupError> {
        let read = |path: PathBuf| {
            std::fs::read_to_string(&path).map_err(|source| CgroupError::File { action: "read", path, source })
        };
        let cgroup = read(pid.path("cgroup"))?;
        let mountinfo = read("/proc/self/mountinfo".into())?;
        match locate::places(&cgroup, &mountinfo, Path::is_dir) {
            Some(Places::V1(controllers)) => Ok(Self { hierarchy: Hierarchy::V1(v1::Directories::new(controllers)) }),
            Some(Places::V2(directory)) => Ok(Self { hierarchy: Hierarchy::V2(directory) }),
            None => Err(CgroupError::None { pid }),
        }
    }

    /// The cgroup with these directories, each by its controllers as `/proc/PID/cgroup` names them: the form in which
    /// runc keeps them. The name of version 2 is empty. None without any.
    #[must_use]
    pub fn of_directories(directories: impl IntoIterator<Item = (String, PathBuf)>) -> Option<Self> {
        let (v1, v2): (Vec<_>, Vec<_>) = directories.into_iter().partition(|(names, _)| !names.is_empty());
        let v1 = v1.iter().flat_map(|(names, path)| names.split(',').map(|name| (name.to_owned(), path.clone())));
        let v1: Vec<_> = v1.collect();
        let hierarchy = match v2.into_iter().next() {
            _ if !v1.is_empty() => Hierarchy::V1(v1::Directories::new(v1)),
            Some((_, path)) => Hierarchy::V2(path),
            None => return None,
        };
        Some(Self { hierarchy })
    }

    /// Returns whether another cgroup is this one or below it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        other.directory().starts_with(self.directory())
    }

    /// Every process in it and in the cgroups below it, in this process's pid namespace.
    ///
    /// On v1 this is read from the freezer's hierarchy where there is one: a process that could slip out of that one
    /// could not be held still either, and killing depends on holding still. Every runtime puts a container into it.
    ///
    /// # Errors
    /// When the cgroup's files cannot be read; a cgroup that is gone has no processes.
    pub fn pids(&self) -> Result<Vec<HostPid>, CgroupError> {
        process::pids(self.directory())
    }

    /// Sends every process in it a signal. With SIGKILL none that is forking can get away, and a frozen cgroup is
    /// thawed, so that they die; it does not wait until they are dead. With SIGKILL on v1 this blocks for up to
    /// half a second if the kernel is slow to freeze.
    ///
    /// # Errors
    /// When the cgroup's files cannot be read or written, or this process is in the cgroup.
    pub fn signal_all(&self, signal: Signal) -> Result<(), CgroupError> {
        if signal != Signal::KILL {
            return process::signal(self.directory(), signal);
        }
        if let Hierarchy::V2(directory) = &self.hierarchy
            && process::kill_v2(directory)?
        {
            // A killed process does not wait for the thaw on v2, but the next one in this cgroup would.
            return self.thaw();
        }
        process::kill(self)
    }

    /// Freezes it and waits until everything in it stands still.
    ///
    /// # Errors
    /// When the freezer's file cannot be written, this process is in the cgroup, or a process does not stop within
    /// half a second; it is thawed again then.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        freezer::freeze(self)
    }

    /// The same with another limit than half a second.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub fn freeze_within(&self, limit: Duration) -> Result<(), CgroupError> {
        freezer::freeze_within(self, limit)
    }

    /// Freezes the cgroup of a restored tree, without those who made the tree there: they are moved to where another
    /// process is.
    ///
    /// # Errors
    /// As [`Self::freeze`], and when a maker cannot be moved.
    pub fn freeze_around(&self, makers: &[HostPid], beside: HostPid) -> Result<(), CgroupError> {
        for maker in makers {
            self.expel(*maker, beside)?;
        }
        self.freeze()
    }

    /// Freezes it, unless `is_frozen`, at a moment when no process of it waits in `vfork` for a child to execute a
    /// program: the child stands still too, so such a process waits on in the kernel, where CRIU cannot stop it. A
    /// cgroup caught so is thawed for another moment, again and again for 4 s.
    ///
    /// A cgroup that this process is in itself is left as it is.
    ///
    /// # Errors
    /// [`CgroupError::Vfork`] when there was no such moment: it is left frozen then. Otherwise as [`Self::freeze`].
    pub fn freeze_at_rest(&self, is_frozen: bool) -> Result<(), CgroupError> {
        freezer::freeze_at_rest(self, is_frozen, freezer::MOMENTS)
    }

    /// Whether it was frozen by [`Self::freeze`] or a runtime. A cgroup that is gone is not.
    ///
    /// # Errors
    /// When the freezer's file cannot be read.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        freezer::is_frozen(self)
    }

    /// Returns whether a process in it is frozen or about to be: by this cgroup's freezer, or one above it.
    ///
    /// # Errors
    /// When the freezer's files cannot be read.
    pub fn stands_still(&self) -> Result<bool, CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(directories) => directories.get("freezer").map_or(Ok(false), freezer::stands_still),
            Hierarchy::V2(directory) => freezer::stands_still(directory),
        }
    }

    /// Thaws it, if it is frozen.
    ///
    /// # Errors
    /// When the freezer's file cannot be written.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        freezer::thaw(self)
    }

    /// Lets processes die that were killed while it was frozen: on v1 it is thawed for that; on v2 a frozen process dies
    /// of SIGKILL, and it stays frozen.
    ///
    /// # Errors
    /// When the freezer's file cannot be written.
    pub fn let_the_killed_die(&self) -> Result<(), CgroupError> {
        match self.hierarchy {
            Hierarchy::V1(_) => self.thaw(),
            Hierarchy::V2(_) => Ok(()),
        }
    }

    /// Kills every process in it and removes it, with all below it, in all its hierarchies. Tries until it is gone, a
    /// minute at most.
    ///
    /// # Errors
    /// When it is there after a minute. What is gone by then stays so, and the call can be repeated.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(directories) => remove::remove(&directories.all()),
            Hierarchy::V2(directory) => remove::remove(std::slice::from_ref(directory)),
        }
    }

    /// Removes it, with all below it, if nobody is in it: tried for ten seconds, because a process that has just left it
    /// can keep it for a moment.
    ///
    /// # Errors
    /// When it is there after that time.
    pub fn remove_empty(&self) -> Result<(), CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(directories) => remove::remove_empty(&directories.all()),
            Hierarchy::V2(directory) => remove::remove_empty(std::slice::from_ref(directory)),
        }
    }

    /// Moves a process out of it, to where another one is.
    ///
    /// # Errors
    /// When a cgroup's file cannot be written.
    pub fn expel(&self, pid: HostPid, beside: HostPid) -> Result<(), CgroupError> {
        expel::expel(self, pid, beside)
    }

    /// Bytes of memory of its processes that are in no file, each page once; None where the kernel does not count them.
    #[must_use]
    pub fn anonymous_memory(&self) -> Option<u64> {
        memory::anonymous(self)
    }

    /// Bytes of memory that its limit, or that of a cgroup above it, leaves; None without a limit.
    #[must_use]
    pub fn memory_left(&self) -> Option<u64> {
        memory::left(self)
    }

    /// Its statistics as `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`, filled as
    /// containerd's own library fills them.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn metrics(&self) -> Result<Any, CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(directories) => directories.metrics(),
            Hierarchy::V2(directory) => v2::metrics(directory),
        }
    }

    /// How many of its processes the kernel killed for want of memory so far; 0 when it is gone.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        match &self.hierarchy {
            Hierarchy::V1(directories) => directories.oom_kills(),
            Hierarchy::V2(directory) => v2::oom_kills(directory),
        }
    }

    /// Starts watching for out-of-memory kills.
    ///
    /// # Errors
    /// When the kernel does not offer notifications for it. Needs a tokio runtime.
    pub fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        match &self.hierarchy {
            Hierarchy::V1(directories) => oom::watch_v1(self.clone(), directories),
            Hierarchy::V2(directory) => oom::watch_v2(directory),
        }
    }

    /// The directory that decides who is in the container.
    fn directory(&self) -> &Path {
        match &self.hierarchy {
            Hierarchy::V1(directories) => directories.of_processes(),
            Hierarchy::V2(directory) => directory,
        }
    }
}

/// Packs metrics the way containerd's typeurl names them: by the bare name of the message.
fn pack(
    metrics: &impl containerd_shim_protos::protobuf::Message,
    name: &str,
    directory: &Path,
) -> Result<Any, CgroupError> {
    let value =
        metrics.write_to_bytes().map_err(|source| CgroupError::Encode { path: directory.to_owned(), source })?;
    Ok(Any { type_url: name.to_owned(), value, ..Any::default() })
}
