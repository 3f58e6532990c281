//! A paused container stands still though it is thawed for the driver.
//!
//! A client pauses a container and saves its writable layer, before the checkpoint or after it. The processes must not
//! change what is in that layer in between. So everything is held before the thaw that the driver does not need. All of it is
//! let go when the container is frozen again.

use proc::HostPid;

use super::put_back::Faults;
use super::{HALT, Host, Session, SessionError, Step};

impl<H: Host> Session<'_, H> {
    /// Holds what is not to run while a frozen container is thawed: processes without CUDA, and of CUDA processes all
    /// threads but the driver's. Stopped processes run nothing and are left alone. A process that may be in the middle
    /// of cuInit runs on: before the end of cuInit the process is neither saved nor freed of the GPU.
    pub(super) fn hold_still(&mut self) -> Result<(), SessionError> {
        let pids = self.host.pids()?;
        // Before the first hold: a thread that the v1 freezer has frozen can be taken, and not be let go before a thaw.
        for pid in &pids {
            self.host.refuse_traced(*pid)?;
        }
        self.are_still = true;
        let cuda: Vec<HostPid> = pids.iter().copied().filter(|pid| self.host.has_drivers_threads(*pid)).collect();
        let inherited = self.mappings_of(&cuda);
        for pid in pids {
            let may_begin = !cuda.contains(&pid)
                && self.host.touches_gpu(pid)
                && self.host.has_drivers_library(pid)
                && !self.has_inherited(pid, &inherited);
            if !may_begin {
                self.hold_one_still(pid)?;
            }
        }
        Ok(())
    }

    /// Lets CUDA processes run until they are locked if a thread of theirs stands in a call of the driver.
    ///
    /// The lock waits for calls that have the driver's own lock, and not for a thread that waits for the GPU without
    /// it. Such a thread would be left in the middle of its call. Should this session be killed, the thread would run
    /// on without the memory of the GPU, and die of it (measured on an H200: SIGSEGV in libcuda, 1 of 8 kills).
    pub(super) fn let_callers_run(&mut self) -> Result<(), SessionError> {
        let members: Vec<HostPid> = self.members.iter().map(|member| member.pid).collect();
        if self.are_still && members.into_iter().any(|pid| self.host.is_in_driver(pid)) {
            self.are_still = false;
            self.unlock_members()?;
        }
        Ok(())
    }

    /// Holds processes that were freed of the GPU, or are to be, until the freeze.
    pub(super) fn hold_residue(&mut self, residue: &[HostPid]) -> Result<(), SessionError> {
        for pid in residue {
            self.hold_one_still(*pid)?;
        }
        self.host.settle(HALT)
    }

    fn hold_one_still(&mut self, pid: HostPid) -> Result<(), SessionError> {
        if self.host.is_stopping(pid) {
            return Ok(());
        }
        self.undo.push(Step::Held(pid));
        let hold = if self.host.has_drivers_threads(pid) { H::hold } else { H::hold_whole };
        match hold(self.host, pid) {
            Err(_) if self.host.is_gone(pid) => Ok(()),
            held => held,
        }
    }

    /// Returns the mappings of the driver's devices in these processes.
    pub(super) fn mappings_of(&mut self, pids: &[HostPid]) -> Vec<(u64, u64)> {
        pids.iter().flat_map(|pid| self.host.mappings(*pid)).collect()
    }

    /// Returns whether all that a process has mapped of the driver's devices is among these mappings, of CUDA processes: the
    /// process was forked from one of them.
    pub(super) fn has_inherited(&mut self, pid: HostPid, mappings: &[(u64, u64)]) -> bool {
        let own = self.host.mappings(pid);
        !own.is_empty() && own.iter().all(|mapping| mappings.contains(mapping))
    }

    /// Holds, on the way back of a container that is to be left frozen, what is not held yet. A container that a dead
    /// session has left thawed is frozen first.
    pub(super) fn hold_rest_still(&mut self, faults: &mut Faults) {
        let pids = match self.host.pids() {
            Ok(pids) => pids,
            Err(fault) => return faults.note(Err(fault)),
        };
        let held = self.undo.pids(Step::Held);
        let loose = pids.into_iter().filter(|pid| !held.contains(pid) && !self.host.is_stopping(*pid));
        let loose: Vec<HostPid> = loose.collect();
        if loose.is_empty() {
            return;
        }
        if !self.host.is_frozen() {
            let frozen = self.host.freeze_at_rest();
            faults.note(frozen);
        }
        let (cuda, others): (Vec<HostPid>, Vec<HostPid>) =
            loose.into_iter().partition(|pid| self.host.has_drivers_threads(*pid));
        let held = self.hold_all(&cuda, H::hold);
        faults.note(held);
        let held = self.hold_all(&others, H::hold_whole);
        faults.note(held);
    }
}
