//! One container's way out of the GPU and back: the state machine.
//!
//! ```text
//!            thaw        ┌────────────── a process that was not there before ─────────────┐
//!  frozen ────────► Discover ──► Lock ──► Hold ──► (anything new?) ───────────────────────┘
//!                                 ▲ │                    │ no
//!               growing waits:    │ │ late               ▼
//!               all are unlocked ─┘ │             CudaCheckpoint ──────────────────► (all conditions?)
//!                                   │                    │                │                 │ yes
//!                                   └────────────────────┴────────────────┤ failure         ▼
//!                                                                         ▼          Freeze, let go: Suspended
//!        as it was before  ◄──────────────────────────────────────── roll back              │
//!                 ▲                                                                         │ resume, or the shim dies
//!                 └── let go ◄── (Freeze) ◄── Unlock ◄── CudaRestore ◄── thaw ◄── Hold ◄────┘
//! ```
//!
//! While it is suspended, files may take the place of memory (`remap`): it is held as a whole, thawed, and frozen again, and
//! is suspended before and after.
//!
//! A restored container whose memory is not all in place yet (`resume_restored`) is held as a whole as well, from before the
//! thaw until the rest is there. What goes wrong on the way freezes it, for somebody to end it.
//!
//! Processes keep the driver's devices that the driver's checkpoint leaves them: those that were forked from one that uses
//! CUDA or NVML, and those that use NVML alone. CRIU accepts them by a plugin, and they are replaced in the images only
//! ([`LeftDevices`]).
//!
//! A process that begins to use CUDA meanwhile can neither be freed of the GPU nor saved half way: all is put back, and tried again
//! when it has begun.
//!
//! Each step is noted before it is made ([`Step`]). On the way back (`put_back`) every step is undone whatever became of the
//! others, and what could not be undone stays noted ([`Owed`]), to be tried again. Whether a noted step was made at all is
//! asked from the driver, process by process. So a session that takes the place of one that died does the same as one that has
//! seen it all, and there is no journal that could be wrong.
//!
//! While a paused container is thawed, nothing of it runs that need not (`still`): processes without CUDA are held whole from
//! before the thaw until the freeze, CUDA processes but for the driver's threads. What the client saved of a paused container,
//! its writable layer, stays what the processes know. A CUDA process that cannot be locked so, because a thread of it stands
//! in the middle of a call of the driver, runs until it is locked.
//!
//! Why processes are held: a locked process cannot call the driver, but its threads may read what the driver gave them,
//! and the checkpoint takes that away. JAX has such a thread.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cuda::{Answer, Call, CallFailure, CudaResult, Inventory, ProcessState, SHORT_CALL};
use memory::{Layout, Regions};
use phase::Phase;
use proc::{ContainerPid, HostPid, ProcessIds, Range, Stat};
use serde::{Deserialize, Serialize};

mod error;
mod host;
mod put_back;
mod room;
mod still;
mod undo;

pub use error::SessionError;
pub(crate) use host::{Devices, Driver, Freezer, Host, MemoryLeft, Processes, Tracer, Unsupported};
pub(crate) use undo::Undo;
pub use undo::{Owed, Step};

/// Longest time for GPU work in the first try to lock. An idle process is locked within a millisecond.
const FIRST_LOCK: Duration = Duration::from_millis(500);
/// In later tries it is twice as long each time, up to this: what the container cannot compute meanwhile.
const LONGEST_LOCK: Duration = Duration::from_secs(8);
/// Time beyond its timeout that a lock may take to answer.
const LOCK_GRACE: Duration = Duration::from_secs(5);
/// Time until a thawed process is seen as stopped by a signal, if a signal had stopped the process.
const STOPPING: Duration = Duration::from_millis(5);
/// Longest time for a state. The call takes less than a millisecond, and loading libcuda some 20.
const STATE: Duration = Duration::from_secs(3);
/// Longest time between the first file of the driver and the context of a process. cuInit takes 0.3 s.
const INITIALISING: Duration = Duration::from_millis(1500);
/// Longest time for a thread to halt. A thread that waits for a disk takes as long as the disk.
const HALT: Duration = Duration::from_secs(10);
/// Before something is tried again that the driver or another tracer refuses.
const BETWEEN_TRIES: Duration = Duration::from_millis(300);
/// Tries where a process begins to use CUDA meanwhile. State that was moved to memory before is moved back.
const MOST_TRIES: u32 = 3;
/// A container in which processes keep appearing that use CUDA.
const MOST_PASSES: u32 = 100;

/// A container whose GPU state is in its memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Suspended {
    /// The node's GPUs, where NVML says.
    pub inventory: Option<Inventory>,
    /// The CUDA processes.
    pub processes: Vec<SuspendedProcess>,
    /// Processes that have devices of the driver all the same.
    pub devices: Vec<LeftDevices>,
    /// Memory with the state that was on the GPUs, by process, in the order of `processes`.
    pub staging: Vec<Regions>,
}

impl Suspended {
    /// Leaves out the processes that no checkpoint saves: those that are not init's descendants, which were started by exec.
    /// Returns their pids. They have their GPU state in memory like the others, and get it back in a container that goes on.
    pub fn leave_out_execs(&mut self, init: HostPid) -> Vec<HostPid> {
        self.devices.retain(|of| is_descendant(of.process.host, init));
        let (staging, processes) = (std::mem::take(&mut self.staging), std::mem::take(&mut self.processes));
        let mut left_out = Vec::new();
        for (of, process) in staging.into_iter().zip(processes) {
            if is_descendant(of.process.host, init) {
                self.staging.push(of);
                self.processes.push(process);
            } else {
                left_out.push(of.process.host);
            }
        }
        left_out
    }
}

/// Tells whether a process is another one, or was forked from that one's descendants and not handed over since.
#[must_use]
pub fn is_descendant(pid: HostPid, ancestor: HostPid) -> bool {
    let parent = |pid: &HostPid| Stat::of(*pid).ok()?.parent();
    std::iter::successors(Some(pid), parent).take(MOST_GENERATIONS).any(|pid| pid == ancestor)
}

/// More than any tree of processes has.
const MOST_GENERATIONS: usize = 10_000;

/// Devices of the driver that a process has open or mapped beside the GPU state that was moved. CRIU refuses them without
/// its plugin, and a restore without new paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftDevices {
    /// The process.
    pub process: ProcessIds,
    /// Paths to be opened in a restored container, by the numbers of descriptors. A process that was forked from one that
    /// uses CUDA has none: nothing of the driver works in it, before or after.
    pub paths: BTreeMap<u32, PathBuf>,
}

/// Bytes that are worth a mapping of their own.
pub const LEAST_STAGING: u64 = 1 << 20;

/// One CUDA process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SuspendedProcess {
    /// Pid in the container.
    pub pid: ContainerPid,
    /// Bytes that the checkpoint moved to its memory.
    pub staged: u64,
    /// Bytes on each GPU, as far as NVML knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<OnGpu>,
}

/// Memory of one process on one GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OnGpu {
    /// `GPU-` and 36 characters.
    pub uuid: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Result of a resume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resumed {
    /// Processes that have their GPU state back.
    pub restored: usize,
}

pub(crate) struct Session<'a, H: Host> {
    host: &'a mut H,
    undo: &'a mut Undo,
    progress: &'a mut dyn FnMut(Phase),
    /// The steps of this moment undo something, and are no phases of their own.
    is_undoing: bool,
    /// Processes that use CUDA, in the order in which they were found.
    members: Vec<Member>,
    /// The threads of CUDA processes are held since before the thaw.
    are_still: bool,
}

struct Member {
    pid: HostPid,
    /// It was stopped by a signal.
    is_stopped: bool,
    is_locked: bool,
    staged: Vec<Range>,
}

impl<'a, H: Host> Session<'a, H> {
    pub(crate) fn new(host: &'a mut H, undo: &'a mut Undo, progress: &'a mut dyn FnMut(Phase)) -> Self {
        Self { host, undo, progress, is_undoing: false, members: Vec::new(), are_still: false }
    }

    pub(crate) fn host(&mut self) -> &mut H {
        self.host
    }

    /// Moves all GPU state to the memory of its processes and leaves the container frozen. Locking may take until
    /// `patience` is over; the driver may take `limit` for its checkpoint. On failure the container is as before, and
    /// frozen if it was paused, but for what is owed.
    pub(crate) fn suspend(
        mut self,
        paused: bool,
        patience: Duration,
        limit: Duration,
    ) -> Result<Suspended, SessionError> {
        self.undo.aim(paused, &[], limit);
        let begin = Instant::now();
        let mut tries = 0;
        let mut settling_in = STOPPING;
        loop {
            tries += 1;
            let failure = match self.suspend_thawed(settling_in, begin, patience, limit) {
                Ok(suspended) => return Ok(suspended),
                Err(failure) => failure,
            };
            self.is_undoing = true;
            self.members.clear();
            self.are_still = false;
            if let Err(undoing) = self.put_back() {
                return Err(SessionError::NotUndone { failure: failure.into(), undoing: undoing.into() });
            }
            let is_starting = matches!(failure, SessionError::Starting { .. });
            if !is_starting || tries == MOST_TRIES || begin.elapsed() > patience {
                return Err(failure);
            }
            self.is_undoing = false;
            settling_in = INITIALISING;
        }
    }

    fn enter(&mut self, phase: Phase) {
        if !self.is_undoing {
            (self.progress)(phase);
        }
    }

    fn suspend_thawed(
        &mut self,
        settling_in: Duration,
        begin: Instant,
        patience: Duration,
        limit: Duration,
    ) -> Result<Suspended, SessionError> {
        self.enter(Phase::Discover);
        if self.undo.frozen {
            self.hold_still()?;
        }
        self.undo.push(Step::Freezer);
        self.host.thaw()?;
        if self.are_still {
            self.host.settle(HALT)?;
        }
        self.host.sleep(settling_in);
        let mut residue = Vec::new();
        for pass in 0.. {
            if pass == MOST_PASSES {
                return Err(SessionError::Restless);
            }
            residue = self.discover()?;
            if self.members.iter().all(|member| member.is_locked) {
                break;
            }
            self.enter(Phase::Lock);
            self.let_callers_run()?;
            self.lock(begin, patience)?;
            self.enter(Phase::Hold);
            for member in &self.members {
                self.undo.push(Step::Held(member.pid));
                self.host.hold(member.pid)?;
            }
            self.host.settle(HALT)?;
        }
        if self.members.is_empty() && residue.is_empty() {
            self.host.freeze_at_rest()?;
            self.let_go(&[])?;
            return Ok(Suspended::default());
        }
        self.wait_for_beginners(&residue)?;
        if self.undo.frozen {
            self.hold_residue(&residue)?;
        }
        self.enter(Phase::CudaCheckpoint);
        let inventory = self.host.inventory();
        self.check_memory(&inventory)?;
        let inventory = inventory.ok();
        self.note_room(inventory.as_ref());
        self.checkpoint(limit)?;
        let devices = self.check_conditions(&residue)?;
        self.enter(Phase::Freeze);
        for member in self.members.iter().filter(|member| member.is_stopped) {
            self.host.stop(member.pid)?;
        }
        self.host.freeze_at_rest()?;
        // Frozen, they cannot run on.
        self.let_go(&[])?;
        let (mut processes, mut staging) = (Vec::new(), Vec::new());
        for Member { pid, staged, .. } in std::mem::take(&mut self.members) {
            // A process that was killed meanwhile is not saved.
            let Some(process) = self.host.ids(pid) else { continue };
            let gpus = self.undo.room(pid).to_vec();
            processes.push(SuspendedProcess {
                pid: process.container,
                staged: staged.iter().map(Range::len).sum(),
                gpus,
            });
            let ranges = staged.into_iter().filter(|range| range.len() >= LEAST_STAGING).collect();
            staging.push(Regions { process, ranges });
        }
        Ok(Suspended { inventory, processes, devices, staging })
    }

    /// Lets all processes go but these.
    fn let_go(&mut self, keep: &[HostPid]) -> Result<(), SessionError> {
        let let_go = self.host.let_go(keep);
        if let_go.is_ok() {
            for pid in self.undo.pids(Step::Held) {
                if !keep.contains(&pid) {
                    self.undo.done(Step::Held(pid));
                }
            }
        }
        let_go
    }

    /// Finds the CUDA processes that are not members yet; the processes that only touch the GPU are the answer.
    fn discover(&mut self) -> Result<Vec<HostPid>, SessionError> {
        let mut residue = Vec::new();
        for pid in self.host.pids()? {
            if self.members.iter().any(|member| member.pid == pid) || !self.host.touches_gpu(pid) {
                continue;
            }
            let is_stopped = self.host.is_stopped(pid);
            let has_drivers_threads = self.host.has_drivers_threads(pid);
            if is_stopped && has_drivers_threads {
                self.cont(pid)?;
            } else if is_stopped || (!has_drivers_threads && self.undo.has(Step::Held(pid))) {
                // A process that stands still without a thread of the driver has no context, and answers nothing.
                residue.push(pid);
                continue;
            }
            let member = Member { pid, is_stopped, is_locked: false, staged: Vec::new() };
            match self.state(pid)? {
                Some(ProcessState::Running) => {
                    self.refuse_unsupported(pid)?;
                    self.members.push(member);
                }
                Some(state) => {
                    let process = self.host.describe(pid);
                    return Err(SessionError::State { process, state: state.to_string() });
                }
                None => residue.push(pid),
            }
        }
        Ok(residue)
    }

    fn refuse_unsupported(&mut self, pid: HostPid) -> Result<(), SessionError> {
        let unsupported = self.host.unsupported(pid);
        if unsupported.mig {
            return Err(SessionError::Mig { process: self.host.describe(pid) });
        }
        if unsupported.ipc {
            return Err(SessionError::Shared { process: self.host.describe(pid) });
        }
        Ok(())
    }

    /// Lets the driver's threads of a stopped process run.
    fn cont(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.undo.push(Step::Continued(pid));
        self.undo.push(Step::Held(pid));
        self.host.cont(pid)
    }

    /// Waits for processes that touch the GPU without a context: forked, or about to get a context of their own. The
    /// latter must not be freed of the GPU; nor can it be saved half way.
    fn wait_for_beginners(&mut self, residue: &[HostPid]) -> Result<(), SessionError> {
        let members: Vec<HostPid> = self.members.iter().map(|member| member.pid).collect();
        let inherited = self.mappings_of(&members);
        let mut unsure = Vec::new();
        for pid in residue {
            if !self.undo.has(Step::Held(*pid)) && !self.has_inherited(*pid, &inherited) {
                unsure.push(*pid);
            }
        }
        if unsure.is_empty() {
            return Ok(());
        }
        self.host.sleep(INITIALISING);
        for pid in unsure {
            if self.state(pid)?.is_some() {
                return Err(SessionError::Starting { process: self.host.describe(pid) });
            }
        }
        Ok(())
    }

    /// The driver's word on a process; None for one without CUDA, or that is gone.
    fn state(&mut self, pid: HostPid) -> Result<Option<ProcessState>, SessionError> {
        let mut answer = self.host.calls(&[(pid, Call::State)], STATE).pop();
        if answer == Some(Err(CallFailure::Hangs)) && self.host.is_stopped(pid) {
            self.cont(pid)?;
            answer = self.host.calls(&[(pid, Call::State)], SHORT_CALL).pop();
        }
        match answer {
            Some(Ok(Answer::State(state))) => Ok(Some(state)),
            Some(Err(CallFailure::Refused(CudaResult::NOT_INITIALIZED))) => Ok(None),
            Some(Err(_)) if self.host.is_gone(pid) => Ok(None),
            Some(Err(failure)) => Err(self.failed("ask for the state of", pid, &failure)),
            Some(Ok(Answer::Done)) | None => Err(self.failed("ask for the state of", pid, &CallFailure::Died)),
        }
    }

    /// Makes the same call for each of these processes, all at once.
    fn call_each(
        &mut self,
        pids: Vec<HostPid>,
        call: &Call,
        limit: Duration,
    ) -> impl Iterator<Item = (HostPid, Result<Answer, CallFailure>)> + use<H> {
        let calls: Vec<_> = pids.iter().map(|pid| (*pid, call.clone())).collect();
        let results = self.host.calls(&calls, limit);
        pids.into_iter().zip(results)
    }

    fn failed(&mut self, action: &str, pid: HostPid, failure: &CallFailure) -> SessionError {
        if let CallFailure::Impossible(why) = failure {
            return SessionError::NoDriver(why.clone());
        }
        let process = self.host.describe(pid);
        if *failure == CallFailure::Refused(CudaResult::NOT_SUPPORTED) {
            let reason = refusal(action, self.host.unsupported(pid)).to_owned();
            return SessionError::Unsupported { action: action.to_owned(), process, reason };
        }
        SessionError::Call { action: action.to_owned(), process, why: failure.to_string() }
    }

    /// Locks all members that are not. While one is busy the others are unlocked: it may wait for them.
    fn lock(&mut self, begin: Instant, patience: Duration) -> Result<(), SessionError> {
        let mut timeout = FIRST_LOCK;
        loop {
            let left = patience.saturating_sub(begin.elapsed());
            timeout = timeout.min(left).max(Duration::from_millis(1));
            let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
            let wanted: Vec<HostPid> = self.members.iter().filter(|m| !m.is_locked).map(|m| m.pid).collect();
            let mut late = None;
            for pid in &wanted {
                self.undo.push(Step::Locked(*pid));
            }
            let mut failed = None;
            for (pid, result) in self.call_each(wanted, &Call::Lock { timeout_ms }, timeout + LOCK_GRACE) {
                match result {
                    Ok(_) => self.member(pid, |member| member.is_locked = true),
                    Err(CallFailure::Refused(CudaResult::NOT_READY)) => {
                        self.undo.done(Step::Locked(pid));
                        late = Some(pid);
                    }
                    Err(_) if self.host.is_gone(pid) => self.members.retain(|member| member.pid != pid),
                    Err(failure) => failed = failed.or(Some((pid, failure))),
                }
            }
            if let Some((pid, failure)) = failed {
                return Err(self.failed("lock", pid, &failure));
            }
            let Some(late) = late else { return Ok(()) };
            self.unlock_members()?;
            if std::mem::take(&mut self.are_still) {
                // A thread that is held in the middle of a call keeps the driver from its lock. The next try lets it run.
                continue;
            }
            if patience <= begin.elapsed() {
                let process = self.host.describe(late);
                return Err(SessionError::Busy { process, seconds: begin.elapsed().as_secs_f64() });
            }
            self.host.sleep(timeout.min(patience.saturating_sub(begin.elapsed())) / 2);
            timeout = (timeout * 2).min(LONGEST_LOCK);
        }
    }

    fn member(&mut self, pid: HostPid, change: impl FnOnce(&mut Member)) {
        if let Some(member) = self.members.iter_mut().find(|member| member.pid == pid) {
            change(member);
        }
    }

    /// Lets all locked members go on, those that are held too: a later round takes them again.
    fn unlock_members(&mut self) -> Result<(), SessionError> {
        let locked: Vec<HostPid> = self.members.iter().filter(|m| m.is_locked).map(|m| m.pid).rev().collect();
        for (pid, result) in self.call_each(locked, &Call::Unlock, SHORT_CALL) {
            match result {
                Ok(_) => {
                    self.undo.done(Step::Locked(pid));
                    self.member(pid, |member| member.is_locked = false);
                }
                Err(_) if self.host.is_gone(pid) => self.members.retain(|member| member.pid != pid),
                Err(failure) => return Err(self.failed("unlock", pid, &failure)),
            }
        }
        let stopped: Vec<HostPid> = self.members.iter().filter(|m| m.is_stopped).map(|m| m.pid).collect();
        for pid in &stopped {
            self.host.stop(*pid)?;
        }
        let mut others = self.undo.pids(Step::Held);
        others.retain(|pid| !self.members.iter().any(|member| member.pid == *pid));
        self.let_go(&others)?;
        for pid in stopped {
            self.cont(pid)?;
        }
        Ok(())
    }

    fn checkpoint(&mut self, limit: Duration) -> Result<(), SessionError> {
        let pids: Vec<HostPid> = self.members.iter().map(|member| member.pid).collect();
        for pid in &pids {
            self.undo.push(Step::Checkpointed(*pid));
            self.host.staged(*pid, true);
        }
        let mut failure = None;
        for (pid, result) in self.call_each(pids, &Call::Checkpoint, limit) {
            match result {
                Ok(_) => {
                    let staged = self.host.staged(pid, false);
                    self.member(pid, |member| member.staged = staged);
                }
                Err(reason) => failure = Some(self.failed("checkpoint", pid, &reason)),
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Checks the two conditions for a dump: every CUDA process is checkpointed, and nothing else uses the driver but for
    /// NVML. Returns the devices that processes have left.
    fn check_conditions(&mut self, residue: &[HostPid]) -> Result<Vec<LeftDevices>, SessionError> {
        let members: Vec<HostPid> = self.members.iter().map(|member| member.pid).collect();
        for pid in &members {
            match self.state(*pid)? {
                Some(ProcessState::Checkpointed) => {}
                state => {
                    let state = state.map_or_else(|| "gone".to_owned(), |state| state.to_string());
                    return Err(SessionError::State { process: self.host.describe(*pid), state });
                }
            }
        }
        let mut left = Vec::new();
        for pid in self.host.pids()? {
            let devices = self.host.devices(pid);
            if devices.is_empty() {
                continue;
            }
            let is_member = members.contains(&pid);
            if !is_member && !residue.contains(&pid) {
                return Err(SessionError::Starting { process: self.host.describe(pid) });
            }
            let is_useless = !is_member && self.host.has_drivers_library(pid);
            let paths = if is_useless { BTreeMap::new() } else { devices.paths };
            if let Some(process) = self.host.ids(pid) {
                left.push(LeftDevices { process, paths });
            }
        }
        Ok(left)
    }

    /// Puts packs in the place of memory of a container that is suspended, and leaves it so. Returns the memory that stays
    /// as it was. After a failure each process has its data, in memory or in packs.
    pub(crate) fn remap(mut self, layout: &Layout, limit: Duration) -> Result<Vec<Regions>, SessionError> {
        self.enter(Phase::Remap);
        let remapped = self.remap_held(layout, limit);
        // Whatever came of it, nothing may run on: what cannot be frozen stays held.
        self.host.freeze_at_rest()?;
        self.let_go(&[])?;
        remapped
    }

    /// The files have what was in the memory while the container was frozen. It still is: the container is thawed only
    /// when all threads of all its processes, those of the driver too, have been told to halt, which they do before they
    /// execute anything. And what could write to it without a thread, a device, was closed by the driver's checkpoint.
    fn remap_held(&mut self, layout: &Layout, limit: Duration) -> Result<Vec<Regions>, SessionError> {
        let is_remapped = |pid: &HostPid| layout.processes.iter().any(|of| of.process.host == *pid);
        let (stopped, mut pids): (Vec<HostPid>, Vec<HostPid>) =
            self.host.pids()?.into_iter().partition(|pid| self.host.is_stopping(*pid));
        // Of those that are stopped the others need no hold, and CRIU finds them as it likes them.
        let stopped: Vec<HostPid> = stopped.into_iter().filter(is_remapped).collect();
        pids.extend(&stopped);
        self.hold_all(&pids, H::hold_whole)?;
        self.undo.push(Step::Freezer);
        self.host.thaw()?;
        self.host.settle(HALT)?;
        for pid in &stopped {
            self.cont(*pid)?;
        }
        let mut left = Vec::new();
        let mut failure = None;
        for of in &layout.processes {
            match self.host.remap(&layout.packs, of, limit) {
                Ok(ranges) => left.push(Regions { process: of.process, ranges }),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        for pid in &stopped {
            match self.host.stop(*pid) {
                Ok(()) => self.undo.done(Step::Continued(*pid)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(left), Err)
    }
}

/// Returns why the driver answers that it does not support a process.
fn refusal(action: &str, uses: Unsupported) -> &'static str {
    match (uses, action) {
        (Unsupported { cupti: true, .. }, _) => {
            "it has loaded CUPTI, as a profiler does (torch.profiler, nsys): start it again and do not profile it"
        }
        (Unsupported { mps: true, .. }, _) => "it uses the multi-process service (MPS): run it without",
        (_, "checkpoint") => {
            "it uses CUDA managed memory (cudaMallocManaged), or shares GPU memory by CUDA IPC: use ordinary device memory"
        }
        _ => "it uses what cannot be checkpointed: CUPTI (a profiler), MPS, MIG, or CUDA IPC",
    }
}

#[cfg(test)]
mod tests;
