//! Operations on a container, and requests answered by the actor at once.

use std::future::Future;
use std::time::Duration;

use cgroup::Cgroup;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use reaper::{Child, Exit};
use runtime::{ExecRequest, OciRuntime};
use rustix::process::Signal;
use tokio::sync::watch;

use super::freezer::LetDie;
use super::{Actor, ExecId, Process, ProcessRef, Status};
use crate::error::TaskError;
use crate::stdio::{Copies, Stdio};
use crate::task::timestamp;
use crate::{pod, rootfs};

/// Longest time for a killed process to end. An uninterruptible wait delays the end, as does a
/// freeze on v1.
const END: Duration = Duration::from_secs(10);

/// End of a deleted process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deleted {
    pub(crate) pid: u32,
    pub(crate) exit: Exit,
}

impl Deleted {
    fn of(process: &Process) -> Self {
        // An exec without a start has no end: containerd's Go shim answers with zeros as well.
        let exit = process.exit().unwrap_or(Exit { code: 0, at: std::time::SystemTime::UNIX_EPOCH });
        Self { pid: process.pid(), exit }
    }
}

/// Receivers of a signal.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Process(ProcessRef),
    /// Every process of the container.
    Everything,
}

impl Actor {
    /// Starts init.
    pub(crate) fn start_init(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        if self.init.status() != Status::Created {
            return Err(self.wrong_state("start"));
        }
        self.init.starting();
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        Ok(async move {
            let started = runtime.start(&id).await;
            move |actor: &mut Self| {
                let pid = actor.init.pid();
                if started.is_ok() {
                    actor.init.started();
                    let container_id = actor.id.clone();
                    actor.context.events.publish(TaskStart { container_id, pid, ..TaskStart::default() });
                } else {
                    actor.init.not_started();
                }
                actor.settle_init();
                Ok(started.map(|()| pid)?)
            }
        })
    }

    /// Adds an exec process, for a later start.
    pub(crate) fn add_exec(&mut self, exec: ExecId, spec: ProcessSpec, stdio: Stdio) -> Result<(), TaskError> {
        if self.execs.contains_key(&exec) {
            return Err(TaskError::ExecExists { container: self.id.clone(), exec: exec.into() });
        }
        self.check_takes_execs()?;
        self.execs.insert(exec.clone(), Process::exec(stdio, spec));
        let (container_id, exec_id) = (self.id.clone(), exec.into());
        self.context.events.publish(TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Fails unless there is an init, running or not, and not paused.
    fn check_takes_execs(&self) -> Result<(), TaskError> {
        match self.init.true_status() {
            Status::Created if self.init.child.is_some() => Ok(()),
            _ => self.check_runs("exec in"),
        }
    }

    fn check_runs(&self, action: &'static str) -> Result<(), TaskError> {
        if self.init.true_status() == Status::Running { Ok(()) } else { Err(self.wrong_state(action)) }
    }

    /// Starts an exec process.
    pub(crate) fn start_exec(
        &mut self,
        exec: ExecId,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        self.check_takes_execs()?;
        let reference = ProcessRef::Exec(exec.clone());
        let process = self.process(&reference)?;
        let Some(spec) = process.program() else {
            return Err(self.wrong_state_of("start", &reference, process.status()));
        };
        let stdio = process.stdio.clone();
        self.exec_mut(&exec)?.starting();
        let (runtime, reaper, owner) = (self.runtime.clone(), self.context.reaper.clone(), self.owner.clone());
        let (id, bundle, name) = (self.id.clone(), self.bundle.clone(), reference.name(&self.id));
        let prepare = self.config.prepare;
        Ok(async move {
            let failed = |source| TaskError::Stdio { process: name.clone(), source };
            let started: Result<(Child, Copies), TaskError> = async {
                let (io, prepared) = stdio.prepare(&owner, &reaper).await.map_err(failed)?;
                let request = ExecRequest { id, exec_id: exec.clone().into(), bundle, process: spec, io, prepare };
                let child = match runtime.exec(request).await {
                    Ok(child) => child,
                    Err(error) => {
                        prepared.abandon().await;
                        return Err(error.into());
                    }
                };
                match prepared.connect().await {
                    Ok(copies) => Ok((child, copies)),
                    Err(error) => {
                        end(&child, &name).await;
                        Err(failed(error))
                    }
                }
            }
            .await;
            move |actor: &mut Self| {
                let answer = actor.exec_started(&exec, started);
                actor.settle_init();
                answer
            }
        })
    }

    fn exec_started(&mut self, exec: &ExecId, started: Result<(Child, Copies), TaskError>) -> Result<u32, TaskError> {
        let process = self.exec_mut(exec)?;
        let (child, copies) = started.inspect_err(|_| process.not_started())?;
        process.started();
        process.copies = Some(copies);
        process.child = Some(child.clone());
        let pid = process.pid();
        let (container_id, exec_id) = (self.id.clone(), exec.clone().into());
        self.context.events.publish(TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() });
        self.watch(ProcessRef::Exec(exec.clone()), child);
        Ok(pid)
    }

    /// Freezes the container, if possible at a moment when no process waits for a vforked child.
    pub(crate) fn pause(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        self.check_runs("pause")?;
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        let cgroup = self.accounts.as_ref().map(|accounts| accounts.cgroup.clone());
        self.freezer.lend();
        Ok(async move {
            let mut paused = runtime.pause(&id).await.map_err(TaskError::from);
            if paused.is_ok()
                && let Some(cgroup) = cgroup
            {
                paused = bring_to_rest(&*runtime, id, cgroup).await;
            }
            |actor: &mut Self| {
                actor.take_freezer_back();
                paused?;
                actor.init.paused();
                let container_id = actor.id.clone();
                actor.context.events.publish(TaskPaused { container_id, ..TaskPaused::default() });
                Ok(())
            }
        })
    }

    /// Thaws the container.
    pub(crate) fn resume(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        if self.init.status() != Status::Paused {
            return Err(self.wrong_state("resume"));
        }
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        self.freezer.lend();
        Ok(async move {
            let resumed = runtime.resume(&id).await;
            |actor: &mut Self| {
                actor.take_freezer_back();
                resumed?;
                actor.init.resumed();
                let container_id = actor.id.clone();
                actor.context.events.publish(TaskResumed { container_id, ..TaskResumed::default() });
                Ok(())
            }
        })
    }

    /// Changes the limits.
    pub(crate) fn update(
        &mut self,
        resources: LinuxResources,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        if self.init.status() == Status::Stopped {
            return Err(self.wrong_state("update"));
        }
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        Ok(async move {
            let updated = runtime.update(&id, &resources).await;
            |_: &mut Self| Ok(updated?)
        })
    }

    /// Removes the container. A created one is killed; a running one must be stopped first.
    pub(crate) fn delete_init(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<Deleted, TaskError> + use<>> + use<>, TaskError>
    {
        if !matches!(self.init.status(), Status::Created | Status::Stopped) {
            return Err(self.wrong_state_of("delete", &ProcessRef::Init, self.init.status()));
        }
        let (runtime, id, target) = (self.runtime.clone(), self.id.clone(), self.bundle.join("rootfs"));
        let (child, copies) = (self.init.child.clone(), self.init.copies.take());
        Ok(async move {
            let deleted = async {
                if let Err(error) = runtime.delete(&id).await {
                    return Err((error, copies));
                }
                let exit = match child {
                    Some(child) => Some(child.wait().await),
                    None => None,
                };
                if let Some(copies) = copies {
                    copies.shut_down().await;
                }
                rootfs::unmount(&target);
                Ok(exit)
            }
            .await;
            move |actor: &mut Self| match deleted {
                Ok(exit) => Ok(actor.deleted(exit)),
                Err((error, copies)) => {
                    // The next attempt delivers the output.
                    actor.init.copies = copies;
                    Err(error.into())
                }
            }
        })
    }

    fn deleted(&mut self, exit: Option<Exit>) -> Deleted {
        // The exit of a container without a start may still be in the mailbox.
        if self.init.status() != Status::Stopped
            && let Some(exit) = exit
        {
            self.ended(&ProcessRef::Init, exit);
        }
        // Before the answer: the client may then use the id again, or ask for remaining containers.
        self.registration = None;
        self.forget_checkpoint();
        pod::leave(&self.context.bundle, &self.bundle);
        let deleted = Deleted::of(&self.init);
        self.context.events.publish(TaskDelete {
            container_id: self.id.clone(),
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: Some(timestamp(deleted.exit.at)).into(),
            ..TaskDelete::default()
        });
        deleted
    }

    /// Removes an exec process.
    pub(crate) fn delete_exec(
        &mut self,
        exec: ExecId,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<Deleted, TaskError> + use<>> + use<>, TaskError>
    {
        let process = self.exec_mut(&exec)?;
        if process.is_alive() {
            let status = process.status();
            return Err(self.wrong_state_of("delete", &ProcessRef::Exec(exec), status));
        }
        let copies = process.copies.take();
        Ok(async move {
            if let Some(copies) = copies {
                copies.shut_down().await;
            }
            move |actor: &mut Self| {
                let missing = actor.no_exec(&exec);
                let process = actor.execs.remove(&exec).ok_or(missing)?;
                Ok(Deleted::of(&process))
            }
        })
    }

    /// Sends a signal. Signal 0 only tests for the process's existence.
    pub(crate) fn kill(&mut self, target: &Target, signal: u32) -> Result<(), TaskError> {
        let reference = match target {
            Target::Process(process) => process,
            Target::Everything => &ProcessRef::Init,
        };
        let process = self.process(reference)?;
        let finished = TaskError::Finished { process: reference.name(&self.id) };
        let is_init = *reference == ProcessRef::Init;
        let Some(child) = process.child.clone() else {
            let kills_init = is_init && signal == Signal::KILL.as_raw().unsigned_abs();
            return match self.session.as_ref().filter(|_| kills_init) {
                // Init is still being restored.
                Some(restore) => {
                    restore.stop("the container was killed");
                    Ok(())
                }
                None => Err(self.wrong_state_of("signal", reference, process.status())),
            };
        };
        if child.exit().is_some() {
            return Err(finished);
        }
        let Some(signal) = crate::sys::signal(signal) else {
            return if signal == 0 { Ok(()) } else { Err(self.bad_request("signal", &signal)) };
        };
        match target {
            Target::Everything => {
                let failed =
                    |source| TaskError::Cgroup { action: "signal everything in", container: self.id.clone(), source };
                self.cgroup()?.signal_all(signal).map_err(failed)?;
            }
            Target::Process(_) => match child.signal(signal) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                    return Err(finished);
                }
                Err(source) => {
                    return Err(TaskError::Signal { action: "signal", process: reference.name(&self.id), source });
                }
            },
        }
        if signal == Signal::KILL && is_init {
            // A cancelled checkpoint returns the freezer sooner.
            if let Some(checkpoint) = &self.session {
                checkpoint.stop("the container was killed");
            }
            if self.freezer.init_is_killed() == LetDie::Now {
                self.let_the_killed_die();
            }
        }
        Ok(())
    }

    /// Takes the freezer back from the operation that borrowed it.
    pub(super) fn take_freezer_back(&mut self) {
        if self.freezer.take_back() == LetDie::Now {
            self.let_the_killed_die();
        }
    }

    /// Stops a restore under way, whose result nobody wants any more.
    pub(crate) fn stop_restore(&mut self, reason: &str) {
        if let Some(restore) = self.session.as_ref().filter(|_| self.init.child.is_none()) {
            restore.stop(reason);
        }
    }

    fn let_the_killed_die(&self) {
        let accounts = self.accounts.as_ref();
        if let Some(Err(error)) = accounts.map(|accounts| accounts.cgroup.let_the_killed_die()) {
            tracing::error!(container = self.id, "init is killed, and stays frozen: {}", phase::chain(&error));
        }
    }

    fn bad_request(&self, field: &'static str, value: &dyn std::fmt::Display) -> TaskError {
        TaskError::BadRequest { container: self.id.clone(), field, message: format!("{value} is out of range") }
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(&mut self, process: &ProcessRef, columns: u32, rows: u32) -> Result<(), TaskError> {
        let columns = u16::try_from(columns).map_err(|_| self.bad_request("width", &columns))?;
        let rows = u16::try_from(rows).map_err(|_| self.bad_request("height", &rows))?;
        let Some(copies) = &self.process(process)?.copies else { return Ok(()) };
        let failed = |source| {
            let process = process.name(&self.id);
            TaskError::Signal { action: "resize the terminal of", process, source }
        };
        copies.resize(columns, rows).map_err(failed)
    }

    /// Ends a process's standard input, after delivery of everything written.
    pub(crate) fn close_stdin(&mut self, process: &ProcessRef) -> Result<(), TaskError> {
        self.process(process)?.stdio.close_input();
        Ok(())
    }

    /// Returns a watch on a process's end.
    pub(crate) fn exit_of(&mut self, process: &ProcessRef) -> Result<watch::Receiver<Option<Exit>>, TaskError> {
        Ok(self.process(process)?.watch_exit())
    }

    /// Returns every process of the container, with the exec id of processes started by exec.
    pub(crate) fn pids(&mut self) -> Result<Vec<(u32, Option<ExecId>)>, TaskError> {
        let failed = |source| TaskError::Cgroup { action: "list", container: self.id.clone(), source };
        let Some(accounts) = &self.accounts else { return Ok(Vec::new()) };
        let pids = accounts.cgroup.pids().map_err(failed)?;
        let exec_of = |pid| self.execs.iter().find(|(_, process)| process.pid() == pid).map(|(exec, _)| exec.clone());
        Ok(pids.into_iter().map(|pid| pid.raw().unsigned_abs()).map(|pid| (pid, exec_of(pid))).collect())
    }

    /// Returns the cgroup's statistics, until the container is deleted: containerd looks for
    /// out-of-memory kills after the end.
    pub(crate) fn metrics(&mut self) -> Result<Any, TaskError> {
        match self.cgroup()?.metrics() {
            Ok(metrics) => Ok(metrics),
            // systemd removes the cgroup with its last process.
            Err(_) if self.init.status() == Status::Stopped => {
                Err(TaskError::Finished { process: ProcessRef::Init.name(&self.id) })
            }
            Err(source) => Err(TaskError::Cgroup { action: "read", container: self.id.clone(), source }),
        }
    }

    fn cgroup(&self) -> Result<&Cgroup, TaskError> {
        let accounts = self.accounts.as_ref().ok_or_else(|| self.wrong_state("ask the cgroup of"))?;
        Ok(&accounts.cgroup)
    }
}

/// Ends an unusable process.
pub(super) async fn end(child: &Child, name: &str) {
    // The process may have ended before.
    let _ = child.signal(Signal::KILL);
    if tokio::time::timeout(END, child.wait()).await.is_err() {
        tracing::error!(pid = child.pid(), "{name}: a process is killed, and does not end");
    }
}

/// Waits until no process of a paused container waits for a vforked child. The container runs for
/// moments meanwhile. A container that never comes to rest stays paused as it is.
///
/// A client may save the container's files next, and the processes after the files. A process in
/// the middle of a vfork cannot be saved: after running on in between, the process would no longer
/// fit the files.
async fn bring_to_rest(runtime: &dyn OciRuntime, id: String, cgroup: Cgroup) -> Result<(), TaskError> {
    let resting = cgroup.clone();
    let rested = tokio::task::spawn_blocking(move || resting.freeze_at_rest(true)).await;
    let Ok(Err(source)) = rested else { return Ok(()) };
    if cgroup.is_frozen().is_ok_and(|is_frozen| is_frozen) {
        tracing::info!(container = id, "paused, but not at rest: {}", phase::chain(&source));
        return Ok(());
    }
    if let Err(error) = runtime.resume(&id).await {
        tracing::error!(container = id, "the container runs, and counts as paused: {}", phase::chain(&error));
    }
    Err(TaskError::Cgroup { action: "freeze", container: id, source })
}
