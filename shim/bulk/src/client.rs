//! The shim's side of a worker.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use phase::Timeline;
use reaper::{Child, Reaper};
use rustix::process::Signal;
use snapshot::Pointer;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::protocol::{Failure, Node, Order, Publish, Published, Report, Restored, Saved, Source, Staging};
use crate::worker::WORKER;

/// Why memory could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// The worker says why.
    #[error(transparent)]
    Worker(#[from] Failure),
    /// It could not be started.
    #[error("cannot start a worker for its memory")]
    Spawn(#[source] io::Error),
    /// It died: the kernel's log says whether for lack of memory.
    #[error("the worker for its memory died")]
    Died,
}

/// How much of what is to be filled is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The processes that were to come first have all their memory.
    First,
    /// All have.
    All,
}

/// A process that moves the memory of one container, in one direction. It ends when this is dropped, and what it has not
/// finished is gone then.
#[derive(Debug)]
pub struct Worker {
    process: Child,
    socket: BufReader<UnixStream>,
}

impl Worker {
    /// Starts a worker. This binary has to run [`crate::worker_main`] when its first argument is [`WORKER`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(reaper: &Reaper) -> Result<Self, BulkError> {
        let (process, socket) = spawn(reaper).map_err(BulkError::Spawn)?;
        Ok(Self { process, socket: BufReader::new(socket) })
    }

    /// Begins a snapshot in the store at this path. When it is published, snapshots that were not used for the longest time go
    /// until the store has at most `quota` bytes.
    ///
    /// # Errors
    /// When the store cannot be used.
    pub async fn begin(&mut self, store: &Path, quota: Option<u64>, timeline: &Timeline) -> Result<(), BulkError> {
        match self.order(&Order::Begin { store: store.to_owned(), quota }, timeline).await? {
            Report::Begun(begun) => Ok(begun?),
            _ => Err(BulkError::Died),
        }
    }

    /// Saves memory of processes that stand still, and says which parts of which files hold it. The files do not change
    /// any more; they are gone with the worker unless they are published.
    ///
    /// # Errors
    /// When memory cannot be read, or the store has no room for it.
    pub async fn save(&mut self, staging: Vec<Staging>, timeline: &Timeline) -> Result<Saved, BulkError> {
        match self.order(&Order::Save { staging }, timeline).await? {
            Report::Saved(saved) => Ok(saved?),
            _ => Err(BulkError::Died),
        }
    }

    /// Moves what is big out of the images in a folder, which are whole, and makes them and what was saved a snapshot. None if
    /// there is nothing big: then images and store are as they were.
    ///
    /// # Errors
    /// When it cannot be done. The images are of no use then.
    pub async fn publish(&mut self, publish: Publish, timeline: &Timeline) -> Result<Option<Published>, BulkError> {
        match self.order(&Order::Publish(Box::new(publish)), timeline).await? {
            Report::Published(published) => Ok(published?),
            _ => Err(BulkError::Died),
        }
    }

    /// Removes a snapshot that was published for a checkpoint that came to nothing.
    ///
    /// # Errors
    /// When it stays.
    pub async fn withdraw(&mut self, pointer: Pointer, timeline: &Timeline) -> Result<(), BulkError> {
        match self.order(&Order::Withdraw(pointer), timeline).await? {
            Report::Withdrawn(withdrawn) => Ok(withdrawn?),
            _ => Err(BulkError::Died),
        }
    }

    /// Finds the snapshot that images in a folder belong to, pulls it if it is not there, and begins to read it. Says what of
    /// its staging memory the caller may fill by itself, processes by their pids in their own namespaces.
    ///
    /// # Errors
    /// When there is none, it cannot be pulled, or it is damaged.
    pub async fn open(
        &mut self,
        source: Source,
        images: PathBuf,
        node: Node,
        timeline: &Timeline,
    ) -> Result<Option<Saved>, BulkError> {
        match self.order(&Order::Open { source, images, node }, timeline).await? {
            Report::Opened(opened) => Ok(opened?),
            _ => Err(BulkError::Died),
        }
    }

    /// Puts its memory into processes that stand still, in this order. Ends when all is done, or when those that come `first`
    /// have theirs and much of the others' is missing. With `staging`, all that there is; else without what [`Self::open`] said.
    ///
    /// # Errors
    /// When the snapshot is damaged, or memory cannot be written. The processes are of no use then.
    pub async fn fill(
        &mut self,
        processes: Vec<Restored>,
        first: usize,
        staging: bool,
        timeline: &Timeline,
    ) -> Result<Filled, BulkError> {
        match self.order(&Order::Fill { processes, first, staging }, timeline).await? {
            Report::FilledFirst => Ok(Filled::First),
            Report::Filled(filled) => Ok(filled.map(|()| Filled::All)?),
            _ => Err(BulkError::Died),
        }
    }

    /// Waits until the rest is filled.
    ///
    /// # Errors
    /// As for [`Self::fill`].
    pub async fn fill_rest(&mut self, timeline: &Timeline) -> Result<(), BulkError> {
        match self.report(timeline).await.ok_or(BulkError::Died)? {
            Report::Filled(filled) => Ok(filled?),
            _ => Err(BulkError::Died),
        }
    }

    async fn order(&mut self, order: &Order, timeline: &Timeline) -> Result<Report, BulkError> {
        self.converse(order, timeline).await.ok_or(BulkError::Died)
    }

    /// The last report; None when the worker has died.
    async fn converse(&mut self, order: &Order, timeline: &Timeline) -> Option<Report> {
        let mut line = serde_json::to_vec(order).ok()?;
        line.push(b'\n');
        self.socket.get_mut().write_all(&line).await.ok()?;
        self.report(timeline).await
    }

    async fn report(&mut self, timeline: &Timeline) -> Option<Report> {
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

impl Drop for Worker {
    fn drop(&mut self) {
        // One that has ended needs no signal. What it leaves in the store, the next to use the store removes.
        let _ = self.process.signal(Signal::TERM);
    }
}

fn spawn(reaper: &Reaper) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = BlockingUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new("/proc/self/exe");
    // A group of its own: what is sent to the shim's must not reach it.
    command.arg(WORKER).process_group(0);
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let process = reaper.spawn(&mut command)?;
    drop(command);
    Ok((process, UnixStream::from_std(ours)?))
}
