//! Halts for tests that kill a process in a given step of a checkpoint or a restore.

use std::path::PathBuf;

use phase::Phase;
use rustix::process::{Signal, getpid, kill_process};

/// Environment variable with the folder of the halts. Nobody but a test sets the variable for containerd.
const VARIABLE: &str = "GPUSNAP_TEST_HALTS";

/// The halts of one container's session.
#[derive(Clone)]
pub(crate) struct Halts {
    folder: Option<PathBuf>,
    id: String,
}

impl Halts {
    /// Returns the halts that the environment asks for.
    pub(crate) fn of(id: &str) -> Self {
        Self { folder: std::env::var_os(VARIABLE).map(PathBuf::from), id: id.to_owned() }
    }

    /// Stops this process by SIGSTOP if the folder has a file `ID.PHASE`. Removes the file, so that a
    /// successor does not stop in turn.
    pub(crate) fn at(&self, phase: Phase) {
        let Some(folder) = &self.folder else { return };
        let mark = folder.join(format!("{}.{}", self.id, phase.name()));
        if std::fs::remove_file(mark).is_ok() {
            tracing::info!("the session stops at the phase {}, as a test asks", phase.name());
            // A process may always signal itself.
            let _ = kill_process(getpid(), Signal::STOP);
        }
    }
}
