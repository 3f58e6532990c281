//! Processes over time: a pid can be reused as soon as its process has been waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::{HostPid, Stat, is_gone, malformed};

/// A process, distinguished by its start from a later one with the same pid. Suitable for files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// Pid of the process.
    pub pid: HostPid,
    /// Start of the process, in clock ticks since boot.
    pub start_time: u64,
}

impl Identity {
    /// Returns the current process with this pid, even a zombie.
    ///
    /// # Errors
    /// Fails if there is no such process.
    pub fn of(pid: HostPid) -> io::Result<Self> {
        let start_time = Stat::of(pid)?.start_time().ok_or_else(|| malformed(pid, "stat"))?;
        Ok(Self { pid, start_time })
    }

    /// Returns the living process with this pid; `None` for a zombie, or without a process.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub fn of_living(pid: HostPid) -> io::Result<Option<Self>> {
        match Stat::of(pid) {
            Ok(stat) if stat.has_ended() => Ok(None),
            Ok(stat) => {
                let start_time = stat.start_time().ok_or_else(|| malformed(pid, "stat"))?;
                Ok(Some(Self { pid, start_time }))
            }
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns whether the pid is still this process's. A zombie keeps its pid.
    #[must_use]
    pub fn has_its_pid(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }

    /// Returns whether the process lives: neither gone nor a zombie.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(Self::of_living(self.pid)? == Some(*self))
    }

    /// Opens the process again.
    ///
    /// # Errors
    /// `NotFound` if the process has gone, even if another has the pid; or no descriptor is free.
    pub fn open(&self) -> io::Result<ProcessHandle> {
        let handle = ProcessHandle::open(self.pid)?;
        if handle.identity == *self { Ok(handle) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

/// An opened process: signals and answers can never concern another one.
#[derive(Debug)]
pub struct ProcessHandle {
    identity: Identity,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Opens the current process with this pid. To make sure of a process from a list, read the
    /// list again afterwards.
    ///
    /// # Errors
    /// `NotFound` if there is no such process; or no descriptor is free.
    pub fn open(pid: HostPid) -> io::Result<Self> {
        let gone = |error: io::Error| if is_gone(&error) { io::ErrorKind::NotFound.into() } else { error };
        let before = Identity::of(pid).map_err(gone)?;
        let pidfd =
            rustix::process::pidfd_open(pid.as_pid(), PidfdFlags::empty()).map_err(|error| gone(error.into()))?;
        // The same process before and after: so the descriptor, opened in between, is that
        // process's too.
        if before.has_its_pid() { Ok(Self { identity: before, pidfd }) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Returns the pid, valid while [`Self::is_alive`] returns true.
    #[must_use]
    pub fn pid(&self) -> HostPid {
        self.identity.pid
    }

    /// Returns the process's identity, different from that of a later process with the same pid.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns whether the process has not ended. A zombie has ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        // A pidfd is readable once its process has ended. A valid descriptor gives no error.
        !matches!(rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(ready) if ready > 0)
    }

    /// Runs `work` on the process's pid, and returns the outcome only if the process has lived all
    /// the time: then the pid was this process's.
    ///
    /// # Errors
    /// `NotFound` if the process has ended before or meanwhile; or the error of `work`.
    pub fn with_pid<T>(&self, work: impl FnOnce(HostPid) -> io::Result<T>) -> io::Result<T> {
        let outcome = if self.is_alive() { work(self.pid()) } else { Err(io::ErrorKind::NotFound.into()) };
        if self.is_alive() { outcome } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// `NotFound` if the process has ended and was waited for; or the kernel's refusal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).map_err(|error| {
            let error = io::Error::from(error);
            if is_gone(&error) { io::ErrorKind::NotFound.into() } else { error }
        })
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, HostPid) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = HostPid::new(i32::try_from(child.id()).unwrap()).unwrap();
        (child, pid)
    }

    #[allow(clippy::disallowed_methods)]
    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn await_end(handle: &ProcessHandle) {
        let mut fds = [PollFd::new(handle, PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
    }

    #[test]
    fn a_process_is_told_from_one_that_gets_its_pid() {
        let (child, pid) = sleeper();
        let identity = Identity::of(pid).unwrap();
        assert_eq!(identity.open().unwrap().identity(), identity);
        let other = Identity { start_time: identity.start_time + 1, ..identity };
        assert!(!other.has_its_pid());
        assert!(!other.is_alive().unwrap());
        assert_eq!(other.open().unwrap_err().kind(), io::ErrorKind::NotFound);
        end(child);
        assert_eq!(identity.open().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_zombie_has_its_pid_and_does_not_live() {
        let (child, pid) = sleeper();
        let handle = ProcessHandle::open(pid).unwrap();
        assert!(handle.is_alive());
        handle.signal(Signal::KILL).unwrap();
        await_end(&handle);
        assert!(!handle.is_alive());
        assert!(handle.identity().has_its_pid());
        assert!(!handle.identity().is_alive().unwrap());
        end(child);
        assert!(!handle.identity().has_its_pid());
        assert_eq!(handle.signal(Signal::TERM).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_was_done_to_a_process_that_ended_meanwhile_is_not_believed() {
        let (child, pid) = sleeper();
        let handle = ProcessHandle::open(pid).unwrap();
        assert_eq!(handle.with_pid(|pid| Ok(pid.raw())).unwrap(), pid.raw());
        let ended = handle.with_pid(|_| {
            handle.signal(Signal::KILL)?;
            await_end(&handle);
            Ok(())
        });
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::NotFound);
        end(child);
    }

    #[test]
    fn an_identity_is_written_with_its_names() {
        let identity = Identity { pid: HostPid::new(7).unwrap(), start_time: 4711 };
        assert_eq!(serde_json::to_string(&identity).unwrap(), r#"{"pid":7,"startTime":4711}"#);
    }
}
