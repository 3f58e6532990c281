//! What a session does to the machine that it runs on.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cgroup::Cgroup;

use crate::ahead::Ahead;
use crate::refill::Refill;
use crate::residue;
use crate::session::{Host, SessionError};
use crate::swap::{self, Swap, SwapProcess};
use cuda::process::drivers;
use cuda::{Answer, Call, CallFailure, Callers, Inventory, TICK};
use phase::chain;
use tracee::hold::{self, Hold, Scope};
use tracee::process::{self, Range, RunState};

/// NVML answers in some ten milliseconds, unless it has to wake a GPU.
pub(crate) const INVENTORY: Duration = Duration::from_secs(20);
/// Waking a stopped process takes milliseconds, unless a thread of it waits for a disk.
const WAKING: Duration = Duration::from_secs(10);
/// How often it is tried to let processes go, half a second each time, whose program the guardian would take with it.
const MOST_RELEASES: u32 = 20;
/// Freeing one process takes about 5 ms (cuda.md: 16 in 0.06-0.09 s).
const CLEANING: Duration = Duration::from_secs(10);

/// The machine, as far as one container reaches.
pub(crate) struct Machine<'a> {
    cgroup: Cgroup,
    callers: &'a mut Callers,
    hold: Hold,
    /// Anonymous memory of processes before a checkpoint.
    anonymous: HashMap<i32, Vec<Range>>,
    /// Staging memory that is not all in place yet.
    refill: Option<Refill>,
}

impl<'a> Machine<'a> {
    /// What concerns the container that a process belongs to.
    pub(crate) fn of(pid: i32, callers: &'a mut Callers) -> Result<Self, SessionError> {
        Self::with(Hold::new(drivers), pid, callers)
    }

    /// The same of a container that must not run before it is let go: the end of this process kills what it holds of it.
    pub(crate) fn of_unfilled(pid: i32, callers: &'a mut Callers) -> Result<Self, SessionError> {
        Self::with(Hold::with_exit_kill(drivers), pid, callers)
    }

    fn with(hold: Hold, pid: i32, callers: &'a mut Callers) -> Result<Self, SessionError> {
        let cgroup = Cgroup::of_process(pid).map_err(container("find the cgroup of"))?;
        Ok(Self { cgroup, callers, hold, anonymous: HashMap::new(), refill: None })
    }
}

fn container<E: std::error::Error + 'static>(action: &'static str) -> impl Fn(E) -> SessionError {
    move |error| SessionError::Container { action: action.to_owned(), why: chain(&error) }
}

fn process(action: &'static str, pid: i32) -> impl Fn(&dyn std::error::Error) -> SessionError {
    move |error| SessionError::Process { action: action.to_owned(), process: name(pid), why: chain(error) }
}

/// `process 123 (python3)`
fn name(pid: i32) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(comm) => format!("process {pid} ({})", comm.trim()),
        Err(_) => format!("process {pid}"),
    }
}

impl Host for Machine<'_> {
    fn pids(&mut self) -> Result<Vec<i32>, SessionError> {
        self.cgroup.pids().map_err(container("list the processes of"))
    }

    fn touches_gpu(&mut self, pid: i32) -> bool {
        cuda::process::touches_gpu(pid) || self.has_drivers_threads(pid)
    }

    fn has_drivers_threads(&mut self, pid: i32) -> bool {
        process::threads(pid).is_ok_and(|threads| threads.iter().any(|thread| cuda::process::is_drivers(&thread.name)))
    }

    fn left(&mut self, pid: i32) -> Option<String> {
        if let Some(mapping) = cuda::process::device_mappings(pid).unwrap_or_default().into_iter().next() {
            return Some(format!("a mapping of {} at {:#x}", mapping.path.display(), mapping.start));
        }
        let fd = cuda::process::device_fds(pid).unwrap_or_default().into_iter().next()?;
        Some(format!("descriptor {} of {}", fd.fd, fd.path.display()))
    }

    fn is_gone(&mut self, pid: i32) -> bool {
        process::run_state(pid) == RunState::Dead
    }

    fn describe(&mut self, pid: i32) -> String {
        let name = name(pid);
        let state = match process::run_state(pid) {
            RunState::Running => return name,
            // By this process, which holds it.
            RunState::Traced(tracer) if tracer.unsigned_abs() == std::process::id() => return name,
            RunState::Dead => "it is dead".to_owned(),
            RunState::Stopped => "it is stopped".to_owned(),
            RunState::Traced(tracer) => format!("it is traced by {}", self::name(tracer)),
        };
        format!("{name}, {state},")
    }

    fn namespace_pid(&mut self, pid: i32) -> i32 {
        process::namespace_pid(pid).unwrap_or(pid)
    }

    fn staged(&mut self, pid: i32, is_first: bool) -> Vec<Range> {
        let now = process::anonymous_mappings(pid).unwrap_or_default();
        if is_first {
            self.anonymous.insert(pid, now);
            return Vec::new();
        }
        let before = self.anonymous.get(&pid).unwrap_or(&now);
        process::gained(before, &now)
    }

    fn calls(&mut self, calls: &[(i32, Call)], limit: Duration) -> Vec<Result<Answer, CallFailure>> {
        let Self { cgroup, callers, hold, refill, .. } = self;
        let checkpoints = calls.iter().filter(|(_, call)| *call == Call::Checkpoint);
        let mut ahead = Ahead::of(checkpoints.map(|(pid, _)| *pid));
        let results = callers.make(calls, limit, &mut || {
            // A thread that cannot be held now is held in the next round, or the session fails by its deadline.
            if let Err(error) = hold.watch() {
                tracing::debug!("{}", chain(&error));
            }
            let moving = refill.as_mut().map_or(TICK, |refill| refill.tick(hold));
            ahead.tick(hold, || memory_left(cgroup).map(|(left, _)| left)).min(moving)
        });
        ahead.finish(hold);
        results
    }

    fn inventory(&mut self) -> Result<Inventory, CallFailure> {
        self.callers.inventory(INVENTORY)
    }

    fn memory_left(&mut self) -> Option<(u64, String)> {
        memory_left(&self.cgroup).map(|(left, limit)| (left, limit.to_owned()))
    }

    fn freeze(&mut self) -> Result<(), SessionError> {
        self.cgroup.freeze().map_err(container("freeze"))
    }

    fn freeze_at_rest(&mut self) -> Result<(), SessionError> {
        self.cgroup.freeze_at_rest(false).map_err(container("freeze"))
    }

    fn thaw(&mut self) -> Result<(), SessionError> {
        self.cgroup.thaw().map_err(container("thaw"))
    }

    fn hold(&mut self, pid: i32) -> Result<(), SessionError> {
        self.hold.take(pid).map_err(|error| process("hold", pid)(&error))
    }

    fn hold_whole(&mut self, pid: i32) -> Result<(), SessionError> {
        self.hold.take_scope(pid, Scope::All).map_err(|error| process("hold", pid)(&error))
    }

    fn settle(&mut self, limit: Duration) -> Result<(), SessionError> {
        self.hold.settle(Instant::now() + limit).map_err(container("hold all threads of"))
    }

    fn let_go(&mut self) {
        // Those that are left go on when the guardian ends, or die with it.
        let tries = if self.hold.is_exit_kill() { MOST_RELEASES } else { 1 };
        for _ in 0..tries {
            match self.hold.let_go() {
                Ok(()) => return,
                Err(error) => tracing::warn!("{}", chain(&error)),
            }
        }
    }

    fn is_stopped(&mut self, pid: i32) -> bool {
        // Its own threads may be held, which is another kind of halt. What matters is the driver's.
        let threads = process::threads(pid).unwrap_or_default();
        let mut drivers = threads.iter().filter(|thread| cuda::process::is_drivers(&thread.name)).peekable();
        if drivers.peek().is_none() {
            return process::run_state(pid) == RunState::Stopped;
        }
        drivers.any(|thread| process::thread_state(pid, thread.tid) == Some(b'T'))
    }

    fn is_asleep(&mut self, pid: i32) -> bool {
        process::run_state(pid) == RunState::Stopped || hold::is_put_to_sleep(pid)
    }

    fn mappings(&mut self, pid: i32) -> Vec<(u64, u64)> {
        let mappings = cuda::process::device_mappings(pid).unwrap_or_default();
        mappings.iter().map(|mapping| (mapping.start, mapping.end)).collect()
    }

    fn wake(&mut self, pid: i32) -> Result<(), SessionError> {
        self.hold.wake(pid, Instant::now() + WAKING).map_err(|error| process("wake", pid)(&error))
    }

    fn put_to_sleep(&mut self, pid: i32) -> Result<(), SessionError> {
        self.hold.put_to_sleep(pid).map_err(|error| process("stop again", pid)(&error))
    }

    fn clean(&mut self, pid: i32) -> Result<usize, SessionError> {
        let cleaned = residue::clean(&mut self.hold, pid, Instant::now() + CLEANING);
        cleaned.map(|cleaned| cleaned.mappings + cleaned.fds).map_err(|error| process("free the GPU of", pid)(&error))
    }

    fn swap(&mut self, files: &[PathBuf], process: &SwapProcess, limit: Duration) -> Result<Vec<Range>, SessionError> {
        let swapped = swap::swap_in(&mut self.hold, files, process, Instant::now() + limit);
        swapped.map_err(|error| self::process("put files in the place of memory of", process.pid)(&error))
    }

    fn map_staging(&mut self, staging: &Swap, limit: Duration) -> Result<(), SessionError> {
        let begun = Refill::begin(&mut self.hold, staging, Instant::now() + limit);
        self.refill = Some(begun.map_err(container("map the saved GPU state in"))?);
        Ok(())
    }

    fn finish_staging(&mut self, limit: Duration) -> Result<(), SessionError> {
        let Some(refill) = self.refill.take() else { return Ok(()) };
        refill.finish(&mut self.hold, Instant::now() + limit).map_err(container("fill the saved GPU state of"))
    }

    fn sleep(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Bytes that may still be used, and what limits them.
fn memory_left(cgroup: &Cgroup) -> Option<(u64, &'static str)> {
    let of_container = cgroup.memory_left().map(|left| (left, "the memory limit of the container"));
    let of_machine = available_memory().map(|left| (left, "the memory of the machine"));
    of_container.into_iter().chain(of_machine).min()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
