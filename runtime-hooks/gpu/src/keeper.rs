//! The GPU state of one container, from its checkpoint or restore to the end of that.

use std::path::PathBuf;
use std::time::Duration;

use cgroup::Cgroup;
use cuda::{Callers, Inventory, Pair};
use phase::Phase;

use crate::host::{INVENTORY, Machine};
use crate::session::{Owed, Resumed, Session, SessionError, Suspended, Undo};
use crate::swap::{Swap, Swapped};

/// Asks NVML for what this node has of GPUs, by a process of its own. Usable on any thread.
///
/// # Errors
/// When there is no driver, or it does not answer.
pub fn inventory() -> Result<Inventory, SessionError> {
    let taken = callers().inventory(INVENTORY);
    taken.map_err(|failure| SessionError::NoDriver(failure.to_string()))
}

fn callers() -> Callers {
    Callers::new(PathBuf::from("/proc/self/exe"))
}

/// What moves the GPU state of one container and keeps what is to be put back.
///
/// All calls come from one thread, which traces the container's processes. They block. The end of this process, or of a
/// keeper, lets go of what is held; the driver's locks stay, so whoever has a keeper that owes something calls
/// [`Self::pay`] until it does not.
pub struct Keeper {
    machine: Machine,
    undo: Undo,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("undo", &self.undo).finish_non_exhaustive()
    }
}

impl Default for Keeper {
    fn default() -> Self {
        Self::new()
    }
}

impl Keeper {
    /// Makes one that has begun to load the driver. This binary has to run [`cuda::caller_main`] when its first argument is
    /// [`cuda::CALLER`].
    #[must_use]
    pub fn new() -> Self {
        let mut callers = callers();
        callers.prepare();
        Self { machine: Machine::new(callers), undo: Undo::default() }
    }

    /// Moves the GPU state of the container of this cgroup to its memory and leaves it frozen; on failure it is as before, and
    /// frozen if it was `paused`, but for what is owed. GPU work may go on for `patience`; then the driver may take `limit`.
    ///
    /// # Errors
    /// When the state cannot be moved.
    pub fn suspend(
        &mut self,
        cgroup: &Cgroup,
        paused: bool,
        patience: Duration,
        limit: Duration,
        progress: &mut dyn FnMut(Phase),
    ) -> Result<Suspended, SessionError> {
        self.session(cgroup, progress).suspend(paused, patience, limit)
    }

    /// Puts private mappings of files in the place of memory of a container that is suspended, without a change of what its
    /// processes find there. It may take `limit` for each process. No process of the container runs meanwhile.
    ///
    /// # Errors
    /// When that was not done, or not wholly. The container has its data, in memory or in files: it can be resumed, and saved
    /// as it is if [`Self::is_suspended`].
    pub fn swap(
        &mut self,
        cgroup: &Cgroup,
        swap: &Swap,
        limit: Duration,
        progress: &mut dyn FnMut(Phase),
    ) -> Result<Swapped, SessionError> {
        self.session(cgroup, progress).swap(swap, limit)
    }

    /// Gives the container its GPU state back, whatever state its processes are in, and leaves it frozen or running.
    ///
    /// # Errors
    /// When not all is back: see [`Self::owes`].
    pub fn resume(
        &mut self,
        cgroup: &Cgroup,
        frozen: bool,
        pairs: &[Pair],
        limit: Duration,
        progress: &mut dyn FnMut(Phase),
    ) -> Result<Resumed, SessionError> {
        self.session(cgroup, progress).resume(frozen, pairs, limit)
    }

    /// As [`Self::resume`], which leaves it running, for a frozen container of which the CUDA processes have their memory, but
    /// for this staging memory, which is empty, and the others get it meanwhile. Nothing of it runs on before `is_whole` has
    /// said that all is there; if this process ends before, so does what it holds. The files of the staging memory must be
    /// packs of the crate `memory`.
    ///
    /// # Errors
    /// When the state cannot be moved or the memory has not come. The container is frozen then, and of no use; nothing is owed.
    #[expect(clippy::too_many_arguments, reason = "each is one thing")]
    pub fn resume_unfilled(
        &mut self,
        cgroup: &Cgroup,
        staging: &Swap,
        pairs: &[Pair],
        limit: Duration,
        progress: &mut dyn FnMut(Phase),
        is_whole: &mut dyn FnMut() -> bool,
    ) -> Result<Resumed, SessionError> {
        self.machine.hold_to_the_death();
        self.session(cgroup, progress).resume_unfilled(staging, pairs, limit, is_whole)
    }

    /// Tells whether the container is frozen with its GPU state in memory, nothing of it held: it can be saved.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.undo.is_suspended()
    }

    /// Returns what is still to be put back.
    #[must_use]
    pub fn owes(&self) -> Owed {
        self.undo.owed()
    }

    /// Tries to put back what is owed, once, and returns the rest. Processes that are gone owe nothing. To be called again,
    /// with growing pauses, until nothing is owed.
    pub fn pay(&mut self) -> Owed {
        let Self { machine, undo } = self;
        Session::new(machine, undo, &mut |_| {}).pay()
    }

    fn session<'k>(&'k mut self, cgroup: &Cgroup, progress: &'k mut dyn FnMut(Phase)) -> Session<'k, Machine> {
        self.machine.reach(cgroup);
        Session::new(&mut self.machine, &mut self.undo, progress)
    }
}
