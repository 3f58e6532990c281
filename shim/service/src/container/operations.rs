//! What is done with a container once it is there.

use std::future::Future;
use std::time::{Duration, Instant};

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
use super::{Actor, Process, Status};
use crate::error::TaskError;
use crate::stdio::{Copies, Stdio};
use crate::task::timestamp;
use crate::{pod, rootfs};

/// How long a killed process may take to end: one in an uninterruptible wait does not, nor one that is frozen on v1.
const END: Duration = Duration::from_secs(10);

/// What deleting a process tells about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deleted {
    pub(crate) pid: u32,
    pub(crate) exit: Exit,
}

impl Actor {
    /// Lets init run.
    pub(crate) fn start_init(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        if self.init.status != Status::Created {
            return Err(self.wrong_state("start", "", self.init.status));
        }
        self.init.starting = true;
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        Ok(async move {
            let started = runtime.start(&id).await;
            move |actor: &mut Self| {
                actor.init.starting = false;
                let pid = actor.init.pid();
                if started.is_ok() {
                    actor.init.status = Status::Running;
                    let container_id = actor.id.clone();
                    actor.context.events.publish(TaskStart { container_id, pid, ..TaskStart::default() });
                }
                actor.settle_init();
                Ok(started.map(|()| pid)?)
            }
        })
    }

    /// Adds an exec process, to be started later.
    pub(crate) fn add_exec(&mut self, exec: String, spec: ProcessSpec, stdio: Stdio) -> Result<(), TaskError> {
        if self.execs.contains_key(&exec) {
            return Err(TaskError::ExecExists { container: self.id.clone(), exec });
        }
        self.check_takes_execs()?;
        let mut process = Process::new(stdio);
        process.spec = Some(spec);
        self.execs.insert(exec.clone(), process);
        let container_id = self.id.clone();
        self.context.events.publish(TaskExecAdded { container_id, exec_id: exec, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Fails unless there is an init, which need not run yet, and which is not paused.
    fn check_takes_execs(&self) -> Result<(), TaskError> {
        match self.init.status {
            Status::Created if self.init_ended.is_none() && !self.is_to_be_restored() => Ok(()),
            _ => self.check_runs("exec in"),
        }
    }

    fn check_runs(&self, action: &'static str) -> Result<(), TaskError> {
        match self.init.status {
            Status::Running if self.init_ended.is_none() => Ok(()),
            Status::Running => Err(self.wrong_state(action, "", Status::Stopped)),
            status => Err(self.wrong_state(action, "", status)),
        }
    }

    /// Starts an exec process.
    pub(crate) fn start_exec(
        &mut self,
        exec: String,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<u32, TaskError> + use<>> + use<>, TaskError> {
        self.check_takes_execs()?;
        let process = self.process(&exec)?;
        let Some(spec) = process.spec.clone().filter(|_| process.status == Status::Created) else {
            return Err(self.wrong_state("start", &exec, process.status));
        };
        let stdio = process.stdio.clone();
        self.process_mut(&exec)?.starting = true;
        let (runtime, reaper, owner) = (self.runtime.clone(), self.context.reaper.clone(), self.owner.clone());
        let (id, bundle, name) = (self.id.clone(), self.bundle.clone(), self.name(&exec));
        Ok(async move {
            let failed = |source| TaskError::Stdio { process: name.clone(), source };
            let started: Result<(Child, Copies), TaskError> = async {
                let (io, prepared) = stdio.prepare(&owner, &reaper).await.map_err(failed)?;
                let request = ExecRequest { id, exec_id: exec.clone(), bundle, process: spec, io };
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

    fn exec_started(&mut self, exec: &str, started: Result<(Child, Copies), TaskError>) -> Result<u32, TaskError> {
        let process = self.process_mut(exec)?;
        process.starting = false;
        let (child, copies) = started?;
        process.status = Status::Running;
        process.copies = Some(copies);
        process.child = Some(child.clone());
        let pid = process.pid();
        let (container_id, exec_id) = (self.id.clone(), exec.to_owned());
        self.context.events.publish(TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() });
        self.watch(exec, child);
        Ok(pid)
    }

    /// Freezes the container, if it can be between two moments in which a process of it waits for a vforked child.
    pub(crate) fn pause(
        &mut self,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        self.check_runs("pause")?;
        let (runtime, id, cgroup) = (self.runtime.clone(), self.id.clone(), self.cgroup.clone());
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
                actor.change_status(paused, Status::Paused)?;
                actor.paused_at = Some(Instant::now());
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
        if self.init.status != Status::Paused {
            return Err(self.wrong_state("resume", "", self.init.status));
        }
        let (runtime, id) = (self.runtime.clone(), self.id.clone());
        self.freezer.lend();
        Ok(async move {
            let resumed = runtime.resume(&id).await;
            |actor: &mut Self| {
                actor.take_freezer_back();
                actor.change_status(resumed.map_err(TaskError::from), Status::Running)?;
                let container_id = actor.id.clone();
                actor.context.events.publish(TaskResumed { container_id, ..TaskResumed::default() });
                Ok(())
            }
        })
    }

    /// Init may have ended while the runtime was at work: stopped is final.
    fn change_status(&mut self, done: Result<(), TaskError>, status: Status) -> Result<(), TaskError> {
        done?;
        if self.init.status != Status::Stopped {
            self.init.status = status;
        }
        Ok(())
    }

    /// Changes the limits.
    pub(crate) fn update(
        &mut self,
        resources: LinuxResources,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<(), TaskError> + use<>> + use<>, TaskError> {
        if self.init.status == Status::Stopped {
            return Err(self.wrong_state("update", "", Status::Stopped));
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
        if !matches!(self.init.status, Status::Created | Status::Stopped) {
            return Err(self.wrong_state("delete", "", self.init.status));
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
        // The exit of a container that was never started may still be in the mailbox.
        if self.init.status != Status::Stopped
            && let Some(exit) = exit
        {
            self.ended("", exit);
        }
        // Before the answer: whoever has it may use the id again, or ask whether a container is left.
        self.registration = None;
        self.forget_checkpoint();
        pod::leave(&self.context.bundle, &self.bundle);
        let deleted = self.deleted_process(&self.init);
        self.context.events.publish(TaskDelete {
            container_id: self.id.clone(),
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: Some(timestamp(deleted.exit.at)).into(),
            ..TaskDelete::default()
        });
        deleted
    }

    fn deleted_process(&self, process: &Process) -> Deleted {
        let exit = *process.exit.borrow();
        // An exec that was never started has neither: containerd's Go shim answers with zeros as well.
        let exit = exit.unwrap_or(Exit { code: 0, at: std::time::SystemTime::UNIX_EPOCH });
        Deleted { pid: process.pid(), exit }
    }

    /// Removes an exec process.
    pub(crate) fn delete_exec(
        &mut self,
        exec: String,
    ) -> Result<impl Future<Output = impl FnOnce(&mut Self) -> Result<Deleted, TaskError> + use<>> + use<>, TaskError>
    {
        let process = self.process_mut(&exec)?;
        if process.is_alive() {
            let status = process.status;
            return Err(self.wrong_state("delete", &exec, status));
        }
        let copies = process.copies.take();
        Ok(async move {
            if let Some(copies) = copies {
                copies.shut_down().await;
            }
            move |actor: &mut Self| {
                let missing = actor.no_process(&exec);
                let process = actor.execs.remove(&exec).ok_or(missing)?;
                Ok(actor.deleted_process(&process))
            }
        })
    }

    /// Sends a signal to one process, or with `all` to everything in the container. Signal 0 only asks.
    pub(crate) fn kill(&mut self, exec: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        let process = self.process(exec)?;
        let finished = TaskError::Finished { process: self.name(exec) };
        let Some(child) = process.child.clone() else {
            let is_restored = exec.is_empty() && signal == Signal::KILL.as_raw().unsigned_abs();
            return match &self.session {
                // The process to be killed is being restored.
                Some(restore) if is_restored => Ok(restore.stop("the container was killed")),
                _ => Err(self.wrong_state("signal", exec, process.status)),
            };
        };
        if child.exit().is_some() {
            return Err(finished);
        }
        let Some(number) = crate::sys::signal(signal) else {
            return if signal == 0 { Ok(()) } else { Err(self.bad_request("signal", &signal)) };
        };
        if all && exec.is_empty() {
            let failed =
                |source| TaskError::Cgroup { action: "signal everything in", container: self.id.clone(), source };
            return self.cgroup()?.signal_all(number).map_err(failed);
        }
        match child.signal(number) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                return Err(finished);
            }
            Err(source) => return Err(TaskError::Signal { action: "signal", process: self.name(exec), source }),
        }
        if number == Signal::KILL && exec.is_empty() {
            // A checkpoint of a container that is being killed gives the freezer back sooner.
            if let Some(checkpoint) = &self.session {
                checkpoint.stop("the container was killed");
            }
            if self.freezer.init_is_killed() == LetDie::Now {
                self.let_the_killed_die();
            }
        }
        Ok(())
    }

    /// Ends what [`Freezer::lend`] began.
    pub(super) fn take_freezer_back(&mut self) {
        if self.freezer.take_back() == LetDie::Now {
            self.let_the_killed_die();
        }
    }

    /// Stops a restore that is under way: its result is not wanted any more.
    pub(crate) fn stop_restore(&mut self, reason: &str) {
        if let Some(restore) = self.session.as_ref().filter(|_| self.init.child.is_none()) {
            restore.stop(reason);
        }
    }

    fn let_the_killed_die(&self) {
        if let Some(Err(error)) = self.cgroup.as_ref().map(Cgroup::let_the_killed_die) {
            tracing::error!("container {}: init is killed, and stays frozen: {}", self.id, crate::error::chain(&error));
        }
    }

    fn bad_request(&self, field: &'static str, value: &dyn std::fmt::Display) -> TaskError {
        TaskError::BadRequest { container: self.id.clone(), field, message: format!("{value} is not one") }
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(&mut self, exec: &str, columns: u32, rows: u32) -> Result<(), TaskError> {
        let columns = u16::try_from(columns).map_err(|_| self.bad_request("width", &columns))?;
        let rows = u16::try_from(rows).map_err(|_| self.bad_request("height", &rows))?;
        let Some(copies) = &self.process(exec)?.copies else { return Ok(()) };
        let failed = |source| TaskError::Signal { action: "resize the terminal of", process: self.name(exec), source };
        copies.resize(columns, rows).map_err(failed)
    }

    /// Ends a process's standard input, once what was written to it is delivered.
    pub(crate) fn close_stdin(&mut self, exec: &str) -> Result<(), TaskError> {
        self.process(exec)?.stdio.close_input();
        Ok(())
    }

    /// Tells when a process has ended.
    pub(crate) fn exit_of(&mut self, exec: &str) -> Result<watch::Receiver<Option<Exit>>, TaskError> {
        Ok(self.process(exec)?.exit.subscribe())
    }

    /// Every process of the container, with the id of those that were started by exec.
    pub(crate) fn pids(&mut self) -> Result<Vec<(u32, Option<String>)>, TaskError> {
        let failed = |source| TaskError::Cgroup { action: "list", container: self.id.clone(), source };
        let Some(cgroup) = &self.cgroup else { return Ok(Vec::new()) };
        let pids = cgroup.pids().map_err(failed)?;
        let exec_of = |pid| self.execs.iter().find(|(_, process)| process.pid() == pid).map(|(exec, _)| exec.clone());
        Ok(pids.into_iter().map(i32::unsigned_abs).map(|pid| (pid, exec_of(pid))).collect())
    }

    /// The cgroup's statistics, until the container is deleted: containerd looks for out-of-memory kills after the end.
    pub(crate) fn metrics(&mut self) -> Result<Any, TaskError> {
        match self.cgroup()?.metrics() {
            Ok(metrics) => Ok(metrics),
            // systemd removes the cgroup with its last process.
            Err(_) if self.init.status == Status::Stopped => Err(TaskError::Finished { process: self.name("") }),
            Err(source) => Err(TaskError::Cgroup { action: "read", container: self.id.clone(), source }),
        }
    }

    fn cgroup(&self) -> Result<&Cgroup, TaskError> {
        self.cgroup.as_ref().ok_or_else(|| self.wrong_state("ask the cgroup of", "", self.init.status))
    }
}

/// Ends a process that cannot be used.
pub(super) async fn end(child: &Child, name: &str) {
    // It may have ended by itself.
    let _ = child.signal(Signal::KILL);
    if tokio::time::timeout(END, child.wait()).await.is_err() {
        tracing::error!("{name}: process {} is killed, and does not end", child.pid());
    }
}

/// Waits until no process of a paused container waits for a child that it has vforked, letting it run for moments; one
/// that never comes to rest stays paused as it is.
///
/// A client may save the container's files next, and its processes after them. Processes that were caught so cannot be
/// saved as they are: they would have to run on in between, and no longer fit the files.
async fn bring_to_rest(runtime: &dyn OciRuntime, id: String, cgroup: Cgroup) -> Result<(), TaskError> {
    let resting = cgroup.clone();
    let rested = tokio::task::spawn_blocking(move || resting.freeze_at_rest(true)).await;
    let Ok(Err(source)) = rested else { return Ok(()) };
    if cgroup.is_frozen().is_ok_and(|is_frozen| is_frozen) {
        tracing::info!("container {id} is paused, but not at rest: {}", crate::error::chain(&source));
        return Ok(());
    }
    if let Err(error) = runtime.resume(&id).await {
        tracing::error!("container {id} runs, and counts as paused: {}", crate::error::chain(&error));
    }
    Err(TaskError::Cgroup { action: "freeze", container: id, source })
}
