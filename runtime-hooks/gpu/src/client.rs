//! The shim's side of a guardian.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use phase::Timeline;
use reaper::{Child, Reaper};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::guardian::GUARDIAN;
use crate::protocol::{Order, Report};
use crate::session::{Resumed, SessionError, Suspended};
use crate::swap::{Swap, Swapped};
use cuda::Inventory;
use cuda::Pair;

/// Guardians that die are replaced this many times in a row; then something kills them on purpose.
const MOST_GUARDIANS: u32 = 5;

/// Why the GPU state of a container could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The guardian says why.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The guardian could not be started or spoken to.
    #[error("cannot start a guardian for the CUDA processes")]
    Spawn(#[source] io::Error),
    /// It died, and what it had done was undone by another.
    #[error("the guardian of the CUDA processes died, and what it had done was undone")]
    Died,
    /// It died while the container's memory was being put back, and the container with it.
    #[error("the guardian of the CUDA processes died, and ended the container, whose memory was not in place yet")]
    DiedUnfilled,
    /// So did those that were to undo it.
    #[error("the guardian of the CUDA processes died, and so did {MOST_GUARDIANS} that were to undo what it had done")]
    AllDied,
}

/// A guardian of one container's CUDA processes.
#[derive(Debug)]
pub struct Guardian {
    reaper: Reaper,
    process: Child,
    socket: BufReader<UnixStream>,
}

impl Guardian {
    /// Starts a guardian, which loads the driver already. This binary has to run [`crate::guardian_main`] when its first
    /// argument is [`GUARDIAN`], and [`cuda::caller_main`] likewise.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(reaper: &Reaper) -> Result<Self, CudaError> {
        let (process, socket) = spawn(reaper).map_err(CudaError::Spawn)?;
        Ok(Self { reaper: reaper.clone(), process, socket: BufReader::new(socket) })
    }

    /// What this node has of GPUs.
    ///
    /// # Errors
    /// When there is no driver, or it does not answer.
    pub async fn inventory(&mut self, timeline: &Timeline) -> Result<Inventory, CudaError> {
        match self.order(&Order::Inventory, timeline).await {
            Some(Report::Inventory(inventory)) => Ok(inventory?),
            Some(_) | None => {
                self.replace()?;
                Err(CudaError::Died)
            }
        }
    }

    /// Moves the GPU state of the container that the process `pid` belongs to to its memory and leaves it frozen; on failure
    /// it is as before, and frozen if it was `paused`. See [`SessionError`] for what can be in the way. GPU work may go on for `patience`; then the driver may take `limit`.
    ///
    /// # Errors
    /// When the state cannot be moved.
    pub async fn suspend(
        &mut self,
        pid: i32,
        paused: bool,
        patience: Duration,
        limit: Duration,
        timeline: &Timeline,
    ) -> Result<Suspended, CudaError> {
        match self.order(&Order::Suspend { pid, paused, patience, limit }, timeline).await {
            Some(Report::Suspended(suspended)) => Ok(suspended?),
            Some(_) | None => Err(self.undo(pid, paused, limit, timeline).await),
        }
    }

    /// What a guardian that died had done is undone by another; the error says whether it was.
    async fn undo(&mut self, pid: i32, paused: bool, limit: Duration, timeline: &Timeline) -> CudaError {
        let failed_at = timeline.current();
        let undone = match self.replace() {
            Ok(()) => self.resume(pid, paused, Vec::new(), limit, timeline).await.map(drop),
            Err(error) => Err(error),
        };
        timeline.enter(failed_at);
        undone.err().unwrap_or(CudaError::Died)
    }

    /// Puts private mappings of files in the place of memory of a container that is suspended, without a change of what its
    /// processes find there. It may take `limit` for each process. While it is suspended no process of the container runs, in
    /// this neither.
    ///
    /// # Errors
    /// When that was not done, or not wholly. The container is suspended all the same and has its data, in memory or in
    /// files: it can be saved as it is, or resumed. With [`CudaError::Died`] it was resumed already, and left frozen if it
    /// was `paused`.
    pub async fn swap(
        &mut self,
        pid: i32,
        paused: bool,
        swap: Swap,
        limit: Duration,
        timeline: &Timeline,
    ) -> Result<Swapped, CudaError> {
        match self.order(&Order::Swap { pid, paused, swap, limit }, timeline).await {
            Some(Report::Swapped(swapped)) => Ok(swapped?),
            Some(_) | None => Err(self.undo(pid, paused, limit, timeline).await),
        }
    }

    /// Gives the container its GPU state back and leaves it frozen or running. A guardian that dies over it is replaced.
    ///
    /// # Errors
    /// When the state cannot be moved.
    pub async fn resume(
        &mut self,
        pid: i32,
        frozen: bool,
        pairs: Vec<Pair>,
        limit: Duration,
        timeline: &Timeline,
    ) -> Result<Resumed, CudaError> {
        let order = Order::Resume { pid, frozen, pairs, limit };
        for _ in 0..MOST_GUARDIANS {
            if let Some(Report::Resumed(resumed)) = self.order(&order, timeline).await {
                return Ok(resumed?);
            }
            self.replace()?;
        }
        Err(CudaError::AllDied)
    }

    /// As [`Self::resume`], which leaves it running, for a frozen container of which the CUDA processes have their memory, but for
    /// this staging memory, which is empty, and the others get it meanwhile. Nothing of it runs on before `filled` has ended,
    /// with true if that is done. The files of the staging memory must be packs of the crate `memory`.
    ///
    /// # Errors
    /// When the state cannot be moved, the guardian dies, or the memory has not come. The container is frozen or dead then, and
    /// of no use.
    pub async fn resume_unfilled(
        &mut self,
        pid: i32,
        staging: Swap,
        pairs: Vec<Pair>,
        limit: Duration,
        filled: impl Future<Output = bool>,
        timeline: &Timeline,
    ) -> Result<Resumed, CudaError> {
        let order = Order::ResumeUnfilled { pid, staging, pairs, limit };
        match self.order(&order, timeline).await.ok_or(CudaError::DiedUnfilled)? {
            Report::Restored => {}
            Report::Resumed(resumed) => return Ok(resumed?),
            _ => return Err(CudaError::DiedUnfilled),
        }
        if !filled.await {
            return Err(SessionError::Unfilled.into());
        }
        match self.order(&Order::Run, timeline).await {
            Some(Report::Resumed(resumed)) => Ok(resumed?),
            Some(_) | None => Err(CudaError::DiedUnfilled),
        }
    }

    /// Ends a guardian whose processes are gone for good.
    pub fn dismiss(self) {
        // One that is dead already needs no signal.
        let _ = self.process.signal(Signal::KILL);
    }

    fn replace(&mut self) -> Result<(), CudaError> {
        tracing::warn!(guardian = self.process.pid(), "a guardian of CUDA processes died; another takes its place");
        // One that hung up and lives would be in the way.
        let _ = self.process.signal(Signal::KILL);
        let (process, socket) = spawn(&self.reaper).map_err(CudaError::Spawn)?;
        self.process = process;
        self.socket = BufReader::new(socket);
        Ok(())
    }

    /// The last report; None when the guardian has died.
    async fn order(&mut self, order: &Order, timeline: &Timeline) -> Option<Report> {
        let mut line = serde_json::to_vec(order).ok()?;
        line.push(b'\n');
        self.socket.get_mut().write_all(&line).await.ok()?;
        let mut answer = String::new();
        loop {
            answer.clear();
            if self.socket.read_line(&mut answer).await.ok()? == 0 {
                return None;
            }
            match serde_json::from_str(&answer).ok()? {
                Report::Began(phase) => timeline.enter(phase),
                report => return Some(report),
            }
        }
    }
}

fn spawn(reaper: &Reaper) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = BlockingUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new("/proc/self/exe");
    // A group of its own: what is sent to the shim's must not reach it.
    command.arg(GUARDIAN).process_group(0);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let process = reaper.spawn(&mut command)?;
    drop(command);
    Ok((process, UnixStream::from_std(ours)?))
}
