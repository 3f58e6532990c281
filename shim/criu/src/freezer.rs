//! Freezer of a dumped cgroup. A killed criu leaves the cgroup frozen, or thawed.

use std::io;
use std::path::{Path, PathBuf};

/// State of a cgroup's freezer before the dump.
#[derive(Debug)]
pub(crate) struct Freezer {
    /// The control file.
    file: PathBuf,
    /// Contents before the dump, also valid for writing.
    before: &'static str,
}

impl Freezer {
    pub(crate) fn remember(cgroup: &Path) -> io::Result<Self> {
        let v1 = cgroup.join("freezer.state");
        match std::fs::read_to_string(&v1) {
            // FREEZING precedes FROZEN, and must be written as FROZEN.
            Ok(state) => {
                return Ok(Self { file: v1, before: if state.trim() == "THAWED" { "THAWED" } else { "FROZEN" } });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let v2 = cgroup.join("cgroup.freeze");
        let before = if std::fs::read_to_string(&v2)?.trim() == "0" { "0" } else { "1" };
        Ok(Self { file: v2, before })
    }

    /// Restores the state before the dump. Called after criu's end.
    pub(crate) fn restore(&self) {
        let restore = || -> io::Result<()> {
            if std::fs::read_to_string(&self.file)?.trim() != self.before {
                std::fs::write(&self.file, self.before)?;
            }
            Ok(())
        };
        match restore() {
            Ok(()) => {}
            // The container has gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::error!(path = %self.file.display(), %error, "cannot restore a freezer after criu has used it");
            }
        }
    }
}
