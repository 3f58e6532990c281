//! The keeper: a container's GPU state moved to memory and back, by the thread that this is used from.
//!
//! ptrace binds held threads to the thread that holds them. Each operation holds and lets go by itself, so a keeper may
//! move between threads from one operation to the next.

use std::path::PathBuf;
use std::time::Duration;

use cuda::{Callers, Inventory, Pair};
use phase::Phase;

use crate::host::{INVENTORY, Machine};
use crate::session::{Resumed, Session, SessionError, Suspended};
use crate::swap::{Swap, Swapped};

/// Moves the GPU state of one container.
pub struct Keeper {
    callers: Callers,
}

impl Default for Keeper {
    fn default() -> Self {
        Self::new()
    }
}

impl Keeper {
    /// Returns a keeper whose first caller loads the driver already. This binary has to run [`cuda::caller_main`] when its
    /// first argument is [`cuda::CALLER`].
    #[must_use]
    pub fn new() -> Self {
        let mut callers = Callers::new(PathBuf::from("/proc/self/exe"));
        callers.prepare();
        Self { callers }
    }

    /// Returns this node's GPUs.
    ///
    /// # Errors
    /// When there is no driver, or it does not answer.
    pub fn inventory(&mut self) -> Result<Inventory, SessionError> {
        self.callers.inventory(INVENTORY).map_err(|failure| SessionError::NoDriver(failure.to_string()))
    }

    /// Moves the GPU state of the container that the process `pid` belongs to to its memory and leaves the container frozen.
    /// GPU work may go on for `patience`; then the driver may take `limit`.
    ///
    /// # Errors
    /// The container is as before then, and frozen if it was `paused`, unless the error is [`SessionError::NotUndone`].
    pub fn suspend(
        &mut self,
        pid: i32,
        paused: bool,
        patience: Duration,
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Suspended, SessionError> {
        let mut machine = Machine::of(pid, &mut self.callers)?;
        Session::new(&mut machine, began).suspend(paused, patience, limit)
    }

    /// Puts private mappings of files in the place of memory of a container that is suspended, without a change of what its
    /// processes find there. It may take `limit` for each process. No process of the container runs meanwhile.
    ///
    /// # Errors
    /// When that was not done, or not wholly. The container is suspended all the same and has its data, in memory or in
    /// files: it can be saved as it is, or resumed.
    pub fn swap(
        &mut self,
        pid: i32,
        swap: &Swap,
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Swapped, SessionError> {
        let mut machine = Machine::of(pid, &mut self.callers)?;
        Session::new(&mut machine, began).swap(swap, limit)
    }

    /// Gives the container its GPU state back, whatever state its processes are in, and leaves it frozen or running.
    ///
    /// # Errors
    /// When the state of some process cannot be moved. The others have theirs. It can be tried again.
    pub fn resume(
        &mut self,
        pid: i32,
        frozen: bool,
        pairs: &[Pair],
        limit: Duration,
        began: &mut dyn FnMut(Phase),
    ) -> Result<Resumed, SessionError> {
        let mut machine = Machine::of(pid, &mut self.callers)?;
        Session::new(&mut machine, began).resume(frozen, pairs, limit)
    }

    /// As [`Self::resume`], which leaves it running, for a frozen container whose CUDA processes have their memory, but for
    /// this staging memory, which is empty. The others get theirs meanwhile: nothing of the container runs on before
    /// `is_whole` has returned true. The files of the staging memory must be packs of the crate `memory`.
    ///
    /// # Errors
    /// When the state cannot be moved, or the memory has not come. The container is frozen or dead then, and of no use.
    pub fn resume_unfilled(
        &mut self,
        pid: i32,
        staging: &Swap,
        pairs: &[Pair],
        limit: Duration,
        began: &mut dyn FnMut(Phase),
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        let mut machine = Machine::of_unfilled(pid, &mut self.callers)?;
        Session::new(&mut machine, began).resume_unfilled(staging, pairs, limit, is_whole)
    }
}
