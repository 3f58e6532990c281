//! Actions of a session on its machine.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cgroup::Cgroup;

use crate::backfill::Backfill;
use crate::prefault::Prefault;
use crate::remap;
use crate::session::{Devices, Driver, Freezer, Host, MemoryLeft, Processes, SessionError, Tracer, Unsupported};
use cuda::process::{drivers, is_drivers};
use cuda::{Answer, Call, CallFailure, Callers, Inventory, TICK};
use memory::{Layout, ProcessLayout};
use phase::chain;
use proc::{HostPid, ProcessHandle, ProcessIds, Range};
use rustix::process::Signal;
use tracee::hold::{self, Hold, Scope};
use tracee::process::{self, RunState};

#[cfg(test)]
mod tests;

/// NVML answers in some ten milliseconds, unless it has to wake a GPU.
pub(crate) const INVENTORY: Duration = Duration::from_secs(20);
/// Continuing a stopped process takes milliseconds, unless a thread of it waits for a disk.
const CONTINUING: Duration = Duration::from_secs(10);
/// Tries, of half a second each, to let processes go that would die with this one.
const MOST_RELEASES: u32 = 20;

/// The machine, as far as one container reaches.
pub(crate) struct Machine {
    cgroup: Option<Cgroup>,
    callers: Callers,
    hold: Hold,
    /// The processes that the cgroup has listed.
    handles: HashMap<HostPid, ProcessHandle>,
    /// Anonymous memory of processes before a checkpoint.
    anonymous: HashMap<HostPid, Vec<Range>>,
    /// Staging memory that is not all in place yet.
    backfill: Option<Backfill>,
}

impl Machine {
    pub(crate) fn new(callers: Callers) -> Self {
        let (handles, anonymous) = (HashMap::new(), HashMap::new());
        Self { cgroup: None, callers, hold: Hold::new(drivers), handles, anonymous, backfill: None }
    }

    /// Reaches the processes of this cgroup from now on.
    pub(crate) fn reach(&mut self, cgroup: &Cgroup) {
        self.cgroup = Some(cgroup.clone());
    }

    /// Lets the end of this process kill what it holds from now on: a container that must not run before it is let go.
    pub(crate) fn hold_to_the_death(&mut self) {
        self.hold = Hold::with_exit_kill(drivers);
    }

    fn cgroup(&self) -> Result<&Cgroup, SessionError> {
        let why = || "nobody said where it is".to_owned();
        self.cgroup.as_ref().ok_or_else(|| SessionError::Container { action: "find".to_owned(), why: why() })
    }

    /// Fails for a process that has ended, whoever has its pid now.
    fn check(&self, action: &'static str, pid: HostPid) -> Result<(), SessionError> {
        match self.handles.get(&pid) {
            Some(handle) if !handle.is_alive() => {
                let why = "the process has ended".to_owned();
                Err(SessionError::Process { action: action.to_owned(), process: format!("process {pid}"), why })
            }
            _ => Ok(()),
        }
    }
}

fn container<E: std::error::Error + 'static>(action: &'static str) -> impl Fn(E) -> SessionError {
    move |error| SessionError::Container { action: action.to_owned(), why: chain(&error) }
}

fn process(action: &'static str, pid: HostPid) -> impl Fn(&dyn std::error::Error) -> SessionError {
    move |error| SessionError::Process { action: action.to_owned(), process: name(pid), why: chain(error) }
}

/// `process 123 (python3)`
fn name(pid: HostPid) -> String {
    match proc::name(pid) {
        Ok(comm) => format!("process {pid} ({comm})"),
        Err(_) => format!("process {pid}"),
    }
}

impl Processes for Machine {
    fn pids(&mut self) -> Result<Vec<HostPid>, SessionError> {
        let list = |machine: &Self| machine.cgroup()?.pids().map_err(container("list the processes of"));
        let mut pids = list(self)?;
        let mut new = Vec::new();
        for pid in &pids {
            if self.handles.contains_key(pid) {
                continue;
            }
            match ProcessHandle::open(*pid) {
                Ok(handle) => {
                    self.handles.insert(*pid, handle);
                    new.push(*pid);
                }
                Err(error) if proc::is_gone(&error) => {}
                Err(error) => return Err(container("open the processes of")(error)),
            }
        }
        if !new.is_empty() {
            // Whoever had a pid before it was opened may not be who had it after: only the container's processes count.
            pids = list(self)?;
            for pid in new.into_iter().filter(|pid| !pids.contains(pid)) {
                self.handles.remove(&pid);
            }
        }
        pids.retain(|pid| self.handles.get(pid).is_some_and(ProcessHandle::is_alive));
        Ok(pids)
    }

    fn is_gone(&mut self, pid: HostPid) -> bool {
        self.handles.get(&pid).is_some_and(|handle| !handle.is_alive()) || process::run_state(pid) == RunState::Dead
    }

    fn touches_gpu(&mut self, pid: HostPid) -> bool {
        cuda::process::touches_gpu(pid) || self.has_drivers_threads(pid)
    }

    fn has_drivers_threads(&mut self, pid: HostPid) -> bool {
        proc::threads(pid).is_ok_and(|threads| threads.iter().any(|thread| is_drivers(pid, thread)))
    }

    fn has_drivers_library(&mut self, pid: HostPid) -> bool {
        cuda::process::has_library(pid)
    }

    fn refuse_traced(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.hold.refuse_traced(pid).map_err(|error| process("hold", pid)(&error))
    }

    fn devices(&mut self, pid: HostPid) -> Devices {
        let fds = cuda::process::device_fds(pid).unwrap_or_default().into_iter();
        let paths = fds.filter_map(|of| Some((u32::try_from(of.fd).ok()?, of.path))).collect();
        Devices { paths, mappings: cuda::process::device_mappings(pid).unwrap_or_default().len() }
    }

    fn describe(&mut self, pid: HostPid) -> String {
        let name = name(pid);
        let state = match process::run_state(pid) {
            RunState::Running => return name,
            // By a thread of this process, which holds it.
            RunState::Traced(tracer) if is_own_thread(tracer) => return name,
            RunState::Dead => "it is dead".to_owned(),
            RunState::Stopped => "it is stopped".to_owned(),
            RunState::Traced(tracer) => format!("it is traced by {}", self::name(tracer)),
        };
        format!("{name}, {state},")
    }

    fn ids(&mut self, pid: HostPid) -> Option<ProcessIds> {
        ProcessIds::of(pid).ok()
    }

    fn staged(&mut self, pid: HostPid, is_first: bool) -> Vec<Range> {
        let now = process::anonymous_mappings(pid).unwrap_or_default();
        if is_first {
            self.anonymous.insert(pid, now);
            return Vec::new();
        }
        let before = self.anonymous.get(&pid).unwrap_or(&now);
        process::gained(before, &now)
    }

    fn mappings(&mut self, pid: HostPid) -> Vec<(u64, u64)> {
        let mappings = cuda::process::device_mappings(pid).unwrap_or_default();
        mappings.iter().map(|mapping| (mapping.start, mapping.end)).collect()
    }

    fn is_stopped(&mut self, pid: HostPid) -> bool {
        // Its own threads may be held, which is another kind of halt. What matters is the driver's.
        let threads = proc::threads(pid).unwrap_or_default();
        let mut drivers = threads.iter().filter(|thread| is_drivers(pid, thread)).peekable();
        if drivers.peek().is_none() {
            return process::run_state(pid) == RunState::Stopped;
        }
        drivers.any(|thread| process::thread_state(pid, thread.tid) == Some(b'T'))
    }

    fn is_stopping(&mut self, pid: HostPid) -> bool {
        process::run_state(pid) == RunState::Stopped || hold::is_stopping(pid)
    }

    fn unsupported(&mut self, pid: HostPid) -> Unsupported {
        let uses = cuda::process::uses(pid);
        Unsupported { cupti: uses.cupti, mig: uses.mig, mps: uses.mps, ipc: uses.ipc }
    }
}

impl Driver for Machine {
    fn calls(&mut self, calls: &[(HostPid, Call)], limit: Duration) -> Vec<Result<Answer, CallFailure>> {
        let (gone, there): (Vec<_>, Vec<_>) =
            calls.iter().cloned().enumerate().partition(|(_, (pid, _))| self.check("call", *pid).is_err());
        let (at, calls): (Vec<usize>, Vec<(HostPid, Call)>) = there.into_iter().unzip();
        let Self { cgroup, callers, hold, backfill, .. } = self;
        let checkpoints = calls.iter().filter(|(_, call)| *call == Call::Checkpoint);
        let mut prefault = Prefault::of(checkpoints.map(|(pid, _)| *pid));
        let results = callers.make(&calls, limit, &mut || {
            // A thread that cannot be held now is held in the next round, or the session fails by its deadline.
            if let Err(error) = hold.watch() {
                tracing::debug!("{}", chain(&error));
            }
            let moving = backfill.as_mut().map_or(TICK, |backfill| backfill.tick(hold));
            let left = || cgroup.as_ref().and_then(memory_left).map(|left| left.bytes);
            prefault.tick(hold, left).min(moving)
        });
        prefault.finish(hold);
        let mut all: Vec<_> = at.into_iter().zip(results).collect();
        all.extend(gone.into_iter().map(|(index, _)| (index, Err(CallFailure::Gone))));
        all.sort_by_key(|(index, _)| *index);
        all.into_iter().map(|(_, result)| result).collect()
    }

    fn inventory(&mut self) -> Result<Inventory, CallFailure> {
        self.callers.inventory(INVENTORY)
    }
}

impl Freezer for Machine {
    fn freeze(&mut self) -> Result<(), SessionError> {
        self.cgroup()?.freeze().map_err(container("freeze"))
    }

    fn freeze_at_rest(&mut self) -> Result<(), SessionError> {
        self.cgroup()?.freeze_at_rest(false).map_err(container("freeze"))
    }

    fn thaw(&mut self) -> Result<(), SessionError> {
        self.cgroup()?.thaw().map_err(container("thaw"))
    }

    fn is_frozen(&mut self) -> bool {
        self.cgroup().is_ok_and(|cgroup| cgroup.is_frozen().unwrap_or(false))
    }

    fn memory_left(&mut self) -> Option<MemoryLeft> {
        self.cgroup.as_ref().and_then(memory_left)
    }
}

impl Tracer for Machine {
    fn hold(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.check("hold", pid)?;
        self.hold.take(pid).map_err(|error| process("hold", pid)(&error))
    }

    fn hold_whole(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.check("hold", pid)?;
        self.hold.take_scope(pid, Scope::All).map_err(|error| process("hold", pid)(&error))
    }

    fn is_in_driver(&mut self, pid: HostPid) -> bool {
        let threads = proc::threads(pid).unwrap_or_default();
        let mut own = threads.iter().filter(|thread| !is_drivers(pid, thread));
        let Ok(driver) = tracee::stack::Code::of(pid, cuda::process::is_library) else { return own.next().is_some() };
        // A thread of which nothing is known may be anywhere.
        own.any(|thread| driver.is_called_by(thread.tid).unwrap_or(true))
    }

    fn settle(&mut self, limit: Duration) -> Result<(), SessionError> {
        self.hold.settle(Instant::now() + limit).map_err(container("hold all threads of"))
    }

    fn let_go(&mut self, keep: &[HostPid]) -> Result<(), SessionError> {
        // Those that are left go on when this process ends, or die with it.
        let tries = if self.hold.is_exit_kill() { MOST_RELEASES } else { 1 };
        let mut let_go = Ok(());
        for _ in 0..tries {
            let_go = self.hold.let_go_but(keep);
            match &let_go {
                Ok(()) => break,
                Err(error) => tracing::warn!("{}", chain(error)),
            }
        }
        let_go.map_err(container("let go of all threads of"))
    }

    fn cont(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.check("continue", pid)?;
        self.hold.cont(pid, Instant::now() + CONTINUING).map_err(|error| process("continue", pid)(&error))
    }

    fn cont_unheld(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.check("continue", pid)?;
        let Some(handle) = self.handles.get(&pid) else { return Ok(()) };
        handle.signal(Signal::CONT).map_err(|error| process("continue", pid)(&error))
    }

    fn stop(&mut self, pid: HostPid) -> Result<(), SessionError> {
        self.check("stop again", pid)?;
        self.hold.stop(pid).map_err(|error| process("stop again", pid)(&error))
    }

    fn remap(&mut self, packs: &[PathBuf], of: &ProcessLayout, limit: Duration) -> Result<Vec<Range>, SessionError> {
        let pid = of.process.host;
        self.check("put files in the place of memory of", pid)?;
        let remapped = remap::remap_in(&mut self.hold, packs, of, Instant::now() + limit);
        remapped.map_err(|error| process("put files in the place of memory of", pid)(&error))
    }

    fn map_staging(&mut self, staging: &Layout, limit: Duration) -> Result<(), SessionError> {
        for of in &staging.processes {
            self.check("map the saved GPU state in", of.process.host)?;
        }
        let begun = Backfill::begin(&mut self.hold, staging, Instant::now() + limit);
        self.backfill = Some(begun.map_err(container("map the saved GPU state in"))?);
        Ok(())
    }

    fn finish_staging(&mut self, limit: Duration) -> Result<(), SessionError> {
        let Some(backfill) = self.backfill.take() else { return Ok(()) };
        backfill.finish(&mut self.hold, Instant::now() + limit).map_err(container("fill the saved GPU state of"))
    }
}

impl Host for Machine {
    fn sleep(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Returns the memory that may still be used.
fn memory_left(cgroup: &Cgroup) -> Option<MemoryLeft> {
    let of_container = cgroup.memory_left().map(|bytes| MemoryLeft { bytes, is_limited: true });
    let of_machine = available_memory().map(|bytes| MemoryLeft { bytes, is_limited: false });
    of_container.into_iter().chain(of_machine).min()
}

/// Tells whether a thread is of this process.
fn is_own_thread(tid: HostPid) -> bool {
    std::path::Path::new(&format!("/proc/self/task/{tid}")).exists()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
