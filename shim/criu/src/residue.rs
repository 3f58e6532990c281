//! Processes that are left when criu cannot remove them itself: those of a half-restored tree, and criu's own helpers.
//!
//! The root of a restored tree has criu's parent (`rst_sibling`), and so has every other process of the tree once criu
//! is dead: the process that orphans go to. Nobody else knows them: they are found here.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use proc::{HostPid, Identity};
use reaper::{Adoption, Child};
use rustix::mount::UnmountFlags;
use rustix::process::Signal;

use crate::notify::OnKilled;

/// Environment variable of one run of criu. The programs that it executes have it; criu itself and its forks write their
/// title over it, where criu was built so.
pub(crate) const MARKER: &str = "GPUSNAP_CRIU_RUN";

/// A value for [`MARKER`] that no other run has.
pub(crate) fn marker() -> String {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed))
}

/// What identifies the processes of one restore.
#[derive(Debug)]
pub(crate) struct Residue {
    /// Opened before criu was started.
    pub(crate) adoption: Adoption,
    /// The root, once CRIU has named it.
    pub(crate) root: Option<Child>,
    pub(crate) marker: String,
    /// The root's pid as dumped. A tree without a pid namespace of its own gets it again; CRIU does not name such a
    /// root before its memory is filled.
    pub(crate) dumped_pid: Option<i32>,
    /// When criu was started, in clock ticks since boot.
    pub(crate) since: u64,
}

impl Residue {
    /// What a run without a tree of its own, such as a dump, may leave: helpers of criu.
    pub(crate) fn of_helpers(adoption: Adoption, marker: String) -> Self {
        Self { adoption, root: None, marker, dumped_pid: None, since: u64::MAX }
    }

    /// Kills the processes that are left of the tree and waits for their end. To be called when criu has ended.
    pub(crate) async fn kill(&mut self, on_killed: Option<&OnKilled>) {
        let mut killed = vec![];
        if let Some(root) = self.root.take() {
            kill_tree(&root);
            killed.push(root);
        }
        for pid in proc::children(self.adoption.parent_of_orphans()) {
            if killed.iter().any(|known: &Child| known.process() == pid) || !self.is_ours(pid) {
                continue;
            }
            match self.adoption.adopt(pid.raw()) {
                Ok(child) => {
                    tracing::warn!(%pid, "criu left a process, which is killed");
                    kill_tree(&child);
                    killed.push(child);
                }
                Err(error) => tracing::debug!(%pid, %error, "a process of criu has gone by itself"),
            }
        }
        if let Some(on_killed) = on_killed {
            on_killed.run();
        }
        for child in killed {
            child.wait().await;
        }
    }

    fn is_ours(&self, pid: HostPid) -> bool {
        if Some(pid.raw()) == self.dumped_pid {
            // Whoever has this pid by chance is older, or CRIU would not have got it.
            return Identity::of(pid).is_ok_and(|process| process.start_time >= self.since);
        }
        let environment = std::fs::read(pid.path("environ")).unwrap_or_default();
        let wanted = format!("{MARKER}={}", self.marker);
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    }
}

/// Kills a process and all its descendants.
pub(crate) fn kill_tree(root: &Child) {
    if root.exit().is_none() {
        proc::kill_descendants(root.process());
    }
    // Already gone is what is wanted.
    let _ = root.signal(Signal::KILL);
}

/// Removes the mounts that a criu which was killed during a restore has left in its working directory. To be called when
/// it has ended.
pub fn remove_cgroup_mounts(work: &Path) {
    let Ok(entries) = std::fs::read_dir(work) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".criu.cgyard.")) {
        let path = entry.path();
        // All that is mounted in it goes with it.
        let unmounted = rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let Err(error) = std::fs::remove_dir(&path) {
            tracing::warn!(path = %path.display(), %error, ?unmounted, "cannot remove what a dead criu has mounted");
        }
    }
}
