//! Numbers of processes, one type for each pid namespace of the count.

use std::cmp::Ordering;
use std::fmt;
use std::io;
use std::num::NonZero;
use std::path::PathBuf;

use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::{Status, malformed};

/// A process by its pid in this process's pid namespace, the host's as a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "i32", into = "i32")]
pub struct HostPid(Pid);

/// A process by its pid in its innermost pid namespace: the number in CRIU's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i32", into = "i32")]
pub struct ContainerPid(NonZero<i32>);

/// Both numbers of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessIds {
    /// Pid in this process's namespace.
    pub host: HostPid,
    /// Pid in the container.
    pub container: ContainerPid,
}

/// A number unfit as a pid: zero or less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAPid(i32);

impl HostPid {
    /// Returns the pid; `None` unless the number is positive. The kernel takes other numbers for a
    /// group or for everybody.
    #[must_use]
    pub fn new(pid: i32) -> Option<Self> {
        if pid > 0 { Pid::from_raw(pid).map(Self) } else { None }
    }

    /// Returns this process's own pid.
    #[must_use]
    pub fn own() -> Self {
        Self(rustix::process::getpid())
    }

    /// Returns the plain number, for system calls and messages.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0.as_raw_nonzero().get()
    }

    /// Returns the pid in the type of rustix's calls.
    #[must_use]
    pub const fn as_pid(self) -> Pid {
        self.0
    }

    /// Returns the path of this process's file or folder in `/proc`.
    #[must_use]
    pub fn path(self, name: &str) -> PathBuf {
        format!("/proc/{self}/{name}").into()
    }
}

impl ContainerPid {
    /// Returns the pid; `None` unless the number is positive.
    #[must_use]
    pub const fn new(pid: i32) -> Option<Self> {
        match NonZero::new(pid) {
            Some(pid) if pid.get() > 0 => Some(Self(pid)),
            _ => None,
        }
    }

    /// Returns the plain number, for images and messages.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0.get()
    }
}

impl ProcessIds {
    /// Asks the kernel for both numbers of a process.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn of(host: HostPid) -> io::Result<Self> {
        let innermost = Status::of(host)?.namespace_pids().last().copied();
        // A kernel without pid namespaces lacks the line.
        let container = ContainerPid::new(innermost.unwrap_or(host.raw())).ok_or_else(|| malformed(host, "status"))?;
        Ok(Self { host, container })
    }
}

impl From<Pid> for HostPid {
    fn from(pid: Pid) -> Self {
        Self(pid)
    }
}

impl From<HostPid> for Pid {
    fn from(pid: HostPid) -> Self {
        pid.0
    }
}

impl Ord for HostPid {
    fn cmp(&self, other: &Self) -> Ordering {
        self.raw().cmp(&other.raw())
    }
}

impl PartialOrd for HostPid {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl From<HostPid> for i32 {
    fn from(pid: HostPid) -> Self {
        pid.raw()
    }
}

impl From<ContainerPid> for i32 {
    fn from(pid: ContainerPid) -> Self {
        pid.raw()
    }
}

impl TryFrom<i32> for HostPid {
    type Error = NotAPid;

    fn try_from(pid: i32) -> Result<Self, NotAPid> {
        Self::new(pid).ok_or(NotAPid(pid))
    }
}

impl TryFrom<i32> for ContainerPid {
    type Error = NotAPid;

    fn try_from(pid: i32) -> Result<Self, NotAPid> {
        Self::new(pid).ok_or(NotAPid(pid))
    }
}

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw().fmt(f)
    }
}

impl fmt::Display for ContainerPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for NotAPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not a pid", self.0)
    }
}

impl std::error::Error for NotAPid {}

impl From<NotAPid> for io::Error {
    fn from(error: NotAPid) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_means_a_group_or_everybody_is_no_pid() {
        for number in [0, -1, i32::MIN] {
            assert_eq!(HostPid::new(number), None);
            assert_eq!(ContainerPid::try_from(number).unwrap_err().to_string(), format!("{number} is not a pid"));
            serde_json::from_str::<HostPid>(&number.to_string()).unwrap_err();
        }
    }

    #[test]
    fn a_pid_is_written_as_its_number() {
        let pid = HostPid::new(4711).unwrap();
        assert_eq!((pid.to_string(), serde_json::to_string(&pid).unwrap()), ("4711".into(), "4711".into()));
        assert_eq!(serde_json::from_str::<HostPid>("4711").unwrap(), pid);
        assert_eq!(pid.as_pid().as_raw_nonzero().get(), 4711);
    }

    #[test]
    fn this_process_has_both_numbers() {
        let ids = ProcessIds::of(HostPid::own()).unwrap();
        assert_eq!(ids.host, HostPid::own());
        assert!(ids.container.raw() > 0);
    }
}
