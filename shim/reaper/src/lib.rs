//! Child processes by pidfd: spawning, adopting and reaping them.
//!
//! A shim is a child subreaper. Its children are the helpers and runtimes it spawns, the container processes that
//! those leave to it, and orphans of the container that nobody in it waits for. Only this crate waits for any of
//! them, so that no two waiters can race for one exit status:
//!
//! ```text
//!  spawn(Command) ──► Child ─── pidfd becomes readable ──► waitid(P_PIDFD) ──► Exit, kept for every Child::wait
//!  adoption().adopt(pid) ──► Child                                              ▲ under one lock, pid forgotten
//!  SIGCHLD ──► sweep: waitid(P_ALL, WNOWAIT) ── a known pid? its own watcher reaps it
//!                                             └─ unknown: reaped and dropped, unless an adoption is open
//! ```
//!
//! A runtime such as runc forks the container's init and leaves it behind as an orphan, which may be dead before its
//! pid is known here. Hence [`Adoption`]: while one is open the sweep reaps nothing, so such a child stays a zombie,
//! pid and status intact, until it is adopted.
//!
//! A session is a child of the shim and no subreaper. What must outlive it is spawned so that the shim becomes its
//! parent ([`Reaper::spawn_lasting`]). Such a process is watched here and reaped by the shim.

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

/// What [`Exit::code`] holds when the kernel could not be asked: the process was never this process's child.
pub const UNKNOWN_EXIT_CODE: u32 = 255;

/// How long a process that has ended is left to its tracer before it is asked for again.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 plus the number of the signal that killed it, as shells and containerd count.
    pub code: u32,
    /// When the exit was seen.
    pub at: SystemTime,
}

/// The one waiter for this process's children. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reaper {
    shared: Arc<Shared>,
    /// Orphans of this process's children become children of its parent.
    is_guest: bool,
}

#[derive(Debug, Default)]
struct Shared {
    children: Mutex<Children>,
    sweep: Notify,
}

#[derive(Debug, Default)]
struct Children {
    /// Pids with a watcher of their own.
    known: HashSet<i32>,
    /// Adoptions that are open now.
    adoptions: usize,
}

impl Shared {
    fn children(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Reaper {
    /// Starts reaping the children of this process. Needs a tokio runtime; it should be the first thing it runs.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
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

    /// Returns a reaper for a process that is no subreaper, and whose parent is one. Only children that it knows are
    /// reaped: other code of the process may wait for children of its own.
    #[must_use]
    pub fn guest() -> Self {
        Self { shared: Arc::default(), is_guest: true }
    }

    /// Spawns `command` and watches it.
    ///
    /// # Errors
    /// What [`Command::spawn`] or `pidfd_open` reports. No process is left then: one that cannot be watched is killed.
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
            // Its pid is its own: the sweep, which reaps it as a child that nobody knows, waits for this adoption.
            if let Err(error) = spawned.kill() {
                tracing::error!(pid, %error, "it cannot be killed either");
            }
        })
    }

    /// Spawns `command` as a child of the subreaper that orphans go to, and watches it. The child may outlive this
    /// process.
    ///
    /// # Errors
    /// As for [`Reaper::spawn`].
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

    /// Returns the pid of the process that orphans become children of: this process or its parent.
    #[must_use]
    pub fn parent_of_orphans(&self) -> HostPid {
        let parent = || rustix::process::getppid().map(HostPid::from);
        self.is_guest.then(parent).flatten().unwrap_or_else(HostPid::own)
    }

    /// Opens an adoption: until it is dropped, no unknown child is reaped.
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

/// While this lives, children that nobody knows stay zombies instead of being reaped, so that they can be adopted.
#[derive(Debug)]
pub struct Adoption {
    reaper: Reaper,
}

impl Adoption {
    /// Whether the child `pid` is watched already.
    #[must_use]
    pub fn knows(&self, pid: i32) -> bool {
        self.reaper.shared.children().known.contains(&pid)
    }

    /// Returns the pid of the process that orphans become children of.
    #[must_use]
    pub fn parent_of_orphans(&self) -> HostPid {
        self.reaper.parent_of_orphans()
    }

    /// Watches the child `pid`, which may be dead already.
    ///
    /// # Errors
    /// When there is no such process: it never was, or it was reaped before this adoption was opened.
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

/// A watched child. Clones refer to the same process; it is reaped whether or not any of them is left.
#[derive(Clone, Debug)]
pub struct Child {
    process: HostPid,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// Its pid in this process's pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.raw()
    }

    /// The same as a type of its own.
    #[must_use]
    pub fn process(&self) -> HostPid {
        self.process
    }

    /// How it ended, or `None` while it runs.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits until it has ended. Any number of callers get the same answer, at any time.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let seen = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The watcher only goes away without an answer when the runtime shuts down.
        seen.unwrap_or(Exit { code: UNKNOWN_EXIT_CODE, at: SystemTime::now() })
    }

    /// Sends it a signal, by pidfd: never to a later process with the same pid.
    ///
    /// # Errors
    /// `ESRCH` when it has ended.
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
        // What hides behind this child in the order of waitid(P_ALL) can be seen now.
        self.shared.sweep.notify_one();
    }

    /// Reaping and forgetting the pid are one step under the lock: once reaped, the number may come back as another
    /// child, which must not be forgotten in its place.
    ///
    /// None while a tracer holds it: the process has ended, its pidfd says so, but its parent cannot wait for it before
    /// the tracer has. CRIU traces what it dumps, and kills it so.
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
            // A child of this process's parent, which reaps it.
            Err(Errno::ECHILD) if self.is_guest => exit_code_of_zombie(self.pid).unwrap_or(UNKNOWN_EXIT_CODE),
            Err(error) => {
                tracing::error!(pid = self.pid, %error, "cannot reap a child");
                UNKNOWN_EXIT_CODE
            }
        };
        Some(Exit { code, at: SystemTime::now() })
    }
}

/// Returns the exit code of a process that has ended and that its parent has not reaped yet (proc(5), `exit_code`).
fn exit_code_of_zombie(pid: i32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let status: u32 = fields.last().filter(|_| fields.first() == Some(&"Z"))?.parse().ok()?;
    Some(if status & 0x7f == 0 { (status >> 8) & 0xff } else { 128 + (status & 0x7f) })
}

/// Reaps the zombies that nobody knows: orphans that the kernel gave to this subreaper.
fn sweep(children: &Children) {
    if children.adoptions > 0 {
        return;
    }
    loop {
        let peek = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT);
        let pid = match peek {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
            Err(Errno::EINTR) => continue,
            // Nothing has ended, or there is no child at all.
            Ok(_) | Err(_) => return,
        };
        if children.known.contains(&pid.as_raw()) {
            // Its watcher reaps it and sweeps again.
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
