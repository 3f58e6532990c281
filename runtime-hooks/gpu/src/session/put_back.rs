//! The way back to the GPU.

use std::time::{Duration, Instant};

use phase::Phase;

use super::{BETWEEN_TRIES, HALT, Host, Resumed, STOPPING, Session, SessionError};
use crate::swap::Swap;
use cuda::ProcessState;
use cuda::{Call, Pair, SHORT_CALL};

/// How long other tracers, such as a criu that is being killed, may keep a process.
const TRACED: Duration = Duration::from_secs(30);
/// How often a restore is tried that the driver refuses.
const RESTORE_TRIES: u32 = 3;

impl<H: Host> Session<'_, H> {
    /// Gives all processes of the container their GPU state back, whatever state they are in, and leaves the container
    /// frozen or not.
    pub(crate) fn resume(mut self, frozen: bool, pairs: &[Pair], limit: Duration) -> Result<Resumed, SessionError> {
        self.put_back(None, frozen, pairs, limit)
    }

    /// As [`Self::resume`] for a frozen container in which not all memory is in place yet: not that of processes without a GPU,
    /// nor this staging memory. Nothing of it runs but what the driver needs, until `is_whole` has waited for the rest. If that
    /// says that there will be none, the container is frozen for good. The host has to be one whose end ends what it holds.
    pub(crate) fn resume_unfilled(
        mut self,
        staging: &Swap,
        pairs: &[Pair],
        limit: Duration,
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        let resumed = self.hold_others().and_then(|()| self.put_back_held(None, staging, false, pairs, limit));
        let resumed = resumed.and_then(|resumed| is_whole().then_some(resumed).ok_or(SessionError::Unfilled));
        if resumed.is_err() {
            // If it cannot be, what is held stays so until the end.
            self.host.freeze()?;
        }
        self.host.let_go();
        resumed
    }

    /// Holds all processes that do not use CUDA, of which those that sleep need no hold.
    fn hold_others(&mut self) -> Result<(), SessionError> {
        let mut others = self.host.pids()?;
        others.retain(|pid| !self.host.has_drivers_threads(*pid) && !self.host.is_asleep(*pid));
        self.hold_all(&others, H::hold_whole)
    }

    /// `known` are processes with whether they were stopped by a signal; without any, all that there are.
    pub(super) fn put_back(
        &mut self,
        known: Option<Vec<(i32, bool)>>,
        frozen: bool,
        pairs: &[Pair],
        limit: Duration,
    ) -> Result<Resumed, SessionError> {
        let result = self.put_back_held(known, &Swap::default(), frozen, pairs, limit);
        self.host.let_go();
        if result.is_err() && !frozen {
            self.host.thaw()?;
        }
        result
    }

    fn put_back_held(
        &mut self,
        known: Option<Vec<(i32, bool)>>,
        staging: &Swap,
        frozen: bool,
        pairs: &[Pair],
        limit: Duration,
    ) -> Result<Resumed, SessionError> {
        let known = match known {
            Some(known) => known,
            None => self.host.pids()?.into_iter().map(|pid| (pid, false)).collect(),
        };
        let known: Vec<(i32, bool)> =
            known.into_iter().filter(|(pid, _)| self.host.has_drivers_threads(*pid)).collect();
        let members: Vec<i32> = known.iter().map(|(pid, _)| *pid).collect();
        self.hold_all(&members, H::hold)?;
        self.host.thaw()?;
        self.host.settle(HALT)?;
        self.host.sleep(STOPPING);
        let mut stopped: Vec<i32> = known.into_iter().filter_map(|(pid, stopped)| stopped.then_some(pid)).collect();
        for pid in &members {
            if self.host.is_stopped(*pid) {
                self.host.wake(*pid)?;
                if !stopped.contains(pid) {
                    stopped.push(*pid);
                }
            }
        }
        self.host.settle(HALT)?;
        let restored = self.restore_staged(staging, &members, pairs, limit);
        for pid in stopped {
            if !self.host.is_gone(pid) {
                self.host.put_to_sleep(pid)?;
            }
        }
        if frozen {
            self.host.freeze()?;
        }
        restored
    }

    fn restore_staged(
        &mut self,
        staging: &Swap,
        members: &[i32],
        pairs: &[Pair],
        limit: Duration,
    ) -> Result<Resumed, SessionError> {
        if staging.processes.is_empty() {
            return self.restore_and_unlock(members, pairs, limit);
        }
        self.enter(Phase::Swap);
        self.host.map_staging(staging, limit)?;
        let restored = self.restore_and_unlock(members, pairs, limit);
        // What is wrong with the memory is what the driver failed for.
        self.host.finish_staging(limit)?;
        restored
    }

    /// Another tracer, such as a criu that is being killed, may have them for a moment.
    pub(super) fn hold_all(
        &mut self,
        pids: &[i32],
        hold: fn(&mut H, i32) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let begin = Instant::now();
        for pid in pids {
            loop {
                match hold(self.host, *pid) {
                    Ok(()) => break,
                    Err(_) if self.host.is_gone(*pid) => break,
                    Err(error) if begin.elapsed() > TRACED => return Err(error),
                    Err(_) => self.host.sleep(BETWEEN_TRIES),
                }
            }
        }
        Ok(())
    }

    /// Every process is tried, whatever becomes of the others; the first failure is the answer.
    fn restore_and_unlock(
        &mut self,
        members: &[i32],
        pairs: &[Pair],
        limit: Duration,
    ) -> Result<Resumed, SessionError> {
        let mut failure = None;
        let (mut locked, mut checkpointed) = (Vec::new(), Vec::new());
        for pid in members {
            match self.state(*pid) {
                Ok(Some(ProcessState::Locked)) => locked.push(*pid),
                Ok(Some(ProcessState::Checkpointed)) => checkpointed.push(*pid),
                Ok(Some(ProcessState::Running) | None) => {}
                Ok(Some(state)) => {
                    let process = self.host.describe(*pid);
                    failure.get_or_insert(SessionError::State { process, state: state.to_string() });
                }
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        self.enter(Phase::CudaRestore);
        let mut restored = 0;
        for tries in 1..=RESTORE_TRIES {
            let wanted = std::mem::take(&mut checkpointed);
            for (pid, result) in self.call_each(wanted, &Call::Restore { pairs: pairs.to_vec() }, limit) {
                match result {
                    Ok(_) => {
                        locked.push(pid);
                        restored += 1;
                    }
                    Err(_) if self.host.is_gone(pid) => {
                        let process = self.host.describe(pid);
                        let why = "the process died".to_owned();
                        failure.get_or_insert(SessionError::Call { action: "restore".into(), process, why });
                    }
                    // Whether it was done is for the driver to say.
                    Err(_) if matches!(self.state(pid), Ok(Some(ProcessState::Locked))) => locked.push(pid),
                    Err(reason) if tries == RESTORE_TRIES => {
                        let failed = self.failed("restore", pid, &reason);
                        failure.get_or_insert(failed);
                    }
                    Err(_) => checkpointed.push(pid),
                }
            }
            if checkpointed.is_empty() {
                break;
            }
            self.host.sleep(BETWEEN_TRIES);
        }
        self.enter(Phase::Unlock);
        locked.reverse();
        for (pid, result) in self.call_each(locked, &Call::Unlock, SHORT_CALL) {
            match result {
                Ok(_) => {}
                // An unlock may report an error after it was done (peers.md).
                Err(_) if matches!(self.state(pid), Ok(Some(ProcessState::Running) | None)) => {}
                Err(reason) => {
                    let failed = self.failed("unlock", pid, &reason);
                    failure.get_or_insert(failed);
                }
            }
        }
        failure.map_or(Ok(Resumed { restored }), Err)
    }
}
