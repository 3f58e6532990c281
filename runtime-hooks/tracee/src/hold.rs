//! Threads of processes held still by ptrace, but for those that their holder spares.
//!
//! All is done by `PTRACE_SEIZE`, never by attaching: whatever becomes of this process, its end lets the threads run on.
//! For that, stops are looked at without being consumed: a signal in whose delivery a thread stands is then delivered
//! even when this process is killed. The exception are processes that must not run yet ([`Hold::with_exit_kill`]).

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use proc::{HostPid, Stat, Status, Wait};
use rustix::process::{Pid, WaitId, WaitIdOptions};

mod error;
mod jobs;
#[allow(unsafe_code)]
pub(crate) mod sys;
#[cfg(test)]
mod tests;

use crate::process::{self, RunState};
pub use error::{HoldError, ReleaseError};
pub use jobs::{JobError, is_stopping};

/// Longest time that [`Hold::let_go`] waits for threads that do not stand still yet, or are dying. Standing still
/// takes microseconds, unless a thread is in an uninterruptible wait.
const GRACE: Duration = Duration::from_millis(500);

/// Pauses between two looks: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(2));

/// Threads that this thread holds by ptrace.
///
/// All calls come from the thread that made it, which is the tracer of what is held; the end of that thread lets all
/// go. Its other children are none of its business: it waits for the threads that it took, by their ids.
///
/// One trap is the kernel's: a thread that has begun `execve` waits for its process's other threads to be reaped, and
/// blocks whoever takes the next thread until then. Only the end of this process resolves that.
#[derive(Debug)]
pub struct Hold {
    processes: BTreeMap<HostPid, Held>,
    spares: Spares,
    /// The end of this thread ends what is held (`PTRACE_O_EXITKILL`).
    exit_kill: bool,
    /// Not to be sent to another thread.
    tracer: PhantomData<*const ()>,
}

/// The threads of a process, of those given, that are to run on while the others are held.
pub type Spares = fn(pid: HostPid, threads: &[proc::Thread]) -> Vec<i32>;

/// Threads of one process that are held.
#[derive(Debug)]
struct Held {
    scope: Scope,
    /// As [`Hold::exit_kill`].
    exit_kill: bool,
    threads: BTreeMap<i32, Stand>,
}

/// Choice of the threads of a process that are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All but the spared.
    Program,
    /// All.
    All,
}

/// State of a thread that was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// It was told to stop.
    Called,
    /// It stands still, in the delivery of this signal if it is not 0.
    Still {
        /// The signal.
        signal: i32,
    },
    /// It is the first thread of a process whose other threads live, and has ended. It can be waited for only after
    /// them.
    Ended,
}

impl Hold {
    /// Nothing is held yet.
    #[must_use]
    pub fn new(spares: Spares) -> Self {
        Self { processes: BTreeMap::new(), spares, exit_kill: false, tracer: PhantomData }
    }

    /// Nothing is held yet. What will be must not run before it is let go, and so the end of the thread that calls this, or of
    /// this process, kills the processes that it holds then.
    #[must_use]
    pub fn with_exit_kill(spares: Spares) -> Self {
        let mut hold = Self::new(spares);
        hold.exit_kill = true;
        hold
    }

    /// Whether it was made by [`Self::with_exit_kill`].
    #[must_use]
    pub fn is_exit_kill(&self) -> bool {
        self.exit_kill
    }

    /// Tells every thread of a process to stop, except the spared, and does not wait until they do.
    ///
    /// The process may be running, stopped by a signal, or in a frozen cgroup. What is frozen stops when it is thawed,
    /// before it executes anything of its program.
    ///
    /// # Errors
    /// When it has ended, or another process traces it.
    pub fn take(&mut self, pid: HostPid) -> Result<(), HoldError> {
        self.take_scope(pid, Scope::Program)
    }

    /// As [`Self::take`], of these threads of it.
    ///
    /// # Errors
    /// As for [`Self::take`].
    pub fn take_scope(&mut self, pid: HostPid, scope: Scope) -> Result<(), HoldError> {
        if process::run_state(pid) == RunState::Dead {
            return Err(HoldError::Gone { pid });
        }
        let (exit_kill, spares) = (self.exit_kill, self.spares);
        let held = self.processes.entry(pid).or_insert(Held { scope, exit_kill, threads: BTreeMap::new() });
        if scope == Scope::All {
            held.scope = scope;
        }
        held.call_new(pid, spares)?;
        Ok(())
    }

    /// Fails if another process traces a thread of a process that is not held here.
    ///
    /// # Errors
    /// [`HoldError::Traced`] names the thread and the tracer.
    pub fn refuse_traced(&self, pid: HostPid) -> Result<(), HoldError> {
        if self.processes.contains_key(&pid) {
            return Ok(());
        }
        // A process that has ended is traced by none.
        for proc::Thread { tid, .. } in proc::threads(pid).unwrap_or_default() {
            refuse_traced(pid, tid)?;
        }
        Ok(())
    }

    /// Waits until all that were taken stand still, and takes threads that have appeared meanwhile, until there are
    /// none. What is frozen by the v1 freezer does not get there before it is thawed. Processes that have ended are
    /// not held any more.
    ///
    /// # Errors
    /// When a thread does not stop by the deadline, or a new one cannot be taken.
    pub fn settle(&mut self, deadline: Instant) -> Result<(), HoldError> {
        self.settle_those(deadline, |_| true)
    }

    /// As [`Self::settle`], of one process.
    ///
    /// # Errors
    /// As for [`Self::settle`].
    pub fn settle_only(&mut self, pid: HostPid, deadline: Instant) -> Result<(), HoldError> {
        self.settle_those(deadline, |other| other == pid)
    }

    fn settle_those(&mut self, deadline: Instant, concerns: impl Fn(HostPid) -> bool) -> Result<(), HoldError> {
        let mut pause = PAUSE.0;
        loop {
            let mut moving = None;
            for (pid, held) in &mut self.processes {
                let looked = held.look(*pid);
                if !concerns(*pid) {
                    // Only reaped: one that ends with its namespace's first process keeps that one from ending.
                    continue;
                }
                looked?;
                let called = held.threads.iter().find(|(_, stand)| **stand == Stand::Called);
                moving = moving.or(called.map(|(tid, _)| (*pid, *tid)));
                // After the look: what stands still clones nothing, so a thread that is not seen now will not come.
                moving = moving.or(held.call_new(*pid, self.spares)?.map(|tid| (*pid, tid)));
            }
            self.forget_dead();
            let Some((pid, tid)) = moving else { return Ok(()) };
            if Instant::now() >= deadline {
                return Err(HoldError::Moving { wait: Wait::of(pid, tid), reason: error::reason(pid) });
            }
            std::thread::sleep(pause);
            pause = PAUSE.1.min(pause * 2);
        }
    }

    /// Reaps threads that have died and takes new ones. To be called now and then while holding: nobody else, not the
    /// parent of the process, learns of the death of a held thread before this process has seen it.
    ///
    /// # Errors
    /// When a new thread cannot be taken.
    pub fn watch(&mut self) -> Result<(), HoldError> {
        for (pid, held) in &mut self.processes {
            held.look(*pid)?;
            held.call_new(*pid, self.spares)?;
        }
        self.forget_dead();
        Ok(())
    }

    /// Returns the number of threads that are held, those that do not stand still yet included.
    #[must_use]
    pub fn held(&self) -> usize {
        self.processes.values().map(|held| held.threads.len()).sum()
    }

    /// The processes that have been taken and not been let go, as far as is known.
    pub fn pids(&self) -> impl Iterator<Item = HostPid> + '_ {
        self.processes.keys().copied()
    }

    /// Lets all go. A signal in whose delivery a thread stands is delivered, and what was sent to the processes
    /// meanwhile too. What is in a frozen cgroup stays frozen.
    ///
    /// # Errors
    /// When a thread does not stand still within half a second, because it is frozen by the v1 freezer and was not
    /// settled before, or because it waits uninterruptibly, or when one is dying for so long. All others are let go.
    /// It can be tried again, and the end of this process lets those go too.
    pub fn let_go(&mut self) -> Result<(), ReleaseError> {
        self.let_go_those(|_, _| true)
    }

    /// Lets all processes go but these, as [`Self::let_go`] does all.
    ///
    /// # Errors
    /// As for [`Self::let_go`].
    pub fn let_go_but(&mut self, keep: &[HostPid]) -> Result<(), ReleaseError> {
        self.let_go_those(|of, _| !keep.contains(&of))
    }

    fn let_go_those(&mut self, concerns: impl Fn(HostPid, i32) -> bool) -> Result<(), ReleaseError> {
        let deadline = Instant::now() + GRACE;
        let mut pause = PAUSE.0;
        loop {
            let mut refused = None;
            for (pid, held) in &mut self.processes {
                // The dead of those that are kept as well: see `settle_those`.
                let _ = held.look(*pid);
                refused = refused.or(held.detach(*pid, |tid| concerns(*pid, tid)).err());
            }
            self.processes.retain(|_, held| !held.threads.is_empty());
            let threads = |(pid, held): (&HostPid, &Held)| {
                let pid = *pid;
                let threads: Vec<_> = held.threads.iter().map(|(tid, stand)| (pid, *tid, *stand)).collect();
                threads
            };
            let mut left: Vec<_> = self.processes.iter().flat_map(threads).collect();
            left.retain(|(pid, tid, _)| concerns(*pid, *tid));
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                // Who has ended cannot be detached from. If the other threads are not dying they are let go, and this
                // one is waited for when they have ended.
                let lives = |pid: HostPid| process::run_state(pid) != RunState::Dead;
                let moving = |(pid, _, stand): &&(HostPid, i32, Stand)| *stand != Stand::Ended || !lives(*pid);
                let mut left = left.iter().filter(moving);
                let Some((pid, tid, _)) = left.next().copied() else { return refused.map_or(Ok(()), Err) };
                let (wait, others) = (Wait::of(pid, tid), left.count());
                let moving = ReleaseError::Moving { wait, others, reason: error::reason(pid) };
                return Err(refused.unwrap_or(moving));
            }
            std::thread::sleep(pause);
            pause = PAUSE.1.min(pause * 2);
        }
    }

    /// Lets the spared threads of one process go, which were taken with the others.
    ///
    /// # Errors
    /// As for [`Self::let_go`].
    pub fn let_spared_go(&mut self, pid: HostPid) -> Result<(), ReleaseError> {
        if let Some(held) = self.processes.get_mut(&pid) {
            held.scope = Scope::Program;
        }
        let threads = proc::threads(pid).unwrap_or_default();
        let spared = (self.spares)(pid, &threads);
        self.let_go_those(|of, tid| of == pid && spared.contains(&tid))
    }

    /// The threads of a process that stand still, with the signals in whose delivery they do.
    pub fn still(&self, pid: HostPid) -> Vec<(i32, i32)> {
        let threads = self.processes.get(&pid).map(|held| &held.threads);
        let still = |(tid, stand): (&i32, &Stand)| match stand {
            Stand::Still { signal } => Some((*tid, *signal)),
            Stand::Called | Stand::Ended => None,
        };
        threads.into_iter().flatten().filter_map(still).collect()
    }

    /// Suspends the seccomp filter of a thread of a process that stands still, or puts the filter in force again. The end of
    /// its tracing does that too.
    pub(crate) fn suspend_filter(&self, pid: HostPid, tid: i32, suspend: bool) -> io::Result<()> {
        let exit_kill = self.processes.get(&pid).is_some_and(|held| held.exit_kill);
        let mut options = options(exit_kill);
        if suspend {
            options |= ptrace::Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP);
        }
        Ok(ptrace::setoptions(nix::unistd::Pid::from_raw(tid), options)?)
    }

    /// Notes how a thread stands that the caller has moved.
    pub fn note(&mut self, pid: HostPid, tid: i32, stand: Stand) {
        if let Some(held) = self.processes.get_mut(&pid) {
            held.threads.insert(tid, stand);
        }
    }

    fn forget_dead(&mut self) {
        self.processes.retain(|pid, held| !held.threads.is_empty() || process::run_state(*pid) != RunState::Dead);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.exit_kill
            && let Err(error) = self.let_go()
        {
            tracing::error!(error = &error as &dyn std::error::Error, "threads stay held until this process ends");
        }
    }
}

impl Held {
    /// Takes the threads that are not taken yet, and says of one such that it is there.
    fn call_new(&mut self, pid: HostPid, spares: Spares) -> Result<Option<i32>, HoldError> {
        let threads = match proc::threads(pid) {
            Ok(threads) => threads,
            Err(error) if proc::is_gone(&error) => return Ok(None),
            Err(source) => return Err(HoldError::List { pid, source }),
        };
        let spared = spares(pid, &threads);
        let mut new = None;
        for proc::Thread { tid, .. } in &threads {
            if self.threads.contains_key(tid) || (self.scope == Scope::Program && spared.contains(tid)) {
                continue;
            }
            match call(pid, *tid, self.exit_kill)? {
                Called::Yes => {
                    self.threads.insert(*tid, Stand::Called);
                    new = Some(*tid);
                }
                Called::NotYet => new = Some(*tid),
                Called::Ended => {}
            }
        }
        Ok(new)
    }

    /// Looks how each thread stands, and reaps the dead.
    fn look(&mut self, pid: HostPid) -> Result<(), HoldError> {
        let mut dead = vec![];
        for (tid, stand) in &mut self.threads {
            match look(pid, *tid) {
                Ok(Some(now)) => *stand = now,
                Ok(None) => dead.push(*tid),
                Err(source) => return Err(HoldError::Refused { action: "wait for", pid, tid: *tid, source }),
            }
        }
        for tid in dead {
            self.threads.remove(&tid);
        }
        Ok(())
    }

    /// Lets go of those that stand still.
    fn detach(&mut self, pid: HostPid, concerns: impl Fn(i32) -> bool) -> Result<(), ReleaseError> {
        let mut refused = None;
        self.threads.retain(|tid, stand| {
            if !concerns(*tid) {
                return true;
            }
            let done = look(pid, *tid).and_then(|now| match now {
                None => Ok(true),
                Some(Stand::Still { signal }) => match sys::detach(*tid, signal) {
                    Ok(()) => Ok(true),
                    // It has been killed since.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
                    Err(error) => Err(error),
                },
                Some(now) => {
                    *stand = now;
                    Ok(false)
                }
            });
            match done {
                Ok(done) => !done,
                Err(source) => {
                    refused = Some(ReleaseError::Refused { pid, tid: *tid, source });
                    true
                }
            }
        });
        refused.map_or(Ok(()), Err)
    }
}

/// Returns the options of ptrace for a thread.
fn options(exit_kill: bool) -> ptrace::Options {
    // A stop at a system call is to be told from a trap, lest one that is left behind becomes a signal.
    let mut options = ptrace::Options::PTRACE_O_TRACESYSGOOD;
    options.set(ptrace::Options::PTRACE_O_EXITKILL, exit_kill);
    options
}

/// Result of telling a thread to stop.
enum Called {
    Yes,
    /// It can be told only later, and runs nothing until then.
    NotYet,
    Ended,
}

fn call(pid: HostPid, tid: i32, exit_kill: bool) -> Result<Called, HoldError> {
    if is_stopped_and_frozen(pid, tid) {
        return Ok(Called::NotYet);
    }
    let thread = nix::unistd::Pid::from_raw(tid);
    match ptrace::seize(thread, options(exit_kill)) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(Called::Ended),
        Err(errno) => {
            let Ok(status) = Status::of_thread(pid, tid) else { return Ok(Called::Ended) };
            refuse_tracer(pid, tid, &status)?;
            if Stat::of_thread(pid, tid).map_or(true, |stat| stat.has_ended()) {
                return Ok(Called::Ended);
            }
            return Err(HoldError::Refused { action: "seize", pid, tid, source: errno.into() });
        }
    }
    match ptrace::interrupt(thread) {
        // It has died since: it is a tracee, and is reaped as one.
        Ok(()) | Err(Errno::ESRCH) => Ok(Called::Yes),
        Err(errno) => Err(HoldError::Refused { action: "interrupt", pid, tid, source: errno.into() }),
    }
}

fn refuse_traced(pid: HostPid, tid: i32) -> Result<(), HoldError> {
    // A thread that has ended is traced by none.
    Status::of_thread(pid, tid).map_or(Ok(()), |status| refuse_tracer(pid, tid, &status))
}

fn refuse_tracer(pid: HostPid, tid: i32, status: &Status) -> Result<(), HoldError> {
    let Some(tracer) = status.tracer() else { return Ok(()) };
    let name = proc::name(tracer).unwrap_or_default();
    Err(HoldError::Traced { pid, tid, tracer, name })
}

/// Whether a thread is stopped by a signal and has been frozen by the v1 freezer after that. Seizing such a one blocks
/// until it is thawed: the kernel waits for it to go from one kind of stop to another.
fn is_stopped_and_frozen(pid: HostPid, tid: i32) -> bool {
    let Ok(stat) = Stat::of_thread(pid, tid) else { return false };
    // The freezer shows as D. The 52nd field of proc_pid_stat(5), "exit_code", is the signal that stopped it.
    if stat.state() != b'D' {
        return false;
    }
    stat.field(52).is_some_and(|signal| signal != 0)
        || std::fs::read(format!("/proc/{pid}/task/{tid}/wchan")).is_ok_and(|place| place == b"do_signal_stop")
}

/// Returns the state of a tracee, and `None` of one that is dead and reaped, or traced no more.
pub fn look(pid: HostPid, tid: i32) -> io::Result<Option<Stand>> {
    match glance(tid)? {
        Glance::Moving => {
            let ended = process::thread_state(pid, tid) == Some(b'Z');
            Ok(Some(if ended { Stand::Ended } else { Stand::Called }))
        }
        Glance::Stop(Stop::Signal(signal)) => Ok(Some(Stand::Still { signal })),
        Glance::Stop(Stop::Event | Stop::Syscall) => Ok(Some(Stand::Still { signal: 0 })),
        // A thread that has executed a program has taken over the id of its process's first, and has none of its own.
        Glance::Gone => Ok(None),
        Glance::Dead => {
            // Whoever is a child of this process is waited for elsewhere in it, and for its exit status.
            if let Some(id) = Pid::from_raw(tid).filter(|_| tid != pid.raw() || !is_own_child(pid)) {
                rustix::process::waitid(WaitId::Pid(id), ALWAYS | WaitIdOptions::EXITED)?;
            }
            Ok(None)
        }
    }
}

/// Options of each wait: at once, and for threads as for processes.
const ALWAYS: WaitIdOptions =
    WaitIdOptions::NOHANG.union(WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned()));

/// Answer to a wait for a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glance {
    /// It has not stopped.
    Moving,
    /// It stands still.
    Stop(Stop),
    /// It waits to be reaped.
    Dead,
    /// It is no tracee.
    Gone,
}

/// Place in which a tracee stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Because it was told to, or by job control.
    Event,
    /// In the delivery of a signal.
    Signal(i32),
    /// At the beginning or the end of a system call.
    Syscall,
}

/// Returns the activity of a tracee. Nothing is consumed: see the module's comment.
pub fn glance(tid: i32) -> io::Result<Glance> {
    let Some(id) = Pid::from_raw(tid) else { return Ok(Glance::Gone) };
    let options = ALWAYS | WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = match rustix::process::waitid(WaitId::Pid(id), options) {
        Ok(Some(status)) => status,
        Ok(None) => return Ok(Glance::Moving),
        Err(rustix::io::Errno::CHILD) => return Ok(Glance::Gone),
        Err(errno) => return Err(errno.into()),
    };
    let Some(stop) = status.stopping_signal().or(status.trapping_signal()) else { return Ok(Glance::Dead) };
    // A signal, and above it the event if it is one.
    Ok(Glance::Stop(match stop {
        event if event >> 8 != 0 => Stop::Event,
        SYSCALL_STOP => Stop::Syscall,
        signal => Stop::Signal(signal),
    }))
}

/// Signal of a stop at a system call with `PTRACE_O_TRACESYSGOOD`.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

fn is_own_child(pid: HostPid) -> bool {
    Stat::of(pid).is_ok_and(|stat| stat.parent() == Some(HostPid::own()))
}
