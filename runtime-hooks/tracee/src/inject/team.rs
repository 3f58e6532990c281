//! Several threads of one process, each of which makes calls while the others do.
//!
//! Only the first has its frame on its stack, which is the one that grows by itself and has nothing below it. The frames of
//! the others are in memory that the first maps for them and unmaps in the end: what is below their stacks may be in use
//! by threads that are not held.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use proc::HostPid;

use super::machine::State;
use super::{Code, InjectError, Place, Worker, answer, argument, find_code, holds, list, open};
use crate::hold::Hold;

/// For each frame; the largest that are known take some 12 KiB.
const SLOT: u64 = 16 * 1024;

/// Longest time for a short call, if other threads have the process's mappings locked.
const SHORT: Duration = Duration::from_secs(2);

/// Some threads of a process that stand still otherwise. It has to be disbanded; if this process ends before that, they go
/// on as they were, and the process has a few pages more.
#[derive(Debug)]
pub struct Team {
    leader: Worker,
    others: Vec<Worker>,
    /// Places of the frames of the others, and their size.
    slots: (u64, u64),
}

impl Team {
    /// At most so many threads of a held process. Whatever becomes of this process, they come to no harm.
    ///
    /// # Errors
    /// When the first thread is not held or cannot be used so.
    pub fn gather(hold: &mut Hold, pid: HostPid, most: usize) -> Result<Self, InjectError> {
        let mappings = list(pid)?;
        let stack = mappings.iter().find(|mapping| mapping.path == Path::new("[stack]"));
        // One in the delivery of a signal would have to take it first.
        let still = hold.still(pid).into_iter().filter(|(_, signal)| *signal == 0);
        let mut threads: Vec<(i32, State)> = still
            .filter_map(|(tid, _)| Some((tid, State::of(tid).ok()?)))
            .filter(|(_, state)| state.is_native())
            .collect();
        let is_first = |(_, state): &(i32, State)| stack.is_some_and(|stack| holds(stack, state.stack()));
        let first = threads.iter().position(is_first).ok_or(InjectError::NotHeld { pid })?;
        let (tid, state) = threads.swap_remove(first);
        let memory = Rc::new(open(pid, tid)?);
        let code = find_code(&memory, &mappings).filter(|code| code.sigreturn.is_some());
        let code: Code = code.ok_or(InjectError::NoInstruction { pid })?;
        let mut leader = Worker::prepare(hold, (pid, tid), state, code, Rc::clone(&memory), &Place::Stack(&mappings))?;
        if !leader.is_crash_safe() {
            leader.put_back(hold, Instant::now() + SHORT);
            return Err(InjectError::NoRoom { pid, tid });
        }
        let mut team = Self { leader, others: Vec::new(), slots: (0, 0) };
        threads.truncate(most.saturating_sub(1));
        if threads.is_empty() {
            return Ok(team);
        }
        let length = SLOT * u64::try_from(threads.len()).unwrap_or(0);
        let access = argument(libc::PROT_READ | libc::PROT_WRITE);
        let flags = argument(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // Without it, it is a team of one.
        let Ok(address) = team.call(libc::SYS_mmap, [0, length, access, flags, argument(-1), 0]) else {
            return Ok(team);
        };
        team.slots = (address, length);
        let mut start = address;
        for (tid, state) in threads {
            let place = Place::Between(start, start + SLOT);
            start += SLOT;
            team.others.extend(Worker::prepare(hold, (pid, tid), state, code, Rc::clone(&memory), &place).ok());
        }
        Ok(team)
    }

    /// Makes a call in the first thread, which must have none under way.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<u64, InjectError> {
        let returned = self.leader.call(number, arguments, Instant::now() + SHORT)?;
        let refused = |source| InjectError::Answer { tid: self.leader.tid, number, source };
        answer(returned).map(i64::cast_unsigned).map_err(refused)
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Worker> {
        std::iter::once(&mut self.leader).chain(&mut self.others)
    }

    /// Returns the number of threads.
    #[expect(clippy::len_without_is_empty, reason = "a team has one thread at least")]
    pub fn len(&self) -> usize {
        1 + self.others.len()
    }

    /// Returns the number of threads with a call under way.
    pub fn busy(&mut self) -> usize {
        self.all().filter(|worker| worker.is_busy()).count()
    }

    /// Looks which calls have returned, hands on what, and lets each thread that has none under way make the next.
    pub fn advance(
        &mut self,
        mut next: impl FnMut() -> Option<(i64, [u64; 6])>,
        mut returned: impl FnMut(i64),
    ) -> Result<(), InjectError> {
        for worker in self.all() {
            if worker.is_busy()
                && let Some(result) = worker.poll()?
            {
                returned(result);
            }
            if !worker.is_busy()
                && let Some((number, arguments)) = next()
            {
                worker.begin(number, arguments)?;
                // It is at the entry of the call in a moment, and would else wait there for the next look.
                worker.enter()?;
            }
        }
        Ok(())
    }

    /// Waits until all calls have returned and puts all threads back; one that is not back by the deadline goes on as it
    /// was when it is let go.
    pub fn disband(mut self, hold: &mut Hold, deadline: Instant) {
        let mut are_back = true;
        for worker in &mut self.others {
            let is_done = !worker.is_busy() || worker.wait(deadline).is_ok();
            are_back &= worker.put_back(hold, deadline) && is_done;
        }
        if self.leader.is_busy()
            && let Err(error) = self.leader.wait(deadline)
        {
            tracing::debug!(tid = self.leader.tid, error = &error as &dyn std::error::Error, "a call is not over");
        }
        let (address, length) = self.slots;
        if are_back && length > 0 && !self.leader.is_busy() {
            // Else it is there until the process ends.
            let unmapped = self.call(libc::SYS_munmap, [address, length, 0, 0, 0, 0]);
            if let Err(error) = unmapped {
                tracing::debug!(error = &error as &dyn std::error::Error, "a few pages are left in a process");
            }
        }
        self.leader.put_back(hold, deadline);
    }
}
