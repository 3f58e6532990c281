//! The shim's side: a session is started, listened to, cancelled, and replaced when it dies or is late.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use checkpoint::Draft;
use command_fds::{CommandFdExt, FdMapping};
use phase::Phase;
use reaper::{Adoption, Child, Reaper};
use role::Failure;
use runtime::ProcessIo;
use rustix::process::Signal;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::{Failed, Lost};
use crate::limits;
use crate::order::{CheckpointOrder, Instruction, Order, Report, RestoreOrder, UndoOrder};
use crate::process::SESSION;
use crate::sys;

/// Sessions in a row that may die over the same undoing. More than that are killed on purpose.
const MOST_SUCCESSORS: u32 = 5;

/// Cancels one operation. Clones cancel the same one.
#[derive(Clone, Debug)]
pub struct Stop {
    reason: Arc<watch::Sender<Option<String>>>,
}

impl Default for Stop {
    fn default() -> Self {
        Self { reason: Arc::new(watch::Sender::new(None)) }
    }
}

impl Stop {
    /// Asks the operation to give up and to undo what it has done. The first reason counts.
    pub fn stop(&self, reason: &str) {
        self.reason.send_if_modified(|current| {
            let is_first = current.is_none();
            current.get_or_insert_with(|| reason.to_owned());
            is_first
        });
    }

    /// Returns whether the operation is to give up.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.reason.borrow().is_some()
    }

    /// Waits until the operation is to give up, and returns the reason.
    pub async fn stopped(&self) -> String {
        let mut reason = self.reason.subscribe();
        let seen = reason.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        // The sender lives as long as this value.
        seen.unwrap_or_default()
    }

    /// Returns a guard that stops the operation when it is dropped, with this reason.
    #[must_use]
    pub fn on_drop(&self, reason: &'static str) -> StopGuard {
        StopGuard { stop: self.clone(), reason }
    }
}

/// Stops an operation when it is dropped: kept by the handler of a request, which lives as long as its client waits.
#[derive(Debug)]
pub struct StopGuard {
    stop: Stop,
    reason: &'static str,
}

impl Drop for StopGuard {
    fn drop(&mut self) {
        self.stop.stop(self.reason);
    }
}

/// Conducts checkpoints and restores. Tests of the shim put a fake in.
#[async_trait]
pub trait Conductor: Send + Sync {
    /// Takes a checkpoint.
    ///
    /// # Errors
    /// The container is as before then, but for what [`Failed::owed`] says.
    async fn checkpoint(&self, order: CheckpointOrder, stop: Stop) -> Result<(), Failed>;

    /// Restores the processes of a container, which do not run yet, or have just begun to.
    ///
    /// # Errors
    /// Nothing is left of the container then.
    async fn restore(&self, order: RestoreOrder, io: ProcessIo, stop: Stop) -> Result<Box<dyn Restored>, Failed>;
}

/// A container whose processes are restored.
#[async_trait]
pub trait Restored: Send {
    /// Init, a child of this process.
    fn init(&self) -> &Child;

    /// Gives the processes their memory and GPU state and lets them run.
    ///
    /// # Errors
    /// Nothing is left of the container then.
    async fn go_on(self: Box<Self>) -> Result<(), Failed>;

    /// Removes the container: its streams cannot be connected.
    async fn abandon(self: Box<Self>, reason: &str);
}

/// Outcome of the sessions that took the place of a dead one.
enum Succession {
    /// The checkpoint is whole, and the container as ordered.
    Stands,
    /// Nothing is left of the checkpoint, and nothing is owed.
    Undone,
    /// The container is not as it was: what it lacks.
    Owes(String),
}

/// Sessions in processes of this binary.
#[derive(Clone, Debug)]
pub struct Sessions {
    reaper: Reaper,
    program: PathBuf,
    limit: fn(Phase, Duration) -> Duration,
}

impl Sessions {
    /// Returns a conductor whose sessions run this binary. `main` has to run [`crate::session_main`] when the first argument
    /// names [`SESSION`].
    #[must_use]
    pub fn new(reaper: Reaper) -> Self {
        Self { reaper, program: PathBuf::from("/proc/self/exe"), limit: limits::of }
    }

    /// Sessions of another program, with other limits.
    #[cfg(test)]
    pub(crate) fn of(reaper: Reaper, program: PathBuf, limit: fn(Phase, Duration) -> Duration) -> Self {
        Self { reaper, program, limit }
    }

    /// Undoes what a dead session has left of a checkpoint, or finishes it.
    async fn succeed(&self, order: &CheckpointOrder) -> Succession {
        let undo = Order::Undo(Box::new(UndoOrder { checkpoint: order.clone() }));
        let mut lost = String::new();
        for _ in 0..MOST_SUCCESSORS {
            let mut session = match self.start(&undo, None, Phase::Release, Duration::ZERO) {
                Ok(session) => session,
                Err(failure) => return Succession::Owes(phase::chain(&failure)),
            };
            match session.outcome(&Stop::default()).await {
                Ok(Report::Done) => return Succession::Undone,
                Ok(Report::Stands) => return Succession::Stands,
                Ok(Report::Failed(failed)) => {
                    let Some(owed) = failed.owed else {
                        let container = &order.subject.id;
                        tracing::error!(
                            container,
                            "cannot finish the checkpoint of a dead session: {}",
                            phase::chain(&failed.cause)
                        );
                        return Succession::Undone;
                    };
                    session.pay(order.clone());
                    return Succession::Owes(owed);
                }
                Ok(_) => {}
                Err(error) => lost = error.to_string(),
            }
        }
        Succession::Owes(format!(
            "{MOST_SUCCESSORS} sessions that were to undo it died as well, the last one so: {lost}"
        ))
    }

    fn start(
        &self,
        order: &Order,
        streams: Option<[OwnedFd; 3]>,
        first: Phase,
        patience: Duration,
    ) -> Result<Session, Failure> {
        let started = spawn(&self.reaper, &self.program, order, streams);
        let (process, socket) = started.map_err(|error| Failure::of(&error).within("cannot start a session"))?;
        let order = line(order).map_err(|error| Failure::of(&error).within("cannot word the order of a session"))?;
        Ok(Session {
            sessions: self.clone(),
            process,
            socket: BufReader::new(socket),
            order,
            phase: first,
            since: Instant::now(),
            patience,
            cancelled: None,
        })
    }
}

fn failed(phase: Phase, cause: Failure) -> Failed {
    Failed { phase, cause, owed: None }
}

#[async_trait]
impl Conductor for Sessions {
    async fn checkpoint(&self, order: CheckpointOrder, stop: Stop) -> Result<(), Failed> {
        let patience = order.options.patience;
        let folder = &order.options.folder;
        if let Err(error) = Draft::make_folder(folder) {
            let cause = Failure::of(&error).within(format!("cannot make the folder {}", folder.display()));
            return Err(failed(Phase::Freeze, cause));
        }
        let line = Order::Checkpoint(Box::new(order.clone()));
        let session = self.start(&line, None, Phase::Freeze, patience);
        let mut session = session.map_err(|cause| failed(Phase::Freeze, cause))?;
        match session.outcome(&stop).await {
            Ok(Report::Failed(failed)) => {
                if failed.owed.is_some() {
                    session.pay(order);
                }
                Err(*failed)
            }
            Ok(_) => Ok(()),
            Err(lost) => {
                let phase = session.phase;
                tracing::error!(container = order.subject.id, "{lost}; a successor undoes what it has done");
                let owed = match self.succeed(&order).await {
                    Succession::Stands => return Ok(()),
                    Succession::Undone => None,
                    Succession::Owes(owed) => Some(owed),
                };
                Err(Failed { phase, cause: Failure::of(&lost), owed })
            }
        }
    }

    async fn restore(&self, order: RestoreOrder, io: ProcessIo, stop: Stop) -> Result<Box<dyn Restored>, Failed> {
        let streams = match io {
            ProcessIo::Fds { stdin, stdout, stderr } => Some([stdin, stdout, stderr]),
            ProcessIo::Terminal { .. } => None,
        };
        // Before anything can become this process's child: init stays a zombie until it is adopted, should it die.
        let adoption = self.reaper.adoption();
        let line = Order::Restore(Box::new(order.clone()));
        let session = self.start(&line, streams, Phase::Inspect, Duration::ZERO);
        let mut session = session.map_err(|cause| failed(Phase::Inspect, cause))?;
        match session.outcome(&stop).await {
            Ok(Report::Restored { pid }) => match adoption.adopt(pid.raw()) {
                Ok(init) => Ok(Box::new(RestoredBySession { session, order, init, stop, _adoption: adoption })),
                Err(error) => {
                    let phase = session.phase;
                    session.cancel("init cannot be adopted").await;
                    session.end().await;
                    Err(failed(phase, Failure::of(&error).within(format!("cannot adopt its init, process {pid}"))))
                }
            },
            Ok(Report::Failed(failed)) => {
                session.end().await;
                Err(*failed)
            }
            Ok(_) => {
                Err(failed(session.phase, Failure::new("its session says that all is done, and names no process")))
            }
            Err(lost) => {
                let phase = session.phase;
                remove(&self.reaper, &order, None).await;
                Err(failed(phase, Failure::of(&lost)))
            }
        }
    }
}

/// Removes a container that a dead session was restoring.
async fn remove(reaper: &Reaper, order: &RestoreOrder, init: Option<&Child>) {
    let subject = &order.subject;
    if let Err(error) = subject.runtime.runtime(reaper).delete(&subject.id).await {
        tracing::error!(container = subject.id, "its restore may have left something: {}", phase::chain(&error));
    }
    if let Some(init) = init {
        // It may have ended by itself.
        let _ = init.signal(Signal::KILL);
    }
}

struct RestoredBySession {
    session: Session,
    order: RestoreOrder,
    init: Child,
    stop: Stop,
    _adoption: Adoption,
}

#[async_trait]
impl Restored for RestoredBySession {
    fn init(&self) -> &Child {
        &self.init
    }

    async fn go_on(mut self: Box<Self>) -> Result<(), Failed> {
        self.session.say(&Instruction::GoOn).await;
        match self.session.outcome(&self.stop).await {
            Ok(Report::Done) => Ok(()),
            Ok(Report::Failed(failed)) => {
                self.session.end().await;
                Err(*failed)
            }
            Ok(_) => Err(failed(self.session.phase, Failure::new("its session speaks out of turn"))),
            Err(lost) => {
                remove(&self.session.sessions.reaper, &self.order, Some(&self.init)).await;
                Err(failed(self.session.phase, Failure::of(&lost)))
            }
        }
    }

    async fn abandon(mut self: Box<Self>, reason: &str) {
        self.session.cancel(reason).await;
        let ended = self.session.outcome(&self.stop).await;
        self.session.end().await;
        if ended.is_err() {
            remove(&self.session.sessions.reaper, &self.order, Some(&self.init)).await;
        }
    }
}

/// One process.
struct Session {
    sessions: Sessions,
    process: Child,
    socket: BufReader<UnixStream>,
    /// The order, until it is sent.
    order: Vec<u8>,
    phase: Phase,
    /// When the phase began.
    since: Instant,
    /// Time for GPU work to end.
    patience: Duration,
    /// Why and when the operation was cancelled.
    cancelled: Option<(String, Instant)>,
}

impl Session {
    /// Waits for a report that is no phase. Phases are noted, a stop is passed on, and a session that is late is killed.
    async fn outcome(&mut self, stop: &Stop) -> Result<Report, Lost> {
        let order = std::mem::take(&mut self.order);
        // A session that is dead already is noticed below.
        let _ = self.socket.get_mut().write_all(&order).await;
        let mut text = Vec::new();
        loop {
            let deadline = self.deadline();
            let is_cancelled = self.cancelled.is_some();
            tokio::select! {
                biased;
                // A line that is cut short by another branch stays in `text`, and is read on.
                read = self.socket.read_until(b'\n', &mut text) => {
                    if !matches!(read, Ok(length) if length > 0) {
                        return Err(self.died().await);
                    }
                    match serde_json::from_slice(&text) {
                        Ok(Report::Began(phase)) => (self.phase, self.since) = (phase, Instant::now()),
                        Ok(report) => return Ok(report),
                        Err(error) => return Err(self.killed(Lost::Died { how: format!("it speaks nonsense: {error}") }).await),
                    }
                    text.clear();
                }
                reason = stop.stopped(), if !is_cancelled => self.cancel(&reason).await,
                () = tokio::time::sleep_until(deadline) => {
                    let lost = self.late();
                    return Err(self.killed(lost).await);
                }
            }
        }
    }

    fn deadline(&self) -> Instant {
        let of_phase = self.since + (self.sessions.limit)(self.phase, self.patience);
        match &self.cancelled {
            Some((_, at)) => of_phase.min(*at + limits::CANCELLED),
            None => of_phase,
        }
    }

    fn late(&self) -> Lost {
        match &self.cancelled {
            Some((reason, at)) if at.elapsed() >= limits::CANCELLED => {
                Lost::Deaf { reason: reason.clone(), limit: limits::CANCELLED }
            }
            _ => Lost::Late { limit: (self.sessions.limit)(self.phase, self.patience) },
        }
    }

    async fn cancel(&mut self, reason: &str) {
        self.cancelled.get_or_insert_with(|| (reason.to_owned(), Instant::now()));
        self.say(&Instruction::Cancel { reason: reason.to_owned() }).await;
    }

    async fn say(&mut self, instruction: &Instruction) {
        if let Ok(line) = line(instruction) {
            // A session that is dead is noticed by the next read.
            let _ = self.socket.get_mut().write_all(&line).await;
        }
    }

    async fn killed(&mut self, lost: Lost) -> Lost {
        // It may have ended by itself.
        let _ = self.process.signal(Signal::KILL);
        self.process.wait().await;
        lost
    }

    async fn died(&mut self) -> Lost {
        let exit = self.process.wait().await;
        Lost::Died { how: format!("exit code {}", exit.code) }
    }

    /// Waits for the end of a session that has said its last word.
    async fn end(&mut self) {
        self.process.wait().await;
    }

    /// Watches a session that has failed and goes on to give the container back what it is owed. Successors take the place
    /// of one that dies.
    fn pay(self, order: CheckpointOrder) {
        tokio::spawn(async move {
            let exit = self.process.wait().await;
            if exit.code != 0 {
                tracing::error!(
                    container = order.subject.id,
                    "the session that was to put it back died ({})",
                    exit.code
                );
                // In a box: a successor may have to pay as well.
                if let Succession::Owes(owed) = Box::pin(self.sessions.succeed(&order)).await {
                    tracing::error!(container = order.subject.id, "it is not as it was before its checkpoint: {owed}");
                }
            }
        });
    }
}

fn line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

fn spawn(
    reaper: &Reaper,
    program: &Path,
    order: &Order,
    streams: Option<[OwnedFd; 3]>,
) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = BlockingUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let (log, log_of_session) = role::log_pipe()?;
    let mut command = SESSION.command(program, theirs.into(), log_of_session);
    // For `ps`, and for the clean-up after a dead shim.
    command.arg(order.kind()).arg(&order.subject().bundle);
    let streams = streams.into_iter().flatten();
    let mappings = streams.zip(sys::FIRST..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    command.fd_mappings(mappings.collect()).map_err(io::Error::other)?;
    let process = reaper.spawn(&mut command)?;
    // The command holds this process's copies of the descriptors.
    drop(command);
    tokio::spawn(role::forward(log, order.subject().id.clone()));
    Ok((process, UnixStream::from_std(ours)?))
}
