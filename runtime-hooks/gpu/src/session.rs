//! One container's way out of the GPU and back: the state machine of a guardian.
//!
//! ```text
//!            thaw        ┌────────────── a process that was not there before ─────────────┐
//!  frozen ────────► Discover ──► Lock ──► Hold ──► (anything new?) ───────────────────────┘
//!                                 ▲ │                    │ no
//!               growing waits:    │ │ late               ▼
//!               all are unlocked ─┘ │             CudaCheckpoint ──► CleanResidue ──► (all conditions?)
//!                                   │                    │                │                 │ yes
//!                                   └────────────────────┴────────────────┤ failure         ▼
//!                                                                         ▼          Freeze, let go: Suspended
//!        as it was before  ◄──────────────────────────────────────── roll back              │
//!                 ▲                                                                         │ resume, or the shim dies
//!                 └── let go ◄── (Freeze) ◄── Unlock ◄── CudaRestore ◄── thaw ◄── Hold ◄────┘
//! ```
//!
//! While it is suspended, files may take the place of memory (`swap`): it is held as a whole, thawed, and frozen again, and
//! is suspended before and after.
//!
//! A restored container whose memory is not all in place yet (`resume_unfilled`) is held as a whole as well, from before the
//! thaw until the rest is there. What goes wrong on the way freezes it, for somebody to end it.
//!
//! A process that begins to use CUDA meanwhile can neither be freed of the GPU nor saved half way: all is put back, and tried again
//! when it has begun.
//!
//! Nothing is remembered that the driver does not know better: what has to be undone is asked from the driver, process by
//! process. So a guardian that takes the place of one that died does the same as one that has seen it all, and there is
//! no journal that could be wrong.
//!
//! Why processes are held: a locked process cannot call the driver, but its threads may read what the driver gave them,
//! and the checkpoint takes that away. JAX has such a thread.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use phase::Phase;
use serde::{Deserialize, Serialize};

use crate::swap::{Swap, SwapProcess, Swapped, SwappedProcess};
use cuda::Inventory;
use cuda::{Answer, Call, CallFailure, SHORT_CALL};
use cuda::{CudaResult, ProcessState};
use tracee::process::Range;

mod put_back;

/// How long GPU work may take in the first try to lock. An idle process is locked within a millisecond.
const FIRST_LOCK: Duration = Duration::from_millis(500);
/// In later tries it is twice as long each time, up to this: what the container cannot compute meanwhile.
const LONGEST_LOCK: Duration = Duration::from_secs(8);
/// How much longer than its timeout a lock may take to answer.
const LOCK_GRACE: Duration = Duration::from_secs(5);
/// How long a process takes, once it is thawed, to be seen as stopped by a signal if it was.
const STOPPING: Duration = Duration::from_millis(5);
/// How long a state may take: it costs less than a millisecond, and loading libcuda some 20.
const STATE: Duration = Duration::from_secs(3);
/// How long a process may have something of the driver's and no context, on its way to have one. cuInit takes 0.3 s.
const INITIALISING: Duration = Duration::from_millis(1500);
/// How long a thread may take to come to a halt. One that waits for a disk takes as long as the disk.
const HALT: Duration = Duration::from_secs(10);
/// Before something is tried again that the driver or another tracer refuses.
const BETWEEN_TRIES: Duration = Duration::from_millis(300);
/// How often it is tried where a process begins to use CUDA meanwhile. What was moved to memory before it was seen is moved back.
const MOST_TRIES: u32 = 3;
/// A container in which processes keep appearing that use CUDA.
const MOST_PASSES: u32 = 100;

/// What a session does to a machine. Tests put a fake one in.
pub(crate) trait Host {
    /// Every process of the container, in the guardian's pid namespace.
    fn pids(&mut self) -> Result<Vec<i32>, SessionError>;
    /// The process has something of the driver's: mappings, descriptors, threads.
    fn touches_gpu(&mut self, pid: i32) -> bool;
    /// The process has threads of the driver's.
    fn has_drivers_threads(&mut self, pid: i32) -> bool;
    /// What is left of the driver in the process: the first mapping or descriptor.
    fn left(&mut self, pid: i32) -> Option<String>;
    fn is_gone(&mut self, pid: i32) -> bool;
    /// Who a process is, and what keeps it from answering, in words.
    fn describe(&mut self, pid: i32) -> String;
    fn namespace_pid(&mut self, pid: i32) -> i32;
    /// Anonymous memory of the process that came since it was asked first.
    fn staged(&mut self, pid: i32, is_first: bool) -> Vec<Range>;
    /// Makes all calls at once, and holds on to what is held meanwhile.
    fn calls(&mut self, calls: &[(i32, Call)], limit: Duration) -> Vec<Result<Answer, CallFailure>>;
    fn inventory(&mut self) -> Result<Inventory, CallFailure>;
    /// Bytes that the container may still use, and what limits them.
    fn memory_left(&mut self) -> Option<(u64, String)>;
    fn freeze(&mut self) -> Result<(), SessionError>;
    /// Freezes at a moment when what is there can be dumped.
    fn freeze_at_rest(&mut self) -> Result<(), SessionError>;
    fn thaw(&mut self) -> Result<(), SessionError>;
    /// Asks all threads but the driver's to halt, as soon as they can.
    fn hold(&mut self, pid: i32) -> Result<(), SessionError>;
    /// As [`Self::hold`], the driver's too.
    fn hold_whole(&mut self, pid: i32) -> Result<(), SessionError>;
    /// Waits until those that are held stand still.
    fn settle(&mut self, limit: Duration) -> Result<(), SessionError>;
    fn let_go(&mut self);
    fn is_stopped(&mut self, pid: i32) -> bool;
    /// It was stopped by a signal, or put to sleep.
    fn is_asleep(&mut self, pid: i32) -> bool;
    /// Where it has devices of the driver mapped: begin and end.
    fn mappings(&mut self, pid: i32) -> Vec<(u64, u64)>;
    /// Lets the driver's threads of a stopped process run, and nothing else of it.
    fn wake(&mut self, pid: i32) -> Result<(), SessionError>;
    /// Stops it again.
    fn put_to_sleep(&mut self, pid: i32) -> Result<(), SessionError>;
    /// Frees a process that has no context of the driver's mappings and descriptors; how many there were.
    fn clean(&mut self, pid: i32) -> Result<usize, SessionError>;
    /// Puts files in the place of memory of a process that is held; what was left as it is.
    fn swap(&mut self, files: &[PathBuf], process: &SwapProcess, limit: Duration) -> Result<Vec<Range>, SessionError>;
    /// Gives processes that are held the staging memory that was saved. It may go on beside calls of the driver, until the
    /// next.
    fn map_staging(&mut self, staging: &Swap, limit: Duration) -> Result<(), SessionError>;
    /// Waits until all of it is there, and what was saved.
    fn finish_staging(&mut self, limit: Duration) -> Result<(), SessionError>;
    fn sleep(&mut self, time: Duration);
}

/// Why a session failed. It crosses from the guardian to the shim, so sources are words.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionError {
    /// GPU work outlasted the deadline.
    #[error("{process} has had GPU work under way for {seconds:.0} s: try again when it is done, or allow more time")]
    Busy {
        /// Pid and name.
        process: String,
        /// How long was tried.
        seconds: f64,
    },
    /// The driver cannot checkpoint managed memory.
    #[error("{process} uses CUDA managed memory (cudaMallocManaged), which the driver cannot checkpoint")]
    Managed {
        /// Pid and name.
        process: String,
    },
    /// Somebody else checkpoints the process, or the driver gave it up.
    #[error("{process} is {state} already, as the driver says, and not by gpusnap")]
    State {
        /// Pid and name.
        process: String,
        /// The driver's word.
        state: String,
    },
    /// The driver refused a call, or did not answer.
    #[error("cannot {action} {process}: {why}")]
    Call {
        /// "lock", "checkpoint", ...
        action: String,
        /// Pid and name, and what state it is in.
        process: String,
        /// What the driver said.
        why: String,
    },
    /// A process could not be held, freed or described.
    #[error("cannot {action} {process}: {why}")]
    Process {
        /// "hold", "clean", ...
        action: String,
        /// Pid and name.
        process: String,
        /// Why not.
        why: String,
    },
    /// The state on the GPUs would not fit into memory.
    #[error(
        "{gib:.1} GiB on the GPU have to be moved to memory, and {left:.1} GiB are left ({limit}): give it more memory"
    )]
    Memory {
        /// What is on the GPUs.
        gib: f64,
        /// What is left.
        left: f64,
        /// What leaves no more: the container's limit or the machine.
        limit: String,
    },
    /// After the checkpoint something of the driver is left, which CRIU cannot dump.
    #[error("{process} still holds {what}, which cannot be saved")]
    Left {
        /// Pid and name.
        process: String,
        /// A mapping or descriptor, with its path.
        what: String,
    },
    /// A process was in the middle of its start.
    #[error("{process} is about to use CUDA: try again when it does")]
    Starting {
        /// Pid and name.
        process: String,
    },
    /// New processes that use CUDA kept appearing.
    #[error("processes that use CUDA keep appearing in the container")]
    Restless,
    /// The container's cgroup could not be read, frozen or thawed.
    #[error("cannot {action} the container: {why}")]
    Container {
        /// "freeze", ...
        action: String,
        /// Why not.
        why: String,
    },
    /// The rest of a container's memory did not come.
    #[error("its memory could not be put back")]
    Unfilled,
    /// Nothing of the container can call the driver.
    #[error("{0}")]
    NoDriver(String),
    /// The session failed, and could not be undone either.
    #[error("{failure}; and the GPU state could not be put back: {undoing}")]
    NotUndone {
        /// What failed first.
        failure: Box<Self>,
        /// What failed then.
        undoing: Box<Self>,
    },
}

/// A container whose GPU state is in its memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Suspended {
    /// The node's GPUs, where NVML says.
    pub inventory: Option<Inventory>,
    /// The CUDA processes.
    pub processes: Vec<SuspendedProcess>,
    /// Processes without a context that were freed of the driver: how many.
    pub cleaned: usize,
    /// Where the state is that was on the GPUs, by process, in the order of `processes`.
    pub staging: Vec<Staging>,
}

/// The memory of a process to which the driver has moved what the process had on GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Staging {
    /// In the pid namespace of the guardian, which is the shim's.
    pub pid: i32,
    /// In its own, innermost pid namespace.
    pub namespace_pid: i32,
    /// The mappings, in order of addresses: all that are new and [`LEAST_STAGING`] long at least.
    pub ranges: Vec<Range>,
}

/// What is shorter than this, in bytes, is not worth a mapping of its own.
pub const LEAST_STAGING: u64 = 1 << 20;

/// One CUDA process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SuspendedProcess {
    /// In its own, innermost pid namespace.
    pub pid: i32,
    /// Bytes that the checkpoint moved to its memory.
    pub staged: u64,
}

/// What a resume did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resumed {
    /// Processes that have their GPU state back.
    pub restored: usize,
}

pub(crate) struct Session<'a, H: Host> {
    host: &'a mut H,
    progress: &'a mut dyn FnMut(Phase),
    /// What is done now undoes something, and is no phase of its own.
    is_undoing: bool,
    /// Processes that use CUDA, in the order in which they were found, with whether they were stopped by a signal.
    members: Vec<Member>,
}

struct Member {
    pid: i32,
    is_stopped: bool,
    is_locked: bool,
    staged: Vec<Range>,
}

impl<'a, H: Host> Session<'a, H> {
    pub(crate) fn new(host: &'a mut H, progress: &'a mut dyn FnMut(Phase)) -> Self {
        Self { host, progress, is_undoing: false, members: Vec::new() }
    }

    /// Moves all GPU state to the memory of its processes and leaves the container frozen. Locking may take until
    /// `patience` is over; the driver may take `limit` for its checkpoint. On failure the container is as before, and
    /// frozen if it was paused.
    pub(crate) fn suspend(
        mut self,
        paused: bool,
        patience: Duration,
        limit: Duration,
    ) -> Result<Suspended, SessionError> {
        let begin = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let failure = match self.suspend_thawed(begin, patience, limit) {
                Ok(suspended) => return Ok(suspended),
                Err(failure) => failure,
            };
            self.is_undoing = true;
            let members = self.members.drain(..).map(|member| (member.pid, member.is_stopped)).collect();
            if let Err(undoing) = self.put_back(Some(members), paused, &[], limit) {
                return Err(SessionError::NotUndone { failure: failure.into(), undoing: undoing.into() });
            }
            let is_starting = matches!(failure, SessionError::Starting { .. });
            if !is_starting || tries == MOST_TRIES || begin.elapsed() > patience {
                return Err(failure);
            }
            self.is_undoing = false;
            self.host.thaw()?;
            self.host.sleep(INITIALISING);
        }
    }

    fn enter(&mut self, phase: Phase) {
        if !self.is_undoing {
            (self.progress)(phase);
        }
    }

    fn suspend_thawed(
        &mut self,
        begin: Instant,
        patience: Duration,
        limit: Duration,
    ) -> Result<Suspended, SessionError> {
        self.enter(Phase::Discover);
        self.host.thaw()?;
        self.host.sleep(STOPPING);
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
            self.lock(begin, patience)?;
            self.enter(Phase::Hold);
            for member in &self.members {
                self.host.hold(member.pid)?;
            }
            self.host.settle(HALT)?;
        }
        if self.members.is_empty() && residue.is_empty() {
            self.host.freeze_at_rest()?;
            return Ok(Suspended::default());
        }
        self.wait_for_beginners(&residue)?;
        self.enter(Phase::CudaCheckpoint);
        let inventory = self.host.inventory().ok();
        if let Some(inventory) = &inventory {
            self.check_memory(inventory)?;
        }
        self.checkpoint(limit)?;
        self.enter(Phase::CleanResidue);
        let mut cleaned = 0;
        for pid in &residue {
            if self.host.clean(*pid)? > 0 {
                cleaned += 1;
            }
        }
        self.check_conditions(&residue)?;
        self.enter(Phase::Freeze);
        for member in self.members.iter().filter(|member| member.is_stopped) {
            self.host.put_to_sleep(member.pid)?;
        }
        self.host.freeze_at_rest()?;
        // Frozen, they cannot run on.
        self.host.let_go();
        let (mut processes, mut staging) = (Vec::new(), Vec::new());
        for Member { pid, staged, .. } in std::mem::take(&mut self.members) {
            let namespace_pid = self.host.namespace_pid(pid);
            processes.push(SuspendedProcess { pid: namespace_pid, staged: staged.iter().map(Range::len).sum() });
            let ranges = staged.into_iter().filter(|range| range.len() >= LEAST_STAGING).collect();
            staging.push(Staging { pid, namespace_pid, ranges });
        }
        Ok(Suspended { inventory, processes, cleaned, staging })
    }

    /// Finds the CUDA processes that are not members yet; the processes that only touch the GPU are the answer.
    fn discover(&mut self) -> Result<Vec<i32>, SessionError> {
        let mut residue = Vec::new();
        for pid in self.host.pids()? {
            if self.members.iter().any(|member| member.pid == pid) || !self.host.touches_gpu(pid) {
                continue;
            }
            let is_stopped = self.host.is_stopped(pid);
            if is_stopped && self.host.has_drivers_threads(pid) {
                self.host.wake(pid)?;
            } else if is_stopped {
                // Without a thread of the driver's there is nobody to answer, nor a context.
                residue.push(pid);
                continue;
            }
            let member = Member { pid, is_stopped, is_locked: false, staged: Vec::new() };
            match self.state(pid)? {
                Some(ProcessState::Running) => self.members.push(member),
                Some(state) => {
                    let process = self.host.describe(pid);
                    return Err(SessionError::State { process, state: state.to_string() });
                }
                None => residue.push(pid),
            }
        }
        Ok(residue)
    }

    /// What touches the GPU without a context was forked from a process that has one, or is about to get its own. The
    /// latter must not be freed of the GPU; nor can it be saved half way.
    fn wait_for_beginners(&mut self, residue: &[i32]) -> Result<(), SessionError> {
        let mut inherited: Vec<(u64, u64)> = Vec::new();
        for pid in self.members.iter().map(|member| member.pid).collect::<Vec<_>>() {
            inherited.extend(self.host.mappings(pid));
        }
        let mut unsure = Vec::new();
        for pid in residue {
            let mappings = self.host.mappings(*pid);
            if mappings.is_empty() || !mappings.iter().all(|mapping| inherited.contains(mapping)) {
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
    fn state(&mut self, pid: i32) -> Result<Option<ProcessState>, SessionError> {
        let mut answer = self.host.calls(&[(pid, Call::State)], STATE).pop();
        if answer == Some(Err(CallFailure::Hangs)) && self.host.is_stopped(pid) {
            self.host.wake(pid)?;
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
        pids: Vec<i32>,
        call: &Call,
        limit: Duration,
    ) -> impl Iterator<Item = (i32, Result<Answer, CallFailure>)> + use<H> {
        let calls: Vec<_> = pids.iter().map(|pid| (*pid, call.clone())).collect();
        let results = self.host.calls(&calls, limit);
        pids.into_iter().zip(results)
    }

    fn failed(&mut self, action: &str, pid: i32, failure: &CallFailure) -> SessionError {
        if let CallFailure::Impossible(why) = failure {
            return SessionError::NoDriver(why.clone());
        }
        let process = self.host.describe(pid);
        if *failure == CallFailure::Refused(CudaResult::NOT_SUPPORTED) && action == "checkpoint" {
            return SessionError::Managed { process };
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
            let wanted: Vec<i32> = self.members.iter().filter(|m| !m.is_locked).map(|m| m.pid).collect();
            let mut late = None;
            for (pid, result) in self.call_each(wanted, &Call::Lock { timeout_ms }, timeout + LOCK_GRACE) {
                match result {
                    Ok(_) => self.member(pid, |member| member.is_locked = true),
                    Err(CallFailure::Refused(CudaResult::NOT_READY)) => late = Some(pid),
                    Err(_) if self.host.is_gone(pid) => self.members.retain(|member| member.pid != pid),
                    Err(failure) => return Err(self.failed("lock", pid, &failure)),
                }
            }
            let Some(late) = late else { return Ok(()) };
            self.unlock_members()?;
            if patience <= begin.elapsed() {
                let process = self.host.describe(late);
                return Err(SessionError::Busy { process, seconds: begin.elapsed().as_secs_f64() });
            }
            self.host.sleep(timeout.min(patience.saturating_sub(begin.elapsed())) / 2);
            timeout = (timeout * 2).min(LONGEST_LOCK);
        }
    }

    fn member(&mut self, pid: i32, change: impl FnOnce(&mut Member)) {
        if let Some(member) = self.members.iter_mut().find(|member| member.pid == pid) {
            change(member);
        }
    }

    /// Lets all locked members go on, those that are held too: a later round takes them again.
    fn unlock_members(&mut self) -> Result<(), SessionError> {
        let locked: Vec<i32> = self.members.iter().filter(|m| m.is_locked).map(|m| m.pid).rev().collect();
        for (pid, result) in self.call_each(locked, &Call::Unlock, SHORT_CALL) {
            match result {
                Ok(_) => self.member(pid, |member| member.is_locked = false),
                Err(_) if self.host.is_gone(pid) => self.members.retain(|member| member.pid != pid),
                Err(failure) => return Err(self.failed("unlock", pid, &failure)),
            }
        }
        let stopped: Vec<i32> = self.members.iter().filter(|m| m.is_stopped).map(|m| m.pid).collect();
        for pid in &stopped {
            self.host.put_to_sleep(*pid)?;
        }
        self.host.let_go();
        for pid in stopped {
            self.host.wake(pid)?;
        }
        Ok(())
    }

    /// The driver fills the memory of the processes, and the kernel would kill them for it.
    fn check_memory(&mut self, inventory: &Inventory) -> Result<(), SessionError> {
        let is_member = |pid: u32| self.members.iter().any(|member| member.pid.unsigned_abs() == pid);
        let processes = inventory.gpus.iter().flat_map(|gpu| &gpu.processes);
        let needed: u64 = processes.filter(|p| is_member(p.pid)).filter_map(|p| p.memory).sum();
        match self.host.memory_left() {
            Some((left, limit)) if left < needed => {
                Err(SessionError::Memory { gib: gib(needed), left: gib(left), limit })
            }
            _ => Ok(()),
        }
    }

    fn checkpoint(&mut self, limit: Duration) -> Result<(), SessionError> {
        let pids: Vec<i32> = self.members.iter().map(|member| member.pid).collect();
        for pid in &pids {
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

    /// The two conditions for a dump: every CUDA process is checkpointed, and nothing of the driver is in use.
    fn check_conditions(&mut self, residue: &[i32]) -> Result<(), SessionError> {
        let members: Vec<i32> = self.members.iter().map(|member| member.pid).collect();
        for pid in &members {
            match self.state(*pid)? {
                Some(ProcessState::Checkpointed) => {}
                state => {
                    let state = state.map_or_else(|| "gone".to_owned(), |state| state.to_string());
                    return Err(SessionError::State { process: self.host.describe(*pid), state });
                }
            }
        }
        for pid in self.host.pids()? {
            if let Some(what) = self.host.left(pid) {
                let process = self.host.describe(pid);
                let is_known = members.contains(&pid) || residue.contains(&pid);
                return Err(if is_known {
                    SessionError::Left { process, what }
                } else {
                    SessionError::Starting { process }
                });
            }
        }
        Ok(())
    }

    /// Puts files in the place of memory of a container that is suspended, and leaves it so. What came of a failure is
    /// left as it is: each process has its data.
    pub(crate) fn swap(mut self, swap: &Swap, limit: Duration) -> Result<Swapped, SessionError> {
        self.enter(Phase::Swap);
        let swapped = self.swap_held(swap, limit);
        // Whatever came of it, nothing may run on.
        let frozen = self.host.freeze_at_rest();
        self.host.let_go();
        frozen.and(swapped)
    }

    /// The files have what was in the memory while the container was frozen. It still is: the container is thawed only
    /// when all threads of all its processes, those of the driver too, have been told to halt, which they do before they
    /// execute anything. And what could write to it without a thread, a device, was closed by the driver's checkpoint.
    fn swap_held(&mut self, swap: &Swap, limit: Duration) -> Result<Swapped, SessionError> {
        let is_swapped = |pid: &i32| swap.processes.iter().any(|process| process.pid == *pid);
        let (asleep, mut pids): (Vec<i32>, Vec<i32>) =
            self.host.pids()?.into_iter().partition(|pid| self.host.is_asleep(*pid));
        // Of those that sleep the others need no hold, and CRIU finds them as it likes them.
        let asleep: Vec<i32> = asleep.into_iter().filter(is_swapped).collect();
        pids.extend(&asleep);
        self.hold_all(&pids, H::hold_whole)?;
        self.host.thaw()?;
        self.host.settle(HALT)?;
        for pid in &asleep {
            self.host.wake(*pid)?;
        }
        let mut swapped = Swapped::default();
        let mut failure = None;
        for process in &swap.processes {
            match self.host.swap(&swap.files, process, limit) {
                Ok(left) => swapped.processes.push(SwappedProcess { pid: process.pid, left }),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        for pid in &asleep {
            self.host.put_to_sleep(*pid)?;
        }
        failure.map_or(Ok(swapped), Err)
    }
}

/// For messages.
fn gib(bytes: u64) -> f64 {
    Duration::from_nanos(bytes).as_secs_f64() * 1e9 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests;
