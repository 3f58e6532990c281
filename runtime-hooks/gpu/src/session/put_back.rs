//! The way back to the GPU.

use std::time::{Duration, Instant};

use cuda::{Call, Pair, ProcessState, SHORT_CALL};
use memory::Layout;
use phase::Phase;
use proc::HostPid;

use super::{BETWEEN_TRIES, HALT, Host, Owed, Resumed, STOPPING, Session, SessionError, Step};

/// Longest time for other tracers to let go of all processes, such as a criu that is being killed.
const TRACED: Duration = Duration::from_secs(30);
/// Tries of a restore that the driver refuses.
const RESTORE_TRIES: u32 = 3;

/// Failures on the way back. None of them keeps the rest from being done.
#[derive(Debug, Default)]
pub(super) struct Faults {
    first: Option<SessionError>,
    /// State that no later try will bring back.
    lost: Option<SessionError>,
}

impl Faults {
    pub(super) fn note(&mut self, result: Result<(), SessionError>) {
        if let Err(fault) = result {
            tracing::warn!("on the way back: {fault}");
            self.first.get_or_insert(fault);
        }
    }

    fn lose(&mut self, fault: SessionError) {
        tracing::error!("not put back: {fault}");
        self.lost.get_or_insert(fault);
    }
}

impl<H: Host> Session<'_, H> {
    /// Gives all processes of the container their GPU state back, whatever state they are in, and leaves the container
    /// frozen or not. What is not back is owed.
    pub(crate) fn resume(mut self, frozen: bool, pairs: &[Pair], limit: Duration) -> Result<Resumed, SessionError> {
        self.undo.aim(frozen, pairs, limit);
        self.undo.push(Step::Unseen);
        self.undo.push(Step::Freezer);
        self.put_back()
    }

    /// Tries once more to put back what is owed.
    pub(crate) fn pay(mut self) -> Owed {
        self.is_undoing = true;
        if !self.undo.is_empty() {
            // What went wrong is with what is owed.
            let _ = self.put_back();
        }
        self.undo.owed()
    }

    /// As [`Self::resume`] for a frozen container in which not all memory is in place yet: not that of processes without a GPU,
    /// nor this staging memory. Nothing of it runs but what the driver needs, until `is_whole` has waited for the rest. If that
    /// says that there will be none, the container is frozen for good. The host has to be one whose end ends what it holds.
    pub(crate) fn resume_restored(
        mut self,
        staging: &Layout,
        pairs: &[Pair],
        limit: Duration,
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        self.undo.aim(false, pairs, limit);
        let resumed = self.resume_held(staging, limit, is_whole);
        if resumed.is_err() {
            // If it cannot be, what is held stays so until the end. Nothing is owed to a container of no use.
            let frozen = self.host.freeze();
            *self.undo = super::Undo::default();
            frozen?;
        }
        let let_go = self.let_go(&[]);
        let resumed = resumed?;
        let_go?;
        self.undo.done(Step::Freezer);
        Ok(resumed)
    }

    fn resume_held(
        &mut self,
        staging: &Layout,
        limit: Duration,
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        self.hold_others()?;
        self.undo.push(Step::Unseen);
        let mut faults = Faults::default();
        if !self.open(&mut faults) || faults.first.is_some() {
            return Err(faults.first.unwrap_or(SessionError::Unfilled));
        }
        let resumed = if staging.processes.is_empty() {
            self.call_back(&mut faults)
        } else {
            self.enter(Phase::Remap);
            self.host.map_staging(staging, limit)?;
            let resumed = self.call_back(&mut faults);
            // What is wrong with the memory is what the driver failed for.
            self.host.finish_staging(limit)?;
            resumed
        };
        self.stop_again(&mut faults);
        match faults.lost.or(faults.first) {
            Some(fault) => Err(fault),
            None if is_whole() => Ok(resumed),
            None => Err(SessionError::Unfilled),
        }
    }

    /// Holds all processes that do not use CUDA, of which those that are stopped need no hold.
    fn hold_others(&mut self) -> Result<(), SessionError> {
        let mut others = self.host.pids()?;
        others.retain(|pid| !self.host.has_drivers_threads(*pid) && !self.host.is_stopping(*pid));
        self.hold_all(&others, H::hold_whole)
    }

    /// Undoes every noted step, whatever becomes of the others; what cannot be undone stays noted. Fails if any does, or if
    /// something is lost.
    pub(super) fn put_back(&mut self) -> Result<Resumed, SessionError> {
        let mut faults = Faults::default();
        let is_open = self.open(&mut faults);
        let resumed = if is_open { self.call_back(&mut faults) } else { Resumed::default() };
        self.stop_again(&mut faults);
        self.leave(&mut faults);
        self.undo.failure.clone_from(&faults.first);
        match (faults.lost, faults.first) {
            (Some(lost), _) => Err(lost),
            (None, Some(first)) if !self.undo.is_empty() => Err(first),
            _ => Ok(resumed),
        }
    }

    /// Makes the container ready for calls of the driver: thawed, and held where GPU state may be away. Whether calls can be
    /// made.
    fn open(&mut self, faults: &mut Faults) -> bool {
        if self.undo.has(Step::Unseen) {
            match self.host.pids() {
                Ok(pids) => {
                    self.undo.done(Step::Unseen);
                    for pid in pids {
                        if self.host.has_drivers_threads(pid) {
                            self.undo.push(Step::Checkpointed(pid));
                        }
                    }
                }
                Err(fault) => faults.note(Err(fault)),
            }
        }
        let host = &mut *self.host;
        self.undo.forget(|pid| host.is_gone(pid));
        let checkpointed = self.undo.pids(Step::Checkpointed);
        let is_frozen = self.host.is_frozen();
        // What was taken while the v1 freezer had frozen it is let go only after a thaw.
        let is_stuck = is_frozen && !self.undo.pids(Step::Held).is_empty();
        if checkpointed.is_empty() && self.undo.pids(Step::Locked).is_empty() && !is_stuck {
            return true;
        }
        if !self.undo.has(Step::Freezer) {
            // It was left as it had to be, and somebody may have frozen or thawed it since.
            self.undo.frozen = is_frozen;
            self.undo.push(Step::Freezer);
        }
        // At risk is a thread that reads what is away. Worse is a process that never gets its state back.
        let held = self.hold_all(&checkpointed, H::hold);
        faults.note(held);
        if self.undo.frozen {
            self.hold_rest_still(faults);
        }
        let was_frozen = self.host.is_frozen();
        let thawed = self.host.thaw();
        let is_open = thawed.is_ok();
        faults.note(thawed);
        if is_open && was_frozen && self.undo.frozen {
            let settled = self.host.settle(HALT);
            faults.note(settled);
        }
        is_open
    }

    /// Has the driver give all processes back what it has of them. Those that are only locked are unlocked at once.
    fn call_back(&mut self, faults: &mut Faults) -> Resumed {
        let pids = self.undo.pids(Step::Checkpointed);
        let mut locked = self.undo.pids(Step::Locked);
        locked.retain(|pid| !pids.contains(pid));
        if pids.is_empty() && locked.is_empty() {
            return Resumed::default();
        }
        self.host.sleep(STOPPING);
        for pid in pids.iter().chain(&locked) {
            self.cont_stopped(*pid, faults);
        }
        for pid in pids {
            match self.state(pid) {
                Ok(Some(ProcessState::Checkpointed)) => {}
                Ok(Some(ProcessState::Locked)) => {
                    self.undo.done(Step::Checkpointed(pid));
                    self.undo.push(Step::Locked(pid));
                    locked.push(pid);
                }
                Ok(Some(ProcessState::Running) | None) => self.is_back(pid),
                Ok(Some(state)) => {
                    let process = self.host.describe(pid);
                    faults.lose(SessionError::State { process, state: state.to_string() });
                    self.is_back(pid);
                }
                Err(fault) => faults.note(Err(fault)),
            }
        }
        let checkpointed = self.undo.pids(Step::Checkpointed);
        if !locked.is_empty() && !checkpointed.is_empty() {
            self.unlock(std::mem::take(&mut locked), faults);
        }
        let mut restored = 0;
        if !checkpointed.is_empty() {
            let settled = self.host.settle(HALT);
            faults.note(settled);
            restored = self.restore(checkpointed, faults);
            locked = self.undo.pids(Step::Locked);
        }
        self.enter(Phase::Unlock);
        self.unlock(locked, faults);
        Resumed { restored }
    }

    /// Nothing of the process is with the driver any more.
    fn is_back(&mut self, pid: HostPid) {
        self.undo.done(Step::Checkpointed(pid));
        self.undo.done(Step::Locked(pid));
    }

    /// Lets the driver's threads run of a process that is stopped by a signal: nobody else answers.
    fn cont_stopped(&mut self, pid: HostPid, faults: &mut Faults) {
        if !self.host.is_stopped(pid) {
            return;
        }
        if let Err(fault) = self.cont(pid) {
            faults.note(Err(fault));
            let continued = self.host.cont_unheld(pid);
            faults.note(continued);
        }
    }

    /// Holds processes. Another tracer, such as a criu that is being killed, may have them for a moment. All are tried; the
    /// first failure is the answer.
    pub(super) fn hold_all(
        &mut self,
        pids: &[HostPid],
        hold: fn(&mut H, HostPid) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let begin = Instant::now();
        let mut waited = Duration::ZERO;
        let mut failure = None;
        for pid in pids {
            self.undo.push(Step::Held(*pid));
            loop {
                match hold(self.host, *pid) {
                    Ok(()) => break,
                    Err(_) if self.host.is_gone(*pid) => break,
                    Err(error) if waited > TRACED || begin.elapsed() > TRACED => {
                        failure = failure.or(Some(error));
                        break;
                    }
                    Err(_) => {
                        self.host.sleep(BETWEEN_TRIES);
                        waited += BETWEEN_TRIES;
                    }
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Restores processes. Every one is tried, whatever becomes of the others.
    fn restore(&mut self, mut checkpointed: Vec<HostPid>, faults: &mut Faults) -> usize {
        self.enter(Phase::CudaRestore);
        if let Err(fault) = self.await_room(&checkpointed) {
            faults.note(Err(fault));
            return 0;
        }
        let call = Call::Restore { pairs: self.undo.pairs.clone() };
        let mut restored = 0;
        for tries in 1..=RESTORE_TRIES {
            let wanted = std::mem::take(&mut checkpointed);
            for (pid, result) in self.call_each(wanted, &call, self.undo.limit) {
                // Whether it was done is for the driver to say.
                let state = if result.is_ok() { Ok(Some(ProcessState::Locked)) } else { self.state(pid) };
                match (state, result) {
                    (Ok(Some(ProcessState::Locked)), _) | (_, Ok(_)) => {
                        self.undo.done(Step::Checkpointed(pid));
                        self.undo.push(Step::Locked(pid));
                        restored += 1;
                    }
                    (Ok(Some(ProcessState::Running)), _) => self.is_back(pid),
                    (_, Err(_)) if self.host.is_gone(pid) => {
                        let process = self.host.describe(pid);
                        let why = "the process died".to_owned();
                        faults.lose(SessionError::Call { action: "restore".into(), process, why });
                        self.is_back(pid);
                    }
                    (_, Err(reason)) if tries == RESTORE_TRIES => {
                        let fault = self.failed("restore", pid, &reason);
                        faults.note(Err(fault));
                    }
                    (_, Err(_)) => checkpointed.push(pid),
                }
            }
            if checkpointed.is_empty() {
                break;
            }
            self.host.sleep(BETWEEN_TRIES);
        }
        restored
    }

    fn unlock(&mut self, mut locked: Vec<HostPid>, faults: &mut Faults) {
        locked.reverse();
        for (pid, result) in self.call_each(locked, &Call::Unlock, SHORT_CALL) {
            match result {
                Ok(_) => self.undo.done(Step::Locked(pid)),
                Err(_) if self.host.is_gone(pid) => self.undo.done(Step::Locked(pid)),
                // An unlock may report an error after it was done (peers.md).
                Err(_) if matches!(self.state(pid), Ok(Some(ProcessState::Running) | None)) => {
                    self.undo.done(Step::Locked(pid));
                }
                Err(reason) => {
                    let fault = self.failed("unlock", pid, &reason);
                    faults.note(Err(fault));
                }
            }
        }
    }

    /// Stops what was stopped, but for processes that the driver still has to answer for.
    fn stop_again(&mut self, faults: &mut Faults) {
        let away = [self.undo.pids(Step::Checkpointed), self.undo.pids(Step::Locked)].concat();
        for pid in self.undo.pids(Step::Continued) {
            if away.contains(&pid) {
                continue;
            }
            match self.host.stop(pid) {
                Ok(()) => self.undo.done(Step::Continued(pid)),
                Err(_) if self.host.is_gone(pid) => self.undo.done(Step::Continued(pid)),
                Err(fault) => faults.note(Err(fault)),
            }
        }
    }

    /// Leaves the container frozen or running, as it is to be left, and lets go of all whose state is back or that cannot run.
    fn leave(&mut self, faults: &mut Faults) {
        if self.undo.has(Step::Unseen) {
            // Nobody knows what would run without its GPU state.
            return;
        }
        let mut is_frozen = false;
        if self.undo.has(Step::Freezer) {
            let left = if self.undo.frozen { self.host.freeze() } else { self.host.thaw() };
            match left {
                Ok(()) => {
                    is_frozen = self.undo.frozen;
                    self.undo.done(Step::Freezer);
                }
                // Whoever paused it is told. Later it may have been resumed, and is not to be frozen behind their back.
                Err(fault) if self.undo.frozen => {
                    self.undo.done(Step::Freezer);
                    faults.lose(fault);
                }
                Err(fault) => faults.note(Err(fault)),
            }
        }
        let keep = if is_frozen { Vec::new() } else { self.undo.pids(Step::Checkpointed) };
        let let_go = self.let_go(&keep);
        faults.note(let_go);
    }
}
