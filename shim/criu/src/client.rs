//! Handle to the installed criu.

use std::path::PathBuf;
use std::time::Duration;

use reaper::Reaper;

/// Longest time for a cancelled operation to undo the work so far, before criu is killed. CRIU
/// notices between two stages, and the longest stage writes memory, at 1 to 2 GB/s.
pub(crate) const CANCEL_GRACE: Duration = Duration::from_secs(10);

/// CRIU as installed on this machine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Criu {
    pub(crate) path: PathBuf,
    pub(crate) reaper: Reaper,
    pub(crate) cancel_grace: Duration,
}

impl Criu {
    /// Returns the `criu` found in PATH at each call.
    #[must_use]
    pub fn new(reaper: Reaper) -> Self {
        Self::at("criu", reaper)
    }

    /// Returns the criu at `path`, or in PATH for a bare name.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>, reaper: Reaper) -> Self {
        Self { path: path.into(), reaper, cancel_grace: CANCEL_GRACE }
    }

    /// Sets the longest time for a cancelled operation to undo the work so far, instead of
    /// [`CANCEL_GRACE`].
    #[cfg(test)]
    #[must_use]
    pub(crate) fn cancel_grace(mut self, grace: Duration) -> Self {
        self.cancel_grace = grace;
        self
    }
}
