//! A container in the shim: one actor that owns its state.
//!
//! ```text
//!            create          start or restore             init ends, execs are done
//!   (none) ─────────► Created ───────────► Running ─────────────────────────────────► Stopped ──► (deleted)
//!                        │                 │     ▲                                       ▲  delete
//!                        │           pause ▼     │ resume                                │
//!                        │                 Paused ───────────────────────────────────────┤
//!                        └── init is killed ─────────────────────────────────────────────┘
//!
//!   exec process: Created (added) ──start──► Running ──► Stopped ──► (deleted)
//! ```
//!
//! A container created from a checkpoint has no process until the start. A checkpoint leaves the
//! state as before, or ends init like any other death.
//!
//! Work that takes time (start, restore, exec, pause, resume, update, checkpoint, delete) is an
//! *operation*. Operations of one container begin in order of arrival, beside the mailbox: `State`,
//! `Kill`, `Wait`, `Pids` and `Stats` are answered at once, whatever runs. An operation's future
//! never touches the state; the completion does, in the actor.
//!
//! Operations run one at a time, except the starts of execs: the start of an exec may hang, on a
//! dead network mount say. Only operations that need the container alone wait for such a start
//! ([`Company`]).
//!
//! Failure paths. A failed operation leaves the state as before. A disconnected client cancels
//! nothing: an operation always runs to its end. Exits are messages to the mailbox. An exit during
//! the start of the same process is published after the start. Clients take init's exit as the last
//! word, so the exits of all execs are published before. When init ends in a shared pid namespace,
//! the shim kills the rest of the cgroup.

mod checkpoint;
mod create;
mod freezer;
mod operations;
mod process;
mod restore;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, pending};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use cgroup::Cgroup;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use reaper::{Child, Exit, Reaper};
use runtime::{Choice, OciRuntime, Operation, Prepare};
use rustix::process::Signal;
use session::{Conductor, NodeStore, Stop};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::Instrument as _;

pub(crate) use self::create::create;
use self::freezer::Freezer;
pub(crate) use self::operations::Target;
pub(crate) use self::process::ExecId;
use self::process::Process;
pub(crate) use self::process::{ProcessRef, Status};
use self::restore::FromCheckpoint;
use crate::error::TaskError;
use crate::events::Events;
use crate::stdio::Owner;
use crate::table::Registration;
use crate::task::timestamp;
use ::checkpoint::{Annotations, DeviceNode, Shm};

/// Context of all containers of one shim.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) namespace: String,
    /// Bundle of the container for which the shim was started.
    pub(crate) bundle: PathBuf,
    /// Folder for logs of failed checkpoints and restores.
    pub(crate) logs: PathBuf,
    pub(crate) store: NodeStore,
    pub(crate) reaper: Reaper,
    pub(crate) events: Events,
    /// Preparation of containers without an annotation about it.
    pub(crate) prepare: Prepare,
    /// Makes the runtime chosen for a container.
    pub(crate) runtime_of: RuntimeOf,
    /// Takes checkpoints and restores from them.
    pub(crate) conductor: Arc<dyn Conductor>,
}

/// Maker of the chosen runtime; tests put in a fake.
pub(crate) type RuntimeOf = Arc<dyn Fn(&Choice, &Reaper) -> Arc<dyn OciRuntime> + Send + Sync>;

type Job = Box<dyn FnOnce(&mut Actor) + Send>;
type Work = Pin<Box<dyn Future<Output = Job> + Send>>;
type Begin = Box<dyn FnOnce(&mut Actor) -> Option<Work> + Send>;

/// A queued operation.
struct Queued {
    operation: Operation,
    begin: Begin,
}

/// Operations allowed to run beside another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Company {
    /// None.
    Alone,
    /// Starts of execs that began before.
    Execs,
    /// The start of an exec: begins while only such starts run, and does not hold up the next
    /// operation.
    Any,
}

impl Company {
    fn of(operation: Operation) -> Self {
        match operation {
            Operation::Exec => Self::Any,
            Operation::Checkpoint | Operation::Restore | Operation::Delete => Self::Alone,
            _ => Self::Execs,
        }
    }
}

/// A handle to a container's actor.
#[derive(Clone)]
pub(crate) struct Container {
    id: String,
    mailbox: mpsc::UnboundedSender<Job>,
}

impl Container {
    fn start(actor: impl FnOnce(mpsc::WeakUnboundedSender<Job>) -> Actor) -> Self {
        let (mailbox, jobs) = mpsc::unbounded_channel();
        let actor = actor(mailbox.downgrade());
        let id = actor.id.clone();
        tokio::spawn(actor.run(jobs));
        Self { id, mailbox }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Runs `job` in the actor, at once.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Actor) -> Result<T, TaskError> + Send + 'static,
    ) -> Result<T, TaskError> {
        self.send(|reply| {
            Box::new(move |actor| {
                let answer = actor.check_exists().and_then(|()| job(actor));
                // The client may have disconnected.
                let _ = reply.send(answer);
            })
        })
        .await
    }

    /// Queues an operation: `begin` checks the state and returns a future, whose result is a
    /// completion.
    pub(crate) async fn operate<T, F, C>(
        &self,
        operation: Operation,
        begin: impl FnOnce(&mut Actor) -> Result<F, TaskError> + Send + 'static,
    ) -> Result<T, TaskError>
    where
        T: Send + 'static,
        F: Future<Output = C> + Send + 'static,
        C: FnOnce(&mut Actor) -> Result<T, TaskError> + Send + 'static,
    {
        self.send(|reply| {
            let begin: Begin = Box::new(move |actor| match actor.check_exists().and_then(|()| begin(actor)) {
                Ok(work) => {
                    let (container, namespace) = (&actor.id, &actor.context.namespace);
                    let span = tracing::debug_span!("operation", %operation, container, namespace);
                    let work = async move {
                        let complete = work.await;
                        Box::new(move |actor: &mut Actor| {
                            let _ = reply.send(complete(actor));
                        }) as Job
                    };
                    Some(Box::pin(work.instrument(span)))
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    None
                }
            });
            Box::new(move |actor| actor.operations.push_back(Queued { operation, begin }))
        })
        .await
    }

    /// Runs an operation at once, whatever else runs. Only for operations without the runtime.
    pub(crate) async fn operate_at_once<T, F, C>(
        &self,
        begin: impl FnOnce(&mut Actor) -> Result<F, TaskError> + Send + 'static,
    ) -> Result<T, TaskError>
    where
        T: Send + 'static,
        F: Future<Output = C> + Send + 'static,
        C: FnOnce(&mut Actor) -> Result<T, TaskError> + Send + 'static,
    {
        let work = self.ask(begin).await?;
        self.ask(work.await).await
    }

    async fn send<T>(&self, job: impl FnOnce(oneshot::Sender<Result<T, TaskError>>) -> Job) -> Result<T, TaskError> {
        let (reply, answer) = oneshot::channel();
        // The actor ends after its container's deletion, or with a bug of ours, and then does not
        // answer.
        let sent = self.mailbox.send(job(reply)).is_ok();
        match answer.await {
            Ok(answer) => answer,
            Err(_) if sent => Err(TaskError::Gone { container: self.id.clone() }),
            Err(_) => Err(TaskError::NoContainer { container: self.id.clone() }),
        }
    }
}

/// Parts of a container's specification for the shim's own use.
struct Config {
    /// Source of /dev/shm, if mounted from outside.
    shm: Option<Shm>,
    annotations: Annotations,
    /// Preparation of each process at its creation.
    prepare: Prepare,
    /// Devices of the container.
    devices: Vec<DeviceNode>,
    pids: PidNamespace,
}

/// Pid namespace of init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PidNamespace {
    /// The container's own namespace: at init's end the kernel kills the other processes in it.
    Own,
    /// The host's, or another container's.
    Shared,
}

/// The container's cgroup, and the events published about it.
struct Accounts {
    cgroup: Cgroup,
    /// Out-of-memory kills already published, or older than the container.
    oom_kills: u64,
}

impl Accounts {
    fn new(cgroup: Cgroup) -> Self {
        Self { oom_kills: cgroup.oom_kills(), cgroup }
    }

    fn has_new_oom_kills(&mut self) -> bool {
        let before = self.oom_kills;
        self.oom_kills = self.cgroup.oom_kills().max(before);
        self.oom_kills > before
    }
}

/// State of one container. Only the actor's own task touches it.
pub(crate) struct Actor {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    context: Context,
    runtime: Arc<dyn OciRuntime>,
    choice: Choice,
    owner: Owner,
    config: Config,
    /// `None` before the start of a container from a checkpoint.
    accounts: Option<Accounts>,
    /// Checkpoint for the restore, if any.
    checkpoint: Option<FromCheckpoint>,
    freezer: Freezer,
    /// Stops the checkpoint or restore under way.
    session: Option<Stop>,
    init: Process,
    execs: BTreeMap<ExecId, Process>,
    mailbox: mpsc::WeakUnboundedSender<Job>,
    operations: VecDeque<Queued>,
    /// `None` once the container is deleted.
    registration: Option<Registration>,
}

impl Actor {
    async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let mut work: Option<Work> = None;
        let mut execs = JoinSet::new();
        while self.registration.is_some() {
            let may_begin = |next: &mut Queued| Company::of(next.operation) != Company::Alone || execs.is_empty();
            if work.is_none()
                && let Some(Queued { operation, begin }) = self.operations.pop_front_if(may_begin)
            {
                match (Company::of(operation), begin(&mut self)) {
                    (Company::Any, Some(start)) => drop(execs.spawn(start)),
                    (_, begun) => work = begun,
                }
                continue;
            }
            let done = async {
                match &mut work {
                    Some(work) => work.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                job = jobs.recv() => match job {
                    Some(job) => job(&mut self),
                    None => return,
                },
                complete = done => {
                    work = None;
                    complete(&mut self);
                }
                Some(started) = execs.join_next() => match started {
                    Ok(complete) => complete(&mut self),
                    Err(bug) => std::panic::resume_unwind(bug.into_panic()),
                }
            }
        }
        // Requests sent before the clients knew of the deletion are answered too.
        jobs.close();
        while let Ok(job) = jobs.try_recv() {
            job(&mut self);
        }
        while let Some(Queued { begin, .. }) = self.operations.pop_front() {
            begin(&mut self);
        }
    }

    /// Fails once the container is deleted, for requests sent before the clients knew.
    fn check_exists(&self) -> Result<(), TaskError> {
        match self.registration {
            Some(_) => Ok(()),
            None => Err(TaskError::NoContainer { container: self.id.clone() }),
        }
    }

    pub(crate) fn process(&self, process: &ProcessRef) -> Result<&Process, TaskError> {
        match process {
            ProcessRef::Init => Ok(&self.init),
            ProcessRef::Exec(exec) => self.execs.get(exec).ok_or_else(|| self.no_exec(exec)),
        }
    }

    fn exec_mut(&mut self, exec: &ExecId) -> Result<&mut Process, TaskError> {
        let missing = self.no_exec(exec);
        self.execs.get_mut(exec).ok_or(missing)
    }

    fn no_exec(&self, exec: &ExecId) -> TaskError {
        TaskError::NoProcess { container: self.id.clone(), exec: exec.as_str().to_owned() }
    }

    /// Returns the refusal of an action in init's current state.
    fn wrong_state(&self, action: &'static str) -> TaskError {
        self.wrong_state_of(action, &ProcessRef::Init, self.init.true_status())
    }

    fn wrong_state_of(&self, action: &'static str, process: &ProcessRef, status: Status) -> TaskError {
        TaskError::WrongState { action, process: process.name(&self.id), status }
    }

    /// Reports the exit of `child` to the mailbox.
    fn watch(&self, process: ProcessRef, child: Child) {
        // Held until the process has ended: the exit is never lost, whoever else drops the
        // container.
        let Some(mailbox) = self.mailbox.upgrade() else { return };
        tokio::spawn(async move {
            let exit = child.wait().await;
            // The deletion may have finished meanwhile, with this exit in the answer.
            let _ = mailbox.send(Box::new(move |actor| {
                if actor.check_exists().is_ok() {
                    actor.ended(&process, exit);
                }
            }));
        });
    }

    /// Reports out-of-memory kills to the mailbox.
    fn watch_oom(&self) {
        let (mailbox, Some(accounts)) = (self.mailbox.clone(), &self.accounts) else { return };
        match accounts.cgroup.watch_oom() {
            Ok(mut watch) => {
                tokio::spawn(async move {
                    while watch.next().await.is_some() {
                        let Some(mailbox) = mailbox.upgrade() else { return };
                        if mailbox.send(Box::new(Self::tell_oom)).is_err() {
                            return;
                        }
                    }
                });
            }
            Err(error) => tracing::warn!(container = self.id, "no out-of-memory events: {}", phase::chain(&error)),
        }
    }

    fn tell_oom(&mut self) {
        if self.accounts.as_mut().is_some_and(Accounts::has_new_oom_kills) {
            self.context.events.publish(TaskOOM { container_id: self.id.clone(), ..TaskOOM::default() });
        }
    }

    fn ended(&mut self, process: &ProcessRef, exit: Exit) {
        match process {
            ProcessRef::Init => {
                // A removed cgroup forgets its counters, and CRI wants the reason before the exit.
                self.tell_oom();
                self.init.ended(exit);
                let accounts = self.accounts.as_ref().filter(|_| self.config.pids == PidNamespace::Shared);
                if let Some(Err(error)) = accounts.map(|accounts| accounts.cgroup.signal_all(Signal::KILL)) {
                    tracing::warn!(container = self.id, "processes may be left: {}", phase::chain(&error));
                }
            }
            ProcessRef::Exec(exec) => {
                if let Some(process) = self.execs.get_mut(exec) {
                    process.ended(exit);
                    let (pid, told) = (process.pid(), process.tell_end());
                    if let Some(exit) = told {
                        self.tell_exit(exec.as_str(), pid, exit);
                    }
                }
            }
        }
        self.settle_init();
    }

    /// Publishes init's exit, once no exec is alive.
    fn settle_init(&mut self) {
        if self.execs.values().any(Process::is_alive) {
            return;
        }
        if let Some(exit) = self.init.tell_end() {
            self.tell_exit(&self.id, self.init.pid(), exit);
        }
    }

    fn tell_exit(&self, process: &str, pid: u32, exit: Exit) {
        self.context.events.publish(TaskExit {
            container_id: self.id.clone(),
            id: process.to_owned(),
            pid,
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskExit::default()
        });
    }
}
