//! Getting the pages of the staging memory ahead of the driver.
//!
//! The driver's checkpoint begins with one large anonymous mapping, and asks the kernel to populate it: one thread gets one
//! small page after the other, and half of the checkpoint is over before anything is copied (docs/gpu.md). So the
//! driver's threads are stopped at their system calls until this one comes:
//!
//! ```text
//!   driver's thread    ── mmap, less MAP_POPULATE ──► stands still ───────► goes on, and is traced no more
//!   held threads                                       │ ask for huge pages   ▲ touch them, side by side, in the order in
//!                                                      └──────────────────────┘ which the driver comes by
//! ```
//!
//! Nothing depends on it. Where no held thread can be used, or nothing is populated, the driver is as slow as it is; if this
//! process ends, the driver goes on, and finds the pages that it touches missing, which the kernel helps it to.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

use cuda::TICK;
use proc::{HostPid, Range};
use tracee::hold::Hold;
use tracee::inject::{InjectError, Team, answer, argument};
use tracee::watch::{Seen, Watch};

/// A mapping that is shorter than this, in bytes, is populated soon enough.
const LEAST: u64 = 64 << 20;

/// Bytes that one call touches, of whole huge pages. A call takes some tens of milliseconds, which nobody minds.
const SLICE: u64 = 64 << 20;

/// As many threads as clear pages any faster (cuda.md).
const MOST_THREADS: usize = 16;

/// Bytes of the free memory that are left to the driver.
const RESERVE: u64 = 256 << 20;

/// For how long the driver's threads are stopped at every system call. It maps within milliseconds (580.159).
const WATCHED: Duration = Duration::from_secs(1);

/// Pause between two looks at the threads and at their calls.
const LOOK: Duration = Duration::from_micros(100);
const TEND: Duration = Duration::from_micros(500);

/// Longest time for a call that is under way when the driver is done.
const LAST_CALL: Duration = Duration::from_secs(30);

/// Work beside the driver's checkpoints.
#[derive(Debug)]
pub(crate) struct Prefault {
    processes: Vec<Process>,
    threads: usize,
}

#[derive(Debug)]
struct Process {
    watch: Watch,
    until: Instant,
    team: Option<Team>,
    slices: VecDeque<Range>,
}

/// Environment variable that switches this off, with the value `off`. Seen with driver 580.159.
const SWITCH: &str = "GPUSNAP_PREFAULT";

impl Prefault {
    /// Of processes that the driver is about to checkpoint, whose other threads are held.
    pub(crate) fn of(pids: impl Iterator<Item = HostPid>) -> Self {
        let until = Instant::now() + WATCHED;
        let of =
            |pid| Process { watch: Watch::begin(pid, drivers_of(pid)), until, team: None, slices: VecDeque::new() };
        let processes: Vec<_> = pids.filter(|_| !crate::is_off(SWITCH)).map(of).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores.min(MOST_THREADS) / processes.len().max(1)).max(1);
        Self { processes, threads }
    }

    /// To be run all the time, after as long as it says each time. `left` is how many bytes of memory are left.
    pub(crate) fn tick(&mut self, hold: &mut Hold, left: impl Fn() -> Option<u64>) -> Duration {
        let mut pause = TICK;
        for process in &mut self.processes {
            let wish = process.tick(hold, self.threads, &left).unwrap_or_else(|error| {
                process.give_up(&error);
                LOOK
            });
            pause = pause.min(wish);
        }
        pause
    }

    /// All that there was has been touched, or will not be.
    #[cfg(test)]
    pub(crate) fn is_done(&mut self) -> bool {
        let mut processes = self.processes.iter_mut();
        processes.all(|process| process.watch.is_over() && process.team.as_mut().is_none_or(|team| team.busy() == 0))
    }

    /// Waits for what is under way and puts all threads back.
    pub(crate) fn finish(self, hold: &mut Hold) {
        let deadline = Instant::now() + LAST_CALL;
        for process in self.processes {
            process.watch.finish(deadline);
            if let Some(team) = process.team {
                team.disband(hold, deadline);
            }
        }
    }
}

impl Process {
    fn tick(&mut self, hold: &mut Hold, most: usize, left: impl Fn() -> Option<u64>) -> Result<Duration, InjectError> {
        let mut pause = TICK;
        if !self.watch.is_over() {
            self.watch(hold, most)?;
            pause = LOOK;
        }
        let Some(team) = &mut self.team else { return Ok(pause) };
        let mut under_way = team.busy();
        let (slices, mut refused) = (&mut self.slices, None);
        let next = || {
            let room = SLICE * u64::try_from(under_way + 1).unwrap_or(u64::MAX / SLICE) + RESERVE;
            if slices.is_empty() || left().is_some_and(|left| left < room) {
                return None;
            }
            let slice = slices.pop_front()?;
            under_way += 1;
            Some((libc::SYS_madvise, [slice.start, slice.len(), argument(libc::MADV_POPULATE_WRITE), 0, 0, 0]))
        };
        team.advance(next, |returned| refused = refused.take().or(answer(returned).err()))?;
        if let Some(error) = refused {
            // The kernel is older than 5.14, there is no memory, or the driver has given up.
            tracing::debug!(error = &error as &dyn std::error::Error, "not ahead of the driver");
            self.slices.clear();
        }
        Ok(if team.busy() > 0 { pause.min(TEND) } else { pause })
    }

    fn watch(&mut self, hold: &mut Hold, most: usize) -> Result<(), InjectError> {
        match self.watch.look()? {
            Seen::Nothing if Instant::now() < self.until => {}
            Seen::Asked { length } if length >= LEAST => {
                // What cannot be touched ahead is better populated.
                self.team = Some(Team::gather(hold, self.watch.pid(), most)?);
                self.watch.answer_unpopulated()?;
            }
            Seen::Made(range) => {
                let Some(team) = &mut self.team else { return Ok(()) };
                tracing::debug!(pid = self.watch.pid().raw(), %range, threads = team.len(), "touching memory ahead of the driver");
                let advice = argument(libc::MADV_HUGEPAGE);
                // A kernel without huge pages has small ones.
                let advised = team.call(libc::SYS_madvise, [range.start, range.len(), advice, 0, 0, 0]);
                drop(advised);
                self.slices.extend(slices(range));
                self.watch.leave()?;
            }
            Seen::Nothing | Seen::Asked { .. } | Seen::Failed => self.watch.leave()?,
        }
        Ok(())
    }

    fn give_up(&mut self, error: &InjectError) {
        tracing::debug!(
            pid = self.watch.pid().raw(),
            error = error as &dyn std::error::Error,
            "not ahead of the driver"
        );
        self.slices.clear();
        self.watch.abandon();
    }
}

/// The driver's threads of a process. The first of the process is none, whatever its name.
fn drivers_of(pid: HostPid) -> Vec<i32> {
    let threads = proc::threads(pid).unwrap_or_default();
    let drivers =
        threads.into_iter().filter(|thread| thread.tid != pid.raw() && cuda::process::is_drivers(pid, thread));
    drivers.map(|thread| thread.tid).collect()
}

/// Parts that no huge page is in two of.
fn slices(range: Range) -> impl Iterator<Item = Range> {
    let first = range.start / SLICE;
    (first..)
        .map(move |number| number * SLICE)
        .take_while(move |start| *start < range.end)
        .map(move |start| Range { start: start.max(range.start), end: (start + SLICE).min(range.end) })
}
