//! Touching memory ahead of the driver.
//!
//! The driver's checkpoint makes one large anonymous mapping and copies all device memory into it. It spends most of that
//! time on page faults, one small page after the other. The threads of the process are held meanwhile: as soon as the mapping
//! is there, they ask for huge pages and touch it, side by side and in the order in which the driver will come by.
//!
//! Nothing depends on it. Where it does not work, the driver is as slow as it is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

use crate::call::TICK;
use crate::hold::Hold;
use crate::inject::{InjectError, Team, answer, argument};
use crate::process::{self, Range};

/// A mapping that is shorter than this, in bytes, is touched soon enough.
const LEAST: u64 = 64 << 20;

/// How much one call touches: some tens of milliseconds, so that none is waited for for long, and of whole huge pages.
const SLICE: u64 = 64 << 20;

/// As many threads as clear pages any faster (cuda.md).
const MOST_THREADS: usize = 16;

/// What is to be left of the memory that there is: the driver needs some for itself.
const RESERVE: u64 = 256 << 20;

/// How often the process is looked at until it has such a mapping, and how often when it has one: looking costs the kernel a
/// lock that page faults need.
const LOOK: Duration = Duration::from_millis(2);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How often it is looked whether calls have returned.
const TEND: Duration = Duration::from_micros(500);

/// How long a call may take that is still under way when the driver is done.
const LAST_CALL: Duration = Duration::from_secs(30);

/// What goes on while the driver makes checkpoints.
#[derive(Debug)]
pub(crate) struct Ahead {
    processes: Vec<Process>,
    threads: usize,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Anonymous memory that was there before, or is seen to already.
    seen: Vec<Range>,
    next_look: Instant,
    team: Option<Team>,
    slices: VecDeque<Range>,
    is_over: bool,
}

impl Ahead {
    /// Of processes with the anonymous memory that they had before.
    pub(crate) fn of(processes: impl Iterator<Item = (i32, Vec<Range>)>) -> Self {
        let of = |(pid, seen)| Process {
            pid,
            seen,
            next_look: Instant::now(),
            team: None,
            slices: VecDeque::new(),
            is_over: false,
        };
        let processes: Vec<_> = processes.map(of).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores.min(MOST_THREADS) / processes.len().max(1)).max(1);
        Self { processes, threads }
    }

    /// To be run all the time, after as long as it says each time. `left` is how many bytes of memory are left.
    pub(crate) fn tick(&mut self, hold: &mut Hold, left: impl Fn() -> Option<u64>) -> Duration {
        let mut pause = TICK;
        for process in &mut self.processes {
            if process.is_over {
                continue;
            }
            match process.tick(hold, self.threads, &left) {
                Ok(wish) => pause = pause.min(wish),
                Err(error) => {
                    tracing::debug!(
                        pid = process.pid,
                        error = &error as &dyn std::error::Error,
                        "not ahead of the driver"
                    );
                    process.is_over = true;
                }
            }
        }
        pause
    }

    /// All that there was has been touched, or will not be.
    #[cfg(test)]
    pub(crate) fn is_done(&mut self) -> bool {
        let mut processes = self.processes.iter_mut();
        processes.all(|process| process.is_over || process.team.as_mut().is_some_and(|team| team.busy() == 0))
    }

    /// Waits for what is under way and puts all threads back.
    pub(crate) fn finish(self, hold: &mut Hold) {
        let deadline = Instant::now() + LAST_CALL;
        for team in self.processes.into_iter().filter_map(|process| process.team) {
            team.disband(hold, deadline);
        }
    }
}

impl Process {
    fn tick(&mut self, hold: &mut Hold, most: usize, left: impl Fn() -> Option<u64>) -> Result<Duration, InjectError> {
        if Instant::now() >= self.next_look {
            self.look(hold, most)?;
            self.next_look = Instant::now() + if self.team.is_some() { LOOK_AGAIN } else { LOOK };
        }
        let Some(team) = &mut self.team else { return Ok(LOOK) };
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
            tracing::debug!(pid = self.pid, error = &error as &dyn std::error::Error, "not ahead of the driver");
            self.slices.clear();
        }
        Ok(if team.busy() > 0 { TEND } else { LOOK })
    }

    fn look(&mut self, hold: &mut Hold, most: usize) -> Result<(), InjectError> {
        let pid = self.pid;
        let now = process::anonymous_mappings(pid);
        let now = now.map_err(|source| InjectError::File { action: "read the mappings of", pid, source })?;
        for range in process::gained(&self.seen, &now).into_iter().filter(|range| range.len() >= LEAST) {
            let team = match &mut self.team {
                Some(team) => team,
                // They are all idle: this is before the first slice.
                None => self.team.insert(Team::gather(hold, pid, most)?),
            };
            tracing::debug!(pid, %range, threads = team.len(), "touching memory ahead of the driver");
            if team.busy() == 0 {
                let advice = argument(libc::MADV_HUGEPAGE);
                // A kernel without huge pages has small ones.
                let advised = team.call(libc::SYS_madvise, [range.start, range.len(), advice, 0, 0, 0]);
                drop(advised);
            }
            self.slices.extend(slices(range));
            self.seen.push(range);
            self.seen.sort_unstable();
        }
        Ok(())
    }
}

/// Parts that no huge page is in two of.
fn slices(range: Range) -> impl Iterator<Item = Range> {
    let first = range.start / SLICE;
    (first..)
        .map(move |number| number * SLICE)
        .take_while(move |start| *start < range.end)
        .map(move |start| Range { start: start.max(range.start), end: (start + SLICE).min(range.end) })
}
