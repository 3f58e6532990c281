//! A cgroup that CRIU freezes during a dump, and leaves frozen when it is killed.

use std::io;
use std::path::{Path, PathBuf};

/// A cgroup that was not frozen before the dump.
#[derive(Debug)]
pub(crate) struct Thawed {
    /// Its control file, and what thaws.
    file: PathBuf,
    thaw: &'static str,
}

impl Thawed {
    /// None when the cgroup is frozen already: then the dump is to leave it so.
    pub(crate) fn remember(cgroup: &Path) -> io::Result<Option<Self>> {
        let v1 = cgroup.join("freezer.state");
        match std::fs::read_to_string(&v1) {
            Ok(state) => return Ok((state.trim() == "THAWED").then_some(Self { file: v1, thaw: "THAWED" })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let v2 = cgroup.join("cgroup.freeze");
        let state = std::fs::read_to_string(&v2)?;
        Ok((state.trim() == "0").then_some(Self { file: v2, thaw: "0" }))
    }

    /// Thaws it, if it is frozen. To be called when criu has ended.
    pub(crate) fn restore(&self) {
        let thaw = || -> io::Result<()> {
            if std::fs::read_to_string(&self.file)?.trim() != self.thaw {
                std::fs::write(&self.file, self.thaw)?;
            }
            Ok(())
        };
        match thaw() {
            Ok(()) => {}
            // The container has gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(path = %self.file.display(), %error, "cannot thaw what criu froze"),
        }
    }
}
