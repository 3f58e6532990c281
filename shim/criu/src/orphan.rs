//! criu left behind by another program killed meanwhile, `runc checkpoint` for one.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use proc::HostPid;
use reaper::Reaper;
use tokio::time::{Instant, timeout_at};

use crate::client::CANCEL_GRACE;
use crate::residue::kill_tree;

/// Waits for the end of each criu left by a killed program, and of each process that such a criu
/// was about to restore. criu finds the socket closed at the next stage, and undoes the work so
/// far. After [`CANCEL_GRACE`], criu is killed.
///
/// `work` is criu's working directory, the only mark: criu writes a title over the environment.
/// Called after the program's end, in a process that adopts orphans.
pub async fn end_orphans(work: &Path, reaper: &Reaper) {
    let Ok(work) = std::fs::metadata(work) else { return };
    let is_orphan = |pid: HostPid| {
        let is_criu = proc::name(pid).is_ok_and(|name| name == "criu");
        let works_there = std::fs::metadata(pid.path("cwd"))
            .is_ok_and(|folder| (folder.dev(), folder.ino()) == (work.dev(), work.ino()));
        is_criu && works_there
    };
    let adoption = reaper.adoption();
    let deadline = Instant::now() + CANCEL_GRACE;
    loop {
        let pids = proc::children(reaper.parent_of_orphans());
        // A known pid is this process's own child, with its own waiter.
        let Some(pid) = pids.into_iter().find(|pid| !adoption.knows(pid.raw()) && is_orphan(*pid)) else { return };
        tracing::warn!(%pid, "a runtime has left criu behind, whose end is waited for");
        let Ok(child) = adoption.adopt(pid.raw()) else { continue };
        if timeout_at(deadline, child.wait()).await.is_err() {
            tracing::warn!(%pid, "criu does not end, and is killed");
            kill_tree(&child);
            child.wait().await;
        }
    }
}
