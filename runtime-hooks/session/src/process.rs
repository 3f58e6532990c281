//! The session's process.

use std::io;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use phase::{Cancel, Phase, Timeline};
use proc::HostPid;
use reaper::Reaper;
use role::{Failure, Role, Wire};
use rustix::io::FdFlags;

use crate::checkpoint::{After, owed, take};
use crate::error::{Failed, SessionError};
use crate::halt::Halts;
use crate::machine::{Machine, Services, discard_remains, finish_remains, withdraw_remains};
use crate::order::{CheckpointOrder, Instruction, Order, Report, RestoreOrder, UndoOrder};
use crate::restore::{Restore, Shim};
use crate::sys;
use crate::undo::{Step, UndoStack};

/// The role of a session: one checkpoint, one restore, or the undoing of a checkpoint.
pub const SESSION: Role = Role { name: "gpusnap-session" };

/// First and longest pause before what is owed to a container is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Pause between two looks for a cancellation, while the shim is waited for.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Serves one order. To be run by `main` when the first argument is the name of [`SESSION`].
#[must_use]
pub fn session_main() -> ExitCode {
    let serve = || -> io::Result<()> {
        let mut wire = Wire::new(SESSION.enter()?)?;
        // Each pack of memory is an open file, and 256 MiB: a soft limit of 1024 would limit snapshots.
        reaper::raise_descriptor_limit()?;
        let Some(order) = wire.receive::<Order>()? else { return Ok(()) };
        serve(order, wire)
    };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("a session cannot work: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The way to the shim. Reports of several threads do not mix.
#[derive(Clone)]
pub(crate) struct Reports(Arc<Mutex<UnixStream>>);

impl Reports {
    pub(crate) fn to(socket: UnixStream) -> Self {
        Self(Arc::new(Mutex::new(socket)))
    }

    fn send(&self, report: &Report) {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A shim that is dead hears nothing: the reader of the socket cancels.
        let _ = role::send(&mut *socket, report);
    }
}

fn serve(order: Order, wire: Wire) -> io::Result<()> {
    let reports = Reports::to(wire.writer()?);
    let first = match &order {
        Order::Checkpoint(_) => Phase::Freeze,
        Order::Restore(_) => Phase::Inspect,
        Order::Undo(_) => Phase::Release,
    };
    let (observer, halts) = (reports.clone(), Halts::of(&order.subject().id));
    halts.at(first);
    let timeline = Timeline::start(first).observed(Arc::new(move |phase| {
        observer.send(&Report::Began(phase));
        halts.at(phase);
    }));
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let services = Services { tokio, reaper: Reaper::guest(), timeline, cancel: Cancel::default() };
    let go_on = listen(wire, services.cancel.clone())?;
    let _enter = services.tokio.enter();
    let ended = match order {
        Order::Checkpoint(order) => return checkpoint(&services, &order, &reports),
        Order::Undo(order) => return undo(&services, &order, &reports),
        Order::Restore(order) => restore(&services, &order, &reports, go_on),
    };
    reports.send(&match ended {
        Ok(()) => Report::Done,
        Err(failed) => Report::Failed(Box::new(failed)),
    });
    Ok(())
}

/// Reads instructions in a thread of its own. The returned channel tells of `go-on`, and ends with the shim.
fn listen(mut wire: Wire, cancel: Cancel) -> io::Result<mpsc::Receiver<()>> {
    let (tell, go_on) = mpsc::channel();
    std::thread::Builder::new().name("instructions".into()).spawn(move || {
        loop {
            match wire.receive() {
                Ok(Some(Instruction::GoOn)) => drop(tell.send(())),
                Ok(Some(Instruction::Cancel { reason })) => cancel.cancel(&reason),
                Ok(None) | Err(_) => return cancel.cancel("the shim is gone"),
            }
        }
    })?;
    Ok(go_on)
}

fn checkpoint(services: &Services, order: &CheckpointOrder, reports: &Reports) -> io::Result<()> {
    let mut stack = UndoStack::default();
    let mut machine = match Machine::new(services, order) {
        Ok(machine) => machine,
        Err(error) => {
            let failed = Failed { phase: Phase::Freeze, cause: Failure::of(&error), owed: None };
            reports.send(&Report::Failed(Box::new(failed)));
            return Ok(());
        }
    };
    let after = machine.after();
    // A panic is a bug, for which the container must not pay.
    let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        take(&mut machine, after, &services.cancel, &mut stack)
    }));
    let taken = taken.unwrap_or_else(|_| {
        let phase = services.timeline.current();
        let failures = stack.unwind(&mut machine);
        let cause = Failure::of(&SessionError::Bug("a step of a checkpoint"));
        Err(Failed { phase, cause, owed: owed(&stack, &failures) })
    });
    match taken {
        Ok(()) => {
            tracing::info!("container {} is checkpointed: {}", order.subject.id, services.timeline);
            reports.send(&Report::Done);
        }
        Err(failed) => {
            reports.send(&Report::Failed(Box::new(failed)));
            pay(&mut machine, &mut stack);
        }
    }
    Ok(())
}

/// Undoes what is owed to the container, until it is paid or no process is left.
fn pay(machine: &mut Machine<'_>, stack: &mut UndoStack) {
    let mut pause = FIRST_PAUSE;
    while stack.owes() && !machine.is_gone() {
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
        let failures = stack.unwind(machine);
        match owed(stack, &failures) {
            Some(owed) => tracing::error!("the container is still not as it was, and is tried again: {owed}"),
            None => tracing::warn!("the container has everything back that a failed checkpoint had taken"),
        }
    }
}

/// Undoes the steps of a session that died. A checkpoint that is whole, and whose container is as the order wants it,
/// is finished instead: all that was missing is the word to the shim.
pub(crate) fn undo(services: &Services, order: &UndoOrder, reports: &Reports) -> io::Result<()> {
    let order = &order.checkpoint;
    let mut machine = match Machine::after_death(services, order) {
        Ok(machine) => machine,
        Err(error) => {
            tracing::warn!("nothing is left to undo in the container: {}", phase::chain(&error));
            reports.send(&without_container(order));
            return Ok(());
        }
    };
    let stands = machine.stands().unwrap_or_else(|failure| {
        tracing::error!("the checkpoint of a dead session is removed: {}", phase::chain(&failure));
        false
    });
    let mut stack = UndoStack::default();
    let steps: &[Step] = match (stands, machine.after()) {
        (false, _) => &[Step::Drafted, Step::Frozen, Step::Suspended, Step::Published],
        (true, After::LeaveRunning) => &[Step::Frozen, Step::Suspended],
        (true, After::Exit) => &[],
    };
    steps.iter().for_each(|step| stack.push(*step));
    let failures = stack.unwind(&mut machine);
    for (step, failure) in &failures {
        tracing::error!("cannot undo the step {step:?} of a dead session: {}", phase::chain(failure));
    }
    reports.send(&match owed(&stack, &failures) {
        None if stands => match machine.finish_after_death() {
            Ok(()) => Report::Stands,
            Err(cause) => Report::Failed(Box::new(Failed { phase: Phase::Release, cause, owed: None })),
        },
        None => Report::Done,
        Some(owed) => {
            let cause = Failure::new("the container is not as it was");
            Report::Failed(Box::new(Failed { phase: Phase::Release, cause, owed: Some(owed) }))
        }
    });
    pay(&mut machine, &mut stack);
    Ok(())
}

/// Finishes or removes the checkpoint of a dead session whose container is gone.
fn without_container(order: &CheckpointOrder) -> Report {
    match finish_remains(order) {
        Ok(true) => return Report::Stands,
        Ok(false) => {}
        // The files may be all that there is of the container.
        Err(cause) => return Report::Failed(Box::new(Failed { phase: Phase::Publish, cause, owed: None })),
    }
    for undone in [withdraw_remains(order), discard_remains(order)] {
        if let Err(failure) = undone {
            tracing::error!("cannot undo the checkpoint of a dead session: {}", phase::chain(&failure));
        }
    }
    Report::Done
}

struct ToShim<'a> {
    reports: &'a Reports,
    cancel: &'a Cancel,
    go_on: mpsc::Receiver<()>,
    has_gone_on: bool,
}

impl Shim for ToShim<'_> {
    fn restored(&mut self, init: HostPid) {
        self.reports.send(&Report::Restored { pid: init });
    }

    fn wait_for_go_on(&mut self) -> Result<(), SessionError> {
        while !self.has_gone_on {
            match self.go_on.recv_timeout(BETWEEN_LOOKS) {
                Ok(()) => self.has_gone_on = true,
                // The reader of the socket cancels when the shim is gone.
                Err(_) => self.cancel.check()?,
            }
        }
        Ok(())
    }
}

fn restore(
    services: &Services,
    order: &RestoreOrder,
    reports: &Reports,
    go_on: mpsc::Receiver<()>,
) -> Result<(), Failed> {
    let streams = order.console_socket.is_none().then(|| {
        let streams = sys::take_streams();
        for stream in &streams {
            // The children of this process must not have them.
            let _ = rustix::io::fcntl_setfd(stream, FdFlags::CLOEXEC);
        }
        streams
    });
    let mut shim = ToShim { reports, cancel: &services.cancel, go_on, has_gone_on: false };
    Restore::new(services, order).run(streams, &mut shim)
}
