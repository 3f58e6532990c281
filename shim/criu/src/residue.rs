//! Leftover processes of a criu unable to clean up: a half-restored tree, and criu's own helpers.
//!
//! The root of a restored tree has criu's parent (`rst_sibling`). After criu's death so has every
//! other process of the tree: the parent of orphans. This module alone finds such processes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use proc::{HostPid, Identity};
use reaper::{Adoption, Child};
use rustix::mount::UnmountFlags;
use rustix::process::Signal;

use crate::notify::OnKilled;

/// Environment variable of one run of criu. criu's helper programs have the variable; criu itself
/// and forks may write a title over it, depending on the build.
pub(crate) const MARKER: &str = "GPUSNAP_CRIU_RUN";

/// Returns a value for [`MARKER`], unique among runs.
pub(crate) fn marker() -> String {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed))
}

/// Identification of the processes of one restore.
#[derive(Debug)]
pub(crate) struct Residue {
    /// Opened before criu's start.
    pub(crate) adoption: Adoption,
    /// The root, once named by CRIU.
    pub(crate) root: Option<Child>,
    pub(crate) marker: String,
    /// The root's pid as dumped. A tree without a pid namespace gets the same pid again; CRIU names
    /// such a root only after filling the memory.
    pub(crate) dumped_pid: Option<i32>,
    /// Time of criu's start, in clock ticks since boot.
    pub(crate) since: u64,
}

impl Residue {
    /// Returns the possible leftovers of a run without a tree, such as a dump: helpers of criu.
    pub(crate) fn of_helpers(adoption: Adoption, marker: String) -> Self {
        Self { adoption, root: None, marker, dumped_pid: None, since: u64::MAX }
    }

    /// Kills the leftover processes of the tree and waits for the end. Called after criu's end.
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
            // Another process with this pid is older: otherwise CRIU could not have taken the pid.
            return Identity::of(pid).is_ok_and(|process| process.start_time >= self.since);
        }
        let environment = std::fs::read(pid.path("environ")).unwrap_or_default();
        let wanted = format!("{MARKER}={}", self.marker);
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    }
}

/// Kills a process and all descendants.
pub(crate) fn kill_tree(root: &Child) {
    if root.exit().is_none() {
        proc::kill_descendants(root.process());
    }
    // A process already gone is the goal.
    let _ = root.signal(Signal::KILL);
}

/// Removes the mounts left by a killed restore's criu in the working directory. Called after criu's
/// end.
pub fn remove_cgroup_mounts(work: &Path) {
    let Ok(entries) = std::fs::read_dir(work) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".criu.cgyard.")) {
        let path = entry.path();
        // All mounts inside go too.
        let unmounted = rustix::mount::unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let Err(error) = std::fs::remove_dir(&path) {
            tracing::warn!(path = %path.display(), %error, ?unmounted, "cannot remove a mount of a dead criu");
        }
    }
}
