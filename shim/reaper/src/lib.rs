//! Child processes by pidfd: spawning, adopting and reaping.
//!
//! A shim is a child subreaper. The shim's children are spawned helpers and runtimes, container
//! processes left by either, and orphans of the container. Only this crate waits for any child, so
//! no two waiters can race for one exit status:
//!
//! ```text
//!  spawn(Command) ──► Child ─── pidfd becomes readable ──► waitid(P_PIDFD) ──► Exit, kept for every Child::wait
//!  adoption().adopt(pid) ──► Child                                              ▲ under one lock, pid forgotten
//!  SIGCHLD ──► sweep: waitid(P_ALL, WNOWAIT) ── a known pid? its own watcher reaps it
//!                                             └─ unknown: reaped and dropped, unless an adoption is open
//! ```
//!
//! A runtime such as runc forks the container's init and leaves it behind as an orphan, possibly
//! dead before the shim knows the pid. Hence [`Adoption`]: an open one keeps the sweep from reaping
//! anything, so such a child stays a zombie, pid and status intact, until adopted.
//!
//! A session is a child of the shim and no subreaper. The shim is the parent of every process that
//! must outlive the session ([`Reaper::spawn_lasting`]). The session watches such a process, and
//! the shim reaps it.

mod descriptors;

use std::collections::HashSet;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use proc::HostPid;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::{Notify, watch};

pub use descriptors::raise_descriptor_limit;

/// Value of [`Exit::code`] without an answer of the kernel: the process was never this process's
/// child.
pub const UNKNOWN_EXIT_CODE: u32 = 255;

/// Pauses between attempts to reap an ended process still held by a tracer.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Result and time of a process's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 plus the number of the killing signal, as counted by shells and
    /// containerd.
    pub code: u32,
    /// Time at which the exit was seen.
    pub at: SystemTime,
}

/// The only waiter for this process's children. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reaper {
    shared: Arc<Shared>,
    /// Orphans of this process's children go to this process's parent.
    is_guest: bool,
}

#[derive(Debug, Default)]
struct Shared {
    children: Mutex<Children>,
    sweep: Notify,
}

#[derive(Debug, Default)]
struct Children {
    /// Pids with a watcher.
    known: HashSet<i32>,
    /// Number of open adoptions.
    adoptions: usize,
}

impl Shared {
    fn children(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Reaper {
    /// Starts reaping the children of this process. Needs a tokio runtime, before the runtime's
    /// other work.
    ///
    /// # Errors
    /// Fails if SIGCHLD cannot be listened to.
    pub fn start() -> io::Result<Self> {
        let mut sigchld = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child())?;
        let reaper = Self { shared: Arc::default(), is_guest: false };
        let shared = Arc::clone(&reaper.shared);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = sigchld.recv() => {}
                    () = shared.sweep.notified() => {}
                }
                sweep(&shared.children());
            }
        });
        Ok(reaper)
    }

    /// Returns a reaper for a process that is no subreaper, below a parent that is one. Only known
    /// children are reaped: other code of the process may wait for other children.
    #[must_use]
    pub fn guest() -> Self {
        Self { shared: Arc::default(), is_guest: true }
    }

    /// Spawns `command` and watches the child.
    ///
    /// # Errors
    /// The error of [`Command::spawn`] or `pidfd_open`. No process is left then: an unwatched child
    /// is killed.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.spawn_opened(command, open)
    }

    fn spawn_opened(&self, command: &mut Command, open: impl Fn(Pid) -> io::Result<OwnedFd>) -> io::Result<Child> {
        descriptors::restore_in(command);
        let adoption = self.adoption();
        let mut spawned = command.spawn()?;
        let pid = i32::try_from(spawned.id()).map_err(io::Error::other)?;
        adoption.adopt_opened(pid, open).inspect_err(|error| {
            tracing::error!(pid, %error, "a new process cannot be watched, and is killed");
            // The pid is still the child's: a sweep waits for this adoption.
            match spawned.kill() {
                Ok(()) => wait(&mut spawned),
                Err(error) => tracing::error!(pid, %error, "it cannot be killed either"),
            }
        })
    }

    /// Spawns `command` as a child of the subreaper that adopts orphans, and watches the child. The
    /// child may outlive this process.
    ///
    /// # Errors
    /// The errors of [`Reaper::spawn`].
    pub fn spawn_lasting(&self, command: &mut Command) -> io::Result<Child> {
        if !self.is_guest {
            return self.spawn(command);
        }
        descriptors::restore_in(command);
        let (mut pid, tell_pid) = io::pipe()?;
        sys::orphan(command, tell_pid.into());
        let mut between = command.spawn()?;
        wait(&mut between);
        let mut bytes = [0; 4];
        pid.read_exact(&mut bytes)?;
        self.adoption().adopt(i32::from_ne_bytes(bytes))
    }

    /// Returns the pid of the future parent of orphans: this process or the parent.
    #[must_use]
    pub fn parent_of_orphans(&self) -> HostPid {
        let parent = rustix::process::getppid().filter(|_| self.is_guest);
        parent.map_or_else(HostPid::own, HostPid::from)
    }

    /// Opens an adoption: until the drop, no unknown child is reaped.
    #[must_use]
    pub fn adoption(&self) -> Adoption {
        self.shared.children().adoptions += 1;
        Adoption { reaper: self.clone() }
    }
}

#[expect(clippy::disallowed_methods, reason = "the child ends at once, and nobody else knows it")]
fn wait(child: &mut std::process::Child) {
    let _ = child.wait();
}

/// Guard that keeps unknown children as zombies for adoption, instead of reaping them.
#[derive(Debug)]
pub struct Adoption {
    reaper: Reaper,
}

impl Adoption {
    /// Returns whether the child `pid` is watched already.
    #[must_use]
    pub fn knows(&self, pid: i32) -> bool {
        self.reaper.shared.children().known.contains(&pid)
    }

    /// Returns the pid of the future parent of orphans.
    #[must_use]
    pub fn parent_of_orphans(&self) -> HostPid {
        self.reaper.parent_of_orphans()
    }

    /// Watches the child `pid`, even a dead one.
    ///
    /// # Errors
    /// Fails if there is no such process: none ever existed, or a reaping came before this
    /// adoption.
    pub fn adopt(&self, pid: i32) -> io::Result<Child> {
        self.adopt_opened(pid, open)
    }

    fn adopt_opened(&self, pid: i32, open: impl Fn(Pid) -> io::Result<OwnedFd>) -> io::Result<Child> {
        let process = HostPid::try_from(pid)?;
        let pidfd = open(process.as_pid())?;
        self.reaper.shared.children().known.insert(pid);
        let pidfd = Arc::new(pidfd);
        let (exited, exit) = watch::channel(None);
        let (shared, is_guest) = (Arc::clone(&self.reaper.shared), self.reaper.is_guest);
        let watcher = Watcher { shared, is_guest, pid, pidfd: Arc::clone(&pidfd), exited };
        tokio::spawn(watcher.run());
        Ok(Child { process, pidfd, exit })
    }
}

fn open(pid: Pid) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

impl Drop for Adoption {
    fn drop(&mut self) {
        self.reaper.shared.children().adoptions -= 1;
        self.reaper.shared.sweep.notify_one();
    }
}

/// A watched child. Clones refer to the same process, reaped even after the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Child {
    process: HostPid,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// Returns the pid in this process's pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.raw()
    }

    /// Returns the pid as a [`HostPid`].
    #[must_use]
    pub fn process(&self) -> HostPid {
        self.process
    }

    /// Returns the result of the child's end, or `None` while the child runs.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the child's end. Any number of callers get the same answer, at any time.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let seen = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The watcher goes away without an answer only at the runtime's shutdown.
        seen.unwrap_or(Exit { code: UNKNOWN_EXIT_CODE, at: SystemTime::now() })
    }

    /// Sends the child a signal, by pidfd: never to a later process with the same pid.
    ///
    /// # Errors
    /// `ESRCH` if the child has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, signal)?)
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

struct Watcher {
    shared: Arc<Shared>,
    is_guest: bool,
    pid: i32,
    pidfd: Arc<OwnedFd>,
    exited: watch::Sender<Option<Exit>>,
}

impl Watcher {
    async fn run(self) {
        match sys::pollable(Arc::clone(&self.pidfd)) {
            Ok(readable) => {
                if let Err(error) = readable.readable().await {
                    tracing::error!(pid = self.pid, %error, "cannot wait for a pidfd");
                }
            }
            Err(error) => tracing::error!(pid = self.pid, %error, "cannot watch a pidfd"),
        }
        let mut pause = SHORTEST_PAUSE;
        let exit = loop {
            match self.reap() {
                Some(exit) => break exit,
                None => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        self.exited.send_replace(Some(exit));
        // Children behind this one in the order of waitid(P_ALL) are visible now.
        self.shared.sweep.notify_one();
    }

    /// Reaps the child, and forgets the pid in the same step under the lock: after the reaping the
    /// number may come back as another child, which must not be forgotten instead.
    ///
    /// Returns `None` while a tracer holds the child: the pidfd shows the end, but the parent
    /// cannot wait before the tracer has. CRIU kills the processes of a dump while tracing.
    fn reap(&self) -> Option<Exit> {
        let mut children = self.shared.children();
        let status = loop {
            match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        if matches!(status, Ok(WaitStatus::StillAlive)) {
            return None;
        }
        children.known.remove(&self.pid);
        let code = match status {
            Ok(WaitStatus::Exited(_, code)) => u32::from(code.to_ne_bytes()[0]),
            Ok(WaitStatus::Signaled(_, signal, _)) => 128 + signal as u32,
            Ok(status) => {
                tracing::error!(pid = self.pid, ?status, "a child ended in a way that no process ends");
                UNKNOWN_EXIT_CODE
            }
            // A child of this process's parent: the parent reaps it.
            Err(Errno::ECHILD) if self.is_guest => exit_code_of_zombie(self.pid).unwrap_or(UNKNOWN_EXIT_CODE),
            Err(error) => {
                tracing::error!(pid = self.pid, %error, "cannot reap a child");
                UNKNOWN_EXIT_CODE
            }
        };
        Some(Exit { code, at: SystemTime::now() })
    }
}

/// Returns the exit code of an ended process not yet reaped by its parent (proc(5), `exit_code`).
fn exit_code_of_zombie(pid: i32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let status: u32 = fields.last().filter(|_| fields.first() == Some(&"Z"))?.parse().ok()?;
    Some(if status & 0x7f == 0 { (status >> 8) & 0xff } else { 128 + (status & 0x7f) })
}

/// Reaps unknown zombies: orphans given to this subreaper by the kernel.
fn sweep(children: &Children) {
    if children.adoptions > 0 {
        return;
    }
    loop {
        let peek = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT);
        let pid = match peek {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
            Err(Errno::EINTR) => continue,
            // No child has ended, or there is no child at all.
            Ok(_) | Err(_) => return,
        };
        if children.known.contains(&pid.as_raw()) {
            // The child's watcher reaps it and sweeps again.
            return;
        }
        if let Err(error) = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            tracing::debug!(pid = pid.as_raw(), %error, "cannot reap an orphan");
            return;
        }
    }
}

#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;
