//! A cgroup that CRIU freezes, or thaws for a moment, during a dump, and leaves so when it is killed.

use std::io;
use std::path::{Path, PathBuf};

/// A cgroup's freezer as it was before the dump.
#[derive(Debug)]
pub(crate) struct Freezer {
    /// The control file.
    file: PathBuf,
    /// What it held, and holds again when it is written there.
    before: &'static str,
}

impl Freezer {
    pub(crate) fn remember(cgroup: &Path) -> io::Result<Self> {
        let v1 = cgroup.join("freezer.state");
        match std::fs::read_to_string(&v1) {
            // FREEZING is on its way to FROZEN, and can only be written as that.
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

    /// Puts it back as it was. To be called when criu has ended.
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
                tracing::error!(path = %self.file.display(), %error, "cannot put back a freezer that criu has used");
            }
        }
    }
}
