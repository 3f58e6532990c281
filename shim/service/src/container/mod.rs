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
//! A container that is created from a checkpoint has no process until it is started. A checkpoint leaves the state as it
//! is, or ends init like any other death.
//!
//! What takes time (start, restore, exec, pause, resume, update, checkpoint, delete) is an *operation*. Operations of one
//! container begin in the order they came, beside the mailbox: `State`, `Kill`, `Wait`, `Pids` and `Stats` are answered
//! at once whatever runs. An operation's future never touches the state; its completion does, in the actor.
//!
//! Operations run one at a time, but for the starts of execs: an exec may hang in its start, on a dead network mount
//! say, and holds nothing up but what needs the container to itself ([`Company`]).
//!
//! Failure paths. An operation that fails leaves the state as it was. A client that goes away cancels nothing: what
//! was begun is finished. Exits are reports to the mailbox; one that comes while its process is being started waits
//! until the start has been told, and init's waits for those of all exec processes, because clients take init's exit
//! as the last word. When init ends and its pid namespace is not its own, what is left in the cgroup is killed.

mod checkpoint;
mod create;
mod freezer;
mod operations;
mod restore;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::{Future, pending};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use cgroup::Cgroup;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use oci_spec::runtime::Process as ProcessSpec;
use reaper::{Child, Exit, Reaper};
use runtime::{Choice, OciRuntime};
use rustix::process::Signal;
use session::{Conductor, NodeStore, Stop};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

pub(crate) use self::create::create;
use self::freezer::Freezer;
use self::restore::FromCheckpoint;
use crate::error::TaskError;
use crate::events::Events;
use crate::stdio::{Copies, Owner, Stdio};
use crate::table::Registration;
use crate::task::timestamp;
use ::checkpoint::{Annotations, DeviceNode, Shm};

/// What all containers of one shim share.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) namespace: String,
    /// Bundle of the container that the shim was started for.
    pub(crate) bundle: PathBuf,
    /// Where logs of failed checkpoints and restores go.
    pub(crate) logs: PathBuf,
    pub(crate) store: NodeStore,
    pub(crate) reaper: Reaper,
    pub(crate) events: Events,
    /// Makes the runtime that was chosen for a container.
    pub(crate) runtime_of: RuntimeOf,
    /// Takes checkpoints and restores from them.
    pub(crate) conductor: Arc<dyn Conductor>,
}

/// How a choice becomes a runtime; tests put a fake one in.
pub(crate) type RuntimeOf = Arc<dyn Fn(&Choice, &Reaper) -> Arc<dyn OciRuntime> + Send + Sync>;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

type Job = Box<dyn FnOnce(&mut Actor) + Send>;
type Work = Pin<Box<dyn Future<Output = Job> + Send>>;
type Begin = Box<dyn FnOnce(&mut Actor) -> Option<Work> + Send>;

/// Which other operations may run beside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    /// None.
    Alone,
    /// Starts of execs that began before.
    Execs,
    /// The start of an exec: it begins when no other operation but such starts runs, and does not hold up the next.
    Any,
}

struct Operation {
    company: Company,
    begin: Begin,
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
                // The client may have gone away.
                let _ = reply.send(answer);
            })
        })
        .await
    }

    /// Queues an operation: `begin` checks the state and returns what to wait for, whose result is a completion.
    pub(crate) async fn operate<T, F, C>(
        &self,
        company: Company,
        begin: impl FnOnce(&mut Actor) -> Result<F, TaskError> + Send + 'static,
    ) -> Result<T, TaskError>
    where
        T: Send + 'static,
        F: Future<Output = C> + Send + 'static,
        C: FnOnce(&mut Actor) -> Result<T, TaskError> + Send + 'static,
    {
        self.send(|reply| {
            let begin: Begin = Box::new(move |actor| match actor.check_exists().and_then(|()| begin(actor)) {
                Ok(work) => Some(Box::pin(async move {
                    let complete = work.await;
                    Box::new(move |actor: &mut Actor| {
                        let _ = reply.send(complete(actor));
                    }) as Job
                })),
                Err(error) => {
                    let _ = reply.send(Err(error));
                    None
                }
            });
            Box::new(move |actor| actor.operations.push_back(Operation { company, begin }))
        })
        .await
    }

    /// Runs an operation at once, whatever else runs: one that is no business of the runtime's.
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
        // The actor ends when its container has been deleted, or with a bug of ours, and then it has no answer.
        let sent = self.mailbox.send(job(reply)).is_ok();
        match answer.await {
            Ok(answer) => answer,
            Err(_) if sent => Err(TaskError::Gone { container: self.id.clone() }),
            Err(_) => Err(TaskError::NoContainer { container: self.id.clone() }),
        }
    }
}

/// One process of a container: its init, or an exec.
pub(crate) struct Process {
    pub(crate) status: Status,
    pub(crate) stdio: Stdio,
    /// None for an exec that was added and not started, and for an init that is yet to be restored.
    pub(crate) child: Option<Child>,
    pub(crate) exit: watch::Sender<Option<Exit>>,
    copies: Option<Copies>,
    /// Its start is under way: an exit must not be told before it.
    starting: bool,
    /// What an exec is to run.
    spec: Option<ProcessSpec>,
}

impl Process {
    fn new(stdio: Stdio) -> Self {
        Self {
            status: Status::Created,
            stdio,
            child: None,
            exit: watch::Sender::new(None),
            copies: None,
            starting: false,
            spec: None,
        }
    }

    /// Pid as containerd counts, 0 for none.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, |child| child.pid().unsigned_abs())
    }

    fn is_alive(&self) -> bool {
        self.starting || matches!(self.status, Status::Running | Status::Paused)
    }
}

/// The state of one container. Only its own task touches it.
pub(crate) struct Actor {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    context: Context,
    runtime: Arc<dyn OciRuntime>,
    choice: Choice,
    owner: Owner,
    /// None before the start of a container that is made from a checkpoint.
    cgroup: Option<Cgroup>,
    /// What it is made from.
    checkpoint: Option<FromCheckpoint>,
    /// Its /dev/shm, if that comes from outside.
    shm: Option<Shm>,
    annotations: Annotations,
    /// Devices that it is given.
    devices: Vec<DeviceNode>,
    paused_at: Option<Instant>,
    freezer: Freezer,
    /// Stops the checkpoint or restore that is under way.
    session: Option<Stop>,
    /// Init has a pid namespace of its own, whose processes the kernel kills when it ends.
    private_pids: bool,
    init: Process,
    /// How init ended, while that cannot be told yet.
    init_ended: Option<Exit>,
    execs: BTreeMap<String, Process>,
    oom_kills: u64,
    mailbox: mpsc::WeakUnboundedSender<Job>,
    operations: VecDeque<Operation>,
    /// None once the container is deleted.
    registration: Option<Registration>,
}

impl Actor {
    async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let mut work: Option<Work> = None;
        let mut execs = JoinSet::new();
        while self.registration.is_some() {
            let may_begin = |next: &mut Operation| next.company != Company::Alone || execs.is_empty();
            if work.is_none()
                && let Some(Operation { company, begin }) = self.operations.pop_front_if(may_begin)
            {
                match (company, begin(&mut self)) {
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
        // Requests that came before their clients knew of the deletion are answered too.
        jobs.close();
        while let Ok(job) = jobs.try_recv() {
            job(&mut self);
        }
        while let Some(operation) = self.operations.pop_front() {
            (operation.begin)(&mut self);
        }
    }

    /// Fails once the container is deleted, for what was asked of it before that was known.
    fn check_exists(&self) -> Result<(), TaskError> {
        match self.registration {
            Some(_) => Ok(()),
            None => Err(TaskError::NoContainer { container: self.id.clone() }),
        }
    }

    /// The process that requests name: init when `exec` is empty.
    pub(crate) fn process(&self, exec: &str) -> Result<&Process, TaskError> {
        if exec.is_empty() { Ok(&self.init) } else { self.execs.get(exec).ok_or_else(|| self.no_process(exec)) }
    }

    fn process_mut(&mut self, exec: &str) -> Result<&mut Process, TaskError> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        let missing = self.no_process(exec);
        self.execs.get_mut(exec).ok_or(missing)
    }

    fn no_process(&self, exec: &str) -> TaskError {
        TaskError::NoProcess { container: self.id.clone(), exec: exec.to_owned() }
    }

    /// A process's name in messages.
    fn name(&self, exec: &str) -> String {
        process_name(&self.id, exec)
    }

    fn wrong_state(&self, action: &'static str, exec: &str, status: Status) -> TaskError {
        TaskError::WrongState { action, process: self.name(exec), status }
    }

    /// Reports the exit of `child` to the mailbox.
    fn watch(&self, exec: &str, child: Child) {
        // Held until the process has ended: its exit is never lost, whoever else has let go of the container.
        let Some(mailbox) = self.mailbox.upgrade() else { return };
        let exec = exec.to_owned();
        tokio::spawn(async move {
            let exit = child.wait().await;
            // The container may have been deleted meanwhile, with this exit in its answer.
            let _ = mailbox.send(Box::new(move |actor| {
                if actor.check_exists().is_ok() {
                    actor.ended(&exec, exit);
                }
            }));
        });
    }

    /// Reports out-of-memory kills to the mailbox.
    fn watch_oom(&self) {
        let (mailbox, Some(cgroup)) = (self.mailbox.clone(), &self.cgroup) else { return };
        match cgroup.watch_oom() {
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
            Err(error) => {
                tracing::warn!("container {}: no out-of-memory events: {}", self.id, crate::error::chain(&error));
            }
        }
    }

    fn tell_oom(&mut self) {
        let kills = self.cgroup.as_ref().map_or(0, Cgroup::oom_kills);
        if kills > self.oom_kills {
            self.oom_kills = kills;
            self.context.events.publish(TaskOOM { container_id: self.id.clone(), ..TaskOOM::default() });
        }
    }

    fn ended(&mut self, exec: &str, exit: Exit) {
        if exec.is_empty() {
            // The cgroup forgets its counters when it is removed, and CRI wants the reason before the exit.
            self.tell_oom();
            self.init_ended = Some(exit);
            if !self.private_pids
                && let Some(Err(error)) = self.cgroup.as_ref().map(|cgroup| cgroup.signal_all(Signal::KILL))
            {
                tracing::warn!("container {}: processes may be left: {}", self.id, crate::error::chain(&error));
            }
        } else if let Some(process) = self.execs.get_mut(exec) {
            process.status = Status::Stopped;
            let pid = process.pid();
            process.exit.send_replace(Some(exit));
            self.tell_exit(exec, pid, exit);
        }
        self.settle_init();
    }

    /// Tells init's exit, once nothing that must be told before it is left.
    fn settle_init(&mut self) {
        let Some(exit) = self.init_ended else { return };
        if self.init.starting || self.execs.values().any(Process::is_alive) {
            return;
        }
        self.init_ended = None;
        self.init.status = Status::Stopped;
        self.init.exit.send_replace(Some(exit));
        let (id, pid) = (self.id.clone(), self.init.pid());
        self.tell_exit(&id, pid, exit);
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

/// A process's name in messages.
pub(crate) fn process_name(container: &str, exec: &str) -> String {
    if exec.is_empty() { format!("container {container}") } else { format!("exec {exec} of container {container}") }
}
